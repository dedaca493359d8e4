"""A GPU's own memory as frames: one allocation, and the single copies, fills and checksums that are not a batch.

Stands for what clear_highpage(), copy_highpage() and folio_mc_copy() would be where the CPU reads no byte. Everything is queued
on one stream and is in its order; sync() waits. Whoever calls keeps host memory alive until then. Host memory may be pageable:
the driver stages it. Leaves out memory of more than one device, pools, and asynchronous use: a copy that somebody measures
belongs into cuda_engines.

Nothing of this has been run on a GPU yet; see docs/gpu.md.
"""

import weakref

import numpy as np

from offload.errors import EngineUnavailable
from offload.kernels.base import FRAME_SHIFT, FRAME_SIZE
from offload.kernels.checksum import checksum_pages
from offload.kernels.cuda_driver import CudaError, KernelArguments

__all__ = ("DeviceMemory", "Mover")

PIECE_PAGES = 1 << 16
"""Pages whose checksums are asked for in one launch; 12 bytes of the scratch memory each."""
SCRATCH_BYTES = 2 * FRAME_SIZE + 12 * PIECE_PAGES
"""What a Mover takes of the device's memory, at once: later there may be none left."""
BLOCK_THREADS = 256


class DeviceMemory:
    """``nbytes`` of a device's memory at ``address``, given back when nobody has this object. CudaError if there is not so much."""

    def __init__(self, device, nbytes):
        device.enter()
        self.nbytes, self.address = nbytes, device.driver.alloc(nbytes)
        weakref.finalize(self, give_back, device, "cuMemFree_v2", self.address)


def give_back(device, call, handle):
    device.enter_quietly()
    device.quietly(call, handle)


class Mover:
    """A stream for single operations. CudaError from any of them; after one answers() tells whether the device is still there."""

    def __init__(self, device):
        device.enter()
        self.device, self.driver = device, device.driver
        self.scratch = DeviceMemory(device, SCRATCH_BYTES)
        self.stream = self.driver.stream()
        weakref.finalize(self, give_back, device, "cuStreamDestroy_v2", self.stream)

    def copy(self, dst, src, nbytes):
        """Queue a copy between two addresses that do not overlap, at least one of them in the device's reach."""
        self.device.enter()
        self.driver("cuMemcpyAsync", dst, src, nbytes, self.stream)

    def fill(self, dst, value, nbytes):
        """Queue filling device memory with one byte."""
        self.device.enter()
        self.driver("cuMemsetD8Async", dst, value, nbytes, self.stream)

    def sync(self):
        """Wait for what is queued."""
        self.device.enter()
        self.driver("cuStreamSynchronize", self.stream)

    def answers(self):
        """None if the device still copies a page of its own; else what it says instead, in one line."""
        try:
            self.copy(self.scratch.address + FRAME_SIZE, self.scratch.address, FRAME_SIZE)
            self.sync()
        except CudaError as error:
            return str(error)
        return None

    def checksums(self, base, pages):
        """Checksums (uint64) of device pages ``pages`` (int64), counted from address ``base``: by the kernel, where it can
        be compiled, else of the pages brought to the host."""
        sums = np.zeros(len(pages), np.uint64)
        try:
            function = self.device.kernel("checksum_pages")
        except EngineUnavailable:
            function = None
        for start in range(0, len(pages), PIECE_PAGES):
            some = slice(start, start + PIECE_PAGES)
            if function is None:
                sums[some] = self._checksums_here(base, pages[some])
            else:
                self._launch(function, base, pages[some], sums[some])
        return sums

    def _launch(self, function, base, pages, sums):
        lowest = int(pages.min())
        listed = (pages - lowest).astype(np.uint32)
        room = self.scratch.address + 2 * FRAME_SIZE
        self.fill(room, 0, sums.nbytes)
        self.copy(room + sums.nbytes, listed.ctypes.data, listed.nbytes)
        blocks = min(self.device.nr_sms * 4, -(-len(pages) * 32 // BLOCK_THREADS))
        self.driver.launch(function, blocks, BLOCK_THREADS, self.stream, KernelArguments(
            np.uint64(base + (lowest << FRAME_SHIFT)), np.uint64(room + sums.nbytes), np.uint64(len(pages)), np.uint64(room)))
        self.copy(sums.ctypes.data, room, sums.nbytes)
        self.sync()

    def _checksums_here(self, base, pages):
        here = np.empty((len(pages), FRAME_SIZE), np.uint8)
        for row, page in zip(here, pages.tolist()):
            self.copy(row.ctypes.data, base + (page << FRAME_SHIFT), FRAME_SIZE)
        self.sync()
        return checksum_pages(here)
