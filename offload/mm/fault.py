"""Faults, fork and zap: how page-table entries come, are shared and go; and access to memory through them.

Stands for mm/memory.c and mm/huge_memory.c as far as they fill and clear page tables (v7.3): anonymous faults of any
order, page-cache faults, swap-in, copy on write, copy_page_range(), move_page_tables() and zap_page_range(). Leaves out
readahead, what a userfaultfd handler would do, and fault-around beyond the folio that is hit; hugetlb vmas are served by
mm/hugetlb.py.

Nothing here runs while a migration does, except as an event between its steps.
"""

import numpy as np

from offload.jit import jit, jit_entry, jit_inline
from offload.mm.address_space import (
    filemap_add_folio, filemap_get_folio, folio_mark_dirty, swap_cache_add_folio, swap_cache_get_folio, swap_duplicate,
)
from offload.mm.frames import copy_memory, copy_pages, fill_memory, frame_address, frame_log_is_full, zero_frames
from offload.mm.memmap import (
    NO_PFN, PG_ksm, PG_lru, PG_swapbacked, PG_swapcache, PG_uptodate, VM_HUGETLB, VM_PFNMAP, VM_READ, VM_SHARED, VM_WRITE,
    page_folio, unpack,
)
from offload.mm.hugetlb import copy_hugetlb_page_range, hugetlb_fault, unmap_hugepage_range
from offload.mm.mempolicy import alloc_pages_vma
from offload.mm.node import alloc_pages_node, folio_add_lru, folio_put_refs, folio_maybe_dma_pinned, lru_add_drain
from offload.mm.pagetable import (
    PMD_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_HUGE, PTE_HWPOISON, PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, PTE_SWAP, PTE_UFFD_WP,
    PTE_WRITE, PTE_YOUNG, PTRS, ZERO_PAGE, add_rss, folio_add_rmap, folio_mapped_by_others, folio_remove_rmap, free_table, pgtable_deposit, pgtable_withdraw, pte_pfn,
    set_pte, split_pmd, walk_alloc_pmd, walk_alloc_pte, walk_pmd, walk_pte,
)
from offload.mm.swap import folio_free_swap, swap_free, swap_read
from offload.units import EAGAIN, EFAULT, ENOMEM, HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE

__all__ = ("handle_fault", "populate_anonymous", "populate", "access", "copy_page_range", "zap_range", "find_vma", "lookup_page")


@jit_inline
def find_vma(starts, ends, vmas, address):
    """The vma at ``address`` among a process's, given as sorted arrays, or 0 (vma_lookup())."""
    low, high = 0, len(starts)
    while low < high:
        middle = low + high >> 1
        if starts[middle] <= address:
            low = middle + 1
        else:
            high = middle
    if low and address < ends[low - 1]:
        return vmas[low - 1]
    return np.int64(0)


@jit
def lookup_page(mem, mm, address):
    """(index of the entry that covers ``address`` or 0, the entry, pfn of the page) without faulting.

    The pfn is NO_PFN unless the entry is present and maps a folio.
    """
    pmd = walk_pmd(mem, mm, address)
    if pmd == 0 or mem.tables[pmd] == 0:
        return np.int64(0), np.int64(0), np.int64(NO_PFN)
    entry = pmd
    inside = np.int64(0)
    if mem.tables[pmd] & PTE_HUGE:
        inside = address >> PAGE_SHIFT & PTRS - 1
    else:
        entry = (mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & PTRS - 1)
    value = mem.tables[entry]
    if value & PTE_PRESENT and value & PTE_SPECIAL == 0:
        return entry, value, pte_pfn(value) + inside
    return entry, value, np.int64(NO_PFN)


# --- filling --------------------------------------------------------------------------------------------------

@jit
def alloc_folio(mem, vma, index, order):
    """A folio for page ``index`` (pgoff) of a vma: as its policy says, or on its node; then a base page may come from any,
    the nearest id first."""
    if mem.vmas[vma].pol_mode:
        return alloc_pages_vma(mem, vma, index, order)
    nid = mem.vmas[vma].nid
    pfn = alloc_pages_node(mem, nid, order)
    if pfn == NO_PFN and order == 0:
        for distance in range(1, mem.sys[0].nr_nodes):
            for other in (nid - distance, nid + distance):
                if pfn == NO_PFN and 0 <= other < mem.sys[0].nr_nodes:
                    pfn = alloc_pages_node(mem, other, order)
    return pfn


