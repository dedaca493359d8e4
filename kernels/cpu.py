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
from offload.jit import JIT_DISABLED, jit, jit_inline
from offload.kernels.base import CACHE_LINE, FRAME_SHIFT, FRAME_SIZE, CopyPlan
from offload.units import ENOMEM

__all__ = ("KERNELS", "KERNEL_PLAIN", "KERNEL_STREAM", "MAX_THREADS", "CpuBackend", "copy_folios", "copy_bytes",
           "copy_plain", "copy_stream", "stream_fence", "prefetch", "prefetch_write")

KERNELS = ("plain", "stream")
KERNEL_PLAIN = 0
KERNEL_STREAM = 1

MAX_THREADS = 64
"""As cpu_mt allows."""

_UNROLL = 4     # cache lines loaded before the first is stored


# 1. Instructions. The emit functions know LLVM only, so that a test can compile them for another machine.

_word, _half, _bit = ir.IntType(64), ir.IntType(32), ir.IntType(1)
_line = ir.VectorType(ir.IntType(8), CACHE_LINE)


def emit_prefetch(builder, address, write):
    """Ask for the cache line at ``address`` in all levels. Any address is safe."""
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _half, _half, _half]), "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, cgutils.voidptr_t), _half(write), _half(3), _half(1)])


def emit_stream_lines(builder, dst, src, count):
    """Copy ``count`` (a Python int) cache lines with non-temporal stores, after loading them all."""
    def pointer(address, i):
        return builder.inttoptr(builder.add(address, _word(i * CACHE_LINE)), _line.as_pointer())

    nontemporal = builder.module.add_metadata([_half(1)])
    lines = [builder.load(pointer(src, i), align=CACHE_LINE) for i in range(count)]
    for i, line in enumerate(lines):
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

    def _stream_lines(dst, src):
        ctypes.memmove(int(dst), int(src), _UNROLL * CACHE_LINE)
        return 0

    def _stream_line(dst, src):
        ctypes.memmove(int(dst), int(src), CACHE_LINE)
        return 0

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
    def _stream_lines(typingctx, dst, src):
        def codegen(context, builder, signature, args):
            emit_stream_lines(builder, *args, _UNROLL)
            return _word(0)
        return types.int64(types.int64, types.int64), codegen

    @intrinsic
    def _stream_line(typingctx, dst, src):
        def codegen(context, builder, signature, args):
            emit_stream_lines(builder, *args, 1)
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
def _stream_bytes(dst_addr, src_addr, nbytes, ahead_addr):
    # Prefetches as many bytes from ahead_addr as it copies.
    step = _UNROLL * CACHE_LINE
    at = 0
    while at + step <= nbytes:
        for line in range(_UNROLL):
            prefetch(ahead_addr + at + line * CACHE_LINE)
        _stream_lines(dst_addr + at, src_addr + at)
        at += step
    while at < nbytes:
        _stream_line(dst_addr + at, src_addr + at)
        at += CACHE_LINE
    return 0


@jit
def copy_stream(dst_addr, src_addr, nbytes):
    """Copy ``nbytes``, a multiple of 64 at addresses that are multiples of 64, past the caches; returns 0.

    The bytes are in no order with later stores, and other threads may miss them, until :func:`stream_fence`.
    """
    return _stream_bytes(dst_addr, src_addr, nbytes, src_addr + FRAME_SIZE)


@jit
def copy_bytes(kernel, dst_addr, src_addr, nbytes):
    """Copy with the kernel of this id, under its conditions; returns 0. After KERNEL_STREAM a fence is due."""
    if kernel == KERNEL_STREAM:
        return copy_stream(dst_addr, src_addr, nbytes)
    return copy_plain(dst_addr, src_addr, nbytes)


# 3. Plans.

@jit
def copy_folios(kernel, dst_base, src_base, dst, src, order, start, stop, done):
    """Copy entries ``start`` to ``stop`` - 1 of a CopyPlan's arrays and set their ``done``; returns 0. Fenced."""
    for i in range(start, stop):
        to = dst_base + (dst[i] << FRAME_SHIFT)
        at = src_base + (src[i] << FRAME_SHIFT)
        nbytes = np.int64(FRAME_SIZE) << order[i]
        if kernel == KERNEL_STREAM:
            following = src_base + (src[min(i + 1, stop - 1)] << FRAME_SHIFT)
            last = nbytes - FRAME_SIZE
            _stream_bytes(to, at, last, at + FRAME_SIZE)
            _stream_bytes(to + last, at + last, FRAME_SIZE, following)
        else:
            copy_plain(to, at, nbytes)
        done[i] = 1
    if kernel == KERNEL_STREAM:
        stream_fence()
    return 0


@jit
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
        if self.threads == 1:
            return copy_folios(self._kernel, *plan, 0, nr_folios, done)
        if nr_folios >= self.threads:
            each, rest = divmod(nr_folios, self.threads)
            starts = [i * each + min(i, rest) for i in range(self.threads + 1)]
            return self._on_all(copy_folios, [(self._kernel, *plan, start, stop, done)
                                              for start, stop in zip(starts, starts[1:])])
        error = self._on_all(_copy_pieces, [(self._kernel, *plan, piece, self.threads)
                                            for piece in range(self.threads)])
        if not error:
            done[:] = 1
        return error

    def _on_all(self, function, shares):
        # The first share is the caller's own. Whatever happens, nobody copies any more on return.
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.threads - 1, "copy")
        futures = []
        try:
            for share in shares[1:]:
                futures.append(self._pool.submit(function, *share))
            function(*shares[0])
        except RuntimeError:    # no new thread; the share that wanted it is still queued, and must not run later
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            return -ENOMEM
        finally:
            concurrent.futures.wait(futures)
        for future in futures:
            future.result()
        return 0
