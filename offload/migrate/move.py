"""Phase 2 for one folio: contents (unless they are copied already), mapping, flags, page-table entries.

Stands for migrate_folio_move(), move_to_new_folio(), the generic callbacks down to __migrate_folio(),
__folio_migrate_mapping() and folio_migrate_flags() of mm/migrate.c (v7.3, and where the rule sets differ 6.12 and mm-next),
with the mark of the batch-copy series consumed at the head of __migrate_folio(). Buffer heads are the folio's private data
and a lock (mm/others.py). Leaves out the callbacks of single file systems, memory cgroups and page_owner.

A function here may return a STOP_* number (positive): an event is wanted, or the owner of a movable_ops page; the same
call made again goes on after it. ``move_at`` says from where.
"""

import numpy as np

from offload.intrinsics import clock_ns, ticks
from offload.jit import jit, jit_inline, jit_once
from offload.migrate.call import STEP_COPIED, STOP_CALLBACK, STOP_FRAME_COPY, STOP_FRAME_LOG, STOP_STEP, step_before
from offload.migrate.simple import move_simple_folio
from offload.migrate.state import (
    FOLIO_WAS_MAPPED, FOLIO_WAS_MLOCKED, folio_hand_down_copied, folio_take_content_copied, migrate_info_extract,
    migrate_info_record,
)
from offload.migrate.unmap import (
    migrate_folio_done, migrate_folio_undo_dst, migrate_folio_undo_src, put_anon_vma,
)
from offload.mm.address_space import file_stat_add, fill_slots, filemap_release_folio, folio_clear_dirty, swap_stat_add
from offload.mm.frames import folio_mc_copy, frame_address, frame_log_is_full
from offload.mm.ksm import folio_migrate_ksm
from offload.mm.memmap import (
    AOPS_BUFFER, AOPS_BUFFER_NOREFS, AOPS_FILEMAP, AOPS_MIGRATE_FOLIO, AOPS_NONE, AOPS_SECRETMEM, FRAMES_FAR, MAPPING_SHMEM, PG_active,
    PG_checked, PG_deferred_list, PG_dirty, PG_hwpoison, PG_idle, PG_ksm, PG_large_rmappable, PG_mappedtodisk, PG_movable_ops,
    PG_partially_mapped, PG_private, PG_readahead, PG_referenced, PG_swapbacked, PG_swapcache,
    PG_unevictable, PG_uptodate, PG_workingset, PG_young, folio_expected_ref_count, folio_test_anon, folio_unlock,
)
from offload.mm.movable_ops import TOLD_OWNER, copy_movable_ops_page, hand_over_movable_ops_page
from offload.mm.node import (
    deferred_split_folio, folio_add_lru, folio_put, folio_unqueue_deferred_split, lru_add_drain,
)
from offload.mm.others import NOT_TOLD, told, wait_for_buffers
from offload.mm.pagetable import remove_migration_ptes
from offload.units import (
    EAGAIN, EBUSY, EHWPOISON, EOPNOTSUPP, MIGRATE_ASYNC, MIGRATE_SYNC, MIGRATE_SYNC_LIGHT, PAGE_SIZE, RULES_6_12, RULES_MM_NEXT,
)

__all__ = ("migrate_folio_move", "move_to_new_folio", "folio_migrate_mapping", "folio_migrate_flags")

# Where a move stands, in ``call.state.move_at``.
MOVE_BEGIN = 0              # nothing done yet
MOVE_CONTENTS = 1           # dst's old states are extracted; about to check references and copy
MOVE_REPLACE = 2            # checked and copied; about to replace the mapping
MOVE_CALLBACK = 3           # Python has been asked to move a movable_ops page; its answer is there
MOVE_COPIED = 4             # checked; Python has been asked to copy; its answer is there

TRANSFERRED = (PG_referenced | PG_uptodate | PG_workingset | PG_checked | PG_mappedtodisk | PG_dirty | PG_young
               | PG_idle | PG_readahead | PG_ksm)
"""Flags that dst gets if src has them (PG_dirty only reaches here for folios in no cache; PG_ksm is a bit of the mapping)."""


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
    if old.mapping > 0 or old.page_flags & PG_swapcache:
        return folio_migrate_page_cache(mem, dst, src, expected)
    # anon, not in the swap cache: no index to fix
    if old.order and old.page_flags & PG_large_rmappable:
        if not folio_ref_freeze(mem, src, expected):
            return -EAGAIN
        folio_unqueue_deferred_split(mem, src)
        mem.mthp_nr_anon[old.order] += old.mapping < 0
    new.index = old.index
    new.mapping = old.mapping
    new.page_flags |= old.page_flags & PG_swapbacked
    return 0


