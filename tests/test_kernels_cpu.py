"""The CPU copy kernels: both twins keep the contract of kernels/base.py, on one thread and on several."""

import ctypes
import os
import signal
import subprocess
import sys
import threading

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_conformance import (GUARD_FRAMES, MISMATCH, NOT_COPIED, OUTSIDE, SOURCE_OVERWRITTEN, KernelConformance,
                                rows, verdicts)
from llvmlite import ir

from offload.errors import InvalidInput
from offload.jit import JIT_DISABLED, jit_entry
from offload.kernels import cpu
from offload.kernels.base import FRAME_SIZE, CopyPlan, checked_plan
from offload.kernels.cpu import (KERNEL_PLAIN, KERNEL_STREAM, KERNELS, CpuBackend, copy_bytes, copy_folios,
                                 copy_plain, copy_stream, first_folio, prefetch, prefetch_write, stream_fence)
from offload.units import ENOMEM


class TestPlain1(KernelConformance):
    @staticmethod
    def make():
        return CpuBackend("plain", 1)


class TestPlain3(KernelConformance):
    @staticmethod
    def make():
        return CpuBackend("plain", threads=3)


class TestStream1(KernelConformance):
    @staticmethod
    def make():
        return CpuBackend("stream")


class TestStream2(KernelConformance):
    @staticmethod
    def make():
        return CpuBackend("stream", 2)


class TestStream12(KernelConformance):
    @staticmethod
    def make():
        return CpuBackend("stream", 12)


# Compiled code is what calls these; Python needs a way in.

@jit_entry
def call_copy_plain(dst, src, nbytes):
    return copy_plain(dst, src, nbytes)


@jit_entry
def call_copy_stream(dst, src, nbytes):
    return copy_stream(dst, src, nbytes) + stream_fence()


@jit_entry
def call_copy_bytes(kernel, dst, src, nbytes):
    return copy_bytes(kernel, dst, src, nbytes) + stream_fence()


@jit_entry
def call_prefetches(address):
    return prefetch(address) + prefetch_write(address) + stream_fence()


@jit_entry
def call_first_folio(nr_folios, threads, i):
    return first_folio(nr_folios, threads, i)


def two_arenas(nr_frames, seed=0):
    return KernelConformance().arenas(np.random.default_rng(seed), nr_frames)


class TestTheJudge:
    """Each of dmatest's verdicts is given, and only where it is due."""

    @staticmethod
    def verdict(spoil):
        dst, src = two_arenas(32)
        plan = CopyPlan(dst.base, src.base, np.array([3, 10]), np.array([20, 5]), np.array([0, 2], np.uint8))
        before = dst.read(), src.read()
        dst_after, src_after = (arena.copy() for arena in before)
        for to, at, order in zip(plan.dst, plan.src, plan.order):
            dst_after[rows(to, order)] = before[1][rows(at, order)]
        spoil(before, dst_after, src_after)
        return verdicts(plan, before, (dst_after, src_after))

    def test_right(self):
        assert self.verdict(lambda before, dst, src: None) == []

    def test_not_copied(self):
        def skip(before, dst, src):
            dst[rows(10, 2)] = before[0][rows(10, 2)]
        assert self.verdict(skip) == [(NOT_COPIED, 1)]

    def test_mismatch(self):
        def flip(before, dst, src):
            dst[rows(10, 2)][3, -1] ^= 1
        assert self.verdict(flip) == [(MISMATCH, 1)]

    @pytest.mark.parametrize("row", [0, -1, GUARD_FRAMES + 2, GUARD_FRAMES + 14])
    def test_copied_outside_the_range(self, row):
        def stray(before, dst, src):
            dst[row, 0] ^= 1
        assert self.verdict(stray) == [(OUTSIDE, None)]

    def test_source_overwritten(self):
        def scribble(before, dst, src):
            src[0, 0] ^= 1
        assert self.verdict(scribble) == [(SOURCE_OVERWRITTEN, None)]


