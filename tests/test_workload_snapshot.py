"""The snapshot and its file: what goes in comes out, and nothing else is taken for one."""

import dataclasses
import io
import json
import os
import random
import stat
import zipfile

import numpy as np
import pytest

from offload.errors import (BrokenInvariant, ForeignFile, InvalidInput, NotPermitted, OffloadError, OutOfMemory)
from offload.units import PAGE_SIZE
from offload.workload import snapshot as snap
from offload.workload.snapshot import FOLIO_DTYPE, Snapshot, SnapshotVma, load, save, validate_snapshot

SEED = 20260801


def a_vma(start, nr_pages, **fields):
    given = dict(start=start, end=start + nr_pages * PAGE_SIZE, prot="rw", shared=False, offset=0, path="", inode=0,
                 device="00:00", flags=("rd", "wr"), kind="anon")
    return SnapshotVma(**given | fields)


def a_record(va, page, **fields):
    record = np.zeros(1, FOLIO_DTYPE)
    for name, value in (dict(va=va, page=page, nr_mapped=1, mapcount=1, bits=snap.FOLIO_ANON) | fields).items():
        record[name] = value
    return record


def a_snapshot(**fields):
    """Three VMAs: base pages, a large folio mapped with a hole, and one that is not read."""
    vmas = (a_vma(0x10000, 4), a_vma(0x20000, 16, path="[anon:jemalloc \\x1b[31m ä]", flags=()),
            a_vma(0x40000, 2, kind="vdso", path="[vdso]", nr_present=2))
    folios = np.concatenate([
        a_record(0x10000, 0), a_record(0x11000, 1, folio=1, bits=snap.FOLIO_DIRTY | snap.FOLIO_MLOCKED),
        a_record(0x20000, 2, vma=1, folio=2, order=4, nr_mapped=5),
        a_record(0x26000, 7, vma=1, folio=2, order=4, first_index=6, nr_mapped=10)])
    data = np.random.default_rng(SEED).integers(0, 256, (17, PAGE_SIZE), np.uint8)
    given = dict(pid=42, comm="redis", taken="2026-08-01T12:00:00+00:00", kernel="7.3.4", vmas=vmas, folios=folios,
                 data=data, nr_pages=17, vm_pin_kib=8, vm_lck_kib=4, folio_sizes_known=True, read_ns=5,
                 nr_changed=1, nr_vanished=2, skipped={"vdso": 2}, notes=("nothing to see",))
    return Snapshot(**given | fields)


def assert_same(left, right):
    """Equal in every field, arrays bit for bit."""
    for field in dataclasses.fields(Snapshot):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            assert all((one[name] == other[name]).all() for name in one.dtype.names or [...]), field.name
        else:
            assert one == other, field.name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.snapshot"


@pytest.fixture
def saved(path):
    save(a_snapshot(), path)
    return path


def unchecked_save(snapshot, path):
    """As save() would write it, had it not looked."""
    with open(path, "wb") as file:
        snap._write(snapshot, file)


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_header(path, **changes):
    members = members_of(path)
    header = json.loads(members["header.json"]) | changes
    members["header.json"] = json.dumps(header)
    write_members(path, members)


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def assert_foreign(path, *words):
    with pytest.raises(ForeignFile) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and str(path) in message and "; " in message
    for word in words:
        assert word in message, message


