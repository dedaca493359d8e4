"""Times and ceilings of CUDA engines, over the stub of the driver: what is timed, not how long a GPU takes for it. The stub's
device time is what a test says a copy costs.
"""

import sys
import types

import numpy as np
import pytest
from cuda_stub import PinnedArena, Stub, needs_compiler
from kernel_conformance import verdicts

from offload.errors import EngineUnavailable, OutOfMemory
from offload.kernels import ranges
from offload.kernels.base import FRAME_SIZE, checked_plan
from offload.kernels.cuda_engines import CudaProvider, PinnedMemory
from offload.kernels.cuda_timing import CEILINGS, WARM_UPS, CudaTimer, DeviceRows, measure_ceilings

pytestmark = needs_compiler


@pytest.fixture
def stub():
    return Stub()


def pages(nr):
    """(plan, dst, src): ``nr`` pages, no two of them neighbours. All three must be kept while it is copied."""
    dst, src = PinnedArena(2 * nr), PinnedArena(2 * nr)
    for seed, arena in enumerate((dst, src)):
        frames = arena.read()
        arena.write(np.random.default_rng(seed).integers(0, 256, frames.shape, np.uint8))
    return checked_plan(dst.base, src.base, 2 * np.arange(nr), 2 * np.arange(nr), [0] * nr), dst, src


class Clock:
    """Each look at it takes a microsecond."""

    def __init__(self):
        self.ns = 0

    def __call__(self):
        self.ns += 1000
        return self.ns


class TestCudaTimer:
    """One batch is copied, and its three times are those of the clock and of the device's events."""

    @pytest.mark.parametrize("way, nr_chans", [("cuda-loop", 1), ("cuda-loop", 3), ("cuda-batch", 1), ("cuda-kernel", 1)])
    def test_device_time_is_what_the_device_took(self, stub, way, nr_chans):
        stub.state.ns_copy, stub.state.ns_launch, stub.state.ps_byte = 1500, 7000, 250
        provider = CudaProvider(stub.device(), way, nr_chans)
        timer, (plan, dst, src) = CudaTimer(provider, Clock()), pages(12)
        before, done = (dst.read(), src.read()), np.zeros(12, np.uint8)
        times = timer.run(plan, done)
        assert done.all() and verdicts(plan, before, (dst.read(), src.read())) == []
        payload = 12 * FRAME_SIZE // 4
        expected = 12 * 1500 + payload
        if way == "cuda-kernel":                    # its list, 8 bytes a folio, goes up in front
            expected = 1500 + 12 * 8 // 4 + 7000 + payload
        assert times.device_ns == pytest.approx(expected, rel=1e-3)
        assert (times.plan_ns, times.submit_ns, times.whole_ns) == (1000, 1000, 3000)
        timer.close()
        provider.close()

    def test_without_the_upload(self, stub):
        """The list is on the device before the clock starts, and is not sent again."""
        stub.state.ns_copy, stub.state.ns_launch = 1500, 7000
        provider = CudaProvider(stub.device(), "cuda-kernel")
        timer = CudaTimer(provider, Clock())
        for _ in range(3):
            plan, dst, src = pages(9)
            before, done = (dst.read(), src.read()), np.zeros(9, np.uint8)
            uploads = stub.state.copies
            times = timer.run(plan, done, resident=True)
            assert verdicts(plan, before, (dst.read(), src.read())) == [] and done.all()
            assert stub.state.copies == uploads + 1
            assert (times.plan_ns, times.device_ns, times.whole_ns) == (None, 7000, 2000)
        assert timer.run(plan, done).device_ns == 8500          # and the next one sends its own
        timer.close()
        provider.close()

    def test_all_is_given_back(self, stub):
        before = stub.state.streams, stub.state.events
        provider = CudaProvider(stub.device(), "cuda-kernel")
        timer, job = CudaTimer(provider), pages(3)
        for resident in (False, True):
            timer.run(job[0], np.zeros(3, np.uint8), resident=resident)
        timer.close()
        provider.close()
        assert (stub.state.streams, stub.state.events) == before and stub.state.allocs == stub.state.frees

    @pytest.mark.parametrize("way, fault, at", [("cuda-loop", "lose_at", 3), ("cuda-batch", "lose_at", 3), ("cuda-kernel", "lose_at", 0),
                                                ("cuda-kernel", "fail_alloc", 0)])
    def test_a_fault(self, stub, way, fault, at):
        provider = CudaProvider(stub.device(), way)
        timer, job = CudaTimer(provider), pages(9)
        setattr(stub.state, fault, at)
        for _ in range(2):
            with pytest.raises(EngineUnavailable) as refused:
                timer.run(job[0], np.zeros(9, np.uint8))
            assert "\n" not in str(refused.value) and "CUDA_ERROR" in str(refused.value)
        assert len(stub.lines) == 1
        provider.close()

    def test_a_descriptor_that_fails_is_not_done(self, stub):
        provider = CudaProvider(stub.device(), "cuda-batch", most=3)
        timer, job, done = CudaTimer(provider), pages(9), np.zeros(9, np.uint8)
        stub.state.fail_copy = 4
        timer.run(job[0], done)
        assert done.tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
        provider.close()


