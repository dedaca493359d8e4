"""What auto chooses, and that it is decided by measured times: over the stub of the driver, with a clock that counts what the
stub was asked to do. No GPU is involved, and no time here is one of a GPU.
"""

import json
import os

import numpy as np
import pytest
from conftest import World, on_duty
from cuda_stub import HERE, PinnedArena, Stub, needs_compiler
from kernel_conformance import KernelConformance

from offload import calibration as calibration_module
from offload.calibration import CPU, AutoBackend, Calibration, damage, direction_of, grid
from offload.engines import parse_engine
from offload.errors import EngineUnavailable
from offload.experiment.bench import run_bench
from offload.experiment.config import BenchConfig
from offload.experiment.tables import bench_tables, unverified
from offload.kernels import cuda
from offload.kernels.base import FRAME_SIZE, checked_plan
from offload.kernels.cpu import CpuBackend
from offload.kernels.cuda_engines import WAYS, CudaBackend, PinnedMemory
from offload.kernels.cuda_timing import DeviceRows
from offload.machine import Machine, NodeConfig
from offload.units import ENODEV

pytestmark = needs_compiler

HOLDS_FOR = {"device": "stub, not a GPU", "cuda": "13.0", "driver": None, "kernel": "abc", "sources": "def"}
PAIR = "device,device"


class Speeds:
    """A machine by its costs in ns: of each copy call, batch call, descriptor, launch, of a page, of a page on the CPU."""

    def __init__(self, call=2000, batch=4000, descriptor=1000, launch=9000, page=100, cpu_page=10**6):
        self.call, self.batch, self.descriptor, self.launch, self.page, self.cpu_page = call, batch, descriptor, launch, page, cpu_page

    def of(self, engine, nr, order):
        """What one batch costs, by hand."""
        pages = nr << order
        if engine == CPU:
            return pages * self.cpu_page
        if engine == "cuda-kernel":                 # its list goes up by a call of its own
            return self.call + self.launch + pages * self.page
        if engine == "cuda-batch":
            return self.batch + nr * self.descriptor + pages * self.page
        return nr * self.call + pages * self.page


class CountingCpu(CpuBackend):
    """The CPU's kernel; ``pages`` counts what all of them copied."""

    pages = 0

    def copy(self, plan, done):
        CountingCpu.pages += plan.nbytes // FRAME_SIZE
        return super().copy(plan, done)


