"""What a GPU is told of a batch: merged runs for the copy calls, lists of frame numbers for the kernel.

Pure functions from a CopyPlan to arrays; no device is needed and none is asked. ``cuda`` hands the arrays over. Stands
for the scatter-gather tables that dcbm builds for its channels (RFC v6, not merged), where the DMA mapping merges
neighbours.
"""

from typing import NamedTuple

import numpy as np

from offload.errors import InvalidInput
from offload.kernels.base import FRAME_SHIFT, FRAME_SIZE, MAX_ORDER, refuse_overlap

__all__ = ("Runs", "Launch", "merge_runs", "lay_out", "split_evenly", "split_chunks", "TooFarApart", "FOLIO_BATCH_DTYPE")

FOLIO_BATCH_DTYPE = np.dtype([("first_item", np.uint64, MAX_ORDER + 2), ("first_pair", np.uint32, MAX_ORDER + 1),
                              ("zero", np.uint32)])
"""``struct folio_batch`` of copy_folios.cu."""


class TooFarApart(InvalidInput):
    """Frames of one batch that 32 bits cannot number."""


class Runs(NamedTuple):
    """Runs of adjacent bytes: run r copies ``nbytes[r]`` bytes from address ``src[r]`` to ``dst[r]``; all uint64.

    ``run_of[i]`` is the run that holds entry i of the plan, whole.
    """

    dst: np.ndarray
    src: np.ndarray
    nbytes: np.ndarray
    run_of: np.ndarray

    def __len__(self):
        return len(self.nbytes)


class Launch(NamedTuple):
    """The arguments of one launch of copy_folios(): bases, a (n, 2) uint32 array of (dst, src) frames, a folio_batch.

    The bases are those of the plan moved to the lowest frame of each side, so that 32 bits reach 16 TiB.
    """

    dst_base: int
    src_base: int
    pairs: np.ndarray
    batch: np.ndarray

    @property
    def nr_items(self):
        """Pages in all, a warp's work each."""
        return int(self.batch["first_item"][-1])


def merge_runs(plan, *, check=True):
    """The Runs of a plan: entries that follow one another at both ends are one run; no two runs could be merged further.

    They are in order of destination. InvalidInput if a destination overlaps a destination or a source: with ``check``
    False that is promised by the caller, and not looked for.
    """
    if check:
        refuse_overlap(plan)
    dst = _addresses(plan.dst_base, plan.dst)
    src = _addresses(plan.src_base, plan.src)
    nbytes = np.uint64(FRAME_SIZE) << plan.order.astype(np.uint64)
    sequence = None
    if (dst[1:] < dst[:-1]).any():
        sequence = np.argsort(dst)                  # no two are equal
        dst, src, nbytes = dst[sequence], src[sequence], nbytes[sequence]
    end = dst + nbytes
    starts, ends = np.ones(len(dst), bool), np.ones(len(dst), bool)
    starts[1:] = ends[:-1] = (end[:-1] != dst[1:]) | (src[:-1] + nbytes[:-1] != src[1:])
    first = np.flatnonzero(starts)
    run = np.cumsum(starts) - 1
    run_of = run
    if sequence is not None:
        run_of = np.empty(len(run), np.int64)
        run_of[sequence] = run
    return Runs(dst[first], src[first], end[ends] - dst[first], run_of)


def list_in_memory(nr):
    return np.empty((nr, 2), np.uint32)


def lay_out(plan, *, check=True, room=list_in_memory):
    """The Launch of a plan: its folios sorted by order, in list order within one. InvalidInput as merge_runs().

    ``room(n)`` gives the (n, 2) uint32 array for the pairs, asked for when nothing can be refused any more. Neighbours are not
    merged: a pair costs 8 bytes of list, and a warp finds its page without them.
    """
    if check:
        refuse_overlap(plan)
    order, dst, src = plan.order, plan.dst, plan.src
    if len(order) and (order != order[0]).any():
        sequence = np.argsort(order, kind="stable")
        order, dst, src = order[sequence], dst[sequence], src[sequence]
    lowest = [_lowest("dst", dst), _lowest("src", src)]
    pairs = room(len(order))
    for side, frames in enumerate((dst, src)):
        np.subtract(frames, lowest[side], out=pairs[:, side], casting="unsafe")
    dst_base, src_base = ((int(base) + (frame << FRAME_SHIFT)) % 2**64 for base, frame in zip((plan.dst_base, plan.src_base), lowest))
    nr_folios = np.bincount(order, minlength=MAX_ORDER + 1).astype(np.uint64)
    batch = np.zeros((), FOLIO_BATCH_DTYPE)
    batch["first_pair"][1:] = np.cumsum(nr_folios)[:-1]
    batch["first_item"][1:] = np.cumsum(nr_folios << np.arange(MAX_ORDER + 1, dtype=np.uint64))
    return Launch(dst_base, src_base, pairs, batch)


def split_evenly(nr, parts):
    """(start, stop) of each part's entries: part i gets floor(nr (i + 1) / parts) - floor(nr i / parts), as dcbm's channels."""
    starts = [nr * i // parts for i in range(parts + 1)]
    return list(zip(starts, starts[1:]))


def split_chunks(nr, most):
    """(start, stop) of pieces of ``most`` entries, the last one shorter; none for no entries."""
    return [(start, min(start + most, nr)) for start in range(0, nr, most)]


def _addresses(base, frames):
    # Modulo 2**64 on purpose: a base may lie below 0, for it stands for frame 0, which nobody copies.
    return np.uint64(int(base) % 2**64) + (frames.astype(np.uint64) << np.uint64(FRAME_SHIFT))


def _lowest(what, frames):
    if not len(frames):
        return 0
    lowest, highest = int(frames.min()), int(frames.max())
    if highest - lowest >= 2**32:
        raise TooFarApart(f"{what} frames {lowest} to {highest} of one batch are 16 TiB or more apart; copy them in several batches")
    return lowest
