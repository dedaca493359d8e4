"""`offload migrate` and `offload snapshot` end to end: on a child with known memory, on itself, from a file, wrongly called."""

import json
import os
import pathlib
import re
import stat
import subprocess
import sys

import numpy as np
import pytest

from offload.cli import main
from offload.engines import Engine
from offload.migrators.mc_copy import McCopy
from offload.workload import snapshot as snap

CHILD = r'''
import ctypes, mmap, os, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
M = 2 << 20
address = lambda memory: ctypes.addressof(ctypes.c_char.from_buffer(memory))
thp = mmap.mmap(-1, 4 * M, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
thp.madvise(mmap.MADV_HUGEPAGE)
thp.write(bytes(range(256)) * (4 * M // 256))
start = -(-address(thp) // M) * M
libc.madvise(ctypes.c_void_p(start + 4096 * 100), ctypes.c_size_t(4096 * 50), 4)     # MADV_DONTNEED: a hole
locked = mmap.mmap(-1, 4 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
locked.write(b"lock" * 4096)
libc.mlock(ctypes.c_void_p(address(locked)), ctypes.c_size_t(4 * 4096))
file = tempfile.NamedTemporaryFile(dir=sys.argv[1])
file.truncate(64 * 4096)
shared = mmap.mmap(file.fileno(), 64 * 4096)
shared.write(b"file" * (64 * 1024))
private = mmap.mmap(file.fileno(), 64 * 4096, flags=mmap.MAP_PRIVATE)
private[0:8192] = b"c" * 8192
memfd = os.memfd_create("m")
os.truncate(memfd, 64 * 4096)
shmem = mmap.mmap(memfd, 64 * 4096)
shmem.write(b"mem!" * (64 * 1024))
if "fork" in sys.argv:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
print("ready", flush=True)
sys.stdin.read()
'''


def frames_can_be_read():
    try:
        with open("/proc/kpageflags", "rb") as file:
            return len(file.read(8)) == 8
    except OSError:
        return False


needs_frames = pytest.mark.skipif(not frames_can_be_read(), reason="/proc/kpageflags is unreadable")


@pytest.fixture
def child(tmp_path):
    """Start the child, with words for its command line; its Popen."""
    running = []

    def start(*words):
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), *words], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "ready\n"
        return process
    yield start
    for process in running:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@pytest.fixture
def run(capsys):
    """Run a command line: (exit status, standard output, lines of standard error without the compiler's)."""
    def call(*args):
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if not line.startswith("offload: compiling ")]
    return call


def save_small(path, layout_only=False):
    """The path of a snapshot of one page."""
    folios = np.zeros(1, snap.FOLIO_DTYPE)
    folios[0] = (1 << 30, 0, 0, 0, 0, 1, 1, snap.FOLIO_ANON, 0)
    vma = snap.SnapshotVma(start=1 << 30, end=(1 << 30) + 4096, prot="rw", shared=False, offset=0, path="", inode=0,
                           device="00:00", flags=(), kind="anon")
    snap.save(snap.Snapshot(pid=1, comm="c", taken="t", kernel="k", vmas=(vma,), folios=folios,
                            data=None if layout_only else np.ones((1, 4096), np.uint8), nr_pages=1, vm_pin_kib=0), path)
    return path


def adds_up(result):
    parts = [result, *result["kinds"].values()]
    return all(part["pages_seen"] == part["pages_moved"] + part["pages_failed"] + part["pages_skipped"] for part in parts) and \
        all(result[name] == sum(kind[name] for kind in result["kinds"].values())
            for name in ("pages_seen", "pages_moved", "pages_failed", "pages_skipped"))