class TestCheckedPlan:
    """A plan whose copies could meet, or leave their arenas, is refused and the entry named."""

    BASE = 1 << 40
    ELSEWHERE = 1 << 41

    def check(self, dst, src, order, dst_base=BASE, src_base=ELSEWHERE, **limits):
        return checked_plan(dst_base, src_base, dst, src, order, **limits)

    def test_converts(self):
        plan = self.check([4, 0], (1, 7), np.array([2, 0], np.uint16))
        assert plan.dst.dtype == plan.src.dtype == np.int64 and plan.order.dtype == np.uint8
        assert plan.dst.tolist() == [4, 0] and plan.src.tolist() == [1, 7] and plan.order.tolist() == [2, 0]
        assert all(array.flags.c_contiguous for array in plan[2:])
        assert plan.nr_folios == 2 and plan.nbytes == 5 * FRAME_SIZE

    def test_counts_bytes_of_the_largest_folios(self):
        assert self.check([0, 1 << 18], [0, 0], [18, 18]).nbytes == 2 << 30

    def test_accepts_nothing(self):
        plan = self.check([], [], [])
        assert plan.nr_folios == plan.nbytes == 0 and plan.dst.dtype == np.int64

    @pytest.mark.parametrize("dst, order, entries", [
        ([5, 5], [0, 0], "dst of entry 0 overlaps dst of entry 1"),
        ([9, 0, 5], [0, 3, 0], "dst of entry 1 overlaps dst of entry 2"),
        ([5, 0], [0, 3], "dst of entry 1 overlaps dst of entry 0"),
        ([0, 7], [3, 3], "dst of entry 0 overlaps dst of entry 1"),
    ], ids=["same", "inside a larger one", "inside a later one", "by one page"])
    def test_refuses_destinations_that_meet(self, dst, order, entries):
        with pytest.raises(InvalidInput, match=entries):
            self.check(dst, np.arange(len(dst)) * 100, order)

    @pytest.mark.parametrize("dst, src, order, entries", [
        ([0], [0], [0], "dst of entry 0 overlaps src of entry 0"),
        ([0, 9], [20, 3], [3, 0], "dst of entry 0 overlaps src of entry 1"),
        ([30, 3], [0, 20], [3, 0], "dst of entry 1 overlaps src of entry 0"),
        ([8, 40], [50, 15], [3, 3], "dst of entry 0 overlaps src of entry 1"),
        ([15, 40], [50, 8], [3, 3], "dst of entry 0 overlaps src of entry 1"),
    ], ids=["itself", "source inside", "destination inside", "by its last page", "by its first page"])
    def test_refuses_a_destination_on_a_source(self, dst, src, order, entries):
        with pytest.raises(InvalidInput, match=entries):
            self.check(dst, src, order, src_base=self.BASE)

    def test_compares_addresses_not_frame_numbers(self):
        assert self.check([5], [5], [0]).nr_folios == 1
        assert self.check([5], [5], [0], src_base=self.BASE + FRAME_SIZE).nr_folios == 1
        with pytest.raises(InvalidInput, match="overlaps"):
            self.check([5], [4], [0], src_base=self.BASE + FRAME_SIZE)
        with pytest.raises(InvalidInput, match="overlaps"):
            self.check([5], [5], [0], src_base=self.BASE + 64)

    def test_accepts_neighbours(self):
        assert self.check([0, 8, 9, 24], [16, 10, 12, 32], [3, 0, 0, 3], src_base=self.BASE).nr_folios == 4

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 2)), max_size=5))
    def test_refuses_exactly_the_overlaps(self, entries):
        dst, src, order = ([entry[i] for entry in entries] for i in range(3))
        writes = [page for frame, size in zip(dst, order) for page in range(frame, frame + (1 << size))]
        reads = {page for frame, size in zip(src, order) for page in range(frame, frame + (1 << size))}
        if len(set(writes)) < len(writes) or reads & set(writes):
            with pytest.raises(InvalidInput, match="overlaps"):
                self.check(dst, src, order, src_base=self.BASE)
        else:
            self.check(dst, src, order, src_base=self.BASE)

    @pytest.mark.parametrize("dst, src, order, message", [
        ([1, 2], [1], [0], "2, 1 and 1 entries"),
        ([1.0], [1], [0], "type float64"),
        ([True], [1], [0], "type bool"),
        ([[1]], [1], [0], "2 dimensions"),
        ([0], [0], [19], r"order\[0\] is 19"),
        ([0, 1], [0, 1], [0, -1], r"order\[1\] is -1"),
        ([-1], [0], [0], r"dst\[0\] is -1"),
        ([0], [-5], [0], r"src\[0\] is -5"),
        ([1 << 52], [0], [0], r"dst\[0\] is 4503599627370496"),
        ([(1 << 51) - (1 << 28) - 2], [0], [18], r"dst\[0\] is 2251799545249790"),
        ([0], [(1 << 63) - 1], [18], r"src\[0\] is 9223372036854775807"),
        (np.array([1 << 63], np.uint64), [0], [0], r"dst\[0\] is 9223372036854775808"),
    ])
    def test_refuses_what_cannot_be(self, dst, src, order, message):
        with pytest.raises(InvalidInput, match=message) as caught:
            self.check(dst, src, order)
        assert "\n" not in str(caught.value)

    def test_refuses_frames_beyond_the_end(self):
        assert self.check([8], [0], [3], dst_frames=16, src_frames=8).nr_folios == 1
        with pytest.raises(InvalidInput, match=r"dst\[0\] is 9; its folio must end within 16 frames"):
            self.check([9], [0], [3], dst_frames=16, src_frames=8)
        with pytest.raises(InvalidInput, match=r"src\[1\] is 7"):
            self.check([0, 1], [0, 7], [0, 1], src_frames=8)
        with pytest.raises(InvalidInput, match=r"dst\[0\] is 0"):
            self.check([0], [0], [3], dst_frames=4)

    def test_refuses_a_base_between_cache_lines(self):
        with pytest.raises(InvalidInput, match="dst_base 0x10000000010"):
            self.check([0], [0], [0], dst_base=self.BASE + 16)


