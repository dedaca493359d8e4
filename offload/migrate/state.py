"""The state word on a destination: what src was before the unmap, and the mark that its contents are copied.

Stands for __migrate_folio_record() and __migrate_folio_extract() of mm/migrate.c (v7.3, dst->migrate_info) with
the mark of RFC v6 ("mm/migrate: skip data copy for already-copied folios", 2026-06-30, not merged). This is the
one file that knows where the mark lives, who may get one, who sets it and who consumes it; the other protocols of
the series will stand beside it.

v6: the mark is per folio (FOLIO_CONTENT_COPIED); it is set on each destination that was wholly written; reading
it consumes it, so a retry copies afresh.
"""

import numpy as np

from offload.jit import jit_inline
from offload.mm.memmap import PG_movable_ops, folio_expected_ref_count

__all__ = ("FOLIO_WAS_MAPPED", "FOLIO_WAS_MLOCKED", "FOLIO_CONTENT_COPIED", "migrate_info_record",
           "migrate_info_extract", "folio_take_content_copied", "folio_set_content_copied", "folio_batch_eligible",
           "wants_offload")

FOLIO_WAS_MAPPED = 1 << 0
FOLIO_WAS_MLOCKED = 1 << 1
FOLIO_CONTENT_COPIED = 1 << 2
OLD_STATES = FOLIO_WAS_MAPPED | FOLIO_WAS_MLOCKED
ANON_VMA_SHIFT = 3                  # a pointer's low bits in the kernel


@jit_inline
def migrate_info_record(mem, dst, old_state, anon_vma):
    """Write the whole word: old-state bits and the anon_vma (0 for none). A mark that stood there is gone."""
    mem.folios[dst].migrate_info = anon_vma << ANON_VMA_SHIFT | old_state


@jit_inline
def migrate_info_extract(mem, dst):
    """Give (old-state bits, anon_vma) and clear them; the mark stays (v6)."""
    word = mem.folios[dst].migrate_info
    mem.folios[dst].migrate_info = word & FOLIO_CONTENT_COPIED
    return word & OLD_STATES, word >> ANON_VMA_SHIFT


@jit_inline
def wants_offload(mem, reason):
    """Whether batches of this reason go through the hatch: asked once at each entry of migrate_pages_batch()."""
    sys = mem.sys[0]
    return sys.offload_active != 0 and sys.offload_reasons >> reason & 1 != 0


@jit_inline
def folio_batch_eligible(mem, src):
    """Whether an unmapped folio may join the batch copy: not movable_ops, and no reference that is unexplained."""
    folio = mem.folios[src]
    return folio.page_flags & PG_movable_ops == 0 and folio.refcount == folio_expected_ref_count(mem, src) + 1


@jit_inline
def folio_set_content_copied(mem, dst):
    """Mark a destination that the batch copy has wholly written."""
    mem.folios[dst].migrate_info |= FOLIO_CONTENT_COPIED


@jit_inline
def folio_take_content_copied(mem, dst):
    """Whether dst carries the mark; consumes it."""
    word = mem.folios[dst].migrate_info
    mem.folios[dst].migrate_info = word & ~np.int64(FOLIO_CONTENT_COPIED)
    return word & FOLIO_CONTENT_COPIED != 0
