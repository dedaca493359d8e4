"""The hatch: one migrator at a time may stand at it and copy whole batches.

Stands for mm/migrate_copy_offload.c of RFC v6 3/5 (2026-06-30, not merged) and what its place was in v4 and v5:
registration, the reason mask and its text form, and the call into whoever is on duty. Leaves out being compiled out, and
waiting for calls in flight (there are none: a call runs to its end before Python can register anybody; an event that
unregisters in the middle of one finds the batch copied by the CPU routine, as in the kernel).

    ==================  ========================  ==============================  ===========================
    protocol            v4, flags                 v5                              v6
    ==================  ========================  ==============================  ===========================
    register            migrate_offload_start()   migrate_offload_register()      migrate_offload_register(m,
                                                                                  mask)
    without an owner    built in                  -EINVAL                         built in
    reasons             the driver's              compaction, syscall_or_cpuset,  the mask; can be changed
                        should_batch(reason)      demotion, numa_misplaced        while on duty
    ==================  ========================  ==============================  ===========================
"""

from typing import NamedTuple, Protocol

import numpy as np

from offload.errors import Busy, EngineUnavailable, InvalidInput
from offload.kernels.base import CopyPlan
from offload.mm.memmap import PLACE_DEVICE, PLACE_HOST
from offload.units import EOPNOTSUPP, PROTOCOL_V5, PROTOCOL_V6, PROTOCOLS, MigrateReason, parse_unsigned

__all__ = ("FolioBatch", "Migrator", "CopyOffload", "parse_reason_mask", "format_reason_mask", "ALL_REASONS",
           "V5_REASONS", "WRITTEN_UNMARKED")

ALL_REASONS = (1 << len(MigrateReason)) - 1
V5_REASONS = sum(1 << reason for reason in (MigrateReason.MR_COMPACTION, MigrateReason.MR_SYSCALL, MigrateReason.MR_DEMOTION,
                                            MigrateReason.MR_NUMA_MISPLACED))
"""Reasons that v5 batches; its list is fixed in the core, a mask can only narrow it here."""
WRITTEN_UNMARKED = 2
"""A completion of a migrator that wholly wrote a folio and does not say so: the copy counts, the folio gets no mark."""


class FolioBatch(NamedTuple):
    """What a migrator gets: folios by head pfn, in list order, dst first as in the kernel's callback."""

    dst: np.ndarray
    """int64 pfns: locked, of the same order as their source, nobody else's."""
    src: np.ndarray
    """int64 pfns: locked, unmapped."""
    order: np.ndarray
    """uint8."""
    frames: object
    """Address that the first byte of pfn 0 would have: pfn ``p`` lies at ``frames + p * 4096``. On a machine whose nodes lie
    apart it is its NodeFrames instead (mm/far_frames.py). :meth:`plan` serves both."""
    nr_cut: int = 0
    """Folios that follow in the list and were cut off: a CPU meets a machine check at the first of them."""

    def plan(self, entries=slice(None)):
        """The CopyPlan of these entries: what a backend or a DMA channel takes."""
        dst, src, order = self.dst[entries], self.src[entries], self.order[entries]
        if isinstance(self.frames, int):
            return CopyPlan(self.frames, self.frames, dst, src, order)
        return self.frames.plan(dst, src, order)


class Migrator(Protocol):
    """Who may stand at the hatch.

    ``offload_copy(batch, done)`` copies the folios of a :class:`FolioBatch` and sets ``done[i]`` (uint8, zeroed) to 1
    for exactly those that it wholly wrote; it leaves the arrays of the batch as they are. It returns 0 or a negative
    errno. In v6 only ``done`` decides what counts as copied; in v4, flags and v5 only the return value does, 0 for all,
    and ``done`` is for counting. What does not count is copied by the migration path itself. Every source is locked and
    unmapped, every destination locked and of the same size; it may sleep. An exception is a broken migrator and ends the
    call after all folios have been restored or moved.

    ``owner`` stands for its module (THIS_MODULE): anything that is not None; one with a true ``going`` is being removed.
    None, or no such attribute: built in. ``meets_poison`` False: a memory error in a source goes unnoticed, as with a DMA
    driver; True or absent: the copy ends there, as the CPU routine's. ``reaches_devices`` False: it cannot be registered on a
    machine with a node in device memory; True or absent: it can. ``needs_pinned`` True: it cannot where a node lies in host
    memory that is not pinned; False or absent: it can. ``should_batch(reason)`` is for v4 and flags alone, see
    :meth:`CopyOffload.register`.
    """

    name: str

    def offload_copy(self, batch, done): ...


