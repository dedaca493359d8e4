"""Frames in device memory, and nodes whose frames lie apart, over the stub of the driver: no GPU is involved, tests/gpu asks one.

The stub's device memory crashes whoever touches it outside a call of the stub (TestTheStub shows that), so that every test here
which passes shows that compiled code and Python leave it alone.
"""

import contextlib
import gc
import itertools
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import World, on_duty, random_bytes
from cuda_stub import HERE, Stub, needs_compiler

from offload.engines import parse_engine
from offload.errors import DeviceLost, EngineUnavailable, InvalidInput, NotSupported, OutOfMemory
from offload.experiment.bench import run_bench
from offload.experiment.config import BenchConfig
from offload.experiment.tables import unverified
from offload.kernels import cuda
from offload.kernels.checksum import checksum_pages
from offload.kernels.cuda_driver import CudaError
from offload.kernels.cuda_memory import DeviceMemory, Mover
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.migrators.cpu_mt import CpuMt
from offload.migrators.dcbm import Dcbm
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.frames import POISON
from offload.mm.memmap import FRAMES_APART, FRAMES_FAR, FRAMES_TOGETHER
from offload.other_tasks import StaleTlbWrite
from offload.units import PAGE_SIZE

pytestmark = needs_compiler

PLACEMENTS = ("host", "pinned", "device")
PAIRS = [",".join(pair) for pair in itertools.product(PLACEMENTS, repeat=2)]
FAR = [pair for pair in PAIRS if "device" in pair]


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """The stub in the place of a device."""
    stub = Stub()
    stub.stand_in(monkeypatch)
    return stub


def world_of(nodes, pages=2048, **fields):
    """A World whose nodes lie as ``nodes``, such as "pinned,device", says."""
    world = World.__new__(World)
    fields = {"poison": True, **fields}
    world.machine = Machine(nodes=tuple(NodeConfig(pages, placement=placement) for placement in nodes.split(",")), **fields)
    world.process, world.expected, world.held = world.machine.process(), [], []
    return world


def migrator_of(name):
    return {"vanilla": lambda: None, "batch": McCopy}.get(name, lambda: parse_engine(name).make_migrator())()


def serves(name, nodes):
    try:
        parse_engine(name).check_nodes(nodes.split(","))
    except InvalidInput:
        return False
    return True


class TestTheStub:
    """Device memory is the stub's alone."""

    @pytest.mark.parametrize("access", ["ctypes.string_at(address, 1)", "ctypes.memset(address, 0, 1)"])
    def test_touching_it_crashes(self, stub, access):
        done = subprocess.run(
            [sys.executable, "-c", "import ctypes, sys\nsys.path.insert(0, 'tests')\nfrom cuda_stub import Stub\n"
             "device = Stub().device()\ndevice.enter()\naddress = device.driver.alloc(4096)\n"
             f"print('there', flush=True)\n{access}"], capture_output=True, text=True)
        assert done.stdout == "there\n" and done.returncode == -signal.SIGSEGV


