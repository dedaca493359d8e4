"""The state of a machine: the memmap (one record per page frame) and the tables around it, all NumPy arrays.

Stands for struct page / struct folio, struct pglist_data, mm_struct, vm_area_struct, anon_vma and
address_space as far as migration reads or writes them (include/linux/mm_types.h, page-flags.h, rmap.h, fs.h;
v7.3). Everything a machine knows is in the arrays of one :class:`Memory`; saving a machine is copying them.

Differences from the kernel, all on purpose:

* the order of the folio a page belongs to stands in ``orders[pfn]`` for head and tail pages alike (folios are
  naturally aligned, so the head is ``pfn`` rounded down); tail pages have no record of their own;
* AnonExclusive is a bit of the page-table entry, not of the page: an exclusive page has exactly one;
* LRU lists are flags and counters; which folio is older is not kept;
* a hardware-poisoned folio has its bad memory in its first page;
* the stable node of a KSM page is a row of ``anon_vmas`` whose chain is empty;
* one zone per node; no memory cgroups.

Left out: MGLRU generations, page_owner, DAX and device memory.

Compiled functions take ``mem`` and pfns. ``mem`` is one pointer to the table of a Memory (offload/table.py); those
that Python calls take the table itself, ``mem_table``, and begin with :func:`unpack`. Arrays of a Memory are never
resized in place: growing one makes a new Memory.
"""

import mmap
from typing import NamedTuple

import numpy as np

from offload.jit import jit_inline
from offload.table import make_unpack
from offload.units import MAX_PAGE_ORDER

__all__ = (
    "FOLIO_DTYPE", "NODE_DTYPE", "FREE_AREA_DTYPE", "MM_DTYPE", "VMA_DTYPE", "ANON_VMA_DTYPE", "AVC_DTYPE",
    "RMAP_ITEM_DTYPE", "MAPPING_DTYPE", "OTHERS_DTYPE", "FRAME_OP_DTYPE", "SYS_DTYPE", "Memory", "FIRST_PFN", "NO_PFN", "unpack",
    "folio_test_anon", "folio_test_large", "page_folio", "folio_expected_ref_count", "folio_trylock",
    "folio_unlock", "folio_is_file_lru",
)

NO_PFN = 0
"""No page: pfn 0 is never handed out."""
FIRST_PFN = 1 << MAX_PAGE_ORDER
"""Where node 0 begins; what lies below stands for the firmware's memory and is never used."""

# --- page flags (include/linux/page-flags.h) ------------------------------------------------------------------

PG_locked = 1 << 0
PG_writeback = 1 << 1
PG_referenced = 1 << 2
PG_uptodate = 1 << 3
PG_dirty = 1 << 4
PG_lru = 1 << 5
PG_active = 1 << 6
PG_workingset = 1 << 7
PG_swapbacked = 1 << 8
PG_unevictable = 1 << 9
PG_mlocked = 1 << 10
PG_swapcache = 1 << 11
PG_private = 1 << 12
PG_checked = 1 << 13
PG_mappedtodisk = 1 << 14
PG_readahead = 1 << 15
PG_young = 1 << 16
PG_idle = 1 << 17
PG_hwpoison = 1 << 18
PG_large_rmappable = 1 << 19
PG_partially_mapped = 1 << 20
PG_deferred_list = 1 << 21          # on its node's deferred-split queue (a list link in the kernel)
PG_hugetlb = 1 << 22                # page type PGTY_hugetlb
PG_movable_ops = 1 << 23            # page types PGTY_offline, PGTY_zsmalloc
PG_ksm = 1 << 24                    # FOLIO_MAPPING_KSM in folio->mapping
PG_reserved = 1 << 25
PG_movable_ops_isolated = 1 << 26
PG_zone_device = 1 << 27            # device memory that is neither private nor coherent: DAX
PG_hugetlb_migratable = 1 << 28     # HPageMigratable: a hugetlb folio in use that nobody has isolated
PG_hugetlb_temporary = 1 << 29      # HPageTemporary: allocated to migrate to, leaves the pool when it is freed
PG_hugetlb_subpool = 1 << 30        # hugetlb_folio_subpool(): counted by the mount that it belongs to
PG_hugetlb_unsupported = 1 << 31    # of a size that the architecture cannot migrate: a property of its hstate

