"""The CUDA engines over a stub of the driver: arguments, chunks, failing indices, lifetimes, completion. No GPU is involved,
and nothing here says that one would do the same; tests/gpu asks one.
"""

import ctypes
import subprocess

import numpy as np
import pytest
from cuda_stub import PinnedArena, Stub, compile_cpp, cuda_include, needs_compiler
from kernel_conformance import NOT_COPIED, HostArena, KernelConformance, scattered_plan, verdicts

from offload.errors import InvalidInput
from offload.kernels import cuda_driver
from offload.kernels.base import (
    CACHE_LINE, DMA_IN_PROGRESS, DMA_TRANS_ABORTED, DMA_TRANS_NOERROR, DMA_TRANS_WRITE_FAILED, CopyPlan, checked_plan,
)
from offload.kernels.cuda import self_test
from offload.kernels.cuda_driver import BATCH_ARGUMENTS, BATCH_VERSION, FUNCTIONS, CudaError, MemcpyAttributes
from offload.kernels.cuda_engines import SLOTS, WAYS, CudaBackend, CudaProvider, PinnedMemory
from offload.units import EIO, ENODEV

pytestmark = needs_compiler

FOREVER = 1 << 62


@pytest.fixture
def stub():
    return Stub()


class PinnedConformance(KernelConformance):
    arena = PinnedArena


class TestLoop1(PinnedConformance):
    @staticmethod
    def make():
        return CudaBackend(Stub().device(), "cuda-loop")


class TestLoop3(PinnedConformance):
    @staticmethod
    def make():
        return CudaBackend(Stub().device(), "cuda-loop", 3)


class TestBatch(PinnedConformance):
    @staticmethod
    def make():
        return CudaBackend(Stub().device(), "cuda-batch")


class TestBatchInSmallChunks(PinnedConformance):
    @staticmethod
    def make():
        return CudaBackend(Stub().device(), "cuda-batch", most=3)


class TestKernel(PinnedConformance):
    @staticmethod
    def make():
        return CudaBackend(Stub().device(), "cuda-kernel")


def pages(nr, seed=0):
    """(plan, dst, src, bytes before): ``nr`` pages, no two of them neighbours at both ends."""
    rng = np.random.default_rng(seed)
    dst, src = PinnedConformance().arenas(rng, 2 * nr)
    plan = checked_plan(dst.base, src.base, 2 * np.arange(nr), 2 * np.arange(nr), [0] * nr)
    return plan, dst, src, (dst.read(), src.read())


def copy(backend, plan):
    done = np.zeros(plan.nr_folios, np.uint8)
    return backend.copy(plan, done), done


