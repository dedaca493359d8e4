"""A node's page frames: the buddy allocator, references, isolation from the LRU, and the node's counters.

Stands for mm/page_alloc.c (allocation and freeing of orders 0 to 10), mm/swap.c (the per-CPU LRU batch, putting
references) and folio_isolate_lru()/putback of mm/vmscan.c (v7.3). Leaves out zones, watermarks and reclaim (an
empty node is -ENOMEM at once), migrate types, and per-CPU lists of other orders than 0.

The free blocks of each order are a bitmap instead of the kernel's linked lists: a list would touch the records
of two neighbours for each page freed, and after a move in random order those are cache misses. Three levels of
64-bit words; the lowest free block is taken first. In front of them stands a list of base pages, as for one CPU of the kernel:
a page that is freed goes on it and is the next to be handed out. The same calls give the same frames.
"""

import numpy as np

from offload.intrinsics import count_trailing_zeros, prefetch_record
from offload.jit import jit, jit_entry, jit_inline
from offload.mm.frames import poison_frames
from offload.mm.hugetlb_pool import free_huge_folio
from offload.mm.memmap import (
    FREE_AREA_DTYPE, LRU_BATCH_SIZE, NO_PFN, PG_active, PG_deferred_list, PG_hugetlb, PG_hwpoison, PG_large_rmappable, PG_lru,
    PG_mlocked, PG_partially_mapped, PG_reserved, PG_swapbacked, PG_unevictable, folio_is_file_lru, records, unpack,
)
from offload.units import MAX_PAGE_ORDER

__all__ = ("alloc_pages_node", "free_pages", "fragment_node", "free_reserved_pages", "folio_put", "folio_put_refs",
           "drain_pages", "nr_free", "folio_isolate_lru", "folio_putback_lru", "folio_add_lru", "lru_add_drain", "node_stat_add_isolated",
           "folio_maybe_dma_pinned")

NR_ORDERS = MAX_PAGE_ORDER + 1
WORD_BITS = 64
PCP_BATCH = 64
"""Base pages moved to an empty per-CPU list at once: a block of order 6, where there is one whole. The kernel's is 63."""
PCP_HIGH = 256
"""Base pages that a per-CPU list holds; one more, and all of them go back. The kernel's adapts to the load."""
GUP_PIN_COUNTING_BIAS = 1024
"""References that one pin of a small folio holds (include/linux/mm.h)."""


# --- free areas -----------------------------------------------------------------------------------------------

