"""hugetlb folios: allocating, mapping, faulting, sharing and unmapping them, their reverse map, and isolating them.

Stands for mm/hugetlb.c (v7.3) and the hugetlb branches of mm/rmap.c and remove_migration_pte(), for folios of PMD size:
each is mapped by whole PMD leaves, is on no LRU list and in no counter of the LRU or of resident sets. The pools are
mm/hugetlb_pool.py. Leaves out reservations, page-table sharing, mremap, userfaultfd, other sizes, and the limit on
surplus folios: whoever finds the pools empty gets a surplus folio as long as a node has the memory.
"""

import numpy as np

from offload.jit import jit, jit_entry, jit_inline
from offload.mm.address_space import filemap_get_folio
from offload.mm.frames import copy_pages, poison_frames, zero_frames
from offload.mm.hugetlb_pool import dequeue_hugetlb_folio, enqueue_hugetlb_folio
from offload.mm.memmap import (
    NO_PFN, PG_dirty, PG_hugetlb, PG_hugetlb_migratable, PG_hugetlb_temporary, PG_hwpoison, PG_uptodate, VM_SHARED, VM_WRITE, unpack,
)
from offload.mm.mempolicy import (
    ALL_NODES, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY, first_node, home_node, interleave_nid,
    zonelist_node,
)
from offload.mm.node import alloc_pages_node, folio_isolate_lru, folio_maybe_dma_pinned, folio_put, node_stat_add_isolated
from offload.mm.pagetable import (
    PMD_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_HUGE, PTE_HWPOISON, PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, PTE_YOUNG,
    pte_is_migration, pte_pfn, rmap_first, rmap_next, rmap_vma, set_pte, vma_address, walk_alloc_pmd, walk_pmd,
)
from offload.units import EAGAIN, EFAULT, ENOMEM, HPAGE_PMD_ORDER, PAGE_SHIFT

__all__ = ("HPAGE_NR", "alloc_hugetlb_pool", "dequeue_hugetlb_folio_nodemask", "alloc_migrate_hugetlb_folio",
           "move_hugetlb_state", "folio_isolate_hugetlb", "folio_putback_hugetlb", "isolate_folio", "hugetlb_fault",
           "copy_hugetlb_page_range", "unmap_hugepage_range", "try_to_migrate_hugetlb", "remove_hugetlb_migration_ptes")

HPAGE_NR = 1 << HPAGE_PMD_ORDER
"""Base pages of a hugetlb folio (pages_per_huge_page())."""
PTE_BITS = (1 << PAGE_SHIFT) - 1


# --- allocating -----------------------------------------------------------------------------------------------

@jit
def alloc_fresh_hugetlb_folio(mem, nid):
    """A hugetlb folio made of free memory of node ``nid``, with one reference; it counts in nr_hugepages. Or NO_PFN."""
    pfn = alloc_pages_node(mem, nid, np.int64(HPAGE_PMD_ORDER))
    if pfn != NO_PFN:
        mem.folios[pfn].page_flags = PG_hugetlb
        mem.nodes[nid].nr_hugepages += 1
    return pfn


@jit_entry
def alloc_hugetlb_pool(mem_table, nid, nr):
    """Add ``nr`` folios to a node's pool, as writing to nr_hugepages does. Returns how many there was memory for."""
    mem = unpack(mem_table)
    for done in range(nr):
        pfn = alloc_fresh_hugetlb_folio(mem, nid)
        if pfn == NO_PFN:
            return done
        enqueue_hugetlb_folio(mem, pfn)
    return nr


@jit
def dequeue_hugetlb_folio_nodemask(mem, nid, nmask):
    """A free folio of a pool: the first node of the zonelist of ``nid`` that has one and is in ``nmask``. Or NO_PFN."""
    for i in range(mem.sys[0].nr_nodes):
        other = zonelist_node(mem, nid, i)
        if nmask >> other & 1 and mem.nodes[other].free_hugepages:
            pfn = dequeue_hugetlb_folio(mem, other)
            if pfn != NO_PFN:
                if mem.sys[0].poison:
                    poison_frames(mem, pfn, np.int64(HPAGE_NR))
                return pfn
    return np.int64(NO_PFN)