class TestARoundTrip:
    """What was saved is loaded again, bit for bit."""

    def test_everything(self, saved):
        assert_same(load(saved), a_snapshot())

    def test_layout_only(self, path):
        before = a_snapshot(data=None)
        save(before, path)
        assert_same(load(path), before)
        assert load(path).layout_only

    def test_a_process_without_pages(self, path):
        before = a_snapshot(folios=np.zeros(0, FOLIO_DTYPE), data=np.empty((0, PAGE_SIZE), np.uint8), nr_pages=0)
        save(before, path)
        assert_same(load(path), before)

    def test_arrays_come_back_read_only(self, saved):
        loaded = load(saved)
        for array in (loaded.folios, loaded.data, loaded.pages_of(0)):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0

    def test_numpy_opens_it_too(self, saved):
        with np.load(saved) as archive:
            assert (archive["data"] == a_snapshot().data).all()
            assert archive["folios"].dtype == FOLIO_DTYPE

    def test_the_file_can_be_read_twice_and_written_over(self, saved):
        save(a_snapshot(pid=43), saved)
        assert load(saved).pid == load(saved).pid == 43

    def test_text_paths_and_relative_ones(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save(a_snapshot(), "here")
        assert_same(load("here"), a_snapshot())


class TestTheSnapshot:
    """Its helpers count folios, not records."""

    def test_orders(self):
        assert a_snapshot().orders() == {0: 2, 4: 1}
        assert a_snapshot().nr_folios == 3

    def test_zero_pages_are_not_in_orders(self):
        snapshot = a_snapshot()
        folios = snapshot.folios.copy()
        folios["bits"][0] = snap.FOLIO_ZERO_PAGE
        assert dataclasses.replace(snapshot, folios=folios).orders() == {0: 1, 4: 1}

    def test_pages_of(self):
        snapshot = a_snapshot()
        assert (snapshot.pages_of(3) == snapshot.data[7:17]).all()

    def test_pages_of_a_layout_says_what_to_do(self):
        with pytest.raises(InvalidInput, match="--layout-only"):
            a_snapshot(data=None).pages_of(0)

    def test_bit_names(self):
        assert snap.FOLIO_BIT_NAMES[int(snap.FOLIO_ZERO_PAGE)] == "zero_page"
        assert len(snap.FOLIO_BIT_NAMES) == sum(name.startswith("FOLIO_") for name in snap.__all__) - 2

    def test_a_vma_says_what_it_is(self):
        assert a_vma(0x1000, 1, flags=("lo",)).locked and not a_vma(0x1000, 1).locked
        assert a_vma(0x1000, 1, kind="shmem").is_tmpfs and not a_vma(0x1000, 1, kind="file").is_tmpfs


class TestSaving:
    """A file is wholly there, for its owner only, or not there at all."""

    def rest(self, path):
        return sorted(name for name in os.listdir(path.parent) if name != path.name)

    @pytest.mark.parametrize("umask", [0, 0o777])
    def test_mode_0600_whatever_the_umask(self, path, umask):
        old = os.umask(umask)
        try:
            save(a_snapshot(), path)
        finally:
            os.umask(old)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert not self.rest(path)

    def test_mode_0600_from_the_start(self, path, monkeypatch):
        modes = []

        def looking(snapshot, file):
            modes.extend(stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in os.listdir(path.parent))
        monkeypatch.setattr(snap, "_write", looking)
        save(a_snapshot(), path)
        assert modes == [0o600]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
    @pytest.mark.parametrize("there_before", [False, True])
    def test_a_failure_leaves_what_was_there(self, path, monkeypatch, failure, there_before):
        if there_before:
            path.write_text("old")

        def failing(fd):
            raise failure
        monkeypatch.setattr(snap.os, "fsync", failing)
        with pytest.raises(OffloadError if isinstance(failure, OSError) else type(failure)) as caught:
            save(a_snapshot(), path)
        if isinstance(failure, OSError):
            assert caught.value.errno == 28 and "No space left" in str(caught.value)
        assert not self.rest(path)
        assert path.exists() == there_before and (not there_before or path.read_text() == "old")

    def test_no_directory(self, tmp_path):
        with pytest.raises(InvalidInput, match="there is no folder"):
            save(a_snapshot(), tmp_path / "no" / "a")

    def test_a_directory_that_takes_no_files(self):
        with pytest.raises(OffloadError, match="cannot be written"):
            save(a_snapshot(), "/proc/self/a.snapshot")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_directory_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(NotPermitted, match="cannot be written"):
            save(a_snapshot(), tmp_path / "a")
        assert not os.listdir(tmp_path)

    def test_a_permission_error_is_not_permitted(self, path, monkeypatch):
        def denied(*args):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(snap.os, "open", denied)
        with pytest.raises(NotPermitted, match="Permission denied"):
            save(a_snapshot(), path)

    def test_what_is_no_file_is_not_replaced(self, tmp_path):
        target = tmp_path / "target"
        target.write_text("precious")
        os.symlink(target, tmp_path / "link")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "directory").mkdir()
        before = sorted(os.listdir(tmp_path))
        for name in ("link", "fifo", "directory"):
            with pytest.raises(InvalidInput, match="not a regular file"):
                save(a_snapshot(), tmp_path / name)
        assert target.read_text() == "precious" and sorted(os.listdir(tmp_path)) == before

    def test_nonsense_is_not_written(self, path):
        with pytest.raises(BrokenInvariant, match="leaves its VMA"):
            save(a_snapshot(folios=a_record(0x13000, 0, nr_mapped=2, order=1)), path)
        assert not path.exists()