@jit
def range_is_none(mem, mm, address, nr_pages):
    """Whether nothing at all is mapped at ``nr_pages`` pages from ``address``, inside one PMD."""
    pmd = walk_pmd(mem, mm, address)
    if pmd == 0 or mem.tables[pmd] == 0:
        return True
    if mem.tables[pmd] & PTE_HUGE or nr_pages == PTRS:
        return False
    first = walk_pte(mem, mm, address)
    for pte in range(first, first + nr_pages):
        if mem.tables[pte]:
            return False
    return True


@jit
def map_folio(mem, vma, address, pfn, first_page, nr_pages, bits):
    """Map ``nr_pages`` pages of a folio from ``first_page`` on at ``address``: a PMD leaf if it is one, else PTEs.

    The caller holds a reference for each entry made (one for the leaf). Entries in the way are the caller's affair.
    """
    area = mem.vmas[vma]
    if nr_pages == PTRS and mem.folios[pfn].order == HPAGE_PMD_ORDER and address & PMD_SIZE - 1 == 0:
        pmd = walk_alloc_pmd(mem, area.mm, address)
        if mem.tables[pmd] == 0:
            pgtable_deposit(mem, area.mm)
            set_pte(mem, pmd, pfn, bits | PTE_HUGE)
            folio_add_rmap(mem, pfn, vma, np.int64(PTE_HUGE))
            add_rss(mem, area.mm, pfn, nr_pages)
            return
    for i in range(nr_pages):
        pte = walk_alloc_pte(mem, area.mm, address + (i << PAGE_SHIFT))
        set_pte(mem, pte, pfn + first_page + i, bits)
        folio_add_rmap(mem, pfn, vma, np.int64(0))
    add_rss(mem, area.mm, pfn, nr_pages)


@jit
def do_anonymous_page(mem, vma, address, write):
    """Map fresh zeroed memory, in the vma's folio order where that fits, else the next smaller that does.

    A read maps the shared zero page, the huge one where a folio of that order would fit. 0 or -ENOMEM. Kernel: do_anonymous_page(), do_huge_pmd_anonymous_page().
    """
    area = mem.vmas[vma]
    if not write:
        start = address & -PMD_SIZE
        if area.order == HPAGE_PMD_ORDER and start >= area.start and start + PMD_SIZE <= area.end \
                and range_is_none(mem, area.mm, start, np.int64(PTRS)):
            pgtable_deposit(mem, area.mm)
            mem.tables[walk_alloc_pmd(mem, area.mm, start)] = ZERO_PAGE | PTE_HUGE
        else:
            mem.tables[walk_alloc_pte(mem, area.mm, address)] = ZERO_PAGE
        return 0
    order = area.order
    while True:
        nbytes = np.int64(PAGE_SIZE) << order
        start = address & ~(nbytes - 1)
        if order == 0 or (start >= area.start and start + nbytes <= area.end
                          and range_is_none(mem, area.mm, start, np.int64(1) << order)):
            pfn = alloc_folio(mem, vma, area.pgoff + (start - area.start >> PAGE_SHIFT), order)
            if pfn != NO_PFN:
                break
            if order == 0:
                return -ENOMEM
        order -= 1
    new_anon_folio(mem, vma, start, pfn)
    zero_frames(mem, pfn, np.int64(1) << order)
    return 0


@jit
def new_anon_folio(mem, vma, start, pfn):
    """Give a fresh folio to a vma at ``start``: mapped, exclusive, writable as the vma is, on the LRU."""
    area = mem.vmas[vma]
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    folio.page_flags |= PG_uptodate | PG_swapbacked
    folio.mapping = -np.int32(area.anon_vma)
    area.has_anon = 1
    if folio.order:
        mem.mthp_nr_anon[folio.order] += 1
    folio.index = area.pgoff + (start - area.start >> PAGE_SHIFT)
    bits = PTE_PRESENT | PTE_YOUNG | PTE_DIRTY | PTE_EXCLUSIVE
    if area.vm_flags & VM_WRITE:
        bits |= PTE_WRITE
    if folio.order < HPAGE_PMD_ORDER:
        folio.refcount += np.int32(nr_pages - 1)
    map_folio(mem, vma, start, pfn, 0, nr_pages, bits)
    folio_add_lru(mem, pfn)


