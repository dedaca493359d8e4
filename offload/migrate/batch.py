"""A batch: unmap all of it, flush once, copy, move, undo the rest. The rules of who goes where.

Stands for migrate_pages_batch() and migrate_pages_sync() of mm/migrate.c (v7.3), with the batch copy of RFC v4 to v6
between the flush and the move.

The rules, for one attempt at a folio:

    ==========  ==============================================  ===========================================
    outcome     unmap                                           move
    ==========  ==============================================  ===========================================
    0           to the pairs (batch list or single list)        done, source freed
    -EAGAIN     stays on its list; next pass, then to ret       stays paired; next pass, then undone, to ret
    -ENOMEM     a large folio is split and its pieces go on;    -
                else the unmap phase ends, what is unmapped
                is still moved, the rest is untried
    other       to ret                                          undone, to ret
    ==========  ==============================================  ===========================================

``retry*`` count the last pass only. While one folio of a batch is tried again, the others stay locked and unmapped.
"""

import numpy as np

from offload.intrinsics import clock_ns, prefetch_record
from offload.jit import jit, jit_inline, jit_once
from offload.migrate.batch_copy import batch_copy_needs_migrator, mark_copied_folios
from offload.migrate.call import (
    DONE, L_BACK, L_BATCH, L_FROM, L_ONE, L_RET, L_SPLIT, STEP_BATCH_COPIED, STEP_FLUSH, STEP_FLUSHED, STEP_MOVE,
    STEP_MOVE_FAILED, STEP_MOVED, STEP_UNDO, STEP_UNMAP, STEP_UNMAPPED, STOP_FRAME_LOG, STOP_OFFLOAD_COPY, STOP_STEP, list_add_tail,
    move_list, step_after, step_before,
)
from offload.migrate.move import migrate_folio_move
from offload.migrate.split import try_split_folio
from offload.migrate.state import FOLIO_WAS_MAPPED, folio_batch_eligible, migrate_info_extract, wants_offload
from offload.migrate.unmap import (
    migrate_folio_done, migrate_folio_undo_dst, migrate_folio_undo_src, migrate_folio_unmap,
)
from offload.mm.frames import frame_log_is_full, prefetch_frame
from offload.mm.memmap import (
    PG_active, PG_deferred_list, PG_hugetlb, PG_movable_ops, PG_partially_mapped, PG_unevictable,
)
from offload.mm.others import others_after_failed_move, others_at_batch_copy, others_before_move
from offload.mm.pagetable import prefetch_entry
from offload.units import (
    EAGAIN, ENOMEM, HPAGE_PMD_ORDER, MIGRATE_ASYNC, MR_LONGTERM_PIN, MR_NUMA_MISPLACED, NR_MAX_MIGRATE_ASYNC_RETRY,
    NR_MAX_MIGRATE_SYNC_RETRY, PAGE_SHIFT, RULES_6_12,
)

__all__ = ("batch_begin", "migrate_pages_batch", "sync_begin", "sync_next")

# Where a batch stands, in ``call.state.batch_at``.
BATCH_UNMAP, BATCH_FLUSH, BATCH_COPY, BATCH_COPIED, BATCH_MOVE, BATCH_UNDO, BATCH_DONE = range(7)
# Which stage of migrate_pages_sync() a batch is, in ``call.state.sync_at``.
SYNC_ASYNC_STAGE, SYNC_FOLIO = range(2)


AHEAD = 24                          # folios: how far the page-table entries are asked for before they are unmapped


@jit
def batch_begin(mem, call, mode, from_list, ret_list, split_list, passes):
    """Set up migrate_pages_batch(): the kernel's argument list. ``split_list`` -1: pieces are not split again."""
    c = call.state[0]
    c.batch_at = BATCH_UNMAP
    c.batch_mode = mode
    c.batch_from, c.batch_ret, c.batch_split = from_list, ret_list, split_list
    c.passes = passes
    c.pass_ = c.in_pass = 0
    c.retry = 1
    c.thp_retry = c.retry_pages = c.failed = c.saved = 0
    c.nr_batch = c.nr_single = 0
    c.protocol = mem.sys[0].protocol
    c.offload = wants_offload(mem, c.reason)
    c.nr_batches += 1
    c.phase_started = clock_ns()


@jit_inline
def end_phase(call):
    """Nanoseconds since the last phase ended; the next begins."""
    c = call.state[0]
    now = clock_ns()
    spent = now - c.phase_started
    c.phase_started = now
    return spent


@jit_inline
def is_thp(mem, pfn):
    """Counted in the THP counters: big enough for a PMD, and not hugetlb."""
    folio = mem.folios[pfn]
    return np.int64(folio.order >= HPAGE_PMD_ORDER and folio.page_flags & PG_hugetlb == 0)


