"""Frames of which every node has its own memory: kinds that are mixed, and a GPU's memory, where the CPU reads no byte.

Stands for the direct map of a machine whose nodes are not alike (frames.py). Its parts are one :class:`Frames` for each node
of host or pinned memory, and one allocation for each node in device memory.

On a machine with a device node (FRAMES_FAR) all that is done to bytes is done here, by Python: compiled code writes what it
would have done into Memory.frame_log, also where it could reach the bytes, since what is done now would overtake what
is written down. :meth:`NodeFrames.drain` carries it out; every method that shows bytes, or changes them, does that first.

*A lost device.* What the driver refuses is tried once more where the device still answers. Where it does not, or refuses again, the device is
lost, and so is what lies on its nodes (``lost``): once a DeviceLost names them, then everything that touches them raises the
same; copies of folios end with -EIO. Other nodes are as they were.

Leaves out more than one device.
"""

import ctypes

import numpy as np

from offload.errors import BrokenInvariant, DeviceLost, InvalidInput, NotSupported, OutOfMemory
from offload.kernels.base import CopyPlan
from offload.kernels.cpu import KERNELS, CpuBackend
from offload.mm.frames import HUGE_PAGE, Frames
from offload.mm.memmap import FRAMES_APART, FRAMES_FAR
from offload.units import EIO, PAGE_SHIFT, PAGE_SIZE, format_size

__all__ = ("NodeFrames",)