@jit
def filemap_fault(mem, vma, index):
    """The page-cache folio that holds page ``index``, read in (as zeros, in the vma's folio order) if it is not there.

    NO_PFN without memory or beyond the end of the file (which ``index`` tells apart for the caller).
    """
    area = mem.vmas[vma]
    pfn = filemap_get_folio(mem, area.mapping, index)
    order = area.order
    while pfn == NO_PFN:
        nr_pages = np.int64(1) << order
        first = index & ~(nr_pages - 1)
        fits = first + nr_pages <= mem.mappings[area.mapping].nr_slots
        for i in range(nr_pages if fits else 0):
            if mem.slots[mem.mappings[area.mapping].slots + first + i] != NO_PFN:
                fits = False
        if fits or order == 0:
            pfn = alloc_folio(mem, vma, first, order)
            if pfn != NO_PFN:
                mem.folios[pfn].page_flags |= PG_uptodate
                zero_frames(mem, pfn, nr_pages)
                filemap_add_folio(mem, area.mapping, pfn, first)
                folio_add_lru(mem, pfn)
                folio_put_refs(mem, pfn, 1)         # the allocation's: the page cache holds it now
                return pfn
            if order == 0:
                return np.int64(NO_PFN)
        order -= 1
    return pfn


@jit
def do_file_fault(mem, vma, address, write):
    """Map the page of a file: the whole of its folio that fits the vma. A private write gets its own copy.

    0, -ENOMEM or -EFAULT (beyond the end of the file: SIGBUS). Kernel: do_read_fault(), do_shared_fault(),
    do_cow_fault(), finish_fault().
    """
    area = mem.vmas[vma]
    index = area.pgoff + (address - area.start >> PAGE_SHIFT)
    if index >= mem.mappings[area.mapping].nr_slots:
        return -EFAULT
    pfn = filemap_fault(mem, vma, index)
    if pfn == NO_PFN:
        return -ENOMEM
    folio = mem.folios[pfn]
    if write and area.vm_flags & VM_SHARED == 0:
        return cow_page(mem, vma, address, pfn + (index - folio.index))

    bits = PTE_PRESENT | PTE_YOUNG
    if write:
        bits |= PTE_WRITE | PTE_DIRTY
    start_page = folio.index - area.pgoff           # where the folio's head stands, in pages from the vma's start
    nr_pages = np.int64(1) << folio.order
    first = max(np.int64(0), -start_page)
    last = min(nr_pages, (area.end - area.start >> PAGE_SHIFT) - start_page)
    at = area.start + (start_page + first << PAGE_SHIFT)
    if last - first == PTRS and at & PMD_SIZE - 1 == 0 and range_is_none(mem, area.mm, at, np.int64(PTRS)):
        folio.refcount += 1
        map_folio(mem, vma, at, pfn, first, last - first, bits)
        return 0
    for page in range(first, last):
        pte = walk_alloc_pte(mem, area.mm, area.start + (start_page + page << PAGE_SHIFT))
        if pte and mem.tables[pte] == 0:
            hit = folio.index + page == index
            folio.refcount += 1
            map_folio(mem, vma, area.start + (start_page + page << PAGE_SHIFT), pfn, page, np.int64(1),
                      bits if hit else bits & ~(PTE_WRITE | PTE_DIRTY))
    return 0


@jit
def cow_page(mem, vma, address, old_page):
    """Map a private copy of one page (wp_page_copy()); what was mapped there goes. ``old_page`` NO_PFN: zeros."""
    area = mem.vmas[vma]
    pfn = alloc_folio(mem, vma, area.pgoff + (address - area.start >> PAGE_SHIFT), np.int64(0))
    if pfn == NO_PFN:
        return -ENOMEM
    if old_page == NO_PFN:
        zero_frames(mem, pfn, np.int64(1))
    else:
        copy_pages(mem, pfn, old_page, np.int64(1))
    pte = walk_alloc_pte(mem, area.mm, address)
    zap_entry(mem, vma, pte)
    new_anon_folio(mem, vma, address & ~(PAGE_SIZE - 1), pfn)
    return 0


