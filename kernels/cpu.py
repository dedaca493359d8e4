"""Copies by CPU threads: the plain twin (the C library's memcpy) and the streaming twin (non-temporal stores).

*Plain* stands for folio_mc_copy() (mm/util.c, v7.3), which copies page by page: one memcpy call for every 4 KiB
page, also inside a large folio. *Streaming* writes past the caches. The split over threads stands for the cpu_mt
migrator of the series (RFC v3, dropped in v4; not merged), without its lost tail.

Threads that copy stand ready for the next batch (:class:`Workers`) and run compiled code without the GIL.

With the JIT disabled both twins are ctypes.memmove.
"""

import ctypes
import functools
import signal
import threading
import weakref
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from offload.errors import InvalidInput
from offload.intrinsics import clock_ns
from offload.jit import JIT_DISABLED, jit, jit_entry, jit_inline
from offload.kernels.base import CACHE_LINE, DMA_TRANS_ABORTED, FRAME_SHIFT, FRAME_SIZE, CopyPlan
from offload.kernels.semaphore import SEM_WORDS, sem_init, sem_post, sem_timedwait, sem_trywait, sem_wait
from offload.table import make_unpack, pack
from offload.units import ENOMEM

__all__ = ("KERNELS", "KERNEL_PLAIN", "KERNEL_STREAM", "MAX_THREADS", "CpuBackend", "Workers", "JOB_RING", "first_folio",
           "submit_job", "issue_jobs", "wait_for_jobs", "abort_jobs", "copy_folios", "copy_bytes", "copy_plain",
           "copy_stream", "stream_fence", "prefetch", "prefetch_write")

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

    def words_at(address, length):
        return np.ctypeslib.as_array((ctypes.c_int64 * int(length)).from_address(int(address)))

    def bytes_at(address, length):
        return np.ctypeslib.as_array((ctypes.c_uint8 * int(length)).from_address(int(address)))
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

    def _array_at(dtype):
        @intrinsic
        def array_at(typingctx, address, length):
            def codegen(context, builder, signature, args):
                array = context.make_array(signature.return_type)(context, builder)
                itemsize = context.get_constant(types.intp, dtype.bitwidth // 8)
                populate_array(array, data=builder.inttoptr(args[0], array.data.type),
                               shape=cgutils.pack_array(builder, [args[1]]),
                               strides=cgutils.pack_array(builder, [itemsize]), itemsize=itemsize, meminfo=None)
                return array._getvalue()
            return types.Array(dtype, 1, "C")(types.int64, types.int64), codegen
        return array_at

    words_at, bytes_at = _array_at(types.int64), _array_at(types.uint8)
    """The array of ``length`` int64, or uint8, at ``address``. Whoever handed the address over keeps it alive."""


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


@jit_inline
def first_folio(nr_folios, threads, i):
    # Of thread i: each has floor(n / t), and one more for the first n mod t threads.
    return i * (nr_folios // threads) + min(i, nr_folios % threads)


# 4. Threads that stand ready.

JOB_RING = 32
"""Jobs that may be submitted to a worker and not be waited for yet."""

_COPY_FOLIOS, _COPY_PIECE, _LEAVE = range(3)

_CHUNK_BYTES = 4 << 20
"""How much a worker copies before it looks whether it is to stop: under a millisecond."""

_SPIN_NS = 20_000
"""How long a thread that waits looks before it sleeps; being woken takes longer than this on a virtual machine."""


class WorkerTable(NamedTuple):
    """What workers and their clients share: int64 arrays, with a row for each worker or for each job.

    A worker's jobs are a ring of JOB_RING rows. Client and worker each count through it; ``wake`` has one for each job
    issued, ``ready`` one for each that has ended. Only the client writes a row, while the job is not issued.
    """

    wake: np.ndarray        # addresses of the semaphores
    ready: np.ndarray
    submitted: np.ndarray   # counts, kept by the client: submitted >= issued >= ended
    issued: np.ndarray
    ended: np.ndarray
    abort: np.ndarray       # not 0: end every job without copying on
    what: np.ndarray        # one row a job from here on
    kernel: np.ndarray
    dst_base: np.ndarray
    src_base: np.ndarray
    dst: np.ndarray         # addresses of the plan's arrays
    src: np.ndarray
    order: np.ndarray
    nr_folios: np.ndarray
    done: np.ndarray
    start: np.ndarray       # the share: folios from start to stop - 1, or piece number start of stop pieces
    stop: np.ndarray


_JOB_FIELDS = WorkerTable._fields[WorkerTable._fields.index("what"):]

_unpack = make_unpack("WorkerTable", WorkerTable(*[np.int64] * len(WorkerTable._fields)))


@jit
def _run_job(workers, worker, job):
    nr_folios, start, stop = workers.nr_folios[job], workers.start[job], workers.stop[job]
    kernel, dst_base, src_base = workers.kernel[job], workers.dst_base[job], workers.src_base[job]
    dst, src = words_at(workers.dst[job], nr_folios), words_at(workers.src[job], nr_folios)
    order = bytes_at(workers.order[job], nr_folios)
    if workers.what[job] == _COPY_PIECE:
        _copy_pieces(kernel, dst_base, src_base, dst, src, order, start, stop)
        return 0
    done = bytes_at(workers.done[job], nr_folios)
    while start < stop and workers.abort[worker] == 0:
        end, nbytes = start, 0
        while end < stop and nbytes < _CHUNK_BYTES:
            nbytes += np.int64(FRAME_SIZE) << order[end]
            end += 1
        copy_folios(kernel, dst_base, src_base, dst, src, order, start, end, done)
        start = end
    for i in range(start, stop):
        done[i] = DMA_TRANS_ABORTED
    return 0


@jit_entry
def _run_worker(table, worker):
    # A worker's life: sleep, do the next job of the ring, say so.
    workers = _unpack(table)
    at = 0
    while True:
        while sem_wait(workers.wake[worker]) != 0:
            pass                                    # a signal
        job = worker * JOB_RING + at
        at = (at + 1) % JOB_RING
        if workers.what[job] == _LEAVE:
            return 0
        _run_job(workers, worker, job)
        sem_post(workers.ready[worker])


@jit_inline
def _submit(workers, worker, what, kernel, dst_base, src_base, dst, src, order, done, start, stop):
    job = worker * JOB_RING + workers.submitted[worker] % JOB_RING
    workers.what[job] = what
    workers.kernel[job] = kernel
    workers.dst_base[job], workers.src_base[job] = dst_base, src_base
    workers.dst[job], workers.src[job] = dst.ctypes.data, src.ctypes.data
    workers.order[job], workers.nr_folios[job] = order.ctypes.data, len(order)
    workers.done[job] = done.ctypes.data
    workers.start[job], workers.stop[job] = start, stop
    workers.submitted[worker] += 1
    return workers.submitted[worker]


@jit_inline
def _issue(workers, worker):
    while workers.issued[worker] < workers.submitted[worker]:
        workers.issued[worker] += 1
        sem_post(workers.wake[worker])


@jit
def _wait(workers, worker, count, timeout_ns):
    # Until ``count`` jobs have ended: 0. Or -1: a signal came, or ``timeout_ns`` is over.
    until = clock_ns() + _SPIN_NS
    while workers.ended[worker] < count:
        if sem_trywait(workers.ready[worker]) == 0:
            workers.ended[worker] += 1
        elif clock_ns() >= until:
            if sem_timedwait(workers.ready[worker], timeout_ns) != 0:
                return -1
            workers.ended[worker] += 1
    return 0


_FOREVER_NS = 1 << 60


@jit
def _wait_out(workers, worker, count):
    while _wait(workers, worker, count, _FOREVER_NS) != 0:
        pass                                        # Python handles the signal later: nobody must copy then


def _undivided(function):
    """Let Ctrl-C strike before or after ``function``, not in it. Compiled code is so by nature."""
    @functools.wraps(function)
    def call(*args):
        if threading.current_thread() is not threading.main_thread():
            return function(*args)
        came = []
        before = signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
        try:
            return function(*args)
        finally:
            signal.signal(signal.SIGINT, before)
            if came:
                signal.raise_signal(signal.SIGINT)

    return call if JIT_DISABLED else function


@_undivided
@jit_entry
def submit_job(table, worker, kernel, dst_base, src_base, dst, src, order, done):
    """Give a plan to ``worker``, not to be started yet; returns how many it has been given by now.

    At most JOB_RING may be under way. The arrays are the caller's, and stay as they are until the job has ended; done[i]
    is then 1, or DMA_TRANS_ABORTED after abort_jobs().
    """
    return _submit(_unpack(table), worker, _COPY_FOLIOS, kernel, dst_base, src_base, dst, src, order, done, 0, len(order))


@_undivided
@jit_entry
def issue_jobs(table, worker):
    """Start what ``worker`` has been given; returns 0 at once."""
    _issue(_unpack(table), worker)
    return 0


@_undivided
@jit_entry
def wait_for_jobs(table, worker, count, timeout_ns):
    """Sleep until the first ``count`` jobs given to ``worker`` have ended: 0.

    -1 if ``timeout_ns`` passes or a signal arrives before: look at a clock, and call again to go on.
    """
    return _wait(_unpack(table), worker, count, timeout_ns)


@_undivided
@jit_entry
def abort_jobs(table, worker):
    """End all jobs of ``worker``, issued or not, as soon as it stops copying; returns 0 when it has stopped."""
    workers = _unpack(table)
    workers.abort[worker] = 1
    _issue(workers, worker)
    _wait_out(workers, worker, workers.issued[worker])
    workers.abort[worker] = 0
    return 0


@_undivided
@jit_entry
def _copy_on_all(table, threads, kernel, dst_base, src_base, dst, src, order, done):
    # The first share is the caller's own. Nobody copies any more on return.
    workers = _unpack(table)
    nr_folios = len(order)
    whole = nr_folios >= threads
    for i in range(1, threads):
        if whole:
            _submit(workers, i - 1, _COPY_FOLIOS, kernel, dst_base, src_base, dst, src, order, done,
                    first_folio(nr_folios, threads, i), first_folio(nr_folios, threads, i + 1))
        else:
            _submit(workers, i - 1, _COPY_PIECE, kernel, dst_base, src_base, dst, src, order, done, i, threads)
        _issue(workers, i - 1)
    if whole:
        copy_folios(kernel, dst_base, src_base, dst, src, order, 0, first_folio(nr_folios, threads, 1), done)
    else:
        _copy_pieces(kernel, dst_base, src_base, dst, src, order, 0, threads)
    for i in range(1, threads):
        _wait_out(workers, i - 1, workers.issued[i - 1])
    if not whole:
        done[:] = 1
    return 0


class Workers:
    """Up to ``number`` threads that stand ready to copy; each is started when it is first needed.

    They run compiled code and sleep on a semaphore, so that a job costs no switch of the GIL. No thread outlives
    :meth:`close`, the last reference to this object or the interpreter.
    """

    def __init__(self, number):
        words = {name: number * (JOB_RING if name in _JOB_FIELDS else 1) for name in WorkerTable._fields}
        self._arrays = WorkerTable(**{name: np.zeros(size, np.int64) for name, size in words.items()})
        self._semaphores = np.zeros(2 * number * SEM_WORDS, np.int64)
        addresses = self._semaphores.ctypes.data + 8 * SEM_WORDS * np.arange(2 * number)
        self._arrays.wake[:], self._arrays.ready[:] = addresses[:number], addresses[number:]
        for address in addresses.tolist():
            sem_init(address)
        self.table = pack(self._arrays)
        self._threads = {}
        keep = self._arrays, self._semaphores
        self._stop = weakref.finalize(self, _stop_workers, self.table, self._threads, keep)

    def start(self, worker):
        """Have ``worker`` ready; False if the system gives no thread."""
        if worker in self._threads:
            return True
        # A life of no jobs, so that what has to be compiled is compiled by the caller.
        _leave(self.table, worker)
        _run_worker(self.table, worker)
        self._arrays.submitted[worker] = self._arrays.issued[worker] = 0
        thread = threading.Thread(target=_run_worker, args=(self.table, worker), name=f"copy_{worker}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads[worker] = thread
        return True

    def close(self):
        """End the threads, after what they are copying. The object is of no more use."""
        self._stop()


@_undivided
@jit_entry
def _leave(table, worker):
    workers = _unpack(table)
    job = worker * JOB_RING + workers.submitted[worker] % JOB_RING
    workers.what[job] = _LEAVE
    workers.submitted[worker] += 1
    _issue(workers, worker)
    return 0


def _stop_workers(table, threads, keep):
    for worker in threads:
        _leave(table, worker)
    for thread in threads.values():
        thread.join()
    threads.clear()


class CpuBackend:
    """Copies with one kernel (``"plain"`` or ``"stream"``) on ``threads`` threads, the calling one among them.

    With at least as many folios as threads each thread takes whole folios, in order: floor(n / t), and one more for the
    first n mod t threads. With fewer, every folio is cut into one piece per thread. Keeps the promises of
    :class:`~offload.kernels.base.CopyBackend`; fails only with -ENOMEM, when the system gives no thread, and has then
    copied nothing. One call at a time. The threads are started by the first copy that needs them and stay until
    :meth:`close` or the end of a ``with`` block.
    """

    def __init__(self, kernel="plain", threads=1):
        self._kernel = kernel_id(kernel)
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise InvalidInput(f"threads {threads!r} cannot be; give a number from 1 to {MAX_THREADS}")
        self.kernel = kernel
        self.threads = threads
        self._workers = None

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
        workers, self._workers = self._workers, None
        if workers:
            workers.close()

    def copy(self, plan: CopyPlan, done) -> int:
        """Carry out ``plan``; see :meth:`offload.kernels.base.CopyBackend.copy`. Ctrl-C waits for the threads."""
        nr_folios = len(plan.order)
        if self.threads == 1 or nr_folios == 0:
            return copy_folios(self._kernel, *plan, 0, nr_folios, done)
        if self._workers is None and not self._start():
            return -ENOMEM
        return _copy_on_all(self._workers.table, self.threads, self._kernel, *plan, done)

    def _start(self):
        workers = Workers(self.threads - 1)
        if all(workers.start(worker) for worker in range(self.threads - 1)):
            self._workers = workers
            return True
        workers.close()
        return False


def kernel_id(kernel):
    """KERNEL_PLAIN or KERNEL_STREAM of a name; InvalidInput for any other."""
    if kernel not in KERNELS:
        raise InvalidInput(f"kernel {kernel!r} is not known; use one of: {', '.join(KERNELS)}")
    return KERNELS.index(kernel)
