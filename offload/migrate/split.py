"""Splitting a large folio into its base pages, when it cannot or must not migrate whole.

Stands for try_split_folio() of mm/migrate.c and what split_folio_to_list() of mm/huge_memory.c does to a folio
(v7.3): always uniformly, always to order 0. Leaves out minimum folio orders, truncation by the end of the file,
private data and swap cache.
"""

import numpy as np

from offload.intrinsics import bytes_are_zero
from offload.jit import jit
from offload.migrate.call import list_add_tail
from offload.mm.frames import frame_address
from offload.mm.memmap import (
    ALLOC_FAIL, ALLOC_FAIL_ALL, ALLOC_OK, PG_deferred_list, PG_hwpoison, PG_large_rmappable, PG_locked, PG_partially_mapped, PG_writeback,
    VM_LOCKED, folio_expected_ref_count, folio_test_anon, folio_trylock, folio_unlock,
)
from offload.mm.node import folio_unqueue_deferred_split, set_page_orders
from offload.mm.others import wait_for_lock
from offload.mm.pagetable import (
    PTE_HUGE, ZERO_PAGE, pte_is_migration, pte_pfn, remove_migration_ptes, rmap_first, rmap_next, rmap_vma, split_pmd,
    try_to_migrate, try_to_unmap, vma_address, walk_pmd, walk_pte,
)
from offload.units import EAGAIN, EBUSY, MIGRATE_ASYNC, PAGE_SIZE

__all__ = ("try_split_folio", "split_folio")


@jit
def try_split_folio(mem, call, src):
    """Lock and split ``src``; its pieces go to the tail of the batch's split list, tails in order, the head last.

    Returns 0, -EAGAIN or -EBUSY; after a failure nothing has changed. Each tail holds one reference for the list.

    Kernel: try_split_folio().
    """
    c = call.state[0]
    if not folio_trylock(mem, src):
        if c.batch_mode == MIGRATE_ASYNC:
            return -EAGAIN
        if not wait_for_lock(mem, src):
            c.hang = src
            return -EAGAIN
    order = np.int64(mem.folios[src].order)
    rc = split_folio(mem, src)
    folio_unlock(mem, src)
    if rc == 0:
        for piece in range(src + 1, src + (1 << order)):
            list_add_tail(call, c.batch_split, piece)
        list_add_tail(call, c.batch_split, src)
    return rc


@jit
def split_folio(mem, src):
    """Split a locked, isolated folio to order 0. 0, -EBUSY (writeback, truncated, unmapped) or -EAGAIN (unexplained references).

    Anonymous pieces are mapped as before, but for pages of zeros, which the shared zero page replaces outside
    mlocked vmas; pieces of a file are left unmapped. Kernel: __folio_split().
    """
    folio = mem.folios[src]
    if folio.page_flags & PG_writeback or folio.mapping == 0:
        return -EBUSY
    if folio_test_anon(mem, src) and folio.mapcount == 0:   # folio_get_anon_vma() vouches for mapped folios only
        return -EBUSY
    if folio.refcount != folio_expected_ref_count(mem, src) + 1:
        return -EAGAIN
    anon = folio_test_anon(mem, src)
    if anon:
        split_huge_pmds(mem, src)
        try_to_migrate(mem, src)
    else:
        try_to_unmap(mem, src)
    folio_unqueue_deferred_split(mem, src)

    nr_pages = np.int64(1) << folio.order
    flags = folio.page_flags & ~(PG_locked | PG_large_rmappable | PG_deferred_list | PG_partially_mapped)
    refuses_pieces = mem.others[folio.others].alloc == ALLOC_FAIL_ALL
    if mem.others[folio.others].alloc == ALLOC_FAIL:    # the allocation failed for the folio whole, not for its head
        mem.others[folio.others].alloc = ALLOC_OK
    set_page_orders(mem, src, nr_pages, 0)
    for piece in range(src, src + nr_pages):
        page = mem.folios[piece]
        page.page_flags = flags
        page.order = 0
        page.nid = folio.nid
        page.mapping = folio.mapping
        page.index = folio.index + (piece - src)
        page.mapcount = page.entire_mapcount = 0
        page.others = folio.others if piece == src or refuses_pieces else 0
        page.refcount = 1                           # the list's
        if not anon:
            page.refcount += 1                      # the page cache's
            mem.slots[mem.mappings[folio.mapping].slots + page.index] = piece
    folio.page_flags |= PG_locked

    if anon:
        for piece in range(src, src + nr_pages):
            use_zero_page(mem, piece)
            remove_migration_ptes(mem, piece, piece)
    return 0


@jit
def split_huge_pmds(mem, src):
    """Split every PMD leaf that maps the folio (split_huge_pmd_address() for each vma of its reverse map)."""
    cursor = rmap_first(mem, src)
    while cursor:
        vma = rmap_vma(mem, src, cursor)
        address = vma_address(mem, vma, mem.folios[src].index)
        if mem.vmas[vma].start <= address < mem.vmas[vma].end:
            pmd = walk_pmd(mem, mem.vmas[vma].mm, address)
            if pmd and mem.tables[pmd] & PTE_HUGE and pte_pfn(mem.tables[pmd]) == src:
                split_pmd(mem, mem.vmas[vma].mm, pmd)
        cursor = rmap_next(mem, src, cursor)


@jit
def use_zero_page(mem, piece):
    """Where a piece holds zeros only, map the shared zero page instead (try_to_map_unused_to_zeropage())."""
    address = frame_address(mem, piece)
    if address == 0 or mem.folios[piece].page_flags & PG_hwpoison or not bytes_are_zero(address, PAGE_SIZE):
        return
    cursor = rmap_first(mem, piece)
    while cursor:
        vma = rmap_vma(mem, piece, cursor)
        area = mem.vmas[vma]
        at = vma_address(mem, vma, mem.folios[piece].index)
        if area.vm_flags & VM_LOCKED == 0 and area.start <= at < area.end:
            pte = walk_pte(mem, area.mm, at)
            if pte and pte_is_migration(mem.tables[pte]) and pte_pfn(mem.tables[pte]) == piece:
                mem.tables[pte] = ZERO_PAGE
                mem.mms[area.mm].rss_anon -= 1
        cursor = rmap_next(mem, piece, cursor)