@jit
def do_huge_zero_wp_pmd(mem, vma, address, entry):
    """A write where the huge zero page is mapped: a fresh folio of that order, else a page, and zero pages around it."""
    pfn = alloc_folio(mem, vma, mem.vmas[vma].pgoff + ((address & -PMD_SIZE) - mem.vmas[vma].start >> PAGE_SHIFT),
                      np.int64(HPAGE_PMD_ORDER))
    if pfn == NO_PFN:
        split_pmd(mem, mem.vmas[vma].mm, entry)
        return cow_page(mem, vma, address, np.int64(NO_PFN))
    zap_entry(mem, vma, entry)
    new_anon_folio(mem, vma, address & -PMD_SIZE, pfn)
    zero_frames(mem, pfn, np.int64(PTRS))
    return 0


@jit
def wp_can_reuse_anon_folio(mem, vma, pfn, huge):
    """Whether the entry that is being written through is all that is left of a folio that was shared.

    ``huge``: the entry is a PMD leaf. Of a folio mapped by PTEs no other process may map a page, and all references must be
    those entries'. Kernel: wp_can_reuse_anon_folio().
    """
    folio = mem.folios[pfn]
    if folio.page_flags & PG_ksm:
        return False
    if folio.page_flags & PG_lru == 0:              # the LRU batch may hold it
        lru_add_drain(mem)
    if folio.page_flags & PG_swapcache:
        folio_free_swap(mem, pfn)
    if folio.order == 0 or huge:
        return folio.mapcount == 1 and folio.refcount == 1
    return folio.refcount == folio.mapcount and folio.entire_mapcount == 0 and \
        not folio_mapped_by_others(mem, pfn, mem.vmas[vma].mm)


@jit
def do_wp_page(mem, vma, address, entry, unshare):
    """A write to a present page that is mapped read-only. 0 or -ENOMEM. Kernel: do_wp_page(), do_huge_pmd_wp_page().

    With ``unshare`` nothing is written: an anonymous page is to become the process's alone (FAULT_FLAG_UNSHARE).
    """
    area = mem.vmas[vma]
    old = mem.tables[entry]
    written = PTE_YOUNG if unshare else PTE_WRITE | PTE_DIRTY | PTE_YOUNG
    if old & PTE_SPECIAL:
        if old & PTE_HUGE:
            return do_huge_zero_wp_pmd(mem, vma, address, entry)
        return cow_page(mem, vma, address, np.int64(NO_PFN))
    pfn = page_folio(mem, pte_pfn(old))
    if area.vm_flags & VM_SHARED:
        mem.tables[entry] = old | written
        return 0
    if mem.folios[pfn].mapping < 0:
        if old & PTE_EXCLUSIVE or wp_can_reuse_anon_folio(mem, vma, pfn, old & PTE_HUGE):
            mem.tables[entry] = old | written | PTE_EXCLUSIVE
            return 0
    if old & PTE_HUGE:
        split_pmd(mem, area.mm, entry)
        entry = walk_pte(mem, area.mm, address)
        old = mem.tables[entry]
    return cow_page(mem, vma, address, pte_pfn(old))


@jit
def root_anon_vma(mem, vma):
    """The oldest anon_vma that the vma is linked to: all processes that may share a page of it are found from there."""
    avc = mem.vmas[vma].first_avc
    root = mem.vmas[vma].anon_vma
    while avc:
        root = min(root, mem.avcs[avc].anon_vma)
        avc = mem.avcs[avc].next_of_vma
    return root


