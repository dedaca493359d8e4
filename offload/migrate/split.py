"""Splitting a large folio into its base pages, when it cannot or must not migrate whole.

Stands for try_split_folio() of mm/migrate.c and what split_folio_to_list() of mm/huge_memory.c does to a folio
(v7.3, and 6.12 where it differs): always uniformly, always to order 0. Leaves out minimum folio orders, the huge zero page
and truncation by the end of the file.
"""

import numpy as np

from offload.intrinsics import bytes_are_zero
from offload.jit import jit
from offload.migrate.call import list_add_tail
from offload.mm.address_space import file_split_stat, fill_slots, filemap_release_folio
from offload.mm.frames import frame_address
from offload.mm.memmap import (
    FRAMES_FAR, PG_deferred_list, PG_hwpoison, PG_ksm, PG_large_rmappable, PG_locked, PG_movable_ops,
    PG_partially_mapped, PG_private, PG_swapcache, PG_writeback, PG_zone_device, VM_LOCKED, folio_expected_ref_count,
    folio_test_anon, folio_trylock, folio_unlock,
)
from offload.mm.node import folio_maybe_dma_pinned, folio_unqueue_deferred_split, set_page_orders
from offload.mm.others import NOT_TOLD, told, wait_for_lock
from offload.mm.pagetable import (
    PTE_HUGE, PTE_UFFD_WP, ZERO_PAGE, pte_is_migration, pte_pfn, remove_migration_ptes, rmap_first, rmap_next, rmap_vma, split_pmd,
    try_to_migrate, try_to_unmap, vma_address, walk_pmd, walk_pte,
)
from offload.units import EAGAIN, EBUSY, EINVAL, HPAGE_PMD_ORDER, MIGRATE_ASYNC, PAGE_SIZE, RULES_6_12

__all__ = ("try_split_folio", "split_folio")


