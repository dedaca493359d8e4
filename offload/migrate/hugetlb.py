"""The hugetlb folios of a list, before anything else on it: a loop of their own, one folio at a time.

Stands for migrate_hugetlbs(), unmap_and_move_hugetlb_folio() and what that calls, hugetlbfs_migrate_folio() and
alloc_hugetlb_folio_nodemask() included (mm/migrate.c, fs/hugetlbfs/inode.c, mm/hugetlb.c; v7.3, and where the rule sets differ mm-next). Leaves out i_mmap_rwsem
and hugetlb vma locks that cannot be had.

The rules, for one attempt at a folio:

    =================  =====================================================================================
    outcome            where the folio goes
    =================  =====================================================================================
    0                  done; the source is given back, which frees it
    -EAGAIN            restored, stays on the list; next pass, at the end given up by the batch cutting loop
    -ENOMEM            stays on the list; the call ends at once, nothing else on the list is tried
    other              restored, to ret
    =================  =====================================================================================

There are 10 passes; from the fourth on, and in MIGRATE_SYNC only, an attempt sleeps on the folio's lock. Nothing is batched:
the TLB is flushed at each entry, the hatch is not asked, writeback is not waited for. No outcome counts in the THP counters
or in NR_ISOLATED_*.
"""

import numpy as np

from offload.intrinsics import clock_ns, ticks
from offload.jit import jit, jit_entry, jit_once
from offload.migrate.batch import end_phase
from offload.migrate.call import (
    DONE, L_FROM, L_RET, STEP_COPIED, STEP_MOVE, STEP_MOVED, STEP_UNDO, STEP_UNMAP, STEP_UNMAPPED, STOP_FRAME_LOG, STOP_STEP,
    list_add_tail,
    step_after, step_before, unpack_call,
)
from offload.migrate.move import ask_for_copy, folio_migrate_flags
from offload.migrate.unmap import get_anon_vma, migrate_folio_undo_dst, put_anon_vma, should_fail_alloc
from offload.mm.frames import folio_mc_copy, frame_address, frame_log_is_full
from offload.mm.hugetlb import (
    HPAGE_NR, alloc_migrate_hugetlb_folio, dequeue_hugetlb_folio_nodemask, folio_putback_hugetlb, hugetlb_fill_slots,
    move_hugetlb_state, remove_hugetlb_migration_ptes, try_to_migrate_hugetlb,
)
from offload.mm.memmap import (
    FRAMES_FAR, NO_PFN, PG_hugetlb, PG_hugetlb_subpool, PG_hugetlb_unsupported, PG_hwpoison, folio_expected_ref_count, folio_test_anon, folio_trylock,
    folio_unlock, unpack,
)
from offload.mm.mempolicy import interleave_nid
from offload.mm.node import folio_put
from offload.mm.others import (
    others_after_failed_move, others_at_batch_copy, others_before_move, others_refuse_alloc, wait_for_lock,
)
from offload.units import (
    EAGAIN, EBUSY, EHWPOISON, EINVAL, ENOMEM, HPAGE_PMD_ORDER, MIGRATE_SYNC, MR_MEMORY_FAILURE, MR_MEMORY_HOTPLUG, MR_MEMPOLICY_MBIND, MR_SYSCALL,
    NR_MAX_MIGRATE_PAGES_RETRY, NUMA_NO_NODE, PAGE_SHIFT, RULES_MM_NEXT,
)

__all__ = ("HUGETLB_FIRST", "migrate_hugetlbs")

# Whether the list has hugetlb folios that are to be migrated, or that have been; in ``call.state.hugetlb``, 0 if it has none.
HUGETLB_FIRST, HUGETLB_THROUGH = 1, 2
# Where the folio in hand stands, in ``call.state.hugetlb_at``.
HUGETLB_BEGIN = 0           # nothing done yet
HUGETLB_UNMAPPED = 1        # unmapped, locked; its destination is in ``dst``
HUGETLB_COPY = 2            # about to check references and copy
HUGETLB_REPLACE = 3         # copied; about to replace the mapping
HUGETLB_UNDO = 4            # failed with ``batch_rc``; about to be restored
HUGETLB_COPIED = 5          # references checked; Python has been asked to copy; its answer is there