@jit
def swapin_folio(mem, vma, address, entry):
    """A new folio in the swap cache that holds what ``entry`` holds on the device; NO_PFN without memory."""
    area = mem.vmas[vma]
    index = area.pgoff + (address - area.start >> PAGE_SHIFT)
    pfn = alloc_folio(mem, vma, index, np.int64(0))
    if pfn != NO_PFN:
        folio = mem.folios[pfn]
        folio.page_flags |= PG_uptodate | PG_swapbacked
        folio.mapping = -np.int32(root_anon_vma(mem, vma))
        folio.index = index
        swap_cache_add_folio(mem, pfn, entry)
        swap_read(mem, pfn, entry)
        folio_add_lru(mem, pfn)
        folio_put_refs(mem, pfn, 1)                 # the allocation's: the swap cache holds it now
    return pfn


@jit
def do_swap_page(mem, vma, address, pte, write):
    """Map the page whose swap entry stands at ``pte``, from the swap cache or read in. 0 or -ENOMEM. Kernel: do_swap_page().

    After a read it stays in the swap cache.
    """
    area = mem.vmas[vma]
    old = mem.tables[pte]
    entry = pte_pfn(old)
    pfn = swap_cache_get_folio(mem, entry)
    if pfn == NO_PFN:
        pfn = swapin_folio(mem, vma, address, entry)
        if pfn == NO_PFN:
            return -ENOMEM
    folio = mem.folios[pfn]
    folio.refcount += 1                             # the entry's
    page = pfn + entry - folio.private
    mem.tables[pte] = 0
    mem.swap_map[entry] -= 1
    if write:
        if folio.page_flags & PG_lru == 0:
            lru_add_drain(mem)
        folio_free_swap(mem, pfn)
    bits = PTE_PRESENT | PTE_YOUNG | old & (PTE_EXCLUSIVE | PTE_UFFD_WP)
    if folio.refcount == 1:
        bits |= PTE_EXCLUSIVE
    if bits & PTE_EXCLUSIVE and area.vm_flags & VM_WRITE and bits & PTE_UFFD_WP == 0:
        bits |= PTE_WRITE | PTE_DIRTY if write else PTE_WRITE
    set_pte(mem, pte, page, bits)
    folio_add_rmap(mem, pfn, vma, np.int64(0))
    add_rss(mem, area.mm, pfn, 1)
    area.has_anon = 1
    if write and bits & PTE_WRITE == 0:
        return handle_wp_fault(mem, vma, address, pte)
    return 0


@jit
def handle_wp_fault(mem, vma, address, entry):
    """A write to a page that is present and not writable; -EAGAIN if userfaultfd protects it."""
    if mem.tables[entry] & PTE_UFFD_WP:
        return -EAGAIN
    return do_wp_page(mem, vma, address, entry, False)


@jit
def handle_fault(mem, vma, address, write):
    """Make ``address`` accessible. 0, -ENOMEM, -EFAULT (protection, or past the end of a file) or -EAGAIN (under
    migration: the kernel would wait for the folio lock; or write-protected by userfaultfd: for its handler). Kernel:
    handle_mm_fault()."""
    area = mem.vmas[vma]
    if area.vm_flags & (VM_WRITE if write else VM_READ) == 0:
        return -EFAULT
    if area.vm_flags & VM_HUGETLB:
        return hugetlb_fault(mem, vma, address, write)
    entry, value, pfn = lookup_page(mem, area.mm, address)
    if value & PTE_MIGRATION:
        return -EAGAIN
    if value & PTE_HWPOISON:                        # VM_FAULT_HWPOISON: SIGBUS
        return -EFAULT
    if value & PTE_SWAP:
        return do_swap_page(mem, vma, address, entry, write)
    if value == 0:
        if area.vm_flags & VM_PFNMAP:
            return -EFAULT
        if area.mapping:
            return do_file_fault(mem, vma, address, write)
        return do_anonymous_page(mem, vma, address, write)
    if write and value & PTE_WRITE == 0:
        return handle_wp_fault(mem, vma, address, entry)
    mem.tables[entry] = value | PTE_YOUNG | (PTE_DIRTY if write else 0)
    return 0


