"""A live process, read from outside through /proc: where its pages are, in which folios, and their bytes.

It stands for no kernel file. What it reads is described in Documentation/filesystems/proc.rst and
Documentation/admin-guide/mm/pagemap.rst:

    /proc/PID/smaps       the VMAs, their flags, and sums
    /proc/PID/pagemap     one 8-byte word per page of the address space: present, swapped, file, frame number
    /proc/kpageflags      one 8-byte word per frame: compound head or tail, dirty, mlocked, ...   (root only)
    /proc/kpagecount      one 8-byte word per frame: how often it is mapped                        (root only)
    /proc/PID/mem         the bytes

**The process is not stopped.** The layout is read first and then stands; the bytes follow, a few MiB at a time.
Each piece is read twice, and then its pagemap words again. What this notices: a page written between the two readings
(unless with the bytes it had), a page that got another frame (copied on write, migrated, collapsed, merged), a page
unmapped or swapped out. What it does not: a write before the first reading of its page, or after the second; pages
mapped after the layout was read (they are not in it); two pages that belong together and were read at different times;
a zero page that was written to. Without root the frame numbers are hidden, so that a page which was freed and came back
as a zero page looks unchanged.

**What the process notices.** Reading marks pages accessed. A page that went away just before it was to be read is
asked for again: it comes back from swap or from its file, or as a zero page; one that userfaultfd handles waits for its
handler. Nothing is written, and no copy on write is broken.

Leaves out: page sizes other than 4 KiB, and page-table dirty bits, pins, NUMA nodes and memory policies, which /proc
does not show per page or which have no use here.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import os
import re
import struct
import time

import numpy as np

from offload.errors import InvalidInput, NoSuchProcess, NotPermitted, NotSupported, OffloadError, OutOfMemory
from offload.units import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE, format_size
from offload.workload import snapshot as snap
from offload.workload.snapshot import FOLIO_DTYPE, MAX_FOLIO_ORDER, READ_KINDS, Snapshot, SnapshotVma

__all__ = ("read_process",)

# Bits of a pagemap word.
_PM_PFN = np.uint64((1 << 55) - 1)
_PM_SOFT_DIRTY = np.uint64(1 << 55)
_PM_EXCLUSIVE = np.uint64(1 << 56)
_PM_GUARD = np.uint64(1 << 58)
_PM_FILE = np.uint64(1 << 61)
_PM_SWAP = np.uint64(1 << 62)
_PM_PRESENT = np.uint64(1 << 63)

# Bits of a kpageflags word: include/uapi/linux/kernel-page-flags.h; from 32 on include/linux/kernel-page-flags.h,
# which is not a promise of the kernel's but has not changed since 2009.
_KPF_COMPOUND_HEAD = np.uint64(1 << 15)
_KPF_COMPOUND_TAIL = np.uint64(1 << 16)
_KPF_NOPAGE = np.uint64(1 << 20)
_KPF_KSM = np.uint64(1 << 21)
_KPF_ZERO_PAGE = np.uint64(1 << 24)
_BITS_OF_KPF = (
    (2, snap.FOLIO_REFERENCED), (3, snap.FOLIO_UPTODATE), (4, snap.FOLIO_DIRTY), (5, snap.FOLIO_LRU),
    (6, snap.FOLIO_ACTIVE), (8, snap.FOLIO_WRITEBACK), (13, snap.FOLIO_SWAPCACHE), (14, snap.FOLIO_SWAPBACKED),
    (18, snap.FOLIO_UNEVICTABLE), (19, snap.FOLIO_HWPOISON), (21, snap.FOLIO_KSM), (24, snap.FOLIO_ZERO_PAGE),
    (33, snap.FOLIO_MLOCKED), (35, snap.FOLIO_PRIVATE),
)

# The PAGEMAP_SCAN ioctl of /proc/PID/pagemap, include/uapi/linux/fs.h (in v6.7):
#   struct page_region { u64 start, end, categories; }
#   struct pm_scan_arg { u64 size, flags, start, end, walk_end, vec, vec_len, max_pages,
#                            category_inverted, category_mask, category_anyof_mask, return_mask; }
#   #define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
# It writes the regions of pages in any of the wanted categories to vec, says in walk_end how far it came, and returns
# the number of regions. A walk of more than 512 regions can say less than it did (seen with 6.18: walk_end was where the
# kernel's own buffer had last been full, although all regions up to the end were there), so that the end of the last
# region counts too.
_PM_SCAN_ARG = struct.Struct("12Q")
_PAGEMAP_SCAN = 3 << 30 | _PM_SCAN_ARG.size << 16 | ord("f") << 8 | 16
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_PAGE_IS_PFNZERO = 1 << 5
_PAGE_IS_HUGE = 1 << 6
_SCAN_REGIONS = 1 << 14

_PIECE_PAGES = 2048          # bytes are read, read again and compared by this much: 8 MiB
_WALK_PAGES = 1 << 20        # a piece of pagemap, where it is read from end to end
_LESS = "use --layout-only, or a smaller process"
_GAP_WORDS = 64              # unwanted words that are cheaper to read than another system call


def read_process(pid, *, layout_only=False, max_bytes=None, progress=None):
    """Read the memory of a running process: a `Snapshot`.

    ``layout_only`` leaves the bytes out. ``max_bytes`` is the most bytes the snapshot's data may have; without it, what
    the host has available. ``progress(done_bytes, total_bytes)`` is called now and then while the bytes are read.
    The module's docstring says what is noticed of a process that changes meanwhile. ``pid`` may be this process: the
    layout is read before the room for its bytes is taken, which is therefore not in it.

    Root (CAP_SYS_ADMIN) sees folios as they are. Anybody else sees base pages, and 2 MiB pages where a PMD maps them
    (Linux 6.7); the notes of the snapshot say so.

    Raises InvalidInput (a pid that is none), NoSuchProcess (not there, without memory, gone half-way), NotPermitted
    (somebody else's), OutOfMemory (its bytes do not fit), NotSupported (a kernel without /proc/PID/smaps or with
    other base pages), BrokenInvariant (what was put together contradicts itself: a bug).
    """
    if isinstance(pid, bool) or not isinstance(pid, int) or pid <= 0:
        raise InvalidInput(f"pid {pid!r} is not a process id; give a positive number")
    if os.sysconf("SC_PAGE_SIZE") != PAGE_SIZE:
        raise NotSupported(f"this kernel has pages of {format_size(os.sysconf('SC_PAGE_SIZE'))}; only 4K can be read")
    begun_ns = time.perf_counter_ns()
    taken = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    notes = []
    with contextlib.ExitStack() as stack, _errors_of_ours(pid):
        # All files are opened before any is read. Each stays with the address space it was opened on, so that a process
        # that calls exec, or a pid that is used again, shows as an end of file and never as another's pages.
        files = _Files(stack, pid, notes, want_bytes=not layout_only)
        status = files.status()
        vmas = _read_vmas(files, notes)
        pages, skipped = _read_layout(files, vmas, notes)
        frames = _read_frames(files, vmas, pages, notes)
        numbers = _number_pages(vmas, pages, frames)
        folios = _find_folios(files, vmas, pages, frames, numbers, notes)
        reading = _read_data(files, pages, numbers, frames, layout_only, max_bytes, progress)
        _note_new_mappings(files, vmas, notes)
    _mark_folios(folios, reading)
    for array in (folios, reading.data):
        if array is not None:
            array.setflags(write=False)
    snapshot = Snapshot(
        pid=pid, comm=status["Name"], taken=taken, kernel=os.uname().release,
        vmas=tuple(vmas), folios=folios, data=reading.data, nr_pages=numbers.nr_pages,
        vm_pin_kib=_kib(status.get("VmPin")), vm_lck_kib=_kib(status.get("VmLck")),
        vm_swap_kib=_kib(status.get("VmSwap")), folio_sizes_known=frames is not None,
        read_ns=time.perf_counter_ns() - begun_ns,
        nr_changed=int(np.count_nonzero(reading.changed)), nr_unreadable=int(np.count_nonzero(reading.unreadable)),
        nr_vanished=int(np.count_nonzero(reading.vanished)), skipped=skipped, notes=tuple(notes))
    snap.validate_snapshot(snapshot)            # the kernel's answers are put together here, and not always as documented
    return snapshot


@contextlib.contextmanager
def _errors_of_ours(pid):
    # Whatever says ESRCH says that the address space is gone; and memory may be limited in more ways than are looked at.
    try:
        yield
    except OffloadError:
        raise
    except ProcessLookupError:
        raise _ended(pid) from None
    except MemoryError:
        raise OutOfMemory(f"reading pid {pid} takes more memory than this process may have; {_LESS}") from None


def _ended(pid):
    return NoSuchProcess(f"pid {pid} ended, or started another program, while it was read; nothing was kept")


# --- the files -----------------------------------------------------------------------------------------------

class _Files:
    # The open files of one process. kpageflags and kpagecount are None where they may not be read.

    def __init__(self, stack, pid, notes, want_bytes):
        self.pid = pid
        self._stack = stack
        self.smaps = self._open("smaps")
        self.pagemap = self._open("pagemap")
        self.mem = self._open("mem") if want_bytes else None
        try:
            self.kpageflags = self._open_path("/proc/kpageflags")
        except OSError as error:
            self.kpageflags = None
            notes.append(f"folio sizes, flags and mapcounts cannot be read without root (/proc/kpageflags: "
                         f"{os.strerror(error.errno)}): every page is taken as order 0 unless a PMD is seen to map it")
        try:
            self.kpagecount = self._open_path("/proc/kpagecount") if self.kpageflags is not None else None
        except OSError as error:
            self.kpagecount = None
            notes.append(f"mapcounts cannot be read (/proc/kpagecount: {os.strerror(error.errno)}): they are 0")

    def _open_path(self, path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def _open(self, name):
        try:
            return self._open_path(f"/proc/{self.pid}/{name}")
        except FileNotFoundError:
            if os.path.exists(f"/proc/{self.pid}"):
                raise NotSupported(f"this kernel has no /proc/PID/{name}; it was built without CONFIG_PROC_PAGE_MONITOR"
                                   ) from None
            raise self._absent() from None
        except ProcessLookupError:
            raise self.without_memory() from None
        except PermissionError:
            # A zombie's files are root's, whosoever it was.
            raise (self._forbidden(name) if "VmSize" in self.status() else self.without_memory()) from None

    def _absent(self):
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return NotPermitted(f"pid {self.pid} is somebody else's and hidden (/proc is mounted with hidepid); "
                                f"run as its user or as root")
        except (OSError, OverflowError):
            pass
        return NoSuchProcess(f"there is no process {self.pid}; it may have ended")

    def _forbidden(self, name):
        try:
            owner = os.stat(f"/proc/{self.pid}").st_uid
        except OSError:
            return self._absent()
        if os.geteuid() == 0:
            return NotPermitted(f"pid {self.pid} (uid {owner}) may not be read even by root here (/proc/PID/{name}); "
                                f"run outside the container, or with CAP_SYS_PTRACE")
        if name == "mem":
            return NotPermitted(f"the bytes of pid {self.pid} (uid {owner}) may not be read by uid {os.geteuid()}, its "
                                f"layout may; use --layout-only, or run as root (see kernel.yama.ptrace_scope)")
        return NotPermitted(f"pid {self.pid} (uid {owner}) may not be read by uid {os.geteuid()}; run as its user or as "
                            f"root")

    def without_memory(self):
        # No address space behind the pid: a kernel thread, a zombie, or a main thread that ended before its others.
        try:
            status = self.status()
        except NoSuchProcess as error:
            return error
        if status.get("Kthread") == "1":
            return NoSuchProcess(f"pid {self.pid} is a kernel thread and has no memory of its own")
        if status.get("State", "").startswith(("Z", "X")):
            if status.get("Threads", "1") not in ("0", "1"):
                return NoSuchProcess(f"the main thread of pid {self.pid} has ended; give the id of another of its "
                                     f"threads (ls /proc/{self.pid}/task)")
            return NoSuchProcess(f"pid {self.pid} has ended and only waits for its parent (a zombie); its memory is gone")
        if "VmSize" not in status:              # kernels before 6.8 do not say Kthread
            return NoSuchProcess(f"pid {self.pid} has no memory of its own: it is a kernel thread, or just ending")
        return _ended(self.pid)

    def status(self):
        """The lines of /proc/PID/status as a dict of texts. NoSuchProcess."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                lines = file.read().split(b"\n")
        except (FileNotFoundError, ProcessLookupError):
            raise self._absent() from None
        return {_printable(key): _printable(value.strip())
                for key, colon, value in (line.partition(b":") for line in lines) if colon}

    def check_alive(self):
        """NoSuchProcess if the address space is gone: then, and only then, the start of pagemap is its end too."""
        if not os.pread(self.pagemap, 8, 0):
            raise _ended(self.pid)