def with_record(**changes):
    """A snapshot whose third record, the first piece of the large folio, is changed."""
    folios = a_snapshot().folios.copy()
    for name, value in changes.items():
        folios[name][2] = value
    return a_snapshot(folios=folios)


INCONSISTENT = {
    "VMAs overlap": (a_snapshot(vmas=(a_vma(0x10000, 40),) + a_snapshot().vmas[1:]), "overlaps"),
    "VMA is empty": (a_snapshot(vmas=(a_vma(0x10000, 4), a_vma(0x20000, 0))), "is empty"),
    "VMA is not whole pages": (a_snapshot(vmas=(a_vma(0x10001, 4),)), "whole pages"),
    "VMA of unknown kind": (a_snapshot(vmas=(a_vma(0x10000, 4, kind="alien"),)), "'alien'"),
    "more data than pages": (a_snapshot(nr_pages=16), "shape"),
    "too many pages": (a_snapshot(data=None, nr_pages=1 << 60), "claims"),
    "VMA index": (with_record(vma=3), "not there"),
    "record in a VMA that is not read": (with_record(vma=2, va=0x40000, nr_mapped=1), "is not before its successor"),
    "only record in a VMA that is not read": (a_snapshot(folios=a_record(0x40000, 0, vma=2)), "not read"),
    "order": (with_record(order=19), "order above 18"),
    "order 255": (with_record(order=255), "order above 18"),
    "no pages": (with_record(nr_mapped=0), "no page"),
    "not a page's address": (with_record(va=0x20010), "page's address"),
    "outside of its VMA": (with_record(va=0x1f000), "leaves its VMA"),
    "wrapping address": (with_record(va=0xfffffffffffff000), "leaves its VMA"),
    "too long for its VMA": (with_record(va=0x20000, nr_mapped=17, order=5), "leaves its VMA"),
    "wrapping length": (with_record(nr_mapped=0xffffffff, order=18), "leaves its VMA"),
    "overlap": (with_record(nr_mapped=7), "overlaps its successor"),
    "order of addresses": (a_snapshot(folios=a_snapshot().folios[::-1].copy()), "not before its successor"),
    "more than the folio has": (with_record(first_index=12), "than its folio has"),
    "index beyond the folio": (with_record(first_index=0xffffffff), "than its folio has"),
    "bytes beyond the data": (with_record(page=13), "beyond the 17 pages"),
    "wrapping bytes": (with_record(page=(1 << 64) - 1), "beyond the 17 pages"),
    "folio number": (with_record(folio=4), "folio number"),
    "two orders": (with_record(order=5), "disagree about its order"),
    "two contents": (with_record(first_index=6), "disagree about its bytes"),
}


