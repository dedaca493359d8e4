"""The reader of a live process: what /proc shows of known memory, and what it does when that moves.

The children are Python processes that make known mappings, say where they are on a pipe, and then do what they are told
on another; nothing sleeps. The independent answer is `naive_pages`: one page at a time, walking from a tail page to its
head, sharing no code with the reader.
"""

import contextlib
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import InvalidInput, NoSuchProcess, NotPermitted, NotSupported, OutOfMemory
from offload.units import HPAGE_PMD_NR, PAGE_SIZE
from offload.workload import live
from offload.workload import snapshot as snap
from offload.workload.live import read_process
from offload.workload.snapshot import validate_snapshot

PMD_SIZE = HPAGE_PMD_NR * PAGE_SIZE
NOBODY = 65534


def _frames_hidden():
    try:
        os.close(os.open("/proc/kpageflags", os.O_RDONLY))
    except OSError:
        return True
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek((id(os) >> 12) * 8)
        return struct.unpack("Q", pagemap.read(8))[0] & ((1 << 55) - 1) == 0


needs_frames = pytest.mark.skipif(_frames_hidden(), reason="/proc/kpageflags or frame numbers cannot be read (not root)")


# --- children ------------------------------------------------------------------------------------------------

PRELUDE = """
import ctypes, json, mmap, os, signal, sys, tempfile
PAGE, PMD = 4096, 2 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for name in ("madvise", "mlock", "mprotect", "munmap"):
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * (name in ("madvise", "mprotect"))
DONTNEED, NOHUGEPAGE, HUGEPAGE = 4, 15, 14

def check(result):
    assert result == 0, os.strerror(ctypes.get_errno())

def mapped(nbytes, prot=3, flags=0x22, fd=-1):
    at = libc.mmap(None, nbytes, prot, flags, fd, 0)
    assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return at

def aligned(nbytes):                  # to a PMD, with a gap on both sides
    at = mapped(nbytes + 2 * PMD, 0)
    at = (at + PMD) & -PMD
    check(libc.mprotect(at, nbytes, 3))
    return at

def fill(at, nbytes, seed):           # page i of it is full of (seed + i) % 251
    for i in range(nbytes // PAGE):
        ctypes.memset(at + i * PAGE, (seed + i) % 251, PAGE)

def base_pages(nbytes, seed, **how):
    at = mapped(nbytes, **how)
    libc.madvise(at, nbytes, NOHUGEPAGE)
    fill(at, nbytes, seed)
    return at

def tell(**values):
    print(json.dumps(values), flush=True)

def obey():                           # each line is a statement; an answer follows
    for line in sys.stdin:
        exec(line, globals())
        tell()
"""


