"""Copies by CPU threads: the plain twin (the C library's memcpy) and the streaming twin (non-temporal stores).

*Plain* stands for folio_mc_copy() (mm/util.c, v7.3), which copies page by page: one memcpy call for every 4 KiB
page, also inside a large folio. *Streaming* writes past the caches. The split over threads stands for the cpu_mt
migrator of the series (RFC v3, dropped in v4; not merged), without its lost tail.

With the JIT disabled both twins are ctypes.memmove.
"""

import concurrent.futures
import ctypes

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.errors import InvalidInput
from offload.jit import JIT_DISABLED, jit, jit_entry, jit_inline
from offload.kernels.base import CACHE_LINE, FRAME_SHIFT, FRAME_SIZE, CopyPlan
from offload.units import ENOMEM

__all__ = ("KERNELS", "KERNEL_PLAIN", "KERNEL_STREAM", "MAX_THREADS", "CpuBackend", "split_folios", "copy_folios",
           "copy_bytes", "copy_plain", "copy_stream", "stream_fence", "prefetch", "prefetch_write")

KERNELS = ("plain", "stream")
KERNEL_PLAIN = 0
KERNEL_STREAM = 1

MAX_THREADS = 64
"""As cpu_mt allows."""

# How the streaming twin copies was measured on two cores of a virtual EPYC (Zen 3): one thread, scattered frames in
# two arenas of 1 GiB with huge pages, medians of 42 passes of 256 MiB, all variants in turn. GB/s of payload, good to
# about 5 %:
#                                                              4 KiB folios   2 MiB folios
#   memcpy for each page (the plain twin)                           5.4            8.9
#   one run, no prefetch                                            7.5           14.6
#   one run, every line prefetched a page ahead                     9.0           13.2
#   two runs in turn, no prefetch                                   9.8           16.3
#   two runs, the first lines of the next two prefetched           10.4           16.1
#   four runs in turn                                               8.9           11.3
#   np.copyto, blocks of 2 MiB in order / one block of 256 MiB                8.9 / 13.8
#
# So: two runs at once, and a prefetch only of what the hardware cannot foresee, the beginning of the next runs.
# Vectors of 32 and 64 bytes are equal, of 16 slower by 5 to 10 %; the cache level that is asked for does not matter.
_LINES = 2      # of each run, loaded before any is stored
_AHEAD = 4      # lines prefetched of each of the next runs


# 1. Instructions. The emit functions know LLVM only, so that a test can compile them for another machine.

_word, _half, _bit = ir.IntType(64), ir.IntType(32), ir.IntType(1)
_line = ir.VectorType(ir.IntType(8), CACHE_LINE)


def emit_prefetch(builder, address, write):
    """Ask for the cache line at ``address`` in all levels. Any address is safe."""
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _half, _half, _half]), "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, cgutils.voidptr_t), _half(write), _half(3), _half(1)])


def emit_stream_lines(builder, runs, count):
    """Copy ``count`` (a Python int) cache lines of each (dst, src) with non-temporal stores, after all are loaded."""
    def pointer(address, i):
        return builder.inttoptr(builder.add(address, _word(i * CACHE_LINE)), _line.as_pointer())

    nontemporal = builder.module.add_metadata([_half(1)])
    lines = [(builder.load(pointer(src, i), align=CACHE_LINE), dst, i) for dst, src in runs for i in range(count)]
    for line, dst, i in lines:
        builder.store(line, pointer(dst, i), align=CACHE_LINE).set_metadata("nontemporal", nontemporal)


def emit_stream_fence(builder):
    """Order non-temporal stores before whatever is stored next."""
    if builder.module.triple.startswith("x86_64"):
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), ())),
                     ())
    else:
        builder.fence("seq_cst")


if JIT_DISABLED:
    def _memcpy(dst, src, nbytes):
        ctypes.memmove(int(dst), int(src), int(nbytes))
        return 0

    def _stream_two(dst, src, other_dst, other_src):
        _memcpy(dst, src, _LINES * CACHE_LINE)
        return _memcpy(other_dst, other_src, _LINES * CACHE_LINE)

    def _stream_line(dst, src):
        return _memcpy(dst, src, CACHE_LINE)

    def stream_fence():
        return 0

    def prefetch(address):
        return 0

    def prefetch_write(address):
        return 0