class TestBackend:
    """A backend says what it is, takes only what it can do, and its threads come and go."""

    def test_names(self):
        assert [CpuBackend(kernel, threads).name for kernel in KERNELS for threads in (1, 64)] == [
            "plain:1", "plain:64", "stream:1", "stream:64"]
        assert CpuBackend().name == "plain:1"
        assert repr(CpuBackend("stream", 2)) == "CpuBackend('stream', threads=2)"

    @pytest.mark.parametrize("threads", [0, -1, 65, 1.0, True, "2", None])
    def test_refuses_other_numbers_of_threads(self, threads):
        with pytest.raises(InvalidInput, match="from 1 to 64") as caught:
            CpuBackend(threads=threads)
        assert repr(threads) in str(caught.value) and "\n" not in str(caught.value)

    def test_refuses_other_kernels(self):
        with pytest.raises(InvalidInput, match="'dma' is not known; use one of: plain, stream"):
            CpuBackend("dma")

    def test_threads_start_with_the_first_copy_and_end_with_close(self):
        def copiers():
            return sum(thread.name.startswith("copy_") for thread in threading.enumerate())

        dst, src = two_arenas(8)
        plan = checked_plan(dst.base, src.base, range(8), range(8), [0] * 8)
        one = CpuBackend(threads=1)
        one.copy(plan, np.zeros(8, np.uint8))
        with CpuBackend(threads=4) as backend:
            assert copiers() == 0
            backend.copy(plan, np.zeros(8, np.uint8))
            assert 1 <= copiers() <= 3
            backend.close()
            assert copiers() == 0
            backend.copy(plan, np.zeros(8, np.uint8))
        assert copiers() == 0
        backend.close()

    @pytest.mark.parametrize("nr_folios", [2, 40])
    def test_no_new_thread_is_enomem_and_nothing_is_copied_later(self, monkeypatch, nr_folios):
        dst, src = two_arenas(nr_folios)
        before = dst.read(), src.read()
        plan = checked_plan(dst.base, src.base, range(nr_folios), range(nr_folios), [0] * nr_folios)
        started = []

        def start(thread, *, original=threading.Thread.start):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            original(thread)

        backend = CpuBackend("stream", 5)
        done = np.zeros(nr_folios, np.uint8)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            assert backend.copy(plan, done) == -ENOMEM
        assert not any(thread.is_alive() for thread in started)
        if nr_folios < 5:       # each of them has a piece that nobody copied
            assert not done.any()
        else:
            undone = [(NOT_COPIED, entry) for entry in np.flatnonzero(done == 0)]
            assert undone and verdicts(plan, before, (dst.read(), src.read())) == undone
        with backend:
            done[:] = 0
            assert backend.copy(plan, done) == 0 and done.all()
        assert verdicts(plan, before, (dst.read(), src.read())) == []

    @pytest.mark.parametrize("nr_folios", [2, 64])
    def test_nobody_copies_any_more_when_an_interrupt_is_raised(self, nr_folios):
        dst, src = two_arenas(nr_folios << 5)
        frames = np.arange(nr_folios) << 5
        plan = checked_plan(dst.base, src.base, frames, frames[::-1], [5] * nr_folios)
        with CpuBackend(threads=4) as backend:
            backend.copy(plan, np.zeros(nr_folios, np.uint8))
            interrupt = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                interrupt.start()
                while True:
                    backend.copy(plan, np.zeros(nr_folios, np.uint8))
            shared = backend._workers._arrays
            assert shared.issued.any() and (shared.issued == shared.ended).all()
            dst.write(np.zeros_like(dst.read()))
            before, done = (dst.read(), src.read()), np.zeros(nr_folios, np.uint8)
            assert backend.copy(plan, done) == 0 and done.all()
            assert verdicts(plan, before, (dst.read(), src.read())) == []

    def test_forgotten_threads_end_with_the_backend(self):
        dst, src = two_arenas(8)
        plan = checked_plan(dst.base, src.base, range(8), range(8), [0] * 8)
        backend = CpuBackend(threads=3)
        backend.copy(plan, np.zeros(8, np.uint8))
        threads = list(backend._workers._threads.values())
        assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
        del backend
        assert not any(thread.is_alive() for thread in threads)

    def test_forgotten_threads_do_not_keep_the_interpreter(self):
        code = ("import numpy as np; from offload.kernels.base import CopyPlan; from offload.kernels.cpu import CpuBackend;"
                "memory = np.zeros(1 << 16, np.uint8); base = memory.ctypes.data + 63 & ~63; backend = CpuBackend(threads=3);"
                "frames = np.arange(3);"
                "backend.copy(CopyPlan(base, base, frames, frames + 4, np.zeros(3, np.uint8)), np.zeros(3, np.uint8))")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize("n, t, counts", [(4, 4, [1, 1, 1, 1]), (7, 3, [3, 2, 2]), (512, 12, [43] * 8 + [42] * 4)])
    def test_whole_folios_are_shared_in_order(self, n, t, counts):
        first = [call_first_folio(n, t, i) for i in range(t + 1)]
        assert np.diff(first).tolist() == counts and (first[0], first[-1]) == (0, n)


