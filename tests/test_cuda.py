"""Whether there is a GPU, and what happens where there is none. Devices are stand-ins here: fakes of CuPy, and the stub of
the driver. A machine whose frames the stub has "pinned" migrates with the CUDA engines, end to end but for the GPU.
"""

import gc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import World, on_duty
from cuda_stub import HERE, PinnedArena, Stub, needs_compiler
from dma_conformance import DmaConformance

from offload.engines import parse_engine
from offload.errors import EngineUnavailable, InvalidInput, OutOfMemory
from offload.experiment.bench import run_bench
from offload.experiment.config import BenchConfig
from offload.experiment.tables import unverified
from offload.kernels import cuda
from offload.kernels.cuda import Probe
from offload.kernels.cuda_engines import WAYS, CudaProvider, Device
from offload.mm.frames import Frames
from offload.mm.memmap import FIRST_PFN


class FakeError(RuntimeError):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


@pytest.fixture
def cupy(monkeypatch):
    """A fake CuPy: ``runtime`` answers as the test wants."""
    runtime = types.SimpleNamespace(CUDARuntimeError=FakeError, driverGetVersion=lambda: 13000, getDeviceCount=lambda: 1,
                                    runtimeGetVersion=lambda: 13020)
    nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 5))
    package = types.ModuleType("cupy")
    package.__version__, package.__spec__ = "14.2.0", importlib.machinery.ModuleSpec("cupy", None)
    package.cuda = types.ModuleType("cupy.cuda")
    package.cuda.runtime, package.cuda.nvrtc = runtime, nvrtc
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", package.cuda)
    return package.cuda


class TestProbe:
    """Each thing that may be missing has its reason, one line each, and nothing is raised."""

    @staticmethod
    def probe():
        found = cuda.probe.__wrapped__()
        assert found.reason is None or "\n" not in found.reason
        return found

    def test_no_cupy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert self.probe().reason.startswith("CuPy is not installed: pip install -e '.[cuda13]' in the checkout")

    def test_a_broken_cupy(self, monkeypatch, tmp_path):
        tmp_path.joinpath("cupy.py").write_text("raise ImportError('numpy is too old\\nfor this')")
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        assert "numpy is too old for this" in self.probe().reason

    def test_no_driver(self, cupy):
        cupy.runtime.driverGetVersion = lambda: 0
        found = self.probe()
        assert "no CUDA driver" in found.reason and (found.cupy, found.driver, found.nvrtc) == ("14.2.0", None, "13.5")

    @pytest.mark.parametrize("answer", ["error", "none"])
    def test_no_device(self, cupy, answer):
        def get_device_count():
            if answer == "error":
                raise FakeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
            return 0
        cupy.runtime.getDeviceCount = get_device_count
        found = self.probe()
        assert "finds no device" in found.reason and found.driver == 13000

    def test_a_driver_that_does_not_start(self, cupy):
        def get_device_count():
            raise FakeError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        cupy.runtime.getDeviceCount = get_device_count
        cupy.runtime.driverGetVersion = lambda: 12080
        reason = self.probe().reason
        assert "cudaErrorInsufficientDriver" in reason and "of CUDA 12.8" in reason and "CuPy is for CUDA 13.2" in reason

    def test_another_error_is_not_swallowed(self, cupy):
        cupy.runtime.getDeviceCount = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            self.probe()

    @needs_compiler
    @pytest.mark.parametrize("fault, reason", [(None, None), ("corrupt", "self-test failed: 1 of 4096 bytes"),
                                               ("fail_alloc", "self-test failed: cuMemAlloc failed")])
    def test_a_device(self, cupy, monkeypatch, fault, reason):
        stub = Stub()
        device = stub.device()
        if fault:
            setattr(stub.state, fault, 1 if fault == "corrupt" else 0)
        monkeypatch.setattr(cuda, "_device", lambda: device)
        found = self.probe()
        assert found.reason is None if reason is None else reason in found.reason
        assert (found.device, found.capability, found.nr_sms, found.batch_call) == ("stub, not a GPU", (9, 0), 5, True)

    @needs_compiler
    def test_a_device_without_the_kernel(self, cupy, monkeypatch):
        """The other engines are there; cuda-kernel says what is missing, before anything is asked of it."""
        stub = Stub()
        monkeypatch.setattr(cuda, "_device", lambda: device)
        for compiled, reason in ((EngineUnavailable("NVRTC 13.5 does not compile the kernel for sm_70: invalid value"), "for sm_70"),
                                 (b"for another device", "the driver does not load the kernel copy_folios: cuModuleLoadData failed")):
            device = Device(stub.driver, 0, raiser(compiled))
            found = self.probe()
            assert found.reason is None and [cuda.why_not(way, found) is None for way in WAYS] == [True, True, False]
            assert reason in cuda.why_not("cuda-kernel", found)
            with pytest.raises(EngineUnavailable, match=reason):
                CudaProvider(device, "cuda-kernel")
            assert device.fault is None
        device = Device(stub.driver, 0, raiser(b"stub image"))
        device.capability = (6, 1)
        assert "capability 6.1 is below 7.0" in cuda.why_not("cuda-kernel", self.probe())

    def test_a_library_that_is_none(self, cupy, monkeypatch):
        def no_library():
            raise OSError("libcuda.so.1: cannot open shared object file")
        monkeypatch.setattr(cuda, "_device", no_library)
        assert "cannot open shared object file" in self.probe().reason