class DevicePart:
    """The frames of a node in device memory: ``address`` is the one that ``first_pfn`` 0 would have."""

    placement = "device"

    def __init__(self, device, nr_pages, first_pfn):
        from offload.kernels.cuda_engines import CudaError
        from offload.kernels.cuda_memory import DeviceMemory
        self.nbytes, self.first_pfn = nr_pages * PAGE_SIZE, first_pfn
        try:
            self._memory = DeviceMemory(device, self.nbytes + HUGE_PAGE)
        except CudaError as error:
            raise OutOfMemory(f"no room for {format_size(self.nbytes)} of frames in the memory of {device.name} ({error}); make the "
                              f"nodes smaller, or use placement 'pinned'") from None
        self.start = -(-self._memory.address // HUGE_PAGE) * HUGE_PAGE
        self.address = self.start - (first_pfn << PAGE_SHIFT)


class NodeFrames:
    """The memory of nodes given as (first pfn, pages, placement), in order of pfn; none of them "nowhere".

    ``addresses``: for each node the one that pfn 0 would have, 0 for a node without pages. Raises as :class:`Frames`, OutOfMemory
    also where the device has not so much, and then before anything is allocated. The methods are those of Frames, with
    pages of one node at a time. ``log`` and ``state`` are the machine's frame log and its counters (Machine hands them in).
    """

    def __init__(self, nodes):
        self.lost, self.log, self.state = (), None, None
        self.device, self.mover, self.fault = None, None, None
        self._queued, self._keep = False, []
        far = sum(nr_pages * PAGE_SIZE + HUGE_PAGE for _, nr_pages, placement in nodes if placement == "device" and nr_pages)
        self.kind = FRAMES_FAR if far else FRAMES_APART
        if far:
            self._open(far)
        self.parts = [None if not nr_pages else DevicePart(self.device, nr_pages, first) if placement == "device" else
                      Frames(nr_pages, placement, first) for first, nr_pages, placement in nodes]
        self.addresses = [part.address if part else 0 for part in self.parts]
        self.placements = tuple(placement for _, _, placement in nodes)
        self._first = np.array([first for first, _, _ in nodes])
        self._ranges = [(part.start, part.start + part.nbytes) for part in self.parts if isinstance(part, DevicePart)]

    def _open(self, nbytes):
        from offload.kernels.cuda import open_device
        from offload.kernels.cuda_engines import CudaError
        from offload.kernels.cuda_memory import SCRATCH_BYTES, Mover
        self.device = open_device()
        try:
            self.device.enter()
            free = self.device.driver.free_bytes()
            if nbytes + SCRATCH_BYTES > free:
                raise OutOfMemory(f"nodes in device memory need {format_size(nbytes)} and {self.device.name} has {format_size(free)} "
                                  f"free; make the nodes smaller, or use placement 'pinned'")
            self.mover = Mover(self.device)
        except CudaError as error:
            raise OutOfMemory(f"no room for frames in the memory of {self.device.name} ({error}); make the nodes smaller, or use "
                              f"placement 'pinned'") from None

    @property
    def nbytes(self):
        return sum(part.nbytes for part in self.parts if part)

    # --- bytes, for Python ------------------------------------------------------------------------------------

    def view(self, pfn, nr_pages):
        """As Frames.view(), of a node that the CPU reaches. NotSupported for one in device memory."""
        part, nid = self._part(pfn, nr_pages)
        if isinstance(part, DevicePart):
            raise NotSupported(f"pages {pfn}..{pfn + nr_pages - 1} lie in device memory, which the CPU does not see; use read() and write()")
        self.drain()
        return part.view(pfn, nr_pages)

    def read(self, pfn, nr_pages):
        """As Frames.read(); DeviceLost where they are lost."""
        part, _ = self._part(pfn, nr_pages)
        data = np.empty((nr_pages, PAGE_SIZE), np.uint8)
        self._now(data.ctypes.data, part.address + (pfn << PAGE_SHIFT), data.nbytes)
        return data

    def write(self, pfn, data, offset=0):
        """As Frames.write(); DeviceLost where they are lost."""
        data = np.frombuffer(data, np.uint8)
        part, _ = self._part(pfn, -(-(offset + len(data)) // PAGE_SIZE))
        self._now(part.address + (pfn << PAGE_SHIFT) + offset, data.ctypes.data, data.nbytes)

    def fill(self, pfn, nr_pages, value):
        """As Frames.fill(); DeviceLost where they are lost."""
        part, _ = self._part(pfn, nr_pages)
        self._now(part.address + (pfn << PAGE_SHIFT), 0, nr_pages * PAGE_SIZE, value)

    def checksums(self, pfns):
        """As Frames.checksums(); those of device pages are made on the device. DeviceLost where one is lost."""
        self.drain()
        pfns = np.asarray(pfns)
        nids = self.nids(pfns)
        sums = np.zeros(len(pfns), np.uint64)
        for nid in np.unique(nids).tolist():
            part, here = self.parts[nid], nids == nid
            if not isinstance(part, DevicePart):
                sums[here] = part.checksums(pfns[here])
                continue
            self._check_lost(nid)
            answer = []
            if not self._try(lambda: answer.append(self.mover.checksums(part.address, pfns[here]))):
                raise self.loss()
            sums[here] = answer[0]
        return sums

    # --- copies of folios -------------------------------------------------------------------------------------

    def nids(self, pfns):
        """The node of each pfn."""
        return np.searchsorted(self._first, pfns, side="right") - 1

    def plan(self, dst, src, order):
        """The CopyPlan of folios by pfn; of addresses where the folios of one side lie on several nodes."""
        (dst_base, dst), (src_base, src) = (self._side(pfns) for pfns in (dst, src))
        return CopyPlan(dst_base, src_base, dst, src, order)

    def _side(self, pfns):
        nids = self.nids(pfns)
        if len(nids) == 0 or (nids == nids[0]).all():
            return self.addresses[nids[0] if len(nids) else 0], pfns
        return 0, pfns + (np.array(self.addresses, np.int64)[nids] >> PAGE_SHIFT)

    def mc_copy(self, kernel, dst, src, order, done):
        """folios_mc_copy(): 0 or -EIO, ``done`` set for what was copied, up to the first that failed.

        With the CPU's copy kernel of this number where it reaches all nodes. Else each folio by itself, as in a move.
        """
        if self.kind != FRAMES_FAR:
            with CpuBackend(KERNELS[kernel]) as backend:
                return backend.copy(self.plan(dst, src, order), done)
        self.drain()
        for i, folio in enumerate(zip(dst.tolist(), src.tolist(), order.tolist())):
            rc = self.copy_folio(*folio)
            if rc:
                return rc
            done[i] = 1
        return 0

    def copy_block(self, dst, src, nr_pages):
        """As Frames.copy_block(); DeviceLost where one end is lost."""
        ends = [self._part(pfn, nr_pages)[0].address + (pfn << PAGE_SHIFT) for pfn in (dst, src)]
        self._now(*ends, nr_pages * PAGE_SIZE)

    def copy_folio(self, dst, src, order):
        """folio_mc_copy(), waited for: 0, or -EIO if one of the two nodes was lost before. DeviceLost if it is lost now."""
        ends = [self.addresses[nid] + (pfn << PAGE_SHIFT) for pfn, nid in ((dst, self._nid(dst)), (src, self._nid(src)))]
        if self._nid(dst) in self.lost or self._nid(src) in self.lost:
            return -EIO
        if not self._one(*ends, PAGE_SIZE << order, 0) or not self._sync():
            raise self.loss()
        return 0

    def check_device(self):
        """After something failed: DeviceLost if the device does not answer any more, for the first time."""
        if self.kind == FRAMES_FAR and not self.lost:
            says = self.mover.answers()
            if says is not None:
                self._lose(says)
                raise self.loss()

    # --- what compiled code has written down ------------------------------------------------------------------

    def keep(self, buffer):
        """Hold ``buffer``, whose address the log will have, until the log has been carried out."""
        self._keep.append(buffer)

    def drain(self, *, quiet=False):
        """Carry out the frame log. DeviceLost if that touched a lost node, unless ``quiet``: all else is done all the same.

        Ctrl-C leaves it to the next call to go on.
        """
        if self.kind != FRAMES_FAR:
            return
        state = self.state
        at, nr = state["frame_log_at"][0], state["frame_log_nr"][0]
        if nr == 0 and not self._queued:
            self._keep.clear()
            return
        whole = True
        for dst, src, nbytes, value in self.log[at:nr].tolist():
            whole &= self._one(dst, src, nbytes, value)
            state["frame_log_at"] += 1              # one row may be done twice, which changes nothing; a sequence may not
        whole &= self._sync()
        state[["frame_log_at", "frame_log_nr"]] = 0
        self._keep.clear()
        if state["frame_log_lost"][0]:
            raise BrokenInvariant(f"the frame log of {len(self.log)} rows was too short; please report it")
        if not whole and not quiet:
            raise self.loss()

    # --- single operations ------------------------------------------------------------------------------------

    def _now(self, dst, src, nbytes, value=0):
        self.drain()
        if nbytes and not (self._one(dst, src, nbytes, value) and self._sync()):
            raise self.loss()

    def _one(self, dst, src, nbytes, value):
        """Copy, or fill if ``src`` is 0, or queue that; False if it touches a lost node."""
        if not (self._is_far(dst) or self._is_far(src)):
            if not self._sync():
                return False                        # it may read what did not arrive
            if src:
                ctypes.memmove(dst, src, nbytes)
            else:
                ctypes.memset(dst, value, nbytes)
            return True
        if self.lost:
            return False
        self._queued = True
        if src:
            return self._try(lambda: self.mover.copy(dst, src, nbytes))
        return self._try(lambda: self.mover.fill(dst, value, nbytes))

    def _is_far(self, address):
        return any(start <= address < end for start, end in self._ranges)

    def _sync(self):
        """Wait for what is queued; False if the device is lost."""
        if not self._queued:
            return True
        from offload.kernels.cuda_engines import CudaError
        if not self.lost:
            try:
                self.mover.sync()
            except CudaError as error:              # nobody can tell which of what was queued did not arrive
                self._lose(error)
        self._queued = False
        return not self.lost

    def _try(self, operation):
        """Whether it could be done, or queued, at the second attempt at the latest; else the device is lost."""
        from offload.kernels.cuda_engines import CudaError
        try:
            operation()
            return True
        except CudaError as refused:
            error = refused
        if self.mover.answers() is None:
            try:
                operation()
                return True
            except CudaError as again:
                error = again
        self._lose(error)
        return False

    # --- a lost device ----------------------------------------------------------------------------------------

    def _lose(self, error):
        self.lost = tuple(nid for nid, part in enumerate(self.parts) if isinstance(part, DevicePart))
        self.fault = str(error)
        self.device.fail("device memory", error, "what lay there is lost")

    def loss(self):
        """The exception that names the lost nodes."""
        names = ", ".join(map(str, self.lost))
        return DeviceLost(f"node{'s' * (len(self.lost) > 1)} {names} {'are' if len(self.lost) > 1 else 'is'} lost with {self.device.name}: "
                          f"{self.fault}; what lay there is gone, other nodes are intact; build a new machine")

    def _check_lost(self, nid):
        if nid in self.lost:
            raise self.loss()

    def _nid(self, pfn):
        return int(self.nids(pfn))

    def _part(self, pfn, nr_pages):
        nid = self._nid(pfn)
        part = self.parts[nid] if nid >= 0 else None
        if part is None or pfn - part.first_pfn + nr_pages > part.nbytes >> PAGE_SHIFT:
            raise InvalidInput(f"pages {pfn}..{pfn + nr_pages - 1} are not frames of one node of this machine")
        self._check_lost(nid)
        return part, nid
