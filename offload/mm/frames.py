"""Where the bytes of a node's page frames live, and the copy of one folio.

Stands for the direct map, folio_mc_copy() (mm/util.c) and folio_zero_range(); v7.3. A node's frames lie
in host memory (one anonymous mapping for all nodes, huge pages advised), in *pinned* memory (page-locked by the CUDA
driver: the CPU does with it what it does with any, and a GPU reaches it), in *device* memory, or *nowhere*: metadata only, so
that a large machine fits in little memory; then a copy moves nothing and is not counted.

Where all nodes are of one kind that the CPU reaches, one :class:`Frames` holds them all and one base address serves both ends
of a copy. Else each node has its own (far_frames.py). On a machine with a device node compiled code touches no byte of any
node: what it would do it writes into Memory.frame_log, and Python does it, in that order.
"""

import ctypes
import mmap
import weakref

import numpy as np

from offload.errors import InvalidInput, OutOfMemory
from offload.intrinsics import fill_bytes
from offload.jit import jit, jit_inline
from offload.kernels.base import CopyPlan
from offload.kernels.checksum import checksum_pages
from offload.kernels.cpu import KERNEL_STREAM, KERNELS, CpuBackend, copy_bytes, copy_folios, prefetch, stream_fence
from offload.mm.memmap import FIRST_PFN, FRAMES_FAR, FRAMES_NOWHERE, FRAMES_TOGETHER
from offload.units import EHWPOISON, PAGE_SHIFT, PAGE_SIZE, format_size

__all__ = ("Frames", "frame_address", "poison_frames", "zero_frames", "prefetch_frame", "folio_mc_copy", "folios_mc_copy", "copy_pages",
           "copy_memory", "frame_log_is_full", "POISON")

POISON = 0xAA
FRAME_LOG_SPARE = 1024
"""Rows that are kept free for what is done between two looks at frame_log_is_full()."""
HUGE_PAGE = 2 << 20