class TestArguments:
    """What reaches the driver is what was meant."""

    def test_runs_not_pages_are_queued(self, stub):
        plan, *_ = pages(6)
        neighbours = CopyPlan(plan.dst_base, plan.src_base, np.arange(6), np.arange(6), plan.order)
        for way, calls in (("cuda-loop", 1), ("cuda-batch", 1)):
            stub.reset()
            with CudaBackend(stub.device(), way) as backend:
                assert copy(backend, neighbours)[0] == 0
            assert stub.state.copies == calls

    @pytest.mark.parametrize("nr, calls", [(4096, 1), (4097, 2), (10000, 3)])
    def test_chunks(self, stub, nr, calls):
        """No call has more descriptors than a driver was seen to bear."""
        stub.state.cap = cuda_driver.MOST_DESCRIPTORS
        plan, dst, src, before = pages(nr)
        with CudaBackend(stub.device(), "cuda-batch") as backend:
            assert copy(backend, plan)[0] == 0
        assert verdicts(plan, before, (dst.read(), src.read())) == []
        assert (stub.state.batch_calls, stub.state.copies) == (calls, nr)
        assert stub.state.most_descriptors == min(nr, 4096)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_the_overlap_flag(self, stub, overlap):
        with CudaBackend(stub.device(), "cuda-batch", overlap=overlap) as backend:
            plan, *arenas = pages(2)
            assert copy(backend, plan)[0] == 0
        assert stub.state.flags == overlap

    @pytest.mark.parametrize("blocks, nr, launched", [(0, 1, 1), (0, 100, 13), (0, 1000, 20), (3, 1000, 3)])
    def test_the_grid(self, stub, blocks, nr, launched):
        """As many blocks as there is work, as the device holds, or as were asked for."""
        plan, dst, src, before = pages(nr)
        with CudaBackend(stub.device(), "cuda-kernel", blocks=blocks) as backend:
            assert copy(backend, plan)[0] == 0
        assert verdicts(plan, before, (dst.read(), src.read())) == []
        assert (stub.state.launches, stub.state.blocks, stub.state.threads) == (1, launched, 256)

    def test_one_launch_for_all_orders(self, stub):
        rng = np.random.default_rng(3)
        dst, src = PinnedConformance().arenas(rng, 4096)
        plan = scattered_plan(rng, 4096, rng.integers(0, 8, 40), dst.base, src.base)
        before = dst.read(), src.read()
        with CudaBackend(stub.device(), "cuda-kernel") as backend:
            assert copy(backend, plan)[0] == 0
        assert stub.state.launches == 1 and verdicts(plan, before, (dst.read(), src.read())) == []

    def test_the_stub_is_strict(self, stub):
        """A null stream, an empty batch, a size of nothing, memory that is not pinned, too many descriptors, a thread without
        context."""
        device = stub.device()
        stream, ones = stub.driver.stream(), np.full(2, 4096, np.uint64)
        buffer, pinned = np.zeros(4096, np.uint8), PinnedMemory(device, 4096)
        addresses = np.full(2, pinned.address, np.uint64)
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            stub.driver.memcpy_batch_async(addresses, addresses, ones, None)
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            stub.driver("cuMemcpyAsync", buffer.ctypes.data, buffer.ctypes.data, 8, None)
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            stub.driver.memcpy_batch_async(addresses[:0], addresses[:0], ones[:0], stream)
        with pytest.raises(CudaError, match="at descriptor 1: CUDA_ERROR_INVALID_VALUE") as refused:
            stub.driver.memcpy_batch_async(addresses, addresses, np.array([8, 0], np.uint64), stream)
        assert refused.value.index == 1
        with pytest.raises(CudaError, match="at descriptor 0"):
            stub.driver.memcpy_batch_async(addresses, np.full(2, buffer.ctypes.data, np.uint64), ones, stream)
        assert not stub.driver.on_device(pinned.address) and not stub.driver.on_device(buffer.ctypes.data)
        with pytest.raises(CudaError):
            stub.driver.device_name(0)              # a number, not a handle
        stub.state.cap = 1
        with pytest.raises(CudaError) as refused:
            stub.driver.memcpy_batch_async(addresses, addresses, ones, stream)
        assert refused.value.index is None
        stub.driver("cuCtxSetCurrent", None)
        with pytest.raises(CudaError):
            stub.driver.stream()
        with pytest.raises(CudaError):
            stub.driver("cuStreamDestroy_v2", stream)
        device.enter()
        stub.driver("cuStreamDestroy_v2", stream)
        pinned.close()

    def test_memory_that_is_not_pinned_loses_the_device(self, stub):
        """As an illegal address does on a GPU: the kernel alone would touch it there. The copy call takes it."""
        arenas = [HostArena(8) for _ in range(2)]
        plan = checked_plan(arenas[0].base, arenas[1].base, np.arange(8), np.arange(8), [0] * 8)
        with CudaBackend(stub.device(), "cuda-loop") as backend:
            assert copy(backend, plan)[0] == 0
        with CudaBackend(stub.device(), "cuda-kernel") as backend:
            assert copy(backend, plan)[0] == -EIO
        assert stub.state.lost and "LAUNCH_FAILED" in stub.lines[0]

    def test_a_driver_without_the_batch_call(self, stub):
        assert stub.driver.memcpy_batch
        stub.state.no_batch = 1
        assert not cuda_driver.Driver(stub.path).memcpy_batch

    @pytest.mark.parametrize("way, chans, options", [
        ("cuda-tma", 1, {}), ("cuda-loop", 0, {}), ("cuda-loop", 17, {}), ("cuda-batch", True, {}), ("cuda-batch", 1, {"most": 4097}),
        ("cuda-batch", 1, {"most": 0}), ("cuda-kernel", 1, {"blocks": -1}),
    ])
    def test_values_that_cannot_be(self, stub, way, chans, options):
        with pytest.raises(InvalidInput) as refused:
            CudaBackend(stub.device(), way, chans, **options)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("way", WAYS)
    def test_an_overlap_is_refused_before_anything_is_queued(self, stub, way):
        plan, dst, src, before = pages(4)
        hostile = CopyPlan(plan.dst_base, plan.src_base, np.array([0, 2, 2, 6]), plan.src, plan.order)
        with CudaBackend(stub.device(), way, 2) as backend:
            with pytest.raises(InvalidInput, match="dst of entry 1 overlaps dst of entry 2"):
                copy(backend, hostile)
            assert (stub.state.copies, stub.state.launches) == (0, 0)
            assert copy(backend, plan)[0] == 0