class TestPairs:
    """Every engine that serves a pair of placements brings every byte there and back."""

    @pytest.mark.parametrize("nodes, name", [
        (nodes, name) for nodes in PAIRS for name in ("vanilla", "batch", "mt:2", "dma:2", "cuda-loop:2", "cuda-batch", "cuda-kernel")
        if nodes not in ("host,host", "pinned,pinned")])
    def test_there_and_back(self, stub, nodes, name):
        if not serves(name, nodes):
            with pytest.raises(InvalidInput) as refused:
                BenchConfig.parse(engines=name, size="2M", nodes=nodes)
            assert "\n" not in str(refused.value) and nodes in str(refused.value)
            assert "device" not in nodes or stub.state.allocs == 0
            return
        world = world_of(nodes)
        pfns = [*world.pfns(20), *world.pfns(3, 3), *world.pfns(1, 9)]
        migrator = migrator_of(name)
        with on_duty(world.machine, migrator) if migrator else contextlib.nullcontext():
            there = world.migrate(np.random.default_rng(1).permutation(pfns))
            world.check()
            back = world.migrate(world.machine.folios_of(world.process, world.expected[0][1], 20 * PAGE_SIZE), 0)
        assert there.rc == back.rc == 0
        assert there.copies == {"folios": 24, "batched": 0 if name == "vanilla" else 24, "discarded": 0}
        assert there.copied_bytes == there.moved_bytes == (20 + 24 + 512) * PAGE_SIZE
        world.check()

    def test_what_is_served(self):
        served = {name: [nodes for nodes in PAIRS if serves(name, nodes)] for name in (
            "vanilla", "batch", "vanilla+stream", "batch+stream", "mt:2", "dma:2", "cuda-loop:1", "cuda-batch", "cuda-kernel")}
        by_cpu = [nodes for nodes in PAIRS if "device" not in nodes]
        by_gpu = [nodes for nodes in PAIRS if "host" not in nodes]
        assert served == {**dict.fromkeys(("vanilla", "batch"), PAIRS),
                          **dict.fromkeys(("vanilla+stream", "batch+stream", "mt:2", "dma:2"), by_cpu),
                          **dict.fromkeys(("cuda-batch", "cuda-kernel"), by_gpu),
                          "cuda-loop:1": [nodes for nodes in PAIRS if nodes in by_gpu or "device" in nodes]}

    @pytest.mark.parametrize("protocol", ["v4", "flags", "v5", "v6"])
    def test_protocols(self, protocol):
        world = world_of("pinned,device", protocol=protocol)
        pfns = world.pfns(30)
        with on_duty(world.machine, migrator_of("cuda-kernel")):
            result = world.migrate(pfns, reason="demotion")
        assert result.rc == 0 and result.copies["batched"] == 30
        world.check()

    def test_sources_on_two_nodes(self):
        """One batch with sources in pinned and in device memory: no base serves both, addresses do."""
        world = world_of("pinned,device,device")
        pfns = [*world.pfns(10), *world.pfns(10, nid=1)]
        assert world.nodes_of(pfns) == [0] * 10 + [1] * 10
        with on_duty(world.machine, migrator_of("cuda-batch")):
            result = world.migrate(pfns, 2)
        assert result.rc == 0 and result.copies["batched"] == 20
        world.check()

    def test_kinds(self):
        assert [world_of(nodes).machine.mem.sys.frames_kind[0] for nodes in ("host,host", "host,pinned", "pinned,device")] == [
            FRAMES_TOGETHER, FRAMES_APART, FRAMES_FAR]


@pytest.fixture
def far():
    return world_of("device,device")