@jit_entry
def populate_anonymous(mem_table, vma, start, end, write):
    """Fault in [start, end) of an anonymous vma as far as nothing has ever been there. Returns (address reached, 0 or -ENOMEM).

    Stops short of what needs :func:`populate`, which most programs never do: this is compiled much faster. Or where the
    frame log is full.
    """
    mem = unpack(mem_table)
    address = start
    while address < end and not frame_log_is_full(mem):
        entry, value, pfn = lookup_page(mem, mem.vmas[vma].mm, address)
        if value == 0:
            rc = do_anonymous_page(mem, vma, address, write)
            if rc:
                return address, rc
            entry, value, pfn = lookup_page(mem, mem.vmas[vma].mm, address)
        elif value & PTE_PRESENT == 0 or write and value & PTE_WRITE == 0:
            break
        address = (address | PMD_SIZE - 1) + 1 if value & PTE_HUGE else address + PAGE_SIZE
    return address, 0


@jit_entry
def populate(mem_table, vma, start, end, write):
    """Fault in [start, end) of any vma. Returns (address reached, 0 or the first error): before ``end`` where the frame log is full."""
    mem = unpack(mem_table)
    address = start
    while address < end and not frame_log_is_full(mem):
        entry, value, pfn = lookup_page(mem, mem.vmas[vma].mm, address)
        if value & PTE_PRESENT == 0 or write and value & PTE_WRITE == 0:
            rc = handle_fault(mem, vma, address, write)
            if rc:
                return address, rc
            entry, value, pfn = lookup_page(mem, mem.vmas[vma].mm, address)
        address = (address | PMD_SIZE - 1) + 1 if value & PTE_HUGE else address + PAGE_SIZE
    return address, 0


@jit_entry
def access(mem_table, mm, address, buffer, nbytes, write):
    """Copy between a process's memory and ``buffer`` (an address) as far as pages are accessible.

    Returns the bytes copied: all, or up to the first page that needs a fault, or until the frame log is full. Marks entries
    young, and dirty if written. FRAMES_FAR: they are copied when the log is carried out, the buffer must live so long.
    """
    mem = unpack(mem_table)
    done = 0
    while done < nbytes and not frame_log_is_full(mem):
        at = address + done
        entry, value, pfn = lookup_page(mem, mm, at)
        if value & PTE_PRESENT == 0 or write and value & PTE_WRITE == 0:
            return done
        left = (PMD_SIZE if value & PTE_HUGE else PAGE_SIZE)
        chunk = min(nbytes - done, left - (at & left - 1))
        mem.tables[entry] = value | PTE_YOUNG | (PTE_DIRTY if write else 0)
        if pfn == NO_PFN:
            fill_memory(mem, buffer + done, 0, chunk)
        elif write:
            copy_memory(mem, frame_address(mem, page_folio(mem, pfn)) + in_folio(mem, pfn, at), buffer + done, chunk)
        else:
            copy_memory(mem, buffer + done, frame_address(mem, page_folio(mem, pfn)) + in_folio(mem, pfn, at), chunk)
        done += chunk
    return done


@jit_inline
def in_folio(mem, pfn, address):
    """Byte offset of ``address``, which page ``pfn`` backs, inside that page's folio."""
    return (pfn - page_folio(mem, pfn) << PAGE_SHIFT) + (address & PAGE_SIZE - 1)


# --- sharing and going ----------------------------------------------------------------------------------------

@jit
def zap_entry(mem, vma, entry):
    """Clear one entry: the page behind it loses a mapping and a reference (and is freed with the last)."""
    area = mem.vmas[vma]
    old = mem.tables[entry]
    mem.tables[entry] = 0
    huge = old & PTE_HUGE
    nr_pages = PTRS if huge else 1
    if huge:
        free_table(mem, pgtable_withdraw(mem, area.mm))
    if old & PTE_MIGRATION:                         # the folio it stands for has dropped reference and mapcount
        add_rss(mem, area.mm, page_folio(mem, pte_pfn(old)), -nr_pages)
    elif old & PTE_PRESENT and old & PTE_SPECIAL == 0:
        pfn = page_folio(mem, pte_pfn(old))
        if old & PTE_DIRTY and mem.folios[pfn].mapping > 0:
            folio_mark_dirty(mem, pfn)
        add_rss(mem, area.mm, pfn, -nr_pages)
        folio_remove_rmap(mem, pfn, pte_pfn(old), vma, huge)
        if mem.folios[pfn].page_flags & PG_swapcache and mem.folios[pfn].mapcount == 0:
            folio_free_swap(mem, pfn)               # free_swap_cache()
        folio_put_refs(mem, pfn, 1)
    elif old & PTE_SWAP:
        swap_free(mem, pte_pfn(old))


