"""The words everything else is written in: page sizes, orders, migrate modes and reasons, errnos.

Stands for include/linux/migrate_mode.h, the trace names of include/trace/events/migrate.h, and the few
constants of mm.h and mmzone.h that the path needs (v7.3). Leaves out page sizes other than 4 KiB.

A *pfn* (page frame number), a *nid* (node id) and an *order* are plain ints; a folio is named by the pfn of
its head page and has ``1 << order`` base pages. Times are integer nanoseconds, throughput is decimal GB/s
(10**9 bytes).
"""

import enum
import errno
import re

from offload.errors import InvalidInput

__all__ = (
    "PAGE_SHIFT", "PAGE_SIZE", "HPAGE_PMD_ORDER", "HPAGE_PMD_NR", "MAX_PAGE_ORDER", "HPAGE_PUD_NR",
    "MAX_NUMNODES", "NUMA_NO_NODE",
    "NR_MAX_BATCHED_MIGRATION", "NR_MAX_MIGRATE_PAGES_RETRY", "NR_MAX_MIGRATE_ASYNC_RETRY",
    "NR_MAX_MIGRATE_SYNC_RETRY",
    "EPERM", "ENOENT", "ESRCH", "EINTR", "EIO", "EAGAIN", "ENOMEM", "EACCES", "EFAULT", "EBUSY", "ENODEV",
    "EINVAL", "ENOSYS", "EOPNOTSUPP", "ETIMEDOUT", "EHWPOISON", "errno_name", "errno_value",
    "MigrateMode", "MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC",
    "MigrateReason", "MR_COMPACTION", "MR_MEMORY_FAILURE", "MR_MEMORY_HOTPLUG", "MR_SYSCALL",
    "MR_MEMPOLICY_MBIND", "MR_NUMA_MISPLACED", "MR_CONTIG_RANGE", "MR_LONGTERM_PIN", "MR_DEMOTION", "MR_DAMON",
    "RULES_6_12", "RULES_7_3", "RULES_MM_NEXT", "RULE_SETS",
    "PROTOCOLS", "PROTOCOL_V6", "PROTOCOL_V5", "PROTOCOL_FLAGS", "PROTOCOL_V4", "parse_protocol",
    "parse_size", "format_size", "format_bytes", "parse_unsigned", "parse_mode", "parse_reason", "PLACEMENTS", "parse_placement", "parse_nodes", "check_nodes",
)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
HPAGE_PMD_ORDER = 9
HPAGE_PMD_NR = 1 << HPAGE_PMD_ORDER
HPAGE_PUD_NR = 1 << 18
MAX_PAGE_ORDER = 10
"""Largest order of the buddy allocator."""
MAX_NUMNODES = 1024
"""Node ids of the kernel: 1 << CONFIG_NODES_SHIFT, of distributions for x86-64."""
NUMA_NO_NODE = -1

NR_MAX_BATCHED_MIGRATION = HPAGE_PMD_NR
"""Base pages at which migrate_pages() closes a batch; the published 2 MiB results need HPAGE_PUD_NR."""
NR_MAX_MIGRATE_PAGES_RETRY = 10
NR_MAX_MIGRATE_ASYNC_RETRY = 3
NR_MAX_MIGRATE_SYNC_RETRY = NR_MAX_MIGRATE_PAGES_RETRY - NR_MAX_MIGRATE_ASYNC_RETRY

RULES_6_12, RULES_7_3, RULES_MM_NEXT = 1, 2, 3
RULE_SETS = {"6.12": RULES_6_12, "7.3": RULES_7_3, "mm-next": RULES_MM_NEXT}
"""Kernels whose rules the path follows, oldest first: 6.12.117, 7.3.4, and the linux-mm tree of about 7.3-rc5."""