@jit_entry
def migrate_hugetlbs(mem_table, call_table):
    """Migrate the hugetlb folios on L_FROM. 0 when through (also if it is called again), or STOP_STEP.

    ``total`` is then -ENOMEM, or the number of them that were not migrated: those for which there is no hope are on L_RET,
    the others still on L_FROM.
    """
    mem = unpack(mem_table)
    call = unpack_call(call_table)
    c = call.state[0]
    if c.hugetlb != HUGETLB_FIRST:
        return DONE
    frm = call.lists[L_FROM]
    while c.in_pass or (c.pass_ == 0 or c.retry) and c.pass_ < NR_MAX_MIGRATE_PAGES_RETRY:
        if c.in_pass == 0:
            c.in_pass = 1
            c.retry = c.retry_pages = 0
            c.i = c.kept = 0
        while c.i < frm.nr:
            src = call.pfns[frm.first + c.i]
            keep = True
            c.moved_dst = 0
            if mem.folios[src].page_flags & PG_hugetlb and c.saved == 0 and (c.interrupted == 0 or c.hugetlb_at):
                rc = unmap_and_move_hugetlb(mem, call, src)
                if rc > 0:
                    return rc
                keep = count_hugetlb(call, rc)
            c.i += 1
            if keep:
                call.pfns[frm.first + c.kept] = src
                c.kept += 1
            if c.moved_dst and step_after(call, STEP_MOVED, c.moved_dst):
                return STOP_STEP
        frm.nr = c.kept
        c.in_pass = 0
        c.pass_ += 1
        if c.saved or c.interrupted:
            break
    c.total = c.saved if c.saved else c.failed + c.retry
    if c.saved == 0:
        c.nr_failed_pages += c.retry_pages
    c.hugetlb = HUGETLB_THROUGH
    return DONE


@jit
def count_hugetlb(call, rc):
    """Count the outcome of an attempt. Returns whether the folio stays on the list."""
    c = call.state[0]
    if rc == 0:
        c.nr_succeeded += HPAGE_NR
        return False
    if rc == -EAGAIN:
        c.retry += 1
        c.retry_pages += HPAGE_NR
        return True
    if rc == -ENOMEM:
        c.saved = -ENOMEM
        c.nr_failed_pages += HPAGE_NR + c.retry_pages
        return True
    c.failed += 1
    c.nr_failed_pages += HPAGE_NR
    return False


@jit_once
def unmap_and_move_hugetlb(mem, call, src):
    """One attempt at one folio: 0, -EAGAIN, -ENOMEM, another -errno (then it is on ret), or STOP_STEP.

    After a failure it is mapped and unlocked as before, and no destination is left. After a move ``moved_dst`` is its
    destination; a folio that only the list still held is freed instead, which is success too.

    Kernel: unmap_and_move_hugetlb_folio(), unmap_and_move_huge_page() before it was renamed.
    """
    c = call.state[0]
    folio = mem.folios[src]
    if c.hugetlb_at == HUGETLB_BEGIN:
        if folio.page_flags & PG_hugetlb_unsupported:
            list_add_tail(call, L_RET, src)
            return np.int64(-EINVAL)
        if frame_log_is_full(mem):
            return np.int64(STOP_FRAME_LOG)
        if step_before(call, STEP_UNMAP, src):
            return np.int64(STOP_STEP)
        if folio.refcount == 1:                     # freed under us
            folio_putback_hugetlb(mem, src)
            return np.int64(0)
        c.phase_started = clock_ns()
        rc = hugetlb_unmap(mem, call, src)
        c.unmap_ns += end_phase(call)
        if rc:
            return rc
        c.hugetlb_at = HUGETLB_UNMAPPED
        if step_after(call, STEP_UNMAPPED, src):
            return np.int64(STOP_STEP)
    if c.hugetlb_at != HUGETLB_UNDO:
        rc = hugetlb_move(mem, call, c.dst, src)
        if rc > 0:
            return rc
        if rc == -EAGAIN and folio.others:
            others_after_failed_move(mem, src)
        c.batch_rc = rc
        c.hugetlb_at = HUGETLB_UNDO
    if c.batch_rc and step_before(call, STEP_UNDO, src):
        return np.int64(STOP_STEP)
    c.hugetlb_at = HUGETLB_BEGIN
    hugetlb_finish(mem, call, c.dst, src, c.batch_rc)
    c.move_ns += end_phase(call)
    return c.batch_rc


