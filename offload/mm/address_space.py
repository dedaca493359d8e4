"""Page caches and the swap cache: which folio holds which page of a file, or which swap slot.

Stands for struct address_space and the xarray behind it (mm/filemap.c; v7.3): an array with one slot per page of
the file, in which a large folio fills all of its slots with its head. The swap cache (mm/swap_state.c) is one more such
array, indexed by swap entry. Leaves out readahead, writeback, truncation, and what a swap device does (mm/swap.py).
"""

import numpy as np

from offload.jit import jit, jit_entry, jit_inline
from offload.mm.memmap import (
    MAPPING_SHMEM, NO_PFN, PG_dirty, PG_private, PG_swapbacked, PG_swapcache, unpack,
)
from offload.units import HPAGE_PMD_ORDER

__all__ = ("filemap_get_folio", "filemap_add_folio", "filemap_remove_folio", "swap_cache_get_folio", "add_to_swap_cache",
           "swap_cache_add_folio", "delete_from_swap_cache", "swap_duplicate", "filemap_release_folio", "folio_attach_private",
           "folio_mark_dirty", "folio_clear_dirty")


@jit_inline
def filemap_get_folio(mem, mapping, index):
    """Head pfn of the folio that holds page ``index`` of the file, or NO_PFN. Takes no reference."""
    space = mem.mappings[mapping]
    if index < 0 or index >= space.nr_slots:
        return np.int64(NO_PFN)
    return mem.slots[space.slots + index]


@jit
def filemap_add_folio(mem, mapping, pfn, index):
    """Enter a new folio at ``index`` (aligned to its order): one reference per page, NR_FILE_PAGES, NR_SHMEM."""
    space = mem.mappings[mapping]
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    folio.mapping = np.int32(mapping)
    folio.index = index
    folio.refcount += np.int32(nr_pages)
    space.nrpages += nr_pages
    fill_slots(mem, mapping, index, nr_pages, pfn)
    if space.kind == MAPPING_SHMEM:
        folio.page_flags |= PG_swapbacked
    file_stat_add(mem, pfn, np.int64(folio.nid), nr_pages)
    if space.busy_buffers:
        folio_attach_private(mem, pfn)


@jit_inline
def fill_slots(mem, mapping, index, nr_pages, pfn):
    """Let slots ``index`` .. of an address space hold folio ``pfn``; NO_PFN empties them."""
    first = mem.mappings[mapping].slots + index
    for slot in range(first, first + nr_pages):
        mem.slots[slot] = pfn


@jit
def file_stat_add(mem, pfn, nid, nr_pages):
    """NR_FILE_PAGES, NR_SHMEM and NR_SHMEM_THPS of a page-cache folio on node ``nid``, by plus or minus its pages."""
    folio = mem.folios[pfn]
    node = mem.nodes[nid]
    node.nr_file_pages += nr_pages
    if mem.mappings[folio.mapping].kind == MAPPING_SHMEM:
        node.nr_shmem += nr_pages
        if folio.order >= HPAGE_PMD_ORDER:
            node.nr_shmem_thps += nr_pages


@jit
def file_split_stat(mem, pfn):
    """A page-cache folio is about to become base pages: NR_SHMEM_THPS loses it."""
    folio = mem.folios[pfn]
    if folio.order >= HPAGE_PMD_ORDER and folio.mapping > 0 and mem.mappings[folio.mapping].kind == MAPPING_SHMEM:
        mem.nodes[folio.nid].nr_shmem_thps -= np.int64(1) << folio.order


@jit
def filemap_remove_folio(mem, pfn):
    """Take a folio that is mapped nowhere out of its page cache. The caller's reference keeps it; its private data stays."""
    folio = mem.folios[pfn]
    mapping = np.int64(folio.mapping)
    nr_pages = np.int64(1) << folio.order
    fill_slots(mem, mapping, np.int64(folio.index), nr_pages, NO_PFN)
    mem.mappings[mapping].nrpages -= nr_pages
    file_stat_add(mem, pfn, np.int64(folio.nid), -nr_pages)
    folio_clear_dirty(mem, pfn)
    folio.refcount -= nr_pages
    folio.mapping = 0
    folio.index = 0