# --- vma flags (include/linux/mm.h; values are ours) ----------------------------------------------------------

VM_READ = 1 << 0
VM_WRITE = 1 << 1
VM_EXEC = 1 << 2
VM_SHARED = 1 << 3
VM_LOCKED = 1 << 4
VM_PFNMAP = 1 << 5
VM_HUGETLB = 1 << 6
VM_DONTCOPY = 1 << 7

# --- address spaces -------------------------------------------------------------------------------------------

MAPPING_FILE, MAPPING_SHMEM, MAPPING_SWAP, MAPPING_HUGETLB = 1, 2, 3, 4
AOPS_MIGRATE_FOLIO, AOPS_FILEMAP, AOPS_BUFFER, AOPS_BUFFER_NOREFS, AOPS_NONE, AOPS_SECRETMEM = 1, 2, 3, 4, 5, 6
AOPS_NAMES = {"migrate_folio": AOPS_MIGRATE_FOLIO, "filemap": AOPS_FILEMAP, "buffer": AOPS_BUFFER,
              "buffer_norefs": AOPS_BUFFER_NOREFS, "none": AOPS_NONE, "secretmem": AOPS_SECRETMEM}
"""a_ops->migrate_folio of a mapping: which of the kernel's callbacks, or none."""

# --- where a node's bytes live --------------------------------------------------------------------------------

PLACE_HOST, PLACE_PINNED, PLACE_DEVICE, PLACE_NOWHERE = 1, 2, 3, 4

FRAMES_TOGETHER, FRAMES_APART, FRAMES_FAR, FRAMES_NOWHERE = 0, 1, 2, 3
"""How the nodes' bytes lie: at one address; at one each, all within the CPU's reach; some in device memory; or there are none. Of
a machine of the last two kinds compiled code touches no byte: see mm/far_frames.py."""

FOLIO_DTYPE = np.dtype({
    "page_flags": (np.int64, 0),    # PG_*
    "refcount": (np.int32, 8),
    "mapcount": (np.int32, 12),     # folio_mapcount(): page-table entries that map it, a PMD counts one
    "pincount": (np.int32, 16),     # FOLL_PIN pins; each also holds references: 1024 of a small folio, one of a large
    "order": (np.int16, 20),
    "nid": (np.int16, 22),
    "mapping": (np.int32, 24),      # > 0 an address space, < 0 minus an anon_vma, 0 none
    "others": (np.int32, 28),       # row of Memory.others: what others do to it during a call; 0 nothing
    "index": (np.int64, 32),        # offset in the mapping, in pages
    "private": (np.int64, 40),      # file-system private data, the swap entry, or the owner of a movable_ops page
    "migrate_info": (np.int64, 48),     # during a call: on a destination migrate/state.py, on a source its entry's place
    "cpupid": (np.int32, 56),
    "entire_mapcount": (np.int32, 60),  # those of mapcount that are PMD leaves
})
"""One page frame's record, 64 bytes; valid for head pages of folios in use."""

NODE_DTYPE = np.dtype([(name, np.int64) for name in (
    "start_pfn", "nr_pages", "cpus", "place",
    "frames",                       # address of the byte that pfn 0 would have, if its node went so far; 0 for PLACE_NOWHERE
    "nr_free_pages",                # in free blocks (NR_FREE_PAGES): without those on the per-CPU list
    "pcp_count",                    # base pages on the per-CPU list: Memory.pcp
    "nr_isolated_anon", "nr_isolated_file",
    "nr_lru_anon", "nr_lru_file", "nr_unevictable",
    "nr_anon_mapped", "nr_file_mapped", "nr_file_pages", "nr_shmem", "nr_shmem_thps", "nr_swapcache", "nr_file_dirty",
    "nr_mlock",
    "nr_deferred_split",
    "nr_hugepages", "free_hugepages", "surplus_hugepages",      # hugetlb's: in the pool or used, free in the pool, surplus
    "hugepage_freelist",            # first free folio of the pool (0: none); the next is in ``index``
)], align=True)
"""struct pglist_data and the node's part of struct hstate; counters are base pages, except nr_deferred_split and
*_hugepages (folios)."""

