"""Page caches: which folio holds which page of a file.

Stands for struct address_space and the xarray behind it (mm/filemap.c; v7.3): an array with one slot per page of
the file, in which a large folio fills all of its slots with its head. Leaves out readahead, writeback, truncation
and the swap cache.
"""

import numpy as np

from offload.jit import jit, jit_inline
from offload.mm.memmap import MAPPING_SHMEM, NO_PFN, PG_dirty, PG_swapbacked

__all__ = ("filemap_get_folio", "filemap_add_folio", "folio_migrate_slots", "folio_mark_dirty")


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
    for i in range(nr_pages):
        mem.slots[space.slots + index + i] = pfn
    node = mem.nodes[folio.nid]
    node.nr_file_pages += nr_pages
    if space.kind == MAPPING_SHMEM:
        folio.page_flags |= PG_swapbacked
        node.nr_shmem += nr_pages


@jit_inline
def folio_migrate_slots(mem, dst, src):
    """Let the slots of ``src`` hold ``dst``; both have the same mapping, index and order by now."""
    folio = mem.folios[dst]
    first = mem.mappings[folio.mapping].slots + folio.index
    for slot in range(first, first + (np.int64(1) << folio.order)):
        mem.slots[slot] = dst


@jit
def folio_mark_dirty(mem, pfn):
    """Dirty a folio; NR_FILE_DIRTY counts it if it is in the page cache of a file with somewhere to write to."""
    folio = mem.folios[pfn]
    if folio.page_flags & PG_dirty == 0:
        folio.page_flags |= PG_dirty
        if folio.mapping > 0 and mem.mappings[folio.mapping].kind != MAPPING_SHMEM:
            mem.nodes[folio.nid].nr_file_dirty += np.int64(1) << folio.order