@jit_entry
def truncate_folio(mem_table, pfn):
    """filemap_remove_folio() for Python (truncate_inode_folio() of a folio that nobody maps)."""
    filemap_remove_folio(unpack(mem_table), pfn)


# --- private data (include/linux/pagemap.h, mm/filemap.c) -----------------------------------------------------

@jit
def folio_attach_private(mem, pfn):
    """Attach file-system private data (what it is does not matter here): PG_private and a reference."""
    folio = mem.folios[pfn]
    folio.page_flags |= PG_private
    folio.private = pfn
    folio.refcount += 1


@jit
def filemap_release_folio(mem, pfn):
    """Have the file system release the folio's private data. False if it will not; True too if there is none."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_private == 0:
        return True
    if mem.others[folio.others].unreleasable or folio.mapping > 0 and mem.mappings[folio.mapping].busy_buffers:
        return False
    folio.page_flags &= ~PG_private
    folio.private = 0
    folio.refcount -= 1
    return True


# --- the swap cache (mm/swap_state.c) -------------------------------------------------------------------------
#
# A folio in it has PG_swapcache, its swap entry in ``private``, and a reference for each of its pages. Its mapping
# stays what it was. Entry 0 is never used.

@jit_inline
def swap_cache_get_folio(mem, entry):
    """Head pfn of the folio that holds swap entry ``entry``, or NO_PFN. Takes no reference."""
    return filemap_get_folio(mem, mem.sys[0].swap_space, entry)


@jit
def swap_stat_add(mem, nid, nr_pages):
    """NR_FILE_PAGES and NR_SWAPCACHE."""
    mem.nodes[nid].nr_file_pages += nr_pages
    mem.nodes[nid].nr_swapcache += nr_pages


@jit_entry
def add_to_swap_cache(mem_table, pfn, entry):
    """swap_cache_add_folio() for Python."""
    swap_cache_add_folio(unpack(mem_table), pfn, entry)


@jit
def swap_cache_add_folio(mem, pfn, entry):
    """Enter a folio at swap entries ``entry`` .., for which there is none."""
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    folio.page_flags |= PG_swapcache | PG_swapbacked
    folio.private = entry
    folio.refcount += nr_pages
    fill_slots(mem, mem.sys[0].swap_space, entry, nr_pages, pfn)
    mem.mappings[mem.sys[0].swap_space].nrpages += nr_pages
    swap_stat_add(mem, np.int64(folio.nid), nr_pages)


@jit
def delete_from_swap_cache(mem, pfn):
    """Take a folio out of the swap cache; the caller holds a reference of its own (swap_cache_del_folio())."""
    folio = mem.folios[pfn]
    nr_pages = np.int64(1) << folio.order
    fill_slots(mem, mem.sys[0].swap_space, np.int64(folio.private), nr_pages, NO_PFN)
    mem.mappings[mem.sys[0].swap_space].nrpages -= nr_pages
    swap_stat_add(mem, np.int64(folio.nid), -nr_pages)
    folio.page_flags &= ~PG_swapcache
    folio.private = 0
    folio.refcount -= nr_pages


@jit_inline
def swap_duplicate(mem, entry):
    """One more page-table entry holds the swap entry."""
    mem.swap_map[entry] += 1


@jit
def folio_mark_dirty(mem, pfn):
    """Dirty a folio; NR_FILE_DIRTY counts it if it is in the page cache of a file with somewhere to write to."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_dirty == 0:
        folio.page_flags |= PG_dirty
        if folio.mapping > 0 and mem.mappings[folio.mapping].kind != MAPPING_SHMEM:
            mem.nodes[folio.nid].nr_file_dirty += np.int64(1) << folio.order


@jit
def folio_clear_dirty(mem, pfn):
    """The twin of folio_mark_dirty(): the folio has been written out, or is not worth it any more."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_dirty:
        folio.page_flags &= ~PG_dirty
        if folio.mapping > 0 and mem.mappings[folio.mapping].kind != MAPPING_SHMEM:
            mem.nodes[folio.nid].nr_file_dirty -= np.int64(1) << folio.order