@jit
def hugetlb_unmap(mem, call, src):
    """Allocate and lock a destination, lock ``src`` and replace its entries. 0, or -errno with nothing changed.

    -EAGAIN: locked by somebody, or it may be pinned; -ENOMEM; -EBUSY: it has a subpool and no mapping, as if on its way to be
    freed; in mm-next -EHWPOISON: bad memory. Of the last two ``src`` is on ret.
    """
    c = call.state[0]
    folio = mem.folios[src]
    dst = alloc_hugetlb_target(mem, call, src)
    if dst == NO_PFN:
        return np.int64(-ENOMEM)
    if not folio_trylock(mem, src):
        if c.pass_ <= 2 or c.mode != MIGRATE_SYNC:
            migrate_folio_undo_dst(mem, call, dst, False)
            return np.int64(-EAGAIN)
        if not wait_for_lock(mem, src):
            c.hang = src
            migrate_folio_undo_dst(mem, call, dst, False)
            return np.int64(-EAGAIN)
    if folio.page_flags & PG_hugetlb_subpool and folio.mapping <= 0:
        folio_unlock(mem, src)
        list_add_tail(call, L_RET, src)
        migrate_folio_undo_dst(mem, call, dst, False)
        return np.int64(-EBUSY)
    if folio.page_flags & PG_hwpoison and mem.sys[0].rule_set >= RULES_MM_NEXT:
        folio_unlock(mem, src)
        list_add_tail(call, L_RET, src)
        migrate_folio_undo_dst(mem, call, dst, False)
        return np.int64(-EHWPOISON)
    c.anon_vma = np.int64(0)
    if folio.mapping < 0 and folio.mapcount:
        c.anon_vma = get_anon_vma(mem, src)
    folio_trylock(mem, dst)                         # nobody knows it yet
    c.dst = dst
    c.since = ticks()
    c.old_page_state = folio.mapcount != 0          # was mapped
    if folio.mapcount:
        try_to_migrate_hugetlb(mem, src)
    if folio.mapcount:
        hugetlb_finish(mem, call, dst, src, np.int64(-EAGAIN))
        return np.int64(-EAGAIN)
    if folio.others:
        others_at_batch_copy(mem, src)              # there is no batch copy, and the flush is over
    return np.int64(0)


@jit
def hugetlb_move(mem, call, dst, src):
    """Contents and state of an unmapped ``src`` to ``dst``, both locked. 0, -EAGAIN, -EHWPOISON, -EIO, or a STOP_* number.

    Kernel: move_to_new_folio() down to migrate_folio() (private folios) or hugetlbfs_migrate_folio() (files).
    """
    c = call.state[0]
    if c.hugetlb_at == HUGETLB_UNMAPPED:
        if mem.folios[src].others:
            others_before_move(mem, src)
        if step_before(call, STEP_MOVE, src):
            return np.int64(STOP_STEP)
        if mem.folios[src].page_flags & PG_hwpoison and mem.sys[0].rule_set >= RULES_MM_NEXT:   # found bad meanwhile
            return np.int64(-EHWPOISON)
        c.hugetlb_at = HUGETLB_COPY
    expected = folio_expected_ref_count(mem, src) + 1
    if c.hugetlb_at == HUGETLB_COPY:
        if mem.folios[src].refcount != expected:
            return np.int64(-EAGAIN)
        if mem.sys[0].frames_kind == FRAMES_FAR:
            c.hugetlb_at = HUGETLB_COPIED
            return ask_for_copy(mem, call, dst, src)
        started = clock_ns() if c.time_copies else np.int64(0)
        rc = folio_mc_copy(mem, dst, src)
        if rc:
            return np.int64(rc)
        if c.time_copies:
            c.move_copy_ns += clock_ns() - started
        c.copied_folios += 1
        if frame_address(mem, dst):
            c.copied_bytes += np.int64(HPAGE_NR) << PAGE_SHIFT
        c.hugetlb_at = HUGETLB_REPLACE
    elif c.hugetlb_at == HUGETLB_COPIED:
        if c.copy_rc:
            return c.copy_rc
        c.hugetlb_at = HUGETLB_REPLACE
    if step_before(call, STEP_COPIED, src):
        return np.int64(STOP_STEP)
    return hugetlb_replace(mem, dst, src, expected)