class TestTail:
    """Hazard 9 of cpu_mt (RFC v2, v3): folios cut into size / threads bytes lose their tail. Ours do not."""

    @pytest.mark.parametrize("order", [0, 1, 4, 9])
    @pytest.mark.parametrize("threads", [3, 5, 12, 64])
    def test_no_tail_is_lost(self, threads, order):
        for nr_folios in {1, 2, min(threads - 1, 11)}:
            dst, src = two_arenas((nr_folios << order) + 1)
            frames = np.arange(nr_folios)[::-1] << order
            plan = checked_plan(dst.base, src.base, frames, np.sort(frames) + 1, [order] * nr_folios)
            for kernel in KERNELS:
                before = dst.read(), src.read()
                with CpuBackend(kernel, threads) as backend:
                    assert backend.copy(plan, np.zeros(nr_folios, np.uint8)) == 0
                assert verdicts(plan, before, (dst.read(), src.read())) == []
                dst.write(before[0])

    @pytest.mark.parametrize("threads", [3, 5, 12])
    def test_the_published_cut_loses_it(self, threads):
        dst, src = two_arenas(4)
        plan = checked_plan(dst.base, src.base, [0], [0], [2])
        before = dst.read(), src.read()
        piece = plan.nbytes // threads
        for thread in range(threads):
            call_copy_bytes(KERNEL_PLAIN, dst.base + thread * piece, src.base + thread * piece, piece)
        assert verdicts(plan, before, (dst.read(), src.read())) == [(MISMATCH, 0)]
        tail = plan.nbytes - piece * threads
        assert np.array_equal(dst.read()[rows(0, 2)].ravel()[-tail:], before[0][rows(0, 2)].ravel()[-tail:])


