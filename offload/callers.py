"""The kernel's own callers of migrate_pages(): what they isolate, how they ask, and what they make of the answer.

Stands for the call sites in mm/compaction.c, mm/migrate.c (NUMA faults), mm/vmscan.c (demotion), mm/page_alloc.c
(alloc_contig_range), mm/memory_hotplug.c, mm/memory-failure.c (soft offline), mm/gup.c (long-term pins), mm/damon/ and cpusets (v7.3).
Leaves out what finds the folios before them, other than compaction's scanners, and reclaim after them: clean page cache is
never evicted instead of moved. The system calls are in offload/syscalls/.

| caller                       | mode  | reason            | destinations                           | what stays           |
|------------------------------|-------|-------------------|----------------------------------------|----------------------|
| compact_node                 | given | compaction        | its own free blocks, from the top      | put back             |
| migrate_misplaced_folio      | ASYNC | numa_misplaced    | the node, and no other                 | -EAGAIN              |
| demote_folio_list            | ASYNC | demotion          | the node; then those allowed           | back for reclaim     |
| alloc_contig_migrate_range   | SYNC  | contig_range      | the folios' node, then any             | 5 tries, then -EBUSY |
| do_migrate_range             | SYNC  | memory_hotplug    | other nodes, the nearest first         | put back, called again |
| soft_offline_folio           | SYNC  | memory_failure    | its node, then any                     | -EBUSY               |
| migrate_longterm_unpinnable_folios | SYNC | longterm_pin  | their nodes, then any                  | -ENOMEM              |
| damon_migrate_folio_list     | ASYNC | damon             | the node, then any                     | put back             |
| cpuset_migrate_mm            | SYNC  | syscall_or_cpuset | by pairs of nodes, and no other        | ignored              |

Folios are given as head pfns; one that cannot be isolated is passed over. Whatever is raised, nothing stays isolated.
"""

import contextlib
import dataclasses

import numpy as np

from offload.errors import InvalidInput
from offload.jit import jit_entry
from offload.migrate.call import TargetControl
from offload.mm.compaction import (
    COMPACT_CLUSTER_MAX, ISOLATE_ASYNC, ISOLATE_NOFS, ISOLATE_UNEVICTABLE, PAGEBLOCK_ORDER, has_free_block,
    isolate_migratepages, release_freepages,
)
from offload.mm.hugetlb import isolate_folio
from offload.mm.memmap import PG_dirty, PG_hwpoison, PG_reserved, VM_EXEC, folio_is_file_lru, unpack
from offload.mm.node import folio_isolate_lru, node_stat_add_isolated
from offload.syscalls.migrate_pages import do_migrate_pages
from offload.syscalls.move_pages import folio_maybe_mapped_shared
from offload.syscalls.result import MPOL_MF_MOVE_ALL
from offload.units import (
    EACCES, EAGAIN, EBUSY, ENOMEM, MIGRATE_ASYNC, MIGRATE_SYNC, MR_COMPACTION, MR_CONTIG_RANGE, MR_DAMON, MR_DEMOTION,
    MR_LONGTERM_PIN, MR_MEMORY_FAILURE, MR_MEMORY_HOTPLUG, MR_NUMA_MISPLACED, parse_mode,
)

__all__ = ("CallerResult", "compact_node", "migrate_misplaced_folio", "demote_folio_list", "alloc_contig_migrate_range",
           "do_migrate_range", "soft_offline_folio", "migrate_longterm_unpinnable_folios", "damon_migrate_folio_list",
           "cpuset_migrate_mm")

CONTIG_TRIES = 5


@dataclasses.dataclass(frozen=True)
class CallerResult:
    """What a caller made of it. ``ret``: 0 or more, or -errno; ``calls``: the MigrateResults, in order."""

    ret: int
    calls: tuple


# --- isolating ------------------------------------------------------------------------------------------------

@jit_entry
def isolate_movable(mem_table, pfns, out):
    """Isolate those folios that can be, with NR_ISOLATED; their heads go to ``out``. How many."""
    mem = unpack(mem_table)
    nr = 0
    for i in range(len(pfns)):
        if mem.folios[pfns[i]].refcount and isolate_folio(mem, pfns[i]):
            out[nr] = pfns[i]
            nr += 1
    return nr