def raiser(outcome):
    """A compile_kernel() that gives, or raises, this."""
    def compile_kernel(capability, name):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    return compile_kernel


class TestWhyNot:
    """An engine may be missing where others are there."""

    def test_reasons(self):
        assert [cuda.why_not(way, HERE) for way in WAYS] == [None] * 3
        assert [cuda.why_not(way, Probe("so")) for way in WAYS] == ["so"] * 3
        old = HERE._replace(batch_call=False, driver=12040)
        assert [cuda.why_not(way, old) is None for way in WAYS] == [True, False, True]
        assert "CUDA 12.4" in cuda.why_not("cuda-batch", old) and "12.8" in cuda.why_not("cuda-batch", old)
        assert [cuda.why_not(way, HERE._replace(no_kernel="so")) for way in WAYS] == [None, None, "so"]

    def test_open_device(self, monkeypatch):
        monkeypatch.setattr(cuda, "probe", lambda: Probe("so it is"))
        with pytest.raises(EngineUnavailable, match="no GPU engine is available: so it is"):
            cuda.open_device()


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


class TestProcesses:
    """Where nothing is there nothing is imported, nothing warns, and the commands say why."""

    def test_importing_opens_nothing(self):
        done = run_python("import sys, offload.kernels.cuda, offload.kernels.cuda_engines, offload.engines\n"
                          "assert not {'cupy', 'numba'} & set(sys.modules)")
        assert (done.returncode, done.stderr) == (0, "")

    def test_without_cupy(self):
        done = run_python("import sys; sys.modules['cupy'] = None\n"
                          "from offload.cli import main\n"
                          "assert main(['engines']) == 0\n"
                          "sys.exit(main(['bench', '--engines', 'cuda-kernel', '--nodes', 'pinned,pinned']))")
        assert done.returncode == 2 and done.stdout.count("CuPy is not installed") == 1
        assert done.stderr.startswith("offload: engine 'cuda-kernel' is not available: CuPy is not installed")
        assert done.stderr.count("\n") == 1

    def test_with_cupy_and_no_driver(self):
        if importlib.util.find_spec("cupy") is None:
            pytest.skip("CuPy is not installed")
        if cuda.probe().driver:
            pytest.skip("there is a CUDA driver")
        done = run_python("import gc, sys\n"
                          "from offload.cli import main\n"
                          "assert main(['engines']) == 0\n"
                          "status = main(['bench', '--engines', 'cuda-kernel', '--nodes', 'pinned,pinned'])\n"
                          "gc.collect()\n"
                          "sys.exit(status)")
        assert done.returncode == 2 and done.stdout.count("there is no CUDA driver") == 1
        assert done.stderr.count("\n") == 1 and "engine 'cuda-kernel' is not available: there is no CUDA driver" in done.stderr


# A device that is the stub.

@pytest.fixture
def stub(monkeypatch):
    """The stub in the place of a device."""
    stub = Stub()
    stub.stand_in(monkeypatch)
    return stub


ENGINES = ("cuda-loop:1", "cuda-loop:3", "cuda-batch", "cuda-kernel")


class PinnedConformance(DmaConformance):
    @staticmethod
    def arena(nr_frames):
        return PinnedArena(nr_frames)


@needs_compiler
class TestLoopProvider(PinnedConformance):
    @staticmethod
    def make():
        return CudaProvider(Stub().device(), "cuda-loop", 3)


@needs_compiler
class TestBatchProvider(PinnedConformance):
    @staticmethod
    def make():
        return CudaProvider(Stub().device(), "cuda-batch", 2, most=3)


@needs_compiler
class TestKernelProvider(PinnedConformance):
    @staticmethod
    def make():
        return CudaProvider(Stub().device(), "cuda-kernel", 2)