FREE_AREA_DTYPE = np.dtype([(name, np.int64) for name in (
    "nr_free",                      # free blocks of this order
    "leaf", "middle", "top",        # where the three levels of its bitmap begin in Memory.free_bits
    "nr_top",                       # words in the top level
)], align=True)
"""zone->free_area[order] of a node, at row ``nid * (MAX_PAGE_ORDER + 1) + order``."""

MM_DTYPE = np.dtype([(name, np.int64) for name in (
    "pgd",                          # its top page table; 0: this row is free
    "deposited",                    # page tables set aside, one for each PMD leaf, to split it without allocating
    "rss_anon", "rss_file", "rss_shmem",
    "hugetlb_usage",                # hugetlb pages mapped; in none of the others
)], align=True)
"""struct mm_struct: its page tables and the counters migration must keep (base pages)."""

VMA_DTYPE = np.dtype([(name, np.int64) for name in (
    "mm", "start", "end", "pgoff", "vm_flags", "mapping", "anon_vma",
    "order",                        # folio order to fault in where it fits
    "nid",                          # node to fault in on (then the others, nearest first)
    "first_avc",                    # this vma's links to anon_vmas: Memory.avcs, through next_of_vma
    "next_in_mapping",              # i_mmap: next vma of the same file
    "pol_mode", "pol_nodes",        # its memory policy: MPOL_* (0: none) and the nodes, a bit each (mm/mempolicy.py)
    "has_anon",                     # an anonymous page was mapped in it, or in what it was forked from: its anon_vma is in use
    "pol_ilx",                      # interleaving counts pages from this pgoff on: where it was mapped, before any split
)], align=True)
"""struct vm_area_struct; addresses in bytes, pgoff in pages. Row 0 is unused."""

ANON_VMA_DTYPE = np.dtype([(name, np.int64) for name in (
    "first_avc", "refcount",
    "kpfn", "first_item",           # of a KSM stable node: its page; its mappings, in Memory.rmap_items
)], align=True)
"""struct anon_vma, or struct ksm_stable_node: both are what folio->mapping of an anonymous page can mean."""
AVC_DTYPE = np.dtype([(name, np.int64) for name in ("vma", "anon_vma", "next_of_anon_vma", "next_of_vma")],
                     align=True)
"""struct anon_vma_chain: one link between a vma and an anon_vma."""

RMAP_ITEM_DTYPE = np.dtype([(name, np.int64) for name in ("anon_vma", "address", "next")], align=True)
"""struct ksm_rmap_item: a KSM page is mapped at ``address`` in the vmas of ``anon_vma``. Row 0 is unused."""

MAPPING_DTYPE = np.dtype([(name, np.int64) for name in (
    "kind", "aops", "nr_slots",
    "slots",                        # where its page cache begins in Memory.slots: one pfn per page of the file
    "nrpages", "first_vma",
    "inaccessible",                 # AS_INACCESSIBLE: the CPU may not touch its contents
    "busy_buffers",                 # every folio has buffer heads, and somebody (a journal) refers to them
)], align=True)
"""struct address_space; the swap space has one slot per swap entry. Row 0 is unused."""

