"""The contract of the copy kernels: what a plan is, what a backend promises, and what is refused.

Stands for the folio lists that the batch-copy series hands to a copier (``folios_mc_copy``, RFC v4 to v6, not
merged), as arrays. Leaves out who may be copied and what happens to those that were not: that is the migration
path's business.

A *frame* number counts 4 KiB pages from a *base* address: frame f of base b lies at byte address b + f * 4096.
Frames beside each other are adjacent bytes, so a folio of any order is one run of bytes.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from offload.errors import InvalidInput

__all__ = ("CopyPlan", "CopyBackend", "checked_plan", "FRAME_SHIFT", "FRAME_SIZE", "CACHE_LINE", "MAX_ORDER")

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


def _refuse_overlap(dst, src, nbytes):
    if not len(dst):
        return
    by_start = np.argsort(dst, kind="stable")
    start, end = dst[by_start], (dst + nbytes)[by_start]
    # Sorted by start, any overlap implies one between neighbours.
    clash = np.flatnonzero(start[1:] < end[:-1])
    if len(clash):
        _overlap("dst", by_start[clash[0]], "dst", by_start[clash[0] + 1])
    # Destinations are disjoint now, so of those that start before a source ends, the last one ends last.
    last = np.searchsorted(start, src + nbytes, side="left") - 1
    clash = np.flatnonzero((last >= 0) & (end[last] > src))
    if len(clash):
        _overlap("dst", by_start[last[clash[0]]], "src", clash[0])


def _overlap(what, entry, other_what, other):
    raise InvalidInput(f"{what} of entry {entry} overlaps {other_what} of entry {other}; a batch is copied in no "
                       f"particular order, so give each destination bytes of its own")
