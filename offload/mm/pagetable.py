"""Page tables, migration entries and the reverse map.

Stands for the four-level page tables of x86-64, include/linux/swapops.h (migration entries), mm/rmap.c
(try_to_migrate) and remove_migration_ptes() of mm/migrate.c (v7.3). Leaves out uprobes, device
private entries, secondary MMUs and the lock order (nothing else runs inside a step).

A page table is 512 int64 entries of Memory.tables. An entry is a pfn (or the number of a lower table) above
PAGE_SHIFT and bits below; 0 is none. A migration entry is the entry it replaced without PRESENT: whether it was
writable, exclusive, young, dirty stands in the same bits, and the pfn is the source's. A hwpoison entry keeps the pfn of
the bad page and maps no folio.
"""

import numpy as np

from offload.intrinsics import prefetch_record
from offload.jit import jit, jit_entry, jit_inline
from offload.mm.address_space import folio_mark_dirty, swap_duplicate
from offload.mm.memmap import (
    PG_dirty, PG_hwpoison, PG_ksm, PG_lru, PG_mlocked, PG_partially_mapped, PG_swapbacked, PG_zone_device, VM_LOCKED, VM_WRITE, folio_test_anon, page_folio, unpack,
)
from offload.mm.node import deferred_split_folio, folio_maybe_dma_pinned, lru_readd
from offload.units import HPAGE_PMD_ORDER, PAGE_SHIFT

__all__ = (
    "PTE_PRESENT", "PTE_WRITE", "PTE_DIRTY", "PTE_YOUNG", "PTE_EXCLUSIVE", "PTE_HUGE", "PTE_SPECIAL",
    "PTE_MIGRATION", "PTE_HWPOISON", "PTE_UFFD_WP", "PTE_SWAP", "pte_pfn", "pte_is_migration", "walk_pmd", "walk_pte", "walk_alloc_pte", "walk_alloc_pmd",
    "set_pte", "free_table", "pgtable_deposit", "pgtable_withdraw", "split_pmd", "folio_add_rmap", "folio_remove_rmap", "add_rss", "try_to_migrate", "try_to_unmap", "remove_migration_ptes", "new_table", "pgd_alloc", "free_pgtables",
)

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_YOUNG = 1 << 2
PTE_DIRTY = 1 << 3
PTE_EXCLUSIVE = 1 << 4              # AnonExclusive
PTE_HUGE = 1 << 5                   # a leaf at PMD level
PTE_SPECIAL = 1 << 6                # maps no folio: the zero page, device memory
PTE_MIGRATION = 1 << 7              # not PRESENT: a migration entry
PTE_HWPOISON = 1 << 8               # not PRESENT, SPECIAL: access to it is SIGBUS
PTE_UFFD_WP = 1 << 9               # write-protected through userfaultfd; stays over a migration or a swap-out
PTE_SWAP = 1 << 10                  # not PRESENT, SPECIAL: swapped out; a swap entry stands in place of the pfn
PTE_BITS = (1 << PAGE_SHIFT) - 1
ZERO_PAGE = PTE_PRESENT | PTE_SPECIAL
"""The entry that maps the shared zero page: readable, never writable, no folio."""

PTRS = 512
PMD_SHIFT = PAGE_SHIFT + HPAGE_PMD_ORDER
PMD_SIZE = 1 << PMD_SHIFT
TASK_SIZE = 1 << 47


# --- walking --------------------------------------------------------------------------------------------------

@jit_inline
def pte_pfn(entry):
    return entry >> PAGE_SHIFT


@jit_inline
def pte_is_migration(entry):
    return entry & PTE_MIGRATION != 0