class TestLive:
    """A live process is rebuilt, moved and verified."""

    @pytest.mark.parametrize("engine", ["vanilla", "batch", "batch+stream", "mt:2"])
    def test_engines(self, child, run, engine):
        status, out, err = run("migrate", "--pid", child().pid, "--engine", engine, "--json", "-", "--validate", "--move-all")
        result = json.loads(out)
        assert (status, err) == (0, []) and result["verified"] and adds_up(result)
        assert set(result) >= {"pages_seen", "pages_moved", "pages_failed", "pages_skipped", "verified", "gbps", "phases_ns",
                               "blocked_ns", "kinds", "manifest"}
        assert result["manifest"]["engine"] == engine and result["gbps"] > 0
        assert result["manifest"]["host"].keys() >= {"package", "git_commit", "numba"} and result["manifest"]["notes"] == []
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["manifest"]["taken"])
        assert result["kinds"]["shmem"]["pages_moved"] >= 64 and result["pages_failed"] == 0
        assert set(result["phases_ns"]) == {"unmap", "flush", "copy", "move"}
        assert 0 < result["blocked_ns"]["p50"] <= result["blocked_ns"]["max"]

    @pytest.mark.parametrize("protocol", ["v4", "flags", "v5", "v6"])
    def test_protocols(self, child, run, protocol):
        status, out, err = run("migrate", "--pid", child().pid, "--engine", "batch", "--protocol", protocol, "--json", "-",
                               "--validate", "--move-all")
        result = json.loads(out)
        assert (status, err, result["manifest"]["protocol"]) == (0, [], protocol) and result["verified"]

    @needs_frames
    def test_what_is_seen_of_it(self, child, run):
        status, out, _ = run("migrate", "--pid", child().pid, "--json", "-", "--validate")
        result = json.loads(out)
        assert status == 0 and result["manifest"]["folio_sizes_known"]
        assert result["stats"]["nr_split"] >= 1 if result["orders"].get("9") else True      # the THP with a hole
        assert any(reason.startswith("-EACCES") for reason in result["kinds"]["file"]["reasons"])     # the C library
        assert result["vm_lck_kib"] == 16

    @needs_frames
    def test_pages_shared_with_a_forked_child_stay(self, child, run):
        pid = child("fork").pid
        alone = json.loads(run("migrate", "--pid", pid, "--json", "-")[1])
        everything = json.loads(run("migrate", "--pid", pid, "--json", "-", "--move-all")[1])
        assert alone["kinds"]["anon"]["pages_moved"] < alone["kinds"]["anon"]["pages_skipped"]
        assert everything["kinds"]["anon"]["pages_moved"] > alone["kinds"]["anon"]["pages_skipped"] // 2
        assert alone["verified"] and everything["verified"]

    @pytest.mark.parametrize("word", ["self", "its own pid"])
    def test_on_itself(self, run, word):
        status, out, err = run("migrate", "--pid", word if word == "self" else os.getpid(), "--json", "-", "--layout-only")
        result = json.loads(out)
        assert (status, err) == (0, []) and adds_up(result) and result["manifest"]["pid"] == os.getpid()

    def test_itself_with_its_bytes(self):
        done = subprocess.run([sys.executable, "-c", "from offload.cli import entry; entry()", "migrate", "--pid", "self"],
                              capture_output=True, text=True)
        assert done.returncode == 0 and "verified  bytes and placement" in done.stdout, done.stderr

    def test_the_tables(self, child, run):
        status, out, _ = run("migrate", "--pid", child().pid)
        assert status == 0
        for word in ("anon", "shmem", "all", "reason", "4K", "unmap", "blocked", "GB/s", "VmPin", "verified", "mc_copy",
                     "batch limit 512"):
            assert word in out


class TestFile:
    """A snapshot is kept and moved later."""

    def test_there_and_back(self, child, run, tmp_path):
        path = tmp_path / "snap"
        process = child()
        status, out, err = run("snapshot", "--pid", process.pid, "-o", path)
        assert (status, err) == (0, []) and "pages" in out and "4K" in out
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        snapshot = snap.load(path)
        assert snapshot.pid == process.pid and snapshot.data.shape == (snapshot.nr_pages, 4096)
        status, out, _ = run("migrate", path, "--json", tmp_path / "result.json")
        result = json.loads((tmp_path / "result.json").read_text())
        assert status == 0 and result["verified"] and result["verified_what"] == "bytes and placement" and adds_up(result)

    def test_layout_only(self, child, run, tmp_path):
        path = tmp_path / "snap"
        assert run("snapshot", "--pid", child().pid, "-o", path, "--layout-only")[0] == 0
        assert snap.load(path).layout_only
        status, out, _ = run("migrate", path)
        assert status == 0 and "layout only" in out and "verified  placement of every page" in out and "GB/s" not in out

    @pytest.mark.parametrize("args", [["SMALL", "--layout-only"], ["LAYOUT"]], ids=" ".join)
    def test_nodes_without_bytes(self, run, tmp_path, args):
        """nowhere,nowhere is metadata alone, for what has no bytes or leaves them out."""
        names = {"SMALL": save_small(tmp_path / "small"), "LAYOUT": save_small(tmp_path / "layout", layout_only=True)}
        status, out, err = run("migrate", "--nodes", "nowhere,nowhere", "--json", "-", *(names.get(arg, arg) for arg in args))
        result = json.loads(out)
        assert (status, err) == (0, []) and result["verified"] and result["verified_what"] == "placement"
        assert result["manifest"]["nodes"] == ["nowhere", "nowhere"] and result["pages_moved"] and result["gbps"] is None

    def test_a_copy_that_did_not_happen(self, child, run, tmp_path, monkeypatch):
        class Liar(McCopy):
            def offload_copy(self, batch, done):
                done[:] = 1
                return 0
        path = tmp_path / "snap"
        run("snapshot", "--pid", child().pid, "-o", path)
        monkeypatch.setattr(Engine, "make_migrator", lambda self: Liar())
        status, out, _ = run("migrate", path)
        assert status == 1 and "WRONG" in out and "0x" in out and "verified  " not in out