@contextlib.contextmanager
def isolated(machine, folios, calls):
    """A with block that gets the isolated ones of ``folios``; unless a call in ``calls`` has taken them, they go back."""
    machine.check_idle()
    folios = np.ascontiguousarray(folios, np.int64)
    out = np.zeros(len(folios), np.int64)
    nr_calls = len(calls)
    machine.lru_add_drain()
    try:
        nr = isolate_movable(machine.table, folios, out)
        yield out[:nr].copy()
    finally:
        if len(calls) == nr_calls:
            machine.putback(out[out != 0])


def migrate_list(machine, folios, target, mode, reason, events):
    """Isolate ``folios``, migrate them, put back what stays: (value of migrate_pages(), or 0 with nothing to do; calls)."""
    calls = []
    with isolated(machine, folios, calls) as found:
        rc = machine.migrate_isolated(found, target, mode=mode, reason=reason, events=events, into=calls).rc if len(found) else 0
    return rc, tuple(calls)


def everywhere(machine):
    return tuple(range(len(machine.mem.nodes)))


# --- compaction (mm/compaction.c) -----------------------------------------------------------------------------

COMPACT_CONTENDED, COMPACT_COMPLETE, COMPACT_SUCCESS = "contended", "complete", "success"


@dataclasses.dataclass(frozen=True)
class CompactResult:
    """``status``: "success" (there is a free block of the order asked for), "complete" (the scanners have met) or "contended"
    (no destination was left before they met)."""

    status: str
    calls: tuple


def compact_scanners_met(sys):
    return bool(sys.cc_free_page[0] >> PAGEBLOCK_ORDER <= sys.cc_migrate_page[0] >> PAGEBLOCK_ORDER)


def compact_node(machine, nid, *, order=None, mode="MIGRATE_SYNC", gfp_fs=True, unevictable=True, events=()):
    """Move a node's folios from its bottom to free blocks at its top, until they meet or a block of ``order`` is free.

    ``mode`` is the caller's: MIGRATE_ASYNC for direct compaction of the lowest priority, else MIGRATE_SYNC_LIGHT, as for
    kcompactd; MIGRATE_SYNC for vm.compact_memory. ``gfp_fs``: whether folios of files may be touched; ``unevictable``:
    vm.compact_unevictable_allowed. Kernel: compact_zone().
    """
    machine.check_idle()
    machine.check_nid(nid)
    mode = parse_mode(mode)
    flags = (mode != MIGRATE_SYNC) * ISOLATE_ASYNC | unevictable * ISOLATE_UNEVICTABLE | (not gfp_fs) * ISOLATE_NOFS
    sys = machine.mem.sys
    sys.cc_nid, sys.cc_migrate_page = nid, 0
    sys.cc_free_page = int(machine.mem.nodes.nr_pages[nid]) - 1 >> PAGEBLOCK_ORDER << PAGEBLOCK_ORDER
    calls = []
    queue = np.zeros(COMPACT_CLUSTER_MAX, np.int64)
    nr_calls = 0                                    # as they were when the queue was begun
    status = COMPACT_COMPLETE
    machine.lru_add_drain()
    try:
        while not compact_scanners_met(sys):
            if order is not None and has_free_block(machine.table, nid, order):
                status = COMPACT_SUCCESS
                break
            queue[:] = 0
            nr_calls = len(calls)
            nr = isolate_migratepages(machine.table, -1 if order is None else order, flags, queue)
            if nr == 0:
                continue
            rc = machine.migrate_isolated(queue[:nr].copy(), TargetControl(None, own_free=True), mode=mode,
                                          reason=MR_COMPACTION, events=events, into=calls).rc
            if rc == -ENOMEM and not compact_scanners_met(sys):
                status = COMPACT_CONTENDED
                break
    finally:
        if len(calls) == nr_calls:
            machine.putback(queue[queue != 0])
        release_freepages(machine.table)
    return CompactResult(status, tuple(calls))


# --- NUMA balancing (mm/migrate.c) ----------------------------------------------------------------------------