@jit
def alloc_fresh_hugetlb_folio_nodemask(mem, nid, nmask):
    """As alloc_fresh_hugetlb_folio(), on the first node of the zonelist of ``nid`` with room that is in ``nmask``."""
    for i in range(mem.sys[0].nr_nodes):
        other = zonelist_node(mem, nid, i)
        if nmask >> other & 1:
            pfn = alloc_fresh_hugetlb_folio(mem, other)
            if pfn != NO_PFN:
                return pfn
    return np.int64(NO_PFN)


@jit
def alloc_migrate_hugetlb_folio(mem, nid, nmask):
    """A folio to migrate to that no pool has: temporary, which is no surplus. Or NO_PFN."""
    pfn = alloc_fresh_hugetlb_folio_nodemask(mem, nid, nmask)
    if pfn != NO_PFN:
        mem.folios[pfn].page_flags |= PG_hugetlb_temporary
    return pfn


@jit
def huge_node(mem, vma, index):
    """(node to begin at, nodes allowed, nodes of a second attempt or 0) for page ``index`` of a vma, by its policy."""
    area = mem.vmas[vma]
    everywhere = np.int64(ALL_NODES)
    if area.pol_mode == 0:
        return area.nid, everywhere, np.int64(0)
    if area.pol_mode == MPOL_INTERLEAVE:
        return interleave_nid(mem, area.pol_nodes, index - area.pol_ilx >> HPAGE_PMD_ORDER), everywhere, np.int64(0)
    if area.pol_mode == MPOL_LOCAL:
        return home_node(mem), everywhere, np.int64(0)
    nid = first_node(mem, area.pol_nodes)
    if area.pol_mode == MPOL_BIND:
        return nid, area.pol_nodes, np.int64(0)
    if area.pol_mode == MPOL_PREFERRED_MANY:
        return nid, area.pol_nodes, everywhere
    return nid, everywhere, np.int64(0)


@jit
def alloc_hugetlb_folio(mem, vma, index):
    """A folio for page ``index`` of a vma: from the pools, else a surplus one, both as its policy wants. Or NO_PFN."""
    nid, nmask, nmask_next = huge_node(mem, vma, index)
    pfn = dequeue_hugetlb_folio_nodemask(mem, nid, nmask)
    if pfn == NO_PFN and nmask_next:
        pfn = dequeue_hugetlb_folio_nodemask(mem, nid, nmask_next)
    if pfn != NO_PFN:
        return pfn
    pfn = alloc_fresh_hugetlb_folio_nodemask(mem, nid, nmask)
    if pfn == NO_PFN and nmask_next:
        pfn = alloc_fresh_hugetlb_folio_nodemask(mem, nid, nmask_next)
    if pfn != NO_PFN:
        mem.nodes[mem.folios[pfn].nid].surplus_hugepages += 1
    return pfn


@jit
def move_hugetlb_state(mem, src, dst):
    """After a migration: ``dst`` is in use, and a temporary one changes places with ``src``, which will be freed.

    So a move to a node with an empty pool takes a folio out of one node's pool and adds one to the other's; surplus goes
    along.
    """
    old, new = mem.folios[src], mem.folios[dst]
    new.page_flags |= PG_hugetlb_migratable
    if new.page_flags & PG_hugetlb_temporary:
        new.page_flags &= ~PG_hugetlb_temporary
        old.page_flags |= PG_hugetlb_temporary
        if old.nid != new.nid and mem.nodes[old.nid].surplus_hugepages:
            mem.nodes[old.nid].surplus_hugepages -= 1
            mem.nodes[new.nid].surplus_hugepages += 1


# --- isolating ------------------------------------------------------------------------------------------------