class TestOperations:
    """What compiled code does to frames elsewhere, it has done here, in order."""

    @pytest.mark.parametrize("nodes", FAR)
    def test_fresh_memory_is_zero_after_poison(self, nodes):
        world = world_of(nodes)
        address = world.process.mmap("64K", order=2)
        world.process.populate(address, 65536)
        assert world.process.read(address, 65536) == bytes(65536)

    def test_poison(self, far):
        pfn = int(far.machine.movable_ops_pages(1)[0])
        assert (far.machine.frames.read(pfn, 1) == POISON).all()

    @pytest.mark.parametrize("nodes", FAR)
    def test_fork_and_copy_on_write(self, nodes):
        world = world_of(nodes)
        address, _ = world.map(8)
        child = world.process.fork()
        content = bytearray(world.expected[0][2])
        child.write(address + 5000, b"mine")
        assert child.read(address, 8 * PAGE_SIZE) == bytes(content[:5000]) + b"mine" + bytes(content[5004:])
        world.process.pin(address + PAGE_SIZE)
        pinned = world.process.fork()
        assert pinned.read(address, 8 * PAGE_SIZE) == bytes(content)
        world.check()

    @pytest.mark.parametrize("nodes", FAR)
    def test_swap(self, nodes):
        world = world_of(nodes)
        world.machine.swapon("1M")
        address, _ = world.map(12)
        content = world.expected[0][2]
        world.process.swapout(address, 12 * PAGE_SIZE)
        assert world.machine.node_of(world.process, address) is None
        assert bytes(world.machine.swapped_page(1)) in {content[at:at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)}
        world.check()

    @pytest.mark.parametrize("nodes", FAR)
    def test_hugetlb(self, nodes):
        machine = Machine(nodes=tuple(NodeConfig(2048, placement=placement, hugepages=1) for placement in nodes.split(",")), poison=True)
        process = machine.process()
        address = process.mmap("2M", hugetlb=True)
        content = random_bytes(2 << 20)
        process.write(address, content)
        result = machine.migrate_pages(machine.folios_of(process, address, 2 << 20), 1)
        assert result.rc == 0 and result.copied_bytes == 2 << 20 and process.read(address, 2 << 20) == content
        child = process.fork()
        child.write(address, b"x")
        assert child.read(address, 4) == b"x" + content[1:4] and process.read(address, 4) == content[:4]

    def test_movable_ops_pages(self, far):
        pfns = far.machine.movable_ops_pages(0, nr=3)
        for pfn in pfns.tolist():
            far.machine.frames.fill(pfn, 1, pfn % 251)
        result = far.machine.migrate_pages(pfns, 1)
        assert result.rc == 0
        moved = np.flatnonzero((far.folios.private == 1) & (far.folios.refcount > 0))
        assert sorted(int(far.machine.frames.read(pfn, 1)[0, 7]) for pfn in moved.tolist()) == sorted(pfns % 251)

    def test_ksm(self, far):
        address = far.process.mmap("16K")
        far.process.write(address, b"same" * 2048)
        far.machine.ksm_merge([(far.process, address), (far.process, address + PAGE_SIZE)])
        assert far.process.read(address, 8192) == b"same" * 2048
        assert len(set(far.machine.folios_of(far.process, address, 8192).tolist())) == 1

    def test_files(self, far):
        file = far.machine.file("32K")
        address = far.process.mmap("32K", file=file, shared=True)
        far.process.write(address + 100, b"cached")
        private = far.process.mmap("32K", file=file)
        far.process.write(private, b"mine")
        assert far.process.read(address, 106) == bytes(100) + b"cached"
        assert far.process.read(private, 106) == b"mine" + bytes(96) + b"cached"

    def test_splitting_maps_no_zero_page(self, far):
        """To find pages of zeros somebody would have to look; elsewhere they are replaced by the shared one."""
        near = World(2048, 2048)
        for world, zeros in ((far, 0), (near, 7)):
            address, pfns = world.map(1, 3)
            world.process.write(address + PAGE_SIZE, bytes(7 * PAGE_SIZE))
            world.expected[0] = (*world.expected[0][:2], world.expected[0][2][:PAGE_SIZE] + bytes(7 * PAGE_SIZE))
            world.machine.fragment(1, 0)
            world.migrate(pfns)
            assert sum(world.machine.node_of(world.process, address + at * PAGE_SIZE) is None for at in range(8)) == zeros
            world.check()

    def test_another_task_writes_between_two_steps(self, far):
        address, pfns = far.map(2)
        write = StaleTlbWrite(far.process, address + 5, b"meanwhile")
        assert far.migrate(pfns, events=write.at("unmapped")).rc == 0 and write.outcome == "written"
        assert far.process.read(address + 5, 9) == b"meanwhile"

    @pytest.mark.parametrize("offset, nbytes", [(0, 1), (4095, 2), (100, 9000), (8191, 1)])
    def test_frames_read_and_write(self, far, offset, nbytes):
        frames, pfn = far.machine.frames, int(far.pfns(1, 2)[0])
        before = frames.read(pfn, 4)
        data = random_bytes(nbytes, 3)
        frames.write(pfn, data, offset)
        expected = before.reshape(-1)
        expected[offset:offset + nbytes] = np.frombuffer(data, np.uint8)
        assert np.array_equal(frames.read(pfn, 4).reshape(-1), expected)

    def test_no_view_of_device_memory(self):
        world = world_of("pinned,device")
        first = world.machine.mem.nodes.start_pfn.tolist()
        assert world.machine.frames.view(first[0], 2).shape == (2, PAGE_SIZE)
        with pytest.raises(NotSupported, match="device memory"):
            world.machine.frames.view(first[1], 1)
        with pytest.raises(InvalidInput, match="not frames of one node"):
            world.machine.frames.read(first[1] - 1, 2)

    def test_a_full_log(self, far, monkeypatch):
        """More is to be done than there are rows: the call stops, Python does it, the call goes on."""
        import offload.machine
        monkeypatch.setattr(offload.machine, "LOG_ROWS", 4096)
        world = world_of("device,device", batch_pages=1024)
        assert len(world.machine.mem.frame_log) == 4096
        pfns = world.pfns(700)
        frames, rows = world.machine.frames, []
        drain = frames.drain

        def counting(**options):
            rows.append(int(world.machine.mem.sys.frame_log_nr[0]))
            drain(**options)

        monkeypatch.setattr(frames, "drain", counting)
        for pfn in pfns[::2]:
            world.surround(pfn, lock=2)             # OTHERS_FOREVER: each attempt poisons another destination
        result = world.migrate(pfns)
        assert result.rc == 350 and max(rows) == 4096 - 1024 + 1
        monkeypatch.undo()
        world.folios.page_flags[pfns[::2]] &= ~1
        world.check()

    def test_ctrl_c_in_a_copy(self, far, monkeypatch):
        """The folio in hand is tried again, the batch is finished, nothing is lost."""
        pfns = far.pfns(20)
        copy_folio = far.machine.frames.copy_folio
        left = [7]

        def interrupted(*folio):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return copy_folio(*folio)

        monkeypatch.setattr(far.machine.frames, "copy_folio", interrupted)
        with pytest.raises(KeyboardInterrupt) as raised:
            far.migrate(pfns)
        assert raised.value.result.rc == 0 and raised.value.result.copies["folios"] == 20
        far.check()

    def test_ctrl_c_while_the_log_is_carried_out(self, far, monkeypatch):
        """The next that looks at bytes goes on where it stood."""
        address, _ = far.map(4)
        queue, left = far.machine.frames._one, [2]

        def interrupted(*row):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return queue(*row)

        monkeypatch.setattr(far.machine.frames, "_one", interrupted)
        fresh = far.process.mmap("16K")
        with pytest.raises(KeyboardInterrupt):
            far.process.write(fresh, random_bytes(16384, 9))
        assert far.process.read(fresh, PAGE_SIZE) == random_bytes(16384, 9)[:PAGE_SIZE]
        far.check()


