"""A process at rest: the snapshot of its memory, and the file that keeps it.

What `live.read_process` returns and what `offload migrate FILE` reads: VMAs, one record per mapped folio, and
the bytes. It stands for no kernel file; the words are those of /proc/PID/smaps and of
Documentation/admin-guide/mm/pagemap.rst.

The file is an uncompressed zip with three members, which `numpy.load` opens too:

    header.json   {"format": "offload-snapshot", "version": 1, ...}: everything that is no array
    folios.npy    the folio records, FOLIO_DTYPE
    data.npy      the bytes, one row of 4096 per page; absent from a layout-only snapshot

Leaves out: the file names' contents (a mapped file is what was mapped of it), registers, descriptors, the command
line. The bytes of a process hold its secrets: the file is readable by its owner only.
"""

import dataclasses
import json
import os
import stat
import struct
import warnings
import zipfile
import zlib

import numpy as np

from offload.errors import BrokenInvariant, ForeignFile, InvalidInput, NotPermitted, OffloadError, OutOfMemory
from offload.outfile import write_output
from offload.units import PAGE_SHIFT, PAGE_SIZE, format_size

__all__ = (
    "FORMAT", "VERSION", "MAX_FOLIO_ORDER", "FOLIO_DTYPE", "FOLIO_BIT_NAMES", "READ_KINDS", "SKIPPED_KINDS",
    "FOLIO_ANON", "FOLIO_DIRTY", "FOLIO_MLOCKED", "FOLIO_KSM", "FOLIO_HUGETLB", "FOLIO_THP", "FOLIO_SWAPCACHE",
    "FOLIO_WRITEBACK", "FOLIO_REFERENCED", "FOLIO_UPTODATE", "FOLIO_ACTIVE", "FOLIO_UNEVICTABLE",
    "FOLIO_ZERO_PAGE", "FOLIO_EXCLUSIVE", "FOLIO_SOFT_DIRTY", "FOLIO_PRIVATE", "FOLIO_LRU", "FOLIO_SWAPBACKED",
    "FOLIO_HWPOISON", "FOLIO_CHANGED", "FOLIO_UNREADABLE", "FOLIO_VANISHED",
    "SnapshotVma", "Snapshot", "validate_snapshot", "save", "load", "available_bytes",
)

FORMAT = "offload-snapshot"
VERSION = 1

MAX_FOLIO_ORDER = 18
"""1 GiB, the largest hugetlb page."""

READ_KINDS = ("anon", "file", "shmem", "hugetlb")
"""Kinds of VMA whose folios and bytes are in a snapshot."""
SKIPPED_KINDS = ("pfnmap", "vdso", "secretmem", "other")
"""Kinds that are listed, and whose present pages are counted in ``Snapshot.skipped``, but not read."""

FOLIO_DTYPE = np.dtype([
    ("va", "<u8"),           # address of the first page of this run
    ("page", "<u8"),         # row in Snapshot.data of that page; the other pages of the run follow it
    ("vma", "<u4"),          # index into Snapshot.vmas
    ("folio", "<u4"),        # which folio: runs of one folio have the same number, 0 .. nr_folios - 1
    ("first_index", "<u4"),  # which page of the folio the first one is; not 0 if the head is not mapped here
    ("nr_mapped", "<u4"),    # pages of the run
    ("mapcount", "<u4"),     # mappings of its most-mapped page, all processes together; 0: not known
    ("bits", "<u4"),         # FOLIO_*
    ("order", "u1"),         # of the whole folio, however much of it is mapped here
], align=True)
"""One record per run: pages of one folio that follow each other in the address space of one VMA.

A folio wholly mapped in one place is one record. It is several if it is mapped with a hole, across two VMAs or
at two addresses; they have the same ``folio``. Records are in ascending ``va``.
"""