@jit
def hugetlb_replace(mem, dst, src, expected):
    """Let ``dst`` take the place of ``src``: index, mapping, page cache, subpool, flags; no statistics.

    0, or -EAGAIN for a file's folio to which a reference has appeared; a private one is not frozen.
    """
    old, new = mem.folios[src], mem.folios[dst]
    if old.mapping > 0 and old.refcount != expected:
        return np.int64(-EAGAIN)
    new.index = old.index
    new.mapping = old.mapping
    if old.mapping > 0:
        new.refcount += np.int32(HPAGE_NR)
        hugetlb_fill_slots(mem, dst)
        old.refcount = expected - HPAGE_NR
        new.page_flags |= old.page_flags & PG_hugetlb_subpool
        old.page_flags &= ~PG_hugetlb_subpool
    folio_migrate_flags(mem, dst, src)
    if not folio_test_anon(mem, src):
        old.mapping = 0
    return np.int64(0)


@jit
def hugetlb_finish(mem, call, dst, src, rc):
    """The end of an attempt, both locked: entries back (to ``dst`` if ``rc`` is 0), unlock, give one of the two back.

    A ``src`` that failed for good goes to ret; one that failed with -EAGAIN stays where it is.
    """
    c = call.state[0]
    if c.old_page_state:
        remove_hugetlb_migration_ptes(mem, src, src if rc else dst)
        if rc == 0:
            call.blocked[c.nr_blocked] = ticks() - c.since
            c.nr_blocked += 1
    put_anon_vma(mem, c.anon_vma)
    if rc:
        folio_unlock(mem, src)
        if rc != -EAGAIN:
            list_add_tail(call, L_RET, src)
        migrate_folio_undo_dst(mem, call, dst, True)
        return
    folio_unlock(mem, dst)
    move_hugetlb_state(mem, src, dst)
    folio_unlock(mem, src)
    folio_putback_hugetlb(mem, src)
    folio_put(mem, dst)                             # the allocation's reference
    c.moved_dst = dst
    c.moved_with_copy += 1
    c.moved_bytes += np.int64(HPAGE_NR) << PAGE_SHIFT


# --- the destination (alloc_migration_target(), alloc_hugetlb_folio_nodemask()) -------------------------------

@jit
def htlb_allow_alloc_fallback(reason):
    """Whether a folio that no pool has may come from another node than the one asked for, and so change two pools."""
    return reason == MR_MEMORY_HOTPLUG or reason == MR_MEMORY_FAILURE or reason == MR_SYSCALL or reason == MR_MEMPOLICY_MBIND


@jit
def alloc_hugetlb_target(mem, call, src):
    """A destination for ``src``: a free folio of a pool of the nodes that the call allows, else a temporary one. Or NO_PFN.

    A call that names one node and no mask means that node only (__GFP_THISNODE). What a policy would try second
    (``nmask_next``) is not tried for hugetlb.
    """
    c = call.state[0]
    c.targets_allocated += 1
    if mem.folios[src].others and others_refuse_alloc(mem, src):
        return np.int64(NO_PFN)
    nid = c.target
    if c.interleave:
        nid = interleave_nid(mem, c.interleave, mem.folios[src].index - c.ilx >> HPAGE_PMD_ORDER)
    elif nid == NUMA_NO_NODE:
        nid = np.int64(mem.folios[src].nid)
    this_node = np.int64(1) << nid
    nmask = c.nmask if c.nmask else this_node
    dst = dequeue_hugetlb_folio_nodemask(mem, nid, nmask)
    if dst != NO_PFN:
        return dst
    if mem.sys[0].alloc_fail_times and should_fail_alloc(mem, np.int64(HPAGE_PMD_ORDER)):
        return np.int64(NO_PFN)
    return alloc_migrate_hugetlb_folio(mem, nid, nmask if htlb_allow_alloc_fallback(c.reason) else nmask & this_node)
