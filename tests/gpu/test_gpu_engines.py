"""The CUDA engines on a device: the conformance of every backend and provider, in each pair of memories, and the whole path.

The same classes run on the stub of the driver in tests/test_cuda_engines.py. Nothing here asserts a speed. Without a device
all of it is skipped, with the reason of the probe.
"""

import contextlib
import itertools

import numpy as np
import pytest
from conftest import World, on_duty, random_bytes
from dma_conformance import DmaConformance
from kernel_conformance import GUARD_FRAMES, KernelConformance, scattered_plan, verdicts

from offload.calibration import AutoBackend, open_calibration
from offload.engines import parse_engine
from offload.errors import InvalidInput, OutOfMemory
from offload.experiment.alone import AloneConfig, run_alone
from offload.experiment.alone_tables import unverified_cells
from offload.experiment.bench import run_bench
from offload.experiment.config import BenchConfig
from offload.experiment.tables import unverified
from offload.kernels.base import FRAME_SIZE
from offload.kernels.checksum import checksum_pages
from offload.kernels.cuda import open_device, probe, self_test, why_not
from offload.kernels.cuda_engines import CudaBackend, CudaProvider, PinnedMemory
from offload.kernels.cuda_timing import CudaTimer
from offload.machine import Machine, NodeConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(probe().reason is not None, reason=f"needs a GPU: {probe().reason}")]


@pytest.fixture
def need():
    """``need(way)`` skips where this device cannot do it."""
    def need(way):
        reason = why_not(way)
        if reason:
            pytest.skip(f"{way}: {reason}")
    return need


class PinnedArena:
    """HostArena's members, in memory that host and device reach."""

    def __init__(self, nr_frames):
        self.memory = PinnedMemory(open_device(), (nr_frames + 2 * GUARD_FRAMES) * FRAME_SIZE)
        self._bytes = self.memory.view().reshape(-1, FRAME_SIZE)
        self.base = self.memory.address + GUARD_FRAMES * FRAME_SIZE

    def read(self):
        return self._bytes.copy()

    def write(self, frames):
        self._bytes[:] = frames

    def __del__(self):
        self.memory.close()


class DeviceArena:
    """The same in device memory; read and written through a pinned one."""

    def __init__(self, nr_frames):
        self.device = open_device()
        self.device.enter()
        self.staging = PinnedArena(nr_frames)
        self.nbytes = self.staging.memory.nbytes
        self.address = self.device.driver.alloc(self.nbytes)
        self.base = self.address + GUARD_FRAMES * FRAME_SIZE
        self.stream = self.device.driver.stream()

    def _copy(self, dst, src):
        self.device.enter()
        self.device.driver("cuMemcpyAsync", dst, src, self.nbytes, self.stream)
        self.device.driver("cuStreamSynchronize", self.stream)

    def read(self):
        self._copy(self.staging.memory.address, self.address)
        return self.staging.read()

    def write(self, frames):
        self.staging.write(frames)
        self._copy(self.address, self.staging.memory.address)

    def __del__(self):
        self.device.quietly("cuStreamDestroy_v2", self.stream)
        self.device.quietly("cuMemFree_v2", self.address)


def conformance(way, chans, arena):
    """The conformance class of an engine between two arenas of one kind."""
    class Test(KernelConformance):
        @staticmethod
        def make():
            reason = why_not(way)
            if reason:
                pytest.skip(f"{way}: {reason}")
            return CudaBackend(open_device(), way, chans)
    Test.arena = arena
    return Test


class TestLoopPinned(conformance("cuda-loop", 2, PinnedArena)):
    pass


class TestLoopDevice(conformance("cuda-loop", 2, DeviceArena)):
    pass


class TestBatchPinned(conformance("cuda-batch", 1, PinnedArena)):
    pass


class TestBatchDevice(conformance("cuda-batch", 1, DeviceArena)):
    pass


class TestKernelPinned(conformance("cuda-kernel", 1, PinnedArena)):
    pass


class TestKernelDevice(conformance("cuda-kernel", 1, DeviceArena)):
    pass