# From pagemap and kpageflags.
FOLIO_ANON = np.uint32(1 << 0)
"""Anonymous; in a file or shmem VMA, a page that was copied on write (pagemap bit 61 clear)."""
FOLIO_DIRTY = np.uint32(1 << 1)
"""The folio's own dirty flag. A page-table entry's dirty bit is not shown per page: see SnapshotVma.dirty_kib."""
FOLIO_MLOCKED = np.uint32(1 << 2)
"""The folio's mlocked flag; where flags cannot be read, that its VMA is locked."""
FOLIO_KSM = np.uint32(1 << 3)
FOLIO_HUGETLB = np.uint32(1 << 4)
FOLIO_THP = np.uint32(1 << 5)
"""Mapped here by a PMD. A large folio mapped by PTEs has an order, but not this."""
FOLIO_SWAPCACHE = np.uint32(1 << 6)
FOLIO_WRITEBACK = np.uint32(1 << 7)
FOLIO_REFERENCED = np.uint32(1 << 8)
FOLIO_UPTODATE = np.uint32(1 << 9)
FOLIO_ACTIVE = np.uint32(1 << 10)
FOLIO_UNEVICTABLE = np.uint32(1 << 11)
FOLIO_ZERO_PAGE = np.uint32(1 << 12)
"""The kernel's zero page or huge zero page, which nobody migrates. All records of it share their rows of data."""
FOLIO_EXCLUSIVE = np.uint32(1 << 13)
"""Every page of the run is mapped once, by this process (pagemap bit 56)."""
FOLIO_SOFT_DIRTY = np.uint32(1 << 14)
"""Some page of the run is soft-dirty (pagemap bit 55). Set for all pages unless somebody clears them."""
FOLIO_PRIVATE = np.uint32(1 << 15)
"""The file system keeps data of its own with the folio (buffer heads): one more reference."""
FOLIO_LRU = np.uint32(1 << 16)
FOLIO_SWAPBACKED = np.uint32(1 << 17)
FOLIO_HWPOISON = np.uint32(1 << 18)
# From reading the bytes.
FOLIO_CHANGED = np.uint32(1 << 24)
"""Some page of the run changed while being read: its bytes, its frame, or its soft-dirty bit."""
FOLIO_UNREADABLE = np.uint32(1 << 25)
"""Some page of the run is there and cannot be read; its bytes are zero."""
FOLIO_VANISHED = np.uint32(1 << 26)
"""Some page of the run was gone when its bytes were to be read, or gone just after."""

FOLIO_BIT_NAMES = {int(value): name.removeprefix("FOLIO_").lower()
                   for name, value in list(globals().items())
                   if name.startswith("FOLIO_") and isinstance(value, np.uint32)}
"""Each bit's word for people: ``FOLIO_BIT_NAMES[1 << 2] == "mlocked"``."""


