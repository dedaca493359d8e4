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
import datetime
import fcntl
import os
import re
import struct
import time

import numpy as np

from offload.errors import InvalidInput, NoSuchProcess, NotPermitted, NotSupported, OutOfMemory
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
# the number of regions.
_PM_SCAN_ARG = struct.Struct("12Q")
_PAGEMAP_SCAN = 3 << 30 | _PM_SCAN_ARG.size << 16 | ord("f") << 8 | 16
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_PAGE_IS_PFNZERO = 1 << 5
_PAGE_IS_HUGE = 1 << 6
_SCAN_REGIONS = 1 << 14

_PIECE_PAGES = 2048          # bytes are read, read again and compared by this much: 8 MiB
_WALK_PAGES = 1 << 20        # a piece of pagemap, where it is read from end to end
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
    other base pages).
    """
    if isinstance(pid, bool) or not isinstance(pid, int) or pid <= 0:
        raise InvalidInput(f"pid {pid!r} is not a process id; give a positive number")
    if os.sysconf("SC_PAGE_SIZE") != PAGE_SIZE:
        raise NotSupported(f"this kernel has pages of {format_size(os.sysconf('SC_PAGE_SIZE'))}; only 4K can be read")
    begun_ns = time.perf_counter_ns()
    taken = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    notes = []
    with contextlib.ExitStack() as stack:
        # All files are opened before any is read. Each stays with the address space it was opened on, so that a process
        # that calls exec, or a pid that is used again, shows as an end of file and never as another's pages.
        files = _Files(stack, pid, notes, want_bytes=not layout_only)
        status = files.status()
        vmas = _read_vmas(files, notes)
        layout = _read_layout(files, vmas, notes)
        folios, torn = _find_folios(files, vmas, layout, notes)
        data, counts = _read_data(files, layout, torn, folios, layout_only, max_bytes, progress)
        _note_new_mappings(files, vmas, notes)
    folios.setflags(write=False)
    return Snapshot(
        pid=pid, comm=status["Name"], taken=taken, kernel=os.uname().release,
        vmas=tuple(vmas), folios=folios, data=data, nr_pages=layout.nr_pages,
        vm_pin_kib=_kib(status.get("VmPin")), vm_lck_kib=_kib(status.get("VmLck")),
        vm_swap_kib=_kib(status.get("VmSwap")), folio_sizes_known=layout.frames_known,
        read_ns=time.perf_counter_ns() - begun_ns, skipped=layout.skipped, notes=tuple(notes), **counts)


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
            raise self._without_memory() from None
        except PermissionError:
            raise self._forbidden(name) from None

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
        if name == "mem":
            return NotPermitted(f"the bytes of pid {self.pid} (uid {owner}) may not be read by uid {os.geteuid()}, its "
                                f"layout may; use --layout-only, or run as root (see kernel.yama.ptrace_scope)")
        return NotPermitted(f"pid {self.pid} (uid {owner}) may not be read by uid {os.geteuid()}; run as its user or as "
                            f"root")

    def _without_memory(self):
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
        return self.ended()

    def ended(self):
        return NoSuchProcess(f"pid {self.pid} ended, or started another program, while it was read; nothing was kept")

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
        try:
            if os.pread(self.pagemap, 8, 0):
                return
        except ProcessLookupError:
            pass
        raise self.ended()


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
    # A text that can go to any terminal: what is not printable becomes \xNN.
    text = raw.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _kib(text):
    # "123 kB" as 123; absent as 0.
    return int(text.split()[0]) if text else 0


# --- VMAs ----------------------------------------------------------------------------------------------------

_SMAPS_HEAD = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (.{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")
_SUMS = {b"KernelPageSize": "page_size", b"Rss": "rss_kib", b"Swap": "swap_kib", b"Locked": "locked_kib",
         b"Shared_Dirty": "dirty_kib", b"Private_Dirty": "dirty_kib",
         b"AnonHugePages": "pmd_kib", b"ShmemPmdMapped": "pmd_kib", b"FilePmdMapped": "pmd_kib"}


def _read_vmas(files, notes):
    text = _read_all(files, files.smaps)
    if not text:
        raise files._without_memory()
    mounts = _mounts(files.pid, notes)
    vmas = []
    for block in _smaps_blocks(text):
        vmas.append(_vma(block, mounts))
    if not any(vma.flags for vma in vmas):
        notes.append("this kernel shows no VmFlags: locked, hugetlb and device mappings are not recognised")
    return vmas


def _read_all(files, fd):
    pieces = []
    try:
        while piece := os.read(fd, 1 << 20):
            pieces.append(piece)
    except ProcessLookupError:
        raise files.ended() from None
    return b"".join(pieces)


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
    fs = mounts.get((major, minor), "") if inode else ""
    kind = _kind_of_vma(path, inode, mode[3] == "s", flags, fs)
    sums["page_size"] = sums.get("page_size", 4) << 10
    return SnapshotVma(start=int(start, 16), end=int(end, 16), prot=mode[:3].replace("-", ""), shared=mode[3] == "s",
                       offset=int(offset, 16), path=path, inode=inode, device=device, flags=flags, kind=kind,
                       fs=fs or ("tmpfs" if kind == "shmem" else ""), **sums)


def _kind_of_vma(path, inode, shared, flags, fs):
    # The order matters: [vvar] is a pfnmap too, and a hugetlb memfd is named like any memfd.
    # ``fs`` is empty for what is on no mount: the kernel's own memfd, SysV, anonymous shared and secret memory.
    if path.startswith("[") and not path.startswith(("[heap]", "[stack", "[anon:", "[anon_shmem:")):
        return "vdso"
    if "io" in flags or "pf" in flags:
        return "pfnmap"
    if "ht" in flags:
        return "hugetlb"
    if "mm" in flags:                          # VM_MIXEDMAP: DAX and drivers
        return "other"
    if inode == 0:
        return "anon" if not path or path.startswith("[") else "other"
    if path.startswith("[anon_shmem:"):
        return "shmem"
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

class _Layout:
    # One element per present page of the VMAs that are read, ascending in va.
    #   va, word      its address and its pagemap word
    #   vma           index of its VMA
    #   is_zero       the zero page, or part of the huge one
    #   is_pmd        a PMD (or a hugetlb entry) maps it
    #   page          its row in the data: the same for pages that are one and the same, numbered by first appearance
    #   is_first      the first appearance of its row
    # and nr_pages, the number of rows; frames_known: pagemap words have frame numbers and kpageflags can be read;
    # pmd_known: is_pmd and is_zero are the kernel's word.
    pass


def _read_layout(files, vmas, notes):
    layout = _Layout()
    parts = []
    layout.skipped = {}
    layout.pmd_known = True
    for number, vma in enumerate(vmas):
        if vma.start >> 63:
            continue                            # [vsyscall] is no page of the process
        va, categories = None, None
        if layout.pmd_known:
            found = _scan_pages(files.pagemap, vma)
            if found is None:
                layout.pmd_known = False
                notes.append("this kernel has no PAGEMAP_SCAN (Linux 6.7): which pages a PMD maps is worked out from "
                             "sums, and zero pages at the end of a mapping may be missing")
            else:
                va, categories = found
                word = _read_words(files.pagemap, va >> np.uint64(PAGE_SHIFT), 0)
        if va is None:
            va, word = _walk_pages(files.pagemap, vma)
            categories = np.zeros(len(va), np.uint64)
        present = word & _PM_PRESENT != 0
        nr_swapped = int(np.count_nonzero(word[~present] & (_PM_SWAP | _PM_GUARD) == _PM_SWAP))
        nr_present = int(np.count_nonzero(present))
        object.__setattr__(vma, "nr_present", nr_present)
        object.__setattr__(vma, "nr_swapped", nr_swapped)
        if vma.kind in READ_KINDS:
            parts.append((va[present], word[present], categories[present], np.full(nr_present, number, np.uint32)))
        elif nr_present:
            layout.skipped[vma.kind] = layout.skipped.get(vma.kind, 0) + nr_present
    files.check_alive()
    layout.va = np.concatenate([part[0] for part in parts] or [np.empty(0, np.uint64)])
    layout.word = np.concatenate([part[1] for part in parts] or [np.empty(0, np.uint64)])
    categories = np.concatenate([part[2] for part in parts] or [np.empty(0, np.uint64)])
    layout.vma = np.concatenate([part[3] for part in parts] or [np.empty(0, np.uint32)])
    layout.is_zero = categories & np.uint64(_PAGE_IS_PFNZERO) != 0
    layout.is_pmd = categories & np.uint64(_PAGE_IS_HUGE) != 0
    layout.frames_known = files.kpageflags is not None
    if layout.frames_known and len(layout.word) and not (layout.word & _PM_PFN).any():
        layout.frames_known = False
        notes.append("folio sizes, flags and mapcounts cannot be read: /proc/PID/pagemap hides frame numbers without "
                     "CAP_SYS_ADMIN; every page is taken as order 0 unless a PMD is seen to map it")
    return layout