class CopyOffload:
    """Registration, as migrate_offload_register() and _unregister() keep it. One per machine; none on duty at first."""

    def __init__(self, mem):
        self._sys = mem.sys
        self._on_device, self._pageable = (np.flatnonzero((mem.nodes.place == place) & (mem.nodes.nr_pages > 0))
                                           for place in (PLACE_DEVICE, PLACE_HOST))
        self.migrator = None
        self.batches = 0
        self.failed_batches = 0

    @property
    def protocol(self):
        """The machine's: "v6", "v5", "flags" or "v4"."""
        return PROTOCOLS[int(self._sys.protocol[0])]

    def register(self, migrator, reasons="all"):
        """Put ``migrator`` on duty for the reasons of the mask ``reasons`` (text or number).

        In v5 the mask only narrows the fixed list. In v4 and flags the driver answers: the mask is narrowed to the reasons
        for which its ``should_batch(reason)`` is true, asked here once for each; ``should_batch`` None is never, a driver
        without the attribute answers from ``reasons``.

        InvalidInput (-EINVAL) without a migrator or its ``offload_copy``, without an owner in v5, for a bad mask, or where a
        node lies where it does not reach; Busy
        (-EBUSY) while one is on duty, be it the same; EngineUnavailable (-ENODEV) if the owner is going away. After any of
        them nothing has changed. Takes effect at the next batch.
        """
        if migrator is None or not callable(getattr(migrator, "offload_copy", None)):
            raise InvalidInput(f"{migrator!r} is no migrator: it has no offload_copy(batch, done); pass for instance "
                               f"offload.McCopy()")
        mask = parse_reason_mask(reasons)
        protocol = int(self._sys.protocol[0])
        owner = getattr(migrator, "owner", None)
        if protocol == PROTOCOL_V5 and owner is None:
            raise InvalidInput(f"migrator {migrator.name!r} has no owner, which v5 asks for; give it an attribute owner, or "
                               f"use another protocol")
        if self.migrator is not None:
            raise Busy(f"migrator {self.migrator.name!r} is registered already; unregister it first")
        if len(self._on_device) and not getattr(migrator, "reaches_devices", True):
            raise InvalidInput(f"migrator {migrator.name!r} copies on the CPU, which does not reach node {self._on_device[0]} in device "
                               f"memory; register a Dcbm over a CudaProvider, or McCopy('plain')")
        if len(self._pageable) and getattr(migrator, "needs_pinned", False):
            raise InvalidInput(f"migrator {migrator.name!r} reaches host memory only where it is pinned, and node {self._pageable[0]} is not; "
                               f"build the machine with placement 'pinned' or 'device', or register cuda-loop or one of the CPU")
        if getattr(owner, "going", False):
            raise EngineUnavailable(f"migrator {migrator.name!r} cannot be registered: its owner {owner!r} is going away")
        if protocol == PROTOCOL_V5:
            mask &= V5_REASONS
        elif protocol != PROTOCOL_V6:
            mask &= reasons_of_driver(migrator)
        self.migrator = migrator
        self._sys.offload_cpu_kernel[0] = getattr(migrator, "cpu_kernel", 0)
        self._sys.offload_reasons[0] = mask
        self._sys.offload_active[0] = 1

    def unregister(self, migrator):
        """Take ``migrator`` off duty; InvalidInput (-EINVAL) if it is not on."""
        if migrator is None or migrator is not self.migrator:
            raise InvalidInput(f"{migrator!r} is not the registered migrator; that is {self.migrator!r}")
        self._sys.offload_active[0] = self._sys.offload_cpu_kernel[0] = 0
        self._sys.offload_reasons[0] = 0
        self.migrator = None

    def set_reason_mask(self, migrator, reasons):
        """Change the mask of the migrator on duty; InvalidInput (-EINVAL) if it is not, or in a protocol without masks.

        Takes effect at the next batch.
        """
        if self.protocol != "v6":
            raise InvalidInput(f"protocol {self.protocol!r} has no reason mask to change; only v6 has")
        if migrator is None or migrator is not self.migrator:
            raise InvalidInput(f"{migrator!r} is not the registered migrator; that is {self.migrator!r}")
        self._sys.offload_reasons[0] = parse_reason_mask(reasons)

    @property
    def meets_poison(self):
        """Whether who is on duty reads memory as a CPU does, with a machine check where that fails; a DMA driver does not."""
        return getattr(self.migrator, "meets_poison", True)

    @property
    def reasons(self):
        """The mask in force, as text: names joined by commas, or ``none``."""
        return format_reason_mask(int(self._sys.offload_reasons[0]))

    def offload_copy(self, batch, done):
        """Have the batch copied by whoever is on duty. 0 or a negative errno; ``done`` tells what was copied.

        -EOPNOTSUPP, and nothing copied, if nobody is; a running call asks only while somebody is.
        """
        self.batches += 1
        rc = self.migrator.offload_copy(batch, done) if self.migrator else -EOPNOTSUPP
        self.failed_batches += rc != 0
        return rc


def reasons_of_driver(migrator):
    """The reasons for which a v4 driver's should_batch() says yes, as a mask."""
    if not hasattr(migrator, "should_batch"):
        return ALL_REASONS
    if migrator.should_batch is None:
        return 0
    return sum(1 << reason for reason in MigrateReason if migrator.should_batch(reason))


def parse_reason_mask(text):
    """The mask of a reason text, as the kernel's module parameter reads it: an int, one bit per MigrateReason.

    A number (decimal, 0x..., leading 0 octal) is the mask. Else names separated by commas are applied left to right:
    ``none`` clears, ``all`` sets every bit, a reason's trace name sets its own. Bits of no reason are cut off.
    InvalidInput for anything else, a number inside a list too.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return int(text) & ALL_REASONS
    if not isinstance(text, str):
        raise InvalidInput(f"reasons {text!r} is neither text nor a mask; write for instance 'demotion,compaction'")
    number = parse_unsigned(text)
    if number is not None:
        return number & ALL_REASONS
    mask = 0
    names = {reason.trace_name: reason for reason in MigrateReason}
    for token in text.strip().split(","):
        token = token.strip()
        if token == "none":
            mask = 0
        elif token == "all":
            mask = ALL_REASONS
        elif token in names:
            mask |= 1 << names[token]
        elif token:
            raise InvalidInput(f"reason {token!r} is not known; use all, none, or some of: {', '.join(names)}")
    return mask


def format_reason_mask(mask):
    """Names in bit order joined by commas, or ``none``; never ``all``."""
    return ",".join(reason.trace_name for reason in MigrateReason if mask >> reason & 1) or "none"


