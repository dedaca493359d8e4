"""The pools of huge pages that hugetlb hands out: a list of free folios on each node, and the node's counts.

Stands for the pool part of mm/hugetlb.c (v7.3) for one hstate, that of PMD size: enqueue_hugetlb_folio(),
dequeue_hugetlb_folio_node_exact(), remove_hugetlb_folio() and free_huge_folio(). Leaves out reservations, subpool and
cgroup accounting, and vmemmap optimisation. It knows records only; what allocates and maps is mm/hugetlb.py.

A folio of a node's pool is in one of these states:

    ===========  ==================================================  ======================================
    state        marks                                               when its last reference goes
    ===========  ==================================================  ======================================
    free         PG_hugetlb, no reference, on ``hugepage_freelist``  -
    in use       PG_hugetlb, PG_hugetlb_migratable                   back to the list, unless the node has
                                                                     surplus folios: then it leaves the pool
    isolated     PG_hugetlb                                          as in use
    temporary    PG_hugetlb_temporary                                leaves the pool
    ===========  ==================================================  ======================================
"""

from offload.jit import jit
from offload.mm.memmap import NO_PFN, PG_hugetlb, PG_hugetlb_temporary, PG_hwpoison

__all__ = ("enqueue_hugetlb_folio", "dequeue_hugetlb_folio", "free_huge_folio")


@jit
def enqueue_hugetlb_folio(mem, pfn):
    """Put a folio without references on its node's list of free ones."""
    folio = mem.folios[pfn]
    node = mem.nodes[folio.nid]
    folio.page_flags = PG_hugetlb | folio.page_flags & PG_hwpoison
    folio.refcount = 0
    folio.index = node.hugepage_freelist
    node.hugepage_freelist = pfn
    node.free_hugepages += 1


@jit
def dequeue_hugetlb_folio(mem, nid):
    """Take a free folio of the node's pool, with one reference: its pfn, or NO_PFN. Poisoned ones are passed over.

    Its bytes are those of its last user. Kernel: dequeue_hugetlb_folio_node_exact().
    """
    node = mem.nodes[nid]
    before, pfn = NO_PFN, node.hugepage_freelist
    while pfn != NO_PFN and mem.folios[pfn].page_flags & PG_hwpoison:
        before, pfn = pfn, mem.folios[pfn].index
    if pfn == NO_PFN:
        return pfn
    folio = mem.folios[pfn]
    if before == NO_PFN:
        node.hugepage_freelist = folio.index
    else:
        mem.folios[before].index = folio.index
    node.free_hugepages -= 1
    folio.index = 0
    folio.refcount = 1
    return pfn


@jit
def free_huge_folio(mem, pfn):
    """What becomes of a hugetlb folio whose last reference is gone. True: it is free in its pool, its record as new.

    False: it has left the pool, is an ordinary folio now, and the caller gives its pages back.
    """
    folio = mem.folios[pfn]
    node = mem.nodes[folio.nid]
    folio.mapping = 0
    folio.others = 0
    folio.private = 0
    folio.migrate_info = 0
    folio.pincount = 0
    folio.cpupid = 0
    temporary = folio.page_flags & PG_hugetlb_temporary
    if temporary or node.surplus_hugepages:
        node.nr_hugepages -= 1
        if not temporary:
            node.surplus_hugepages -= 1
        folio.page_flags &= PG_hwpoison
        return False
    enqueue_hugetlb_folio(mem, pfn)
    return True