@jit_entry
def migrate_misplaced_folio_prepare(mem_table, vma, pfn, nid, out):
    """Whether a folio that a NUMA fault in ``vma`` found elsewhere may move to ``nid``: 0 or -errno. If so it is isolated, and
    in ``out``.

    -EACCES: a shared library's text, most likely. -EAGAIN: a dirty file folio, no room on the node, or not isolatable.
    """
    mem = unpack(mem_table)
    nr_pages = np.int64(1) << np.int64(mem.folios[pfn].order)
    if folio_is_file_lru(mem, pfn):
        if mem.vmas[vma].vm_flags & VM_EXEC and folio_maybe_mapped_shared(mem, pfn):
            return -EACCES
        if mem.folios[pfn].page_flags & PG_dirty:
            return -EAGAIN
    if mem.nodes[nid].nr_free_pages + mem.nodes[nid].pcp_count <= nr_pages:    # the watermark is 0 here
        return -EAGAIN
    if not folio_isolate_lru(mem, pfn):
        return -EAGAIN
    node_stat_add_isolated(mem, pfn, 1)
    out[0] = pfn
    return 0


def migrate_misplaced_folio(machine, process, address, nid, *, events=()):
    """What a NUMA fault at ``address`` does with a folio that is not on ``nid``: 0 (it is there now), -EACCES or -EAGAIN.

    Kernel: migrate_misplaced_folio_prepare() and migrate_misplaced_folio().
    """
    machine.check_idle()
    machine.check_nid(nid)
    found = machine.folios_of(process, address, 1)
    if not len(found):
        raise InvalidInput(f"no page is mapped at {address:#x}: a NUMA fault finds one that is; touch it first")
    if machine.mem.folios.nid[found[0]] == nid:
        return CallerResult(0, ())
    out = np.zeros(1, np.int64)
    calls = []
    try:
        err = migrate_misplaced_folio_prepare(machine.table, process._vma_at(address), found[0], nid, out)
        if err == 0 and machine.migrate_isolated(out.copy(), nid, mode=MIGRATE_ASYNC, reason=MR_NUMA_MISPLACED, events=events,
                                                 into=calls).rc:
            err = -EAGAIN
    finally:
        if not calls:
            machine.putback(out[out != 0])
    return CallerResult(err, tuple(calls))


# --- reclaim: demotion (mm/vmscan.c) --------------------------------------------------------------------------

def demote_folio_list(machine, folios, nid, allowed=(), *, events=()):
    """Move cold folios to a lower tier: to ``nid`` while it has room, then to the nodes ``allowed``. ``ret``: pages moved.

    What stays goes back to its LRU, where reclaim would take it up. NR_ISOLATED is lowered at the end for all of them, as
    shrink_inactive_list() does. Kernel: demote_folio_list(), alloc_demote_folio().
    """
    machine.check_nid(nid)
    nodes = machine.mem.nodes
    before = nodes.nr_isolated_anon.copy(), nodes.nr_isolated_file.copy()
    try:
        _, calls = migrate_list(machine, folios, TargetControl(nid, nmask=(nid,), nmask_next=tuple(allowed)), MIGRATE_ASYNC,
                                MR_DEMOTION, events)
    finally:
        nodes.nr_isolated_anon[:], nodes.nr_isolated_file[:] = before
    return CallerResult(sum(call.stats["nr_succeeded"] for call in calls), calls)


# --- contiguous ranges, CMA (mm/page_alloc.c) -----------------------------------------------------------------

def alloc_contig_migrate_range(machine, folios, *, mode="MIGRATE_SYNC", events=()):
    """Clear folios out of a range that must become free. 0, -EBUSY after five tries, or -ENOMEM.

    They are isolated once, and what a try leaves is tried again. Kernel: __alloc_contig_migrate_range() for one set of
    isolated folios.
    """
    mode = parse_mode(mode)
    calls = []
    rc = 0
    machine.lru_cache_disable()
    try:
        with isolated(machine, folios, calls) as left:
            try:
                while len(left) and rc != -ENOMEM:
                    if len(calls) == CONTIG_TRIES:
                        rc = -EBUSY
                        break
                    rc = machine.migrate_isolated(left, TargetControl(None, nmask=everywhere(machine)), mode=mode,
                                                  reason=MR_CONTIG_RANGE, events=events, into=calls, putback=False).rc
                    left = calls[-1].left
            finally:
                if calls:
                    machine.putback(calls[-1].left)
    finally:
        machine.lru_cache_enable()
    return CallerResult(min(rc, 0), tuple(calls))