@jit
def folio_migrate_page_cache(mem, dst, src, expected):
    """folio_migrate_mapping() of a folio in the page cache or the swap cache, where its slots are to hold ``dst``."""
    old, new = mem.folios[src], mem.folios[dst]
    if old.page_flags & PG_swapcache:
        return folio_migrate_swap_cache(mem, dst, src, expected)
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
    fill_slots(mem, np.int64(old.mapping), np.int64(old.index), nr_pages, dst)
    old.refcount = expected - nr_pages
    if old.nid != new.nid:                          # one zone a node: another zone is another node
        file_stat_add(mem, src, np.int64(old.nid), -nr_pages)
        file_stat_add(mem, dst, np.int64(new.nid), nr_pages)
        if dirty and mem.mappings[old.mapping].kind != MAPPING_SHMEM:
            mem.nodes[old.nid].nr_file_dirty -= nr_pages
            mem.nodes[new.nid].nr_file_dirty += nr_pages
    return 0


@jit_once
def folio_migrate_swap_cache(mem, dst, src, expected):
    """folio_migrate_mapping() of a folio in the swap cache: its slots hold ``dst``, which has its swap entry.

    A shmem folio may be in its file's page cache as well; that follows too.
    """
    old, new = mem.folios[src], mem.folios[dst]
    nr_pages = np.int64(1) << old.order
    if not folio_ref_freeze(mem, src, expected):
        return -EAGAIN
    folio_unqueue_deferred_split(mem, src)
    if old.order and old.mapping < 0:
        mem.mthp_nr_anon[old.order] += 1
    new.index = old.index
    new.mapping = old.mapping
    new.private = old.private
    new.refcount += nr_pages
    new.page_flags |= old.page_flags & (PG_swapbacked | PG_dirty | PG_swapcache)
    old.page_flags &= ~PG_dirty
    fill_slots(mem, mem.sys[0].swap_space, np.int64(old.private), nr_pages, dst)
    old.refcount = expected - nr_pages
    swap_stat_add(mem, np.int64(old.nid), -nr_pages)
    swap_stat_add(mem, np.int64(new.nid), nr_pages)
    if old.mapping > 0:
        new.refcount += nr_pages
        fill_slots(mem, np.int64(old.mapping), np.int64(old.index), nr_pages, dst)
        old.refcount -= nr_pages
        file_stat_add(mem, src, np.int64(old.nid), -nr_pages)
        file_stat_add(mem, dst, np.int64(new.nid), nr_pages)
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
    if mem.sys[0].memory_tiering and (mem.nodes[old.nid].cpus != 0) != (mem.nodes[new.nid].cpus != 0):
        new.cpupid = -1                             # it held the time of a scan, which means nothing in the other tier
    if old.page_flags & PG_ksm:
        folio_migrate_ksm(mem, dst, src)
    old.page_flags &= ~(PG_swapcache | PG_private)
    old.private = 0


@jit_inline
def on_copied_list(call):
    """Whether the folio in hand is on a batch list that counts as copied as a whole (v4, flags, v5)."""
    c = call.state[0]
    return c.batch_copied != 0 and c.i < c.nr_batch


@jit
def ask_for_copy(mem, call, dst, src):
    """Have Python copy a folio to or from bytes that compiled code cannot touch: STOP_FRAME_COPY, or -EHWPOISON.

    Taken up again, the call has ``copy_rc``; what is copied Python has counted.
    """
    if mem.others[mem.folios[src].others].copy_error:
        return np.int64(-EHWPOISON)
    call.state[0].copy_dst, call.state[0].copy_src = dst, src
    return np.int64(STOP_FRAME_COPY)


