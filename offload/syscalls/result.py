"""What the system calls share: their flags, their result, and allocations that are made to fail while one runs.

Stands for include/uapi/linux/mempolicy.h and for the fault injection of mm/fail_page_alloc.c (v7.3) as it is used to
test migration.
"""

import contextlib
import dataclasses

import numpy as np

from offload.errors import InvalidInput

__all__ = ("SyscallResult", "MPOL_MF_STRICT", "MPOL_MF_MOVE", "MPOL_MF_MOVE_ALL", "UNTAG_MASK", "make_result", "failing_allocs")

MPOL_MF_STRICT, MPOL_MF_MOVE, MPOL_MF_MOVE_ALL = 1, 2, 4

UNTAG_MASK = ~(0x3F << 57)
"""What untagged_addr() leaves of an address: all but the tag of x86's LAM_U57, bits 57 to 62."""


@dataclasses.dataclass(frozen=True)
class SyscallResult:
    """What one system call did.

    ``ret`` is what it returns: 0 or more, or -1 with ``errno`` set. ``status`` (move_pages: int32, one per page) is a
    node, a -errno, or NOT_WRITTEN; None for the other calls. ``calls`` are the MigrateResults of its migrate_pages()
    calls, in order.
    """

    ret: int
    errno: int
    status: np.ndarray | None
    calls: tuple

    @property
    def trace(self):
        """The lines of events/migrate.h, in order."""
        return tuple(line for call in self.calls for line in call.trace)


def make_result(value, calls=(), status=None):
    """A SyscallResult from the kernel's value: a count, or -errno."""
    return SyscallResult(max(int(value), -1), max(-int(value), 0), status, tuple(calls))


@contextlib.contextmanager
def failing_allocs(machine, alloc_fail):
    """Let target allocations fail inside a with block: ``alloc_fail`` is (order, nth, times), or None.

    Of the allocations of at least that order, counted from 1, number ``nth`` and those after it fail, ``times`` in all
    (None: without end).
    """
    if alloc_fail is None:
        yield
        return
    order, nth, times = alloc_fail
    if min(order, nth - 1) < 0 or times is not None and times < 1:
        raise InvalidInput(f"alloc_fail {alloc_fail!r} is not (order, nth, times); order counts from 0, nth and times from 1")
    sys = machine.mem.sys
    sys.alloc_fail_order, sys.alloc_fail_after, sys.alloc_fail_times = order, nth - 1, -1 if times is None else times
    try:
        yield
    finally:
        machine.mem.sys.alloc_fail_times = 0
