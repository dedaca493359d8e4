"""Phase 1 for one folio: a locked destination, and migration entries in place of its page-table entries.

Stands for migrate_folio_unmap(), migrate_folio_undo_src(), migrate_folio_undo_dst() and migrate_folio_done() of
mm/migrate.c (v7.3, and where the rule sets differ 6.12 and mm-next).
"""

import numpy as np

from offload.intrinsics import ticks
from offload.jit import jit, jit_inline, jit_once
from offload.migrate.call import list_add_tail
from offload.migrate.simple import unmap_simple_folio
from offload.migrate.state import FOLIO_WAS_MAPPED, FOLIO_WAS_MLOCKED, migrate_info_record
from offload.mm.address_space import filemap_release_folio
from offload.mm.memmap import (
    NO_PFN, PG_hwpoison, PG_ksm, PG_mlocked, PG_movable_ops, PG_private, PG_reserved, PG_uptodate,
    PG_writeback, folio_trylock, folio_unlock,
)
from offload.mm.compaction import compaction_alloc, compaction_free
from offload.mm.mempolicy import alloc_pages_nodemask, interleave_nid
from offload.mm.node import alloc_pages_node, folio_put, node_stat_add_isolated
from offload.mm.others import others_refuse_alloc, wait_for_lock, wait_for_writeback
from offload.mm.pagetable import remove_migration_ptes, try_to_migrate
from offload.units import (
    EAGAIN, EBUSY, EHWPOISON, ENOMEM, MIGRATE_ASYNC, MIGRATE_SYNC, MIGRATE_SYNC_LIGHT, MR_DEMOTION, MR_MEMORY_FAILURE,
    NUMA_NO_NODE, RULES_MM_NEXT,
)

__all__ = ("alloc_migration_target", "migrate_folio_unmap", "migrate_folio_undo_src", "migrate_folio_undo_dst",
           "migrate_folio_done", "get_anon_vma", "put_anon_vma")


@jit_inline
def get_anon_vma(mem, src):
    """Hold the folio's anon_vma, so that the reverse map outlives the unmapping; 0 if it has none."""
    anon_vma = -np.int64(mem.folios[src].mapping)
    mem.anon_vmas[anon_vma].refcount += 1
    return anon_vma


@jit_inline
def put_anon_vma(mem, anon_vma):
    if anon_vma:
        mem.anon_vmas[anon_vma].refcount -= 1


@jit_inline
def alloc_migration_target(mem, call, src):
    """A destination for ``src``, of the same order: on the call's target node, unless it says more (TargetControl).

    NO_PFN if there is no such block, or if a scenario makes this allocation fail. Counted either way.
    """
    c = call.state[0]
    c.targets_allocated += 1
    if mem.folios[src].others and others_refuse_alloc(mem, src):
        return np.int64(NO_PFN)
    if c.target_special:
        return alloc_target_special(mem, call, src)
    return alloc_pages_node(mem, c.target, np.int64(mem.folios[src].order))


@jit
def alloc_target_special(mem, call, src):
    """A destination from one of several nodes, or one that a scenario may make fail.

    Kernel: alloc_migration_target() with a nodemask, alloc_migration_target_by_mpol() (mempolicy.c), and
    should_fail_alloc_page().
    """
    c = call.state[0]
    order = np.int64(mem.folios[src].order)
    if mem.sys[0].alloc_fail_times and should_fail_alloc(mem, order):
        return np.int64(NO_PFN)
    if c.own_free:
        return compaction_alloc(mem, order)
    nid = c.target
    if c.interleave:
        nid = interleave_nid(mem, c.interleave, mem.folios[src].index - c.ilx >> order)
    elif nid == NUMA_NO_NODE:
        nid = np.int64(mem.folios[src].nid)
    if c.nmask == 0:
        return alloc_pages_node(mem, nid, order)
    dst = alloc_pages_nodemask(mem, nid, c.nmask, order)
    if dst == NO_PFN and c.nmask_next:
        dst = alloc_pages_nodemask(mem, nid, c.nmask_next, order)
    return dst


@jit
def should_fail_alloc(mem, order):
    """Whether this target allocation of a system call is one of those that fail; counts it."""
    sys = mem.sys[0]
    if order < sys.alloc_fail_order:
        return False
    if sys.alloc_fail_after:
        sys.alloc_fail_after -= 1
        return False
    if sys.alloc_fail_times > 0:
        sys.alloc_fail_times -= 1
    return True


@jit
def migrate_folio_undo_dst(mem, call, dst, locked):
    """Give a destination back unused; a mark that it carries goes with it."""
    call.state[0].targets_returned += 1
    mem.folios[dst].migrate_info = 0
    if locked:
        folio_unlock(mem, dst)
    if call.state[0].own_free:
        compaction_free(mem, dst)
    else:
        folio_put(mem, dst)