class TestDeviceRows:
    """What is put in comes out."""

    def test_put_and_get(self, stub):
        nr = 300
        memory = DeviceRows(stub.device(), nr)
        content = np.random.default_rng(1).integers(0, 256, (nr, FRAME_SIZE), np.uint8)
        memory.put(0, content)
        assert np.array_equal(memory.get(0, nr), content)
        memory.put(3, content[:2])
        assert np.array_equal(memory.get(2, 4), content[[2, 0, 1, 5]])
        assert stub.driver.on_device(memory.base) and stub.driver.on_device(memory.base + memory.nbytes - 1)
        assert not stub.driver.on_device(content.ctypes.data)
        memory.close()
        memory.close()
        assert stub.state.allocs == stub.state.frees == 2

    @pytest.mark.parametrize("nr", [0, 1])
    def test_no_room(self, stub, nr):
        device = stub.device()
        stub.state.fail_alloc = nr
        with pytest.raises(OutOfMemory, match="smaller --size") as refused:
            DeviceRows(device, 4)
        assert "\n" not in str(refused.value) and stub.state.frees == nr


class TestCeilings:
    """Four large copies; payload counts once, both directions together where there are two."""

    def test_it(self, stub):
        device, nbytes = stub.device(), 1 << 20
        pinned = [PinnedMemory(device, nbytes) for _ in range(2)]
        frames = [DeviceRows(device, nbytes // FRAME_SIZE) for _ in range(2)]
        memory = {"pinned": [piece.address for piece in pinned], "device": [piece.base for piece in frames]}
        before = stub.state.streams, stub.state.events, stub.state.bytes
        stub.state.ps_byte = 100                    # 10 GB/s, one after the other
        found = measure_ceilings(device, memory, nbytes, 3)
        assert list(found) == list(CEILINGS) and (stub.state.streams, stub.state.events) == before[:2]
        for name, ceiling in found.items():
            assert ceiling["bytes"] == nbytes * (2 if name == "both ways" else 1)
            assert len(ceiling["device_ns"]) == 3 and ceiling["gbps"] == pytest.approx(10, rel=1e-3)
        assert stub.state.bytes - before[2] == nbytes * 5 * (WARM_UPS + 3)

    def test_where_they_go(self, stub):
        device, nbytes = stub.device(), FRAME_SIZE
        pinned = [PinnedMemory(device, nbytes) for _ in range(2)]
        frames = [DeviceRows(device, 1) for _ in range(2)]
        fill = {piece: np.full((1, FRAME_SIZE), value, np.uint8) for value, piece in enumerate((*pinned, *frames), 1)}
        for piece in pinned:
            piece.view()[:] = fill[piece][0]
        for piece in frames:
            piece.put(0, fill[piece])
        measure_ceilings(device, {"pinned": [piece.address for piece in pinned], "device": [piece.base for piece in frames]}, nbytes, 1)
        assert [piece.view()[7] for piece in pinned] == [1, 3]      # from the first of the one to the second of the other
        assert [piece.get(0, 1)[0, 7] for piece in frames] == [3, 1]


class TestNamedRanges:
    """plan, upload, submit and wait stand in a profiler's timeline; without the package nothing happens."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        ranges._annotate.cache_clear()
        yield
        ranges._annotate.cache_clear()

    def copy(self, stub):
        provider = CudaProvider(stub.device(), "cuda-kernel")
        job = pages(3)
        CudaTimer(provider).run(job[0], np.zeros(3, np.uint8))
        provider.close()

    def test_with_the_package(self, stub, monkeypatch):
        seen = []

        class Annotate:
            def __init__(self, name, domain):
                self.name = name
                assert domain == "offload"

            def __enter__(self):
                seen.append(("begin", self.name))

            def __exit__(self, *exception):
                seen.append(("end", self.name))

        monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=Annotate))
        self.copy(stub)
        assert seen == [("begin", "plan"), ("end", "plan"), ("begin", "submit"), ("begin", "upload"), ("end", "upload"),
                        ("end", "submit"), ("begin", "wait"), ("end", "wait")]

    def test_without_it(self, stub, monkeypatch):
        monkeypatch.setitem(sys.modules, "nvtx", None)
        self.copy(stub)

    def test_the_real_one(self, stub):
        pytest.importorskip("nvtx", reason="the package nvtx is not installed")
        self.copy(stub)