@jit_once
def __migrate_folio(mem, call, dst, src, move_private):
    """Contents and state of ``src`` to ``dst``: both locked, ``src`` unmapped.

    0, -EAGAIN (an unexplained reference; nothing is changed but that the mark of ``dst`` is gone, so that a retry
    copies afresh in v6), -EHWPOISON (``src`` cannot be read), -EIO (its device, or that of ``dst``, is lost), or a STOP_* number.

    Kernel: __migrate_folio(), with the mark of RFC v6 2/5 or an earlier one (migrate/state.py).
    """
    c = call.state[0]
    expected = folio_expected_ref_count(mem, src) + 1
    if c.move_at == MOVE_CONTENTS:
        already_copied = folio_take_content_copied(mem, c.protocol, dst, on_copied_list(call))
        if mem.folios[src].refcount != expected:
            return -EAGAIN
        if not already_copied and mem.sys[0].frames_kind == FRAMES_FAR:
            c.move_at = MOVE_COPIED
            return ask_for_copy(mem, call, dst, src)
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
    elif c.move_at == MOVE_COPIED:
        if c.copy_rc:
            return c.copy_rc
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


@jit
def fallback_migrate_folio(mem, call, src):
    """For file systems without a callback: 0 if migrate_folio() may go on, else -errno.

    Dirty folios stay (-EBUSY); up to v6.15 a synchronous call writes them out instead. Private data must be released.
    """
    c = call.state[0]
    folio = mem.folios[src]
    if mem.sys[0].rule_set == RULES_6_12:
        if folio.page_flags & PG_dirty:
            return writeout(mem, src) if c.batch_mode == MIGRATE_SYNC else -EBUSY
        if folio.mapcount:                          # written out before, see there
            return -EAGAIN
    elif folio.page_flags & PG_dirty:
        return -EBUSY
    if not filemap_release_folio(mem, src):
        return -EAGAIN if c.batch_mode == MIGRATE_SYNC else -EBUSY
    return 0


@jit
def writeout(mem, src):
    """Write a dirty folio out; it is clean then, and mapped again. -EAGAIN (6.12).

    Being mapped, it cannot move with this destination any more. Writing takes no time here and does not fail.
    """
    folio_clear_dirty(mem, src)
    remove_migration_ptes(mem, src, src)            # clean, too
    return -EAGAIN


@jit
def buffer_lock_folio(mem, call, src, norefs):
    """Lock the buffer heads of a folio. 0, or -EAGAIN: they are locked by others, or used by somebody if ``norefs``.

    Kernel: __buffer_migrate_folio() up to filemap_migrate_folio(), after which they are unlocked. Here nobody can come in
    between, so a lock that is had at all is not noted.
    """
    c = call.state[0]
    folio = mem.folios[src]
    if folio.page_flags & PG_private == 0:          # no buffers
        return 0
    if folio.refcount != folio_expected_ref_count(mem, src) + 1:
        return -EAGAIN
    if mem.others[folio.others].buffers_locked:
        if c.batch_mode == MIGRATE_ASYNC or c.batch_mode == MIGRATE_SYNC_LIGHT and folio.page_flags & PG_uptodate == 0:
            return -EAGAIN
        if not wait_for_buffers(mem, src):
            c.hang = src
            return -EAGAIN
    if norefs and mem.mappings[folio.mapping].busy_buffers:
        return -EAGAIN
    return 0


@jit
def call_migrate_callback(mem, call, src):
    """The part of the mapping's migrate callback that comes before __migrate_folio(): 0 to go on there, or -errno."""
    mapping = mem.mappings[mem.folios[src].mapping]
    if mapping.inaccessible:
        return -EOPNOTSUPP
    if mapping.aops == AOPS_NONE:
        return fallback_migrate_folio(mem, call, src)
    rc = told(mem, mem.others[mem.folios[src].others].callback)
    if rc < 0:
        return rc
    if mapping.aops == AOPS_SECRETMEM:
        return -EBUSY
    if mapping.aops == AOPS_BUFFER or mapping.aops == AOPS_BUFFER_NOREFS:
        return buffer_lock_folio(mem, call, src, mapping.aops == AOPS_BUFFER_NOREFS)
    return 0


@jit_once
def move_to_new_folio(mem, call, dst, src):
    """Move through the mapping's callback. As __migrate_folio(); after success a page-cache src has no mapping.

    Also -EBUSY (dirty, or its private data stays) and -EOPNOTSUPP (inaccessible), or what the callback was told to return.
    All callbacks but migrate_folio() take private data along.
    """
    c = call.state[0]
    folio = mem.folios[src]
    mapping = np.int64(folio.mapping)
    move_private = False
    if c.move_at == MOVE_CONTENTS and on_copied_list(call):
        folio_hand_down_copied(mem, c.protocol, dst)
    if mapping > 0 and folio.page_flags & PG_swapcache == 0:        # the swap cache has migrate_folio()
        space = mem.mappings[mapping]
        if c.move_at == MOVE_CONTENTS and (space.aops > AOPS_FILEMAP or space.inaccessible or folio.others):
            rc = call_migrate_callback(mem, call, src)
            if rc:
                return rc
        move_private = space.aops != AOPS_MIGRATE_FOLIO
    rc = __migrate_folio(mem, call, dst, src, move_private)
    if rc == 0 and not folio_test_anon(mem, src):
        mem.folios[src].mapping = 0
    return rc


