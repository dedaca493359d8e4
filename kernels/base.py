"""The contract of the copy kernels: what a plan is, what a backend and a DMA provider promise, and what is refused.

Stands for the folio lists that the batch-copy series hands to a copier (``folios_mc_copy``, RFC v4 to v6, not
merged), as arrays. Leaves out who may be copied and what happens to those that were not: that is the migration
path's business.

A *frame* number counts 4 KiB pages from a *base* address: frame f of base b lies at byte address b + f * 4096.
Frames beside each other are adjacent bytes, so a folio of any order is one run of bytes.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from offload.errors import InvalidInput

__all__ = ("CopyPlan", "CopyBackend", "checked_plan", "refuse_overlap", "DmaProvider", "DmaProviderChan",
           "DMA_IN_PROGRESS", "DMA_TRANS_NOERROR", "DMA_TRANS_READ_FAILED", "DMA_TRANS_WRITE_FAILED", "DMA_TRANS_ABORTED",
           "FRAME_SHIFT", "FRAME_SIZE", "CACHE_LINE", "MAX_ORDER")

FRAME_SHIFT = 12
FRAME_SIZE = 1 << FRAME_SHIFT
CACHE_LINE = 64
"""Bases are multiples of this many bytes; kernels copy whole lines of it."""
MAX_ORDER = 18
"""Largest order of an entry: a 1 GiB folio."""


class CopyPlan(NamedTuple):
    """One batch: entry i copies 4096 << order[i] bytes from frame src[i] to frame dst[i].

    ``dst`` and ``src`` are int64, ``order`` is uint8, all contiguous and of one length; the bases are addresses,
    multiples of 64. The constructor checks nothing: it is for the migration path, whose destinations are fresh.
    Whoever is not sure uses :func:`checked_plan`.
    """

    dst_base: int
    src_base: int
    dst: np.ndarray
    src: np.ndarray
    order: np.ndarray

    @property
    def nr_folios(self):
        return len(self.order)

    @property
    def nbytes(self):
        """Payload in bytes: each byte copied counts once."""
        return int((np.int64(FRAME_SIZE) << self.order.astype(np.int64)).sum())


@runtime_checkable
class CopyBackend(Protocol):
    """Something that carries out a :class:`CopyPlan`.

    * *Order* of the entries, and of the bytes within one, is undefined; several may be under way at once.
    * *Overlap*: if a destination overlaps another destination or any source, the bytes are undefined.
      :func:`checked_plan` refuses such plans.
    * *Visibility*: whoever sees :meth:`copy` return also sees every byte that it wrote, and none is written
      later; non-temporal stores are fenced before the return.
    * *Failure*: the bytes of entries that are not done are undefined; sources and everything outside the
      destinations are never written.
    """

    name: str
    """Kernel and width, as results name it: ``"stream:2"``."""

    threads: int
    """How many copy at once, the caller among them."""

    def copy(self, plan: CopyPlan, done: np.ndarray) -> int:
        """Carry out ``plan``. ``done`` is a uint8 array of its length, zeroed by the caller.

        Returns 0, or a negative errno when not everything was copied. Either way done[i] is then 1 for exactly
        the entries that were wholly written.
        """
        ...


DMA_IN_PROGRESS, DMA_TRANS_NOERROR, DMA_TRANS_READ_FAILED, DMA_TRANS_WRITE_FAILED, DMA_TRANS_ABORTED = range(5)
"""Results of a descriptor. As enum dmaengine_tx_result (include/linux/dmaengine.h, v7.3), which begins with NOERROR."""


class DmaProvider(Protocol):
    """A DMA engine as its driver sees it: a number of channels that copy by themselves.

    Stands for the provider side of struct dma_device (include/linux/dmaengine.h, v7.3). Clients go through
    offload/dmaengine.py, which keeps channels, cookies and states apart and calls nothing here out of turn.
    """

    name: str
    """As results name it: ``"cpu"``, ``"cuda-batch"``."""

    reaches_devices: bool
    """Whether its channels copy to and from device memory; absent means no."""

    needs_pinned: bool
    """Whether they reach host memory only where it is pinned; absent means no."""

    nr_chans: int
    """How many channels it has. Numbers 0 to nr_chans - 1; each is given to one client at a time."""

    def alloc_chan_resources(self, number) -> "DmaProviderChan | int":
        """Channel ``number``, ready for use, or a negative errno. Called again for each client that gets it.

        A provider keeps what is dear (threads, streams, staging buffers) between clients, until :meth:`close`.
        """
        ...

    def close(self) -> None:
        """Give up threads, streams and memory. No channel is in use. Twice is once."""
        ...


class DmaProviderChan(Protocol):
    """A channel: what is issued on it is carried out while the client does something else.

    * *A batch of descriptors* is what is prepared at once: descriptor i copies entry i of a :class:`CopyPlan`. Batches
      of one channel are carried out in the order of their submission; the descriptors of one batch, and channels
      among each other, in no order. Overlap as for :class:`CopyBackend`.
    * *Results*: the provider writes result[i] (uint8, DMA_TRANS_*) once when descriptor i has ended, after its
      bytes, and nothing else there. The client reads it after :meth:`wait` or :meth:`terminate_sync`; both make
      what was written before visible to the caller, bytes and results alike. Where an engine knows less (one
      completion for a chunk or a launch), all descriptors of that unit get the unit's result. An error is a result:
      the bytes of that descriptor are undefined, the others go on if the engine can, else end as ABORTED.
    * *Lifetime*: the provider keeps the plan's arrays and ``result`` alive; the client leaves them as they are
      until the batch has ended.
    * *Exceptions* mean that the device is lost, or a bug. Afterwards terminate_sync() and
      free_chan_resources() are called all the same, and must not raise.
    """

    def prep_dma_memcpy(self, plan: CopyPlan, result: np.ndarray, interrupt: str) -> object | None:
        """Prepare a batch: whatever the channel knows it by, or None if it is refused (no room in the ring). Copies
        nothing.

        ``interrupt``: which descriptors signal: ``"each"`` or, as most drivers ask for, ``"last"``, the one with
        the highest index (DMA_PREP_INTERRUPT on that one alone).
        """
        ...

    def submit(self, prepared) -> int:
        """Queue a prepared batch. 0 or a negative errno; then it never runs. Copies nothing yet."""
        ...

    def issue_pending(self) -> None:
        """Start what is submitted, in order, and return without waiting for it."""
        ...

    def wait(self, prepared, timeout_ns: int) -> bool:
        """Sleep until the descriptors of an issued batch that signal have done so; False after ``timeout_ns``.

        With ``"each"``, True means that every descriptor has a result. With ``"last"`` it means that the last one
        has; earlier ones may be under way if the engine finishes out of order. Ctrl-C may end it by an exception.
        A modelled engine moves its own clock instead of sleeping.
        """
        ...

    def terminate_sync(self) -> None:
        """Drop what has not started, stop or wait out what has. Whatever has no result gets DMA_TRANS_ABORTED.

        When it returns, no byte and no result is written any more. (Modelled engines may break this on purpose; an
        engine that cannot abort waits.)
        """
        ...

    def free_chan_resources(self) -> None:
        """The client is gone; nothing is under way."""
        ...


def checked_plan(dst_base, src_base, dst, src, order, *, dst_frames=None, src_frames=None):
    """A :class:`CopyPlan` of these values, converted, or InvalidInput saying which entry cannot be.

    Orders are 0 to 18; frames need no natural alignment. With ``dst_frames`` or ``src_frames`` every entry must
    lie within that many frames. No destination may share a byte with another destination or with any source, its
    own included, since a batch is copied in no particular order; sources may overlap one another.
    """
    dst, src, order = (_integers(what, values) for what, values in (("dst", dst), ("src", src), ("order", order)))
    if not len(dst) == len(src) == len(order):
        raise InvalidInput(f"dst, src and order have {len(dst)}, {len(src)} and {len(order)} entries; "
                           f"give one of each for every folio")
    _refuse(order, (order < 0) | (order > MAX_ORDER), "order", f"orders are 0 to {MAX_ORDER}")
    nr_frames = np.int64(1) << order
    dst_start = _addresses("dst", dst_base, dst, nr_frames, dst_frames)
    src_start = _addresses("src", src_base, src, nr_frames, src_frames)
    _refuse_overlap(dst_start, src_start, nr_frames << FRAME_SHIFT)
    return CopyPlan(int(dst_base), int(src_base), dst, src, order.astype(np.uint8))


def _integers(what, values):
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"{what} is an array of {array.ndim} dimensions and type {array.dtype}; "
                           f"give one dimension of integers")
    if array.dtype == np.uint64:
        _refuse(array, array > np.uint64(np.iinfo(np.int64).max), what, "the largest is 2**63 - 1")
    return np.ascontiguousarray(array, np.int64)


def _refuse(values, wrong, what, expected):
    if wrong.any():
        entry = int(wrong.argmax())
        raise InvalidInput(f"{what}[{entry}] is {int(values[entry])}; {expected}")


def _addresses(what, base, frames, nr_frames, limit):
    """Address of the first byte of each entry, after its range is checked."""
    base = int(base)
    if base % CACHE_LINE:
        raise InvalidInput(f"{what}_base {base:#x} is not a multiple of {CACHE_LINE}; align it")
    _refuse(frames, frames < 0, what, "frames count from 0")
    # Python's integers, and a comparison which cannot overflow: the frames themselves may be absurd.
    most = (np.iinfo(np.int64).max - max(base, 0)) >> FRAME_SHIFT
    _refuse(frames, frames > most - nr_frames, what, f"base {base:#x} leaves room for {most} frames of addresses")
    if limit is not None:
        _refuse(frames, frames > limit - nr_frames, what, f"its folio must end within {limit} frames")
    return base + (frames << FRAME_SHIFT)


def refuse_overlap(plan):
    """InvalidInput if a destination of the plan shares a byte with another destination or with any source."""
    nbytes = np.int64(FRAME_SIZE) << plan.order.astype(np.int64)
    _refuse_overlap(plan.dst_base + (plan.dst << FRAME_SHIFT), plan.src_base + (plan.src << FRAME_SHIFT), nbytes)


def _refuse_overlap(dst, src, nbytes):
    if not len(dst):
        return
    by_start = np.argsort(dst)
    start, end = dst[by_start], (dst + nbytes)[by_start]
    # Sorted by start, any overlap implies one between neighbours.
    if (start[1:] < end[:-1]).any():
        by_start = np.argsort(dst, kind="stable")   # dearer, and what is named is then the same everywhere
        clash = np.flatnonzero(dst[by_start][1:] < (dst + nbytes)[by_start][:-1])
        _overlap("dst", by_start[clash[0]], "dst", by_start[clash[0] + 1])
    if end[-1] <= src.min() or (src + nbytes).max() <= start[0]:
        return                                      # the common case: two nodes
    # Destinations are disjoint now, so of those that start before a source ends, the last one ends last.
    last = np.searchsorted(start, src + nbytes, side="left") - 1
    clash = np.flatnonzero((last >= 0) & (end[last] > src))
    if len(clash):
        _overlap("dst", by_start[last[clash[0]]], "src", clash[0])


def _overlap(what, entry, other_what, other):
    raise InvalidInput(f"{what} of entry {entry} overlaps {other_what} of entry {other}; a batch is copied in no "
                       f"particular order, so give each destination bytes of its own")