@jit
def folio_isolate_hugetlb(mem, pfn):
    """Take the folio for migration with a reference of the caller's. False if somebody else has."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_hugetlb_migratable == 0:
        return False
    folio.page_flags &= ~PG_hugetlb_migratable
    folio.refcount += 1
    return True


@jit
def folio_putback_hugetlb(mem, pfn):
    """Give back an isolated folio: migratable again, and the isolation reference dropped (which may free it)."""
    mem.folios[pfn].page_flags |= PG_hugetlb_migratable
    folio_put(mem, pfn)


@jit_inline
def isolate_folio(mem, pfn):
    """Isolate a folio of either kind for migration, NR_ISOLATED included. False if it cannot be."""
    if mem.folios[pfn].page_flags & PG_hugetlb:
        return folio_isolate_hugetlb(mem, pfn)
    if not folio_isolate_lru(mem, pfn):
        return False
    node_stat_add_isolated(mem, pfn, 1)
    return True


# --- mapping --------------------------------------------------------------------------------------------------

@jit
def set_huge_pte(mem, vma, entry, pfn, bits):
    """Map the folio by a PMD leaf: mapcount; the reference is the caller's (hugetlb_add_anon_rmap(), _file_rmap())."""
    set_pte(mem, entry, pfn, bits | PTE_HUGE)
    mem.folios[pfn].mapcount += 1
    mem.folios[pfn].entire_mapcount += 1


@jit
def clear_huge_pte(mem, pfn):
    """A PMD leaf less maps the folio (hugetlb_remove_rmap())."""
    mem.folios[pfn].mapcount -= 1
    mem.folios[pfn].entire_mapcount -= 1


@jit
def hugetlb_add_to_page_cache(mem, mapping, pfn, index):
    """Enter a folio into its file: a reference for each of its base pages. It is in no counter of the page cache."""
    folio = mem.folios[pfn]
    folio.mapping = np.int32(mapping)
    folio.index = index
    folio.refcount += np.int32(HPAGE_NR)
    mem.mappings[mapping].nrpages += HPAGE_NR
    hugetlb_fill_slots(mem, pfn)


@jit
def hugetlb_fill_slots(mem, pfn):
    """Let the slots of its file hold the folio, by its mapping and index."""
    first = mem.mappings[mem.folios[pfn].mapping].slots + mem.folios[pfn].index
    for slot in range(first, first + HPAGE_NR):
        mem.slots[slot] = pfn


@jit
def hugetlb_no_page(mem, vma, address, write):
    """Map a folio where none is: of the file in a shared vma, fresh and exclusive in a private one. 0, -ENOMEM, -EFAULT."""
    area = mem.vmas[vma]
    index = area.pgoff + (address - area.start >> PAGE_SHIFT)
    shared = area.vm_flags & VM_SHARED
    pfn = np.int64(NO_PFN)
    if shared:
        if index + HPAGE_NR > mem.mappings[area.mapping].nr_slots:
            return -EFAULT
        pfn = filemap_get_folio(mem, area.mapping, index)
    if pfn == NO_PFN:
        pfn = alloc_hugetlb_folio(mem, vma, index)
        if pfn == NO_PFN:
            return -ENOMEM
        zero_frames(mem, pfn, np.int64(HPAGE_NR))
        mem.folios[pfn].page_flags |= PG_uptodate | PG_hugetlb_migratable
        if shared:
            hugetlb_add_to_page_cache(mem, area.mapping, pfn, index)
        else:
            mem.folios[pfn].mapping = -np.int32(area.anon_vma)
            mem.folios[pfn].index = index
    else:
        mem.folios[pfn].refcount += 1
    bits = PTE_PRESENT | PTE_YOUNG
    if not shared:
        bits |= PTE_EXCLUSIVE
    if area.vm_flags & VM_WRITE and (shared or write):
        bits |= PTE_WRITE | PTE_DIRTY
    set_huge_pte(mem, vma, walk_alloc_pmd(mem, area.mm, address), pfn, bits)
    mem.mms[area.mm].hugetlb_usage += HPAGE_NR
    return 0


