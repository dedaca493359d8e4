"""move_pages(2): which folios may move, in which runs, and what is reported for each page.

Stands for do_pages_move(), add_folio_for_migration() and move_pages_and_store_status() of mm/migrate.c (v7.3). Leaves
out permissions, cpusets, and the other system calls.
"""

import dataclasses

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.fault import find_vma, lookup_page
from offload.mm.memmap import (
    NO_PFN, VM_PFNMAP, folio_test_large, page_folio, unpack,
)
from offload.mm.node import folio_isolate_lru, node_stat_add_isolated
from offload.mm.pagetable import (
    PMD_SIZE, PTE_HUGE, PTE_PRESENT, rmap_first, rmap_next, rmap_vma, vma_address, walk_pmd,
)
from offload.units import (
    EACCES, EBUSY, EFAULT, ENODEV, ENOENT, MIGRATE_SYNC, MR_SYSCALL, PAGE_SHIFT, PAGE_SIZE,
)

__all__ = ("MoveResult", "do_pages_move", "NOT_WRITTEN")

NOT_WRITTEN = -(1 << 31)
"""A status that the call has not written; whatever the caller's array held stays."""


@dataclasses.dataclass(frozen=True)
class MoveResult:
    """What one move_pages(2) call did.

    ``ret`` is its return value: 0, the number of folios of the failing run plus entries after it, or -errno.
    ``status`` (int32, one per address) is a node, a -errno, or NOT_WRITTEN; a run in which one folio fails writes none of
    its statuses. ``calls`` are the MigrateResults of its migrate_pages() calls, in order. ``addresses`` as passed in.
    """

    ret: int
    status: np.ndarray
    addresses: np.ndarray
    calls: tuple

    def total(self, name):
        """Sum over the calls of a counter of ``stats``, or of a number such as ``moved_bytes`` or ``wall_ns``."""
        return sum(call.stats[name] if name in call.stats else getattr(call, name) for call in self.calls)

    def phases_ns(self):
        """Sum of the calls' phase times."""
        return {phase: sum(call.phases_ns[phase] for call in self.calls) for phase in ("unmap", "flush", "copy", "move")}


@jit
def add_folio_for_migration(mem, mm, vma, address, nid, move_all):
    """Isolate the folio at ``address`` for a move to ``nid``.

    (1, its head): isolated, to be queued. (0, 0): on ``nid`` already. (-errno, 0): why it stays.
    Kernel: add_folio_for_migration() with __add_folio_for_migration().
    """
    if vma == 0 or mem.vmas[vma].vm_flags & VM_PFNMAP:
        return -EFAULT, np.int64(0)
    entry, value, page = lookup_page(mem, mm, address)
    if value & PTE_PRESENT == 0:
        return -ENOENT, np.int64(0)
    if page == NO_PFN:                              # the zero page
        return -EFAULT, np.int64(0)
    pfn = page_folio(mem, page)
    folio = mem.folios[pfn]
    if folio.nid == nid:
        return 0, np.int64(0)
    if not move_all and folio_maybe_mapped_shared(mem, pfn):
        return -EACCES, np.int64(0)
    if not folio_isolate_lru(mem, pfn):
        return -EBUSY, np.int64(0)
    node_stat_add_isolated(mem, pfn, 1)
    return 1, pfn


@jit
def folio_maybe_mapped_shared(mem, pfn):
    """Whether several processes may map the folio (folio_maybe_mapped_shared()).

    Small: mapped more than once, wherever. Large: by two processes, exactly; the kernel, which remembers two of them and
    a bit, may still say so after one of three or more has gone.
    """
    if mem.folios[pfn].mapcount <= 1 or not folio_test_large(mem, pfn):
        return mem.folios[pfn].mapcount > 1
    mapper = np.int64(0)
    cursor = rmap_first(mem, pfn)
    while cursor:
        vma = rmap_vma(mem, pfn, cursor)
        mm = mem.vmas[vma].mm
        if mm != mapper and vma_maps_folio(mem, vma, pfn):
            if mapper:
                return True
            mapper = mm
        cursor = rmap_next(mem, pfn, cursor)
    return False


@jit
def maps_folio(mem, mm, start, end, pfn):
    """Whether any page of the folio is mapped in [start, end), page aligned."""
    for address in range(start, end, PAGE_SIZE):
        entry, value, page = lookup_page(mem, mm, address)
        if page != NO_PFN and page_folio(mem, page) == pfn:
            return True
    return False