@jit_inline
def walk_pmd(mem, mm, address):
    """Index in ``mem.tables`` of the PMD entry for ``address``, or 0 if a level above is missing."""
    table = mem.mms[mm].pgd
    table = mem.tables[table * PTRS + (address >> 39 & 511)] >> PAGE_SHIFT
    if table == 0:
        return np.int64(0)
    table = mem.tables[table * PTRS + (address >> 30 & 511)] >> PAGE_SHIFT
    if table == 0:
        return np.int64(0)
    return table * PTRS + (address >> 21 & 511)


@jit_inline
def walk_pte(mem, mm, address):
    """Index of the PTE for ``address``, or 0 if there is no page table there (none, or a PMD leaf)."""
    pmd = walk_pmd(mem, mm, address)
    if pmd == 0 or mem.tables[pmd] == 0 or mem.tables[pmd] & PTE_HUGE:
        return np.int64(0)
    return (mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & 511)


@jit
def new_table(mem):
    """An empty page-table page; the Python layer has made sure that there is one (Machine.reserve_tables)."""
    sys = mem.sys[0]
    table = sys.free_table
    if table:
        sys.free_table = mem.tables[table * PTRS]
        mem.tables[table * PTRS] = 0
        return table
    table = sys.nr_tables
    sys.nr_tables += 1
    return table


@jit
def walk_alloc_pmd(mem, mm, address):
    """As walk_pmd(), with the missing levels made (pmd_alloc())."""
    table = mem.mms[mm].pgd
    for shift in (39, 30):
        entry = table * PTRS + (address >> shift & 511)
        if mem.tables[entry] == 0:
            mem.tables[entry] = new_table(mem) << PAGE_SHIFT | PTE_PRESENT
        table = mem.tables[entry] >> PAGE_SHIFT
    return table * PTRS + (address >> 21 & 511)


@jit
def walk_alloc_pte(mem, mm, address):
    """As walk_pte(), with the missing levels made (pte_alloc()). 0 if a PMD leaf is in the way."""
    pmd = walk_alloc_pmd(mem, mm, address)
    if mem.tables[pmd] & PTE_HUGE:
        return np.int64(0)
    if mem.tables[pmd] == 0:
        mem.tables[pmd] = new_table(mem) << PAGE_SHIFT | PTE_PRESENT
    return (mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & 511)


@jit
def free_table(mem, table):
    """Give a page-table page back. All of its entries are none."""
    mem.tables[table * PTRS] = mem.sys[0].free_table
    mem.sys[0].free_table = table


@jit
def pgtable_deposit(mem, mm):
    """Set a page table aside for the PMD leaf that is about to be mapped (pgtable_trans_huge_deposit())."""
    table = new_table(mem)
    mem.tables[table * PTRS] = mem.mms[mm].deposited
    mem.mms[mm].deposited = table


@jit
def pgtable_withdraw(mem, mm):
    """Take one of the tables set aside; its entries are none."""
    table = mem.mms[mm].deposited
    mem.mms[mm].deposited = mem.tables[table * PTRS]
    mem.tables[table * PTRS] = 0
    return table


@jit
def split_pmd(mem, mm, pmd):
    """Replace a PMD leaf, present or migration entry, by 512 PTEs for the same pages (__split_huge_pmd_locked())."""
    old = mem.tables[pmd]
    table = pgtable_withdraw(mem, mm)
    bits = old & PTE_BITS & ~PTE_HUGE
    if old & PTE_SPECIAL:                           # the huge zero page
        for i in range(PTRS):
            mem.tables[table * PTRS + i] = bits
        mem.tables[pmd] = table << PAGE_SHIFT | PTE_PRESENT
        return
    for i in range(PTRS):
        mem.tables[table * PTRS + i] = pte_pfn(old) + i << PAGE_SHIFT | bits
    mem.tables[pmd] = table << PAGE_SHIFT | PTE_PRESENT
    if old & PTE_PRESENT:
        folio = mem.folios[page_folio(mem, pte_pfn(old))]
        folio.entire_mapcount -= 1
        folio.mapcount += PTRS - 1
        folio.refcount += PTRS - 1


