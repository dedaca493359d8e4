"""Movable pages that are no folios of a process or a file: balloon and zsmalloc pages, moved by their owner's code.

Stands for struct movable_operations (include/linux/migrate.h) and isolate_movable_ops_page(), putback_movable_ops_page()
and migrate_movable_ops_page() of mm/migrate.c (v7.3). Such a page is on no LRU, in no NR_ISOLATED counter, mapped nowhere,
and its references are nobody's business but the owner's, who holds one. Its record's ``private`` is the owner's number, 0
once the owner has let go of it.

Owner 1 does what ``Memory.others`` tells beforehand and copies the bytes; owners from 2 on are Python objects of the
Machine, reached by stopping (migrate/call.py, STOP_CALLBACK).
"""

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.frames import copy_pages
from offload.mm.memmap import NO_PFN, PG_locked, PG_movable_ops, PG_movable_ops_isolated, unpack
from offload.mm.node import alloc_pages_node, folio_put

__all__ = ("TOLD_OWNER", "alloc_movable_ops_pages", "free_movable_ops_page", "isolate_movable_ops_page",
           "putback_movable_ops_page", "hand_over_movable_ops_page", "copy_movable_ops_page")

TOLD_OWNER = 1


@jit_entry
def alloc_movable_ops_pages(mem_table, nid, order, owner, pfns):
    """Allocate pages of ``order`` for an owner, one for each element of ``pfns``; returns how many there was room for."""
    mem = unpack(mem_table)
    for i in range(len(pfns)):
        pfns[i] = alloc_pages_node(mem, nid, order)
        if pfns[i] == NO_PFN:
            return i
        mem.folios[pfns[i]].page_flags |= PG_movable_ops
        mem.folios[pfns[i]].private = owner
    return len(pfns)


@jit_entry
def free_movable_ops_page(mem_table, pfn):
    """The owner lets go of a page; it is freed unless somebody has isolated it."""
    mem = unpack(mem_table)
    mem.folios[pfn].private = 0
    folio_put(mem, pfn)


@jit
def isolate_movable_ops_page(mem, pfn):
    """Mark the page isolated and take a reference. False if it is locked or isolated already.

    The owner's isolate_page() is asked before, by the Machine.
    """
    folio = mem.folios[pfn]
    if folio.page_flags & (PG_locked | PG_movable_ops_isolated):
        return False
    folio.page_flags |= PG_movable_ops_isolated
    folio.refcount += 1
    return True


@jit
def putback_movable_ops_page(mem, pfn):
    """Clear the mark and drop the isolation reference, which frees a page whose owner has let go of it."""
    mem.folios[pfn].page_flags &= ~PG_movable_ops_isolated
    folio_put(mem, pfn)


@jit
def copy_movable_ops_page(mem, dst, src):
    """What the owner with told outcomes does on success."""
    copy_pages(mem, dst, src, np.int64(1) << mem.folios[src].order)


@jit
def hand_over_movable_ops_page(mem, dst, src):
    """After a successful callback: the owner holds ``dst`` instead of ``src``, which is not isolated any more."""
    old, new = mem.folios[src], mem.folios[dst]
    old.page_flags &= ~PG_movable_ops_isolated
    new.page_flags |= PG_movable_ops
    if old.private:
        new.private = old.private
        new.refcount += 1
        old.private = 0
        old.refcount -= 1
