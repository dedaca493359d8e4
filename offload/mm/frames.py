"""Where the bytes of a node's page frames live, and the copy of one folio.

Stands for the direct map, folio_mc_copy() (mm/util.c) and folio_zero_range(); v7.3. A machine's frames lie
in host memory (one anonymous mapping for all nodes, huge pages advised), in *pinned* memory (page-locked by the CUDA
driver: the CPU does with it what it does with any, and a GPU reaches it), or *nowhere*: metadata only, so
that a large machine fits in little memory; then a copy moves nothing and is not counted.

Leaves out frames in device memory: the compiled path would have to stop for each copy, and nobody could run it yet.
"""

import mmap
import weakref

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


class Frames:
    """The memory behind ``nr_pages`` frames from FIRST_PFN on. ``address`` is the one pfn 0 would have.

    ``placement`` is "host" or "pinned". Raises OutOfMemory when the memory cannot be had, EngineUnavailable where no GPU
    is there to pin it for. Nothing of host memory is resident before it is touched, all of pinned memory is. It is given
    back when neither this object nor a view is left.
    """

    def __init__(self, nr_pages, placement="host"):
        self.nbytes = nr_pages * PAGE_SIZE
        whole = (pinned_bytes if placement == "pinned" else host_bytes)(self.nbytes + HUGE_PAGE)
        offset = -whole.ctypes.data % HUGE_PAGE
        self._bytes = whole[offset:offset + self.nbytes]
        self.address = self._bytes.ctypes.data - (FIRST_PFN << PAGE_SHIFT)

    def view(self, pfn, nr_pages):
        """The bytes of pages ``pfn`` .. as a writable uint8 array of shape (nr_pages, PAGE_SIZE); no copy."""
        start = (pfn - FIRST_PFN) * PAGE_SIZE
        if pfn < FIRST_PFN or start + nr_pages * PAGE_SIZE > self.nbytes:
            raise InvalidInput(f"pages {pfn}..{pfn + nr_pages - 1} are not frames of this machine")
        return self._bytes[start:start + nr_pages * PAGE_SIZE].reshape(nr_pages, PAGE_SIZE)


def host_bytes(nbytes):
    """Fresh anonymous memory, huge pages advised: a uint8 array."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise OutOfMemory(f"no room for {format_size(nbytes)} of frames on this host ({error}); make the nodes smaller, or "
                          f"metadata only (placement 'nowhere')") from None
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def pinned_bytes(nbytes):
    """Fresh page-locked memory that the GPU reaches: a uint8 array, unpinned when the last view of it has gone."""
    from offload.kernels.cuda import open_device
    from offload.kernels.cuda_engines import CudaError, PinnedMemory
    device = open_device()
    try:
        memory = PinnedMemory(device, nbytes)
    except CudaError as error:
        raise OutOfMemory(f"no room for {format_size(nbytes)} of pinned memory ({error}); make the nodes smaller, or use "
                          f"placement 'host'") from None
    view = memory.view()
    weakref.finalize(view.base, memory.close)
    return view


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