class Child:
    """A process that runs PRELUDE + code; ``said`` is what its first tell() said."""

    def __init__(self, code):
        self.process = subprocess.Popen([sys.executable, "-c", PRELUDE + code], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.pid = self.process.pid
        line = self.process.stdout.readline()
        assert line, "the child failed; its traceback is above"
        self.said = types.SimpleNamespace(**json.loads(line))

    def do(self, statement):
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        # With its children, which hold the pipes too. Its own session: its group has its pid.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def child(code):
    running = Child(code)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def idle(code):
    with child(code + "\nobey()\n") as running:
        yield running


def expected(nr_pages, seed):
    return np.repeat(((seed + np.arange(nr_pages)) % 251).astype(np.uint8), PAGE_SIZE).reshape(nr_pages, PAGE_SIZE)


# --- answers -------------------------------------------------------------------------------------------------

def records_in(snapshot, start, nbytes):
    """The records with a page in the range; the first may begin before it, and the last end behind it."""
    va = snapshot.folios["va"]
    end = va + snapshot.folios["nr_mapped"].astype(np.uint64) * np.uint64(PAGE_SIZE)
    return snapshot.folios[(end > start) & (va < start + nbytes)]


def bytes_in(snapshot, start, nbytes):
    """{page number in the range: its bytes} of the present pages."""
    found = {}
    for record in records_in(snapshot, start, nbytes):
        for i in range(int(record["nr_mapped"])):
            number = (int(record["va"]) - start) // PAGE_SIZE + i
            if 0 <= number < nbytes // PAGE_SIZE:
                found[number] = snapshot.data[int(record["page"]) + i]
    return found


def assert_bytes(snapshot, start, want, but=()):
    found = bytes_in(snapshot, start, len(want) * PAGE_SIZE)
    assert sorted(found) == [i for i in range(len(want)) if i not in but]
    for i, page in found.items():
        assert (page == want[i]).all(), f"page {i}"


def vma_at(snapshot, address):
    return next(vma for vma in snapshot.vmas if vma.start <= address < vma.end)


def bits_of(records):
    """The bits all records have, and those any has, as names."""
    every, some = np.bitwise_and.reduce(records["bits"]), np.bitwise_or.reduce(records["bits"])
    return ({name for bit, name in snap.FOLIO_BIT_NAMES.items() if every & bit},
            {name for bit, name in snap.FOLIO_BIT_NAMES.items() if some & bit})


def naive_pages(pid, start, nbytes):
    """{va: (head pfn, index, order, mapcount, flags of the head)}: one page after the other."""
    pages = {}
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap, open("/proc/kpageflags", "rb") as kpageflags, \
            open("/proc/kpagecount", "rb") as kpagecount:
        @functools.cache
        def word(file, index):
            file.seek(index * 8)
            return struct.unpack("Q", file.read(8))[0]

        for va in range(start, start + nbytes, PAGE_SIZE):
            entry = word(pagemap, va >> 12)
            if not entry >> 63:
                continue
            pfn = head = entry & (1 << 55) - 1
            order = 0
            if word(kpageflags, pfn) & (3 << 15):
                while word(kpageflags, head) & 1 << 16:
                    head -= 1
                tail = head + 1
                while word(kpageflags, tail) & 1 << 16:
                    tail += 1
                order = (tail - head).bit_length() - 1
            pages[va] = head, pfn - head, order, word(kpagecount, pfn), word(kpageflags, head)
    return pages


def assert_as_naive(snapshot, pid, start, nbytes):
    """Folio, index, order, flags and mapcount of each page agree with the naive reader. Leaves out which number a folio has,
    and flags that reading the bytes may set (referenced, active, lru)."""
    naive = naive_pages(pid, start, nbytes)
    seen, folio_of_head = {}, {}
    for record in records_in(snapshot, start, nbytes):
        for i in range(int(record["nr_mapped"])):
            seen[int(record["va"]) + i * PAGE_SIZE] = record, int(record["first_index"]) + i
    assert sorted(seen) == sorted(naive)
    for va, (head, index, order, mapcount, flags) in naive.items():
        record, index_here = seen[va]
        assert (index_here, int(record["order"])) == (index, order), hex(va)
        assert folio_of_head.setdefault(head, int(record["folio"])) == int(record["folio"]), hex(va)
        assert int(record["mapcount"]) >= mapcount
        for kpf, bit in ((4, snap.FOLIO_DIRTY), (14, snap.FOLIO_SWAPBACKED), (21, snap.FOLIO_KSM),
                         (24, snap.FOLIO_ZERO_PAGE), (33, snap.FOLIO_MLOCKED)):
            assert bool(record["bits"] & bit) == bool(flags >> kpf & 1), (hex(va), kpf)
    assert len(set(folio_of_head.values())) == len(folio_of_head)


def read(pid, **options):
    """read_process, checked for contradictions, and for descriptors left open."""
    before = len(os.listdir("/proc/self/fd"))
    snapshot = read_process(pid, **options)
    validate_snapshot(snapshot)
    assert len(os.listdir("/proc/self/fd")) == before
    return snapshot


def without_root(monkeypatch):
    """As if neither kpageflags nor frame numbers could be read."""
    original = live._Files._open_path

    def denied(self, path):
        if path == "/proc/kpageflags":
            raise PermissionError(13, "Permission denied")
        return original(self, path)
    monkeypatch.setattr(live._Files, "_open_path", denied)


def between_readings(monkeypatch, act, when=2):
    """Call ``act`` once, just before the bytes are read for the ``when``-th time."""
    original, calls = live._read_bytes, []

    def reading(*args):
        calls.append(1)
        if len(calls) == when:
            act()
        return original(*args)
    monkeypatch.setattr(live, "_read_bytes", reading)


# --- known memory --------------------------------------------------------------------------------------------

class TestAnonymousMemory:
    """Each page comes with its bytes, in the folio it is in."""

    def test_base_pages(self):
        with idle("tell(at=base_pages(64 * PAGE, 7))") as process:
            snapshot = read(process.pid)
            at = process.said.at
        assert_bytes(snapshot, at, expected(64, 7))
        records = records_in(snapshot, at, 64 * PAGE_SIZE)
        assert len(records) == 64 and (records["order"] == 0).all() and (records["first_index"] == 0).all()
        vma = vma_at(snapshot, at)
        assert (vma.kind, vma.prot, vma.shared, vma.fs) == ("anon", "rw", False, "")
        assert vma.nr_present >= 64 and not vma.nr_swapped
        assert {"anon", "exclusive"} <= bits_of(records)[0]
        assert (snapshot.pid, snapshot.nr_changed, snapshot.nr_vanished, snapshot.nr_unreadable) == (process.pid, 0, 0, 0)
        assert snapshot.kernel == os.uname().release and snapshot.comm and snapshot.read_ns > 0
        assert {"anon", "file"} <= {vma.kind for vma in snapshot.vmas}
        assert "vdso" in {vma.kind for vma in snapshot.vmas if vma.path == "[vdso]"}

    def test_every_vma_is_there(self):
        with idle("tell()") as process:
            snapshot = read(process.pid)
            with open(f"/proc/{process.pid}/maps") as maps:
                lines = [line.split() for line in maps]
        assert [f"{vma.start:08x}-{vma.end:08x}" for vma in snapshot.vmas] == [line[0] for line in lines]
        assert [vma.inode for vma in snapshot.vmas] == [int(line[4]) for line in lines]
        assert sum(vma.nr_present for vma in snapshot.vmas if vma.kind in snap.READ_KINDS) == sum(
            int(nr) for nr in snapshot.folios["nr_mapped"])
        assert sum(snapshot.skipped.values()) == sum(
            vma.nr_present for vma in snapshot.vmas if vma.kind in snap.SKIPPED_KINDS)

    @needs_frames
    def test_base_pages_as_the_naive_reader_sees_them(self):
        with idle("tell(at=base_pages(64 * PAGE, 7))") as process:
            snapshot = read(process.pid)
            assert_as_naive(snapshot, process.pid, process.said.at, 64 * PAGE_SIZE)
        assert snapshot.folio_sizes_known and not [note for note in snapshot.notes if "folio" in note]

    THP = """
at = aligned(4 * PMD)
libc.madvise(at, 4 * PMD, HUGEPAGE)
fill(at, 4 * PMD, 3)
tell(at=at)
"""

    def test_huge_pages(self):
        with idle(self.THP) as process:
            at = process.said.at
            snapshot = read(process.pid)
            if not _frames_hidden():
                assert_as_naive(snapshot, process.pid, at, 4 * PMD_SIZE)
        assert_bytes(snapshot, at, expected(4 * HPAGE_PMD_NR, 3))
        records = records_in(snapshot, at, 4 * PMD_SIZE)
        thp = records[records["bits"] & snap.FOLIO_THP != 0]
        assert len(thp) * PMD_SIZE == vma_at(snapshot, at).pmd_kib << 10      # as many as smaps says
        assert (thp["order"] == 9).all() and (thp["nr_mapped"] == 512).all() and (thp["first_index"] == 0).all()

    @needs_frames
    def test_a_huge_page_with_holes_and_across_vmas(self):
        with idle(self.THP + """
libc.madvise(at + 4 * PAGE, 2 * PAGE, DONTNEED)             # a hole
libc.madvise(at + PMD, 8 * PAGE, DONTNEED)                  # the head is not mapped
check(libc.mprotect(at + 2 * PMD + 10 * PAGE, PAGE, 1))     # in three VMAs
""") as process:
            process.do("pass")
            at = process.said.at
            snapshot = read(process.pid)
            assert_as_naive(snapshot, process.pid, at, 4 * PMD_SIZE)
        assert_bytes(snapshot, at, expected(4 * HPAGE_PMD_NR, 3),
                     but={4, 5, *range(HPAGE_PMD_NR, HPAGE_PMD_NR + 8)})
        if vma_at(snapshot, at + 3 * PMD_SIZE).pmd_kib:         # huge pages were to be had
            pieces = [records_in(snapshot, at + i * PMD_SIZE, PMD_SIZE) for i in range(3)]
            assert [len(piece) for piece in pieces] == [2, 1, 3]
            assert [list(piece["first_index"]) for piece in pieces] == [[0, 6], [8], [0, 10, 11]]
            assert all(len(set(piece["folio"])) == 1 and (piece["order"] == 9).all() for piece in pieces)
            assert len(set(pieces[2]["vma"])) == 3

    @pytest.mark.parametrize("root", [False, pytest.param(True, marks=needs_frames)])
    def test_zero_pages_share_their_bytes(self, monkeypatch, root):
        if not root:
            without_root(monkeypatch)
        with idle("""
small = mapped(64 * PAGE); libc.madvise(small, 64 * PAGE, NOHUGEPAGE)
huge = aligned(4 * PMD); libc.madvise(huge, 4 * PMD, HUGEPAGE)
total = sum(ctypes.string_at(small, 64 * PAGE)) + sum(ctypes.string_at(huge, 4 * PMD))
tell(small=small, huge=huge)
""") as process:
            snapshot = read(process.pid)
        small = records_in(snapshot, process.said.small, 64 * PAGE_SIZE)
        huge = records_in(snapshot, process.said.huge, 4 * PMD_SIZE)
        for records, nr_pages in ((small, 64), (huge, 4 * HPAGE_PMD_NR)):
            assert records["nr_mapped"].sum() == nr_pages
            assert "zero_page" in bits_of(records)[0] and "anon" not in bits_of(records)[1]
        assert len(set(small["page"])) == 1 == len(set(small["folio"]))
        assert not snapshot.data[small["page"][0]].any()
        assert snapshot.nr_pages < snapshot.folios["nr_mapped"].sum() - 63 - 3 * HPAGE_PMD_NR

    def test_mlocked(self):
        with idle("""
at = base_pages(8 * PAGE, 1)
failed = libc.mlock(at, 4 * PAGE)
tell(at=at, failed=failed)
""") as process:
            snapshot = read(process.pid)
        at = process.said.at
        assert process.said.failed == 0
        assert vma_at(snapshot, at).locked and not vma_at(snapshot, at + 4 * PAGE_SIZE).locked
        assert "mlocked" in bits_of(records_in(snapshot, at, 4 * PAGE_SIZE))[0]
        assert "mlocked" not in bits_of(records_in(snapshot, at + 4 * PAGE_SIZE, 4 * PAGE_SIZE))[1]
        assert snapshot.vm_lck_kib == 16

    def test_without_read_permission(self):
        with idle("at = base_pages(8 * PAGE, 1); check(libc.mprotect(at, 8 * PAGE, 0)); tell(at=at)") as process:
            snapshot = read(process.pid)
        assert vma_at(snapshot, process.said.at).prot == ""
        assert_bytes(snapshot, process.said.at, expected(8, 1))

    def test_forked_pages_are_mapped_twice(self):
        with idle("""
at = base_pages(8 * PAGE, 1)
other = os.fork()
if other == 0:
    signal.pause()
def part():
    os.kill(other, 9); os.waitpid(other, 0)
tell(at=at, other=other)
""") as process:
            at = process.said.at
            both, other = read(process.pid), read(process.said.other)
            process.do("part()")
            alone = read(process.pid)
        for snapshot in (both, other, alone):
            assert_bytes(snapshot, at, expected(8, 1))
        assert "exclusive" not in bits_of(records_in(both, at, 8 * PAGE_SIZE))[1]
        assert "exclusive" in bits_of(records_in(alone, at, 8 * PAGE_SIZE))[0]
        if both.folio_sizes_known:
            assert set(records_in(both, at, 8 * PAGE_SIZE)["mapcount"]) == {2}
            assert set(records_in(other, at, 8 * PAGE_SIZE)["mapcount"]) == {2}
            assert set(records_in(alone, at, 8 * PAGE_SIZE)["mapcount"]) == {1}

    @pytest.mark.parametrize("prot", [0, 3])
    def test_a_terabyte_with_three_pages_takes_no_time(self, prot):
        with idle(f"""
at = mapped(1 << 40, {prot}, 0x4022)
libc.madvise(at, 1 << 40, NOHUGEPAGE)
for i, place in enumerate((0, 1 << 38, (1 << 40) - PAGE)):
    check(libc.mprotect(at + place, PAGE, 3)); fill(at + place, PAGE, 5 + i); check(libc.mprotect(at + place, PAGE, {prot}))
tell(at=at)
""") as process:
            begun = time.process_time()
            snapshot = read(process.pid)
            assert time.process_time() - begun < 1
        at = process.said.at
        records = snapshot.folios[(snapshot.folios["va"] >= at) & (snapshot.folios["va"] < at + (1 << 40))]
        assert [int(va) - at for va in records["va"]] == [0, 1 << 38, (1 << 40) - PAGE_SIZE]
        assert [int(snapshot.data[page][0]) for page in records["page"]] == [5, 6, 7]

    @pytest.mark.parametrize("nr_regions", [1 << 14, 2000, 512, 7, 1])
    def test_thousands_of_holes(self, monkeypatch, nr_regions):
        # More regions than PAGEMAP_SCAN takes at once, in the kernel (512) and here.
        monkeypatch.setattr(live, "_SCAN_REGIONS", nr_regions)
        with idle("at = mapped(6000 * PAGE); libc.madvise(at, 6000 * PAGE, NOHUGEPAGE)\n"
                  "for i in range(0, 6000, 2): fill(at + i * PAGE, PAGE, i)\n"
                  "tell(at=at)") as process:
            snapshot = read(process.pid)
        assert_bytes(snapshot, process.said.at, expected(6000, 0), but=range(1, 6000, 2))
        assert not snapshot.nr_changed

    def test_guard_pages_are_not_swapped_ones(self):
        with idle("at = base_pages(8 * PAGE, 1); failed = libc.madvise(at, 4 * PAGE, 102); tell(at=at, failed=failed)"
                  ) as process:
            snapshot = read(process.pid)
        assert snapshot.nr_swapped == 0 or process.said.failed
        assert_bytes(snapshot, process.said.at, expected(8, 1), but=() if process.said.failed else range(4))


class TestSharedMemoryAndFiles:
    """A page mapped at several addresses is one page, of the kind its file is."""

    FILE = """
file = open({path!r}, "w+b"); file.truncate(16 * PAGE)
at = mapped(16 * PAGE, 3, 1, file.fileno()); fill(at, 16 * PAGE, 9)
again = mapped(8 * PAGE, 1, 1, file.fileno()); ctypes.string_at(again, 8 * PAGE)
private = mapped(8 * PAGE, 3, 2, file.fileno()); ctypes.string_at(private, 8 * PAGE); fill(private + PAGE, PAGE, 99)
tell(at=at, again=again, private=private)
"""

    @pytest.mark.parametrize("root", [False, pytest.param(True, marks=needs_frames)])
    def test_a_file_mapped_three_times(self, tmp_path, monkeypatch, root):
        if not root:
            without_root(monkeypatch)
        with idle(self.FILE.format(path=str(tmp_path / "a file"))) as process:
            process.do("fill(at, 16 * PAGE, 9)")
            snapshot = read(process.pid)
        said = process.said
        assert_bytes(snapshot, said.at, expected(16, 9))
        assert_bytes(snapshot, said.again, expected(8, 9))
        want = expected(8, 9)
        want[1] = 99
        assert_bytes(snapshot, said.private, want)
        vma = vma_at(snapshot, said.at)
        assert vma.kind in ("file", "shmem") and vma.fs and vma.shared and vma.path == str(tmp_path / "a file")
        assert vma.dirty_kib >= 64 and not vma_at(snapshot, said.private).shared
        shared, again, private = (bytes_in(snapshot, start, 8 * PAGE_SIZE)
                                  for start in (said.at, said.again, said.private))
        for i in range(8):
            assert shared[i].ctypes.data == again[i].ctypes.data
            assert (shared[i].ctypes.data == private[i].ctypes.data) == (i != 1)
        anon = [int(record["va"]) - said.private for record in records_in(snapshot, said.private, 8 * PAGE_SIZE)
                if record["bits"] & snap.FOLIO_ANON]
        assert anon == [PAGE_SIZE]
        records = records_in(snapshot, said.at, 16 * PAGE_SIZE)
        assert "anon" not in bits_of(records)[1]
        if root:
            assert "dirty" in bits_of(records)[0]
            assert {record["mapcount"] for record in records if int(record["va"]) - said.at >= 8 * PAGE_SIZE} == {1}

    @pytest.mark.parametrize("make, path", [
        ("fd = os.memfd_create('a\\x1b[31m\\n'); os.ftruncate(fd, 8 * PAGE); at = mapped(8 * PAGE, 3, 1, fd)",
         "/memfd:a\\x1b[31m\\012 (deleted)"),
        ("at = mapped(8 * PAGE, 3, 0x21)", "/dev/zero (deleted)"),
        ("libc.shmat.restype = ctypes.c_void_p; id = libc.shmget(0, 8 * PAGE, 0o1600); at = libc.shmat(id, None, 0); "
         "libc.shmctl(id, 0, None)",           # IPC_RMID: it goes with its last user
         "/SYSV00000000 (deleted)"),
    ])
    def test_shmem(self, make, path):
        with idle(make + "; fill(at, 8 * PAGE, 2); tell(at=at)") as process:
            snapshot = read(process.pid)
        vma = vma_at(snapshot, process.said.at)
        assert (vma.kind, vma.fs, vma.is_tmpfs, vma.path) == ("shmem", "tmpfs", True, path)
        assert_bytes(snapshot, process.said.at, expected(8, 2))

    def test_hugetlb(self):
        with idle("""
try:
    at = mapped(PMD, 3, 0x40022); fill(at, PMD, 4); tell(at=at)
except AssertionError:
    tell(at=0)
""") as process:
            if not process.said.at:
                pytest.skip("no free page in /proc/sys/vm/nr_hugepages")
            snapshot = read(process.pid)
        at = process.said.at
        records = records_in(snapshot, at, PMD_SIZE)
        assert vma_at(snapshot, at).kind == "hugetlb" and vma_at(snapshot, at).page_size == PMD_SIZE
        assert [(int(r["order"]), int(r["nr_mapped"])) for r in records] == [(9, 512)]
        assert "hugetlb" in bits_of(records)[0] and "thp" not in bits_of(records)[1]
        assert_bytes(snapshot, at, expected(HPAGE_PMD_NR, 4))

    @pytest.mark.parametrize("kind, path, shared, flags, fs", [
        ("anon", "", False, "rd wr", ""), ("anon", "[heap]", False, "rd wr", ""),
        ("anon", "[stack]", False, "rd wr gd", ""), ("anon", "[stack:17]", False, "rd", ""),
        ("anon", "[anon:glibc: malloc]", False, "rd wr", ""), ("anon", "/dev/zero", False, "rd wr", "devtmpfs"),
        ("vdso", "[vdso]", False, "rd ex de", ""), ("vdso", "[vvar]", False, "rd io de pf", ""),
        ("vdso", "[vvar_vclock]", False, "rd io pf", ""), ("vdso", "[uprobes]", False, "ex", ""),
        ("pfnmap", "/dev/mem", True, "rd sh io pf", "devtmpfs"), ("pfnmap", "/dev/nvidia0", True, "rd io pf mm", ""),
        ("other", "/dev/dri/card0", True, "rd mm", "devtmpfs"), ("other", "/dax/file", True, "rd mm", "ext4"),
        ("other", "anon_inode:[perf_event]", True, "rd", ""), ("other", "socket:[5]", True, "rd", ""),
        ("other", "/[aio] (deleted)", False, "rd wr", ""), ("other", "anon_inode:kvm-vcpu:0", True, "rd", ""),
        ("hugetlb", "/anon_hugepage (deleted)", False, "rd wr ht", ""),
        ("hugetlb", "/memfd:x (deleted)", True, "rd ht", ""), ("hugetlb", "/SYSV00000000 (deleted)", True, "ht", ""),
        ("hugetlb", "/huge/file", True, "rd ht", "hugetlbfs"),
        ("shmem", "/memfd:x (deleted)", True, "rd wr", ""), ("shmem", "/SYSV000012ab (deleted)", True, "rd", ""),
        ("shmem", "/dev/zero (deleted)", True, "rd wr", ""), ("shmem", "[anon_shmem:x]", True, "rd wr", ""),
        ("shmem", "/dev/shm/x", True, "rd wr", "tmpfs"), ("secretmem", "/secretmem (deleted)", True, "rd lo", ""),
        ("file", "/secretmem", True, "rd", "ext4"), ("file", "/memfd:x (deleted)", True, "rd", "ext4"),
        ("file", "/usr/lib/libc.so", False, "rd ex", "ext4"), ("file", "/unknown", False, "rd", ""),
    ])
    def test_kinds(self, kind, path, shared, flags, fs):
        assert live._kind_of_vma(path, shared, tuple(flags.split()), fs) == kind

    def test_secret_memory_is_skipped_and_counted(self):
        with idle("""
fd = libc.syscall(447, 0)
if fd >= 0:
    os.ftruncate(fd, 2 * PAGE); at = mapped(2 * PAGE, 3, 1, fd); fill(at, 2 * PAGE, 1)
tell(there=fd >= 0)
""") as process:
            snapshot = read(process.pid)
        assert snapshot.skipped.get("secretmem", 0) == (2 if process.said.there else 0)
        assert bool([vma for vma in snapshot.vmas if vma.kind == "secretmem"]) == process.said.there


# --- options and fallbacks -----------------------------------------------------------------------------------

MIXED = """
at = aligned(4 * PMD); libc.madvise(at, 2 * PMD, HUGEPAGE); fill(at, 2 * PMD, 3); fill(at + 3 * PMD, 16 * PAGE, 1)
tell(at=at)
"""


class TestOptions:
    """Without bytes the layout is the same; what does not fit is refused before it is read."""

    def test_layout_only(self):
        with idle(MIXED) as process:
            full, bare = read(process.pid), read(process.pid, layout_only=True)
        assert bare.data is None and bare.layout_only and bare.nr_pages == full.nr_pages
        for name in ("va", "page", "vma", "folio", "first_index", "nr_mapped", "order"):
            assert (bare.folios[name] == full.folios[name]).all(), name
        with pytest.raises(InvalidInput):
            bare.pages_of(0)

    def test_it_can_be_saved_and_loaded(self, tmp_path):
        with idle(MIXED) as process:
            snapshot = read(process.pid)
        snap.save(snapshot, tmp_path / "a")
        loaded = snap.load(tmp_path / "a")
        assert (loaded.data == snapshot.data).all() and loaded.vmas == snapshot.vmas
        assert loaded.notes == snapshot.notes and loaded.orders() == snapshot.orders()

    def test_more_than_max_bytes(self):
        with idle(MIXED) as process:
            nbytes = read(process.pid, max_bytes=1 << 40).data.nbytes
            assert read(process.pid, max_bytes=nbytes).data.nbytes == nbytes
            with pytest.raises(OutOfMemory, match="--layout-only"):
                read(process.pid, max_bytes=nbytes - 1)
            assert read(process.pid, max_bytes=1, layout_only=True).nr_pages

    def test_more_than_the_host_has(self, monkeypatch):
        monkeypatch.setattr(snap, "available_bytes", lambda: 1 << 20)
        with idle(MIXED) as process:
            with pytest.raises(OutOfMemory, match="1M are available"):
                read(process.pid)

    def test_more_than_this_process_may_have(self, monkeypatch):
        def full(*args):
            raise MemoryError
        monkeypatch.setattr(live, "_find_folios", full)
        with idle(MIXED) as process:
            with pytest.raises(OutOfMemory, match="--layout-only"):
                read(process.pid)

    def test_progress(self):
        calls = []
        with idle("tell(at=base_pages(20 << 20, 1))") as process:
            snapshot = read(process.pid, progress=lambda *call: calls.append(call))
        assert len(calls) >= 3 and calls[-1] == (snapshot.data.nbytes, snapshot.data.nbytes)
        assert calls == sorted(calls) and len({total for _, total in calls}) == 1

    def test_without_pagemap_scan(self, monkeypatch):
        with idle(MIXED + "ctypes.string_at(at + 3 * PMD + 16 * PAGE, 4 * PAGE)") as process:
            process.do("pass")
            scanned = read(process.pid)
            monkeypatch.setattr(live, "_scan_pages", lambda pagemap, vma: None)
            walked = read(process.pid)
        assert [note for note in walked.notes if "PAGEMAP_SCAN" in note]
        left, right = (records_in(snapshot, process.said.at, 3 * PMD_SIZE + 16 * PAGE_SIZE)
                       for snapshot in (scanned, walked))
        if scanned.folio_sizes_known:
            for name in ("va", "first_index", "nr_mapped", "order", "mapcount"):
                assert (left[name] == right[name]).all(), name
            assert (left["bits"] & snap.FOLIO_THP == right["bits"] & snap.FOLIO_THP).all()
        assert_bytes(walked, process.said.at, np.concatenate(
            [expected(2 * HPAGE_PMD_NR, 3), np.zeros((HPAGE_PMD_NR, PAGE_SIZE), np.uint8), expected(16, 1)]),
            but=range(2 * HPAGE_PMD_NR, 3 * HPAGE_PMD_NR))

    def test_a_kernel_that_refuses_the_ioctl(self, monkeypatch):
        def refused(*args):
            raise OSError(25, "Inappropriate ioctl for device")
        monkeypatch.setattr(live.fcntl, "ioctl", refused)
        with idle(MIXED) as process:
            assert [note for note in read(process.pid).notes if "PAGEMAP_SCAN" in note]

    def test_without_frames(self, monkeypatch):
        with idle(MIXED) as process:
            seen = read(process.pid)
            without_root(monkeypatch)
            unseen = read(process.pid)
        assert not unseen.folio_sizes_known
        assert [note for note in unseen.notes if "/proc/kpageflags: Permission denied" in note and "order 0" in note]
        assert (seen.folios["nr_mapped"].sum(), seen.nr_pages) == (unseen.folios["nr_mapped"].sum(), unseen.nr_pages)
        assert not unseen.folios["mapcount"].any()
        # What a PMD maps is seen by anybody, and nothing else.
        thp = [snapshot.folios[snapshot.folios["bits"] & snap.FOLIO_THP != 0] for snapshot in (seen, unseen)]
        assert (thp[0]["va"] == thp[1]["va"]).all() and (thp[1]["order"] == 9).all()
        assert set(unseen.orders()) <= {0, 9} and unseen.orders().get(9, 0) == len(thp[1])
        want = np.concatenate([expected(2 * HPAGE_PMD_NR, 3), expected(HPAGE_PMD_NR, 0), expected(16, 1)])
        assert_bytes(unseen, process.said.at, want, but=range(2 * HPAGE_PMD_NR, 3 * HPAGE_PMD_NR))

    def test_other_base_pages(self, monkeypatch):
        monkeypatch.setattr(live.os, "sysconf", lambda name: 65536)
        with pytest.raises(NotSupported, match="64K"):
            read_process(os.getpid())


# --- who may not be read -------------------------------------------------------------------------------------

class TestWhatIsNoProcess:
    """A clear line, and the right exception."""

    @pytest.mark.parametrize("pid", [0, -1, True, "1", 1.0, None])
    def test_no_pid(self, pid):
        with pytest.raises(InvalidInput, match="not a process id"):
            read_process(pid)

    def test_nobody_there(self):
        with child("tell()") as process:
            pass
        for pid in (process.pid, 1 << 40):
            with pytest.raises(NoSuchProcess, match=f"no process {pid}"):
                read_process(pid)

    def test_a_zombie(self):
        with child("tell()") as process:
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(NoSuchProcess, match="zombie"):
                read_process(process.pid)

    def test_a_main_thread_that_has_ended(self):
        # The other thread tells, once it sees that the main thread is gone.
        with child("""
import threading
def other():
    while open(f"/proc/{os.getpid()}/stat").read().rpartition(")")[2].split()[0] != "Z": pass
    tell(tid=threading.get_native_id(), at=at)
    sys.stdin.read()
at = base_pages(8 * PAGE, 6)
threading.Thread(target=other).start()
libc.syscall(60 if os.uname().machine == "x86_64" else 93, 0)
""") as process:
            with pytest.raises(NoSuchProcess, match="main thread.*/task"):
                read_process(process.pid)
            assert_bytes(read(process.said.tid), process.said.at, expected(8, 6))

    def test_a_kernel_thread(self):
        try:
            with open("/proc/2/status") as file:
                kernel_thread = "Kthread:\t1" in file.read()
        except OSError:
            kernel_thread = False
        if kernel_thread:
            with pytest.raises(NoSuchProcess, match="kernel thread"):
                read_process(2)

    def test_messages_are_one_line(self):
        for pid in (-1, 1 << 40):
            with pytest.raises((InvalidInput, NoSuchProcess)) as caught:
                read_process(pid)
            assert "\n" not in str(caught.value)


DROP = """
import ctypes, json, os, signal, sys
from offload.errors import OffloadError
from offload.workload.live import read_process
from offload.workload.snapshot import validate_snapshot
import numpy as np
block = np.full((32, 4096), 77, np.uint8)
other = int(sys.argv[1])
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0          # PR_SET_DUMPABLE, which setuid took away
def tried(pid, **options):
    try:
        snapshot = read_process(pid, **options)
    except OffloadError as error:
        return [type(error).__name__, str(error)]
    validate_snapshot(snapshot)
    found = 0 if snapshot.data is None else int((snapshot.data == 77).all(axis=1).sum())
    return ["Snapshot", snapshot.folio_sizes_known, snapshot.notes, list(snapshot.orders()), found]
mine = os.fork()
if mine == 0:
    signal.pause()
try:
    print(json.dumps([tried(other), tried(mine), tried(os.getpid()), tried(mine, layout_only=True)]))
finally:
    os.kill(mine, signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def as_nobody():
    """What `tried` in DROP says of root's process, nobody's, itself, and the layout of nobody's."""
    with child("tell(); sys.stdin.read()") as roots:
        done = subprocess.run([sys.executable, "-c", DROP.replace("{nobody}", str(NOBODY)), str(roots.pid)],
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
class TestAnotherUser:
    """Without root: one's own processes, in base pages, with a note; nobody else's."""

    def test_somebody_elses_process(self, as_nobody):
        name, message = as_nobody[0]
        assert name == "NotPermitted"
        assert "uid 0" in message and f"uid {NOBODY}" in message and "root" in message and "\n" not in message

    @pytest.mark.parametrize("which", [1, 2])
    def test_its_own(self, as_nobody, which):
        name, known, notes, orders, found = as_nobody[which]
        assert name == "Snapshot" and not known and set(orders) <= {0, 9} and found >= 31
        assert [note for note in notes if "root" in note and "order 0" in note]

    def test_its_own_layout(self, as_nobody):
        assert as_nobody[3][0] == "Snapshot" and as_nobody[3][4] == 0


class TestPermission:
    """The message says what would help."""

    def test_layout_may_be_read_and_bytes_not(self, monkeypatch):
        # As with kernel.yama.ptrace_scope: mem is refused, and only mem.
        original = live._Files._open_path

        def denied(self, path):
            if path.endswith("/mem"):
                raise PermissionError(13, "Permission denied")
            return original(self, path)
        monkeypatch.setattr(live._Files, "_open_path", denied)
        monkeypatch.setattr(live.os, "geteuid", lambda: 1000)
        with idle("tell()") as process:
            with pytest.raises(NotPermitted, match="--layout-only.*ptrace_scope"):
                read_process(process.pid)
            assert read(process.pid, layout_only=True).layout_only
            monkeypatch.setattr(live.os, "geteuid", lambda: 0)
            with pytest.raises(NotPermitted, match="CAP_SYS_PTRACE"):
                read_process(process.pid)

    def test_a_process_that_is_hidden(self, monkeypatch):
        def forbidden(pid, sig):
            raise PermissionError(1, "Operation not permitted")
        monkeypatch.setattr(live.os, "kill", forbidden)
        with pytest.raises(NotPermitted, match="hidepid"):
            read_process(1 << 40)


# --- while it changes ----------------------------------------------------------------------------------------

class TestAProcessThatMoves:
    """It is not stopped: what is noticed is counted, and never mistaken for something else."""

    BIG = "at = base_pages(20 << 20, 1); tell(at=at); obey()"

    @staticmethod
    def once(act):
        left = [act]

        def progress(done, total):
            if left:
                left.pop()()
        return progress

    def test_it_exits_half_way(self):
        before = len(os.listdir("/proc/self/fd"))
        with child(self.BIG) as process:
            with pytest.raises(NoSuchProcess, match="ended.*while it was read"):
                read_process(process.pid, progress=self.once(process.end))
        assert len(os.listdir("/proc/self/fd")) == before

    def test_it_runs_another_program_half_way(self):
        with child(self.BIG) as process:
            def run():
                process.do("""os.execv(sys.executable, [sys.executable, "-c", "print('{}', flush=True); input()"])""")
            with pytest.raises(NoSuchProcess, match="another program"):
                read_process(process.pid, progress=self.once(run))

    def test_it_exits_before_its_layout_is_read(self, monkeypatch):
        with child(self.BIG) as process:
            original = live._read_layout

            def late(*args):
                process.end()
                return original(*args)
            monkeypatch.setattr(live, "_read_layout", late)
            with pytest.raises(NoSuchProcess, match="ended"):
                read_process(process.pid)

    def test_it_exits_before_its_mappings_are_read(self, monkeypatch):
        with child(self.BIG) as process:
            original = live._read_vmas

            def late(*args):
                process.end()
                return original(*args)
            monkeypatch.setattr(live, "_read_vmas", late)
            with pytest.raises(NoSuchProcess):
                read_process(process.pid)

    def test_it_exits_at_the_very_end(self, monkeypatch):
        with child(self.BIG) as process:
            original = live._note_new_mappings

            def late(*args):
                process.end()
                return original(*args)
            monkeypatch.setattr(live, "_note_new_mappings", late)
            with pytest.raises(NoSuchProcess, match="ended"):
                read_process(process.pid)

    def test_a_page_written_between_the_two_readings(self, monkeypatch):
        with child("at = base_pages(64 * PAGE, 1); tell(at=at); obey()") as process:
            between_readings(monkeypatch, lambda: process.do("fill(at + 5 * PAGE, 2 * PAGE, 200)"))
            snapshot = read(process.pid)
        at = process.said.at
        want = expected(64, 1)
        want[5], want[6] = 200, 201                 # the second reading is kept
        assert_bytes(snapshot, at, want)
        changed = [(int(record["va"]) - at) // PAGE_SIZE for record in records_in(snapshot, at, 64 * PAGE_SIZE)
                   if record["bits"] & snap.FOLIO_CHANGED]
        assert changed == [5, 6]
        assert snapshot.nr_changed >= 2 and not snapshot.nr_vanished and not snapshot.nr_unreadable

    def test_a_huge_page_of_which_one_page_changes(self, monkeypatch):
        with child(MIXED + "obey()") as process:
            between_readings(monkeypatch, lambda: process.do("fill(at + 5 * PAGE, PAGE, 200)"))
            snapshot = read(process.pid)
        changed = records_in(snapshot, process.said.at, PMD_SIZE)
        changed = changed[changed["bits"] & snap.FOLIO_CHANGED != 0]
        assert len(changed) == 1 and snapshot.nr_changed < HPAGE_PMD_NR

    @needs_frames
    def test_a_page_that_got_another_frame_with_the_same_bytes(self, monkeypatch):
        with child("at = base_pages(64 * PAGE, 1); spare = base_pages(8 * PAGE, 0); tell(at=at); obey()") as process:
            # Forked, so that the old frame cannot be had again.
            between_readings(monkeypatch, lambda: process.do(
                "other = os.fork() or signal.pause(); fill(at, 64 * PAGE, 1)"))
            snapshot = read(process.pid)
            process.do("os.kill(other, 9)")
        assert_bytes(snapshot, process.said.at, expected(64, 1))
        assert "changed" in bits_of(records_in(snapshot, process.said.at, 64 * PAGE_SIZE))[0]
        assert snapshot.nr_changed >= 64

    @pytest.mark.parametrize("when, zero", [(1, True), (2, False)])
    def test_pages_that_are_unmapped(self, monkeypatch, when, zero):
        with child("at = base_pages(64 * PAGE, 1); tell(at=at); obey()") as process:
            between_readings(monkeypatch, lambda: process.do("check(libc.munmap(at + 8 * PAGE, 8 * PAGE))"), when)
            snapshot = read(process.pid)
        at = process.said.at
        want = expected(64, 1)
        if zero:
            want[8:16] = 0
        assert_bytes(snapshot, at, want)
        gone = [(int(record["va"]) - at) // PAGE_SIZE for record in records_in(snapshot, at, 64 * PAGE_SIZE)
                if record["bits"] & snap.FOLIO_VANISHED]
        assert gone == list(range(8, 16))
        assert snapshot.nr_vanished >= 8 and not snapshot.nr_unreadable
        assert [note for note in snapshot.notes if "mappings were unmapped" in note]

    def test_a_file_that_is_cut(self, monkeypatch, tmp_path):
        with child(TestSharedMemoryAndFiles.FILE.format(path=str(tmp_path / "file")) + "obey()") as process:
            between_readings(monkeypatch, lambda: process.do("file.truncate(4 * PAGE)"), 1)
            snapshot = read(process.pid)
        want = expected(16, 9)
        want[4:] = 0
        assert_bytes(snapshot, process.said.at, want)
        assert snapshot.nr_vanished == 12 and not snapshot.nr_unreadable

    def test_pages_that_cannot_be_read(self, monkeypatch):
        with idle("tell(at=base_pages(64 * PAGE, 1))") as process:
            original, at = os.preadv, process.said.at

            def failing(fd, buffers, offset):
                # Pages 7 and 8 fail, as the kernel does it: what is before them is read.
                room = len(buffers[0])
                bad = [va for va in (at + 7 * PAGE_SIZE, at + 8 * PAGE_SIZE) if offset <= va < offset + room]
                if bad and bad[0] == offset:
                    raise OSError(5, "Input/output error")
                return original(fd, [buffers[0][:bad[0] - offset]] if bad else buffers, offset)
            monkeypatch.setattr(live.os, "preadv", failing)
            snapshot = read(process.pid)
        want = expected(64, 1)
        want[7:9] = 0
        assert_bytes(snapshot, at, want)
        bad = records_in(snapshot, at, 64 * PAGE_SIZE)
        bad = bad[bad["bits"] & snap.FOLIO_UNREADABLE != 0]
        assert [(int(va) - at) // PAGE_SIZE for va in bad["va"]] == [7, 8]
        assert (snapshot.nr_unreadable, snapshot.nr_vanished) == (2, 0)

    def test_new_mappings_are_noted(self, monkeypatch):
        with child(self.BIG) as process:
            snapshot = read(process.pid, progress=self.once(lambda: process.do("new = mapped(1 << 30, 0)")))
        assert [note for note in snapshot.notes if "new pages are not in the snapshot" in note]

    def test_one_that_writes_all_the_time(self):
        with child("""
at = base_pages(1 << 20, 1)
tell(at=at)
while True:
    for i in range(256):
        ctypes.c_uint64.from_address(at + i * PAGE).value += 1
""") as process:
            for _ in range(100):
                snapshot = read(process.pid)
                if snapshot.nr_changed:
                    break
        assert snapshot.nr_changed and not snapshot.nr_unreadable
        # Only the first eight bytes of any page were ever written.
        for i, page in bytes_in(snapshot, process.said.at, 1 << 20).items():
            assert (page[8:] == (1 + i) % 251).all()

    def test_one_that_maps_and_unmaps_all_the_time(self):
        with child("""
tell()
while True:
    at = aligned(2 * PMD); libc.madvise(at, PMD, HUGEPAGE); fill(at, PMD, 1)
    libc.madvise(at + 16 * PAGE, 64 * PAGE, DONTNEED)
    check(libc.munmap(at - 0, 2 * PMD))
    if os.fork() == 0: os._exit(0)
    os.wait()
""") as process:
            for _ in range(20):
                read(process.pid)


def test_a_folio_that_begins_before_the_range_is_in_it():
    # bytes_in() is what many tests below believe.
    folios = np.zeros(1, snap.FOLIO_DTYPE)
    folios["va"], folios["nr_mapped"] = PMD_SIZE, HPAGE_PMD_NR
    data = np.arange(HPAGE_PMD_NR).astype(np.uint8).reshape(-1, 1)
    snapshot = types.SimpleNamespace(folios=folios, data=data)
    found = bytes_in(snapshot, PMD_SIZE + 100 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert {number: int(page[0]) for number, page in found.items()} == {0: 100, 1: 101, 2: 102}
    assert not bytes_in(snapshot, 2 * PMD_SIZE, PMD_SIZE)


class TestItself:
    """Its own process, whose memory grows with what is read."""

    def test_with_known_bytes(self):
        # It may lie in the middle of a 2 MiB folio: NumPy advises huge pages, for parts of the heap as well.
        block = np.full((300, PAGE_SIZE), 201, np.uint8)
        block[:, :8] = np.arange(300).astype("<u8").view(np.uint8).reshape(300, 8)
        first = -(-block.ctypes.data // PAGE_SIZE)          # the first whole page of it
        snapshot = read(os.getpid())
        found = bytes_in(snapshot, first * PAGE_SIZE, 299 * PAGE_SIZE)
        raw = block.reshape(-1)[first * PAGE_SIZE - block.ctypes.data:]
        assert len(found) == 299
        for i, page in found.items():
            assert (page == raw[i * PAGE_SIZE:(i + 1) * PAGE_SIZE]).all()
        # Not its own copy of it.
        assert snapshot.data.nbytes < 2 * sum(vma.rss_kib for vma in snapshot.vmas) << 10

    def test_with_a_thread_that_works(self):
        stop = threading.Event()

        def work():
            while not stop.is_set():
                np.random.default_rng(1).bytes(1 << 20)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(3):
                read(os.getpid())
        finally:
            stop.set()
            thread.join()


# --- against a plain answer, on memory that is made up -------------------------------------------------------

HEAD, TAIL = 1 << 15, 1 << 16


def physical_memory(orders, nr_frames):
    """kpageflags of folios of these orders, each at the next place that is aligned to it."""
    flags, at = [0] * nr_frames, 0
    for order in orders:
        at = -(-at >> order << order) if at % (1 << order) else at
        at = at if at % (1 << order) == 0 else (at >> order) + 1 << order
        if at + (1 << order) > nr_frames:
            break
        if order:
            flags[at] = HEAD
            flags[at + 1:at + (1 << order)] = [TAIL] * ((1 << order) - 1)
        at += 1 << order
    return flags


class TestFindingFolios:
    """Heads and orders agree with walking from page to page, whatever is mapped of a folio."""

    @staticmethod
    def find(tmp_path_factory, flags, pfns, vas, vma_bounds=((0, 1 << 40),)):
        path = tmp_path_factory.mktemp("frames") / "kpageflags"
        path.write_bytes(np.array(flags, "<u8").tobytes())
        vmas = [snap.SnapshotVma(start, end, "rw", False, 0, "", 0, "00:00", ("rd",), "anon")
                for start, end in vma_bounds]
        va, pfn = np.array(vas, np.uint64), np.array(pfns, np.uint64)
        no = np.zeros(len(va), bool)
        which = np.searchsorted([start for start, _ in vma_bounds], va, side="right") - 1
        pages = live._Pages(va, pfn | np.uint64(1 << 63), which.astype(np.uint32), no, no, True)
        files = types.SimpleNamespace(kpageflags=os.open(path, os.O_RDONLY), kpagecount=None)
        try:
            frames = live._read_frames(files, vmas, pages, [])
            numbers = live._number_pages(vmas, pages, frames)
            return live._find_folios(files, vmas, pages, frames, numbers, []), frames
        finally:
            os.close(files.kpageflags)

    @given(orders=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 6]), min_size=1, max_size=30), seed=st.integers(0, 1 << 32))
    @settings(max_examples=150, deadline=None, database=None)
    def test_random_memory(self, tmp_path_factory, orders, seed):
        rng = np.random.default_rng(seed)
        flags = physical_memory(orders, 512)
        # Runs of frames, each frame at most once, mapped with and without gaps between them.
        pfns, vas, va, free = [], [], 16, set(range(1, 512))
        for _ in range(12):
            begin, length = int(rng.integers(1, 512)), int(rng.integers(1, 40))
            for pfn in range(begin, min(begin + length, 512)):
                if pfn in free:
                    free.discard(pfn)
                    pfns.append(pfn)
                    vas.append(va * PAGE_SIZE)
                    va += 1
            va += int(rng.integers(0, 2))
        middle = vas[len(vas) // 2]
        folios, _ = self.find(tmp_path_factory, flags, pfns, vas, ((0, middle), (middle, 1 << 40)) if middle else
                              ((0, 1 << 40),))
        seen = {}
        for record in folios:
            for i in range(int(record["nr_mapped"])):
                seen[int(record["va"]) + i * PAGE_SIZE] = (int(record["folio"]), int(record["first_index"]) + i,
                                                           int(record["order"]))
        assert sorted(seen) == vas
        folio_of = {}
        for va, pfn in zip(vas, pfns):
            head = pfn
            while flags[head] == TAIL:
                head -= 1
            end = head + 1
            while end < 512 and flags[end] == TAIL:
                end += 1
            folio, index, order = seen[va]
            assert (index, 1 << order) == (pfn - head, end - head), (orders, seed)
            assert folio_of.setdefault(head, folio) == folio
        assert len(set(folio_of.values())) == len(folio_of)
        # As few records as there can be.
        breaks = sum(1 for i in range(1, len(vas)) if not (
            vas[i] == vas[i - 1] + PAGE_SIZE and pfns[i] == pfns[i - 1] + 1 and flags[pfns[i]] == TAIL
            and vas[i] != middle))
        assert len(folios) == breaks + 1

    @pytest.mark.parametrize("order", [9, 10, 18])
    @pytest.mark.parametrize("index", [0, 1, 511])
    def test_large_folios_of_which_one_page_is_mapped(self, tmp_path_factory, order, index):
        flags = physical_memory([0, order, 0], 3 << order)
        folios, frames = self.find(tmp_path_factory, flags, [(1 << order) + index], [PAGE_SIZE])
        assert (int(folios["order"][0]), int(folios["first_index"][0]), int(folios["nr_mapped"][0])) == (order, index, 1)
        assert not frames.torn.any()

    def test_flags_that_cannot_be(self, tmp_path_factory):
        # A head where none can be, and tails without a head: taken as base pages, and marked.
        flags = [0] * 64
        flags[5], flags[6], flags[40], flags[41] = HEAD, TAIL, TAIL, TAIL
        folios, frames = self.find(tmp_path_factory, flags, [4, 5, 6, 40, 41], [i * PAGE_SIZE for i in range(5)])
        assert (folios["order"] == 0).all() and len(folios) == 5
        assert list(folios["bits"] & snap.FOLIO_CHANGED != 0) == [False, True, True, True, True]

    def test_a_frame_seen_twice(self, tmp_path_factory):
        # Freed and used again while pagemap was read: the second is another page.
        folios, frames = self.find(tmp_path_factory, physical_memory([2] * 8, 32), [4, 5, 6, 7, 5],
                                   [i * PAGE_SIZE for i in range(4)] + [9 * PAGE_SIZE])
        assert list(folios["order"]) == [2, 0] and list(folios["folio"]) == [0, 1]
        assert list(folios["page"]) == [0, 4] and list(folios["bits"] & snap.FOLIO_CHANGED != 0) == [False, True]

    def test_frames_beyond_the_end(self, tmp_path_factory):
        folios, _ = self.find(tmp_path_factory, [0] * 8, [3, 1 << 30], [0, PAGE_SIZE])
        assert list(folios["order"]) == [0, 0]

    def test_no_pages(self, tmp_path_factory):
        folios, _ = self.find(tmp_path_factory, [0] * 8, [], [])
        assert len(folios) == 0