@jit
def hugetlb_wp(mem, vma, address, entry):
    """A write to a folio that is mapped read-only: reused if nobody else maps it, else copied. 0 or -ENOMEM."""
    area = mem.vmas[vma]
    old = mem.tables[entry]
    folio = mem.folios[pte_pfn(old)]
    if area.vm_flags & VM_SHARED or folio.mapping < 0 and folio.mapcount == 1:
        exclusive = 0 if area.vm_flags & VM_SHARED else PTE_EXCLUSIVE
        mem.tables[entry] = old | PTE_WRITE | PTE_DIRTY | PTE_YOUNG | exclusive
        return 0
    return hugetlb_copy_page(mem, vma, address, entry, pte_pfn(old))


@jit
def hugetlb_copy_page(mem, vma, address, entry, old_pfn):
    """Map a private copy of a folio at ``entry``; what that maps, if anything, goes. 0 or -ENOMEM."""
    area = mem.vmas[vma]
    index = area.pgoff + (address - area.start >> PAGE_SHIFT)
    pfn = alloc_hugetlb_folio(mem, vma, index)
    if pfn == NO_PFN:
        return -ENOMEM
    copy_pages(mem, pfn, old_pfn, np.int64(HPAGE_NR))
    folio = mem.folios[pfn]
    folio.page_flags |= PG_uptodate | PG_hugetlb_migratable
    folio.mapping = -np.int32(area.anon_vma)
    folio.index = index
    if mem.tables[entry]:
        zap_huge_entry(mem, vma, entry)
    bits = PTE_PRESENT | PTE_YOUNG | PTE_DIRTY | PTE_EXCLUSIVE
    if area.vm_flags & VM_WRITE:
        bits |= PTE_WRITE
    set_huge_pte(mem, vma, entry, pfn, bits)
    mem.mms[area.mm].hugetlb_usage += HPAGE_NR
    return 0


@jit
def hugetlb_fault(mem, vma, address, write):
    """As handle_fault(), in a hugetlb vma; the protection has been checked."""
    area = mem.vmas[vma]
    address &= ~(PMD_SIZE - 1)
    entry = walk_pmd(mem, area.mm, address)
    value = mem.tables[entry] if entry else np.int64(0)
    if value == 0:
        return hugetlb_no_page(mem, vma, address, write)
    if value & PTE_MIGRATION:
        return -EAGAIN
    if value & PTE_HWPOISON:                        # VM_FAULT_HWPOISON_LARGE: SIGBUS
        return -EFAULT
    if write and value & PTE_WRITE == 0:
        return hugetlb_wp(mem, vma, address, entry)
    mem.tables[entry] = value | PTE_YOUNG | (PTE_DIRTY if write else 0)
    return 0


@jit
def zap_huge_entry(mem, vma, entry):
    """Clear one entry: the folio behind it loses a mapping and a reference (and is freed with the last)."""
    old = mem.tables[entry]
    mem.tables[entry] = 0
    if old & PTE_HWPOISON == 0:
        mem.mms[mem.vmas[vma].mm].hugetlb_usage -= HPAGE_NR
    if old & PTE_PRESENT:                           # a migration entry has neither
        pfn = pte_pfn(old)
        if old & PTE_DIRTY:
            mem.folios[pfn].page_flags |= PG_dirty
        clear_huge_pte(mem, pfn)
        folio_put(mem, pfn)


@jit
def unmap_hugepage_range(mem, vma, start, end):
    """Clear the entries of a hugetlb vma in [start, end), which is aligned to its pages."""
    for address in range(start, end, PMD_SIZE):
        entry = walk_pmd(mem, mem.vmas[vma].mm, address)
        if entry and mem.tables[entry]:
            zap_huge_entry(mem, vma, entry)


