"""KSM pages: one page mapped read-only wherever its contents stood, found again through its stable node.

Stands for the part of mm/ksm.c (v7.3) that migration meets: stable nodes, their rmap_items, and what replace_page() does
to a page-table entry. Leaves out ksmd itself: which pages are equal is the
caller's affair.

The stable node is a row of ``Memory.anon_vmas`` (memmap.py); the folio's mapping is minus that row, with PG_ksm. The walk
over its mappings stands beside the others in pagetable.py.
"""

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.memmap import PG_ksm, unpack
from offload.mm.fault import zap_entry
from offload.mm.pagetable import (
    PTE_DIRTY, PTE_EXCLUSIVE, PTE_PRESENT, PTE_WRITE, PTE_YOUNG, add_rss, folio_add_rmap, set_pte, walk_pte,
)

__all__ = ("set_page_stable_node", "ksm_add_mapping", "ksm_merge_page")


@jit_entry
def set_page_stable_node(mem_table, pfn, stable_node):
    """Make an anonymous base page a KSM page of an unused row of anon_vmas. Its mappings are added one by one."""
    mem = unpack(mem_table)
    mem.anon_vmas[stable_node].kpfn = pfn
    mem.folios[pfn].page_flags |= PG_ksm
    mem.folios[pfn].mapping = -np.int32(stable_node)


@jit_entry
def ksm_add_mapping(mem_table, pfn, vma, address, item):
    """Note in an unused row of rmap_items that ``vma`` and its copies in forked processes map the KSM page at ``address``.

    The entry there becomes read-only and shared.
    """
    mem = unpack(mem_table)
    node = mem.anon_vmas[-np.int64(mem.folios[pfn].mapping)]
    row = mem.rmap_items[item]
    row.anon_vma, row.address = mem.vmas[vma].anon_vma, address
    row.next, node.first_item = node.first_item, item
    mem.tables[walk_pte(mem, mem.vmas[vma].mm, address)] &= ~(PTE_WRITE | PTE_EXCLUSIVE)


@jit_entry
def ksm_merge_page(mem_table, pfn, vma, address):
    """Map the KSM page in place of the equal page at ``address``, which goes (replace_page())."""
    mem = unpack(mem_table)
    area = mem.vmas[vma]
    pte = walk_pte(mem, area.mm, address)
    bits = mem.tables[pte] & (PTE_YOUNG | PTE_DIRTY)
    mem.folios[pfn].refcount += 1
    zap_entry(mem, vma, pte)
    set_pte(mem, pte, pfn, bits | PTE_PRESENT)
    folio_add_rmap(mem, pfn, vma, np.int64(0))
    add_rss(mem, area.mm, pfn, 1)


@jit
def folio_migrate_ksm(mem, dst, src):
    """The stable node follows from ``src`` to ``dst``, which has its mapping already (folio_migrate_ksm())."""
    mem.anon_vmas[-np.int64(mem.folios[dst].mapping)].kpfn = dst
    mem.folios[src].page_flags &= ~PG_ksm