else:
    @intrinsic
    def _memcpy(typingctx, dst, src, nbytes):
        def codegen(context, builder, signature, args):
            pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2]]
            memcpy = builder.module.declare_intrinsic("llvm.memcpy", [cgutils.voidptr_t, cgutils.voidptr_t, _word])
            builder.call(memcpy, [*pointers, args[2], _bit(0)])
            return _word(0)
        return types.int64(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def _stream_two(typingctx, dst, src, other_dst, other_src):
        def codegen(context, builder, signature, args):
            emit_stream_lines(builder, [args[:2], args[2:]], _LINES)
            return _word(0)
        return types.int64(types.int64, types.int64, types.int64, types.int64), codegen

    @intrinsic
    def _stream_line(typingctx, dst, src):
        def codegen(context, builder, signature, args):
            emit_stream_lines(builder, [args], 1)
            return _word(0)
        return types.int64(types.int64, types.int64), codegen

    @intrinsic
    def stream_fence(typingctx):
        """Order the non-temporal stores of this thread before whatever it stores next; returns 0."""
        def codegen(context, builder, signature, args):
            emit_stream_fence(builder)
            return _word(0)
        return types.int64(), codegen

    @intrinsic
    def prefetch(typingctx, address):
        """Ask for the cache line at ``address``, to be read soon; any address is safe. Returns 0."""
        def codegen(context, builder, signature, args):
            emit_prefetch(builder, args[0], 0)
            return _word(0)
        return types.int64(types.int64), codegen

    @intrinsic
    def prefetch_write(typingctx, address):
        """Ask for the cache line at ``address``, to be written soon; any address is safe. Returns 0."""
        def codegen(context, builder, signature, args):
            emit_prefetch(builder, args[0], 1)
            return _word(0)
        return types.int64(types.int64), codegen


# 2. Runs of bytes.

@jit_inline
def copy_plain(dst_addr, src_addr, nbytes):
    """Copy ``nbytes`` with one memcpy for each 4 KiB; returns 0."""
    at = 0
    while at < nbytes:
        _memcpy(dst_addr + at, src_addr + at, min(FRAME_SIZE, nbytes - at))
        at += FRAME_SIZE
    return 0


@jit_inline
def _stream_runs(dst_addr, src_addr, other_dst, other_src, at, end):
    # Bytes ``at`` to ``end`` of two runs, in turn.
    step = _LINES * CACHE_LINE
    while at + step <= end:
        _stream_two(dst_addr + at, src_addr + at, other_dst + at, other_src + at)
        at += step
    while at < end:
        _stream_line(dst_addr + at, src_addr + at)
        _stream_line(other_dst + at, other_src + at)
        at += CACHE_LINE
    return 0


@jit
def copy_stream(dst_addr, src_addr, nbytes):
    """Copy ``nbytes``, a multiple of 64 at addresses that are multiples of 64, past the caches; returns 0.

    The bytes are in no order with later stores, and other threads may miss them, until :func:`stream_fence`.
    """
    half = nbytes // (2 * CACHE_LINE) * CACHE_LINE
    _stream_runs(dst_addr, src_addr, dst_addr + half, src_addr + half, 0, half)
    if 2 * half < nbytes:
        _stream_line(dst_addr + 2 * half, src_addr + 2 * half)
    return 0


@jit
def copy_bytes(kernel, dst_addr, src_addr, nbytes):
    """Copy with the kernel of this id, under its conditions; returns 0. After KERNEL_STREAM a fence is due."""
    if kernel == KERNEL_STREAM:
        return copy_stream(dst_addr, src_addr, nbytes)
    return copy_plain(dst_addr, src_addr, nbytes)


# 3. Plans.

@jit_inline
def _stream_folios(dst_base, src_base, dst, src, order, start, stop):
    # The two runs are neighbours in the plan if they are equally large, else the halves of one folio.
    i = start
    while i < stop:
        nbytes = np.int64(FRAME_SIZE) << order[i]
        to, at = dst_base + (dst[i] << FRAME_SHIFT), src_base + (src[i] << FRAME_SHIFT)
        i += 1
        if i < stop and order[i] == order[i - 1]:
            other_to, other_at = dst_base + (dst[i] << FRAME_SHIFT), src_base + (src[i] << FRAME_SHIFT)
            i += 1
        else:
            nbytes >>= 1
            other_to, other_at = to + nbytes, at + nbytes
        last_page = max(0, nbytes - FRAME_SIZE)
        _stream_runs(to, at, other_to, other_at, 0, last_page)
        for following in range(i, min(i + 2, stop)):
            for line in range(_AHEAD):
                prefetch(src_base + (src[following] << FRAME_SHIFT) + line * CACHE_LINE)
        _stream_runs(to, at, other_to, other_at, last_page, nbytes)


@jit_entry
def copy_folios(kernel, dst_base, src_base, dst, src, order, start, stop, done):
    """Copy entries ``start`` to ``stop`` - 1 of a CopyPlan's arrays and set their ``done``; returns 0.

    Fenced: another thread that learns of the return sees the bytes. Called from Python it costs about 1.3 us, and
    should always get arrays of the plan's types, contiguous: others are compiled for anew.
    """
    if kernel == KERNEL_STREAM:
        _stream_folios(dst_base, src_base, dst, src, order, start, stop)
        stream_fence()
    else:
        for i in range(start, stop):
            copy_plain(dst_base + (dst[i] << FRAME_SHIFT), src_base + (src[i] << FRAME_SHIFT),
                       np.int64(FRAME_SIZE) << order[i])
    for i in range(start, stop):
        done[i] = 1
    return 0


@jit_entry
def _copy_pieces(kernel, dst_base, src_base, dst, src, order, piece, pieces):
    # Of every folio, piece number ``piece`` of ``pieces``: equal to within one page, or one cache line where there
    # are fewer pages than pieces. The last ends where the folio ends, so that no tail is lost.
    for i in range(len(order)):
        nr_pages = np.int64(1) << order[i]
        unit = FRAME_SIZE if nr_pages >= pieces else CACHE_LINE
        nr_units = (nr_pages << FRAME_SHIFT) // unit
        first = nr_units * piece // pieces * unit
        end = nr_units * (piece + 1) // pieces * unit
        copy_bytes(kernel, dst_base + (dst[i] << FRAME_SHIFT) + first, src_base + (src[i] << FRAME_SHIFT) + first,
                   end - first)
    if kernel == KERNEL_STREAM:
        stream_fence()
    return 0


def split_folios(nr_folios, threads):
    """(start, stop) of each thread's folios, in order: floor(n / t), and one more for the first n mod t threads."""
    each, rest = divmod(nr_folios, threads)
    starts = [i * each + min(i, rest) for i in range(threads + 1)]
    return list(zip(starts, starts[1:]))


class CpuBackend:
    """Copies with one kernel (``"plain"`` or ``"stream"``) on ``threads`` threads, the calling one among them.

    With at least as many folios as threads each thread takes whole folios, in order; with fewer, every folio is
    cut into one piece per thread. Keeps the promises of :class:`~offload.kernels.base.CopyBackend`; fails only
    with -ENOMEM, when the system gives no thread. One call at a time. The threads are started by the first copy
    that needs them and stay until :meth:`close` or the end of a ``with`` block.
    """

    def __init__(self, kernel="plain", threads=1):
        if kernel not in KERNELS:
            raise InvalidInput(f"kernel {kernel!r} is not known; use one of: {', '.join(KERNELS)}")
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise InvalidInput(f"threads {threads!r} cannot be; give a number from 1 to {MAX_THREADS}")
        self.kernel = kernel
        self.threads = threads
        self._kernel = KERNELS.index(kernel)
        self._pool = None

    @property
    def name(self):
        return f"{self.kernel}:{self.threads}"

    def __repr__(self):
        return f"CpuBackend({self.kernel!r}, threads={self.threads})"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Stop the threads. A later copy starts them again."""
        pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()

    def copy(self, plan: CopyPlan, done) -> int:
        """Carry out ``plan``; see :meth:`offload.kernels.base.CopyBackend.copy`."""
        nr_folios = len(plan.order)
        if self.threads == 1 or nr_folios == 0:
            return copy_folios(self._kernel, *plan, 0, nr_folios, done)
        if nr_folios >= self.threads:
            return self._on_all(copy_folios, [(self._kernel, *plan, start, stop, done)
                                              for start, stop in split_folios(nr_folios, self.threads)])
        error = self._on_all(_copy_pieces, [(self._kernel, *plan, piece, self.threads)
                                            for piece in range(self.threads)])
        if not error:
            done[:] = 1
        return error

    def _on_all(self, function, shares):
        # The first share is the caller's own. Nobody copies any more on return, nor after an exception.
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.threads - 1, "copy")
        futures = []
        try:
            for share in shares[1:]:
                futures.append(self._pool.submit(function, *share))
            function(*shares[0])
            for future in futures:
                future.result()
        except RuntimeError:
            # No new thread. The share that wanted one is queued all the same, and must not run later.
            pool, self._pool = self._pool, None
            pool.shutdown(cancel_futures=True)
            return -ENOMEM
        except BaseException:                       # Ctrl-C, most likely while this thread waits for the others
            concurrent.futures.wait(futures)
            raise
        return 0