OTHERS_DTYPE = np.dtype([(name, np.int64) for name in (
    "lock", "writeback",            # OTHERS_NO, OTHERS_UNTIL_WAIT, OTHERS_FOREVER
    "refs",                         # references somebody else holds, or will take
    "refs_held",                    # those of them that are held now
    "refs_from_batch_copy",         # taken right after the batch copy (or the flush), not before the call
    "refs_gone_after",              # dropped after this many failed move attempts; -1 never
    "refs_write",                   # their holder writes into the folio right after the batch copy
    "failed_moves",
    "alloc",                        # target allocations for it: ALLOC_OK, ALLOC_FAIL
    "pieces",                       # the row of its pieces after a split: whether their allocations fail, and their owner's callback
    "copy_error",                   # reading its bytes meets an uncorrectable memory error
    "poisoned_after_unmap",         # memory_failure() sets PG_hwpoison once it is unmapped
    "unreleasable",                 # its private data cannot be released
    "buffers_locked",               # its buffer heads: OTHERS_NO, OTHERS_UNTIL_WAIT, OTHERS_FOREVER
    "callback", "split",            # outcomes of its owner's migrate callback, of attempts to split it: Memory.scripts; 0: none told
)], align=True)
"""What others do to a folio while a call runs (``locked``, ``extra_refs`` ... of a scenario). Row 0: nothing."""

OTHERS_NO, OTHERS_UNTIL_WAIT, OTHERS_FOREVER = 0, 1, 2
ALLOC_OK, ALLOC_FAIL = 0, 1

SYS_DTYPE = np.dtype([(name, np.int64) for name in (
    "rule_set",                     # RULES_*
    "nr_nodes", "copy_kernel", "poison", "thp_migration",
    "nr_tables", "free_table",      # page-table pages handed out so far; head of the list of returned ones
    "lru_batch_nr", "lru_disabled",
    "offload_active", "offload_reasons",
    "frames_kind",                  # FRAMES_*
    "frame_log_at", "frame_log_nr", # Memory.frame_log: rows that have been carried out, and rows written
    "frame_log_lost",               # rows that found no room, which is a bug
    "protocol",                     # PROTOCOL_*: the rules of the batch copy (migrate/state.py)
    "offload_cpu_kernel",           # 1 + the copy kernel if the CPU routine is on duty; 0: somebody Python must call
    "memory_tiering",               # NUMA_BALANCING_MEMORY_TIERING; nodes with CPUs are the top tier
    "swap_space",                   # row of mappings, 0 without swap
    "swap_device",                  # address of the bytes of swap entry 0
    "thp_split_page", "thp_split_page_failed",
    "pgmigrate_success", "pgmigrate_fail",
    "thp_migration_success", "thp_migration_fail", "thp_migration_split",
    # target allocations of at least this order: so many more succeed, then so many fail (-1: all); 0: none is made to fail
    "alloc_fail_order", "alloc_fail_after", "alloc_fail_times",
    # struct compact_control, while compaction runs (mm/compaction.py)
    "cc_nid", "cc_freepages", "cc_nr_freepages", "cc_nr_migratepages", "cc_migrate_page", "cc_free_page",
)], align=True)
"""What there is one of: switches, the per-CPU LRU batch's fill, vmstat counters (units as in the kernel)."""

FRAME_OP_DTYPE = np.dtype([(name, np.int64) for name in ("dst", "src", "nbytes", "value")], align=True)
"""What is to be done to bytes that only Python reaches: copy ``nbytes`` from address ``src`` to ``dst``, or, where ``src`` is 0,
fill them with ``value``."""

LRU_BATCH_SIZE = 31
"""PAGEVEC_SIZE (include/linux/folio_batch.h)."""


