"""madvise(2): what a process says about pages it keeps: MADV_COLD and MADV_FREE; and writing file pages back.

Stands for madvise_cold_or_pageout_pte_range() and madvise_free_pte_range() of mm/madvise.c, folio_mark_lazyfree() of
mm/swap.c, folio_mkclean() of mm/rmap.c and what fsync does to a page (v7.3). MADV_DONTNEED is zap_range() in fault.py, MADV_PAGEOUT is in
swap.py. Leaves out the splitting of a large folio that is only partly in the range: it is passed over.
"""

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.fault import lookup_page
from offload.mm.memmap import (
    AOPS_NONE, MAPPING_FILE, NO_PFN, PG_active, PG_dirty, PG_ksm, PG_lru, PG_referenced, PG_swapbacked, PG_swapcache,
    PG_unevictable, VM_SHARED, page_folio, unpack,
)
from offload.mm.node import lru_add_drain, lru_stat_add
from offload.mm.pagetable import (
    PMD_SIZE, PTE_DIRTY, PTE_HUGE, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, PTE_YOUNG, folio_mapped_by_others, pte_pfn, rmap_first,
    rmap_next, vma_address, walk_pmd, walk_pte,
)
from offload.units import PAGE_SHIFT, PAGE_SIZE

__all__ = ("madvise_cold", "madvise_free", "writeback_range")


@jit
def whole_folio_at(mem, mm, address, end):
    """(head, pages from ``address`` on) of the folio at ``address``: all of it must lie in [address, end), else NO_PFN."""
    entry, value, page = lookup_page(mem, mm, address)
    if page == NO_PFN:
        return np.int64(NO_PFN), np.int64(1)
    pfn = page_folio(mem, page)
    nr_pages = np.int64(1) << mem.folios[pfn].order
    if page != pfn or address + nr_pages * PAGE_SIZE > end or folio_mapped_by_others(mem, pfn, mm):
        return np.int64(NO_PFN), np.int64(1)
    return pfn, nr_pages


@jit
def change_folio_entries(mem, mm, address, nr_pages, clear):
    """Clear bits of the entries that map the pages from ``address`` on."""
    at = address
    while at < address + nr_pages * PAGE_SIZE:
        entry, value, page = lookup_page(mem, mm, at)
        if page != NO_PFN:
            mem.tables[entry] = value & ~clear
        at = (at | PMD_SIZE - 1) + 1 if value & PTE_HUGE else at + PAGE_SIZE


@jit
def change_lru_flags(mem, pfn, clear):
    """Clear flags that say which LRU list a folio is on."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_lru:
        lru_stat_add(mem, pfn, -1)
    folio.page_flags &= ~clear
    if folio.page_flags & PG_lru:
        lru_stat_add(mem, pfn, 1)


@jit_entry
def madvise_cold(mem_table, mm, start, end):
    """MADV_COLD: the folios in [start, end) become old and inactive."""
    mem = unpack(mem_table)
    lru_add_drain(mem)
    address = start
    while address < end:
        pfn, nr_pages = whole_folio_at(mem, mm, address, end)
        if pfn != NO_PFN:
            change_folio_entries(mem, mm, address, nr_pages, np.int64(PTE_YOUNG))
            change_lru_flags(mem, pfn, np.int64(PG_active | PG_referenced))
        address += nr_pages * PAGE_SIZE


@jit_entry
def madvise_free(mem_table, mm, start, end):
    """MADV_FREE: anonymous folios in [start, end) become clean and no longer swap backed, to be dropped by reclaim."""
    mem = unpack(mem_table)
    lru_add_drain(mem)
    address = start
    while address < end:
        pfn, nr_pages = whole_folio_at(mem, mm, address, end)
        if pfn != NO_PFN and mem.folios[pfn].mapping < 0 and mem.folios[pfn].page_flags & PG_ksm == 0:
            folio = mem.folios[pfn]
            folio.page_flags &= ~PG_dirty
            change_folio_entries(mem, mm, address, nr_pages, np.int64(PTE_DIRTY | PTE_YOUNG))
            if folio.page_flags & PG_lru and folio.page_flags & (PG_swapcache | PG_unevictable) == 0:
                change_lru_flags(mem, pfn, np.int64(PG_active | PG_referenced | PG_swapbacked))
        address += nr_pages * PAGE_SIZE


@jit
def folio_mkclean(mem, pfn):
    """Make every shared mapping of a page-cache folio clean and write-protected, so that the next write is noticed."""
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    vma = rmap_first(mem, pfn)
    while vma:
        area = mem.vmas[vma]
        address = vma_address(mem, vma, folio.index)
        end = min(address + (nr_pages << PAGE_SHIFT), area.end)
        for at in range(max(address, area.start), end if area.vm_flags & VM_SHARED else address, PAGE_SIZE):
            pmd = walk_pmd(mem, area.mm, at)
            entry = pmd if pmd and mem.tables[pmd] & PTE_HUGE else walk_pte(mem, area.mm, at)
            old = mem.tables[entry] if entry else np.int64(0)
            if old & PTE_PRESENT and old & PTE_SPECIAL == 0 and pfn <= pte_pfn(old) < pfn + nr_pages:
                if old & PTE_DIRTY:
                    folio.page_flags |= PG_dirty
                mem.tables[entry] = old & ~(PTE_DIRTY | PTE_WRITE)
        vma = rmap_next(mem, pfn, vma)


@jit_entry
def writeback_range(mem_table, mapping, first, end):
    """Write the dirty folios among pages [first, end) of a file back: they and their entries are clean then.

    A file that has nowhere to write to (shmem, ramfs) keeps them dirty. Kernel: vfs_fsync_range().
    """
    mem = unpack(mem_table)
    space = mem.mappings[mapping]
    if space.kind != MAPPING_FILE or space.aops == AOPS_NONE:
        return
    index = first
    while index < min(end, space.nr_slots):
        pfn = mem.slots[space.slots + index]
        if pfn == NO_PFN:
            index += 1
            continue
        folio = mem.folios[pfn]
        was_dirty = folio.page_flags & PG_dirty
        folio_mkclean(mem, pfn)
        if was_dirty:
            mem.nodes[folio.nid].nr_file_dirty -= np.int64(1) << folio.order
        folio.page_flags &= ~PG_dirty
        index = folio.index + (np.int64(1) << folio.order)