@dataclasses.dataclass(frozen=True)
class SnapshotVma:
    """One line of /proc/PID/smaps.

    ``nr_present`` and ``nr_swapped`` are counted in the pagemap (bits 63 and 62) when the layout was read, a
    moment after smaps; the ``*_kib`` are what smaps said. Swapped pages are neither read nor in the folios; of
    shmem the kernel does not show them.
    """

    start: int
    end: int
    prot: str
    """What the process may do: some of "rwx", "" for none."""
    shared: bool
    """MAP_SHARED."""
    offset: int
    """Of ``start`` in the file, bytes."""
    path: str
    """As smaps shows it, "[heap]" and " (deleted)" included; control characters as ``\\xNN``."""
    inode: int
    device: str
    """"major:minor" in hexadecimal, as smaps shows it."""
    flags: tuple[str, ...]
    """The two-letter VmFlags, for instance "lo" for locked. Empty where the kernel shows none."""
    kind: str
    """One of READ_KINDS or SKIPPED_KINDS."""
    fs: str = ""
    """File-system type of a file or shmem VMA ("ext4", "tmpfs"); "" where it could not be found."""
    page_size: int = PAGE_SIZE
    """KernelPageSize: the huge page's size for hugetlb, else 4096."""
    rss_kib: int = 0
    """Rss; of hugetlb, which has none, Shared_Hugetlb + Private_Hugetlb."""
    swap_kib: int = 0
    dirty_kib: int = 0
    """Shared_Dirty + Private_Dirty: pages dirty in the folio or in the page table."""
    locked_kib: int = 0
    pmd_kib: int = 0
    """AnonHugePages + ShmemPmdMapped + FilePmdMapped: what PMDs map."""
    nr_present: int = 0
    nr_swapped: int = 0

    @property
    def is_tmpfs(self):
        """The pages belong to tmpfs (memfd, SysV and anonymous shared memory too), so they are swap-backed."""
        return self.kind == "shmem"

    @property
    def locked(self):
        return "lo" in self.flags


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """What one process had in memory. The arrays are read-only.

    ``data[row["page"] : row["page"] + row["nr_mapped"]]`` are the bytes of a record of ``folios``, `pages_of` is
    short for it. A page mapped at several addresses is one row of data, so all of its records agree.
    """

    pid: int
    comm: str
    taken: str
    """When reading began: ISO 8601, UTC. (Files of older versions: with the offset from UTC.)"""
    kernel: str
    """Release of the running kernel."""
    vmas: tuple[SnapshotVma, ...]
    folios: np.ndarray
    data: np.ndarray | None
    """uint8 of shape (nr_pages, 4096); None in a layout-only snapshot."""
    nr_pages: int
    """Distinct pages: rows of data, or what they would be."""
    vm_pin_kib: int
    """VmPin: long-term pins of the whole process. /proc shows none per page."""
    vm_lck_kib: int = 0
    """VmLck."""
    vm_swap_kib: int = 0
    """VmSwap."""
    folio_sizes_known: bool = False
    """Orders, flags and mapcounts are from /proc/kpageflags and kpagecount; else see ``notes``."""
    read_ns: int = 0
    """Wall time from the first look to the last byte, nanoseconds."""
    nr_changed: int = 0
    """Pages of FOLIO_CHANGED records that did change."""
    nr_unreadable: int = 0
    nr_vanished: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Kind of VMA -> present pages in it that were not read."""
    notes: tuple[str, ...] = ()
    """What could not be seen, and why; each a sentence on one line."""

    @property
    def nr_folios(self):
        """Distinct folios."""
        return int(self.folios["folio"].max()) + 1 if len(self.folios) else 0

    @property
    def nr_swapped(self):
        return sum(vma.nr_swapped for vma in self.vmas if vma.kind in READ_KINDS)

    @property
    def layout_only(self):
        return self.data is None

    def without_bytes(self):
        """The same, layout only."""
        return dataclasses.replace(self, data=None)

    def orders(self):
        """Distinct folios per order, ascending: ``{0: 812, 9: 4}``. The zero pages are not counted."""
        folios = self.folios[(self.folios["bits"] & FOLIO_ZERO_PAGE) == 0]
        order = folios["order"][np.unique(folios["folio"], return_index=True)[1]]
        return {int(value): int(count) for value, count in zip(*np.unique(order, return_counts=True))}

    def pages_of(self, index):
        """The bytes of record ``index``: a read-only view of shape (nr_mapped, 4096). InvalidInput if layout only."""
        if self.data is None:
            raise InvalidInput(f"the snapshot of pid {self.pid} holds no bytes; take it without --layout-only")
        row = self.folios[index]
        return self.data[int(row["page"]):int(row["page"]) + int(row["nr_mapped"])]


def _inconsistency(snapshot):
    # The first thing in a snapshot that cannot be, as words, or None. Differences are compared instead of sums, so
    # that nothing wraps whatever the file says.
    end = 0
    for number, vma in enumerate(snapshot.vmas):
        if not end <= vma.start < vma.end <= 1 << 64 or (vma.start | vma.end) % PAGE_SIZE:
            return f"VMA {number} ({vma.start:#x}-{vma.end:#x}) is empty, not whole pages, or overlaps the one before"
        if vma.kind not in READ_KINDS + SKIPPED_KINDS:
            return f"VMA {number} is of unknown kind {vma.kind!r}"
        end = vma.end
    if not 0 <= snapshot.nr_pages < 1 << 52:
        return f"it claims {snapshot.nr_pages} pages"
    if snapshot.data is not None and snapshot.data.shape != (snapshot.nr_pages, PAGE_SIZE):
        return f"its data has shape {snapshot.data.shape}, not ({snapshot.nr_pages}, {PAGE_SIZE})"
    folios = snapshot.folios
    if not len(folios):
        return None

    def first(bad, what):
        return f"folio record {int(np.argmax(bad))} {what}" if bad.any() else None

    va, nr_mapped, first_index = folios["va"], folios["nr_mapped"], folios["first_index"]
    wrong = (first(folios["vma"] >= len(snapshot.vmas), f"is in a VMA that is not there ({len(snapshot.vmas)} are)")
             or first(folios["order"] > MAX_FOLIO_ORDER, f"has an order above {MAX_FOLIO_ORDER}")
             or first(nr_mapped == 0, "maps no page"))
    if wrong:
        return wrong
    starts = np.array([vma.start for vma in snapshot.vmas], np.uint64)[folios["vma"]]
    ends = np.array([vma.end for vma in snapshot.vmas], np.uint64)[folios["vma"]]
    kept = np.array([vma.kind in READ_KINDS for vma in snapshot.vmas])[folios["vma"]]
    nr_pages = np.uint64(snapshot.nr_pages)
    folio_nr_pages = np.uint64(1) << folios["order"].astype(np.uint64)
    by_folio = np.lexsort((first_index, folios["folio"]))
    same = folios["folio"][by_folio[1:]] == folios["folio"][by_folio[:-1]]
    earlier, later = folios[by_folio[:-1]][same], folios[by_folio[1:]][same]
    overlap = later["first_index"] - earlier["first_index"] < earlier["nr_mapped"]
    return (first(va % np.uint64(PAGE_SIZE) != 0, "is not at a page's address")
            or first((va < starts) | (va >= ends) | (ends - va >> np.uint64(PAGE_SHIFT) < nr_mapped), "leaves its VMA")
            or first(va[1:] <= va[:-1], "is not before its successor")
            or first(va[1:] - va[:-1] >> np.uint64(PAGE_SHIFT) < nr_mapped[:-1], "overlaps its successor")
            or first(~kept, "is in a VMA of a kind that is not read")
            or first((first_index >= folio_nr_pages) | (folio_nr_pages - first_index < nr_mapped),
                     "maps more pages than its folio has")
            or first((folios["page"] >= nr_pages) | (nr_pages - folios["page"] < nr_mapped),
                     f"has bytes beyond the {snapshot.nr_pages} pages")
            or first(folios["folio"] >= len(folios), "has a folio number beyond the number of records")
            or ("two records of one folio disagree about its order" if (earlier["order"] != later["order"]).any()
                else None)
            or ("two records of one page disagree about its bytes"
                if (later["page"] - earlier["page"] != later["first_index"] - earlier["first_index"])[overlap].any()
                else None))


def validate_snapshot(snapshot):
    """Raise BrokenInvariant, naming the first thing that cannot be, unless the parts of a snapshot fit together."""
    wrong = _inconsistency(snapshot)
    if wrong:
        raise BrokenInvariant(f"the snapshot of pid {snapshot.pid} contradicts itself: {wrong}; please report this")


# --- the file ------------------------------------------------------------------------------------------------

_HEADER, _FOLIOS, _DATA = "header.json", "folios.npy", "data.npy"
_ARRAYS = ("folios", "data")
_PIECE = 16 << 20
# What zipfile, json and numpy.lib.format raise for bytes that are not theirs.
_PARSE_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, TypeError, EOFError,
                 NotImplementedError, RuntimeError, OverflowError, RecursionError, OSError)


def save(snapshot, path):
    """Write a snapshot to ``path``, mode 0600, replacing a regular file of that name.

    The bytes go to a temporary file in the same directory, which takes the name only when all of it is on disk: a
    failure or an interrupt leaves the old file, or none, and no rest. InvalidInput if ``path`` is there and not a
    regular file (a link is not followed), or if its directory is not there; NotPermitted if the directory cannot be
    written; OffloadError with the host's errno for anything else, a full disk above all.
    """
    validate_snapshot(snapshot)
    write_output(path, lambda file: _write(snapshot, file), "the snapshot", private=True)


def _write(snapshot, file):
    arrays = [name for name in _ARRAYS if getattr(snapshot, name) is not None]
    header = {"format": FORMAT, "version": VERSION, "arrays": arrays}
    for field in dataclasses.fields(snapshot):
        if field.name not in _ARRAYS:
            header[field.name] = getattr(snapshot, field.name)
    header["vmas"] = [dataclasses.asdict(vma) for vma in snapshot.vmas]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_HEADER, json.dumps(header, indent=1))
        for name in arrays:
            array = getattr(snapshot, name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(array))
                raw = memoryview(array.reshape(-1).view(np.uint8))
                for at in range(0, len(raw), _PIECE):
                    member.write(raw[at:at + _PIECE])


def load(path):
    """Read a snapshot from ``path``. What `save` wrote comes back bit for bit.

    InvalidInput if no file is there, NotPermitted if it may not be read, OutOfMemory if its bytes do not fit into the
    memory available. Anything else that is not a whole snapshot of this version is ForeignFile: another format,
    truncated, damaged (every member has a checksum), or parts that contradict each other. A file is believed only as
    far as it is long: no more memory is taken than the file has bytes, plus what Python needs for the VMAs.
    """
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):       # before open(), which would wait at a fifo
            raise ForeignFile(f"{path!r} is not a regular file; give a file that `offload snapshot` wrote")
        file = open(path, "rb")
    except FileNotFoundError:
        raise InvalidInput(f"no file {path!r}; write one with `offload snapshot --pid PID -o FILE`") from None
    except PermissionError:
        raise NotPermitted(f"{path!r} may not be read; a snapshot is its owner's only") from None
    except OSError as error:
        raise ForeignFile(f"{path!r} cannot be opened: {error.strerror}; give a file that `offload snapshot` wrote"
                          ) from error
    with file:
        try:
            snapshot = _read(file, path)
        except OffloadError:
            raise
        except MemoryError:
            raise OutOfMemory(f"{path!r} does not fit into memory; free some, or take it with --layout-only") from None
        except _PARSE_ERRORS as error:
            raise _foreign(path, f"it is damaged or truncated ({_one_line(error)})") from error
    wrong = _inconsistency(snapshot)
    if wrong:
        raise _foreign(path, f"it contradicts itself: {wrong}")
    return snapshot


def _foreign(path, what):
    return ForeignFile(f"{path!r} cannot be used: {what}; take the snapshot again with `offload snapshot`")


def _one_line(error):
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__


def _read(file, path):
    if file.read(4) != b"PK\x03\x04":
        raise _foreign(path, "it is not a snapshot (a snapshot is an uncompressed zip)")
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if set(members) - {_DATA} != {_HEADER, _FOLIOS} or len(members) != len(archive.infolist()):
            raise _foreign(path, f"its members are {', '.join(sorted(members))[:80]!r}, not {_HEADER}, {_FOLIOS} "
                                 f"and {_DATA}")
        for member in members.values():
            # Stored, and inside the file: what follows may then allocate a member's size.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size \
                    or member.file_size > size:
                raise _foreign(path, f"its member {member.filename} is compressed or longer than the file")
        header = json.loads(archive.read(_HEADER))
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise _foreign(path, f"its header does not say {FORMAT!r}")
        if header.get("version") != VERSION:
            raise _foreign(path, f"it has version {header.get('version')!r}, and {VERSION} is read here")
        if header.get("arrays") != [name for name in _ARRAYS if f"{name}.npy" in members]:
            raise _foreign(path, "its header names other arrays than it has")
        folios = _read_array(archive, members[_FOLIOS], path, FOLIO_DTYPE, ())
        data = None
        if _DATA in members:
            available = available_bytes()
            if available is not None and members[_DATA].file_size > available:
                raise OutOfMemory(f"{path!r} holds {format_size(members[_DATA].file_size)} and "
                                  f"{format_size(available)} are available; free some, or take it with --layout-only")
            data = _read_array(archive, members[_DATA], path, np.dtype(np.uint8), (PAGE_SIZE,))
    return _from_header(header, folios, data)


def _read_array(archive, member, path, dtype, row_shape):
    with archive.open(member) as stream:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                np.lib.format.read_magic(stream)
                shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream)
        except Exception as error:      # it parses Python literals: a hostile one can raise nearly anything
            raise _foreign(path, f"its member {member.filename} is no .npy ({_one_line(error)})") from error
        if found != dtype or fortran_order or len(shape) != 1 + len(row_shape) or shape[1:] != row_shape:
            raise _foreign(path, f"its member {member.filename} has dtype {str(found)[:60]} and shape {shape}, not "
                                 f"what a snapshot has")
        nbytes = member.file_size - stream.tell()
        row_bytes = dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        if shape[0] * row_bytes != nbytes:
            raise _foreign(path, f"its member {member.filename} has {nbytes} bytes for {shape[0]} rows of {row_bytes}")
        array = np.empty(shape, dtype)
        raw = memoryview(array.reshape(-1).view(np.uint8))
        at = 0
        while at < nbytes:
            piece = stream.read(min(_PIECE, nbytes - at))
            if not piece:
                raise _foreign(path, f"its member {member.filename} ends early")
            raw[at:at + len(piece)] = piece
            at += len(piece)
        stream.read(1)                          # at the end the checksum is compared
    array.setflags(write=False)
    return array


def _from_header(header, folios, data):
    # JSON has neither tuples nor the classes; types are checked, for a header may say anything.
    def typed(values, cls, built):
        for field in dataclasses.fields(cls):
            if field.name in built:
                continue
            value = values[field.name]
            if type(value) is not field.type or (field.type is int and value < 0):
                raise ValueError(f"{field.name} is {value!r:.40}, not {field.type.__name__}")
            built[field.name] = strings([value], field.name)[0] if field.type is str else value
        return cls(**built)

    def strings(values, name):
        # Printable, as the reader made them: a file shall not write escape sequences to a terminal.
        if not all(type(value) is str and value.isprintable() for value in values):
            raise ValueError(f"{name} is not printable text")
        return tuple(values)

    vmas = tuple(typed(vma, SnapshotVma, {"flags": strings(vma["flags"], "flags")}) for vma in header["vmas"])
    skipped = dict(header["skipped"])
    if not all(kind in SKIPPED_KINDS and type(pages) is int and pages >= 0 for kind, pages in skipped.items()):
        raise ValueError("skipped is not a number of pages per kind")
    return typed(header, Snapshot, {"vmas": vmas, "folios": folios, "data": data, "skipped": skipped,
                                    "notes": strings(header["notes"], "notes")})


# --- room ----------------------------------------------------------------------------------------------------

def available_bytes():
    """Memory this process may still take: MemAvailable, or what its cgroup (version 2) leaves if that is less.

    None where neither can be read.
    """
    rooms = []
    try:
        with open("/proc/meminfo") as file:
            rooms += [int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
    except OSError:
        groups = []
    for group in groups:
        while True:
            rooms += _cgroup_room("/sys/fs/cgroup" + group)
            if group in ("", "/"):
                break
            group = os.path.dirname(group)
    return min(rooms) if rooms else None


def _cgroup_room(directory):
    # [memory.max - memory.current + inactive page cache], or [] without a limit.
    try:
        with open(os.path.join(directory, "memory.max")) as file:
            limit = int(file.read())            # "max": ValueError
        with open(os.path.join(directory, "memory.current")) as file:
            current = int(file.read())
        with open(os.path.join(directory, "memory.stat")) as file:
            inactive = sum(int(line.split()[1]) for line in file if line.startswith("inactive_file "))
    except (OSError, ValueError):
        return []
    return [max(limit - current + inactive, 0)]
