"""What others do to a folio while a call runs, as far as a scenario says it beforehand.

Stands for whoever holds the folio lock, ends writeback, or took a reference: not a part of the kernel's migration
path but the world around it. State is the folio's row in ``Memory.others`` (OTHERS_DTYPE); row 0 is a world that
does nothing. What cannot be said beforehand is an event placed between two steps (migrate/pages.py).
"""

import numpy as np

from offload.jit import jit, jit_inline
from offload.mm.memmap import (
    ALLOC_OK, OTHERS_NO, OTHERS_UNTIL_WAIT, PG_hwpoison, PG_locked, PG_writeback,
)
from offload.mm.node import folio_put_refs

__all__ = ("wait_for_lock", "wait_for_writeback", "wait_for_buffers", "others_refuse_alloc", "others_before_move",
           "others_after_failed_move", "others_at_batch_copy", "told", "NOT_TOLD")

NOT_TOLD = 1
"""No outcome is told beforehand: the rules decide."""


@jit
def wait_for_lock(mem, pfn):
    """Sleep until the folio's lock is released, then hold it. False if its holder never lets go."""
    others = mem.others[mem.folios[pfn].others]
    if others.lock != OTHERS_UNTIL_WAIT:
        return False
    others.lock = 0
    mem.folios[pfn].page_flags |= PG_locked         # ours now
    return True


@jit
def wait_for_writeback(mem, pfn):
    """Sleep until writeback of the folio has ended. False if it never does."""
    others = mem.others[mem.folios[pfn].others]
    if others.writeback != OTHERS_UNTIL_WAIT:
        return False
    others.writeback = 0
    mem.folios[pfn].page_flags &= ~PG_writeback
    return True


@jit
def wait_for_buffers(mem, pfn):
    """Sleep until somebody's locks on the folio's buffer heads are released. False if they never are."""
    others = mem.others[mem.folios[pfn].others]
    if others.buffers_locked == OTHERS_UNTIL_WAIT:
        others.buffers_locked = OTHERS_NO
    return others.buffers_locked == OTHERS_NO


@jit
def told(mem, script):
    """The next outcome of a script of ``Memory.scripts``: 0 or -errno; the last repeats. NOT_TOLD without a script (0)."""
    if script == 0:
        return np.int64(NOT_TOLD)
    left = mem.scripts[script]
    if left > 1:
        mem.scripts[script] = left - 1
    return mem.scripts[script + left]


@jit_inline
def others_refuse_alloc(mem, src):
    """Whether the target allocation for this folio fails."""
    return mem.others[mem.folios[src].others].alloc != ALLOC_OK


@jit
def others_at_batch_copy(mem, src):
    """Right after the batch copy (or the flush): references that come only now are taken, memory found bad is marked."""
    others = mem.others[mem.folios[src].others]
    if others.poisoned_after_unmap:
        mem.folios[src].page_flags |= PG_hwpoison
    if others.refs_from_batch_copy and others.refs_held == 0:
        others.refs_held = others.refs
        mem.folios[src].refcount += np.int32(others.refs)


@jit
def others_before_move(mem, src):
    """Before a move attempt: references that go after as many failed ones as there were are dropped, for good."""
    others = mem.others[mem.folios[src].others]
    if others.refs_held and 0 <= others.refs_gone_after <= others.failed_moves:
        folio_put_refs(mem, src, np.int32(others.refs_held))
        others.refs = others.refs_held = 0


@jit
def others_after_failed_move(mem, src):
    """A move attempt has failed: references that go after that many are dropped at once, before anybody looks again."""
    mem.others[mem.folios[src].others].failed_moves += 1
    others_before_move(mem, src)