# The kernel's errno values, which are also this host's on every Linux we run on except for the names some
# Python builds lack. Inside the core a failure is the negative value.
EPERM, ENOENT, ESRCH, EINTR, EIO = 1, 2, 3, 4, 5
EAGAIN, ENOMEM, EACCES, EFAULT, EBUSY = 11, 12, 13, 14, 16
ENODEV, EINVAL, ENOSYS, EOPNOTSUPP, ETIMEDOUT, EHWPOISON = 19, 22, 38, 95, 110, 133

_ERRNO_NAMES = {value: name for name, value in list(globals().items())
                if re.fullmatch(r"E[A-Z]+", name) and isinstance(value, int)}


def errno_name(value):
    """The name of an errno, given with either sign: ``errno_name(-11) == "EAGAIN"``."""
    return _ERRNO_NAMES.get(abs(value), f"errno {abs(value)}")


def errno_value(name):
    """The number of an errno name, or None: ``errno_value("EAGAIN") == 11``."""
    return {known: value for value, known in _ERRNO_NAMES.items()}.get(name, getattr(errno, name, None))


class MigrateMode(enum.IntEnum):
    """How patiently to migrate: enum migrate_mode. Ordered; ``<`` compares patience."""

    MIGRATE_ASYNC = 0
    MIGRATE_SYNC_LIGHT = 1
    MIGRATE_SYNC = 2


MIGRATE_ASYNC = int(MigrateMode.MIGRATE_ASYNC)
MIGRATE_SYNC_LIGHT = int(MigrateMode.MIGRATE_SYNC_LIGHT)
MIGRATE_SYNC = int(MigrateMode.MIGRATE_SYNC)


class MigrateReason(enum.IntEnum):
    """Why to migrate: enum migrate_reason. ``trace_name`` is what the tracepoints print."""

    MR_COMPACTION = 0
    MR_MEMORY_FAILURE = 1
    MR_MEMORY_HOTPLUG = 2
    MR_SYSCALL = 3
    MR_MEMPOLICY_MBIND = 4
    MR_NUMA_MISPLACED = 5
    MR_CONTIG_RANGE = 6
    MR_LONGTERM_PIN = 7
    MR_DEMOTION = 8
    MR_DAMON = 9

    @property
    def trace_name(self):
        return _TRACE_NAMES[self]


_TRACE_NAMES = ("compaction", "memory_failure", "memory_hotplug", "syscall_or_cpuset", "mempolicy_mbind",
                "numa_misplaced", "contig_range", "longterm_pin", "demotion", "damon")

(MR_COMPACTION, MR_MEMORY_FAILURE, MR_MEMORY_HOTPLUG, MR_SYSCALL, MR_MEMPOLICY_MBIND,
 MR_NUMA_MISPLACED, MR_CONTIG_RANGE, MR_LONGTERM_PIN, MR_DEMOTION, MR_DAMON) = map(int, MigrateReason)


PROTOCOLS = ("v6", "v5", "flags", "v4")
"""Rounds of the batch-copy series whose rules a machine can follow, by their numbers (migrate/state.py); v6 is the default."""
PROTOCOL_V6, PROTOCOL_V5, PROTOCOL_FLAGS, PROTOCOL_V4 = range(4)