@jit
def migrate_folio_undo_src(mem, call, src, was_mapped, anon_vma, locked, ret):
    """Restore a source: its page-table entries, its lock, and its place at the tail of list ``ret`` (-1: none)."""
    if was_mapped:
        remove_migration_ptes(mem, src, src)
    put_anon_vma(mem, anon_vma)
    if locked:
        folio_unlock(mem, src)
    if ret >= 0:
        list_add_tail(call, ret, src)


@jit_inline
def migrate_folio_done(mem, src, reason):
    """The source of a finished migration: NR_ISOLATED (not for demotion, whose caller does it in bulk) and the
    isolation reference, which frees it. Memory failure keeps the reference, and the frame out of use."""
    if mem.folios[src].page_flags & PG_movable_ops == 0 and reason != MR_DEMOTION:
        node_stat_add_isolated(mem, src, -1)
    if reason != MR_MEMORY_FAILURE:
        folio_put(mem, src)
    else:
        mem.folios[src].migrate_info = 0
        mem.folios[src].page_flags |= PG_reserved   # as page_handle_poison() of the caller does with PG_hwpoison


@jit_once
def migrate_folio_unmap(mem, call, src):
    """Allocate and lock a destination for ``src``, lock ``src`` and replace its page-table entries.

    Returns 0 (both locked, ``src`` unmapped; the destination is in ``call.state.dst``), -EAGAIN (may do next
    time: ``src`` stays where it is), -ENOMEM (no destination; ``src`` untouched), -EBUSY (under writeback; ``src`` is on
    ret) or in mm-next -EHWPOISON (bad memory; likewise). After a failure ``src`` is mapped and unlocked as before and no destination is left.

    Kernel: migrate_folio_unmap(). A lock or writeback that never ends makes the kernel sleep for ever; here the
    attempt fails with -EAGAIN and ``hang`` names the folio.
    """
    if unmap_simple_folio(mem, call, src):
        return 0
    c = call.state[0]
    folio = mem.folios[src]
    if folio.page_flags & PG_hwpoison and mem.sys[0].rule_set >= RULES_MM_NEXT:
        list_add_tail(call, c.batch_ret, src)
        return -EHWPOISON
    dst = alloc_migration_target(mem, call, src)
    if dst == NO_PFN:
        return -ENOMEM
    mem.folios[dst].migrate_info = 0

    rc = -EAGAIN
    locked = dst_locked = False
    old_page_state = 0
    anon_vma = np.int64(0)
    while True:                                     # left by break: the way out on failure
        # 1. the source's lock
        if folio_trylock(mem, src):
            locked = True
        else:
            if c.batch_mode == MIGRATE_ASYNC or c.pf_memalloc:
                break
            if c.batch_mode == MIGRATE_SYNC_LIGHT and folio.page_flags & PG_uptodate == 0:
                break                               # probably under read I/O
            if not wait_for_lock(mem, src):
                c.hang = src
                break
            locked = True
        if folio.page_flags & PG_mlocked:
            old_page_state |= FOLIO_WAS_MLOCKED
        # 2. writeback
        if folio.page_flags & PG_writeback:
            if c.batch_mode != MIGRATE_SYNC:
                rc = -EBUSY
                break
            if not wait_for_writeback(mem, src):
                c.hang = src
                break
        # 3. the anon_vma, while mapcount still vouches for it
        if folio.mapping < 0 and folio.page_flags & PG_ksm == 0 and folio.mapcount:
            anon_vma = get_anon_vma(mem, src)
        # 4. the destination's lock: nobody knows it yet
        dst_locked = folio_trylock(mem, dst)
        # 5. the mappings
        if folio.mapping == 0:
            if folio.page_flags & PG_private:       # truncated: once its buffers go, the next attempt finds it freed
                filemap_release_folio(mem, src)     # try_to_free_buffers()
                break
        elif folio.mapcount:
            old_page_state |= FOLIO_WAS_MAPPED
            c.since = ticks()
            try_to_migrate(mem, src)
        if folio.mapcount == 0:
            migrate_info_record(mem, c.protocol, dst, old_page_state, anon_vma)
            c.dst = dst
            return 0
        break

    ret = c.batch_ret if rc != -EAGAIN else np.int64(-1)
    migrate_folio_undo_src(mem, call, src, old_page_state & FOLIO_WAS_MAPPED, anon_vma, locked, ret)
    migrate_folio_undo_dst(mem, call, dst, dst_locked)
    return rc
