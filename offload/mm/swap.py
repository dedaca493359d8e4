"""Swap: pages that go out to the swap device leave swap entries in the page tables.

Stands for mm/swapfile.c (swap_map), mm/page_io.c and the part of shrink_folio_list() (mm/vmscan.c) that reclaims one
anonymous folio, as MADV_PAGEOUT has it done (v7.3). Leaves out clusters, several devices, zswap, readahead, and entries
being used again after they are free. Coming back in is a fault: do_swap_page() in fault.py; the swap cache is in
address_space.py.

A swap entry in a page table has PTE_SWAP and PTE_SPECIAL, no PTE_PRESENT, and the number of the entry in place of the pfn;
PTE_EXCLUSIVE and PTE_UFFD_WP stay with it.
"""

import numpy as np

from offload.jit import jit, jit_entry, jit_inline
from offload.mm.address_space import delete_from_swap_cache, folio_clear_dirty, swap_cache_add_folio, swap_cache_get_folio
from offload.mm.frames import copy_memory, frame_address
from offload.mm.memmap import (
    NO_PFN, PG_dirty, PG_ksm, PG_lru, PG_mlocked, PG_swapcache, page_folio, unpack,
)
from offload.mm.node import (
    folio_add_lru, folio_isolate_lru, folio_maybe_dma_pinned, folio_put, lru_add_drain,
)
from offload.mm.pagetable import (
    PTE_PRESENT, PTE_SPECIAL, folio_mapped_by_others, pte_pfn, try_to_unmap, walk_pmd, walk_pte,
)
from offload.units import PAGE_SHIFT, PAGE_SIZE

__all__ = ("swap_free", "folio_free_swap", "swap_read", "swap_out_folio")


@jit
def swap_free(mem, entry):
    """One page-table entry less holds it; with the last, a folio that waits for it in the swap cache unmapped goes."""
    mem.swap_map[entry] -= 1
    pfn = swap_cache_get_folio(mem, entry)
    if pfn != NO_PFN and mem.folios[pfn].mapcount == 0:
        mem.folios[pfn].refcount += 1
        folio_free_swap(mem, pfn)
        folio_put(mem, pfn)


@jit
def folio_free_swap(mem, pfn):
    """Take a folio out of the swap cache unless a page table still holds one of its entries. Whether it is out of it.

    The caller holds a reference. The folio is dirty then: its swapped copy is gone.
    """
    folio = mem.folios[pfn]
    if folio.page_flags & PG_swapcache == 0:
        return True
    for entry in range(folio.private, folio.private + (np.int64(1) << folio.order)):
        if mem.swap_map[entry]:
            return False
    delete_from_swap_cache(mem, pfn)
    folio.page_flags |= PG_dirty
    return True


@jit_inline
def swap_address(mem, entry):
    return mem.sys[0].swap_device + (entry << PAGE_SHIFT)


@jit
def swap_read(mem, pfn, entry):
    """Read one page in (swap_read_folio())."""
    address = frame_address(mem, pfn)
    if address:
        copy_memory(mem, address, swap_address(mem, entry), np.int64(PAGE_SIZE))


@jit
def can_swap_out(mem, pfn):
    """Whether MADV_PAGEOUT of its process may take the folio: anonymous, on the LRU, its own, not mlocked or pinned."""
    folio = mem.folios[pfn]
    return (folio.mapping < 0 and folio.page_flags & PG_ksm == 0 and folio.page_flags & PG_lru != 0
            and folio.page_flags & PG_mlocked == 0 and folio.mapcount > 0 and not folio_maybe_dma_pinned(mem, pfn))


@jit_entry
def swap_candidate(mem_table, mm, address, end):
    """(head, order) of the folio at ``address`` if it can be swapped out and all of it that is mapped lies before ``end``,
    else (NO_PFN, where 0 is)."""
    mem = unpack(mem_table)
    lru_add_drain(mem)
    pte = walk_pte(mem, mm, address)
    pmd = walk_pmd(mem, mm, address)
    value = mem.tables[pte] if pte else mem.tables[pmd] if pmd else np.int64(0)
    if value & PTE_PRESENT == 0 or value & PTE_SPECIAL:
        return np.int64(NO_PFN), np.int64(0)
    page = pte_pfn(value)
    pfn = page_folio(mem, page)
    order = np.int64(mem.folios[pfn].order)
    # The whole folio must begin here, and end inside: one that is only partly named would have to be split.
    if not can_swap_out(mem, pfn) or page != pfn or address + (PAGE_SIZE << order) > end or folio_mapped_by_others(mem, pfn, mm):
        return np.int64(NO_PFN), np.int64(0)
    return pfn, order


@jit_entry
def swap_out_folio(mem_table, pfn, entry):
    """Write a folio to swap entries ``entry`` .., unmap it, and free it unless somebody else still refers to it.

    Such a folio stays in the swap cache, unmapped. Kernel: shrink_folio_list() for one folio.
    """
    mem = unpack(mem_table)
    folio_isolate_lru(mem, pfn)
    swap_cache_add_folio(mem, pfn, entry)
    try_to_unmap(mem, pfn)
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    address = frame_address(mem, pfn)
    if address:
        copy_memory(mem, swap_address(mem, entry), address, nr_pages << PAGE_SHIFT)
    folio_clear_dirty(mem, pfn)
    if folio.refcount == nr_pages + 1:
        delete_from_swap_cache(mem, pfn)
    else:
        folio_add_lru(mem, pfn)
    folio_put(mem, pfn)