@needs_compiler
class TestPinnedFrames:
    """Frames in pinned memory are like any others, and are unpinned when nobody can see them any more."""

    def test_lifetime(self, stub):
        gc.collect()                                # machines of earlier tests
        stub.reset()
        frames = Frames(8, "pinned")
        view = frames.view(FIRST_PFN + 2, 3)
        assert stub.state.allocs == 1 and view.shape == (3, 4096)
        assert view.ctypes.data == frames.address + ((FIRST_PFN + 2) << 12) and frames.address % (2 << 20) == 0
        del frames
        gc.collect()
        view[:] = 5
        assert stub.state.frees == 0
        del view
        gc.collect()
        assert stub.state.frees == 1

    def test_no_room(self, stub):
        stub.state.fail_alloc = 0
        with pytest.raises(OutOfMemory, match="pinned memory") as refused:
            Frames(8, "pinned")
        assert "\n" not in str(refused.value)

    def test_no_device(self, monkeypatch):
        monkeypatch.setattr(cuda, "probe", lambda: Probe("so it is"))
        with pytest.raises(EngineUnavailable, match="so it is"):
            Frames(8, "pinned")


def pinned_world(engine):
    from offload.machine import Machine, NodeConfig
    world = World.__new__(World)
    world.machine = Machine(nodes=(NodeConfig(4096, placement="pinned"),) * 2, poison=True, copy_kernel=engine.path_kernel)
    world.process, world.expected, world.held = world.machine.process(), [], []
    return world


@needs_compiler
class TestMigration:
    """The whole path with a CUDA engine behind dcbm, on the stub."""

    @pytest.mark.parametrize("name", ENGINES)
    def test_every_byte_arrives(self, stub, name):
        engine = parse_engine(name)
        world = pinned_world(engine)
        pfns = [*world.pfns(40), *world.pfns(6, 3), *world.pfns(2, 9)]
        with on_duty(world.machine, engine.make_migrator()) as migrator:
            result = world.migrate(pfns)
        assert migrator.name == "dcbm" and result.rc == 0
        assert result.copies["batched"] == len(pfns)
        assert migrator.folios_migrated == len(pfns) and migrator.folios_failures == 0
        world.check()

    @pytest.mark.parametrize("name, fault, at", [*((name, fault, 5) for name in ENGINES[:3] for fault in ("fail_copy", "lose_at")),
                                                 ("cuda-kernel", "lose_at", 0), ("cuda-kernel", "fail_launch", 0)])
    def test_a_fault_loses_nothing(self, stub, name, fault, at):
        """What the engine did not do, the path does: from pinned memory the CPU can always copy."""
        engine = parse_engine(name)
        world = pinned_world(engine)
        pfns = np.array(world.pfns(40))[np.random.default_rng(1).permutation(40)]
        setattr(stub.state, fault, at)
        with on_duty(world.machine, engine.make_migrator()) as migrator:
            result = world.migrate(pfns)
            assert result.rc == 0 and migrator.folios_failures > 0
            world.check()
            again = world.migrate(world.machine.folios_of(world.process, world.expected[0][1], 40 * 4096), 0)
            assert again.rc == 0 and again.copies["batched"] == 0
        world.check()
        assert len(stub.lines) == 1 and "out of service" in stub.lines[0]
        with pytest.raises(EngineUnavailable, match="failed"):
            engine.make_migrator()

    @pytest.mark.parametrize("name", ENGINES)
    def test_in_host_memory_it_is_refused(self, stub, name):
        with pytest.raises(InvalidInput, match="--nodes pinned,pinned"):
            BenchConfig.parse(engines=name, size="2M")

    def test_bench(self, stub):
        """The numbers mean nothing, the bytes are verified and the limit is the engine's own."""
        config = BenchConfig.parse(size="2M", orders="0,9", engines="vanilla,cuda-loop:2,cuda-batch,cuda-kernel", repeat=1,
                                   warmup=0, nodes="pinned,pinned")
        result = run_bench(config)
        assert unverified(result) == [] and result["manifest"]["nodes"] == ["pinned", "pinned"]
        rows = {(row["engine"], row["order"]): row for row in result["rows"]}
        assert {(row["hardware"], row["device"], row["cuda"]) for row in result["rows"] if row["engine"].startswith("cuda")} == {
            ("not verified", "stub, not a GPU", "13.0")} and rows["cuda-batch", 0]["flags"] == "SRC_ACCESS_ORDER_STREAM"
        assert rows["cuda-loop:2", 0]["copy_kernel"] == "cuda-loop" and rows["cuda-kernel", 9]["limit_gbps"] > 0
        assert set(result["limits"]["scattered_copy_gbps"]) == {"plain:1", "cuda-loop:2", "cuda-batch:1", "cuda-kernel:1"}
