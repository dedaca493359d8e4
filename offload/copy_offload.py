"""The hatch: one migrator at a time may stand at it and copy whole batches.

Stands for mm/migrate_copy_offload.c of RFC v6 3/5 (2026-06-30, not merged): registration, the reason mask and its
text form, and the call into whoever is on duty. Leaves out module owners and waiting for calls in flight (there are
none: a call runs to its end before Python can register anybody).
"""

from typing import NamedTuple, Protocol

import numpy as np

from offload.errors import Busy, InvalidInput
from offload.units import EOPNOTSUPP, MigrateReason

__all__ = ("FolioBatch", "Migrator", "CopyOffload", "parse_reason_mask", "format_reason_mask", "ALL_REASONS",
           "WRITTEN_UNMARKED")

ALL_REASONS = (1 << len(MigrateReason)) - 1
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
    frames: int
    """Address that the first byte of pfn 0 would have: pfn ``p`` lies at ``frames + p * 4096``."""


class Migrator(Protocol):
    """Who may stand at the hatch.

    ``offload_copy(batch, done)`` copies the folios of a :class:`FolioBatch` and sets ``done[i]`` (uint8, zeroed) to 1
    for exactly those that it wholly wrote; it leaves the arrays of the batch as they are. It returns 0 or a negative errno; only ``done`` decides what counts as copied, and what is not is copied by the
    migration path itself. Every source is locked and unmapped, every destination locked and of the same size; it
    may sleep. An exception is a broken migrator and ends the call after all folios have been restored or moved.
    """

    name: str

    def offload_copy(self, batch, done): ...


class CopyOffload:
    """Registration, as migrate_offload_register() and _unregister() keep it. One per machine; none on duty at first."""

    def __init__(self, mem):
        self._sys = mem.sys
        self.migrator = None
        self.batches = 0
        self.failed_batches = 0

    def register(self, migrator, reasons="all"):
        """Put ``migrator`` on duty for the reasons of the mask ``reasons`` (text or number).

        InvalidInput (-EINVAL) without a migrator or its ``offload_copy``, or for a bad mask; Busy (-EBUSY) while one
        is on duty, be it the same. Takes effect at the next batch.
        """
        if migrator is None or not callable(getattr(migrator, "offload_copy", None)):
            raise InvalidInput(f"{migrator!r} is no migrator: it has no offload_copy(batch, done); pass for instance "
                               f"offload.McCopy()")
        mask = parse_reason_mask(reasons)
        if self.migrator is not None:
            raise Busy(f"migrator {self.migrator.name!r} is registered already; unregister it first")
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
        """Change the mask of the migrator on duty; InvalidInput (-EINVAL) if it is not."""
        if migrator is None or migrator is not self.migrator:
            raise InvalidInput(f"{migrator!r} is not the registered migrator; that is {self.migrator!r}")
        self._sys.offload_reasons[0] = parse_reason_mask(reasons)

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
    number = text[:-1] if text.endswith("\n") else text
    number = number.removeprefix("+") if not number.startswith("++") else number
    digits, base = number, 10
    if number[:2].lower() == "0x":
        digits, base = number[2:], 16
    elif len(number) > 1 and number.startswith("0"):
        digits, base = number[1:], 8
    if digits.isalnum() and digits.isascii():
        try:
            return int(digits, base) & ALL_REASONS
        except ValueError:
            pass                                    # a word
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