@jit_entry
def pgd_alloc(mem_table):
    """The top page table of a new process."""
    return new_table(unpack(mem_table))


@jit_entry
def free_pgtables(mem_table, mm):
    """Give back all page tables of a process whose entries are all none."""
    mem = unpack(mem_table)
    pgd = mem.mms[mm].pgd
    for i in range(pgd * PTRS, pgd * PTRS + PTRS):
        p4d = mem.tables[i] >> PAGE_SHIFT
        if p4d:
            for j in range(p4d * PTRS, p4d * PTRS + PTRS):
                pud = mem.tables[j] >> PAGE_SHIFT
                if pud:
                    for k in range(pud * PTRS, pud * PTRS + PTRS):
                        if mem.tables[k]:
                            free_table(mem, mem.tables[k] >> PAGE_SHIFT)
                            mem.tables[k] = 0
                    mem.tables[j] = 0
                    free_table(mem, pud)
            mem.tables[i] = 0
            free_table(mem, p4d)
    free_table(mem, pgd)


# --- mapping and unmapping one entry (folio_add_rmap_*, folio_remove_rmap_* of mm/rmap.c) ---------------------

@jit_inline
def folio_add_rmap(mem, folio_pfn, vma, huge):
    """One more page-table entry maps the folio: mapcount, NR_*_MAPPED with the first, mlock in a VM_LOCKED vma.

    ``huge`` is PTE_HUGE for a PMD leaf, else 0.
    """
    folio = mem.folios[folio_pfn]
    folio.mapcount += 1
    if huge:
        folio.entire_mapcount += 1
    nr_pages = np.int64(1) << folio.order
    if folio.mapcount == 1:
        if folio.mapping < 0:
            mem.nodes[folio.nid].nr_anon_mapped += nr_pages
        else:
            mem.nodes[folio.nid].nr_file_mapped += nr_pages
    if mem.vmas[vma].vm_flags & VM_LOCKED and folio.page_flags & PG_mlocked == 0:
        folio.page_flags |= PG_mlocked
        mem.nodes[folio.nid].nr_mlock += nr_pages
        lru_readd(mem, folio_pfn)


@jit_inline
def folio_remove_rmap(mem, folio_pfn, page, vma, huge):
    """One entry less, which is gone from the page table already: a PMD leaf if ``huge``, else the PTE of ``page``.

    mapcount, NR_*_MAPPED with the last; leaving the last VM_LOCKED vma takes the mlocked mark off. A large anonymous folio of
    which only some pages are mapped now is queued for splitting, which the next migration of it will act upon.
    """
    folio = mem.folios[folio_pfn]
    folio.mapcount -= 1
    if huge:
        folio.entire_mapcount -= 1
    nr_pages = np.int64(1) << folio.order
    if folio.mapcount == 0:
        if folio.mapping < 0:
            mem.nodes[folio.nid].nr_anon_mapped -= nr_pages
        else:
            mem.nodes[folio.nid].nr_file_mapped -= nr_pages
    elif nr_pages > 2 and folio.mapping < 0 and folio.entire_mapcount == 0 and folio.page_flags & PG_partially_mapped == 0 \
            and (folio.mapcount < nr_pages or has_unmapped(mem, folio_pfn, page, page if huge == 0 else folio_pfn + nr_pages - 1)):
        deferred_split_folio(mem, folio_pfn, True)
    if mem.vmas[vma].vm_flags & VM_LOCKED and folio.page_flags & PG_mlocked:
        munlock_vma_folio(mem, folio_pfn, vma)