def build_free_areas(nodes):
    """Empty free areas and bitmaps for nodes given as NODE_DTYPE records, then all of their memory freed into them.

    Returns (free_areas, free_bits). Only whole blocks of the largest order are entered one by one, so a node of
    128 GiB costs 32,768 bits, not 32 million.
    """
    areas = records(len(nodes) * NR_ORDERS, FREE_AREA_DTYPE)
    size = 0
    for nid, node in enumerate(nodes):
        for order in range(NR_ORDERS):
            area = areas[nid * NR_ORDERS + order]
            blocks = int(node.nr_pages) >> order
            for level in ("leaf", "middle", "top"):
                words = -(-blocks // WORD_BITS)
                area[level] = size
                size += words
                blocks = words
            area.nr_top = blocks
    return areas, np.zeros(size, np.int64)


@jit_inline
def bit(i):
    """A word with bit ``i % 64`` set; the topmost is the sign."""
    return np.int64(1) << np.int64(i & 63)


@jit_inline
def set_free(mem, nid, order, block):
    """Enter ``block`` (counted in blocks of ``order`` from the node's start) as free."""
    area = mem.free_areas[nid * NR_ORDERS + order]
    area.nr_free += 1
    mem.free_bits[area.leaf + (block >> 6)] |= bit(block)
    mem.free_bits[area.middle + (block >> 12)] |= bit(block >> 6)
    mem.free_bits[area.top + (block >> 18)] |= bit(block >> 12)


@jit_inline
def clear_free(mem, nid, order, block):
    """Take ``block`` out of the free blocks of ``order``."""
    area = mem.free_areas[nid * NR_ORDERS + order]
    area.nr_free -= 1
    leaf = area.leaf + (block >> 6)
    mem.free_bits[leaf] &= ~bit(block)
    if mem.free_bits[leaf] == 0:
        middle = area.middle + (block >> 12)
        mem.free_bits[middle] &= ~bit(block >> 6)
        if mem.free_bits[middle] == 0:
            mem.free_bits[area.top + (block >> 18)] &= ~bit(block >> 12)


@jit_inline
def lowest_free(mem, nid, order):
    """The lowest free block of ``order``; there must be one."""
    area = mem.free_areas[nid * NR_ORDERS + order]
    top = 0
    while mem.free_bits[area.top + top] == 0:
        top += 1
    middle = top << 6 | count_trailing_zeros(mem.free_bits[area.top + top])
    leaf = middle << 6 | count_trailing_zeros(mem.free_bits[area.middle + middle])
    return leaf << 6 | count_trailing_zeros(mem.free_bits[area.leaf + leaf])


@jit_inline
def block_is_free(mem, nid, order, block):
    area = mem.free_areas[nid * NR_ORDERS + order]
    return mem.free_bits[area.leaf + (block >> 6)] & bit(block) != 0


@jit_inline
def prefetch_free_bits(mem, nid, pfn):
    """Ask for the words that giving a base page back will look at first: its buddy's bit, and that of the pair's buddy."""
    page = pfn - mem.nodes[nid].start_pfn
    prefetch_record(mem.free_bits, mem.free_areas[nid * NR_ORDERS].leaf + (page >> 6))
    prefetch_record(mem.free_bits, mem.free_areas[nid * NR_ORDERS + 1].leaf + (page >> 7))


# --- the buddy allocator (mm/page_alloc.c) --------------------------------------------------------------------

@jit_inline
def take_block(mem, nid, order):
    """Remove a free block of ``order``, splitting a larger one if need be. Its first pfn, or NO_PFN."""
    node = mem.nodes[nid]
    have = order
    while have < NR_ORDERS and mem.free_areas[nid * NR_ORDERS + have].nr_free == 0:
        have += 1
    if have == NR_ORDERS:
        return NO_PFN
    block = lowest_free(mem, nid, have)
    clear_free(mem, nid, have, block)
    while have > order:                             # give back the upper halves (expand())
        have -= 1
        block = block << 1
        set_free(mem, nid, have, block + 1)
    node.nr_free_pages -= 1 << order
    return node.start_pfn + (block << order)


@jit_inline
def free_block(mem, nid, pfn, order):
    """Give a block back, merging it with its free buddies as far as they reach (__free_one_page())."""
    node = mem.nodes[nid]
    node.nr_free_pages += 1 << order
    block = (pfn - node.start_pfn) >> order
    while order < MAX_PAGE_ORDER and (block | 1) < node.nr_pages >> order and block_is_free(mem, nid, order, block ^ 1):
        clear_free(mem, nid, order, block ^ 1)
        block >>= 1
        order += 1
    set_free(mem, nid, order, block)


@jit_entry
def free_node(mem_table, nid):
    """Hand all of a node's frames to its allocator (memblock_free_all()), once, when the machine is built."""
    mem = unpack(mem_table)
    node = mem.nodes[nid]
    at = 0
    while at < node.nr_pages:
        order = MAX_PAGE_ORDER
        while at & ((1 << order) - 1) or at + (1 << order) > node.nr_pages:
            order -= 1
        free_block(mem, nid, node.start_pfn + at, order)
        at += 1 << order


# --- the per-CPU list in front of it (mm/page_alloc.c) ---------------------------------------------------------

@jit
def rmqueue_bulk(mem, nid):
    """Move up to PCP_BATCH base pages to the empty per-CPU list, so that they are handed out in order of address.

    Out of the smallest blocks first, as one by one, but each whole as far as it is wanted.
    """
    node = mem.nodes[nid]
    nr = left = min(PCP_BATCH, node.nr_free_pages)
    while left > 0:
        order = 0
        while mem.free_areas[nid * NR_ORDERS + order].nr_free == 0 and 2 << order <= left:
            order += 1
        pfn = take_block(mem, nid, order)
        for page in range(pfn, pfn + (1 << order)):
            left -= 1
            mem.pcp[nid * PCP_HIGH + left] = page
    node.pcp_count = nr


@jit
def drain_pages(mem, nid):
    """Give all of the per-CPU list back to the free blocks (free_pcppages_bulk())."""
    node = mem.nodes[nid]
    first = nid * PCP_HIGH
    for i in range(node.pcp_count):
        if i + 16 < node.pcp_count:
            prefetch_free_bits(mem, nid, mem.pcp[first + i + 16])
        free_block(mem, nid, mem.pcp[first + i], 0)
    node.pcp_count = 0


@jit_inline
def rmqueue_pcplist(mem, nid):
    """A base page off the per-CPU list, filled if it is empty, or NO_PFN if no page of the node is free."""
    node = mem.nodes[nid]
    if node.pcp_count == 0:
        if node.nr_free_pages == 0:
            return NO_PFN
        rmqueue_bulk(mem, nid)
    node.pcp_count -= 1
    return mem.pcp[nid * PCP_HIGH + node.pcp_count]


@jit_inline
def free_unref_page(mem, nid, pfn):
    """Put a base page on the per-CPU list; if there is no room, after what is on it has gone back."""
    node = mem.nodes[nid]
    if node.pcp_count == PCP_HIGH:
        drain_pages(mem, nid)
    mem.pcp[nid * PCP_HIGH + node.pcp_count] = pfn
    node.pcp_count += 1


# --- folios of them -------------------------------------------------------------------------------------------

@jit_inline
def set_page_orders(mem, pfn, nr_pages, order):
    """Write the folio order of pages ``pfn`` .. ``pfn + nr_pages - 1`` (prep_compound_page())."""
    for page in range(pfn, pfn + nr_pages):
        mem.orders[page] = order


@jit_inline
def prep_new_folio(mem, nid, pfn, order):
    """Make a folio with one reference of a block that has been taken out of the free ones (post_alloc_hook())."""
    folio = mem.folios[pfn]
    folio.refcount = 1
    folio.order = order
    folio.nid = nid
    if order:
        folio.page_flags = PG_large_rmappable
        set_page_orders(mem, pfn, 1 << order, order)
    if mem.sys[0].poison:
        poison_frames(mem, pfn, 1 << order)


@jit
def alloc_pages_node(mem, nid, order):
    """A new folio of ``order`` on node ``nid`` with one reference, or NO_PFN if the node has no such block.

    Its bytes are undefined: whatever was there, or 0xAA where the machine poisons (``sys.poison``).
    Kernel: __alloc_pages_node() with __GFP_THISNODE, without reclaim.
    """
    if order == 0:
        pfn = rmqueue_pcplist(mem, nid)
    else:
        pfn = take_block(mem, nid, order)
        if pfn == NO_PFN and mem.nodes[nid].pcp_count:
            drain_pages(mem, nid)                   # what is on the list may make a block of it
            pfn = take_block(mem, nid, order)
    if pfn == NO_PFN:
        return NO_PFN
    prep_new_folio(mem, nid, pfn, order)
    return pfn


@jit
def free_pages(mem, pfn):
    """Free a folio whose last reference is gone (free_unref_folio()). Its record is as new afterwards.

    Poisoned memory is never given out again: a bad base page stays outside the allocator with its mark.
    """
    folio = mem.folios[pfn]
    if folio.page_flags & PG_hugetlb and free_huge_folio(mem, pfn):
        return                                      # it stays in its pool
    nid = np.int64(folio.nid)
    order = np.int64(folio.order)
    if folio.page_flags & PG_lru:
        lru_stat_add(mem, pfn, -1)
    if folio.page_flags & PG_deferred_list:
        mem.nodes[nid].nr_deferred_split -= 1
    if folio.page_flags & PG_mlocked:
        mem.nodes[nid].nr_mlock -= 1 << order
    poisoned = folio.page_flags & PG_hwpoison
    if order and folio.mapping < 0:
        mem.mthp_nr_anon[order] -= 1
    clear_record(mem, pfn)
    if order:
        set_page_orders(mem, pfn, 1 << order, 0)
    if poisoned:
        free_poisoned(mem, nid, pfn, order)
    elif order:
        free_block(mem, nid, pfn, order)
    else:
        free_unref_page(mem, nid, pfn)


@jit_inline
def free_base_page(mem, pfn):
    """free_pages() for a base page that is good, on no LRU list and not mlocked."""
    nid = np.int64(mem.folios[pfn].nid)
    clear_record(mem, pfn)
    free_unref_page(mem, nid, pfn)


@jit_inline
def clear_record(mem, pfn):
    """Make the record of a page that is being freed as new."""
    folio = mem.folios[pfn]
    folio.page_flags = 0
    folio.refcount = 0
    folio.mapcount = 0
    folio.entire_mapcount = 0
    folio.pincount = 0
    folio.mapping = 0
    folio.others = 0
    folio.index = 0
    folio.private = 0
    folio.migrate_info = 0
    folio.cpupid = 0
    folio.order = 0


@jit
def free_poisoned(mem, nid, pfn, order):
    """Free what is good of a folio whose first page is bad."""
    mem.folios[pfn].page_flags = PG_hwpoison
    while order > 0:                                # halves that do not begin with the bad page
        order -= 1
        free_block(mem, nid, pfn + (np.int64(1) << order), order)


@jit
def block_order(mem, nid, page, order):
    """Order, of at least ``order``, of the free block in which a page (counted from the node's start) lies, or NR_ORDERS."""
    while order < NR_ORDERS:
        if page >> order >= mem.nodes[nid].nr_pages >> order:      # beyond the last whole block: it has no bit
            return NR_ORDERS
        if block_is_free(mem, nid, order, page >> order):
            return order
        order += 1
    return order


@jit
def take_free_page(mem, nid, pfn):
    """Take one given page out of the free block it lies in (as take_page_off_buddy()). False if it is not free."""
    block = pfn - mem.nodes[nid].start_pfn
    order = block_order(mem, nid, block, 0)
    if order == NR_ORDERS:
        return False
    clear_free(mem, nid, order, block >> order)
    mem.nodes[nid].nr_free_pages -= 1
    while order > 0:                                # give the half without it back, until one page is left
        order -= 1
        set_free(mem, nid, order, block >> order ^ 1)
    return True


@jit_entry
def fragment_node(mem_table, nid, order, held):
    """Take the first page of every aligned block of ``order + 1`` that is wholly free; their pfns go to ``held``.

    Returns how many; no free block larger than ``order`` is left.
    """
    mem = unpack(mem_table)
    drain_pages(mem, nid)
    node = mem.nodes[nid]
    nr = 0
    for block in range(node.nr_pages >> order + 1):
        if block_order(mem, nid, block << order + 1, order + 1) < NR_ORDERS:
            pfn = node.start_pfn + (block << order + 1)
            take_free_page(mem, nid, pfn)
            folio = mem.folios[pfn]
            folio.refcount = 1
            folio.nid = nid
            folio.page_flags = PG_reserved
            held[nr] = pfn
            nr += 1
    return nr


@jit_entry
def free_reserved_pages(mem_table, pfns):
    """Free pages that fragment_node() holds."""
    mem = unpack(mem_table)
    for i in range(len(pfns)):
        folio_put_refs(mem, pfns[i], 1)


# --- references (include/linux/mm.h, mm/gup.c) ----------------------------------------------------------------

@jit_inline
def folio_put_refs(mem, pfn, refs):
    """Drop ``refs`` references; the folio is freed with the last."""
    folio = mem.folios[pfn]
    folio.refcount -= refs
    if folio.refcount == 0:
        free_pages(mem, pfn)


@jit_inline
def folio_put(mem, pfn):
    folio_put_refs(mem, pfn, 1)


@jit_inline
def folio_maybe_dma_pinned(mem, pfn):
    """Whether the folio may be pinned: exact for large folios, by reference count for small ones."""
    folio = mem.folios[pfn]
    if folio.order:
        return folio.pincount > 0
    return folio.refcount >= GUP_PIN_COUNTING_BIAS


# --- the LRU (mm/swap.c, mm/vmscan.c) -------------------------------------------------------------------------

@jit_inline
def lru_stat_add(mem, pfn, sign):
    """Count the folio in (+1) or out (-1) of the LRU list that its flags name."""
    folio = mem.folios[pfn]
    node = mem.nodes[folio.nid]
    nr_pages = sign * (np.int64(1) << folio.order)
    if folio.page_flags & PG_unevictable:
        node.nr_unevictable += nr_pages
    elif folio.page_flags & PG_swapbacked:
        node.nr_lru_anon += nr_pages
    else:
        node.nr_lru_file += nr_pages


@jit_inline
def node_stat_add_isolated(mem, pfn, sign):
    """NR_ISOLATED_ANON or NR_ISOLATED_FILE of the folio's node, plus or minus its pages."""
    folio = mem.folios[pfn]
    node = mem.nodes[folio.nid]
    if folio_is_file_lru(mem, pfn):
        node.nr_isolated_file += sign * (np.int64(1) << folio.order)
    else:
        node.nr_isolated_anon += sign * (np.int64(1) << folio.order)


@jit_inline
def folio_isolate_lru(mem, pfn):
    """Take the folio off its LRU with a reference of the caller's. False if it is on none (isolated, or batched).

    Kernel: folio_isolate_lru(); the caller adds NR_ISOLATED.
    """
    folio = mem.folios[pfn]
    if folio.page_flags & PG_lru == 0:
        return False
    lru_stat_add(mem, pfn, -1)
    folio.page_flags &= ~PG_lru
    folio.refcount += 1
    return True


@jit_inline
def lru_add(mem, pfn):
    """Put one folio on the LRU list it belongs on; an unmapped mlocked mark moves it to the unevictable one."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_mlocked:
        folio.page_flags &= ~PG_active
        folio.page_flags |= PG_unevictable
    else:
        folio.page_flags &= ~PG_unevictable
    folio.page_flags |= PG_lru
    lru_stat_add(mem, pfn, 1)


@jit
def lru_readd(mem, pfn):
    """Move a folio that is on the LRU to the list where its mlocked mark wants it now (__mlock_folio() and its twin)."""
    if mem.folios[pfn].page_flags & PG_lru:
        lru_stat_add(mem, pfn, -1)
        lru_add(mem, pfn)


@jit
def lru_add_drain(mem):
    """Empty the per-CPU batch: its folios go on their LRU and its references are dropped (in order of adding)."""
    sys = mem.sys[0]
    for i in range(sys.lru_batch_nr):
        pfn = mem.lru_batch[i]
        lru_add(mem, pfn)
        folio_put(mem, pfn)
    sys.lru_batch_nr = 0


@jit_inline
def folio_add_lru(mem, pfn):
    """Queue the folio for the LRU: it enters the per-CPU batch, which holds a reference until it is drained.

    The batch is drained when it is full, by a large folio, and always while lru_cache_disable() holds.
    """
    sys = mem.sys[0]
    mem.folios[pfn].refcount += 1
    mem.lru_batch[sys.lru_batch_nr] = pfn
    sys.lru_batch_nr += 1
    if sys.lru_batch_nr == LRU_BATCH_SIZE or mem.folios[pfn].order or sys.lru_disabled:
        lru_add_drain(mem)


@jit
def folio_putback_lru(mem, pfn):
    """Give back an isolated folio: NR_ISOLATED, its LRU, and the isolation reference (which may free it).

    Kernel: putback_movable_pages() for one LRU folio.
    """
    node_stat_add_isolated(mem, pfn, -1)
    folio_add_lru(mem, pfn)
    folio_put(mem, pfn)


# --- deferred split (mm/huge_memory.c) ------------------------------------------------------------------------

@jit
def deferred_split_folio(mem, pfn, partially_mapped):
    """Queue a large folio for splitting under memory pressure; orders below 2 never are."""
    folio = mem.folios[pfn]
    if folio.order <= 1:
        return
    if partially_mapped:
        folio.page_flags |= PG_partially_mapped
    if folio.page_flags & PG_deferred_list == 0:
        folio.page_flags |= PG_deferred_list
        mem.nodes[folio.nid].nr_deferred_split += 1


@jit
def folio_unqueue_deferred_split(mem, pfn):
    """Take it off that queue again; the partially-mapped mark goes with it."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_deferred_list:
        folio.page_flags &= ~(PG_deferred_list | PG_partially_mapped)
        mem.nodes[folio.nid].nr_deferred_split -= 1