@jit_entry
def zap_range(mem_table, vma, start, end):
    """Clear all entries of a vma in [start, end), page aligned; a PMD leaf that is only partly inside is split.

    Page tables that are empty then are freed, so that a THP fits there again (free_pgtables()).
    """
    mem = unpack(mem_table)
    area = mem.vmas[vma]
    if area.vm_flags & VM_HUGETLB:
        unmap_hugepage_range(mem, vma, start, end)
        return
    address = start
    while address < end:
        next_pmd = (address | PMD_SIZE - 1) + 1
        pmd = walk_pmd(mem, area.mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = next_pmd
            continue
        if mem.tables[pmd] & PTE_HUGE:
            if address & PMD_SIZE - 1 == 0 and next_pmd <= end:
                zap_entry(mem, vma, pmd)
                address = next_pmd
                continue
            split_pmd(mem, area.mm, pmd)
        pte = walk_pte(mem, area.mm, address)
        if mem.tables[pte]:
            zap_entry(mem, vma, pte)
        address += PAGE_SIZE
        if address & PMD_SIZE - 1 == 0 or address >= end:
            free_empty_table(mem, pmd)


@jit
def free_empty_table(mem, pmd):
    """Free the page table of a PMD entry if all of its entries are none."""
    table = mem.tables[pmd] >> PAGE_SHIFT
    for pte in range(table * PTRS, table * PTRS + PTRS):
        if mem.tables[pte]:
            return
    mem.tables[pmd] = 0
    free_table(mem, table)


@jit_entry
def split_pmds(mem_table, mm, start, end):
    """Split the PMD leaves that reach into [start, end) (split_huge_pmd_address())."""
    mem = unpack(mem_table)
    address = start
    while address < end:
        pmd = walk_pmd(mem, mm, address)
        if pmd and mem.tables[pmd] & PTE_HUGE:
            split_pmd(mem, mm, pmd)
        address = (address | PMD_SIZE - 1) + 1


@jit_entry
def change_protection(mem_table, mm, start, end, clear, set_):
    """Clear and set bits of every entry in [start, end) that maps something or is a migration entry.

    PMD leaves lie wholly inside. Kernel: change_protection() of mm/mprotect.c.
    """
    mem = unpack(mem_table)
    address = start
    while address < end:
        entry, value, page = lookup_page(mem, mm, address)
        if value & (PTE_PRESENT | PTE_MIGRATION) and value & PTE_SPECIAL == 0:
            mem.tables[entry] = value & ~clear | set_
        address = (address | PMD_SIZE - 1) + 1 if value & PTE_HUGE else address + PAGE_SIZE


@jit_entry
def move_page_tables(mem_table, mm, old_start, new_start, nbytes):
    """Move the entries of [old_start, + nbytes) to where nothing is mapped, as they are: references and mapcounts stay.

    A PMD leaf that does not arrive on a PMD boundary, or is only partly inside, is split. Kernel: move_page_tables().
    """
    mem = unpack(mem_table)
    done = 0
    while done < nbytes:
        old, new = old_start + done, new_start + done
        pmd = walk_pmd(mem, mm, old)
        if pmd == 0 or mem.tables[pmd] == 0:
            done = (old | PMD_SIZE - 1) + 1 - old_start
            continue
        if mem.tables[pmd] & PTE_HUGE:
            if old & PMD_SIZE - 1 == 0 and new & PMD_SIZE - 1 == 0 and done + PMD_SIZE <= nbytes:
                value = mem.tables[pmd]
                mem.tables[pmd] = 0
                target = walk_alloc_pmd(mem, mm, new)
                if mem.tables[target]:              # an empty page table is in the way
                    free_empty_table(mem, target)
                mem.tables[target] = value
                done += PMD_SIZE
                continue
            split_pmd(mem, mm, pmd)
        pte = walk_pte(mem, mm, old)
        value = mem.tables[pte]
        if value:
            mem.tables[pte] = 0
            mem.tables[walk_alloc_pte(mem, mm, new)] = value
        done += PAGE_SIZE
        if old + PAGE_SIZE & PMD_SIZE - 1 == 0 or done >= nbytes:
            free_empty_table(mem, pmd)


@jit_entry
def map_pfn_range(mem_table, vma, bits):
    """Map device memory in all of a vma: entries without a folio (remap_pfn_range())."""
    mem = unpack(mem_table)
    area = mem.vmas[vma]
    for address in range(area.start, area.end, PAGE_SIZE):
        mem.tables[walk_alloc_pte(mem, area.mm, address)] = ZERO_PAGE | bits


@jit_entry
def fill_page_cache(mem_table, vma, dirty):
    """Read every page of the vma's file in, in the vma's folio order and on its node. 0 or -ENOMEM."""
    mem = unpack(mem_table)
    mapping = mem.vmas[vma].mapping
    for index in range(mem.mappings[mapping].nr_slots):
        pfn = filemap_fault(mem, vma, index)
        if pfn == NO_PFN:
            return -ENOMEM
        if dirty:
            folio_mark_dirty(mem, pfn)
    return 0


@jit_entry
def copy_page_range(mem_table, vma, child):
    """Copy the entries of ``vma`` to the same addresses in vma ``child`` of a new process, for a fork.

    Anonymous pages become shared and read-only in both; a page that may be pinned is copied at once instead.
    0 or -ENOMEM (entries copied so far stay). Kernel: copy_page_range().
    """
    mem = unpack(mem_table)
    area = mem.vmas[vma]
    if area.vm_flags & VM_HUGETLB:
        return copy_hugetlb_page_range(mem, vma, child)
    address = area.start
    while address < area.end:
        pmd = walk_pmd(mem, area.mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = (address | PMD_SIZE - 1) + 1
            continue
        huge = mem.tables[pmd] & PTE_HUGE
        if huge and mem.tables[pmd] & PTE_EXCLUSIVE and folio_maybe_dma_pinned(mem, pte_pfn(mem.tables[pmd])):
            split_pmd(mem, area.mm, pmd)
            continue
        entry = pmd if huge else walk_pte(mem, area.mm, address)
        old = mem.tables[entry]
        if old:
            rc = copy_entry(mem, vma, child, address, entry)
            if rc:
                return rc
        address += PMD_SIZE if huge else PAGE_SIZE
    return 0


@jit
def copy_entry(mem, vma, child, address, entry):
    area, to = mem.vmas[vma], mem.vmas[child]
    old = mem.tables[entry]
    huge = old & PTE_HUGE
    nr_pages = np.int64(PTRS if huge else 1)
    page = pte_pfn(old)
    pfn = page_folio(mem, page) if old & PTE_SPECIAL == 0 else np.int64(NO_PFN)
    anon = pfn != NO_PFN and mem.folios[pfn].mapping < 0
    if anon and old & PTE_PRESENT and old & PTE_EXCLUSIVE and folio_maybe_dma_pinned(mem, pfn):
        return cow_page(mem, child, address, page)
    if huge and pfn != NO_PFN and not anon:
        return 0                                    # the child faults a PMD-mapped file folio in again
    if area.vm_flags & VM_SHARED == 0:
        old &= ~(PTE_WRITE | PTE_EXCLUSIVE)
        mem.tables[entry] = old
    if old & PTE_SWAP:
        swap_duplicate(mem, page)
    old &= ~PTE_UFFD_WP                             # the child's memory is not registered
    if huge:
        pgtable_deposit(mem, to.mm)
        mem.tables[walk_alloc_pmd(mem, to.mm, address)] = old
    else:
        mem.tables[walk_alloc_pte(mem, to.mm, address)] = old
    if pfn != NO_PFN:
        add_rss(mem, to.mm, pfn, nr_pages)
        if old & PTE_PRESENT:
            mem.folios[pfn].refcount += 1
            folio_add_rmap(mem, pfn, child, huge)
    return 0