@jit_once
def migrate_pages_batch(mem, call):
    """Migrate the folios of one list. 0 when through, with ``batch_rc`` set, or a STOP_* number.

    ``batch_rc`` is the number of folios that failed (a split folio counts one), or -ENOMEM.
    """
    c = call.state[0]
    while True:
        if c.batch_at == BATCH_UNMAP:
            stop = unmap_phase(mem, call)
            if stop:
                return stop
            c.unmap_ns += end_phase(call)
            if c.saved and c.nr_batch + c.nr_single == 0:
                c.batch_at = BATCH_DONE
            else:
                c.batch_at = BATCH_FLUSH
        elif c.batch_at == BATCH_FLUSH:
            if step_before(call, STEP_FLUSH, 0):
                return STOP_STEP
            c.tlb_flushes += 1                      # try_to_unmap_flush(): from here on nobody can write src
            c.flush_ns += end_phase(call)
            c.batch_at = BATCH_COPY
        elif c.batch_at == BATCH_COPY:
            if step_before(call, STEP_FLUSHED, 0):
                return STOP_STEP
            c.batch_at = BATCH_COPIED
            if batch_copy_needs_migrator(mem, call):
                return STOP_OFFLOAD_COPY
        elif c.batch_at == BATCH_COPIED:
            if c.step_passed == 0:                  # not when taken up after the event below
                mark_copied_folios(mem, call)
                if len(mem.others) > 1:
                    for i in range(c.nr_batch + c.nr_single):
                        others_at_batch_copy(mem, call.pair_src[pair_row(call, i)])
                c.copy_ns += end_phase(call)
            if step_before(call, STEP_BATCH_COPIED, 0):
                return STOP_STEP
            c.batch_at = BATCH_MOVE
            c.pass_ = c.in_pass = 0
            c.retry = 1
        elif c.batch_at == BATCH_MOVE:
            stop = move_phase(mem, call)
            if stop:
                return stop
            c.move_ns += end_phase(call)
            c.batch_at = BATCH_UNDO
            c.i = 0
        elif c.batch_at == BATCH_UNDO:
            stop = undo_phase(mem, call)
            if stop:
                return stop
            c.move_ns += end_phase(call)
            c.batch_at = BATCH_DONE
        else:
            c.batch_rc = c.saved if c.saved else c.failed
            return DONE


@jit_inline
def find_entry(mem, call, src):
    """Ask for the page-table entry of a folio that will soon be unmapped, and note where it stands.

    Unmapping and moving a simple folio (migrate/simple.py) then need not walk to it again. Not where events may change page
    tables meanwhile.
    """
    entry = prefetch_entry(mem, src)
    if call.state[0].stop_mask == 0 and mem.folios[src].order == 0:
        mem.folios[src].migrate_info = entry


@jit
def unmap_phase(mem, call):
    """Phase 1: up to ``passes`` passes of unmapping. 0, or a STOP_* number."""
    c = call.state[0]
    frm = call.lists[c.batch_from]
    while c.in_pass or c.retry and c.pass_ < c.passes:
        if c.in_pass == 0:
            c.in_pass = 1
            c.retry = c.thp_retry = c.retry_pages = 0
            c.i = c.kept = 0
            for i in range(min(AHEAD, frm.nr)):
                find_entry(mem, call, call.pfns[frm.first + i])
        while c.i < frm.nr:
            src = call.pfns[frm.first + c.i]
            if frame_log_is_full(mem):
                return STOP_FRAME_LOG
            if step_before(call, STEP_UNMAP, src):
                return STOP_STEP
            if c.i + AHEAD < frm.nr:
                find_entry(mem, call, call.pfns[frm.first + c.i + AHEAD])
            c.i += 1
            if unmap_one(mem, call, src):           # it stays on the list
                call.pfns[frm.first + c.kept] = src
                c.kept += 1
            elif c.dst and step_after(call, STEP_UNMAPPED, src):
                return STOP_STEP
            if c.saved:                             # -ENOMEM: the rest is untried
                while c.i < frm.nr:
                    call.pfns[frm.first + c.kept] = call.pfns[frm.first + c.i]
                    c.kept += 1
                    c.i += 1
        frm.nr = c.kept
        c.in_pass = 0
        c.pass_ += 1
        if c.saved:
            return DONE
    c.failed += c.retry
    c.nr_thp_failed += c.thp_retry
    c.nr_failed_pages += c.retry_pages
    return DONE


@jit_inline
def count_split(call, thp):
    c = call.state[0]
    c.nr_split += 1
    c.nr_thp_split += thp