class Setup:
    """A calibration over the stub whose clock shows what ``speeds`` say the stub's work would have cost."""

    def __init__(self, tmp_path, speeds=None, ways=tuple(WAYS), holds_for=None):
        self.stub, self.speeds, self.lines = Stub(), speeds or Speeds(), []
        self.device = self.stub.device()
        self.makers = {"cuda-loop:1" if way == "cuda-loop" else way: lambda way=way: CudaBackend(self.device, way) for way in ways}
        self.makers[CPU] = lambda: CountingCpu("stream")
        self.path = tmp_path / "auto-stub.json"
        self.calibration = Calibration(self.device, self.makers, self.path, dict(holds_for or HOLDS_FOR), clock=self.clock,
                                       say=self.lines.append)

    def clock(self):
        state, speeds = self.stub.state, self.speeds
        lists = state.bytes % FRAME_SIZE            # of the kernel: not pages
        return (state.async_calls * speeds.call + state.batch_calls * speeds.batch + (state.copies - state.async_calls) * speeds.descriptor
                + state.launches * speeds.launch + CountingCpu.pages * speeds.cpu_page + (state.bytes - lists) // FRAME_SIZE * speeds.page)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few and small cells: the stub's kernel runs lane after lane."""
    monkeypatch.setattr(calibration_module, "REGION_FRAMES", 1024)
    monkeypatch.setattr(calibration_module, "ORDERS", (0, 4, 9))
    monkeypatch.setattr(calibration_module, "COUNTS", (1, 8, 64, 512))


def without_runs(nr):
    """A batch of ``nr`` pages of which no two could be merged; far more memory than pages, so that calibration's have few, too."""
    dst, src = PinnedArena(2 * nr), PinnedArena(2 * nr)
    return checked_plan(dst.base, src.base, 2 * np.arange(nr), 2 * np.arange(nr)[::-1], [0] * nr), (dst, src)


class TestTheChoiceIsMeasured:
    """Whoever took the least time for a cell is taken for batches like it."""

    @pytest.mark.parametrize("speeds", [Speeds(), Speeds(launch=10**6), Speeds(call=50_000, batch=60_000, launch=1000),
                                        Speeds(descriptor=10, batch=3000), Speeds(call=100)])
    def test_for_every_cell(self, tmp_path, speeds):
        setup = Setup(tmp_path, speeds)
        for order, nr in grid():
            chosen = setup.calibration.pick(PAIR, nr, nr * FRAME_SIZE << order)
            by_hand = {engine: speeds.of(engine, nr, order) for engine in setup.calibration.candidates(PAIR)}
            # Runs that happen to be neighbours are merged, and lists counted as pages: a little less or more than by hand.
            assert by_hand[chosen] <= 1.1 * min(by_hand.values()), (order, nr, chosen, by_hand)

    def test_other_speeds_other_choice(self, tmp_path):
        fast_launch = Setup(tmp_path / "a", Speeds(launch=10)).calibration
        slow_launch = Setup(tmp_path / "b", Speeds(launch=10**9)).calibration
        assert fast_launch.pick(PAIR, 512, 512 * FRAME_SIZE) == "cuda-kernel"
        assert slow_launch.pick(PAIR, 512, 512 * FRAME_SIZE) == "cuda-batch"
        assert "cuda-kernel" not in slow_launch.winners(PAIR)

    def test_times_are_medians_of_single_copies(self, tmp_path):
        setup = Setup(tmp_path, Speeds())
        one = next(cell for cell in setup.calibration.cells(PAIR) if (cell["order"], cell["folios"]) == (4, 1))
        assert one["ns"]["cuda-loop:1"] == 2000 + 16 * 100 and one["ns"]["cuda-batch"] == 5000 + 16 * 100
        assert one["ns"]["cuda-kernel"] == pytest.approx(11000 + 16 * 100, abs=100)

    def test_the_nearest_cell(self, tmp_path, monkeypatch):
        setup = Setup(tmp_path)
        cells = [{"order": 0, "folios": 1, "ns": {"a": 1, "b": 2}}, {"order": 0, "folios": 64, "ns": {"a": 2, "b": 1}},
                 {"order": 9, "folios": 1, "ns": {"c": 1, "b": 2}}]
        monkeypatch.setattr(setup.calibration, "cells", lambda direction: cells)
        for nr, order, expected in ((1, 0, "a"), (7, 0, "a"), (9, 0, "b"), (100_000, 0, "b"), (1, 4, "a"), (1, 5, "c"), (3, 9, "c"),
                                    (1, 18, "c")):
            assert setup.calibration.pick(PAIR, nr, nr * FRAME_SIZE << order) == expected, (nr, order)

    def test_the_cpu_against_the_gpu(self, tmp_path):
        """Where both can be had: the one that a batch waits less for."""
        calibration = Setup(tmp_path, Speeds(cpu_page=1000)).calibration
        assert calibration.pick("pinned,pinned", 1, FRAME_SIZE) == CPU
        assert calibration.pick("pinned,pinned", 512, 512 * FRAME_SIZE) == "cuda-kernel"
        assert calibration.pick("device,pinned", 1, FRAME_SIZE) == "cuda-loop:1"

    def test_the_cpu_is_a_candidate_on_host_memory_only(self, tmp_path):
        calibration = Setup(tmp_path).calibration
        assert CPU in calibration.cells("pinned,pinned")[0]["ns"]
        for direction in ("device,device", "pinned,device", "device,pinned"):
            assert set(calibration.cells(direction)[0]["ns"]) == {"cuda-loop:1", "cuda-batch", "cuda-kernel"}

    def test_what_is_said(self, tmp_path):
        calibration = Setup(tmp_path, Speeds(call=2000, launch=9000, descriptor=5000)).calibration
        assert calibration.describe(PAIR) == "4K 64K cuda-loop:1, cuda-kernel from 8 folios; 2M cuda-loop:1"

    def test_nothing_is_left_behind(self, tmp_path):
        setup = Setup(tmp_path)
        held = setup.stub.state.streams, setup.stub.state.events
        setup.calibration.cells("pinned,device")
        assert (setup.stub.state.streams, setup.stub.state.events) == held and setup.stub.state.allocs == setup.stub.state.frees


class TestTheFile:
    """Measured once; kept with what it holds for; anything else is measured anew, and said."""

    def measure(self, tmp_path):
        setup = Setup(tmp_path)
        setup.calibration.cells(PAIR)
        assert setup.lines == ["offload: calibrating auto for device,device on stub, not a GPU, once for this driver"]
        return setup

    def test_the_second_process_measures_nothing(self, tmp_path):
        before = self.measure(tmp_path).calibration.cells(PAIR)
        again = Setup(tmp_path, Speeds(launch=10**9))       # it would choose otherwise, did it measure
        assert again.calibration.cells(PAIR) == before and again.stub.state.bytes == 0 and again.lines == []

    def test_another_direction_is_added(self, tmp_path):
        self.measure(tmp_path)
        other = Setup(tmp_path)
        other.calibration.cells("device,pinned")
        assert [line for line in other.lines if "device,pinned" in line] == other.lines != []
        assert set(json.loads(other.path.read_text())["directions"]) == {PAIR, "device,pinned"}

    @pytest.mark.parametrize("what", list(HOLDS_FOR))
    def test_stale(self, tmp_path, what):
        self.measure(tmp_path)
        other = Setup(tmp_path, holds_for=HOLDS_FOR | {what: "another"})
        assert other.calibration.cells(PAIR) and other.stub.state.bytes > 0
        assert len(other.lines) == 2 and f"holds for {what} {HOLDS_FOR[what]}, and here is another; measured anew" in other.lines[0]
        assert json.loads(other.path.read_text())["holds_for"][what] == "another"

    @pytest.mark.parametrize("kind", ["link", "dangling link", "fifo"])
    def test_what_is_no_file_is_replaced(self, tmp_path, kind):
        """Neither read, which may hang, nor written through."""
        folder, target = tmp_path / "cache", tmp_path / "target"
        folder.mkdir()
        if kind == "fifo":
            os.mkfifo(folder / "auto-stub.json")
        else:
            (folder / "auto-stub.json").symlink_to(target)
        if kind == "link":
            target.write_text("somebody's")
        setup = Setup(folder)
        setup.calibration.cells(PAIR)
        assert "measured anew" in setup.lines[0] and setup.path.is_file() and not setup.path.is_symlink()
        assert list(json.loads(setup.path.read_text())["directions"]) == [PAIR] and os.listdir(folder) == [setup.path.name]
        assert not target.exists() if kind != "link" else target.read_text() == "somebody's"

    def test_another_engine_is_there_now(self, tmp_path):
        Setup(tmp_path, ways=("cuda-loop",)).calibration.cells(PAIR)
        other = Setup(tmp_path)
        assert set(other.calibration.cells(PAIR)[0]["ns"]) == set(other.makers) - {CPU}
        assert "is of cuda-loop:1, and there are cuda-loop:1, cuda-batch, cuda-kernel; measured anew" in other.lines[0]

    @staticmethod
    def breaks():
        def edit(change):
            def broken(text):
                kept = json.loads(text)
                change(kept)
                return json.dumps(kept)
            return broken
        return {
            "cut off": lambda text: text[:len(text) // 2], "empty": lambda text: "", "no JSON": lambda text: "times\n", "a list": lambda text: "[]",
            "another format": edit(lambda kept: kept.update(format=2)), "no directions": edit(lambda kept: kept.pop("directions")),
            "a cell is missing": edit(lambda kept: kept["directions"][PAIR].pop()),
            "a cell is no cell": edit(lambda kept: kept["directions"][PAIR].__setitem__(0, 3)),
            "no times": edit(lambda kept: kept["directions"][PAIR][1].update(ns={})),
            "a time is negative": edit(lambda kept: kept["directions"][PAIR][1]["ns"].update({"cuda-batch": -1})),
            "a time is a word": edit(lambda kept: kept["directions"][PAIR][1]["ns"].update({"cuda-batch": "1"})),
            "a time is not a number": edit(lambda kept: kept["directions"][PAIR][1]["ns"].update({"cuda-batch": float("nan")})),
            "a time is missing": edit(lambda kept: kept["directions"][PAIR][1]["ns"].pop("cuda-batch")),
            "what it holds for is missing": edit(lambda kept: kept.pop("holds_for")),
        }

    @pytest.mark.parametrize("name", ["cut off", "empty", "no JSON", "a list", "another format", "no directions", "a cell is missing",
                                      "a cell is no cell", "no times", "a time is negative", "a time is a word", "a time is not a number",
                                      "a time is missing", "what it holds for is missing"])
    def test_damaged(self, tmp_path, name):
        setup = self.measure(tmp_path)
        expected = setup.calibration.cells(PAIR)
        setup.path.write_text(self.breaks()[name](setup.path.read_text()))
        other = Setup(tmp_path)
        assert other.calibration.cells(PAIR) == expected and other.stub.state.bytes > 0
        assert len(other.lines) == 2 and "measured anew" in other.lines[0] and "\n" not in other.lines[0]
        assert damage(json.loads(other.path.read_text())) is None

    def test_not_utf8(self, tmp_path):
        setup = self.measure(tmp_path)
        setup.path.write_bytes(b"\xff\xfe{}")
        assert "cannot be read" in Setup(tmp_path).lines[0]

    def test_a_place_that_cannot_be_written(self, tmp_path):
        tmp_path.joinpath("file").write_text("")
        setup = Setup(tmp_path / "file")
        assert setup.calibration.cells(PAIR)
        assert "cannot be kept" in setup.lines[-1] and "the next process measures anew" in setup.lines[-1]


class TestWhatCannotBeMeasured:
    """A fault ends it with one line; nothing is kept, nothing is held."""

    @pytest.mark.parametrize("fault, at", [("fail_alloc", 0), ("fail_alloc", 2), ("fail_copy", 700), ("lose_at", 40)])
    def test_faults(self, tmp_path, fault, at):
        setup = Setup(tmp_path)
        setattr(setup.stub.state, fault, at)
        with pytest.raises(EngineUnavailable, match="auto cannot be calibrated for device,device: .*; name an engine") as refused:
            setup.calibration.cells(PAIR)
        assert "\n" not in str(refused.value) and not setup.path.exists()
        failed_allocations = fault == "fail_alloc"
        assert setup.stub.state.frees == setup.stub.state.allocs - failed_allocations


class TestDirections:
    """The driver is asked where both ends lie."""

    def test_it(self, tmp_path):
        setup = Setup(tmp_path)
        pinned, frames = PinnedMemory(setup.device, 4 * FRAME_SIZE), DeviceRows(setup.device, 4)
        ends = {"pinned": pinned.address, "device": frames.base}
        for src in ends:
            for dst in ends:
                # The base is that of frame 0, which need not be there.
                plan = checked_plan(ends[dst] - 8 * FRAME_SIZE, ends[src] - 8 * FRAME_SIZE, [11], [9], [0])
                assert direction_of(setup.device, plan) == f"{src},{dst}"
        pinned.close()
        frames.close()


class TestAutoBackend(KernelConformance):
    """It keeps the promises of every backend, whoever copies."""

    arena = PinnedArena

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def folder(cls, tmp_path_factory):
        cls.tmp_path = tmp_path_factory.mktemp("auto")

    @classmethod
    def make(cls):
        module, kept = calibration_module, (calibration_module.REGION_FRAMES, calibration_module.ORDERS, calibration_module.COUNTS)
        module.REGION_FRAMES, module.ORDERS, module.COUNTS = 1024, (0, 4), (1, 8, 64)
        try:
            setup = Setup(cls.tmp_path, Speeds(call=2000, launch=9000, descriptor=200))
            assert len(setup.calibration.winners("pinned,pinned") - {CPU}) > 1
        finally:
            module.REGION_FRAMES, module.ORDERS, module.COUNTS = kept
        return AutoBackend(setup.calibration)


class TestHandedOn:
    """Each batch goes to the engine chosen for it."""

    def test_by_the_backend(self, tmp_path):
        setup = Setup(tmp_path, Speeds(call=2000, launch=9000, descriptor=10**6))
        state = setup.stub.state
        setup.calibration.cells("pinned,pinned")
        backend = AutoBackend(setup.calibration)
        for nr, expected in ((1, "cuda-loop:1"), (64, "cuda-kernel")):
            before = state.launches, state.async_calls
            plan, arenas = without_runs(nr)
            done = np.zeros(nr, np.uint8)
            assert backend.backend_for(plan)[0] == expected
            assert backend.copy(plan, done) == 0 and done.all()
            assert (state.launches - before[0], state.async_calls - before[1]) == ((0, 1) if nr == 1 else (1, 1))
        backend.close()


    def test_a_lost_device_is_not_taken_for_host_memory(self, tmp_path):
        """Its addresses are not known to a driver that has lost it, and the CPU would die of them."""
        setup = Setup(tmp_path, Speeds(cpu_page=1))
        memory, backend = DeviceRows(setup.device, 8), AutoBackend(setup.calibration)
        plan = checked_plan(memory.base, memory.base, [0, 2], [4, 6], [0, 0])
        for direction in ("pinned,pinned", PAIR):
            setup.calibration.cells(direction)
        setup.stub.state.lost = 1
        for _ in range(2):
            assert backend.copy(plan, np.zeros(2, np.uint8)) == -ENODEV
        assert len(setup.stub.lines) == 1 and "auto on stub, not a GPU is out of service" in setup.stub.lines[0]

    def test_a_direction_that_cannot_be_measured_is_said_once(self, tmp_path):
        """The way back may be one that nobody has asked for before; a batch is no place for an exception."""
        setup = Setup(tmp_path)
        plan, arenas = without_runs(4)
        setup.stub.state.fail_alloc = setup.stub.state.allocs
        backend = AutoBackend(setup.calibration)
        for _ in range(2):
            assert backend.copy(plan, np.zeros(4, np.uint8)) == -ENODEV
        assert [line for line in setup.lines if "cannot be calibrated for pinned,pinned" in line] == setup.lines[-1:]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The stub in the place of a device, and its calibration in the place of this machine's."""
    setup = Setup(tmp_path, Speeds(call=2000, launch=9000, descriptor=10**6))
    monkeypatch.setattr(cuda, "probe", lambda: HERE)
    monkeypatch.setattr(cuda, "_device", lambda: setup.device)
    monkeypatch.setattr(calibration_module, "open_calibration", lambda: setup.calibration)
    return setup


class TestTheEngine:
    """What auto is depends on where the frames lie, and its note says what was chosen and why."""

    def test_on_host_memory(self, device):
        engine = parse_engine("auto")
        assert (engine.migrator, engine.copy_kernel) == ("mc_copy", "stream")
        assert engine.note == "auto is batch+stream, on the CPU; a GPU does not reach frames of placement host,host"
        assert device.stub.state.bytes == 0, "calibrated for nothing"

    def test_where_the_cpu_is_the_fastest(self, device):
        """Then auto is the CPU's engine, without a detour."""
        device.speeds.cpu_page = 0
        engine = parse_engine("auto", ("pinned", "pinned"))
        assert (engine.migrator, engine.copy_kernel) == ("mc_copy", "stream")
        assert engine.note == ("auto is batch+stream, on the CPU; measured for pinned,pinned on stub, not a GPU: 4K 64K 2M batch+stream")

    def test_where_a_gpu_engine_is(self, device):
        engine = parse_engine("auto", ("device", "device"))
        assert (engine.migrator, engine.copy_kernel, engine.on_gpu) == ("auto", "auto", True)
        assert engine.note == ("auto is the fastest for each batch, as measured for device,device on stub, not a GPU: "
                               "4K 64K cuda-loop:1, cuda-kernel from 8 folios; 2M cuda-loop:1")

    def test_a_failed_calibration(self, device):
        """The CPU where it reaches both ends, and says why; else no engine."""
        device.stub.state.fail_alloc = 0
        engine = parse_engine("auto", ("pinned", "pinned"))
        assert engine.migrator == "mc_copy" and "cannot be calibrated" in engine.note
        device.stub.state.fail_alloc = device.stub.state.allocs
        with pytest.raises(EngineUnavailable, match="name an engine"):
            parse_engine("auto", ("device", "device"))

    def test_the_migrator(self, device):
        """The whole path: one batch of many pages, one of a large folio, each by its engine; every byte arrives."""
        engine = parse_engine("auto", ("pinned", "pinned"))
        assert engine.migrator == "auto"
        world = World.__new__(World)
        world.machine = Machine(nodes=(NodeConfig(4096, placement="pinned"),) * 2, poison=True)
        world.process, world.expected, world.held = world.machine.process(), [], []
        pages, large = world.pfns(300), world.pfns(1, 9)
        with on_duty(world.machine, engine.make_migrator()) as migrator:
            # In two calls, so that each is a batch of its own.
            results = [world.migrate(pfns) for pfns in (pages, large)]
        assert [result.rc for result in results] == [0, 0] and sum(result.copies["batched"] for result in results) == 301
        assert migrator.handed == {"cuda-kernel": 1, "cuda-loop:1": 1}
        world.check()

    @pytest.mark.parametrize("nodes", [("device", "device"), ("pinned", "device"), ("device", "pinned")])
    def test_with_device_memory(self, device, nodes):
        engine = parse_engine("auto", nodes)
        engine.check_nodes(nodes)
        world = World.__new__(World)
        world.machine = Machine(nodes=tuple(NodeConfig(2048, placement=placement) for placement in nodes), poison=True)
        world.process, world.expected, world.held = world.machine.process(), [], []
        pages = world.pfns(64)
        with on_duty(world.machine, engine.make_migrator()) as migrator:
            assert world.migrate(pages).copies["batched"] == 64
        assert migrator.handed == {"cuda-kernel": 1}
        world.check()

    def test_a_lost_device_loses_nothing(self, device):
        engine = parse_engine("auto", ("pinned", "pinned"))
        world = World.__new__(World)
        world.machine = Machine(nodes=(NodeConfig(2048, placement="pinned"),) * 2, poison=True)
        world.process, world.expected, world.held = world.machine.process(), [], []
        pfns = world.pfns(64)
        device.stub.state.lose_at = device.stub.state.executed
        with on_duty(world.machine, engine.make_migrator()):
            assert world.migrate(pfns).rc == 0
        world.check()

    def test_bench(self, device):
        """Its row stands beside the others, with a limit of its own, and the note says what it was."""
        config = BenchConfig.parse(size="2M", orders="0,9", engines="vanilla,auto", repeat=1, warmup=0, nodes="pinned,pinned")
        result = run_bench(config)
        assert unverified(result) == []
        assert {row["copy_kernel"] for row in result["rows"]} == {"plain", "auto"}
        assert set(result["limits"]["scattered_copy_gbps"]) == {"plain:1", "auto:1"}
        assert [row["handed"] for row in result["rows"] if row["engine"] == "vanilla"] == [None, None]
        pages, large = (row["handed"] for row in result["rows"] if row["engine"] == "auto")     # two runs each
        assert (pages, large) == ({"cuda-kernel": 2}, {"cuda-loop:1": 2})
        assert "auto gave its batches of 4K to cuda-kernel (2)" in list(bench_tables(result))
        assert result["manifest"]["gpu"]["device"] == "stub, not a GPU"
        note, = (note for note in result["manifest"]["notes"] if note.startswith("auto"))
        assert note.startswith("auto is the fastest for each batch, as measured for pinned,pinned on stub, not a GPU: 4K")