class TestFailures:
    """Only what failed is not done, nothing arrives later, and the engine goes out of service with one line."""

    def check(self, stub, backend, plan, before, arenas, undone, rc=-EIO):
        result, done = copy(backend, plan)
        assert result == rc and np.flatnonzero(done == 0).tolist() == undone
        after = tuple(arena.read() for arena in arenas)
        assert {entry for _, entry in verdicts(plan, before, after)} <= set(undone)
        assert len(stub.lines) == 1 and "out of service" in stub.lines[0] and backend.name.split(":")[0] in stub.lines[0]
        assert "\n" not in stub.lines[0]
        # From now on it is refused, silently, and nothing moves.
        assert copy(backend, plan) == (-ENODEV, pytest.approx(np.zeros(plan.nr_folios)))
        assert len(stub.lines) == 1
        assert all(np.array_equal(arena.read(), kept) for arena, kept in zip(arenas, after))

    @pytest.mark.parametrize("k", [0, 4, 7, 19])
    def test_a_descriptor(self, stub, k):
        """The chunk it is in fails, and says which it was; the chunks around it are done."""
        plan, dst, src, before = pages(20)
        stub.state.fail_copy = k
        with CudaBackend(stub.device(), "cuda-batch", most=5) as backend:
            chunk = k // 5
            self.check(stub, backend, plan, before, (dst, src), list(range(5 * chunk, 5 * chunk + 5)))
        assert f"cuMemcpyBatchAsync failed at descriptor {k % 5}: CUDA_ERROR_INVALID_VALUE (1)" in stub.lines[0]

    def test_a_descriptor_among_folios_in_any_sequence(self, stub):
        """Runs are merged and sorted; what is not done are the folios of the chunk, wherever they stand in the list."""
        plan, dst, src, before = pages(20)
        sequence = np.random.default_rng(4).permutation(20)
        plan = CopyPlan(plan.dst_base, plan.src_base, plan.dst[sequence], plan.src[sequence], plan.order)
        stub.state.fail_copy = 12
        with CudaBackend(stub.device(), "cuda-batch", most=5) as backend:
            undone = sorted(np.flatnonzero(plan.dst // 2 // 5 == 2).tolist())
            self.check(stub, backend, plan, before, (dst, src), undone)

    @pytest.mark.parametrize("chans", [1, 3])
    def test_a_run_of_the_loop(self, stub, chans):
        plan, dst, src, before = pages(20)
        stub.state.fail_copy = 9
        with CudaBackend(stub.device(), "cuda-loop", chans) as backend:
            # Issued channel by channel, so it is the tenth; those issued after the failure are refused.
            share = next(stop for start, stop in [(0, 6), (6, 13), (13, 20)] if start <= 9 < stop) if chans == 3 else 20
            self.check(stub, backend, plan, before, (dst, src), [9, *range(share, 20)])
        assert "cuMemcpyAsync failed: CUDA_ERROR_INVALID_VALUE (1)" in stub.lines[0]

    def test_a_launch(self, stub):
        plan, dst, src, before = pages(20)
        stub.state.fail_launch = 0
        with CudaBackend(stub.device(), "cuda-kernel") as backend:
            self.check(stub, backend, plan, before, (dst, src), list(range(20)))
        assert "cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED (719)" in stub.lines[0]
        assert {verdict for verdict, _ in verdicts(plan, before, (dst.read(), src.read()))} == {NOT_COPIED}

    @pytest.mark.parametrize("nr", [0, 1])
    def test_no_memory_for_the_list(self, stub, nr):
        plan, dst, src, before = pages(20)
        device = stub.device()
        stub.state.fail_alloc = nr
        with CudaBackend(device, "cuda-kernel") as backend:
            self.check(stub, backend, plan, before, (dst, src), list(range(20)))
        assert "OUT_OF_MEMORY" in stub.lines[0] and stub.state.frees == nr

    @pytest.mark.parametrize("way, at", [("cuda-loop", 7), ("cuda-batch", 7), ("cuda-kernel", 0)])
    def test_a_lost_device(self, stub, way, at):
        """What is not known to have arrived is not done, whatever arrived; closing still works."""
        plan, dst, src, before = pages(20)
        stub.state.lose_at = at
        with CudaBackend(stub.device(), way, **({"most": 5} if way == "cuda-batch" else {})) as backend:
            undone = list(range(5, 20)) if way == "cuda-batch" else list(range(20))
            self.check(stub, backend, plan, before, (dst, src), undone)
        assert "CUDA_ERROR_LAUNCH_FAILED" in stub.lines[0]

    def test_a_device_that_no_stream_can_be_had_of(self, stub):
        device = stub.device()
        stub.state.lost = 1
        with CudaBackend(device, "cuda-loop") as backend:
            plan, *arenas = pages(3)
            assert copy(backend, plan)[0] == -ENODEV
        assert len(stub.lines) == 1

    def test_ctrl_c_leaves_nothing_under_way(self, stub, monkeypatch):
        plan, dst, src, before = pages(8)
        device = stub.device()
        with CudaBackend(device, "cuda-loop", 2) as backend:
            def interrupted(event):
                raise KeyboardInterrupt
            with monkeypatch.context() as patched:
                patched.setattr(device.driver, "event_is_over", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    copy(backend, plan)
            assert stub.state.executed == stub.state.copies == 8
            assert copy(backend, plan)[0] == 0


    def test_ctrl_c_while_a_batch_is_queued(self, stub, monkeypatch):
        """What was queued is waited out; without an event behind it nobody says that it has arrived."""
        plan, dst, src, before = pages(8)
        device = stub.device()
        channel, result = CudaProvider(device, "cuda-loop").alloc_chan_resources(0), np.zeros(8, np.uint8)
        batch = channel.prep_dma_memcpy(plan, result, "each")
        channel.submit(batch)
        memcpy = device.driver.functions["cuMemcpyAsync"]

        def interrupted(*arguments):
            if stub.state.copies == 5:
                raise KeyboardInterrupt
            return memcpy(*arguments)

        with monkeypatch.context() as patched:
            patched.setitem(device.driver.functions, "cuMemcpyAsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                channel.issue_pending()
        channel.terminate_sync()
        assert stub.state.executed == 5 and (result == DMA_TRANS_ABORTED).all()
        channel.close()


class TestLifetimes:
    """Buffers live until their event, and everything is given back."""

    def test_lists_are_not_overwritten_while_they_are_read(self, stub):
        """The stub copies nothing before it is asked to: a list that is filled again too early would be copied twice."""
        provider = CudaProvider(stub.device(), "cuda-kernel")
        channel = provider.alloc_chan_resources(0)
        jobs = [pages(10 + i, seed=i) for i in range(5)]
        waiting = []
        for plan, dst, src, before in jobs:
            result = np.zeros(plan.nr_folios, np.uint8)
            batch = channel.prep_dma_memcpy(plan, result, "each")
            if len(waiting) == SLOTS:
                assert batch is None                # no room: both lists are in use
                for earlier, _ in waiting:
                    assert channel.wait(earlier, FOREVER)
                waiting.clear()
                batch = channel.prep_dma_memcpy(plan, result, "each")
            assert channel.submit(batch) == 0
            channel.issue_pending()
            waiting.append((batch, result))
        for batch, result in waiting:
            assert channel.wait(batch, FOREVER) and (result == DMA_TRANS_NOERROR).all()
        for plan, dst, src, before in jobs:
            assert verdicts(plan, before, (dst.read(), src.read())) == []
        provider.close()

    def test_a_larger_list_gets_larger_memory(self, stub):
        with CudaBackend(stub.device(), "cuda-kernel") as backend:
            for nr in (3, 2000, 5):
                plan, dst, src, before = pages(nr)
                assert copy(backend, plan)[0] == 0
                assert verdicts(plan, before, (dst.read(), src.read())) == []
            assert stub.state.allocs == 4 and stub.state.frees == 2
        assert stub.state.frees == 4

    @pytest.mark.parametrize("way", WAYS)
    def test_all_is_given_back(self, stub, way):
        before = stub.state.streams, stub.state.events
        with CudaBackend(stub.device(), way, 2) as backend:
            for _ in range(3):
                plan, *arenas = pages(9)
                assert copy(backend, plan)[0] == 0
            assert stub.state.streams == before[0] + 2
        assert (stub.state.streams, stub.state.events) == before and stub.state.allocs == stub.state.frees
        backend.close()

    def test_pinned_memory(self, stub):
        memory = PinnedMemory(stub.device(), 8192)
        memory.view()[:] = 7
        assert memory.address % CACHE_LINE == 0 and ctypes.string_at(memory.address, 8192) == b"\7" * 8192
        memory.close()
        memory.close()
        assert stub.state.allocs == stub.state.frees == 1


class TestChannel:
    """A stream as a channel of a DMA engine."""

    def channel(self, stub, way="cuda-batch", **options):
        return CudaProvider(stub.device(), way, **options).alloc_chan_resources(0)

    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_runs_before_it_is_issued(self, stub, way):
        channel, (plan, dst, src, before) = self.channel(stub, way), pages(4)
        result = np.zeros(4, np.uint8)
        batch = channel.prep_dma_memcpy(plan, result, "each")
        assert channel.submit(batch) == 0 and stub.state.copies == stub.state.launches == 0
        assert not channel.wait(batch, 0) and not result.any()
        channel.issue_pending()
        assert not channel.wait(batch, 0)           # the stub's events are late
        assert channel.wait(batch, FOREVER) and (result == DMA_TRANS_NOERROR).all()
        assert verdicts(plan, before, (dst.read(), src.read())) == []
        channel.close()

    @pytest.mark.parametrize("way", WAYS)
    def test_terminate_drops_what_has_not_started_and_waits_out_the_rest(self, stub, way):
        channel, (plan, dst, src, before) = self.channel(stub, way), pages(4)
        other, other_dst, other_src, other_before = pages(4, seed=1)
        first, second = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
        assert channel.submit(channel.prep_dma_memcpy(plan, first, "each")) == 0
        channel.issue_pending()
        assert channel.submit(channel.prep_dma_memcpy(other, second, "each")) == 0
        channel.terminate_sync()
        assert (first == DMA_TRANS_NOERROR).all() and (second == DMA_TRANS_ABORTED).all()
        assert verdicts(plan, before, (dst.read(), src.read())) == []
        assert np.array_equal(other_dst.read(), other_before[0])
        channel.close()
        assert np.array_equal(other_dst.read(), other_before[0])

    def test_a_failed_chunk_is_a_result(self, stub):
        channel, (plan, *_) = self.channel(stub, most=2), pages(6)
        result, stub.state.fail_copy = np.zeros(6, np.uint8), 3
        batch = channel.prep_dma_memcpy(plan, result, "each")
        channel.submit(batch)
        channel.issue_pending()
        assert channel.wait(batch, FOREVER)
        assert result.tolist() == [DMA_TRANS_NOERROR] * 2 + [DMA_TRANS_WRITE_FAILED] * 2 + [DMA_TRANS_NOERROR] * 2
        assert channel.prep_dma_memcpy(plan, result, "each") is None
        assert channel.provider.alloc_chan_resources(0) == -ENODEV
        channel.close()

    def test_the_last_alone_signals(self, stub):
        channel, (plan, *_) = self.channel(stub, most=2), pages(6)
        result = np.zeros(6, np.uint8)
        batch = channel.prep_dma_memcpy(plan, result, "last")
        channel.submit(batch)
        channel.issue_pending()
        assert channel.wait(batch, FOREVER) and result[-1] == DMA_TRANS_NOERROR
        channel.terminate_sync()
        assert (result == DMA_TRANS_NOERROR).all() and DMA_IN_PROGRESS not in result
        channel.close()


class TestSelfTest:
    """A device that does not give back what it got is not used."""

    def test_right(self, stub):
        assert self_test(stub.device()) is None and stub.state.allocs == stub.state.frees == 2

    def test_wrong(self, stub):
        device = stub.device()
        stub.state.corrupt = 1
        assert self_test(device) == "1 of 4096 bytes came back changed from stub, not a GPU"

    @pytest.mark.parametrize("fault", ["fail_alloc", "fail_copy", "lose_at"])
    def test_refused(self, stub, fault):
        device = stub.device()
        setattr(stub.state, fault, 1)
        with pytest.raises(CudaError):
            self_test(device)
        assert stub.state.frees == stub.state.allocs - (fault == "fail_alloc")


@pytest.mark.skipif(not cuda_include(), reason="there is no cuda.h to compare with")
class TestAgainstTheHeader:
    """Sizes, offsets, numbers and signatures are those of cuda.h. (The stub is compiled against it as well.)"""

    def test_it(self, tmp_path):
        fields = {"srcLocHintType": "srcLocHint.type", "srcLocHintId": "srcLocHint.id", "dstLocHintType": "dstLocHint.type",
                  "dstLocHintId": "dstLocHint.id"}
        lines = ["#include <cuda.h>", "#include <cudaTypedefs.h>", "#include <cstddef>",
                 "template <class R, class... A> constexpr bool takes(R (*)(A...), std::initializer_list<size_t> sizes) {",
                 "  size_t given[] = {sizeof(A)..., 0}; size_t i = 0;",
                 "  for (size_t size : sizes) if (i >= sizeof...(A) || given[i++] != size) return false;",
                 "  return i == sizeof...(A) && sizeof(R) == 4; }",
                 f"static_assert(sizeof(CUmemcpyAttributes) == {ctypes.sizeof(MemcpyAttributes)});"]
        for name, _ in MemcpyAttributes._fields_:
            offset = getattr(MemcpyAttributes, name).offset
            lines.append(f"static_assert(offsetof(CUmemcpyAttributes, {fields.get(name, name)}) == {offset});")
        numbers = [name for name in vars(cuda_driver) if name.startswith("CU")]
        assert len(numbers) >= 10
        lines += [f"static_assert({name} == {getattr(cuda_driver, name)});" for name in numbers]
        for name, arguments in FUNCTIONS.items():
            sizes = ", ".join(str(ctypes.sizeof(kind)) for kind in arguments)
            lines.append(f"static_assert(takes(decltype(&{name.removesuffix('_v2')})(nullptr), {{{sizes}}}));")
            lines.append(f"auto *exported_{name} = &{name.removesuffix('_v2')};")
        sizes = ", ".join(str(ctypes.sizeof(kind)) for kind in BATCH_ARGUMENTS)
        lines.append(f"static_assert(takes(PFN_cuMemcpyBatchAsync_v{BATCH_VERSION}(nullptr), {{{sizes}}}));")
        lines[:0] = ["#include <initializer_list>"]
        source = tmp_path / "check.cpp"
        source.write_text("\n".join(lines) + "\n")
        compile_cpp(source, tmp_path / "check.o", "-c", "-Wno-unused-variable")
        # The names that the library exports are those that the header's macros stand for. The older cuEventElapsedTime of the
        # two is used, which drivers before 12.8 have as well; the new one tells more errors apart, and nothing else.
        symbols = subprocess.run(["nm", "-u", tmp_path / "check.o"], capture_output=True, text=True, check=True).stdout
        newer = {name + "_v2" for name in ("cuEventElapsedTime",) if name + "_v2" in symbols.split()}
        assert {name for name in FUNCTIONS if name + "_v2" not in newer} | newer <= set(symbols.split())
