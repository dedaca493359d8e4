"""Getting user pages: references and pins that somebody takes on the pages of a process.

Stands for mm/gup.c (v7.3) as far as migration meets it: FOLL_GET takes a reference, FOLL_PIN (with FOLL_LONGTERM, as RDMA and
io_uring pin) 1024 of a small folio, one and a pincount of a large one, and only of a page that is exclusively the process's.
Leaves out device memory and the moving of pages out of ZONE_MOVABLE.
"""

import numpy as np

from offload.jit import jit, jit_entry
from offload.mm.fault import do_wp_page, handle_fault, lookup_page
from offload.mm.hugetlb import hugetlb_fault
from offload.mm.memmap import NO_PFN, VM_HUGETLB, VM_PFNMAP, VM_WRITE, page_folio, unpack
from offload.mm.node import GUP_PIN_COUNTING_BIAS, folio_put_refs
from offload.mm.pagetable import PTE_EXCLUSIVE, PTE_PRESENT, PTE_WRITE
from offload.units import EFAULT, PAGE_SIZE

__all__ = ("get_user_page", "put_user_page")


@jit
def faultin_page(mem, vma, address, pin):
    """Fault one page in until it can be taken: (0, its pfn) or (-errno, NO_PFN).

    A pin of a writable vma's page writes; one of a page that is shared after a fork takes it away from the others first
    (FAULT_FLAG_UNSHARE).
    """
    area = mem.vmas[vma]
    write = pin and area.vm_flags & VM_WRITE != 0
    for attempt in range(3):
        entry, value, page = lookup_page(mem, area.mm, address)
        if value & PTE_PRESENT and not (write and value & PTE_WRITE == 0):
            if page == NO_PFN:
                if area.vm_flags & VM_PFNMAP:
                    return -EFAULT, np.int64(NO_PFN)
                if not pin:
                    return 0, page                  # the zero page: nothing to hold
                rc = do_wp_page(mem, vma, address, entry, True)
            elif pin and mem.folios[page_folio(mem, page)].mapping < 0 and value & PTE_EXCLUSIVE == 0:
                if area.vm_flags & VM_HUGETLB:
                    rc = hugetlb_fault(mem, vma, address, True)
                else:
                    rc = do_wp_page(mem, vma, address, entry, True)
            else:
                return 0, page
        else:
            rc = handle_fault(mem, vma, address, write)
        if rc:
            return rc, np.int64(NO_PFN)
    return -EFAULT, np.int64(NO_PFN)


@jit_entry
def get_user_page(mem_table, vma, address, pin):
    """Take a reference (or a pin) on the page at ``address``: (0, pfn) or (-errno, NO_PFN). Kernel: pin_user_pages()."""
    mem = unpack(mem_table)
    rc, page = faultin_page(mem, vma, address & -PAGE_SIZE, pin)
    if rc or page == NO_PFN:
        return rc, page
    folio = mem.folios[page_folio(mem, page)]
    if pin:
        folio.pincount += 1
        folio.refcount += 1 if folio.order else GUP_PIN_COUNTING_BIAS
    else:
        folio.refcount += 1
    return 0, page


@jit_entry
def put_user_page(mem_table, page, pin):
    """Give back what get_user_page() took. Kernel: unpin_user_page(), put_page()."""
    mem = unpack(mem_table)
    if page == NO_PFN:
        return
    pfn = page_folio(mem, page)
    folio = mem.folios[pfn]
    refs = 1
    if pin:
        folio.pincount -= 1
        refs = 1 if folio.order else GUP_PIN_COUNTING_BIAS
    folio_put_refs(mem, pfn, refs)
