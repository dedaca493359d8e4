"""The common folio in one go: a base page of anonymous memory, mapped by one page-table entry, of which nobody wants anything.

Stands for migrate_folio_unmap() and migrate_folio_move() of mm/migrate.c (v7.3) where none of their special cases applies. What
is left of them then stands here in a row, and leaves behind what they would: tests/test_simple_folio.py compares all of the
state. A folio about which there is any doubt is theirs; the functions here say no and have changed nothing.

Migrating base pages is migrating such folios, and asking for one special case after the other was a fifth of the time of moving
one without its bytes.
"""

from offload.intrinsics import ticks
from offload.jit import jit_inline
from offload.migrate.state import FOLIO_CONTENT_COPIED, FOLIO_WAS_MAPPED, migrate_info_record
from offload.mm.memmap import (
    NO_PFN, PG_active, PG_checked, PG_dirty, PG_idle, PG_locked, PG_mappedtodisk, PG_readahead, PG_referenced, PG_swapbacked,
    PG_uptodate, PG_workingset, PG_young, VM_LOCKED, VM_WRITE,
)
from offload.mm.node import alloc_pages_node, folio_add_lru, free_base_page, node_stat_add_isolated
from offload.mm.pagetable import (
    PTE_BITS, PTE_DIRTY, PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, pte_is_migration, pte_pfn, rmap_first, rmap_vma, set_pte,
)
from offload.units import MR_DEMOTION, MR_MEMORY_FAILURE, PROTOCOL_V6

__all__ = ("unmap_simple_folio", "move_simple_folio")

SIMPLE = (PG_referenced | PG_uptodate | PG_dirty | PG_active | PG_workingset | PG_swapbacked | PG_checked | PG_mappedtodisk
          | PG_readahead | PG_young | PG_idle)
"""The flags that a simple folio may have: the destination gets them, and that is all."""
COPIED_AND_MAPPED = FOLIO_CONTENT_COPIED | FOLIO_WAS_MAPPED


@jit_inline
def unmap_simple_folio(mem, call, src):
    """migrate_folio_unmap() of a simple folio; False if it is none. Its destination is in ``call.state.dst`` then.

    ``migrate_info`` of ``src`` is where its entry is expected (find_entry() of migrate/batch.py): that of base pages, without events.
    """
    c = call.state[0]
    folio = mem.folios[src]
    entry = folio.migrate_info
    if entry == 0 or folio.page_flags & ~SIMPLE or folio.mapping >= 0 or folio.others or c.target_special:
        return False
    old = mem.tables[entry]
    if folio.refcount != 2 or old & (PTE_PRESENT | PTE_SPECIAL) != PTE_PRESENT or pte_pfn(old) != src:
        return False                                # more references than the isolation's and that entry's, or none of an entry
    dst = alloc_pages_node(mem, c.target, 0)
    if dst == NO_PFN:                               # asked for again, and counted, by migrate_folio_unmap()
        return False
    c.targets_allocated += 1
    c.dst = dst
    anon_vma = -folio.mapping
    mem.anon_vmas[anon_vma].refcount += 1
    c.since = ticks()
    folio.page_flags |= PG_locked | (PG_dirty if old & PTE_DIRTY else 0)
    mem.folios[dst].page_flags |= PG_locked
    mem.tables[entry] = old & ~PTE_PRESENT | PTE_MIGRATION
    folio.mapcount = 0
    folio.refcount = 1
    mem.nodes[folio.nid].nr_anon_mapped -= 1
    mem.folios[dst].migrate_info = 0
    migrate_info_record(mem, c.protocol, dst, FOLIO_WAS_MAPPED, anon_vma)
    return True


@jit_inline
def move_simple_folio(mem, call, src, dst, since):
    """migrate_folio_move() of a simple folio that the batch copy has copied, in v6; False if it is none."""
    c = call.state[0]
    old, new = mem.folios[src], mem.folios[dst]
    entry, flags, mapping = old.migrate_info, old.page_flags, old.mapping
    if entry == 0 or flags & ~SIMPLE != PG_locked or mapping >= 0 or old.others or old.refcount != 1 or c.protocol != PROTOCOL_V6 \
            or new.migrate_info & COPIED_AND_MAPPED != COPIED_AND_MAPPED \
            or c.reason == MR_MEMORY_FAILURE or mem.sys[0].memory_tiering:
        return False
    pte = mem.tables[entry]
    vma = rmap_vma(mem, src, rmap_first(mem, src))
    if not pte_is_migration(pte) or mem.vmas[vma].vm_flags & (VM_LOCKED | VM_WRITE) != VM_WRITE:
        return False
    new.migrate_info = 0
    new.index = old.index
    new.mapping = mapping
    new.cpupid = old.cpupid
    new.page_flags |= flags & SIMPLE
    folio_add_lru(mem, dst)
    set_pte(mem, entry, dst, pte & PTE_BITS & ~PTE_MIGRATION | PTE_PRESENT)
    new.mapcount = 1                                # its reference is the allocation's from here on
    mem.nodes[new.nid].nr_anon_mapped += 1
    call.blocked[c.nr_blocked] = ticks() - since
    c.nr_blocked += 1
    c.moved_with_copy += 1
    new.page_flags &= ~PG_locked
    mem.anon_vmas[-mapping].refcount -= 1
    if c.reason != MR_DEMOTION:
        node_stat_add_isolated(mem, src, -1)
    free_base_page(mem, src)
    return True
