"""One call of migrate_pages() as data, so that it can stop between any two steps and be taken up again.

The kernel keeps the state of a call in the local variables of four nested functions. Ours are the same
functions, but each keeps its locals, under the same names, in the one record of :class:`Call`, together with the
place where it stands (``*_at``). A compiled function returns 0 when it is through, or one of the STOP_* numbers
when Python must act first: make the batch copy, run an event. Called again, it goes on where it stood.

The lists of the kernel (from, ret_folios, split_folios ...) are stretches of one array, in list order.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from offload.jit import JIT_DISABLED, jit, jit_inline
from offload.mm.memmap import records, zeros
from offload.table import make_unpack
from offload.units import HPAGE_PMD_NR, NUMA_NO_NODE

__all__ = ("CALL_DTYPE", "LIST_DTYPE", "Call", "TargetControl", "make_call", "unpack_call", "list_add_tail", "move_list",
           "node_mask")

# --- why a compiled function came back ------------------------------------------------------------------------

DONE = 0
STOP_OFFLOAD_COPY = 1       # the batch list is unmapped and flushed: somebody at the hatch must copy it
STOP_STEP = 2               # an event is wanted at step ``step`` of folio ``step_folio``
STOP_CALLBACK = 3           # the owner of movable_ops page ``callback_src`` must move it to ``callback_dst``
STOP_FRAME_COPY = 4         # folio ``copy_src`` must be copied to ``copy_dst``, and only Python reaches the bytes
STOP_FRAME_LOG = 5          # Memory.frame_log must be carried out before there is more for it

# --- the steps between which events can be placed; bits of ``stop_mask`` --------------------------------------

STEP_UNMAP = 1 << 0         # before a folio is unmapped (each attempt)
STEP_UNMAPPED = 1 << 1      # a folio has been unmapped; its destination is allocated and locked
STEP_FLUSH = 1 << 2         # all that can be is unmapped; before the TLB flush
STEP_FLUSHED = 1 << 3       # after the flush, before the batch copy
STEP_BATCH_COPIED = 1 << 4  # after the batch copy (where there is none: after the flush), before any move
STEP_MOVE = 1 << 5          # before a move attempt
STEP_COPIED = 1 << 6        # in a move: references checked, contents copied; before the mapping is replaced
STEP_MOVED = 1 << 7         # a folio has been moved, its page-table entries point to the destination
STEP_MOVE_FAILED = 1 << 8   # a move attempt has failed with -EAGAIN; the folio stays unmapped
STEP_UNDO = 1 << 9          # before a folio's migration is undone, after its last attempt

STEPS = {
    "unmap": STEP_UNMAP, "unmapped": STEP_UNMAPPED, "flush": STEP_FLUSH, "flushed": STEP_FLUSHED,
    "batch_copied": STEP_BATCH_COPIED, "move": STEP_MOVE, "copied": STEP_COPIED, "moved": STEP_MOVED,
    "move_failed": STEP_MOVE_FAILED, "undo": STEP_UNDO,
}

# --- the lists ------------------------------------------------------------------------------------------------

L_FROM = 0                  # what the caller handed in and no batch has taken yet; at the end what is left
L_BATCH = 1                 # the folios of the current batch
L_BACK = 2                  # sync: what the asynchronous stage gave back
L_ONE = 3                   # sync: the folio tried on its own
L_RET = 4                   # to be given back to the caller
L_SPLIT = 5                 # pieces of folios split on the way, to be tried once
NR_LISTS = 6

LIST_DTYPE = np.dtype([("first", np.int64), ("nr", np.int64)], align=True)
"""A list: where it begins in Call.pfns, how many folios are on it."""

CALL_DTYPE = np.dtype([(name, np.int64) for name in (
    # the arguments
    "mode", "reason", "target", "pf_memalloc", "batch_pages", "stop_mask", "time_copies",
    # where destinations come from, unless it is node ``target`` and no other: see TargetControl
    "target_special", "nmask", "nmask_next", "interleave", "ilx", "own_free",
    # migrate_pages()
    "pages_at", "from_at", "rc", "total", "hang", "interrupted",
    # migrate_hugetlbs(): whether the list has hugetlb folios (HUGETLB_*); where the one in hand stands; where it has moved to
    "hugetlb", "hugetlb_at", "moved_dst",
    # migrate_pages_sync(): its stage, and the counters as they were before it
    "sync_at", "sync_i", "sync_failed", "nr_failed_pages_before", "nr_thp_failed_before", "nr_thp_split_before",
    "nr_split_before",
    # migrate_pages_batch()
    "batch_at", "batch_mode", "batch_from", "batch_ret", "batch_split", "passes", "pass_", "in_pass", "i", "kept",
    "protocol", "offload", "retry", "thp_retry", "retry_pages", "failed", "saved", "batch_rc",
    # the folio in hand: migrate_folio_unmap(), migrate_folio_move()
    "dst", "since", "move_at", "old_page_state", "anon_vma", "was_queued", "was_partial",
    # movable_ops: what Python is asked, and the answer
    "callback_owner", "callback_src", "callback_dst", "callback_rc",
    # a copy of the move phase that Python makes, and what came of it: 0 or -errno
    "copy_src", "copy_dst", "copy_rc",
    # the batch copy: whether it failed, and (v4, flags, v5) whether the whole batch list counts as copied
    "batch_copy_failed", "batch_copied",
    # pairs of the current batch, see Call
    "nr_batch", "nr_single", "pair_size",
    # where an event is wanted
    "step", "step_folio", "step_passed",
    # the result: struct migrate_pages_stats and what only we count
    "nr_succeeded", "nr_failed_pages", "nr_thp_succeeded", "nr_thp_failed", "nr_thp_split", "nr_split",
    "targets_allocated", "targets_returned", "tlb_flushes", "cpu_batches",
    "copied_folios", "batched_folios", "moved_with_copy", "copied_bytes", "moved_bytes", "nr_batches",
    "unmap_ns", "flush_ns", "copy_ns", "move_ns", "move_copy_ns", "phase_started", "nr_blocked", "nr_in_ns",
)], align=True)


class Call(NamedTuple):
    """A running call. ``pair_*`` hold the unmapped folios of the batch, in the order of unmapping.

    Rows 0 .. nr_batch-1 are the batch list (those that will be copied through the hatch), rows ``pair_size`` ..
    ``pair_size + nr_single - 1`` the single list. A finished pair keeps its row and has ``pair_src`` 0.
    """

    state: np.ndarray           # CALL_DTYPE, one row
    lists: np.ndarray           # LIST_DTYPE, NR_LISTS rows
    pfns: np.ndarray            # int64, the lists themselves
    pair_src: np.ndarray        # int64
    pair_dst: np.ndarray        # int64
    pair_order: np.ndarray      # uint8
    pair_done: np.ndarray       # uint8: the batch copy's completions
    pair_since: np.ndarray      # int64, ticks: when the folio lost its first mapping
    blocked: np.ndarray         # int64, per folio given its mapping back, in that order; nr_blocked of them: nr_in_ns ns, then ticks


unpack_call = make_unpack("Call", Call(CALL_DTYPE, LIST_DTYPE, np.int64, np.int64, np.int64, np.uint8, np.uint8,
                                     np.int64, np.int64))


def node_mask(nids):
    """A nodemask_t: bit n for node n, as an int64 (node 63 is the sign). A machine has no nodes beyond."""
    mask = sum(1 << int(nid) for nid in set(nids) if nid < 64)
    return mask - (1 << 64) if mask >> 63 else mask


@dataclasses.dataclass(frozen=True)
class TargetControl:
    """Where the destinations of a call come from (struct migration_target_control, struct migration_mpol).

    ``nid`` is tried first; None: the source's own node. ``nmask``: the nodes that an allocation may come from, in the
    order of ``nid``'s zonelist; empty: ``nid`` alone (__GFP_THISNODE). ``nmask_next``: those of a second attempt, if the
    first finds nothing. ``interleave``: nodes among which a page's index decides which is first, counted from index ``ilx``.
    ``own_free``: instead of all this, compaction's own list of free blocks, to which unused destinations return.
    """

    nid: int | None
    nmask: tuple = ()
    nmask_next: tuple = ()
    interleave: tuple = ()
    ilx: int = 0
    own_free: bool = False


def call_records(nr, dtype):
    """Zeroed records of a call. Only uncompiled code needs them as a record array, whose fields cost Python 10 us each."""
    return records(nr, dtype) if JIT_DISABLED else np.zeros(nr, dtype)


def make_call(pfns, *, mode, reason, target, batch_pages, nr_pages):
    """A call that has not begun, for isolated folios ``pfns`` (int64, list order) of ``nr_pages`` base pages in all.

    ``target``: a node, or a TargetControl.
    """
    nr = len(pfns)
    pair_size = min(nr_pages, batch_pages + HPAGE_PMD_NR)       # a batch ends with the folio that fills it
    sizes = (nr, pair_size, pair_size, 1, nr_pages, pair_size)
    lists = call_records(NR_LISTS, LIST_DTYPE)
    lists["first"] = np.cumsum((0, *sizes[:-1]))
    state = call_records(1, CALL_DTYPE)
    if isinstance(target, TargetControl):
        state["target_special"], state["ilx"], state["own_free"] = 1, target.ilx, target.own_free
        for field in ("nmask", "nmask_next", "interleave"):
            state[field] = node_mask(getattr(target, field))
        target = NUMA_NO_NODE if target.nid is None else target.nid
    for field, value in (("mode", mode), ("reason", reason), ("target", target), ("batch_pages", batch_pages),
                         ("pair_size", pair_size)):
        state[field] = value
    call = Call(state, lists, zeros(sum(sizes), np.int64), *(
        np.zeros(2 * pair_size, dtype) for dtype in (np.int64, np.int64, np.uint8, np.uint8, np.int64)),
        zeros(nr_pages, np.int64))
    call.pfns[:nr] = pfns
    lists[L_FROM]["nr"] = nr
    return call


@jit_inline
def list_add_tail(call, which, pfn):
    """Append a folio to a list (list_move_tail(); whoever takes it off another list does that himself)."""
    at = call.lists[which]
    call.pfns[at.first + at.nr] = pfn
    at.nr += 1


@jit
def move_list(call, which, to):
    """Append all of one list to another (list_splice_tail_init())."""
    frm = call.lists[which]
    for i in range(frm.nr):
        list_add_tail(call, to, call.pfns[frm.first + i])
    frm.nr = 0


@jit_inline
def step_before(call, step, folio):
    """Whether to stop for an event before this step. Asked again when the call is taken up, it then says no."""
    c = call.state[0]
    if c.stop_mask & step == 0:
        return False
    if c.step_passed == step:
        c.step_passed = 0
        return False
    c.step, c.step_folio, c.step_passed = step, folio, step
    return True


@jit_inline
def step_after(call, step, folio):
    """Whether to stop for an event after this step; the caller must stand behind it already."""
    c = call.state[0]
    if c.stop_mask & step == 0:
        return False
    c.step, c.step_folio = step, folio
    return True
