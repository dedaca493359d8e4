"""What the rounds of the batch-copy series do differently, side by side: who joins the batch copy, and the mark on a copy.

Stands for __migrate_folio_record() and __migrate_folio_extract() of mm/migrate.c (v7.3) with the mark that skips a copy,
in four protocols of the series "Accelerate page migration with batch copying and hardware offload" (not merged): RFC v4
(2026-03-09), the ``migrate_flags`` proposed in its review (2026-03-24; details ours), v5 (2026-04-28), v6 (2026-06-30).

The word on a destination is ``anon_vma | old states``, and one bit more for the mark:

    ==================  ===================  ==================  ===================  =====================
    protocol            v4                   flags               v5                   v6
    ==================  ===================  ==================  ===================  =====================
    word                dst->private         dst->private        dst->migrate_info    dst->migrate_info
    mark                bit 2 of the word    argument of the     bit 2 of the word    bit 2 of the word
                                             callback
    says of             the batch list       the batch list      the batch list       one folio
    set by              each move attempt,   each move attempt,  each move attempt,   whoever copied it,
                        if the batch copy    if the batch copy   if the batch copy    right after its copy
                        returned 0           returned 0          returned 0
    consumed by         __migrate_folio():   nobody              __migrate_folio():   __migrate_folio():
                        word = 0                                 word = 0             clears the bit
    a retry             skips the copy       skips the copy      skips the copy       copies afresh
                        again                again               again
    a batch copy that   nothing              nothing             nothing              the folios marked
    fails keeps                                                                       before
    joins the batch     all but movable_ops  all but movable_ops all but movable_ops  those without an
    copy                                                                              unexplained reference
    a lost write takes  a reference, at any time before the move that succeeds        one taken after unmap
                                                                                      and gone before the
                                                                                      first move
    ==================  ===================  ==================  ===================  =====================

Which reasons go through the hatch at all is settled when a migrator registers (copy_offload.py).
"""

import numpy as np

from offload.jit import jit_inline
from offload.mm.memmap import PG_movable_ops, folio_expected_ref_count
from offload.units import PROTOCOL_FLAGS, PROTOCOL_V5, PROTOCOL_V6

__all__ = ("FOLIO_WAS_MAPPED", "FOLIO_WAS_MLOCKED", "FOLIO_CONTENT_COPIED", "migrate_info_record",
           "migrate_info_extract", "folio_take_content_copied", "folio_set_content_copied", "folio_hand_down_copied",
           "folio_batch_eligible", "batch_counts_as_copied", "wants_offload")

FOLIO_WAS_MAPPED = 1 << 0
FOLIO_WAS_MLOCKED = 1 << 1
FOLIO_CONTENT_COPIED = 1 << 2       # v4: PAGE_ALREADY_COPIED, v5: FOLIO_ALREADY_COPIED
OLD_STATES = FOLIO_WAS_MAPPED | FOLIO_WAS_MLOCKED
ANON_VMA_SHIFT = 3                  # a pointer's low bits in the kernel


# --- who joins ------------------------------------------------------------------------------------------------

@jit_inline
def wants_offload(mem, reason):
    """Whether batches of this reason go through the hatch: asked once at each entry of migrate_pages_batch()."""
    sys = mem.sys[0]
    return sys.offload_active != 0 and sys.offload_reasons >> reason & 1 != 0


@jit_inline
def folio_batch_eligible(mem, protocol, src):
    """Whether an unmapped folio may join the batch copy: not movable_ops and, in v6, no reference that is unexplained."""
    folio = mem.folios[src]
    if folio.page_flags & PG_movable_ops:
        return False
    return protocol != PROTOCOL_V6 or folio.refcount == folio_expected_ref_count(mem, src) + 1


# --- the word -------------------------------------------------------------------------------------------------

@jit_inline
def get_word(mem, protocol, dst):
    return mem.folios[dst].migrate_info if protocol <= PROTOCOL_V5 else mem.folios[dst].private


@jit_inline
def set_word(mem, protocol, dst, word):
    if protocol <= PROTOCOL_V5:
        mem.folios[dst].migrate_info = word
    else:
        mem.folios[dst].private = word


@jit_inline
def migrate_info_record(mem, protocol, dst, old_state, anon_vma):
    """Write the whole word: old-state bits and the anon_vma (0 for none). A mark that stood there is gone."""
    set_word(mem, protocol, dst, anon_vma << ANON_VMA_SHIFT | old_state)


@jit_inline
def migrate_info_extract(mem, protocol, dst):
    """Give (old-state bits, anon_vma) and clear them. In v6 the mark stays; in v4 and v5 it is one of the old-state bits."""
    word = get_word(mem, protocol, dst)
    if protocol == PROTOCOL_V6:
        set_word(mem, protocol, dst, word & FOLIO_CONTENT_COPIED)
        return word & OLD_STATES, word >> ANON_VMA_SHIFT
    set_word(mem, protocol, dst, np.int64(0))
    return word & (OLD_STATES | FOLIO_CONTENT_COPIED), word >> ANON_VMA_SHIFT


# --- the mark, in the order of its life -------------------------------------------------------------------------

@jit_inline
def folio_set_content_copied(mem, protocol, dst):
    """The batch copy has wholly written ``dst``: v6 marks it now."""
    if protocol == PROTOCOL_V6:
        mem.folios[dst].migrate_info |= FOLIO_CONTENT_COPIED


@jit_inline
def batch_counts_as_copied(protocol, failed):
    """Whether every folio of the batch list counts as copied, whatever was marked: v4, flags and v5, on return code 0."""
    return protocol != PROTOCOL_V6 and failed == 0


@jit_inline
def folio_hand_down_copied(mem, protocol, dst):
    """move_to_new_folio(), before the callback, for a folio on a batch list that was copied: v4 and v5 write the mark."""
    if protocol != PROTOCOL_FLAGS:
        set_word(mem, protocol, dst, get_word(mem, protocol, dst) | FOLIO_CONTENT_COPIED)


@jit_inline
def folio_take_content_copied(mem, protocol, dst, batch_copied):
    """__migrate_folio(): whether dst holds the contents already. Consumes the mark; with flags there is none to consume."""
    if protocol == PROTOCOL_FLAGS:
        return batch_copied != 0
    word = get_word(mem, protocol, dst)
    set_word(mem, protocol, dst, word & ~np.int64(FOLIO_CONTENT_COPIED) if protocol == PROTOCOL_V6 else np.int64(0))
    return word & FOLIO_CONTENT_COPIED != 0