class TestBetweenMemories:
    """Up, down, across, and from host to host by way of the device."""

    @pytest.mark.parametrize("way", ["cuda-loop", "cuda-batch", "cuda-kernel"])
    @pytest.mark.parametrize("dst_kind, src_kind", list(itertools.product((PinnedArena, DeviceArena), repeat=2)))
    def test_every_pair(self, need, way, dst_kind, src_kind):
        need(way)
        rng = np.random.default_rng(1)
        orders = rng.integers(0, 10, 50)
        nr_frames = int((1 << orders).sum()) + 64
        dst, src = dst_kind(nr_frames), src_kind(nr_frames)
        for arena in (dst, src):
            arena.write(rng.integers(0, 256, (nr_frames + 2 * GUARD_FRAMES, FRAME_SIZE), np.uint8))
        plan = scattered_plan(rng, nr_frames, orders, dst.base, src.base)
        before, done = (dst.read(), src.read()), np.zeros(len(orders), np.uint8)
        with CudaBackend(open_device(), way) as backend:
            assert backend.copy(plan, done) == 0 and done.all()
        assert verdicts(plan, before, (dst.read(), src.read())) == []

    @pytest.mark.parametrize("way", ["cuda-batch", "cuda-kernel"])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_hundred_thousand_pages(self, need, way, overlap):
        need(way)
        nr, rng = 100_000, np.random.default_rng(2)
        dst, src = DeviceArena(nr), DeviceArena(nr)
        src.write(rng.integers(0, 256, (nr + 2 * GUARD_FRAMES, FRAME_SIZE), np.uint8))
        plan = scattered_plan(rng, nr, np.zeros(nr, np.int64), dst.base, src.base)
        expected, done = src.read()[GUARD_FRAMES + plan.src], np.zeros(nr, np.uint8)
        with CudaBackend(open_device(), way, overlap=overlap) as backend:
            assert backend.copy(plan, done) == 0 and done.all()
        assert np.array_equal(dst.read()[GUARD_FRAMES + plan.dst], expected)


class TestProviderDevice(DmaConformance):
    """Streams as channels of a DMA engine."""

    @staticmethod
    def make():
        return CudaProvider(open_device(), "cuda-loop", 2)

    @staticmethod
    def arena(nr_frames):
        return PinnedArena(nr_frames)


class TestKernelProviderDevice(TestProviderDevice):
    @staticmethod
    def make():
        reason = why_not("cuda-kernel")
        if reason:
            pytest.skip(f"cuda-kernel: {reason}")
        return CudaProvider(open_device(), "cuda-kernel", 2)


PAIRS = [pair for pair in itertools.product(("host", "pinned", "device"), repeat=2) if pair != ("host", "host")]


def world_of(nodes, pages=8192):
    world = World.__new__(World)
    world.machine = Machine(nodes=tuple(NodeConfig(pages, placement=placement) for placement in nodes), poison=True)
    world.process, world.expected, world.held = world.machine.process(), [], []
    return world


class TestMigration:
    """The whole path, in every pair of memories that an engine serves: there, and back."""

    @pytest.mark.parametrize("nodes", PAIRS, ids=",".join)
    @pytest.mark.parametrize("name", ["vanilla", "batch", "cuda-loop:2", "cuda-batch", "cuda-kernel", "auto"])
    def test_every_byte_arrives(self, need, name, nodes):
        need(name.partition(":")[0])
        engine = parse_engine(name, nodes)
        try:
            engine.check_nodes(nodes)
        except InvalidInput:
            return
        world = world_of(nodes)
        pfns = [*world.pfns(400), *world.pfns(60, 3), *world.pfns(8, 9)]
        migrator = engine.make_migrator()
        with on_duty(world.machine, migrator) if migrator else contextlib.nullcontext():
            result = world.migrate(np.random.default_rng(1).permutation(pfns))
            assert result.rc == 0 and result.copies["batched"] == (len(pfns) if migrator else 0)
            world.check()
            back = world.migrate(world.machine.folios_of(world.process, world.expected[0][1], 400 * FRAME_SIZE), 0)
        assert back.rc == 0
        world.check()


