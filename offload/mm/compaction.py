"""Compaction's two scanners: folios to move from the bottom of a node, free blocks to move them to from its top.

Stands for isolate_migratepages_block(), isolate_freepages() and compaction_alloc() of mm/compaction.c (v7.3). Leaves out
pageblock skip bits, migrate types, deferring, watermarks, and hugetlb and movable_ops pages. Who calls it is in
offload/callers.py.

State is in ``sys.cc_*``, as in struct compact_control: the node; its two scanners' positions, in pages from the node's start;
how many pages are isolated at either. Isolated free blocks hang on one list, ``cc_freepages``, through ``private`` of their first
pages' records; ``order`` there is the block's. They are neither free nor in use.
"""

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.memmap import (
    AOPS_NONE, NO_PFN, PG_dirty, PG_locked, PG_lru, PG_swapcache, PG_unevictable, PG_writeback, page_folio, unpack,
)
from offload.mm.node import (
    NR_ORDERS, block_order, clear_free, drain_pages, folio_isolate_lru, free_block, node_stat_add_isolated, prep_new_folio, set_page_orders,
)
from offload.units import HPAGE_PMD_ORDER

__all__ = ("compaction_alloc", "compaction_free", "isolate_migratepages", "release_freepages", "has_free_block",
           "COMPACT_CLUSTER_MAX", "PAGEBLOCK_ORDER", "ISOLATE_ASYNC", "ISOLATE_UNEVICTABLE", "ISOLATE_NOFS")

PAGEBLOCK_ORDER = HPAGE_PMD_ORDER
COMPACT_CLUSTER_MAX = 32
"""Pages that are isolated before they are migrated."""

ISOLATE_ASYNC = 1 << 0              # no folio that a call which is not MIGRATE_SYNC could only wait for
ISOLATE_UNEVICTABLE = 1 << 1        # sysctl vm.compact_unevictable_allowed
ISOLATE_NOFS = 1 << 2               # the caller lacks __GFP_FS: anonymous folios only


# --- free blocks ----------------------------------------------------------------------------------------------

@jit
def list_block(mem, pfn, order, after):
    """Put a block that is neither free nor in use on the list, behind block ``after`` (NO_PFN: at the head)."""
    sys = mem.sys[0]
    block = mem.folios[pfn]
    block.nid = sys.cc_nid
    block.order = order
    if after == NO_PFN:
        block.private = sys.cc_freepages
        sys.cc_freepages = pfn
    else:
        block.private = mem.folios[after].private
        mem.folios[after].private = pfn
    sys.cc_nr_freepages += np.int64(1) << order


@jit
def isolate_freepages(mem):
    """Isolate at least one free block, and more until there are as many pages of them as of folios; False if there is none.

    The node's per-CPU list is drained before. Pageblock by pageblock from the top down, to the one above the other scanner's; within one it goes up. A pageblock that is
    free as a whole is left alone.
    """
    sys = mem.sys[0]
    node = mem.nodes[sys.cc_nid]
    drain_pages(mem, sys.cc_nid)
    last = np.int64(NO_PFN)
    pfn = sys.cc_freepages
    while pfn != NO_PFN:
        last = pfn
        pfn = mem.folios[pfn].private
    found = False
    page = sys.cc_free_page
    block = page >> PAGEBLOCK_ORDER
    while block > sys.cc_migrate_page >> PAGEBLOCK_ORDER and not (found and sys.cc_nr_freepages >= sys.cc_nr_migratepages):
        end = min((block + 1) << PAGEBLOCK_ORDER, node.nr_pages)
        if block_order(mem, sys.cc_nid, block << PAGEBLOCK_ORDER, PAGEBLOCK_ORDER) < NR_ORDERS:
            page = end
        while page < end and not (found and sys.cc_nr_freepages >= sys.cc_nr_migratepages):
            order = block_order(mem, sys.cc_nid, page, 0)
            size = np.int64(1)
            if order < NR_ORDERS and page & (size << order) - 1 == 0:
                size = size << order
                clear_free(mem, sys.cc_nid, order, page >> order)
                node.nr_free_pages -= size
                list_block(mem, node.start_pfn + page, order, last)
                last = node.start_pfn + page
                found = True
            page += size
        if page >= end:
            block -= 1
            page = block << PAGEBLOCK_ORDER
    sys.cc_free_page = page
    return found


@jit
def compaction_alloc(mem, order):
    """A folio of ``order`` from the list: of the smallest block that is large enough, what is over stays on the list.

    If there is none, some are isolated, once; then NO_PFN. Kernel: compaction_alloc(), the get_new_folio of compaction.
    """
    found = take_listed(mem, order)
    if found == NO_PFN and isolate_freepages(mem):
        found = take_listed(mem, order)
    if found != NO_PFN:
        prep_new_folio(mem, mem.sys[0].cc_nid, found, order)
    return found