@jit
def vma_maps_folio(mem, vma, pfn):
    """Whether any page of the folio is mapped in the vma."""
    area = mem.vmas[vma]
    address = vma_address(mem, vma, mem.folios[pfn].index)
    end = min(address + (np.int64(PAGE_SIZE) << mem.folios[pfn].order), area.end)
    return maps_folio(mem, area.mm, max(address, area.start), end, pfn)


@jit_entry
def queue_run(mem_table, mm, starts, ends, vmas, addresses, nids, i, move_all, status, queue):
    """Queue folios from entry ``i`` on, until a run ends. (entries looked at, folios queued, result of the last).

    A run ends at an entry for another node (not looked at), or after one that was not queued; that entry's result is
    last. Entries that are not queued while the queue is empty get their status here: there is nothing to move yet.
    """
    mem = unpack(mem_table)
    nr = 0
    first = i
    while i < len(addresses) and nids[i] == nids[first]:
        vma = find_vma(starts, ends, vmas, addresses[i])
        rc, pfn = add_folio_for_migration(mem, mm, vma, addresses[i], nids[i], move_all)
        if rc == 1:
            queue[nr] = pfn
            nr += 1
        elif nr:
            return i + 1, nr, rc
        else:
            status[i] = rc if rc else nids[i]
        i += 1
    return i, nr, 1


def do_pages_move(machine, process, addresses, nids, *, move_all=False, events=()):
    """Move the page at each address to the node beside it; a MoveResult.

    ``addresses`` and ``nids``: int64 arrays of one length. Folios go to migrate_pages() in runs of one target node, as
    the kernel cuts them; a run that fails ends the call. LRU batches are drained before and off during the call.
    """
    nr = len(addresses)
    status = np.full(nr, NOT_WRITTEN, np.int32)
    queue = np.empty(nr, np.int64)
    index = process.vma_index()
    calls = []

    def move_and_store(nid, end, queued):
        if not queued:
            return 0
        result = machine.migrate_isolated(queue[:queued].copy(), nid, mode=MIGRATE_SYNC, reason=MR_SYSCALL, events=events,
                                          into=calls)
        if result.rc > 0:
            return result.rc + nr - end
        if result.rc == 0:
            status[end - queued:end] = nid
        return result.rc

    def invalid(nid):
        return not 0 <= nid < len(machine.mem.nodes) or machine.mem.nodes.nr_pages[nid] == 0

    def run():
        i = 0
        while i < nr:
            nid = int(nids[i])
            if invalid(nid):
                return -ENODEV
            i, queued, rc = queue_run(machine.table, process.mm, *index, addresses, nids, i, move_all, status, queue)
            if rc == 1:
                err = move_and_store(nid, i, queued)
                if i < nr and invalid(nids[i]):     # found before the queue is moved, and wins
                    return -ENODEV
            else:
                status[i - 1] = rc if rc else nid
                err = move_and_store(nid, i - 1, queued)
                err -= err > 0                      # that entry has been dealt with
            if err:
                return err
        return 0

    machine.lru_cache_disable()
    try:
        ret = run()
    finally:
        machine.lru_cache_enable()
    return MoveResult(ret, status, addresses, tuple(calls))


@jit_entry
def collect_folio_addresses(mem_table, mm, start, address, end, out):
    """Addresses in [address, end) at which a folio's first mapped page of those from ``start`` on stands.

    Stops when ``out`` is full, with the address to go on from: (how many it got, address). The range is of one vma.
    """
    mem = unpack(mem_table)
    nr = 0
    last = np.int64(NO_PFN)
    while address < end and nr < len(out):
        pmd = walk_pmd(mem, mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = (address | PMD_SIZE - 1) + 1
            continue
        entry, value, page = lookup_page(mem, mm, address)
        if page != NO_PFN and page_folio(mem, page) != last:
            last = page_folio(mem, page)
            # Copy on write can have put a page of another folio between two pages of this one.
            if not maps_folio(mem, mm, max(start, address - (page - last << PAGE_SHIFT)), address, last):
                out[nr] = address
                nr += 1
        address = (address | PMD_SIZE - 1) + 1 if value & PTE_HUGE else address + PAGE_SIZE
    return nr, address