class TestRefusals:
    """What cannot be is one line, before anything is allocated."""

    @pytest.fixture(autouse=True)
    def no_memory_of_earlier_tests(self, stub):
        gc.collect()

    @pytest.mark.parametrize("make", [CpuMt, lambda: McCopy("stream"), lambda: Dcbm.on_cpu(2), lambda: FaultyMigrator(CpuMt())])
    def test_migrators_of_the_cpu(self, far, make):
        with pytest.raises(InvalidInput, match="does not reach node 0 in device memory") as refused:
            far.machine.register(make())
        assert "\n" not in str(refused.value) and far.machine.offload.migrator is None

    @pytest.mark.parametrize("name", ["cuda-batch", "cuda-kernel"])
    @pytest.mark.parametrize("nodes", ["host,host", "host,pinned", "device,host"])
    def test_engines_that_do_not_reach_pageable_memory(self, stub, name, nodes):
        """A kernel that touched it would take the device with it, and all that lies there."""
        machine = world_of(nodes).machine
        for wrap in (lambda migrator: migrator, FaultyMigrator):
            with pytest.raises(InvalidInput, match=f"pinned, and node {nodes.split(',').index('host')} is not") as refused:
                machine.register(wrap(parse_engine(name).make_migrator()))
            assert "\n" not in str(refused.value) and machine.offload.migrator is None

    def test_the_example_of_the_page(self, stub, capsys):
        """docs/gpu.md's block of Python runs as it stands, and prints what its comment says."""
        page = (pathlib.Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text("utf-8")
        program, = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        exec(program, {})                           # noqa: S102 it is ours
        assert re.findall(r"print\(.*\)   # (.*)", program) == capsys.readouterr().out.splitlines()

    def test_more_than_the_device_has(self, stub):
        stub.have_bytes(40 << 20)
        with pytest.raises(OutOfMemory, match="need 68M and stub, not a GPU has 40M free") as refused:
            Machine(nodes=["32M", "32M"], placement="device")
        assert "\n" not in str(refused.value) and stub.state.allocs == 0

    def test_an_allocation_that_fails_all_the_same(self, stub):
        stub.state.fail_alloc = 2
        with pytest.raises(OutOfMemory, match="OUT_OF_MEMORY") as refused:
            Machine(nodes=["8M", "8M"], placement="device")
        assert "\n" not in str(refused.value)

    def test_bench_of_more_than_the_device_has(self, stub):
        stub.have_bytes(40 << 20)
        with pytest.raises(InvalidInput, match="use a smaller --size") as refused:
            BenchConfig.parse(engines="vanilla", size="32M", nodes="device,device")
        assert "\n" not in str(refused.value) and stub.state.allocs == 0

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(cuda, "probe", lambda: HERE._replace(reason="so it is"))
        for build in (lambda: Machine(nodes=["8M"], placement="device"),
                      lambda: BenchConfig.parse(engines="vanilla", size="2M", nodes="host,device")):
            with pytest.raises(EngineUnavailable, match="so it is"):
                build()

    @pytest.mark.parametrize("nodes", ["host,nowhere", "nowhere,device"])
    def test_nowhere_is_alone(self, nodes):
        with pytest.raises(InvalidInput, match="mixed"):
            Machine(nodes=tuple(NodeConfig(1024, placement=placement) for placement in nodes.split(",")))
        with pytest.raises(InvalidInput, match="mixed"):
            BenchConfig.parse(engines="vanilla", size="2M", nodes=nodes)

    def test_the_cpus_copy_kernel(self):
        with pytest.raises(InvalidInput, match="'stream'"):
            MachineConfig(nodes=(NodeConfig(placement="device"),), copy_kernel="stream")

    def test_memory_is_given_back(self, stub):
        frees = stub.state.frees
        world = world_of("device,device")
        del world
        gc.collect()
        assert stub.state.frees - frees == 3        # two nodes and the scratch memory


class TestChecksums:
    """One number for a page, wherever it lies."""

    def test_twins(self, far):
        pfns = np.array(far.pfns(50))[np.random.default_rng(1).permutation(50)]
        frames = far.machine.frames
        assert np.array_equal(frames.checksums(pfns), checksum_pages(np.concatenate([frames.read(pfn, 1) for pfn in pfns.tolist()])))

    def test_on_a_device_that_is_full(self, stub):
        """They need no memory that is not there: a device without any left is not a lost one."""
        gc.collect()
        world = world_of("device,device")
        pfns = np.array(world.pfns(50))
        stub.have_bytes(0)
        frames = world.machine.frames
        assert np.array_equal(frames.checksums(pfns), checksum_pages(np.concatenate([frames.read(pfn, 1) for pfn in pfns.tolist()])))
        assert frames.lost == () and stub.lines == []

    def test_across_nodes(self):
        world = world_of("host,device")
        pfns = np.array([*world.pfns(5), *world.pfns(5, nid=1), *world.pfns(5)])
        expected = checksum_pages(np.concatenate([world.machine.frames.read(pfn, 1) for pfn in pfns.tolist()]))
        assert np.array_equal(world.machine.frames.checksums(pfns), expected)

    def test_without_the_compiler(self, far, monkeypatch):
        """Pages then come to the host; the numbers are the same."""
        pfns = np.array(far.pfns(9))
        expected = far.machine.frames.checksums(pfns)

        def kernel(name):
            raise EngineUnavailable("there is no NVRTC")

        monkeypatch.setattr(far.machine.frames.device, "kernel", kernel)
        assert np.array_equal(far.machine.frames.checksums(pfns), expected)

    def test_together_and_apart(self):
        for nodes in ("host,host", "pinned,host"):
            world = world_of(nodes)
            pfns = np.array([*world.pfns(4), *world.pfns(4, nid=1)])
            expected = checksum_pages(np.concatenate([world.machine.frames.view(pfn, 1) for pfn in pfns.tolist()]))
            assert np.array_equal(world.machine.frames.checksums(pfns), expected)

    def test_what_it_notices(self):
        rng = np.random.default_rng(2)
        page = rng.integers(0, 256, (1, PAGE_SIZE), np.uint8)
        seen = {int(checksum_pages(page)[0])}
        for bit in rng.integers(0, PAGE_SIZE * 8, 200).tolist():
            changed = page.copy()
            changed[0, bit // 8] ^= 1 << bit % 8
            seen.add(int(checksum_pages(changed)[0]))
        swapped = page.reshape(-1, 8)[[1, 0, *range(2, 512)]].reshape(1, -1)
        seen.add(int(checksum_pages(swapped)[0]))
        assert len(seen) >= 200


class TestFaults:
    """A CUDA error in the middle of a batch."""

    @pytest.mark.parametrize("nodes", ["device,device", "pinned,device", "device,pinned"])
    @pytest.mark.parametrize("name, fault, at", [("cuda-loop:2", "fail_copy", 5), ("cuda-batch", "fail_copy", 5), ("cuda-kernel", "fail_launch", 0)])
    def test_the_device_still_answers(self, stub, nodes, name, fault, at):
        """What the engine did not do, single copies do. The engine is out of service with one line."""
        world = world_of(nodes)
        pfns = np.array(world.pfns(40))[np.random.default_rng(1).permutation(40)]
        with on_duty(world.machine, migrator_of(name)) as migrator:
            setattr(stub.state, fault, at + (stub.state.copies if fault == "fail_copy" else stub.state.launches))
            result = world.migrate(pfns)
            assert result.rc == 0 and migrator.folios_failures > 0 and result.copies["folios"] == 40
            world.check()
            again = world.migrate(world.machine.folios_of(world.process, world.expected[0][1], 40 * PAGE_SIZE), 0)
        assert again.rc == 0 and again.copies["batched"] == 0
        world.check()
        assert len(stub.lines) == 1 and "is out of service" in stub.lines[0] and "folio by folio" in stub.lines[0]
        with pytest.raises(EngineUnavailable):
            Machine(nodes=["8M"], placement="device")

    def test_a_single_copy_that_is_refused_once(self, stub, far):
        pfns = far.pfns(10)
        stub.state.fail_copy = stub.state.copies + 3
        assert far.migrate(pfns).rc == 0
        far.check()
        assert stub.lines == []

    @pytest.mark.parametrize("name, at", [(name, at) for name in ("vanilla", "batch", "cuda-loop:2", "cuda-batch") for at in (0, 7)]
                             + [("cuda-kernel", 0)])
    def test_lost_on_the_way_to_the_device(self, stub, name, at):
        """The sources are in pinned memory: not one byte is lost, whatever the batch had copied. A folio that had moved is."""
        world = world_of("pinned,device", poison=False)
        address, pfns = world.map(20)
        sequence = np.random.default_rng(1).permutation(20)
        content = world.expected.pop()[2]
        moved = at if name == "vanilla" else 0
        assert lose_in_migration(world, stub, pfns[sequence], name, at).result.rc == 20 - moved
        for page in range(20):
            here = address + page * PAGE_SIZE
            if page in sequence[:moved]:
                with pytest.raises(DeviceLost, match="node 1"):
                    world.process.read(here, 1)
            else:
                assert world.process.read(here, PAGE_SIZE) == content[page * PAGE_SIZE:(page + 1) * PAGE_SIZE]
        world.check()
        assert len(stub.lines) == 1

    @pytest.mark.parametrize("name, at", [(name, at) for name in ("vanilla", "batch", "cuda-loop:2", "cuda-batch") for at in (0, 7)]
                             + [("cuda-kernel", 0)])
    def test_lost_on_the_way_from_the_device(self, stub, name, at):
        """What has arrived is whole, what has not is lost and says so; other nodes are intact."""
        world = world_of("device,pinned", poison=False)
        elsewhere, _ = world.map(5, nid=1)
        kept = world.expected.pop()
        address, pfns = world.map(20)
        content = world.expected.pop()[2]
        lose_in_migration(world, stub, pfns[np.random.default_rng(1).permutation(20)], name, at)
        world.expected = [kept]
        world.check()
        for page in range(20):
            here = address + page * PAGE_SIZE
            if world.machine.node_of(world.process, here) == 1:
                assert world.process.read(here, PAGE_SIZE) == content[page * PAGE_SIZE:(page + 1) * PAGE_SIZE]
            else:
                for touch in (lambda: world.process.read(here, 1), lambda: world.process.write(here, b"x")):
                    with pytest.raises(DeviceLost, match="node 0 is lost with stub, not a GPU"):
                        touch()
        world.check()
        world.process.exit()
        world.machine.validate()

    def test_afterwards(self, stub):
        """Calls that would need a lost node are refused by name; processes elsewhere live on."""
        world = world_of("pinned,device", poison=False)
        pfns = world.pfns(5)
        device_pfns = world.pfns(5, nid=1)
        world.expected.pop()
        lose_in_migration(world, stub, pfns, "vanilla", 0)
        frames = world.machine.frames
        assert frames.lost == (1,)
        for attempt in (lambda: world.migrate(pfns), lambda: world.migrate(device_pfns, 0), lambda: frames.read(device_pfns[0], 1),
                        lambda: frames.write(device_pfns[0], b"x"), lambda: frames.fill(device_pfns[0], 1, 0),
                        lambda: frames.checksums(np.array(device_pfns))):
            with pytest.raises(DeviceLost, match="node 1 is lost") as lost:
                attempt()
            assert "\n" not in str(lost.value) and lost.value.errno == 5
        with pytest.raises(DeviceLost, match="node 1 is lost"):
            world.process.move(world.expected[0][1], 5 * PAGE_SIZE, 1)
        world.check()
        fresh = world.process.mmap("16K", nid=1)
        with pytest.raises(DeviceLost):
            world.process.write(fresh, b"there is no such memory")
        world.process.write(world.expected[0][1], b"here is")
        assert world.process.read(world.expected[0][1], 7) == b"here is"
        assert len(stub.lines) == 1

    def test_lost_after_ctrl_c(self, stub, monkeypatch):
        """The batch is being finished when the device goes: it is finished all the same."""
        world = world_of("pinned,device", poison=False)
        pfns = world.pfns(20)
        copy_folio, calls = world.machine.frames.copy_folio, []

        def interrupted(*folio):
            calls.append(folio)
            if len(calls) == 3:
                stub.state.lose_at = stub.state.executed + 2
                raise KeyboardInterrupt
            return copy_folio(*folio)

        monkeypatch.setattr(world.machine.frames, "copy_folio", interrupted)
        with pytest.raises(DeviceLost) as lost:
            world.migrate(pfns)
        assert lost.value.result.rc == 16 and world.nodes_of(pfns).count(0) >= 16
        world.machine.validate()
        assert not world.machine.mem.nodes.nr_isolated_anon.any()

    def test_an_error_that_shows_late(self, stub, far, monkeypatch):
        """Of what was queued nobody can tell what arrived: the device is lost, whatever it answers later."""
        sync = far.machine.frames.mover.sync
        failures = [CudaError("cuStreamSynchronize", 719, "CUDA_ERROR_LAUNCH_FAILED")]

        def failing():
            if failures:
                raise failures.pop()
            sync()

        monkeypatch.setattr(far.machine.frames.mover, "sync", failing)
        with pytest.raises(DeviceLost, match="LAUNCH_FAILED"):
            far.process.write(far.process.mmap("16K"), bytes(16384))
        assert stub.lines == ["offload: device memory on stub, not a GPU is out of service: cuStreamSynchronize failed: "
                              "CUDA_ERROR_LAUNCH_FAILED (719); what lay there is lost"]

    def test_a_call_is_refused_and_the_device_does_not_answer(self, stub, far):
        """Lost already when the operation is queued, which says what."""
        address = far.process.mmap("16K")
        far.process.write(address, bytes(16384))
        stub.state.lost = 1
        with pytest.raises(DeviceLost, match="nodes 0, 1 are lost with stub, not a GPU: .*LAUNCH_FAILED"):
            far.process.read(address, 16384)
        assert len(stub.lines) == 1 and "what lay there is lost" in stub.lines[0]

    @pytest.mark.parametrize("refusals", [1, 2])
    def test_a_call_is_refused_by_a_device_that_answers(self, far, monkeypatch, refusals):
        """It is tried once more; refused again, the device is lost with the second error."""
        frames, address = far.machine.frames, far.process.mmap("16K")
        far.process.write(address, b"kept" * 4096)
        fill, left = frames.mover.fill, [CudaError("cuMemsetD8Async", 1, f"REFUSED_{nr}") for nr in range(refusals, 0, -1)]

        def refused(*row):
            if left:
                raise left.pop()
            fill(*row)

        monkeypatch.setattr(frames.mover, "fill", refused)
        if refusals == 1:
            frames.fill(far.machine.folios_of(far.process, address, PAGE_SIZE)[0], 1, 7)
            assert far.process.read(address, PAGE_SIZE) == b"\7" * PAGE_SIZE and not frames.lost
        else:
            with pytest.raises(DeviceLost, match="REFUSED_2"):
                frames.fill(far.machine.folios_of(far.process, address, PAGE_SIZE)[0], 1, 7)

    def test_lost_while_memory_is_written(self, stub, far):
        address = far.process.mmap("64K")
        stub.state.lose_at = stub.state.executed + 2
        with pytest.raises(DeviceLost, match="nodes 0, 1 are lost"):
            far.process.write(address, bytes(65536))
        far.machine.validate()


def lose_in_migration(world, stub, pfns, name, at):
    """Migrate to node 1 with an engine and lose the device at executed copy ``at`` from here on (at once, for a kernel)."""
    migrator = migrator_of(name)
    with on_duty(world.machine, migrator) if migrator else contextlib.nullcontext():
        stub.state.lose_at = stub.state.executed + at
        with pytest.raises(DeviceLost) as lost:
            world.migrate(pfns)
    assert "\n" not in str(lost.value) and "other nodes are intact" in str(lost.value)
    return lost.value


def snapshot_of(pages):
    """A snapshot of a process with ``pages`` pages of random bytes, in folios of four pages."""
    from offload.workload import snapshot as snap
    vmas = (snap.SnapshotVma(start=1 << 21, end=2 << 21, prot="rw", shared=False, offset=0, path="", inode=0, device="00:00", flags=(),
                             kind="anon"),)
    folios = np.zeros(pages // 4, snap.FOLIO_DTYPE)
    at = np.arange(pages // 4)
    folios["va"], folios["page"], folios["folio"], folios["order"] = (1 << 21) + at * 4 * PAGE_SIZE, at * 4, at, 2
    folios["nr_mapped"], folios["mapcount"], folios["bits"] = 4, 1, snap.FOLIO_ANON
    data = np.frombuffer(random_bytes(pages * PAGE_SIZE, 5), np.uint8).reshape(pages, PAGE_SIZE).copy()
    return snap.Snapshot(pid=1, comm="far", taken="", kernel="", vmas=vmas, folios=folios, data=data, nr_pages=pages, vm_pin_kib=0,
                         folio_sizes_known=True)


class TestMigrateProcess:
    """`offload migrate` over every pair: a process is rebuilt in one memory, moved to the other and verified."""

    @pytest.mark.parametrize("nodes, name", [("device,device", "cuda-kernel"), ("pinned,device", "cuda-batch"), ("device,host", "vanilla"),
                                             ("host,device", "cuda-loop:2"), ("host,pinned", "mt:2"), ("device,pinned", "batch")])
    def test_verifies(self, nodes, name):
        from offload.workload.migrate_process import move_process, result_of
        from offload.workload.rebuild import rebuild
        rebuilt = rebuild(snapshot_of(64), nodes=tuple(nodes.split(",")), poison=True)
        result = result_of(move_process(rebuilt, parse_engine(name), validate=True))
        assert result["verified"] and result["pages_moved"] == 64 and result["verified_what"] == "checksums and placement, books"
        assert result["manifest"]["nodes"] == nodes.split(",")

    def test_a_wrong_byte_is_found(self):
        from offload.workload.migrate_process import move_process
        from offload.workload.rebuild import rebuild
        rebuilt = rebuild(snapshot_of(16), nodes=("device", "device"))
        (pfn, *_) = rebuilt.machine.folios_of(rebuilt.process, 1 << 21, PAGE_SIZE).tolist()
        byte = rebuilt.machine.frames.read(pfn, 1)[0, 77]
        rebuilt.machine.frames.write(pfn, bytes([byte ^ 1]), 77)
        assert move_process(rebuilt, parse_engine("vanilla")).bad.tolist() == [True] + [False] * 15

    @pytest.mark.parametrize("options, why", [
        (("--nodes", "device,device", "--engine", "batch+stream"), "CPU does not reach"), (("--nodes", "moon,host"), "moon"), (("--nodes", "host"), "two placements"),
        (("--nodes", "pinned,pinned", "--engine", "vanilla", "--layout-only"), "a layout has none"),
        (("--nodes", "host,host", "--engine", "cuda-batch"), "out of its reach")])
    def test_refusals(self, capsys, options, why):
        from offload.cli import main
        assert main(["migrate", "--pid", "self", *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and why in said.err and said.err.count("\n") == 1

    def test_the_command(self, capsys, tmp_path):
        from offload.cli import main
        from offload.workload import snapshot as snap
        path = tmp_path / "far.snapshot"
        snap.save(snapshot_of(64), path)
        assert main(["migrate", str(path), "--nodes", "pinned,device", "--engine", "cuda-kernel", "--validate"]) == 0
        said = capsys.readouterr().out
        assert "\nnodes pinned,device\n" in said and "verified  checksums and placement of every page" in said


class TestMover:
    """Single operations on a stream."""

    def test_answers(self, stub):
        mover = Mover(stub.device())
        assert mover.answers() is None
        stub.state.lose_at = stub.state.executed
        assert "LAUNCH_FAILED" in mover.answers()

    def test_more_than_there_is(self, stub):
        stub.have_bytes(1 << 20)
        device = stub.device()
        with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
            DeviceMemory(device, 2 << 20)


class TestBench:
    """The numbers mean nothing; every page has the checksum of what belongs there."""

    @pytest.mark.parametrize("nodes, engines", [
        ("device,device", "vanilla,batch,cuda-loop:2,cuda-batch,cuda-kernel"), ("pinned,device", "vanilla,cuda-kernel"),
        ("device,pinned", "batch,cuda-batch"), ("host,device", "vanilla,cuda-loop:1"), ("host,pinned", "vanilla,batch,mt:2")])
    def test_verifies(self, nodes, engines):
        config = BenchConfig.parse(size="2M", orders="0,9", engines=engines, repeat=1, warmup=0, nodes=nodes)
        result = run_bench(config)
        assert unverified(result) == [] and result["manifest"]["nodes"] == nodes.split(",")
        assert f"--nodes {nodes} " in result["manifest"]["command"]
        assert ("checksum" in result["manifest"]["verified"]) == ("device" in nodes)
        assert all(row["gbps"]["mean"] > 0 and row["limit_gbps"] > 0 for row in result["rows"])
        for row in result["rows"]:
            by_cpu = "device" not in nodes and not row["engine"].startswith("cuda")
            assert row["hardware"] == ("CPU" if by_cpu else "not verified") and (row["device"] is None) == by_cpu
            assert row["call"].startswith("CPU") == by_cpu

    def test_a_wrong_byte_is_found(self, stub, monkeypatch):
        stub.state.corrupt = 0
        config = BenchConfig.parse(size="2M", orders="9", engines="vanilla", repeat=1, warmup=0, nodes="device,device")
        from offload.experiment.bench import Bench
        bench = Bench(config)
        migrate_pages = bench.machine.migrate_pages

        def corrupting(folios, *arguments, **options):
            stub.state.corrupt = 1
            try:
                return migrate_pages(folios, *arguments, **options)
            finally:
                stub.state.corrupt = 0

        assert bench.run(config.engines[0], None, 9, 0).verified
        monkeypatch.setattr(bench.machine, "migrate_pages", corrupting)
        assert not bench.run(config.engines[0], None, 9, 1).verified