@jit_once
def unmap_one(mem, call, src):
    """One attempt at one folio in the unmap phase. Returns whether it stays on its list.

    ``call.state.dst`` is its destination if it was unmapped, else 0; ``saved`` is set when the phase must end.
    """
    c = call.state[0]
    c.dst = c.since = 0
    folio = mem.folios[src]
    nr_pages = np.int64(1) << folio.order
    thp = is_thp(mem, src)
    # (a) mapped in part and queued for splitting: split it now, if that works
    if nr_pages > 2 and folio.page_flags & PG_partially_mapped and folio.page_flags & PG_deferred_list:
        if try_split_folio(mem, call, src) == 0:
            c.failed += 1
            c.nr_thp_failed += thp
            count_split(call, thp)
            return False
    # (b) no THP migration on this architecture
    if thp and mem.sys[0].thp_migration == 0:
        c.failed += 1
        c.nr_thp_failed += 1
        if try_split_folio(mem, call, src) == 0:
            count_split(call, thp)
        else:
            c.nr_failed_pages += nr_pages
            list_add_tail(call, c.batch_ret, src)
        return False
    # (c) only our reference is left: somebody freed it under us (6.12 takes movable_ops pages for such, too)
    if folio.refcount == 1 and (folio.page_flags & PG_movable_ops == 0 or mem.sys[0].rule_set == RULES_6_12):
        folio.page_flags &= ~(PG_active | PG_unevictable)
        migrate_folio_done(mem, src, c.reason)
        c.nr_succeeded += nr_pages
        c.nr_thp_succeeded += thp
        return False
    # (d) the normal way
    rc = migrate_folio_unmap(mem, call, src)
    if rc == 0:
        add_pair(mem, call, src)
        return False
    if rc == -EAGAIN:
        c.retry += 1
        c.thp_retry += thp
        c.retry_pages += nr_pages
        return True
    c.failed += 1
    c.nr_thp_failed += thp
    if rc == -ENOMEM:
        if nr_pages > 1 and c.reason != MR_NUMA_MISPLACED:
            rc = try_split_folio(mem, call, src)
            if rc == 0:
                count_split(call, thp)
                return False
            if c.reason == MR_LONGTERM_PIN and rc == -EAGAIN:
                c.failed -= 1
                c.nr_thp_failed -= thp
                c.retry += 1
                c.thp_retry += thp
                c.retry_pages += nr_pages
                return True
        c.nr_failed_pages += nr_pages + c.retry_pages
        c.nr_thp_failed += c.thp_retry
        c.saved = -ENOMEM
        return True
    c.nr_failed_pages += nr_pages                   # it is on ret already
    return False


@jit_inline
def add_pair(mem, call, src):
    """Append an unmapped folio to the batch list, or to the single list if the batch copy may not have it."""
    c = call.state[0]
    if c.offload and folio_batch_eligible(mem, c.protocol, src):
        row = c.nr_batch
        c.nr_batch += 1
    else:
        row = c.pair_size + c.nr_single
        c.nr_single += 1
    call.pair_src[row] = src
    call.pair_dst[row] = c.dst
    call.pair_order[row] = mem.folios[src].order
    call.pair_since[row] = c.since


@jit_inline
def pair_row(call, i):
    """Row of the i-th pair in the order of moving: the batch list, then the single list."""
    c = call.state[0]
    return i if i < c.nr_batch else c.pair_size + i - c.nr_batch


@jit_inline
def prefetch_pair(mem, call):
    """Ask for what the moves after this one will touch: copying the batch has driven it out of the near caches.

    And for one record of the next batch: in random order they are cache misses, which overlap with the moves here.
    """
    c = call.state[0]
    frm = call.lists[L_FROM]
    if c.i & 7 == 0:
        for at in range(c.from_at + c.i, min(c.from_at + c.i + 8, frm.nr)):
            prefetch_record(mem.folios, call.pfns[frm.first + at])
            prefetch_record(mem.orders, call.pfns[frm.first + at])
    nr = c.nr_batch + c.nr_single
    if c.i + 8 < nr:
        row = pair_row(call, c.i + 8)
        prefetch_record(mem.folios, call.pair_src[row])
        prefetch_record(mem.folios, call.pair_dst[row])
    if c.i + 4 < nr:
        prefetch_record(mem.tables, mem.folios[call.pair_src[pair_row(call, c.i + 4)]].migrate_info)


