"""Phase 2 for one folio: contents (unless they are copied already), mapping, flags, page-table entries.

Stands for migrate_folio_move(), move_to_new_folio(), the generic callbacks down to __migrate_folio(),
__folio_migrate_mapping() and folio_migrate_flags() of mm/migrate.c (v7.3), with the mark of RFC v6 consumed at the
head of __migrate_folio(). Leaves out buffer heads, the fallback for file systems without a callback, movable_ops
owners, swap cache, KSM, memory cgroups and page_owner.

A function here may return a STOP_* number (positive): an event is wanted, and the same call made again goes on
after it. ``move_at`` says from where.
"""

import numpy as np

from offload.intrinsics import clock_ns, ticks
from offload.jit import jit_inline, jit_once
from offload.migrate.call import STEP_COPIED, STOP_STEP, step_before
from offload.migrate.state import (
    FOLIO_WAS_MAPPED, FOLIO_WAS_MLOCKED, folio_take_content_copied, migrate_info_extract, migrate_info_record,
)
from offload.migrate.unmap import (
    migrate_folio_done, migrate_folio_undo_dst, migrate_folio_undo_src, put_anon_vma,
)
from offload.mm.address_space import folio_migrate_slots
from offload.mm.frames import folio_mc_copy, frame_address
from offload.mm.memmap import (
    AOPS_FILEMAP, MAPPING_SHMEM, PG_active, PG_checked, PG_deferred_list, PG_dirty, PG_idle, PG_large_rmappable,
    PG_mappedtodisk, PG_partially_mapped, PG_private, PG_readahead, PG_referenced, PG_swapbacked, PG_swapcache,
    PG_unevictable, PG_uptodate, PG_workingset, PG_young, folio_expected_ref_count, folio_test_anon, folio_unlock,
)
from offload.mm.node import (
    deferred_split_folio, folio_add_lru, folio_put, folio_unqueue_deferred_split, lru_add_drain,
)
from offload.mm.pagetable import remove_migration_ptes
from offload.units import EAGAIN, PAGE_SIZE

__all__ = ("migrate_folio_move", "move_to_new_folio", "folio_migrate_mapping", "folio_migrate_flags")

# Where a move stands, in ``call.state.move_at``.
MOVE_BEGIN = 0              # nothing done yet
MOVE_CONTENTS = 1           # dst's old states are extracted; about to check references and copy
MOVE_REPLACE = 2            # checked and copied; about to replace the mapping

TRANSFERRED = (PG_referenced | PG_uptodate | PG_workingset | PG_checked | PG_mappedtodisk | PG_dirty | PG_young
               | PG_idle | PG_readahead)
"""Flags that dst gets if src has them (PG_dirty only reaches here for folios in no cache)."""


@jit_inline
def folio_ref_freeze(mem, pfn, expected):
    """Whether exactly ``expected`` references are held: the atomic exchange with 0 of the kernel.

    Nothing else runs before the unfreeze, so the count itself can stay.
    """
    return mem.folios[pfn].refcount == expected


@jit_once
def folio_migrate_mapping(mem, dst, src, expected):
    """Replace ``src`` by ``dst`` in its mapping. 0, or -EAGAIN (a reference appeared; nothing is changed).

    ``expected`` are the references including the caller's. Past the freeze there is no failure.
    Kernel: __folio_migrate_mapping().
    """
    old, new = mem.folios[src], mem.folios[dst]
    if old.mapping <= 0:                            # anon, not in the swap cache: no index to fix
        if old.order and old.page_flags & PG_large_rmappable:
            if not folio_ref_freeze(mem, src, expected):
                return -EAGAIN
            folio_unqueue_deferred_split(mem, src)
        new.index = old.index
        new.mapping = old.mapping
        new.page_flags |= old.page_flags & PG_swapbacked
        return 0

    nr_pages = np.int64(1) << old.order
    if not folio_ref_freeze(mem, src, expected):
        return -EAGAIN
    folio_unqueue_deferred_split(mem, src)
    new.index = old.index
    new.mapping = old.mapping
    new.refcount += nr_pages
    new.page_flags |= old.page_flags & (PG_swapbacked | PG_dirty)
    dirty = old.page_flags & PG_dirty
    old.page_flags &= ~PG_dirty
    folio_migrate_slots(mem, dst, src)
    old.refcount = expected - nr_pages
    if old.nid != new.nid:                          # one zone a node: another zone is another node
        from_node, to_node = mem.nodes[old.nid], mem.nodes[new.nid]
        from_node.nr_file_pages -= nr_pages
        to_node.nr_file_pages += nr_pages
        if mem.mappings[old.mapping].kind == MAPPING_SHMEM:
            from_node.nr_shmem -= nr_pages
            to_node.nr_shmem += nr_pages
        elif dirty:
            from_node.nr_file_dirty -= nr_pages
            to_node.nr_file_dirty += nr_pages
    return 0