# --- memory hotplug (mm/memory_hotplug.c) ---------------------------------------------------------------------

def do_migrate_range(machine, folios, *, events=()):
    """One round of emptying memory that is to go offline: the folios move to other nodes. ``ret`` as migrate_pages().

    Only where there is no other node with memory may they stay on theirs. The caller repeats it until nothing is left.
    """
    folios = np.ascontiguousarray(folios, np.int64)
    nid = int(machine.mem.folios.nid[folios[0]]) if len(folios) else 0
    others = tuple(one for one in machine.mem.nodes.nr_pages.nonzero()[0].tolist() if one != nid)
    rc, calls = migrate_list(machine, folios, TargetControl(nid, nmask=others or (nid,)), MIGRATE_SYNC, MR_MEMORY_HOTPLUG, events)
    return CallerResult(rc, calls)


# --- memory failure (mm/memory-failure.c) ---------------------------------------------------------------------

def soft_offline_folio(machine, pfn, *, events=()):
    """Take a page that is about to fail out of use: its contents move, and it is never given out again. 0 or -errno.

    -EBUSY: it is part of a large folio (which the kernel splits first), cannot be isolated, or stayed; -ENOMEM: no
    destination. Kernel: soft_offline_in_use_page() for a base page, page_handle_poison().
    """
    if machine.mem.orders[pfn]:
        return CallerResult(-EBUSY, ())
    rc, calls = migrate_list(machine, [pfn], TargetControl(None, nmask=everywhere(machine)), MIGRATE_SYNC, MR_MEMORY_FAILURE, events)
    if not calls:
        return CallerResult(-EBUSY, ())
    if rc == 0:                                     # the isolation reference is still there: it keeps the page
        machine.mem.folios.page_flags[pfn], machine.mem.folios.migrate_info[pfn] = PG_hwpoison | PG_reserved, 0
    return CallerResult(-EBUSY if rc > 0 else rc, calls)


# --- long-term pins (mm/gup.c) --------------------------------------------------------------------------------

def migrate_longterm_unpinnable_folios(machine, folios, *, events=()):
    """Move folios that must not be pinned for long where they are. -EAGAIN: moved, pin again; -ENOMEM; 0: there were none.

    The caller has dropped its pins.
    """
    rc, calls = migrate_list(machine, folios, TargetControl(None, nmask=everywhere(machine)), MIGRATE_SYNC, MR_LONGTERM_PIN, events)
    return CallerResult((-ENOMEM if rc else -EAGAIN) if calls else 0, calls)


# --- DAMON (mm/damon/ops-common.c) ----------------------------------------------------------------------------

def damon_migrate_folio_list(machine, folios, nid, *, events=()):
    """Move hot or cold folios to ``nid`` as a DAMOS scheme says; cpusets and policies do not matter. ``ret``: pages moved.

    Those that are there already are passed over.
    """
    machine.check_nid(nid)
    folios = np.ascontiguousarray(folios, np.int64)
    folios = folios[machine.mem.folios.nid[folios] != nid]
    _, calls = migrate_list(machine, folios, TargetControl(nid, nmask=everywhere(machine)), MIGRATE_ASYNC, MR_DAMON, events)
    return CallerResult(sum(call.stats["nr_succeeded"] for call in calls), calls)


# --- cpusets (kernel/cgroup/cpuset.c) -------------------------------------------------------------------------

def cpuset_migrate_mm(machine, process, old, new, *, events=()):
    """Move a process's memory after its cpuset, with memory_migrate, from the nodes ``old`` to ``new``. ``ret``: always 0.

    Shared pages go as well; what stays is nobody's affair. The caller changes ``mems_allowed``.
    """
    machine.check_idle()
    calls = []
    do_migrate_pages(machine, process, frozenset(old), frozenset(new), MPOL_MF_MOVE_ALL, calls, events)
    return CallerResult(0, tuple(calls))