class TestBadInput:
    """One line, status 2, nothing written."""

    @pytest.fixture
    def small(self, tmp_path):
        return save_small(tmp_path / "small")

    @pytest.mark.parametrize("args, word", [
        (["migrate"], "either"),
        (["migrate", "--pid", "1", "SMALL"], "not both"),
        (["migrate", "--pid", "zero"], "process id"),
        (["migrate", "--pid", "-3"], "process id"),
        (["migrate", "--pid", "2147483646"], "no process"),
        (["migrate", "--pid", "99999999999"], "process id"),
        (["migrate", "nowhere.snap"], "no file"),
        (["migrate", "/dev/null"], "regular file"),
        (["migrate", __file__], "not a snapshot"),
        (["migrate", "TRUNCATED"], "TRUNCATED"),
        (["migrate", "SMALL", "--engine", "warp"], "not known"),
        (["migrate", "SMALL", "--engine", "cuda-kernel"], "not available"),
        (["migrate", "SMALL", "--engine", "mt:0"], "threads"),
        (["migrate", "SMALL", "--batch-pages", "0"], "--batch-pages"),
        (["migrate", "SMALL", "--batch-pages", "many"], "--batch-pages"),
        (["migrate", "SMALL", "--json", "/nowhere/x.json"], "--json"),
        (["migrate", "SMALL", "--frobnicate"], "--frobnicate"),
        (["migrate", "SMALL", "--nodes", "nowhere,nowhere"], "add --layout-only"),
        (["migrate", "--pid", "self", "--nodes", "nowhere,nowhere"], "add --layout-only"),
        (["migrate", "SMALL", "--nodes", "nowhere,host"], "cannot be mixed"),
        (["snapshot", "-o", "x"], "--pid"),
        (["snapshot", "--pid", "self"], "--output"),
        (["snapshot", "--pid", "self", "-o", "/nowhere/x"], "/nowhere/x"),
        (["snapshot", "--pid", "self", "-o", "/"], "cannot be written"),
        (["snapshot", "--pid", "2147483646", "-o", "OUT"], "no process"),
    ], ids=lambda value: " ".join(value).replace("/", "_") if isinstance(value, list) else None)
    def test_is_one_line(self, run, small, tmp_path, args, word):
        (tmp_path / "truncated").write_bytes(small.read_bytes()[:-100])
        before = sorted(tmp_path.iterdir())
        names = {"SMALL": small, "TRUNCATED": tmp_path / "truncated", "OUT": tmp_path / "out"}
        status, out, err = run(*(names.get(arg, arg) for arg in args))
        assert (status, out, len(err)) == (2, "", 1), err
        assert err[0].startswith("offload: ") and word.lower() in err[0].lower()
        assert sorted(tmp_path.iterdir()) == before

    def test_a_kernel_thread(self, run):
        status = pathlib.Path("/proc/2/status")
        if not status.exists() or "Kthread:\t1" not in status.read_text():
            pytest.skip("pid 2 is no kernel thread here")
        status, _, err = run("migrate", "--pid", 2)
        assert status == 2 and len(err) == 1

    def test_no_room(self, run, small, monkeypatch):
        monkeypatch.setattr(snap, "available_bytes", lambda: 5000)
        status, _, err = run("migrate", small)
        assert status == 2 and len(err) == 1 and "--layout-only" in err[0]

    def test_ctrl_c(self, run, tmp_path, monkeypatch):
        from offload.workload import job

        def interrupted(*args, **given):
            raise KeyboardInterrupt
        monkeypatch.setattr(job, "read_process", interrupted)
        assert run("snapshot", "--pid", "self", "-o", tmp_path / "out")[0] == 130
        assert run("migrate", "--pid", "self", "--json", tmp_path / "out")[0] == 130
        assert not list(tmp_path.iterdir())

    def test_ctrl_c_while_it_moves(self, run, small, tmp_path, monkeypatch):
        def offload_copy(self, batch, done):
            if self.armed:
                raise KeyboardInterrupt
            return McCopy.offload_copy(self, batch, done)
        calls = []

        def make(self):
            calls.append(1)
            return type("Interrupted", (McCopy,), {"offload_copy": offload_copy, "armed": len(calls) > 2})()
        monkeypatch.setattr(Engine, "make_migrator", make)
        assert run("migrate", small, "--json", tmp_path / "out")[0] == 130
        assert not (tmp_path / "out").exists()