def _read_words(fd, indices, past_end):
    # The 8-byte words at ascending ``indices`` of pagemap, kpageflags or kpagecount, reading over small gaps;
    # ``past_end`` for those behind the end of the file.
    words = np.full(len(indices), past_end, np.uint64)
    if not len(indices):
        return words
    cuts = np.flatnonzero(indices[1:] - indices[:-1] > _GAP_WORDS) + 1
    for begin, end in zip(np.r_[0, cuts].tolist(), np.r_[cuts, len(indices)].tolist()):
        first = int(indices[begin])
        raw = _pread(fd, (int(indices[end - 1]) + 1 - first) * 8, first * 8)
        got = np.frombuffer(raw, np.uint64, len(raw) // 8)
        offsets = indices[begin:end] - np.uint64(first)
        inside = offsets < len(got)
        words[begin:end][inside] = got[offsets[inside]]
    return words


def _pread(fd, nbytes, offset):
    # All of it, or up to the end of the file.
    pieces = []
    while nbytes:
        piece = os.pread(fd, nbytes, offset)
        if not piece:
            break
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _printable(raw):
    # A text that can go to any terminal: what is not printable becomes \xNN, or \uNNNN.
    text = raw.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
                   for char in text)


def _kib(text):
    # "123 kB" as 123; absent as 0.
    return int(text.split()[0]) if text else 0