@jit
def has_unmapped(mem, folio_pfn, first, last):
    """Whether any of pages ``first`` .. ``last`` of a folio is mapped by no PTE (page->_mapcount; there are no PMD leaves)."""
    for page in range(first, last + 1):
        mapped = False
        cursor = rmap_first(mem, folio_pfn)
        while cursor and not mapped:
            vma = rmap_vma(mem, folio_pfn, cursor)
            address = vma_address(mem, vma, mem.folios[folio_pfn].index + page - folio_pfn)
            if mem.vmas[vma].start <= address < mem.vmas[vma].end:
                pte = walk_pte(mem, mem.vmas[vma].mm, address)
                old = mem.tables[pte] if pte else np.int64(0)
                mapped = old & PTE_PRESENT != 0 and old & PTE_SPECIAL == 0 and pte_pfn(old) == page
            cursor = rmap_next(mem, folio_pfn, cursor)
        if not mapped:
            return True
    return False


@jit
def munlock_vma_folio(mem, folio_pfn, vma):
    """A mapping in a VM_LOCKED vma has gone: the mlocked mark goes, unless the folio is on the LRU and another such vma maps it.

    Kernel: munlock_vma_folio(); its mlock_count, too, is valid only while the folio is on the unevictable list.
    """
    folio = mem.folios[folio_pfn]
    if folio.page_flags & PG_lru and folio.mapcount and folio.page_flags & PG_ksm == 0:
        cursor = rmap_first(mem, folio_pfn)
        while cursor:
            other = rmap_vma(mem, folio_pfn, cursor)
            if mem.vmas[other].vm_flags & VM_LOCKED and vma_maps_folio(mem, other, folio_pfn):
                return
            cursor = rmap_next(mem, folio_pfn, cursor)
    folio.page_flags &= ~PG_mlocked
    mem.nodes[folio.nid].nr_mlock -= np.int64(1) << folio.order
    lru_readd(mem, folio_pfn)


@jit_inline
def add_rss(mem, mm, folio_pfn, nr_pages):
    """Count pages of the folio in (or out of) the process's resident set."""
    folio = mem.folios[folio_pfn]
    if folio.mapping < 0:
        mem.mms[mm].rss_anon += nr_pages
    elif folio.page_flags & PG_swapbacked:
        mem.mms[mm].rss_shmem += nr_pages
    else:
        mem.mms[mm].rss_file += nr_pages


@jit_inline
def set_pte(mem, entry, pfn, bits):
    mem.tables[entry] = pfn << PAGE_SHIFT | bits


# --- the reverse map (mm/rmap.c) ------------------------------------------------------------------------------
#
# An anonymous folio is found through its anon_vma's chain of vmas, a page-cache folio through the i_mmap chain
# of its file; in each vma the folio's index gives the address. Both walks below take the same steps: the next
# vma, the address, then the PMD leaf or the PTEs there that belong to the folio.

@jit_inline
def rmap_first(mem, folio_pfn):
    """Cursor at the first vma that may map the folio: an avc (anon) or a vma (file); 0 at the end."""
    mapping = np.int64(mem.folios[folio_pfn].mapping)
    if mapping < 0:
        return mem.anon_vmas[-mapping].first_avc
    return mem.mappings[mapping].first_vma


@jit_inline
def rmap_vma(mem, folio_pfn, cursor):
    return mem.avcs[cursor].vma if folio_test_anon(mem, folio_pfn) else cursor


@jit_inline
def rmap_next(mem, folio_pfn, cursor):
    if folio_test_anon(mem, folio_pfn):
        return mem.avcs[cursor].next_of_anon_vma
    return mem.vmas[cursor].next_in_mapping


@jit_inline
def prefetch_entry(mem, folio_pfn):
    """Ask for the page-table entry that the first step of the folio's reverse map leads to; its index, or 0."""
    cursor = rmap_first(mem, folio_pfn)
    if cursor == 0:
        return np.int64(0)
    vma = rmap_vma(mem, folio_pfn, cursor)
    area = mem.vmas[vma]
    address = vma_address(mem, vma, mem.folios[folio_pfn].index)
    if address < area.start or address >= area.end:
        return np.int64(0)
    entry = walk_pte(mem, area.mm, address)
    prefetch_record(mem.tables, entry)
    return entry