@jit_inline
def folio_migrate_flags(mem, dst, src):
    """Give ``dst`` what ``src`` was. Not transferred: locked, lru, mlocked (the reverse map rebuilds it).

    Kernel: folio_migrate_flags().
    """
    old, new = mem.folios[src], mem.folios[dst]
    new.page_flags |= old.page_flags & TRANSFERRED
    if old.page_flags & PG_active:
        old.page_flags &= ~PG_active
        new.page_flags |= PG_active
    elif old.page_flags & PG_unevictable:
        old.page_flags &= ~PG_unevictable
        new.page_flags |= PG_unevictable
    new.cpupid = old.cpupid
    old.cpupid = -1
    old.page_flags &= ~(PG_swapcache | PG_private)
    old.private = 0


@jit_once
def __migrate_folio(mem, call, dst, src, move_private):
    """Contents and state of ``src`` to ``dst``: both locked, ``src`` unmapped.

    0, -EAGAIN (an unexplained reference; nothing is changed but that the mark of ``dst`` is gone, so that a retry
    copies afresh), -EHWPOISON (``src`` cannot be read), or a STOP_* number.

    Kernel: __migrate_folio(), with the mark of RFC v6 2/5.
    """
    c = call.state[0]
    expected = folio_expected_ref_count(mem, src) + 1
    if c.move_at == MOVE_CONTENTS:
        already_copied = folio_take_content_copied(mem, dst)
        if mem.folios[src].refcount != expected:
            return -EAGAIN
        if not already_copied:
            started = clock_ns() if c.time_copies else np.int64(0)
            rc = folio_mc_copy(mem, dst, src)
            if rc:
                return rc
            if c.time_copies:
                c.move_copy_ns += clock_ns() - started
            c.copied_folios += 1
            if frame_address(mem, dst):
                c.copied_bytes += np.int64(PAGE_SIZE) << mem.folios[src].order
        c.move_at = MOVE_REPLACE
    if step_before(call, STEP_COPIED, src):
        return STOP_STEP

    rc = folio_migrate_mapping(mem, dst, src, expected)
    if rc:
        return rc
    if move_private and mem.folios[src].page_flags & PG_private:
        mem.folios[dst].private = mem.folios[src].private
        mem.folios[dst].page_flags |= PG_private
        mem.folios[dst].refcount += 1
        mem.folios[src].refcount -= 1
    folio_migrate_flags(mem, dst, src)
    return 0


@jit_once
def move_to_new_folio(mem, call, dst, src):
    """Move through the mapping's callback. As __migrate_folio(); after success a page-cache src has no mapping.

    migrate_folio() and filemap_migrate_folio() differ in whether private data goes along.
    """
    mapping = np.int64(mem.folios[src].mapping)
    filemap = mapping > 0 and mem.mappings[mapping].aops == AOPS_FILEMAP
    rc = __migrate_folio(mem, call, dst, src, filemap)
    if rc == 0 and not folio_test_anon(mem, src):
        mem.folios[src].mapping = 0
    return rc


@jit_once
def migrate_folio_move(mem, call, src, dst, since):
    """Finish the migration of an unmapped ``src`` to ``dst``, both locked.

    Returns 0 (mapped at ``dst``, unlocked, ``src`` freed), -EAGAIN (both stay locked and ``src`` unmapped, for the
    next pass), any other errno (undone: ``src`` is mapped as before and on ret), or a STOP_* number.
    ``since`` is when it lost its first mapping, 0 if it had none; the blocked time is recorded from it.

    Kernel: migrate_folio_move(). dst is on the LRU before entries point to it, and is unlocked before src.
    """
    c = call.state[0]
    if c.move_at == MOVE_BEGIN:
        c.old_page_state, c.anon_vma = migrate_info_extract(mem, dst)
        c.was_queued = mem.folios[src].order > 1 and mem.folios[src].page_flags & PG_deferred_list != 0
        c.was_partial = mem.folios[src].page_flags & PG_partially_mapped != 0
        c.move_at = MOVE_CONTENTS
    rc = move_to_new_folio(mem, call, dst, src)
    if rc > 0:
        return rc
    c.move_at = MOVE_BEGIN

    if rc == 0:
        if c.was_queued:
            deferred_split_folio(mem, dst, c.was_partial != 0)
        folio_add_lru(mem, dst)
        if c.old_page_state & FOLIO_WAS_MLOCKED:
            lru_add_drain(mem)
        if c.old_page_state & FOLIO_WAS_MAPPED:
            remove_migration_ptes(mem, src, dst)
            call.blocked[c.nr_blocked] = ticks() - since
            c.nr_blocked += 1
        folio_unlock(mem, dst)
        folio_put(mem, dst)                         # the allocation's reference
        put_anon_vma(mem, c.anon_vma)
        folio_unlock(mem, src)
        migrate_folio_done(mem, src, c.reason)
        return 0

    if rc == -EAGAIN:
        migrate_info_record(mem, dst, c.old_page_state, c.anon_vma)
        return rc
    migrate_folio_undo_src(mem, call, src, c.old_page_state & FOLIO_WAS_MAPPED, c.anon_vma, True, c.batch_ret)
    migrate_folio_undo_dst(mem, call, dst, True)
    return rc