class TestAContradiction:
    """Parts that do not fit together are found, whatever the numbers are."""

    @pytest.mark.parametrize("snapshot, words", INCONSISTENT.values(), ids=INCONSISTENT)
    def test_is_named(self, path, snapshot, words):
        with pytest.raises(BrokenInvariant, match="pid 42") as caught:
            validate_snapshot(snapshot)
        assert words in str(caught.value)
        unchecked_save(snapshot, path)
        assert_foreign(path, "contradicts itself", words)

    def test_a_good_one_has_none(self):
        validate_snapshot(a_snapshot())


class TestAForeignFile:
    """Anything but a whole snapshot is refused in one line."""

    @pytest.mark.parametrize("content", [b"", b"P", b"PK\x03\x04", b"\x7fELF" + bytes(100), b"PK\x03\x04" + bytes(5000),
                                         b"{}", b"PK\x05\x06" + bytes(18)])
    def test_of_another_format(self, path, content):
        path.write_bytes(content)
        assert_foreign(path)

    def test_truncated_anywhere(self, saved):
        whole = saved.read_bytes()
        for length in sorted({*range(0, len(whole), 997), *range(len(whole) - 60, len(whole)), 1, 30, 100}):
            saved.write_bytes(whole[:length])
            assert_foreign(saved)

    def test_a_flipped_bit_is_seen_or_does_not_matter(self, saved):
        # The zip's own dates, and attributes that are not read, are under no checksum; all else is.
        whole = saved.read_bytes()
        rng = random.Random(SEED)
        ends = [*range(300), *range(len(whole) - 400, len(whole))]
        seen = 0
        for at in ends + rng.sample(range(len(whole)), 600):
            bit = 1 << rng.randrange(8)
            saved.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            try:
                loaded = load(saved)
            except ForeignFile:
                seen += 1
            else:
                assert_same(loaded, a_snapshot())
        assert seen > 1000, f"seed {SEED}"

    def test_a_flipped_byte_of_the_data_is_always_seen(self, saved):
        whole = bytearray(saved.read_bytes())
        at = whole.find(a_snapshot().data[3].tobytes())
        whole[at + 17] ^= 0x80
        saved.write_bytes(whole)
        assert_foreign(saved, "damaged", "CRC")

    @pytest.mark.parametrize("missing", ["header.json", "folios.npy"])
    def test_without_a_member(self, saved, missing):
        members = members_of(saved)
        del members[missing]
        write_members(saved, members)
        assert_foreign(saved, "members")

    def test_without_its_bytes(self, saved):
        members = members_of(saved)
        del members["data.npy"]
        write_members(saved, members)
        assert_foreign(saved, "arrays")

    def test_with_a_member_too_many(self, saved):
        write_members(saved, members_of(saved) | {"../evil\x1b": b""})
        assert_foreign(saved, "members")

    def test_an_npz_of_somebody_else(self, path):
        np.savez(path, a=np.arange(3))
        assert_foreign(f"{path}.npz", "members")

    def test_compressed(self, saved):
        write_members(saved, members_of(saved), zipfile.ZIP_DEFLATED)
        assert_foreign(saved, "compressed")

    @pytest.mark.parametrize("changes, word", [
        ({"format": "gif"}, "offload-snapshot"), ({"version": 2}, "version 2"), ({"version": None}, "version None"),
        ({"version": True, "format": 1}, "offload-snapshot"),
        ({"pid": "42"}, "pid"), ({"pid": -1}, "pid"), ({"nr_pages": 1.5}, "nr_pages"), ({"nr_pages": True}, "nr_pages"),
        ({"comm": None}, "comm"), ({"comm": "\x1b[2J"}, "comm"), ({"comm": "\ud800"}, "comm"), ({"vmas": 3}, ""),
        ({"vmas": [3]}, ""), ({"vmas": [{}]}, "flags"), ({"notes": [1]}, "notes"), ({"notes": ["a\nb"]}, "notes"),
        ({"skipped": {"vdso": "many"}}, "skipped"), ({"skipped": {"\x1b": 1}}, "skipped"), ({"skipped": []}, ""),
        ({"folio_sizes_known": 1}, "folio_sizes_known"),
    ])
    def test_a_header_that_says_something_else(self, saved, changes, word):
        if changes == {"skipped": []}:
            edit_header(saved, **changes)
            assert load(saved).skipped == {}        # no harm in an empty list
            return
        edit_header(saved, **changes)
        assert_foreign(saved, word)

    @pytest.mark.parametrize("header", ["", "[]", "null", "{", "[" * 100_000, "\xff\xfe", '{"format": "offload-snapshot"}',
                                        '{"format": "offload-snapshot", "version": 1}', '{"version": NaN}'])
    def test_a_header_that_is_none(self, saved, header):
        write_members(saved, members_of(saved) | {"header.json": header.encode("latin-1")})
        assert_foreign(saved)

    @pytest.mark.parametrize("member, content", [
        ("folios.npy", b"rubbish"), ("folios.npy", npy(np.arange(4))), ("folios.npy", npy(np.zeros((2, 2), FOLIO_DTYPE))),
        ("folios.npy", npy(a_snapshot().folios)[:-1]), ("folios.npy", npy(a_snapshot().folios) + b"x"),
        ("folios.npy", npy(a_snapshot().folios).replace(b"'<u4'", b"'<i4'")),
        ("data.npy", npy(a_snapshot().data.T)), ("data.npy", npy(a_snapshot().data.view(np.int8))),
        ("data.npy", npy(a_snapshot().data[:, :100])), ("data.npy", npy(np.zeros(5, object))),
        ("data.npy", b"\x93NUMPY\x01\x00\xff\xff{"), ("data.npy", b"\x93NUMPY\x01\x00v\x00" + b"(" * 118),
        ("data.npy", npy(a_snapshot().data).replace(b"(17, 4096)", b"(-1, 4096)")),
        ("data.npy", npy(a_snapshot().data).replace(b"(17, 4096), ", b"(17L, 4096),")),
    ])
    def test_arrays_of_another_shape(self, saved, member, content):
        write_members(saved, members_of(saved) | {member: content})
        assert_foreign(saved, member)

    def test_a_lie_about_its_length_takes_no_memory(self, saved):
        whole = saved.read_bytes()
        for lie in (whole.replace(b"(17, 4096)", b"(99999999999, 4096)").replace(b"        \n", b"\n", 1),
                    whole.replace((17 * PAGE_SIZE + 128).to_bytes(4, "little"), b"\xfe\xff\xff\xff")):
            assert lie != whole
            saved.write_bytes(lie)
            assert_foreign(saved)

    def test_not_a_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")                # would block
        assert_foreign(tmp_path / "fifo", "regular")
        assert_foreign(tmp_path, "regular")
        assert_foreign("/dev/zero", "regular")

    def test_no_file(self, path):
        with pytest.raises(InvalidInput, match="no file"):
            load(path)

    def test_a_file_that_may_not_be_read(self, saved, monkeypatch):
        def denied(*args):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr("builtins.open", denied)
        with pytest.raises(NotPermitted, match="may not be read"):
            load(saved)

    def test_more_than_there_is_room_for(self, saved, monkeypatch):
        monkeypatch.setattr(snap, "available_bytes", lambda: PAGE_SIZE)
        with pytest.raises(OutOfMemory, match="--layout-only"):
            load(saved)


class TestRoom:
    """Memory available is what the host says, or less where a cgroup says so."""

    def test_the_host(self):
        available = snap.available_bytes()
        assert available is None or 0 <= available < 1 << 50

    def test_a_cgroup(self, tmp_path):
        for name, text in (("memory.max", "1000\n"), ("memory.current", "900\n"),
                           ("memory.stat", "anon 5\ninactive_file 300\n")):
            (tmp_path / name).write_text(text)
        assert snap._cgroup_room(tmp_path) == [400]
        (tmp_path / "memory.max").write_text("max\n")
        assert snap._cgroup_room(tmp_path) == []
        assert snap._cgroup_room(tmp_path / "no") == []