@jit
def try_split_folio(mem, call, src):
    """Lock and split ``src``; its pieces go to the tail of the batch's split list, tails in order (in 6.12 in descending order),
    the head last.

    Returns 0, -EAGAIN, -EBUSY or -EINVAL; after a failure nothing has changed but that private data may be gone. Each tail
    holds one reference for the list.

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
    rc = told(mem, mem.others[mem.folios[src].others].split)
    if rc >= 0:
        rc = split_refusal(mem, src, rc != NOT_TOLD)
    if rc == 0:
        split_folio(mem, src)
    folio_unlock(mem, src)
    if order >= HPAGE_PMD_ORDER:
        if rc == 0:
            mem.sys[0].thp_split_page += 1
        else:
            mem.sys[0].thp_split_page_failed += 1
    if rc == 0:
        nr_pages = np.int64(1) << order
        for i in range(1, nr_pages):
            list_add_tail(call, c.batch_split, src + (nr_pages - i if mem.sys[0].rule_set == RULES_6_12 else i))
        list_add_tail(call, c.batch_split, src)
    return rc


@jit
def split_refusal(mem, src, told_ok):
    """Why a locked, isolated folio cannot be split: 0 (it can), or -errno. Private data is released on the way.

    -EINVAL: device memory. -EBUSY: an owner's or a KSM page, writeback, truncated, no anon_vma (unmapped), private data that
    stays. -EAGAIN: pins and other unexplained references. ``told_ok``: it was told beforehand that this attempt works, so only
    what cannot be split at all is refused. Kernel: the checks of __folio_split(), in its order.
    """
    folio = mem.folios[src]
    if folio.page_flags & PG_zone_device:
        return np.int64(-EINVAL)
    if folio.page_flags & (PG_movable_ops | PG_ksm):
        return np.int64(-EBUSY)
    if told_ok:
        return np.int64(-EAGAIN if folio_maybe_dma_pinned(mem, src) else 0)
    if folio.page_flags & PG_writeback or folio.mapping == 0:
        return np.int64(-EBUSY)
    if folio_test_anon(mem, src):                   # folio_get_anon_vma() vouches for mapped folios only
        if folio.mapcount == 0:
            return np.int64(-EBUSY)
    elif not filemap_release_folio(mem, src):
        return np.int64(-EBUSY)
    if folio.refcount != folio_expected_ref_count(mem, src) + 1:
        return np.int64(-EAGAIN)
    return np.int64(0)


@jit
def split_folio(mem, src):
    """Split a locked, isolated folio to order 0. References that nothing explains, and private data, stay with the head.

    Anonymous pieces are mapped as before, but for pages of zeros, which the shared zero page replaces outside
    mlocked vmas; pieces of a file are left unmapped. Kernel: __folio_split(), __split_unmapped_folio().
    """
    folio = mem.folios[src]
    anon = folio_test_anon(mem, src)
    if anon:
        split_huge_pmds(mem, src)
        try_to_migrate(mem, src)
    else:
        try_to_unmap(mem, src)
    folio_unqueue_deferred_split(mem, src)

    nr_pages = np.int64(1) << folio.order
    flags = folio.page_flags & ~(PG_locked | PG_large_rmappable | PG_deferred_list | PG_partially_mapped | PG_private)
    head_flags = folio.page_flags & (PG_locked | PG_private | PG_hwpoison)      # the bad page of a folio is its first
    caches = np.int64(folio.mapping > 0) + np.int64(folio.page_flags & PG_swapcache != 0)
    head_refs = folio.refcount - caches * (nr_pages - 1)
    private = folio.private
    if anon:
        mem.mthp_nr_anon[folio.order] -= 1
    else:
        file_split_stat(mem, src)
    pieces_others = mem.others[folio.others].pieces
    if folio.others:                                    # whether the allocation fails for its head as it did for the folio
        mem.others[folio.others].alloc = mem.others[pieces_others].alloc
    set_page_orders(mem, src, nr_pages, 0)
    for piece in range(src, src + nr_pages):
        page = mem.folios[piece]
        page.page_flags = flags & ~PG_hwpoison
        page.order = 0
        page.nid = folio.nid
        page.mapping = folio.mapping
        page.index = folio.index + (piece - src)
        page.cpupid = folio.cpupid
        page.mapcount = page.entire_mapcount = 0
        page.others = folio.others if piece == src else np.int32(pieces_others)
        page.refcount = np.int32(1 + caches)        # the list's, and those of page cache and swap cache
        if folio.mapping > 0:
            fill_slots(mem, np.int64(folio.mapping), np.int64(page.index), np.int64(1), piece)
        if flags & PG_swapcache:
            page.private = private + (piece - src)
            fill_slots(mem, mem.sys[0].swap_space, np.int64(page.private), np.int64(1), piece)
    folio.page_flags |= head_flags
    folio.refcount = np.int32(head_refs)

    if anon:
        for piece in range(src, src + nr_pages):
            use_zero_page(mem, piece)
            remove_migration_ptes(mem, piece, piece)


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
    """Where a piece holds zeros only, map the shared zero page instead (try_to_map_unused_to_zeropage()).

    Left out on a machine with a device node: nobody here can look at the bytes.
    """
    address = frame_address(mem, piece)
    if address == 0 or mem.sys[0].frames_kind == FRAMES_FAR or mem.folios[piece].page_flags & PG_hwpoison or not bytes_are_zero(address, PAGE_SIZE):
        return
    cursor = rmap_first(mem, piece)
    while cursor:
        vma = rmap_vma(mem, piece, cursor)
        area = mem.vmas[vma]
        at = vma_address(mem, vma, mem.folios[piece].index)
        if area.vm_flags & VM_LOCKED == 0 and area.start <= at < area.end:
            pte = walk_pte(mem, area.mm, at)
            if pte and pte_is_migration(mem.tables[pte]) and pte_pfn(mem.tables[pte]) == piece:
                mem.tables[pte] = ZERO_PAGE | mem.tables[pte] & PTE_UFFD_WP
                mem.mms[area.mm].rss_anon -= 1
        cursor = rmap_next(mem, piece, cursor)