class Memory(NamedTuple):
    """All state of a machine. Every field is a one-dimensional C-contiguous array."""

    folios: np.recarray             # FOLIO_DTYPE, indexed by pfn
    orders: np.ndarray              # uint8, indexed by pfn: order of the folio the page belongs to
    nodes: np.recarray              # NODE_DTYPE, indexed by nid
    free_areas: np.recarray         # FREE_AREA_DTYPE
    free_bits: np.ndarray           # int64 words: the buddy allocators' bitmaps
    pcp: np.ndarray                 # int64, PCP_HIGH pfns a node: the per-CPU lists of free base pages, the last is handed out next
    tables: np.ndarray              # int64: page-table pages of 512 entries; table t begins at t * 512
    mms: np.recarray                # MM_DTYPE
    vmas: np.recarray               # VMA_DTYPE
    anon_vmas: np.recarray          # ANON_VMA_DTYPE
    avcs: np.recarray               # AVC_DTYPE
    rmap_items: np.recarray         # RMAP_ITEM_DTYPE
    mappings: np.recarray           # MAPPING_DTYPE
    slots: np.ndarray               # int64: page caches, one pfn per page of a file
    swap_map: np.ndarray            # int64, indexed by swap entry: page-table entries that hold it
    mthp_nr_anon: np.ndarray        # int64: large anonymous folios, indexed by order
    others: np.recarray             # OTHERS_DTYPE
    scripts: np.ndarray             # int64: outcomes told beforehand. At a script's index how many are left, then they, last to first
    lru_batch: np.ndarray           # int64, LRU_BATCH_SIZE pfns
    frame_log: np.recarray          # FRAME_OP_DTYPE: what is still to be done to frames, in order; empty unless FRAMES_FAR
    sys: np.recarray                # SYS_DTYPE, one row


MEMORY_DTYPES = Memory(FOLIO_DTYPE, np.uint8, NODE_DTYPE, FREE_AREA_DTYPE, np.int64, np.int64, np.int64, MM_DTYPE, VMA_DTYPE,
                       ANON_VMA_DTYPE, AVC_DTYPE, RMAP_ITEM_DTYPE, MAPPING_DTYPE, np.int64, np.int64, np.int64, OTHERS_DTYPE, np.int64,
                       np.int64, FRAME_OP_DTYPE, SYS_DTYPE)


HUGE_PAGE = 2 << 20


def zeros(nr, dtype):
    """As np.zeros, on huge pages where the array is large: in random order, TLB misses would cost more than the data."""
    nbytes = nr * np.dtype(dtype).itemsize
    if nbytes < 2 * HUGE_PAGE:
        return np.zeros(nr, dtype)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = np.frombuffer(memory, np.uint8, 1).ctypes.data
    return np.frombuffer(memory, dtype, nr, -start % HUGE_PAGE)


def records(nr, dtype):
    """``nr`` zeroed records with attribute access, as the core reads them."""
    return zeros(nr, dtype).view(np.recarray)


unpack = make_unpack("Memory", MEMORY_DTYPES, as_arrays=("others", "frame_log"))


# --- folios (include/linux/mm.h, page-flags.h, pagemap.h) -----------------------------------------------------

@jit_inline
def folio_test_large(mem, pfn):
    return mem.folios[pfn].order > 0


@jit_inline
def folio_test_anon(mem, pfn):
    return mem.folios[pfn].mapping < 0


@jit_inline
def folio_is_file_lru(mem, pfn):
    """Whether its LRU and isolation counters are the FILE ones: everything that is not swap backed."""
    return mem.folios[pfn].page_flags & PG_swapbacked == 0


@jit_inline
def page_folio(mem, pfn):
    """Head pfn of the folio that page ``pfn`` belongs to (compound_head)."""
    order = np.int64(mem.orders[pfn])
    return pfn >> order << order


@jit_inline
def folio_expected_ref_count(mem, pfn):
    """References that caches, private data and page tables explain; the caller's own are not among them.

    Kernel: folio_expected_ref_count() (include/linux/mm.h, since v6.16), swap cache as fixed in v6.19.
    """
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    expected = np.int64(folio.mapcount)
    if folio.page_flags & PG_swapcache:
        expected += nr_pages
    if folio.mapping >= 0:                          # not anon
        if folio.mapping:
            expected += nr_pages
        if folio.page_flags & PG_private:
            expected += 1
    return expected


@jit_inline
def folio_trylock(mem, pfn):
    """Take the folio lock if it is free; True if we hold it now."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_locked:
        return False
    folio.page_flags |= PG_locked
    return True


@jit_inline
def folio_unlock(mem, pfn):
    mem.folios[pfn].page_flags &= ~PG_locked