@jit_inline
def vma_address(mem, vma, index):
    """Address at which page ``index`` of the mapping would stand in the vma; may lie outside it."""
    area = mem.vmas[vma]
    return area.start + (index - area.pgoff << PAGE_SHIFT)


@jit
def vma_maps_folio(mem, vma, folio_pfn):
    """Whether an entry of the vma maps a page of the folio."""
    area = mem.vmas[vma]
    nr_pages = np.int64(1) << mem.folios[folio_pfn].order
    address = vma_address(mem, vma, mem.folios[folio_pfn].index)
    end = min(address + (nr_pages << PAGE_SHIFT), area.end)
    address = max(address, area.start)
    while address < end:
        pmd = walk_pmd(mem, area.mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = (address | PMD_SIZE - 1) + 1
            continue
        huge = mem.tables[pmd] & PTE_HUGE
        entry = mem.tables[pmd] if huge else mem.tables[(mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & 511)]
        if entry & PTE_PRESENT and entry & PTE_SPECIAL == 0 and folio_pfn <= pte_pfn(entry) < folio_pfn + nr_pages:
            return True
        address = (address | PMD_SIZE - 1) + 1 if huge else address + (1 << PAGE_SHIFT)
    return False


@jit
def folio_mapped_by_others(mem, folio_pfn, mm):
    """Whether a process other than ``mm`` maps a page of the folio."""
    cursor = rmap_first(mem, folio_pfn)
    while cursor:
        vma = rmap_vma(mem, folio_pfn, cursor)
        if mem.vmas[vma].mm != mm and vma_maps_folio(mem, vma, folio_pfn):
            return True
        cursor = rmap_next(mem, folio_pfn, cursor)
    return False


@jit_inline
def try_to_migrate_entry(mem, folio_pfn, vma, entry):
    """Replace one present entry by a migration entry. False if the folio may be pinned; the entry then stands.

    Steps 3 to 7 of the unmap: clear, note dirty, give up exclusiveness, store the entry, drop rmap and reference.
    """
    folio = mem.folios[folio_pfn]
    old = mem.tables[entry]
    if old & PTE_DIRTY:
        folio_mark_dirty(mem, folio_pfn)
    if old & PTE_EXCLUSIVE and folio_maybe_dma_pinned(mem, folio_pfn):
        return False
    mem.tables[entry] = old & ~PTE_PRESENT | PTE_MIGRATION
    if folio.page_flags & PG_hwpoison:
        set_hwpoison_entry(mem, folio_pfn, vma, entry)
    folio_remove_rmap(mem, folio_pfn, pte_pfn(old), vma, old & PTE_HUGE)
    folio.refcount -= 1                             # never the last: the caller holds the isolation reference
    return True


@jit
def set_hwpoison_entry(mem, folio_pfn, vma, entry):
    """Make the migration entry for the poisoned page a hwpoison entry: it leaves the resident set and never comes back.

    Only the first page of a folio is the bad one; a PMD leaf becomes a migration entry whatever it maps.
    """
    old = mem.tables[entry]
    if old & PTE_HUGE == 0 and pte_pfn(old) == folio_pfn:
        set_pte(mem, entry, folio_pfn, PTE_HWPOISON | PTE_SPECIAL)
        add_rss(mem, mem.vmas[vma].mm, folio_pfn, -1)


@jit
def try_to_migrate(mem, folio_pfn):
    """Replace every page-table entry that maps the folio by a migration entry. The folio is locked and isolated.

    Afterwards ``mapcount`` is 0, unless an exclusive page may be pinned: then the walk stops and what it had
    replaced stays replaced (the caller restores it). Whether TLB flushes are batched is the caller's affair.

    ``migrate_info`` of the folio is 0 then: remove_migration_ptes() must walk as well.

    Kernel: try_to_migrate() with try_to_migrate_one(). Device memory that is neither private nor coherent stays mapped.
    """
    folio = mem.folios[folio_pfn]
    if folio.page_flags & (PG_ksm | PG_zone_device):
        if folio.page_flags & PG_zone_device == 0:
            walk_ksm(mem, folio_pfn, folio_pfn, True)
        return
    folio.migrate_info = 0
    nr_pages = np.int64(1) << folio.order
    cursor = rmap_first(mem, folio_pfn)
    while cursor and folio.mapcount:
        vma = rmap_vma(mem, folio_pfn, cursor)
        area = mem.vmas[vma]
        address = vma_address(mem, vma, folio.index)
        end = min(address + (nr_pages << PAGE_SHIFT), area.end)
        address = max(address, area.start)
        while address < end:
            pmd = walk_pmd(mem, area.mm, address)
            if pmd and mem.tables[pmd] & PTE_HUGE:
                if mem.tables[pmd] & PTE_PRESENT and pte_pfn(mem.tables[pmd]) == folio_pfn:
                    if not try_to_migrate_entry(mem, folio_pfn, vma, pmd):
                        return
                break
            if pmd == 0 or mem.tables[pmd] == 0:
                address = (address | PMD_SIZE - 1) + 1
                continue
            pte = (mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & 511)
            old = mem.tables[pte]
            if old & PTE_PRESENT and old & PTE_SPECIAL == 0 and folio_pfn <= pte_pfn(old) < folio_pfn + nr_pages:
                if not try_to_migrate_entry(mem, folio_pfn, vma, pte):
                    return
            address += 1 << PAGE_SHIFT
        cursor = rmap_next(mem, folio_pfn, cursor)


@jit
def try_to_unmap(mem, folio_pfn):
    """Clear every page-table entry that maps a folio of a file, which is faulted in again when needed; of an anonymous folio,
    which must be in the swap cache, they become its swap entries. PMD leaves are split first.

    The caller holds a reference. Kernel: try_to_unmap(), for file folios that a split unmaps and for those swapped out.
    """
    folio = mem.folios[folio_pfn]
    nr_pages = np.int64(1) << folio.order
    cursor = rmap_first(mem, folio_pfn)
    while cursor and folio.mapcount:
        vma = rmap_vma(mem, folio_pfn, cursor)
        area = mem.vmas[vma]
        address = vma_address(mem, vma, folio.index)
        end = min(address + (nr_pages << PAGE_SHIFT), area.end)
        address = max(address, area.start)
        while address < end:
            pmd = walk_pmd(mem, area.mm, address)
            if pmd and mem.tables[pmd] & PTE_HUGE:
                if pte_pfn(mem.tables[pmd]) != folio_pfn:
                    break
                split_pmd(mem, area.mm, pmd)
            pte = walk_pte(mem, area.mm, address)
            old = mem.tables[pte] if pte else np.int64(0)
            if old & PTE_PRESENT and old & PTE_SPECIAL == 0 and folio_pfn <= pte_pfn(old) < folio_pfn + nr_pages:
                if old & PTE_DIRTY:
                    folio_mark_dirty(mem, folio_pfn)
                mem.tables[pte] = 0
                if folio_test_anon(mem, folio_pfn):
                    entry = folio.private + pte_pfn(old) - folio_pfn
                    set_pte(mem, pte, entry, PTE_SWAP | PTE_SPECIAL | old & (PTE_EXCLUSIVE | PTE_UFFD_WP))
                    swap_duplicate(mem, entry)
                folio_remove_rmap(mem, folio_pfn, pte_pfn(old), vma, np.int64(0))
                folio.refcount -= 1
                add_rss(mem, area.mm, folio_pfn, -1)
            address += 1 << PAGE_SHIFT
        cursor = rmap_next(mem, folio_pfn, cursor)


@jit_inline
def remove_migration_entry(mem, entry, vma, to):
    """Point one migration entry at page ``to`` (of the destination, or of the source after a failure)."""
    head = page_folio(mem, to)
    folio = mem.folios[head]
    old = mem.tables[entry]
    bits = old & PTE_BITS & ~PTE_MIGRATION | PTE_PRESENT
    if mem.vmas[vma].vm_flags & VM_WRITE == 0:      # the vma's protection as it is now
        bits &= ~PTE_WRITE
    if folio.page_flags & PG_dirty == 0:
        bits &= ~PTE_DIRTY
    folio.refcount += 1
    folio_add_rmap(mem, head, vma, old & PTE_HUGE)
    set_pte(mem, entry, to, bits)


@jit
def walk_ksm(mem, src, dst, unmap):
    """Replace the entries that map KSM page ``src`` by migration entries, or turn those into entries for ``dst``.

    Its mappings are those that its stable node knows, in the processes that ksmd found it in and in those they have forked.
    Kernel: rmap_walk_ksm().
    """
    item = mem.anon_vmas[-np.int64(mem.folios[dst].mapping)].first_item
    while item:
        avc = mem.anon_vmas[mem.rmap_items[item].anon_vma].first_avc
        while avc:
            vma = mem.avcs[avc].vma
            area = mem.vmas[vma]
            address = mem.rmap_items[item].address
            pte = walk_pte(mem, area.mm, address) if area.start <= address < area.end else np.int64(0)
            old = mem.tables[pte] if pte else np.int64(0)
            if old & PTE_SPECIAL == 0 and pte_pfn(old) == src:
                if unmap and old & PTE_PRESENT:
                    try_to_migrate_entry(mem, src, vma, pte)
                elif not unmap and pte_is_migration(old):
                    remove_migration_entry(mem, pte, vma, dst)
            avc = mem.avcs[avc].next_of_anon_vma
        item = mem.rmap_items[item].next


@jit
def remove_migration_ptes(mem, src, dst):
    """Turn the migration entries that hold pages of ``src`` into entries for the same pages of ``dst``.

    ``dst`` is the destination after a successful move, or ``src`` itself to undo an unmap; its mapping and index
    are set, as the walk is by them. Entries that vanished meanwhile are simply not found. ``migrate_info`` of ``src``, if
    not 0, is where its only entry stands (migrate/simple.py), which saves the walk.

    Kernel: remove_migration_ptes().
    """
    folio = mem.folios[dst]
    entry = mem.folios[src].migrate_info
    if entry:
        if pte_is_migration(mem.tables[entry]):
            remove_migration_entry(mem, entry, rmap_vma(mem, dst, rmap_first(mem, dst)), dst)
        return
    if folio.page_flags & PG_ksm:
        walk_ksm(mem, src, dst, False)
        return
    nr_pages = np.int64(1) << folio.order
    cursor = rmap_first(mem, dst)
    while cursor:
        vma = rmap_vma(mem, dst, cursor)
        area = mem.vmas[vma]
        address = vma_address(mem, vma, folio.index)
        end = min(address + (nr_pages << PAGE_SHIFT), area.end)
        address = max(address, area.start)
        while address < end:
            pmd = walk_pmd(mem, area.mm, address)
            if pmd and mem.tables[pmd] & PTE_HUGE:
                if pte_is_migration(mem.tables[pmd]) and pte_pfn(mem.tables[pmd]) == src:
                    remove_migration_entry(mem, pmd, vma, dst)
                break
            if pmd == 0 or mem.tables[pmd] == 0:
                address = (address | PMD_SIZE - 1) + 1
                continue
            pte = (mem.tables[pmd] >> PAGE_SHIFT) * PTRS + (address >> PAGE_SHIFT & 511)
            old = mem.tables[pte]
            if pte_is_migration(old) and src <= pte_pfn(old) < src + nr_pages:
                remove_migration_entry(mem, pte, vma, dst + pte_pfn(old) - src)
            address += 1 << PAGE_SHIFT
        cursor = rmap_next(mem, dst, cursor)