def parse_protocol(text):
    """The number of a protocol from its name, in any case. InvalidInput for anything else."""
    if not isinstance(text, str) or text.lower() not in PROTOCOLS:
        raise InvalidInput(f"protocol {text!r} is not known; use one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS.index(text.lower())


def parse_unsigned(text):
    """An unsigned number as kstrtoul(text, 0) reads it (lib/kstrtox.c), or None if it is none.

    Decimal, 0x or leading 0 octal; one leading ``+`` and one final newline at most, no blanks.
    """
    number = text[:-1] if text.endswith("\n") else text
    number = number.removeprefix("+") if not number.startswith("++") else number
    digits, base = number, 10
    if number[:2].lower() == "0x":
        digits, base = number[2:], 16
    elif len(number) > 1 and number.startswith("0"):
        digits, base = number[1:], 8
    if not (digits.isalnum() and digits.isascii()):
        return None
    try:
        return int(digits, base)
    except ValueError:
        return None


def parse_mode(text):
    """``"MIGRATE_SYNC"``, ``"sync"`` or a MigrateMode, as MigrateMode. InvalidInput for anything else."""
    if isinstance(text, int) and not isinstance(text, bool) and text in MigrateMode._value2member_map_:
        return MigrateMode(text)
    word = str(text).upper().replace("-", "_")
    word = word if word.startswith("MIGRATE_") else "MIGRATE_" + word
    if word in MigrateMode.__members__:
        return MigrateMode[word]
    raise InvalidInput(f"mode {text!r} is not known; use one of: {', '.join(MigrateMode.__members__)}")


def parse_reason(text):
    """A trace name (``"demotion"``), an ``MR_*`` name or a MigrateReason, as MigrateReason."""
    if isinstance(text, int) and not isinstance(text, bool) and text in MigrateReason._value2member_map_:
        return MigrateReason(text)
    if text in _TRACE_NAMES:
        return MigrateReason(_TRACE_NAMES.index(text))
    if str(text).upper() in MigrateReason.__members__:
        return MigrateReason[str(text).upper()]
    raise InvalidInput(f"reason {text!r} is not known; use one of: {', '.join(_TRACE_NAMES)}")


PLACEMENTS = ("host", "pinned", "device", "nowhere")
"""Where the frames of a node may lie: host memory, host memory that a GPU reaches, a GPU's own memory, or metadata only."""


def parse_placement(text):
    """A word of PLACEMENTS. InvalidInput for anything else."""
    if text not in PLACEMENTS:
        raise InvalidInput(f"placement {text!r} is not known here; use one of: {', '.join(PLACEMENTS)}")
    return text


def parse_nodes(text):
    """The placements of both nodes, from a text such as ``"pinned,device"``."""
    nodes = tuple(word.strip() for word in str(text).split(","))
    if len(nodes) != 2:
        raise InvalidInput(f"nodes {text!r} are not two placements; write two of host, pinned (memory that a GPU reaches) and device (its "
                           f"own) with a comma between, or nowhere,nowhere for metadata alone")
    check_nodes(nodes)
    return nodes


def check_nodes(nodes):
    """InvalidInput unless ``nodes`` are placements that one machine can have."""
    for placement in nodes:
        parse_placement(placement)
    if "nowhere" in nodes and len(set(nodes)) > 1:
        raise InvalidInput(f"nodes {','.join(nodes)} cannot be mixed: one has bytes and the other none; use nowhere,nowhere, or host,host")


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SIZE_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text, *, what="size", multiple_of=PAGE_SIZE):
    """Bytes from ``"64M"``, ``"1.5GiB"`` or a plain number of bytes. Units are powers of two.

    InvalidInput unless it is a positive multiple of ``multiple_of``.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if not match or isinstance(text, bool):
        raise InvalidInput(f"{what} {text!r} is not a size; write a number of bytes, or 4K, 64M, 1G")
    nbytes = float(match[1]) * (1 << _SIZE_SHIFT[match[2].upper()])
    if nbytes == float("inf") or nbytes != int(nbytes) or nbytes <= 0 or int(nbytes) % multiple_of:
        raise InvalidInput(f"{what} {text!r} is not a positive multiple of {format_size(multiple_of)}; "
                           f"round it to one")
    return int(nbytes)


def format_bytes(nbytes):
    """``4096`` as ``4 KiB``: beside rates, which are decimal."""
    text = format_size(nbytes)
    return f"{text[:-1]} {text[-1].removesuffix('B')}{'iB' if text[-1] != 'B' else 'B'}"


def format_size(nbytes):
    """``4096`` as ``4K``, ``2097152`` as ``2M``: the column heads of the patch series."""
    for letter in "TGMK":
        unit = 1 << _SIZE_SHIFT[letter]
        if nbytes >= unit:
            return f"{nbytes // unit}{letter}" if nbytes % unit == 0 else f"{nbytes / unit:.1f}{letter}"
    return f"{nbytes}B"
