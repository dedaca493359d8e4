"""Collecting the folios of an address range that are on the wrong nodes, isolated.

Stands for queue_pages_range() and what it calls in mm/mempolicy.c (v7.3), queue_folios_hugetlb() among it.
"""

import contextlib

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.fault import lookup_page
from offload.mm.hugetlb import isolate_folio
from offload.mm.memmap import NO_PFN, PG_reserved, PG_zone_device, folio_test_large, page_folio, unpack
from offload.mm.pagetable import PMD_SIZE, PTE_HUGE, PTE_MIGRATION, PTE_PRESENT, TASK_SIZE, walk_pmd
from offload.syscalls.move_pages import folio_maybe_mapped_shared, vma_migratable
from offload.syscalls.result import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from offload.units import EFAULT, EIO, PAGE_SHIFT, PAGE_SIZE

__all__ = ("MPOL_MF_DISCONTIG_OK", "MPOL_MF_INVERT", "isolated_pages")

MPOL_MF_DISCONTIG_OK = 1 << 4       # holes in the range do not matter
MPOL_MF_INVERT = 1 << 5             # take the folios that are not on the nodes
MPOL_MF_ANY_MOVE = MPOL_MF_MOVE | MPOL_MF_MOVE_ALL


@jit
def queue_folio_required(mem, pfn, nodes, flags):
    """Whether the folio is on a node that it is to leave."""
    on_node = nodes >> np.int64(mem.folios[pfn].nid) & 1
    return (on_node != 0) == (flags & MPOL_MF_INVERT == 0)


@jit
def migrate_folio_add(mem, pfn, flags):
    """Isolate a folio for the queue. 1: done; 0: shared, passed over, which is no failure; -1: it cannot be isolated."""
    if flags & MPOL_MF_MOVE_ALL == 0 and folio_maybe_mapped_shared(mem, pfn):
        return 0
    return 1 if isolate_folio(mem, pfn) else -1


@jit
def queue_folio(mem, vma, pfn, flags):
    """As migrate_folio_add(), for a folio that is to leave its node: only if the call moves and the vma lets it."""
    if flags & MPOL_MF_ANY_MOVE == 0 or not vma_migratable(mem, vma):
        return -1
    return migrate_folio_add(mem, pfn, flags)


@jit
def folio_pte_batch(mem, mm, address, end, page, pfn):
    """How many consecutive entries from ``address`` on map consecutive pages of the folio, from ``page`` on."""
    nr = 1
    while address + nr * PAGE_SIZE < end:
        entry, value, other = lookup_page(mem, mm, address + nr * PAGE_SIZE)
        if other != page + nr or page_folio(mem, other) != pfn:
            break
        nr += 1
    return nr


@jit_entry
def queue_vma(mem_table, vma, start, end, nodes, flags, queue, counts):
    """Queue the folios in [start, end) of a vma that are to leave their nodes. 0, or -EIO: STRICT alone met one.

    ``counts``: folios queued; those that could not be (in entries, for a folio mapped by PTEs); the last large folio met;
    where to go on, ``end`` unless ``queue`` is full. Kernel: queue_folios_pte_range(), queue_folios_pmd().
    """
    mem = unpack(mem_table)
    mm = mem.vmas[vma].mm
    only_strict = flags & (MPOL_MF_STRICT | MPOL_MF_ANY_MOVE) == MPOL_MF_STRICT
    if flags & MPOL_MF_STRICT == 0 and not vma_migratable(mem, vma):
        counts[3] = end
        return 0
    address = start
    while address < end and counts[0] < len(queue):
        next_pmd = min((address | PMD_SIZE - 1) + 1, end)
        pmd = walk_pmd(mem, mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = next_pmd
            continue
        huge = mem.tables[pmd] & PTE_HUGE
        entry, value, page = lookup_page(mem, mm, address)
        nr = 1
        if value & PTE_PRESENT == 0:
            counts[1] += value & PTE_MIGRATION != 0
        elif page != NO_PFN:
            pfn = page_folio(mem, page)
            large = huge == 0 and folio_test_large(mem, pfn)
            if large:
                nr = folio_pte_batch(mem, mm, address, next_pmd, page, pfn)
            if mem.folios[pfn].page_flags & (PG_reserved | PG_zone_device) == 0 and queue_folio_required(mem, pfn, nodes, flags) \
                    and not (large and pfn == counts[2]):
                if large:
                    counts[2] = pfn
                added = queue_folio(mem, vma, pfn, flags)
                if added > 0:
                    queue[counts[0]] = pfn
                    counts[0] += 1
                elif added < 0:
                    counts[1] += nr
        if counts[1] and only_strict:
            return -EIO
        address = next_pmd if huge else address + nr * PAGE_SIZE
    counts[3] = address
    return 0


def queue_pages_range(machine, process, start, end, nodes, flags, chunks):
    """Isolate the folios in [start, end) that are on ``nodes`` (a mask; with MPOL_MF_INVERT: that are not).

    The number that could not be isolated, or -EFAULT (a hole; what is queued so far stays queued) or -EIO (MPOL_MF_STRICT
    without moving, and one is misplaced). ``chunks``: list that gets the arrays with the queued pfns, 0 where unused.
    """
    starts, ends, vmas = (one.tolist() for one in process.vma_index())
    end = TASK_SIZE if end is None else end
    inside = [at for at in range(len(vmas)) if ends[at] > start and starts[at] < end]
    if not inside:
        return -EFAULT
    counts = np.zeros(4, np.int64)
    for at in inside:
        if not flags & MPOL_MF_DISCONTIG_OK:
            if at == inside[0] and start < starts[at]:
                return -EFAULT
            if ends[at] < end and (at + 1 == len(vmas) or ends[at] < starts[at + 1]):
                return -EFAULT
        if not flags & (MPOL_MF_STRICT | MPOL_MF_ANY_MOVE):
            continue
        address, last = max(start, starts[at]), min(end, ends[at])
        while address < last:
            chunks.append(np.zeros(min(last - address >> PAGE_SHIFT, 1 << 16), np.int64))
            counts[0] = 0
            if queue_vma(machine.table, vmas[at], address, last, nodes, flags, chunks[-1], counts) < 0:
                return -EIO
            address = int(counts[3])
    return int(counts[1])


@contextlib.contextmanager
def isolated_pages(machine, process, start, end, nodes, flags, calls):
    """queue_pages_range() around a with block that gets (its result, the pfns queued).

    Unless a migrate_pages() call has taken them by then, which shows in ``calls``, they are put back at the end, whatever
    ends it.
    """
    chunks = []
    nr_calls = len(calls)
    try:
        result = queue_pages_range(machine, process, start, end, nodes, flags, chunks)
        yield result, queued_in(chunks)
    finally:
        if len(calls) == nr_calls:
            machine.putback(queued_in(chunks))


def queued_in(chunks):
    return np.concatenate([chunk[chunk != 0] for chunk in chunks]) if chunks else np.zeros(0, np.int64)