@jit
def take_listed(mem, order):
    """A block of exactly ``order`` off the list, or NO_PFN."""
    sys = mem.sys[0]
    found = found_after = after = np.int64(NO_PFN)
    pfn = sys.cc_freepages
    while pfn != NO_PFN:
        have = np.int64(mem.folios[pfn].order)
        if have >= order and (found == NO_PFN or have < mem.folios[found].order):
            found, found_after = pfn, after
        after = pfn
        pfn = mem.folios[pfn].private
    if found == NO_PFN:
        return found
    block = mem.folios[found]
    have = np.int64(block.order)
    if found_after == NO_PFN:
        sys.cc_freepages = block.private
    else:
        mem.folios[found_after].private = block.private
    block.private = 0
    sys.cc_nr_freepages -= np.int64(1) << have
    while have > order:
        have -= 1
        list_block(mem, found + (np.int64(1) << have), have, np.int64(NO_PFN))
    return found


@jit
def compaction_free(mem, dst):
    """Return an unused destination to the list. Kernel: compaction_free(), the put_new_folio of compaction."""
    folio = mem.folios[dst]
    order = np.int64(folio.order)
    folio.refcount = 0
    folio.page_flags = 0
    set_page_orders(mem, dst, np.int64(1) << order, 0)
    list_block(mem, dst, order, np.int64(NO_PFN))


@jit_entry
def release_freepages(mem_table):
    """Free what is left on the list (release_free_list())."""
    mem = unpack(mem_table)
    sys = mem.sys[0]
    while sys.cc_freepages != NO_PFN:
        pfn = sys.cc_freepages
        block = mem.folios[pfn]
        order = np.int64(block.order)
        sys.cc_freepages = block.private
        block.private = 0
        block.order = 0
        free_block(mem, sys.cc_nid, pfn, order)
    sys.cc_nr_freepages = 0


# --- folios ---------------------------------------------------------------------------------------------------

@jit
def suitable_for_compaction(mem, pfn, flags):
    """Whether the migrate scanner takes a folio (the conditions of isolate_migratepages_block())."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_lru == 0:
        return False
    cached = folio.mapping > 0 or folio.page_flags & PG_swapcache != 0
    if not cached and folio.refcount > folio.mapcount:
        return False                                # pinned by somebody, most likely
    if flags & ISOLATE_NOFS and cached:
        return False
    if folio.page_flags & PG_unevictable and flags & ISOLATE_UNEVICTABLE == 0:
        return False
    if flags & ISOLATE_ASYNC and folio.page_flags & PG_writeback:
        return False
    # What asking the mapping takes the folio lock for: dirty folios that could only be written back, and locked memory.
    dirty = flags & ISOLATE_ASYNC and folio.page_flags & PG_dirty
    if dirty or cached and folio.page_flags & PG_unevictable:
        if folio.page_flags & PG_locked:
            return False
        if folio.mapping > 0:
            mapping = mem.mappings[folio.mapping]
            if mapping.inaccessible or dirty and mapping.aops == AOPS_NONE:
                return False
    return True


@jit_entry
def isolate_migratepages(mem_table, target_order, flags, out):
    """Isolate folios from where the scanner stands, at most COMPACT_CLUSTER_MAX pages, all of one pageblock; heads go to ``out``.

    A folio as large as what compaction wants to make is passed over (``target_order`` -1: as large as a pageblock). How many.
    """
    mem = unpack(mem_table)
    sys = mem.sys[0]
    node = mem.nodes[sys.cc_nid]
    limit = PAGEBLOCK_ORDER if target_order < 0 else min(target_order, PAGEBLOCK_ORDER)
    page = sys.cc_migrate_page
    end = min(((page >> PAGEBLOCK_ORDER) + 1) << PAGEBLOCK_ORDER, node.nr_pages)
    nr = 0
    sys.cc_nr_migratepages = 0
    while page < end and sys.cc_nr_migratepages < COMPACT_CLUSTER_MAX:
        order = block_order(mem, sys.cc_nid, page, 0)
        if order < NR_ORDERS:
            page = ((page >> order) + 1) << order
            continue
        pfn = page_folio(mem, node.start_pfn + page)
        order = np.int64(mem.orders[pfn])
        if (order == 0 or order < limit) and suitable_for_compaction(mem, pfn, flags) and folio_isolate_lru(mem, pfn):
            node_stat_add_isolated(mem, pfn, 1)
            out[nr] = pfn
            nr += 1
            sys.cc_nr_migratepages += np.int64(1) << order
        page = pfn - node.start_pfn + (np.int64(1) << order)
    sys.cc_migrate_page = page
    return nr


@jit_entry
def has_free_block(mem_table, nid, order):
    """Whether the node has a free block of ``order`` or more, once its per-CPU list is drained."""
    mem = unpack(mem_table)
    drain_pages(mem, nid)
    while order < NR_ORDERS:
        if mem.free_areas[nid * NR_ORDERS + order].nr_free:
            return True
        order += 1
    return False
