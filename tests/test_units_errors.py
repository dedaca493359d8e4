"""The words: sizes, modes, reasons, errnos, and the exceptions."""

import pytest

from offload import errors, units
from offload.errors import InvalidInput, OffloadError
from offload.units import (
    MigrateMode, MigrateReason, errno_name, format_size, parse_mode, parse_reason, parse_size,
)


class TestSizes:
    """A size is a positive multiple of a page, written with units that are powers of two."""

    @pytest.mark.parametrize("text, nbytes", [
        ("4K", 4096), ("4k", 4096), ("4KiB", 4096), ("4KB", 4096), ("4096", 4096), (4096, 4096), ("64M", 64 << 20),
        ("1.5GiB", 3 << 29), (" 1G ", 1 << 30), ("2T", 2 << 40), ("8192B", 8192),
    ])
    def test_parse(self, text, nbytes):
        assert parse_size(text) == nbytes

    @pytest.mark.parametrize("text", ["", "0", "-4K", "4P", "M", "4 K M", "1e6", "0x1000", "4097", "1.5K", None, True,
                                      "9" * 400, "nan", "inf", "１K"])
    def test_refused(self, text):
        with pytest.raises(InvalidInput) as refused:
            parse_size(text, what="span")
        assert "span" in str(refused.value) and repr(text) in str(refused.value)

    def test_other_multiples(self):
        assert parse_size("7", multiple_of=1) == 7
        with pytest.raises(InvalidInput, match="multiple of 2M"):
            parse_size("1M", multiple_of=2 << 20)

    @pytest.mark.parametrize("nbytes, text", [
        (4096, "4K"), (65536, "64K"), (2 << 20, "2M"), (1 << 30, "1G"), (3 << 29, "1.5G"), (5, "5B"), (0, "0B"),
        (1 << 40, "1T"), (1536, "1.5K"),
    ])
    def test_format(self, nbytes, text):
        assert format_size(nbytes) == text

    @pytest.mark.parametrize("nbytes, text", [(4096, "4 KiB"), (3 << 29, "1.5 GiB"), (5, "5 B")])
    def test_format_beside_rates(self, nbytes, text):
        assert units.format_bytes(nbytes) == text

    @pytest.mark.parametrize("order", range(11))
    def test_folio_sizes_survive_both_ways(self, order):
        assert parse_size(format_size(4096 << order)) == 4096 << order


class TestModes:
    """A mode is named as in the kernel, in short, or by its number; they are ordered by patience."""

    @pytest.mark.parametrize("text", ["MIGRATE_SYNC_LIGHT", "sync_light", "sync-light", "Sync_Light", 1,
                                      MigrateMode.MIGRATE_SYNC_LIGHT])
    def test_parse(self, text):
        assert parse_mode(text) is MigrateMode.MIGRATE_SYNC_LIGHT

    def test_order(self):
        assert MigrateMode.MIGRATE_ASYNC < MigrateMode.MIGRATE_SYNC_LIGHT < MigrateMode.MIGRATE_SYNC

    @pytest.mark.parametrize("text", ["", "SYNCHRONOUS", 3, -1, None, True, "MIGRATE_"])
    def test_refused(self, text):
        with pytest.raises(InvalidInput, match="MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT, MIGRATE_SYNC") as refused:
            parse_mode(text)
        assert repr(text) in str(refused.value)


class TestReasons:
    """A reason is given by its trace name, its constant's name or its number."""

    @pytest.mark.parametrize("number, name", list(enumerate((
        "compaction", "memory_failure", "memory_hotplug", "syscall_or_cpuset", "mempolicy_mbind", "numa_misplaced",
        "contig_range", "longterm_pin", "demotion", "damon"))))
    def test_names_and_numbers(self, number, name):
        reason = parse_reason(name)
        assert reason == number and reason.trace_name == name
        assert parse_reason(number) is reason and parse_reason(reason.name) is reason
        assert parse_reason(reason.name.lower()) is reason and getattr(units, reason.name) == number

    @pytest.mark.parametrize("text", ["", "swap", 10, -1, None, False])
    def test_refused(self, text):
        with pytest.raises(InvalidInput, match="syscall_or_cpuset") as refused:
            parse_reason(text)
        assert repr(text) in str(refused.value)

    def test_all_there(self):
        assert len(MigrateReason) == 10


class TestErrnoNames:
    """An errno has one name, whatever its sign."""

    @pytest.mark.parametrize("value, name", [(11, "EAGAIN"), (-11, "EAGAIN"), (12, "ENOMEM"), (-133, "EHWPOISON"),
                                             (16, "EBUSY"), (95, "EOPNOTSUPP"), (-777, "errno 777")])
    def test_name(self, value, name):
        assert errno_name(value) == name


class TestExceptions:
    """Each exception is an OffloadError, the standard type it resembles, and carries its errno and whole message."""

    TREE = {
        "InvalidInput": (ValueError, 22), "BadAddress": (ValueError, 14), "NotSupported": (NotImplementedError, 95),
        "Busy": (RuntimeError, 16), "OutOfMemory": (MemoryError, 12), "NoSuchProcess": (ProcessLookupError, 3),
        "NotPermitted": (PermissionError, 1), "ForeignFile": (ValueError, 22), "EngineUnavailable": (RuntimeError, 19),
        "DeviceLost": (RuntimeError, 5), "WouldHang": (TimeoutError, 110), "BrokenInvariant": (AssertionError, 5),
    }

    def test_complete(self):
        assert set(self.TREE) | {"OffloadError"} == set(errors.__all__)

    @pytest.mark.parametrize("name", TREE)
    def test_member(self, name):
        base, errno = self.TREE[name]
        error = getattr(errors, name)("pages 'x' are wrong; write a number")
        assert isinstance(error, OffloadError) and isinstance(error, base)
        assert error.errno == errno
        assert str(error) == error.message == "pages 'x' are wrong; write a number"
        assert errors.__doc__.count(f"{name} ({base.__name__})") == 1