# --- VMAs ----------------------------------------------------------------------------------------------------

_SMAPS_HEAD = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (.{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")
_SUMS = {b"KernelPageSize": "page_size", b"Rss": "rss_kib", b"Shared_Hugetlb": "rss_kib",
         b"Private_Hugetlb": "rss_kib", b"Swap": "swap_kib", b"Locked": "locked_kib",
         b"Shared_Dirty": "dirty_kib", b"Private_Dirty": "dirty_kib",
         b"AnonHugePages": "pmd_kib", b"ShmemPmdMapped": "pmd_kib", b"FilePmdMapped": "pmd_kib"}


def _read_vmas(files, notes):
    text = b"".join(iter(lambda: os.read(files.smaps, 1 << 20), b""))
    if not text:
        raise files.without_memory()
    mounts = _mounts(files.pid, notes)
    vmas = [_vma(block, mounts) for block in _smaps_blocks(text)]
    if not any(vma.flags for vma in vmas):
        notes.append("this kernel shows no VmFlags: locked, hugetlb and device mappings are not recognised")
    return vmas


def _smaps_blocks(text):
    # [match of the head line, {key: value}, flags] for each VMA of smaps.
    block = None
    for line in text.split(b"\n"):
        match = _SMAPS_HEAD.fullmatch(line)
        if match:
            if block:
                yield block
            block = [match, {}, ()]
        elif block and line:
            key, _, value = line.partition(b":")
            if key in _SUMS:
                sums = block[1]
                sums[_SUMS[key]] = sums.get(_SUMS[key], 0) + int(value.split()[0])
            elif key == b"VmFlags":
                block[2] = tuple(value.decode().split())
    if block:
        yield block


def _vma(block, mounts):
    match, sums, flags = block
    start, end, mode, offset, device, inode, path = match.groups()
    path, device, inode = _printable(path), device.decode(), int(inode)
    mode = mode.decode()
    major, minor = (int(part, 16) for part in device.split(":"))
    fs = mounts.get((major, minor), "")
    kind = _kind_of_vma(path, mode[3] == "s", flags, fs)
    sums["page_size"] = sums.get("page_size", 4) << 10
    return SnapshotVma(start=int(start, 16), end=int(end, 16), prot=mode[:3].replace("-", ""), shared=mode[3] == "s",
                       offset=int(offset, 16), path=path, inode=inode, device=device, flags=flags, kind=kind,
                       fs=fs or ("tmpfs" if kind == "shmem" else ""), **sums)


def _kind_of_vma(path, shared, flags, fs):
    # The order matters: [vvar] is a pfnmap too, and a hugetlb memfd is named like any memfd.
    # ``fs`` is empty for what is on no mount: no file, or the kernel's own memfd, SysV, anonymous shared and secret
    # memory. An inode of 0 does not mean that there is no file: the first SysV segment has it.
    if path.startswith("[") and not path.startswith(("[heap]", "[stack", "[anon:", "[anon_shmem:")):
        return "vdso"
    if "io" in flags or "pf" in flags:
        return "pfnmap"
    if "ht" in flags:
        return "hugetlb"
    if "mm" in flags:                          # VM_MIXEDMAP: DAX and drivers
        return "other"
    if path.startswith("[anon_shmem:"):
        return "shmem"
    if not path or path.startswith("["):
        return "anon"
    if path == "/dev/zero" and not shared:
        return "anon"
    if not fs:
        name = path.removesuffix(" (deleted)")
        if name == "/secretmem":
            return "secretmem"
        if name == "/dev/zero" or name.startswith(("/memfd:", "/SYSV")):
            return "shmem"
        if name.startswith("/["):              # "/[aio]", the ring of io_setup(2)
            return "other"
    if fs == "tmpfs":
        return "shmem"
    if fs == "devtmpfs" or not path.startswith("/"):       # "anon_inode:[perf_event]", "socket:[1]"
        return "other"
    return "file"


def _mounts(pid, notes):
    # {(major, minor): file-system type} of the mounts that the process sees.
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        notes.append(f"file systems cannot be told apart (/proc/{pid}/mountinfo: {os.strerror(error.errno)}): files on "
                     f"tmpfs are taken as plain files")
        return {}
    mounts = {}
    for line in lines:
        left, dash, right = line.partition(b" - ")
        if dash:
            major, minor = left.split()[2].split(b":")
            mounts[int(major), int(minor)] = _printable(right.split()[0])
    return mounts


def _note_new_mappings(files, vmas, notes):
    # The VMAs once more, at the very end.
    before = {(vma.start, vma.end) for vma in vmas}
    try:
        with open(f"/proc/{files.pid}/maps", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        lines = []
    files.check_alive()
    after = {tuple(int(part, 16) for part in line.split(b" ", 1)[0].split(b"-")) for line in lines if line}
    if gone := len(before - after):
        notes.append(f"{gone} of {len(before)} mappings were unmapped or changed size while the process was read")
    if new := len(after - before):
        notes.append(f"{new} mappings came or changed size while the process was read; new pages are not in the "
                     f"snapshot")


# --- which pages there are -----------------------------------------------------------------------------------

@dataclasses.dataclass
class _Pages:
    # The present pages of the VMAs that are read, ascending in va; arrays of one element per page.
    va: np.ndarray
    word: np.ndarray                # of pagemap
    vma: np.ndarray                 # index of the VMA
    zero: np.ndarray                # PAGEMAP_SCAN says: the zero page, or part of the huge one
    pmd: np.ndarray                 # PAGEMAP_SCAN says: mapped by a PMD, or hugetlb
    scanned: bool                   # there is a PAGEMAP_SCAN; else zero and pmd are False throughout


def _read_layout(files, vmas, notes):
    # The pages, and {kind: present pages} of what is skipped. Fills nr_present and nr_swapped of ``vmas`` in place.
    parts, skipped, scanned = [], {}, True
    for number, vma in enumerate(vmas):
        if vma.start >> 63:                     # [vsyscall] is no page of the process
            continue
        found = _scan_pages(files.pagemap, vma) if scanned else None
        if found is None:
            if scanned:
                scanned = False
                notes.append("this kernel has no PAGEMAP_SCAN (Linux 6.7): what a PMD maps is worked out from sums, and "
                             "zero pages may be missing")
            found = _walk_pages(files.pagemap, vma)
        va, word, categories = found
        present = word & _PM_PRESENT != 0
        swapped = (word & (_PM_PRESENT | _PM_SWAP | _PM_GUARD)) == _PM_SWAP
        nr_present = int(np.count_nonzero(present))
        vmas[number] = dataclasses.replace(vma, nr_present=nr_present, nr_swapped=int(np.count_nonzero(swapped)))
        if vma.kind in READ_KINDS:
            parts.append((va[present], word[present], np.full(nr_present, number, np.uint32), categories[present]))
        elif nr_present:
            skipped[vma.kind] = skipped.get(vma.kind, 0) + nr_present
    files.check_alive()
    va, word, vma_index, categories = (
        np.concatenate([part[column] for part in parts] + [np.empty(0, dtype)])
        for column, dtype in enumerate((np.uint64, np.uint64, np.uint32, np.uint8)))
    return _Pages(va, word, vma_index, categories & _PAGE_IS_PFNZERO != 0, categories & _PAGE_IS_HUGE != 0,
                  scanned), skipped


def _scan_pages(pagemap, vma):
    # (va, pagemap word, categories) of the present or swapped pages of a VMA, or None without a PAGEMAP_SCAN. Costs
    # what the page tables cost, not what the mapping is long.
    vec = np.empty((_SCAN_REGIONS, 3), np.uint64)
    regions, at = [], vma.start
    while at < vma.end:
        arg = bytearray(_PM_SCAN_ARG.pack(
            _PM_SCAN_ARG.size, 0, at, vma.end, 0, vec.ctypes.data, len(vec), 0,
            0, 0, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
            _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED | _PAGE_IS_PFNZERO | _PAGE_IS_HUGE))
        try:
            nr_regions = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
                return None
            raise
        if not nr_regions:
            break
        regions.append(vec[:nr_regions].copy())
        at = max(_PM_SCAN_ARG.unpack(arg)[4], int(vec[nr_regions - 1, 1]))
    start, end, categories = np.concatenate(regions).T if regions else np.empty((3, 0), np.uint64)
    nr_pages = (end - start >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    va = np.repeat(start, nr_pages) + (_within(nr_pages) << PAGE_SHIFT).astype(np.uint64)
    return va, _read_words(pagemap, va >> np.uint64(PAGE_SHIFT), 0), np.repeat(categories.astype(np.uint8), nr_pages)


def _walk_pages(pagemap, vma):
    # The same from pagemap alone, which has a word for every page a mapping could have: what smaps says is resident
    # tells where to look, and when to stop.
    wanted, found = (vma.rss_kib + vma.swap_kib) * 1024 // PAGE_SIZE, 0
    parts = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
    first, end = vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT
    while first < end and found < wanted:
        raw = _pread(pagemap, min(_WALK_PAGES, end - first) * 8, first * 8)
        word = np.frombuffer(raw, np.uint64, len(raw) // 8)
        index = np.flatnonzero(word & (_PM_PRESENT | _PM_SWAP))
        parts.append((index.astype(np.uint64) + np.uint64(first) << np.uint64(PAGE_SHIFT), word[index]))
        found += len(index)
        first += _WALK_PAGES
    va, word = (np.concatenate(column) for column in zip(*parts))
    return va, word, np.zeros(len(va), np.uint8)


def _within(lengths):
    # 0, 1, .. for each of consecutive runs: [3, 2] as [0, 1, 2, 0, 1].
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


# --- which frames they are in --------------------------------------------------------------------------------

@dataclasses.dataclass
class _Frames:
    # What root can see of the pages; arrays of one element per page.
    pfn: np.ndarray
    kpf: np.ndarray                 # of kpageflags
    nr_mappings: np.ndarray         # of kpagecount
    torn: np.ndarray                # pagemap and kpageflags contradict each other: taken as order 0, reported as changed


def _read_frames(files, vmas, pages, notes):
    # _Frames, or None where frame numbers or flags cannot be read.
    if files.kpageflags is None:
        return None
    pfn = pages.word & _PM_PFN
    if len(pfn) and not pfn.any():
        notes.append("folio sizes, flags and mapcounts cannot be read: /proc/PID/pagemap hides frame numbers without "
                     "CAP_SYS_ADMIN; every page is taken as order 0 unless a PMD is seen to map it")
        return None
    kpf = _read_frame_words(files.kpageflags, pfn, _KPF_NOPAGE)
    nr_mappings = (_read_frame_words(files.kpagecount, pfn, 0) if files.kpagecount is not None
                   else np.zeros(len(pfn), np.uint64))
    return _Frames(pfn, kpf, nr_mappings, np.zeros(len(pfn), bool))


def _read_frame_words(fd, pfn, past_end):
    # Words of kpageflags or kpagecount for frames in any order.
    ascending, where = np.unique(pfn, return_inverse=True)
    return _read_words(fd, ascending, past_end)[where]


def _tear(frames, torn):
    # From here on these pages are base pages in frames of their own, numbered where no frame is.
    index = np.flatnonzero(torn)
    frames.torn[index] = True
    frames.pfn[index] = index.astype(np.uint64) + np.uint64(1 << 60)
    frames.kpf[index] = 0


# --- which pages are the same --------------------------------------------------------------------------------

@dataclasses.dataclass
class _Numbers:
    # Each page's row in the data. Pages that are one and the same share a row; rows are numbered by first appearance.
    row: np.ndarray                 # one element per page
    first: np.ndarray               # one element per row: the page that appears first, through which it is read
    zero: np.ndarray                # one element per page: a zero page
    nr_pages: int                   # rows


def _number_pages(vmas, pages, frames):
    # The same are: zero pages; pages of a file at the same offset (and in the same frame, where frames are known); and
    # merged pages in the same frame. An anonymous page is always its own: it has one address in a process.
    nr = len(pages.va)
    same_as = np.arange(nr)                     # index of the first of the same pages

    def share(mask, key):
        index = np.flatnonzero(mask)
        _, first, inverse = np.unique(key[index], return_index=True, return_inverse=True)
        same_as[index] = index[first][inverse]

    if frames is None:
        zero, frame = pages.zero, np.zeros(nr, np.uint64)
        share(zero, np.where(pages.pmd, (pages.va >> np.uint64(PAGE_SHIFT)) % np.uint64(HPAGE_PMD_NR) + np.uint64(1),
                             np.uint64(0)))
    else:
        zero, frame = frames.kpf & _KPF_ZERO_PAGE != 0, frames.pfn
        share(zero, frames.pfn)
        share(frames.kpf & _KPF_KSM != 0, frames.pfn)
    number, pgoff = _file_offsets(vmas, pages, by_path=frames is None)
    of_file = (pages.word & _PM_FILE != 0) & (pgoff < np.uint64(1 << 40)) & ~zero
    share(of_file, _pairs(number << np.uint64(40) | pgoff, frame))

    is_first = same_as == np.arange(nr)
    row = (np.cumsum(is_first) - 1)[same_as]
    first = np.flatnonzero(is_first)
    if frames is not None:
        # A frame has one content. One that is found with two was freed and used again while pagemap was read.
        torn = np.ones(len(first), bool)
        torn[np.unique(frames.pfn[first], return_index=True)[1]] = False
        _tear(frames, torn[row])
    return _Numbers(row, first, zero, len(first))


def _file_offsets(vmas, pages, by_path):
    # For each page the number of its VMA's file, if that has one, and its offset there in pages. Where frames are not
    # seen the path counts too: subvolumes of btrfs have the same inodes on one device, and so have memfd and SysV memory.
    numbers, of_vma = {}, []
    for vma in vmas:
        name = (vma.device, vma.inode, vma.path if by_path else None)
        of_vma.append(numbers.setdefault(name, len(numbers)))
    start = np.array([vma.start for vma in vmas], np.uint64)[pages.vma]
    offset = np.array([vma.offset for vma in vmas], np.uint64)[pages.vma]
    return np.array(of_vma, np.uint64)[pages.vma], (pages.va - start >> np.uint64(PAGE_SHIFT)) + (
        offset >> np.uint64(PAGE_SHIFT))


def _pairs(left, right):
    # One key for each distinct pair.
    left, right = (np.unique(values, return_inverse=True)[1].astype(np.uint64) for values in (left, right))
    return left * np.uint64(len(right)) + right


# --- which folios they form ----------------------------------------------------------------------------------

def _find_folios(files, vmas, pages, frames, numbers, notes):
    # The folio records: FOLIO_DTYPE, writable, without what reading the bytes will add.
    if frames is None:
        begin, order, first_index, folio = _folios_of_pmds(vmas, pages, numbers)
        head_kpf = None
    else:
        begin, order, first_index, head = _folios_of_frames(files, pages, frames, numbers)
        folio, head_kpf = head, _head_flags(files, frames, begin, head)
    folios = np.zeros(len(begin), FOLIO_DTYPE)
    if not len(begin):
        return folios
    folios["va"] = pages.va[begin]
    folios["page"] = numbers.row[begin]
    folios["vma"] = pages.vma[begin]
    folios["folio"] = _by_appearance(folio)
    folios["first_index"] = first_index
    folios["nr_mapped"] = np.diff(np.r_[begin, len(pages.va)])
    folios["order"] = order

    zero = numbers.zero[begin]
    bits = folios["bits"]
    bits[(pages.word[begin] & _PM_FILE == 0) & ~zero] |= snap.FOLIO_ANON
    bits[zero] |= snap.FOLIO_ZERO_PAGE
    bits[np.bitwise_and.reduceat(pages.word, begin) & _PM_EXCLUSIVE != 0] |= snap.FOLIO_EXCLUSIVE
    bits[np.bitwise_or.reduceat(pages.word, begin) & _PM_SOFT_DIRTY != 0] |= snap.FOLIO_SOFT_DIRTY
    hugetlb = np.array([vma.kind == "hugetlb" for vma in vmas])[folios["vma"]]
    bits[hugetlb] |= snap.FOLIO_HUGETLB
    if pages.scanned:
        bits[pages.pmd[begin] & ~hugetlb] |= snap.FOLIO_THP
    else:
        bits[_pmd_by_sums(vmas, folios, notes) & ~hugetlb] |= snap.FOLIO_THP
    if frames is None:
        bits[np.array([vma.locked for vma in vmas])[folios["vma"]]] |= snap.FOLIO_MLOCKED
    else:
        for bit, name in _BITS_OF_KPF:
            bits[head_kpf & np.uint64(1 << bit) != 0] |= name
        bits[np.bitwise_or.reduceat(frames.torn, begin)] |= snap.FOLIO_CHANGED
        folios["mapcount"] = np.minimum(np.maximum.reduceat(frames.nr_mappings, begin), 0xffffffff)
    return folios


def _by_appearance(values):
    # Each distinct value replaced by its rank in order of first appearance: [7, 3, 7] as [0, 1, 0].
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _follows(pages, numbers):
    # True where a page continues the one before it: in memory, in the VMA and in the data.
    follows = np.zeros(len(pages.va), bool)
    follows[1:] = ((pages.va[1:] - pages.va[:-1] == PAGE_SIZE) & (pages.vma[1:] == pages.vma[:-1])
                   & (numbers.row[1:] - numbers.row[:-1] == 1))
    return follows


def _folios_of_pmds(vmas, pages, numbers):
    # Without frames: what a PMD maps is a folio of its size, hugetlb says its size, all else is a base page. Returns the
    # index of each record's first page; its order; which page of the folio that is; and a number of the folio.
    vma_order = np.array([vma.page_size.bit_length() - 1 - PAGE_SHIFT for vma in vmas], np.uint8)[pages.vma]
    vma_order[pages.pmd & (vma_order == 0)] = HPAGE_PMD_ORDER
    index = (pages.va >> np.uint64(PAGE_SHIFT)) & (np.uint64(1) << vma_order.astype(np.uint64)) - np.uint64(1)
    # A page that appeared before belongs to the folio it had there.
    order, index = vma_order[numbers.first[numbers.row]], index[numbers.first[numbers.row]]
    follows = _follows(pages, numbers)
    follows[1:] &= (order[1:] == order[:-1]) & (index[1:] == index[:-1] + np.uint64(1))
    begin = np.flatnonzero(~follows)
    return begin, order[begin], index[begin], numbers.row[begin] - index[begin].astype(np.int64)


def _folios_of_frames(files, pages, frames, numbers):
    # With frames: compound heads and tails. Returns as above, the folio being the frame number of its head.
    while True:
        compound = frames.kpf & (_KPF_COMPOUND_HEAD | _KPF_COMPOUND_TAIL) != 0
        follows = _follows(pages, numbers)
        follows[1:] &= ((frames.pfn[1:] == frames.pfn[:-1] + np.uint64(1)) & compound[:-1]
                        & (frames.kpf[1:] & _KPF_COMPOUND_TAIL != 0))
        begin = np.flatnonzero(~follows)
        nr_mapped = np.diff(np.r_[begin, len(pages.va)])
        head, order = _heads_and_orders(files, frames, begin, nr_mapped)
        wrong = head & (np.uint64(1) << order.astype(np.uint64)) - np.uint64(1) != 0
        if not wrong.any():
            return begin, order, frames.pfn[begin] - head, head
        # A folio that was split, freed or made while its flags were read.
        _tear(frames, np.repeat(wrong, nr_mapped))


def _heads_and_orders(files, frames, begin, nr_mapped):
    # Head frame and order of each run of pages. Folios are aligned to their size, so that the head of a tail page is
    # among the frames that its own number, rounded down, can be; and the order is above k if frame head + 2^k is a tail.
    # An order that does not fit the head means that flags changed meanwhile: the caller sees it.
    pfn, kpf = frames.pfn[begin], frames.kpf[begin]
    head = pfn.copy()
    order = np.zeros(len(begin), np.uint8)
    lost = np.flatnonzero(kpf & (_KPF_COMPOUND_HEAD | _KPF_COMPOUND_TAIL) == _KPF_COMPOUND_TAIL)
    for k in range(1, MAX_FOLIO_ORDER + 1):
        if not len(lost):
            break
        below = pfn[lost] >> np.uint64(k) << np.uint64(k)
        found = _read_frame_words(files.kpageflags, below, _KPF_NOPAGE) & _KPF_COMPOUND_HEAD != 0
        head[lost[found]] = below[found]
        lost = lost[~found]
    order[lost] = MAX_FOLIO_ORDER

    large = np.flatnonzero((kpf & (_KPF_COMPOUND_HEAD | _KPF_COMPOUND_TAIL) != 0) & (order == 0))
    last = (pfn[large] - head[large]).astype(np.int64) + nr_mapped[large] - 1
    # Of at least as many pages as are mapped, and of two.
    order[large] = np.maximum(np.frexp(last.astype(np.float64))[1], 1)
    while len(large):
        large = large[order[large] < MAX_FOLIO_ORDER]
        middle = head[large] + (np.uint64(1) << order[large].astype(np.uint64))
        above = _read_frame_words(files.kpageflags, middle, _KPF_NOPAGE) & _KPF_COMPOUND_TAIL != 0
        large = large[above]
        order[large] += 1
    return head, order


def _head_flags(files, frames, begin, head):
    # Flags of each run's folio: the head's, which is not in the pages if it is not mapped here.
    kpf = frames.kpf[begin].copy()
    elsewhere = np.flatnonzero(frames.pfn[begin] != head)
    kpf[elsewhere] = _read_frame_words(files.kpageflags, head[elsewhere], 0)
    return kpf


def _pmd_by_sums(vmas, folios, notes):
    # Which records a PMD maps, from the sums in smaps: known if none does, or all that could.
    could = (folios["order"] >= HPAGE_PMD_ORDER) & (folios["nr_mapped"] >= HPAGE_PMD_NR) & (
        folios["va"] % np.uint64(HPAGE_PMD_NR * PAGE_SIZE) == 0)
    could_kib = np.bincount(folios["vma"][could], folios["nr_mapped"][could], len(vmas)) * (PAGE_SIZE >> 10)
    pmd_kib = np.array([vma.pmd_kib for vma in vmas])
    if unclear := int(np.count_nonzero((pmd_kib > 0) & (pmd_kib != could_kib))):
        notes.append(f"in {unclear} mappings only some 2 MiB pages are mapped by a PMD, and not which: taken as none")
    return could & ((pmd_kib > 0) & (pmd_kib == could_kib))[folios["vma"]]


# --- their bytes ---------------------------------------------------------------------------------------------

@dataclasses.dataclass
class _Reading:
    data: np.ndarray | None
    changed: np.ndarray             # and the next two: one element per row of data
    unreadable: np.ndarray
    vanished: np.ndarray


def _read_data(files, pages, numbers, frames, layout_only, max_bytes, progress):
    nr, total = numbers.nr_pages, numbers.nr_pages * PAGE_SIZE
    data = None
    if not layout_only:
        _check_room(files.pid, total, max_bytes)
        data = np.empty((nr, PAGE_SIZE), np.uint8)
        again = np.empty((min(nr, _PIECE_PAGES), PAGE_SIZE), np.uint8)
    reading = _Reading(data, *(np.zeros(nr, bool) for _ in range(3)))
    if frames is not None:
        reading.changed[numbers.row[frames.torn]] = True
    for at in range(0, nr, _PIECE_PAGES):
        piece = slice(at, min(at + _PIECE_PAGES, nr))
        first = numbers.first[piece]
        zero = numbers.zero[first]
        va, word = pages.va[first], pages.word[first]
        # 1. the bytes, twice; what differs is kept as it was read last
        if not layout_only:
            here, there = data[piece], again[:len(first)]
            bad = _read_bytes(files, va, here)
            bad_again = _read_bytes(files, va, there)
            differ = (here.view(np.uint64) != there.view(np.uint64)).any(axis=1) & ~bad_again
            here[differ] = there[differ]
            here[zero] = 0
            reading.changed[piece] |= differ & ~bad
            reading.unreadable[piece] = bad & bad_again
        # 2. where they are now
        now = _read_words(files.pagemap, va >> np.uint64(PAGE_SHIFT), 0)
        reading.vanished[piece] = now & (_PM_PRESENT | _PM_SWAP) == 0
        reading.changed[piece] |= (((now ^ word) & (_PM_PFN | _PM_FILE | _PM_PRESENT) != 0)
                                   | (now & ~word & _PM_SOFT_DIRTY != 0))
        # 3. each page in one class; a zero page is what it was, whatever has taken its place
        reading.vanished[piece] &= ~zero
        reading.unreadable[piece] &= ~(zero | reading.vanished[piece])
        reading.changed[piece] &= ~(zero | reading.vanished[piece] | reading.unreadable[piece])
        files.check_alive()
        if progress is not None:
            progress(piece.stop * PAGE_SIZE, total)
    # 4. the other addresses of pages that have several
    other = np.ones(len(pages.va), bool)
    other[numbers.first] = False
    other = np.flatnonzero(other & ~numbers.zero)
    now = _read_words(files.pagemap, pages.va[other] >> np.uint64(PAGE_SHIFT), 0)
    moved = (now ^ pages.word[other]) & (_PM_PFN | _PM_FILE | _PM_PRESENT) != 0
    rows = numbers.row[other[moved]]
    reading.changed[rows] = ~(reading.vanished[rows] | reading.unreadable[rows])
    return reading


def _check_room(pid, total, max_bytes):
    if max_bytes is not None and total > max_bytes:
        raise OutOfMemory(f"pid {pid} has {format_size(total)} to read and {format_size(max_bytes)} are allowed; {_LESS}")
    available = snap.available_bytes()
    if available is not None and total > available:
        raise OutOfMemory(f"pid {pid} has {format_size(total)} to read and {format_size(available)} are available; "
                          f"{_LESS}")


def _read_bytes(files, va, out):
    # Read the pages at ``va`` (ascending) into the rows of ``out``; True for each that cannot be read, whose row is 0.
    bad = np.zeros(len(va), bool)
    raw = memoryview(out).cast("B")
    cuts = np.flatnonzero(va[1:] - va[:-1] != PAGE_SIZE) + 1
    for begin, end in zip(np.r_[0, cuts].tolist(), np.r_[cuts, len(va)].tolist()):
        while begin < end:
            try:
                got = os.preadv(files.mem, [raw[begin * PAGE_SIZE:end * PAGE_SIZE]], int(va[begin]))
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise
                bad[begin] = True
                out[begin] = 0
                begin += 1
                continue
            if not got:
                raise _ended(files.pid)
            begin += got // PAGE_SIZE
    return bad


def _mark_folios(folios, reading):
    # What reading has found, from rows of data to the records that have them.
    begin = folios["page"].astype(np.int64)
    end = begin + folios["nr_mapped"]
    for marked, bit in ((reading.changed, snap.FOLIO_CHANGED), (reading.unreadable, snap.FOLIO_UNREADABLE),
                        (reading.vanished, snap.FOLIO_VANISHED)):
        upto = np.r_[0, np.cumsum(marked)]
        folios["bits"][upto[end] > upto[begin]] |= bit
