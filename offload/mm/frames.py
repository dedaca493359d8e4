"""Where the bytes of a node's page frames live, and the copy of one folio.

Stands for the direct map, folio_mc_copy() (mm/util.c) and folio_zero_range(); v7.3. A machine's frames lie
either in host memory (one anonymous mapping for all nodes, huge pages advised) or *nowhere*: metadata only, so
that a large machine fits in little memory; then a copy moves nothing and is not counted.

Frames of device and pinned memory come with the GPU engines.
"""

import ctypes
import mmap

import numpy as np

from offload.errors import InvalidInput, OutOfMemory
from offload.intrinsics import fill_bytes
from offload.jit import jit, jit_inline
from offload.kernels.cpu import KERNEL_STREAM, copy_bytes, copy_folios, prefetch, stream_fence
from offload.mm.memmap import FIRST_PFN
from offload.units import EHWPOISON, PAGE_SHIFT, PAGE_SIZE, format_size

__all__ = ("Frames", "frame_address", "poison_frames", "zero_frames", "prefetch_frame", "folio_mc_copy", "folios_mc_copy", "copy_pages", "POISON")

POISON = 0xAA
HUGE_PAGE = 2 << 20
PLACEMENTS = ("host", "nowhere")


class Frames:
    """The host memory behind ``nr_pages`` frames from FIRST_PFN on. ``address`` is the one pfn 0 would have.

    Raises OutOfMemory when the mapping cannot be had; nothing of it is resident before it is touched.
    """

    def __init__(self, nr_pages):
        self.nbytes = nr_pages * PAGE_SIZE
        try:
            self._map = mmap.mmap(-1, self.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemory(f"no room for {format_size(self.nbytes)} of frames on this host ({error}); make the "
                              f"nodes smaller, or metadata only (placement 'nowhere')") from None
        self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start = -(-start // HUGE_PAGE) * HUGE_PAGE
        self.address = self._start - (FIRST_PFN << PAGE_SHIFT)

    def view(self, pfn, nr_pages):
        """The bytes of pages ``pfn`` .. as a writable uint8 array of shape (nr_pages, PAGE_SIZE); no copy."""
        offset = self._start - ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + (pfn - FIRST_PFN) * PAGE_SIZE
        if pfn < FIRST_PFN or (pfn - FIRST_PFN + nr_pages) * PAGE_SIZE > self.nbytes:
            raise InvalidInput(f"pages {pfn}..{pfn + nr_pages - 1} are not frames of this machine")
        return np.frombuffer(self._map, np.uint8, nr_pages * PAGE_SIZE, offset).reshape(nr_pages, PAGE_SIZE)


@jit_inline
def frame_address(mem, pfn):
    """Address of a frame's first byte; 0 where the machine is metadata only."""
    frames = mem.nodes[mem.folios[pfn].nid].frames
    return frames + (pfn << PAGE_SHIFT) if frames else np.int64(0)


@jit
def poison_frames(mem, pfn, nr_pages):
    """Fill frames with POISON (init_on_alloc's unkind sister), so that a missing copy is seen."""
    address = frame_address(mem, pfn)
    if address:
        fill_bytes(address, POISON, nr_pages << PAGE_SHIFT)


@jit
def zero_frames(mem, pfn, nr_pages):
    address = frame_address(mem, pfn)
    if address:
        fill_bytes(address, 0, nr_pages << PAGE_SHIFT)


@jit
def copy_pages(mem, dst, src, nr_pages):
    """Copy ``nr_pages`` frames with the plain kernel (copy_user_highpage() and the like)."""
    address = frame_address(mem, dst)
    if address:
        copy_bytes(0, address, frame_address(mem, src), nr_pages << PAGE_SHIFT)


@jit_inline
def prefetch_frame(mem, pfn):
    """Ask for the beginning of a folio that will be copied next; any pfn is safe."""
    address = frame_address(mem, pfn)
    if address:
        for line in range(4):
            prefetch(address + 64 * line)


@jit
def folios_mc_copy(mem, kernel, dst, src, order, nr, done):
    """Copy the first ``nr`` folios of three arrays, in order, and set their ``done``, up to one that cannot be read.

    Kernel: folios_mc_copy() (mm/util.c in RFC v6 1/5).
    """
    if len(mem.others) > 1:
        for i in range(nr):
            if mem.others[mem.folios[src[i]].others].copy_error:
                nr = i
                break
    frames = mem.nodes[0].frames
    copy_folios(kernel, frames, frames, dst, src, order, 0, nr, done)


@jit
def folio_mc_copy(mem, dst, src):
    """Copy the contents of folio ``src`` to ``dst`` with the machine's copy kernel. 0 or -EHWPOISON.

    Kernel: folio_mc_copy(). An uncorrectable error (``others.copy_error``) leaves dst partly written.
    """
    if mem.others[mem.folios[src].others].copy_error:
        return -EHWPOISON
    address = frame_address(mem, dst)
    if address:
        kernel = mem.sys[0].copy_kernel
        copy_bytes(kernel, address, frame_address(mem, src), np.int64(PAGE_SIZE) << mem.folios[src].order)
        if kernel == KERNEL_STREAM:
            stream_fence()
    return 0