@jit
def copy_hugetlb_page_range(mem, vma, child):
    """copy_page_range() of a hugetlb vma: private folios become shared and read-only, one that may be pinned is copied.

    0 or -ENOMEM (entries copied so far stay).
    """
    area, to = mem.vmas[vma], mem.vmas[child]
    for address in range(area.start, area.end, PMD_SIZE):
        entry = walk_pmd(mem, area.mm, address)
        old = mem.tables[entry] if entry else np.int64(0)
        if old == 0:
            continue
        pfn = pte_pfn(old)
        there = walk_alloc_pmd(mem, to.mm, address)
        if old & PTE_PRESENT and old & PTE_EXCLUSIVE and folio_maybe_dma_pinned(mem, pfn):
            rc = hugetlb_copy_page(mem, child, address, there, pfn)
            if rc:
                return rc
            continue
        if old & PTE_HWPOISON:
            mem.tables[there] = old
            continue
        if area.vm_flags & VM_SHARED == 0:
            old &= ~(PTE_WRITE | PTE_EXCLUSIVE)
            mem.tables[entry] = old
        mem.mms[to.mm].hugetlb_usage += HPAGE_NR
        if old & PTE_PRESENT:
            mem.folios[pfn].refcount += 1
            set_huge_pte(mem, child, there, pfn, old & PTE_BITS)
        else:
            mem.tables[there] = old
    return 0


# --- the reverse map (mm/rmap.c, remove_migration_pte()) ------------------------------------------------------

@jit
def hugetlb_entry(mem, pfn, vma):
    """Index of the entry at which a vma would map the folio, by its index; 0 if that lies outside."""
    area = mem.vmas[vma]
    address = vma_address(mem, vma, mem.folios[pfn].index)
    if address < area.start or address >= area.end:
        return np.int64(0)
    return walk_pmd(mem, area.mm, address)


@jit
def try_to_migrate_hugetlb(mem, pfn):
    """try_to_migrate() of a hugetlb folio, locked and isolated: every entry that maps it becomes a migration entry.

    Afterwards ``mapcount`` is 0, unless the folio is exclusive and may be pinned: then the walk stops there, and the caller
    restores what has been replaced. The TLB is flushed at each entry. Entries of a poisoned folio become hwpoison entries,
    which leave the process's count and never come back.
    """
    folio = mem.folios[pfn]
    cursor = rmap_first(mem, pfn)
    while cursor and folio.mapcount:
        entry = hugetlb_entry(mem, pfn, rmap_vma(mem, pfn, cursor))
        old = mem.tables[entry] if entry else np.int64(0)
        if old & PTE_PRESENT and pte_pfn(old) == pfn:
            if old & PTE_DIRTY:
                folio.page_flags |= PG_dirty
            if old & PTE_EXCLUSIVE and folio_maybe_dma_pinned(mem, pfn):
                return
            mem.tables[entry] = old & ~PTE_PRESENT | PTE_MIGRATION
            if folio.page_flags & PG_hwpoison:
                set_pte(mem, entry, pfn, PTE_HUGE | PTE_HWPOISON | PTE_SPECIAL)
                mem.mms[mem.vmas[rmap_vma(mem, pfn, cursor)].mm].hugetlb_usage -= HPAGE_NR
            clear_huge_pte(mem, pfn)
            folio.refcount -= 1                     # never the last: the caller holds the isolation reference
        cursor = rmap_next(mem, pfn, cursor)


@jit
def remove_hugetlb_migration_ptes(mem, src, dst):
    """remove_migration_ptes() of a hugetlb folio: its migration entries become entries for ``dst`` (or for ``src`` again)."""
    folio = mem.folios[dst]
    cursor = rmap_first(mem, dst)
    while cursor:
        vma = rmap_vma(mem, dst, cursor)
        entry = hugetlb_entry(mem, dst, vma)
        old = mem.tables[entry] if entry else np.int64(0)
        if pte_is_migration(old) and pte_pfn(old) == src:
            bits = old & PTE_BITS & ~PTE_MIGRATION | PTE_PRESENT
            if mem.vmas[vma].vm_flags & VM_WRITE == 0:
                bits &= ~PTE_WRITE
            if folio.page_flags & PG_dirty == 0:
                bits &= ~PTE_DIRTY
            folio.refcount += 1
            set_huge_pte(mem, vma, entry, dst, bits)
        cursor = rmap_next(mem, dst, cursor)