class Frames:
    """The memory behind ``nr_pages`` frames from ``first_pfn`` on. ``address`` is the one pfn 0 would have.

    ``placement`` is "host" or "pinned". Raises OutOfMemory when the memory cannot be had, EngineUnavailable where no GPU
    is there to pin it for. Nothing of host memory is resident before it is touched, all of pinned memory is. It is given
    back when neither this object nor a view is left.

    What reads and writes frames from Python uses the methods, which NodeFrames (far_frames.py) has too.
    """

    kind = FRAMES_TOGETHER
    lost = ()
    """Nodes that are lost with their device."""

    def __init__(self, nr_pages, placement="host", first_pfn=FIRST_PFN):
        self.nbytes, self.first_pfn, self.placement = nr_pages * PAGE_SIZE, first_pfn, placement
        whole = (pinned_bytes if placement == "pinned" else host_bytes)(self.nbytes + HUGE_PAGE)
        offset = -whole.ctypes.data % HUGE_PAGE
        self._bytes = whole[offset:offset + self.nbytes]
        self.address = self._bytes.ctypes.data - (first_pfn << PAGE_SHIFT)

    def view(self, pfn, nr_pages):
        """The bytes of pages ``pfn`` .. as a writable uint8 array of shape (nr_pages, PAGE_SIZE); no copy."""
        start = (pfn - self.first_pfn) * PAGE_SIZE
        if pfn < self.first_pfn or start + nr_pages * PAGE_SIZE > self.nbytes:
            raise InvalidInput(f"pages {pfn}..{pfn + nr_pages - 1} are not frames of this machine")
        return self._bytes[start:start + nr_pages * PAGE_SIZE].reshape(nr_pages, PAGE_SIZE)

    def read(self, pfn, nr_pages):
        """A copy of the bytes of pages ``pfn`` ..: uint8 of shape (nr_pages, PAGE_SIZE)."""
        return self.view(pfn, nr_pages).copy()

    def write(self, pfn, data, offset=0):
        """Write ``data`` (a contiguous array of bytes) from byte ``offset`` of page ``pfn`` on."""
        data = np.frombuffer(data, np.uint8)
        nr_pages = -(-(offset + len(data)) // PAGE_SIZE)
        self.view(pfn, nr_pages).reshape(-1)[offset:offset + len(data)] = data

    def fill(self, pfn, nr_pages, value):
        """Fill pages ``pfn`` .. with one byte."""
        view = self.view(pfn, nr_pages)
        ctypes.memset(view.ctypes.data, value, view.nbytes)

    def checksums(self, pfns):
        """The checksum (uint64, kernels/checksum.py) of each of these pages."""
        return checksum_pages(self._bytes.reshape(-1, PAGE_SIZE), np.asarray(pfns) - self.first_pfn)

    def plan(self, dst, src, order):
        """The CopyPlan of folios by pfn."""
        return CopyPlan(self.address, self.address, dst, src, order)

    def mc_copy(self, kernel, dst, src, order, done):
        """folios_mc_copy() for callers in Python, with the copy kernel of this number: 0, ``done`` set."""
        with CpuBackend(KERNELS[kernel]) as backend:
            return backend.copy(self.plan(dst, src, order), done)

    def copy_block(self, dst, src, nr_pages):
        """Copy pages from pfn ``src`` on to ``dst`` .., as one piece."""
        np.copyto(self.view(dst, nr_pages), self.view(src, nr_pages))

    def drain(self):
        """Carry out what compiled code has left to Python: nothing here, it can touch these bytes."""


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
    """Address of a frame's first byte; 0 where the machine is metadata only. FRAMES_FAR: not to be touched."""
    frames = mem.nodes[mem.folios[pfn].nid].frames
    return frames + (pfn << PAGE_SHIFT) if frames else np.int64(0)


@jit
def log_frame_op(mem, dst, src, nbytes, value):
    """Leave to Python what compiled code cannot do to memory: a row of FRAME_OP_DTYPE, or a longer last one."""
    sys = mem.sys[0]
    nr = sys.frame_log_nr
    if nr > sys.frame_log_at:
        last = mem.frame_log[nr - 1]
        if last.dst + last.nbytes == dst and (last.src + last.nbytes == src if src else last.src == 0 and last.value == value):
            last.nbytes += nbytes
            return
    if nr == len(mem.frame_log):
        sys.frame_log_lost += 1
        return
    row = mem.frame_log[nr]
    row.dst, row.src, row.nbytes, row.value = dst, src, nbytes, value
    sys.frame_log_nr = nr + 1


@jit_inline
def frame_log_is_full(mem):
    """Whether Python must carry out the log now: there is room for one folio's affairs, but not for many."""
    return mem.sys[0].frame_log_nr + FRAME_LOG_SPARE > len(mem.frame_log) and mem.sys[0].frame_log_nr != 0


@jit
def fill_memory(mem, address, value, nbytes):
    """memset() of frames, now or when the log is carried out; nothing on a machine without bytes."""
    kind = mem.sys[0].frames_kind
    if kind == FRAMES_FAR:
        log_frame_op(mem, address, np.int64(0), nbytes, np.int64(value))
    elif kind != FRAMES_NOWHERE:
        fill_bytes(address, value, nbytes)


@jit
def copy_memory(mem, dst, src, nbytes):
    """Copy with the plain kernel between addresses, one of them a frame's; now or when the log is carried out.

    Nothing on a machine without bytes: a frame's address is none there, but some way behind 0.
    """
    kind = mem.sys[0].frames_kind
    if kind == FRAMES_FAR:
        log_frame_op(mem, dst, src, nbytes, np.int64(0))
    elif kind != FRAMES_NOWHERE:
        copy_bytes(0, dst, src, nbytes)


@jit
def poison_frames(mem, pfn, nr_pages):
    """Fill frames with POISON (init_on_alloc's unkind sister), so that a missing copy is seen."""
    address = frame_address(mem, pfn)
    if address:
        fill_memory(mem, address, POISON, nr_pages << PAGE_SHIFT)


@jit
def zero_frames(mem, pfn, nr_pages):
    address = frame_address(mem, pfn)
    if address:
        fill_memory(mem, address, 0, nr_pages << PAGE_SHIFT)


@jit
def copy_pages(mem, dst, src, nr_pages):
    """Copy ``nr_pages`` frames with the plain kernel (copy_user_highpage() and the like)."""
    address = frame_address(mem, dst)
    if address:
        copy_memory(mem, address, frame_address(mem, src), nr_pages << PAGE_SHIFT)


@jit_inline
def prefetch_frame(mem, pfn):
    """Ask for the beginning of a folio that will be copied next; any pfn is safe."""
    address = frame_address(mem, pfn)
    if address:
        for line in range(4):
            prefetch(address + 64 * line)


@jit
def folios_mc_copy(mem, kernel, dst, src, order, done):
    """Copy the folios of three arrays, in order, and set their ``done``, up to one that cannot be read.

    FRAMES_TOGETHER alone.

    Kernel: folios_mc_copy() (mm/util.c in RFC v6 1/5).
    """
    nr = len(order)
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