@jit
def move_phase(mem, call):
    """Phase 2: up to ``passes`` passes over the pairs. 0, or STOP_STEP."""
    c = call.state[0]
    while c.in_pass or c.retry and c.pass_ < c.passes:
        if c.in_pass == 0:
            c.in_pass = 1
            c.retry = c.thp_retry = c.retry_pages = 0
            c.i = 0
        while c.i < c.nr_batch + c.nr_single:
            row = pair_row(call, c.i)
            src = call.pair_src[row]
            if src == 0:
                c.i += 1
                continue
            if c.move_at == 0:
                if mem.folios[src].others:          # here the second time, after an event, it has nothing left to do
                    others_before_move(mem, src)
                if step_before(call, STEP_MOVE, src):
                    return STOP_STEP
            nr_pages = np.int64(1) << mem.folios[src].order
            thp = is_thp(mem, src)
            prefetch_pair(mem, call)
            if c.i >= c.nr_batch and c.i + 1 < c.nr_batch + c.nr_single:
                prefetch_frame(mem, call.pair_src[row + 1])         # it will be copied here
            rc = migrate_folio_move(mem, call, src, call.pair_dst[row], call.pair_since[row])
            if rc > 0:
                return rc
            c.i += 1
            if rc == 0:
                call.pair_src[row] = 0
                c.nr_succeeded += nr_pages
                c.nr_thp_succeeded += thp
                c.moved_bytes += nr_pages << PAGE_SHIFT
                if step_after(call, STEP_MOVED, call.pair_dst[row]):
                    return STOP_STEP
            elif rc == -EAGAIN:
                c.retry += 1
                c.thp_retry += thp
                c.retry_pages += nr_pages
                if mem.folios[src].others:
                    others_after_failed_move(mem, src)
                if step_after(call, STEP_MOVE_FAILED, src):
                    return STOP_STEP
            else:
                if mem.folios[src].others:
                    others_after_failed_move(mem, src)
                call.pair_src[row] = 0
                c.failed += 1
                c.nr_thp_failed += thp
                c.nr_failed_pages += nr_pages
        c.in_pass = 0
        c.pass_ += 1
    c.failed += c.retry
    c.nr_thp_failed += c.thp_retry
    c.nr_failed_pages += c.retry_pages
    return DONE


@jit
def undo_phase(mem, call):
    """Restore the pairs that ended in -EAGAIN (migrate_folios_undo()). 0, or STOP_STEP."""
    c = call.state[0]
    while c.i < c.nr_batch + c.nr_single:
        row = pair_row(call, c.i)
        src = call.pair_src[row]
        if src:
            if step_before(call, STEP_UNDO, src):
                return STOP_STEP
            dst = call.pair_dst[row]
            old_page_state, anon_vma = migrate_info_extract(mem, c.protocol, dst)
            migrate_folio_undo_src(mem, call, src, old_page_state & FOLIO_WAS_MAPPED, anon_vma, True, c.batch_ret)
            migrate_folio_undo_dst(mem, call, dst, True)
            call.pair_src[row] = 0
        c.i += 1
    return DONE


# --- synchronous calls ----------------------------------------------------------------------------------------

@jit
def sync_begin(mem, call):
    """Set up migrate_pages_sync() for the folios on L_BATCH."""
    c = call.state[0]
    c.sync_at = SYNC_ASYNC_STAGE
    c.nr_failed_pages_before, c.nr_thp_failed_before = c.nr_failed_pages, c.nr_thp_failed
    c.nr_thp_split_before, c.nr_split_before = c.nr_thp_split, c.nr_split
    batch_begin(mem, call, MIGRATE_ASYNC, L_BATCH, L_BACK, L_SPLIT, NR_MAX_MIGRATE_ASYNC_RETRY)


@jit
def sync_next(mem, call):
    """What migrate_pages_sync() does after a batch of its: whether it is through, with ``batch_rc``; if not, the next is set up.

    What fails in the first stage is tried again, one by one in the caller's mode, and does not count, except folios that
    were split.
    """
    c = call.state[0]
    batch = call.lists[L_BATCH]
    if c.sync_at == SYNC_ASYNC_STAGE:
        if c.batch_rc < 0:
            move_list(call, L_BACK, L_RET)
            return True
        c.nr_failed_pages = c.nr_failed_pages_before
        c.nr_thp_failed = c.nr_thp_failed_before + c.nr_thp_split - c.nr_thp_split_before
        c.sync_failed = c.nr_split - c.nr_split_before
        move_list(call, L_BACK, L_BATCH)
        c.sync_i = 0
        c.sync_at = SYNC_FOLIO
    else:
        move_list(call, L_ONE, L_RET)
        if c.batch_rc < 0:                          # the folios not tried yet stay on L_BATCH
            for i in range(c.sync_i, batch.nr):
                call.pfns[batch.first + i - c.sync_i] = call.pfns[batch.first + i]
            batch.nr -= c.sync_i
            return True
        c.sync_failed += c.batch_rc
    if c.sync_i == batch.nr:
        batch.nr = 0
        c.batch_rc = c.sync_failed
        return True
    list_add_tail(call, L_ONE, call.pfns[batch.first + c.sync_i])
    c.sync_i += 1
    batch_begin(mem, call, c.mode, L_ONE, L_RET, L_SPLIT, NR_MAX_MIGRATE_SYNC_RETRY)
    return False