class TestPrimitives:
    """What compiled code elsewhere calls: runs of bytes, a fence, prefetches."""

    @pytest.mark.parametrize("copy", [call_copy_plain, call_copy_stream,
                                      lambda *run: call_copy_bytes(KERNEL_PLAIN, *run),
                                      lambda *run: call_copy_bytes(KERNEL_STREAM, *run)],
                             ids=["copy_plain", "copy_stream", "copy_bytes plain", "copy_bytes stream"])
    @pytest.mark.parametrize("nbytes", [0, 64, 128, 192, 4096 - 64, 4096, 4096 + 64, 3 * 4096, 8 * 4096 - 192])
    def test_copies_exactly_the_bytes(self, copy, nbytes):
        dst, src = two_arenas(9)
        expected, source = dst.read(), src.read()
        assert copy(dst.base + 128, src.base + 64, nbytes) == 0
        start = 2 * FRAME_SIZE      # the guards
        expected.ravel()[start + 128:start + 128 + nbytes] = source.ravel()[start + 64:start + 64 + nbytes]
        assert np.array_equal(dst.read(), expected) and np.array_equal(src.read(), source)

    def test_plain_takes_any_length_and_address(self):
        dst, src = two_arenas(4)
        call_copy_plain(dst.base + 3, src.base + 1, 5001)
        assert ctypes.string_at(dst.base + 3, 5001) == ctypes.string_at(src.base + 1, 5001)

    def test_prefetch_of_any_address_is_safe(self):
        for address in (0, 64, 1 << 46, -64):
            assert call_prefetches(address) == 0

    @pytest.mark.parametrize("kernel", [KERNEL_PLAIN, KERNEL_STREAM])
    def test_copy_folios_copies_its_slice_only(self, kernel):
        dst, src = two_arenas(8)
        before = dst.read(), src.read()
        plan = checked_plan(dst.base, src.base, [7, 6, 5, 4, 3], [0, 2, 4, 6, 1], [0] * 5)
        done = np.zeros(5, np.uint8)
        assert copy_folios(kernel, *plan, 1, 4, done) == 0
        assert done.tolist() == [0, 1, 1, 1, 0]
        part = CopyPlan(plan.dst_base, plan.src_base, *(array[1:4] for array in plan[2:]))
        assert verdicts(part, before, (dst.read(), src.read())) == []


def _assembly(triple):
    """What the emit functions become on a machine of this kind, with its least instruction set."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this llvmlite cannot compile for {triple}: {error}")
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4), "copy")
    builder = ir.IRBuilder(function.append_basic_block())
    cpu.emit_prefetch(builder, function.args[1], 0)
    cpu.emit_stream_lines(builder, [function.args[:2], function.args[2:]], 2)
    cpu.emit_stream_fence(builder)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return str(parsed), target.create_target_machine().emit_assembly(parsed)


class TestInstructions:
    """The streaming twin is what it says on both kinds of machine."""

    def test_arm(self):
        text, assembly = _assembly("aarch64-linux-gnu")
        assert "llvm.x86" not in text
        assert assembly.count("stnp") == 8 and "\tstp" not in assembly and "\tstr" not in assembly
        assert "prfm" in assembly and "dmb" in assembly

    def test_x86(self):
        _, assembly = _assembly("x86_64-linux-gnu")
        assert assembly.count("movntps") == 16 and "prefetcht0" in assembly
        assert assembly.rindex("movntps") < assembly.index("sfence")

    @pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled")
    def test_compiled_code_here_is_that(self):
        compiled = numba.njit(["int64(int64, int64)"])(lambda dst, src: copy_stream(dst, src, 4096) + stream_fence())
        module = compiled.inspect_llvm(compiled.signatures[0])
        assert "!nontemporal" in module
        assert ("llvm.x86.sse.sfence" if os.uname().machine == "x86_64" else "fence seq_cst") in module


@pytest.mark.skipif(JIT_DISABLED, reason="this is the run without the JIT")
def test_the_same_holds_without_the_jit():
    """NumPy and ctypes stand in for the intrinsics: a selection of this file with NUMBA_DISABLE_JIT=1."""
    chosen = "TestStream2 or TestPlain3 or TestTail or TestPrimitives or enomem"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contract_imports_no_compiler():
    """kernels/base.py is for those who only plan."""
    code = "import sys, offload.kernels.base; sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