class TestDeviceFrames:
    """Faults, copy on write, swap, hugetlb and checksums where the CPU reads no byte."""

    @pytest.mark.parametrize("nodes", [pair for pair in PAIRS if "device" in pair], ids=",".join)
    def test_a_process(self, nodes):
        world = world_of(nodes)
        world.machine.swapon("1M")
        address, _ = world.map(40)
        fresh = world.process.mmap("256K")
        assert world.process.read(fresh, 262144) == bytes(262144)
        child = world.process.fork()
        child.write(address + 5000, b"mine")
        assert child.read(address + 4999, 6)[1:5] == b"mine"
        child.exit()
        world.process.swapout(address, 8 * FRAME_SIZE)
        world.check()

    def test_hugetlb(self):
        machine = Machine(nodes=(NodeConfig(2048, placement="device", hugepages=1),) * 2)
        process = machine.process()
        address = process.mmap("2M", hugetlb=True)
        content = random_bytes(2 << 20)
        process.write(address, content)
        assert machine.migrate_pages(machine.folios_of(process, address, 2 << 20), 1).rc == 0
        assert process.read(address, 2 << 20) == content

    def test_checksums(self):
        """The kernel's are those of its NumPy twin."""
        world = world_of(("device", "device"))
        pfns = np.random.default_rng(3).permutation(world.pfns(5000))
        frames = world.machine.frames
        expected = checksum_pages(np.concatenate([frames.read(pfn, 1) for pfn in pfns.tolist()]))
        assert np.array_equal(frames.checksums(pfns), expected)

    def test_more_than_there_is(self):
        with pytest.raises(OutOfMemory, match="free; make the nodes smaller"):
            Machine(nodes=["1T"], placement="device")

    @pytest.mark.parametrize("nodes", ["device,device", "pinned,device", "device,pinned"])
    def test_bench(self, need, nodes):
        for way in ("cuda-loop", "cuda-batch", "cuda-kernel"):
            need(way)
        config = BenchConfig.parse(size="64M", orders="0,9", engines="vanilla,cuda-loop:2,cuda-batch,cuda-kernel", repeat=1, warmup=0,
                                   nodes=nodes)
        assert unverified(run_bench(config)) == []


class TestTimes:
    """Events and clocks tell a time, and agree that the device is not longer at it than the caller waits."""

    @pytest.mark.parametrize("way, nr_chans, resident", [("cuda-loop", 1, False), ("cuda-loop", 2, False), ("cuda-batch", 1, False),
                                                        ("cuda-kernel", 1, False), ("cuda-kernel", 1, True)])
    def test_a_batch(self, need, way, nr_chans, resident):
        need(way)
        nr, rng = 2000, np.random.default_rng(3)
        dst, src = DeviceArena(nr), DeviceArena(nr)
        for arena in (dst, src):
            arena.write(rng.integers(0, 256, (nr + 2 * GUARD_FRAMES, FRAME_SIZE), np.uint8))
        plan = scattered_plan(rng, nr, np.zeros(nr, np.int64), dst.base, src.base)
        before, done = (dst.read(), src.read()), np.zeros(nr, np.uint8)
        provider = CudaProvider(open_device(), way, nr_chans)
        timer = CudaTimer(provider)
        times = timer.run(plan, done, resident=resident)
        timer.close()
        provider.close()
        assert done.all() and verdicts(plan, before, (dst.read(), src.read())) == []
        assert 0 < times.device_ns < times.whole_ns and 0 < times.submit_ns < times.whole_ns
        assert (times.plan_ns is None) == resident

    @pytest.mark.parametrize("nodes", ["device,device", "pinned,device", "device,pinned", "pinned,pinned"])
    def test_engines_alone(self, nodes):
        result = run_alone(AloneConfig.parse(folios=300, size="16M", orders="0,4,9", nodes=(nodes,), repeat=1, migration=False))
        assert unverified_cells(result) == [] and all(row["gbps"] > 0 for row in result["rows"])
        assert (result["ceilings"] is None) == (nodes == "pinned,pinned")
        assert all(ceiling["gbps"] > 0 for ceiling in (result["ceilings"] or {}).values())


class TestAuto:
    """What is measured for a direction is chosen from, and the bytes arrive."""

    @pytest.mark.parametrize("direction", ["device,device", "pinned,device", "device,pinned", "pinned,pinned"])
    def test_a_batch_of_each_cell(self, direction):
        calibration = open_calibration()
        src_kind, dst_kind = ({"pinned": PinnedArena, "device": DeviceArena}[placement] for placement in direction.split(","))
        with AutoBackend(calibration) as backend:
            for cell in calibration.cells(direction):
                if cell["folios"] > 512:
                    continue
                rng = np.random.default_rng(cell["folios"])
                nr_frames = (cell["folios"] << cell["order"]) + 64
                dst, src = dst_kind(nr_frames), src_kind(nr_frames)
                for arena in (dst, src):
                    arena.write(rng.integers(0, 256, (nr_frames + 2 * GUARD_FRAMES, FRAME_SIZE), np.uint8))
                plan = scattered_plan(rng, nr_frames, np.full(cell["folios"], cell["order"]), dst.base, src.base)
                before, done = (dst.read(), src.read()), np.zeros(plan.nr_folios, np.uint8)
                assert backend.backend_for(plan)[0] in cell["ns"]
                assert backend.copy(plan, done) == 0 and done.all()
                assert verdicts(plan, before, (dst.read(), src.read())) == []


class TestSelfTest:
    def test_right(self):
        assert self_test(open_device()) is None