@jit
def migrate_movable_ops_page(mem, call, dst, src):
    """Have the owner move its page: 0, whatever -errno the owner says, or a STOP_* number."""
    c = call.state[0]
    if frame_log_is_full(mem):
        return np.int64(STOP_FRAME_LOG)
    if c.move_at == MOVE_CALLBACK:
        rc = c.callback_rc
    elif mem.folios[src].private > TOLD_OWNER:
        c.callback_owner, c.callback_src, c.callback_dst = mem.folios[src].private, src, dst
        c.move_at = MOVE_CALLBACK
        return np.int64(STOP_CALLBACK)
    else:
        rc = told(mem, mem.others[mem.folios[src].others].callback)
        if rc == NOT_TOLD or rc == 0:
            copy_movable_ops_page(mem, dst, src)
            rc = np.int64(0)
    if rc == 0:
        hand_over_movable_ops_page(mem, dst, src)
    return rc


@jit
def migrate_folio_move_rare(mem, call, dst, src):
    """What stands in for move_to_new_folio() for movable_ops pages, and for memory found bad meanwhile (mm-next).

    NOT_TOLD if neither applies, else as move_to_new_folio().
    """
    poisoned = mem.folios[src].page_flags & PG_hwpoison and mem.sys[0].rule_set >= RULES_MM_NEXT
    if poisoned and call.state[0].move_at == MOVE_CONTENTS:
        return np.int64(-EHWPOISON)
    if mem.folios[src].page_flags & PG_movable_ops:
        return migrate_movable_ops_page(mem, call, dst, src)
    return np.int64(NOT_TOLD)


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
        if move_simple_folio(mem, call, src, dst, since):
            return 0
        c.old_page_state, c.anon_vma = migrate_info_extract(mem, c.protocol, dst)
        c.was_queued = mem.folios[src].order > 1 and mem.folios[src].page_flags & PG_deferred_list != 0
        c.was_partial = mem.folios[src].page_flags & PG_partially_mapped != 0
        c.move_at = MOVE_CONTENTS
    rc = np.int64(NOT_TOLD)
    if mem.folios[src].page_flags & (PG_hwpoison | PG_movable_ops):
        rc = migrate_folio_move_rare(mem, call, dst, src)
    if rc == NOT_TOLD:
        rc = np.int64(move_to_new_folio(mem, call, dst, src))
    if rc > 0:
        return rc
    c.move_at = MOVE_BEGIN

    if rc == 0:
        if mem.folios[src].page_flags & PG_movable_ops == 0:
            requeue_last = c.was_queued and mem.sys[0].rule_set == RULES_6_12
            if c.was_queued and not requeue_last:
                deferred_split_folio(mem, dst, c.was_partial != 0)
            folio_add_lru(mem, dst)
            if c.old_page_state & FOLIO_WAS_MLOCKED:
                lru_add_drain(mem)
            if c.old_page_state & FOLIO_WAS_MAPPED:
                remove_migration_ptes(mem, src, dst)
                call.blocked[c.nr_blocked] = ticks() - since
                c.nr_blocked += 1
            if requeue_last:
                deferred_split_folio(mem, dst, c.was_partial != 0)
            if not on_copied_list(call) or call.pair_done[c.i]:     # else taken for copied, and garbage
                c.moved_with_copy += 1
        folio_unlock(mem, dst)
        folio_put(mem, dst)                         # the allocation's reference
        put_anon_vma(mem, c.anon_vma)
        folio_unlock(mem, src)
        migrate_folio_done(mem, src, c.reason)
        return 0

    if rc == -EAGAIN:
        migrate_info_record(mem, c.protocol, dst, c.old_page_state, c.anon_vma)
        return rc
    migrate_folio_undo_src(mem, call, src, c.old_page_state & FOLIO_WAS_MAPPED, c.anon_vma, True, c.batch_ret)
    migrate_folio_undo_dst(mem, call, dst, True)
    return rc
