"""The hatch: registration and reason masks; migrators, what they mark, and that none of them changes the outcome."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import World, on_duty
from offload.copy_offload import ALL_REASONS, FolioBatch, format_reason_mask, parse_reason_mask
from offload.errors import Busy, InvalidInput
from offload.jit import JIT_DISABLED
from offload.migrate.pages import Event
from offload.migrators.cpu_mt import CpuMt
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.frames import POISON
from offload.units import EIO, EOPNOTSUPP, PAGE_SIZE, MigrateReason
from test_migrate_pages import FOLIO, MODES, file_folios, hinder

NAMES = [reason.trace_name for reason in MigrateReason]


class TestReasonMask:
    """A mask is read as the kernel's module parameter reads it, and printed as names."""

    @pytest.mark.parametrize("text, mask", [
        ("", 0), ("none", 0), ("all", 0x3ff), ("all,none", 0), ("none,all", 0x3ff), ("demotion", 0x100),
        ("none,demotion", 0x100), ("demotion,none", 0), ("compaction,demotion", 0x101), (" compaction , demotion \n", 0x101),
        (",,compaction,", 1), ("compaction,compaction", 1), ("0x101", 0x101), ("257", 0x101), ("0401", 0x101), ("0X101", 0x101),
        ("0", 0), ("+5", 5), ("5\n", 5), ("0xffffffff", 0x3ff), ("99999", 99999 & 0x3ff), (0x101, 0x101), (1 << 20, 0), ("\n", 0),
        (" ", 0),
    ])
    def test_parse(self, text, mask):
        assert parse_reason_mask(text) == mask

    @pytest.mark.parametrize("number, name", list(enumerate(NAMES)))
    def test_each_name_has_its_bit(self, number, name):
        assert parse_reason_mask(name) == 1 << number and format_reason_mask(1 << number) == name

    @pytest.mark.parametrize("text", ["5\n\n", " 5", "5 ", "-1", "++5", "0x", "1,demotion", "demotion,0x1", "swap", "ALL", "None",
                                      "demotion compaction", "1_0", "0b1", "08", "1.0", None, -1, 1.0, True, ["demotion"],
                                      "0x+1", "+", "+-5"])
    def test_refused(self, text):
        with pytest.raises(InvalidInput) as refused:
            parse_reason_mask(text)
        assert refused.value.errno == 22 and "\n" not in str(refused.value)

    def test_print(self):
        assert format_reason_mask(0) == "none"
        assert format_reason_mask(ALL_REASONS) == ",".join(NAMES), "never 'all'"

    @settings(deadline=None)
    @given(st.integers(0, 0x3ff))
    def test_both_ways(self, mask):
        assert parse_reason_mask(format_reason_mask(mask)) == parse_reason_mask(str(mask)) == mask


class TestRegistration:
    """One migrator at a time stands at the hatch, for the reasons of its mask."""

    def test_a_second_is_busy(self, machine):
        first = McCopy()
        machine.register(first)
        for second in (McCopy(), first):
            with pytest.raises(Busy, match="'mc_copy' is registered already") as refused:
                machine.register(second)
            assert refused.value.errno == 16
        machine.unregister(first)
        machine.register(second)

    @pytest.mark.parametrize("wrong", [None, object(), McCopy])
    def test_no_migrator(self, machine, wrong):
        with pytest.raises(InvalidInput):
            machine.unregister(wrong)
        if wrong is not McCopy:
            with pytest.raises(InvalidInput, match="no migrator"):
                machine.register(wrong)

    def test_only_who_is_on_duty_can_leave(self, machine):
        machine.register(McCopy())
        for wrong in (McCopy(), None):
            with pytest.raises(InvalidInput):
                machine.unregister(wrong)
            with pytest.raises(InvalidInput):
                machine.offload.set_reason_mask(wrong, "all")
        assert machine.offload.reasons == ",".join(NAMES)

    def test_a_bad_mask_registers_nobody(self, machine):
        with pytest.raises(InvalidInput):
            machine.register(McCopy(), "whim")
        machine.register(McCopy(), "demotion")
        assert machine.offload.reasons == "demotion"

    def test_leaving_clears_the_mask(self, machine):
        migrator = McCopy()
        machine.register(migrator)
        machine.unregister(migrator)
        assert machine.offload.reasons == "none" and machine.offload.migrator is None

    @pytest.mark.parametrize("mode", MODES)
    def test_only_its_reasons_are_offloaded(self, world, mode):
        pfns = world.pfns(6)
        migrator = McCopy()
        world.machine.register(migrator, "demotion,compaction")
        assert world.migrate(pfns[:2], mode=mode, reason="compaction").copies["batched"] == 2
        assert world.migrate(pfns[2:4], mode=mode, reason="damon").copies == {"folios": 2, "batched": 0, "discarded": 0}
        world.machine.offload.set_reason_mask(migrator, "damon")
        assert world.migrate(pfns[4:], mode=mode, reason="damon").copies["batched"] == 2
        world.check()

    def test_removed_during_a_call(self, world):
        """Who leaves between the decision and the copy is not called; the CPU routine copies the batch."""
        pfns = world.pfns(4)
        migrator = CpuMt(2)
        world.machine.register(migrator)
        result = world.migrate(pfns, events=[Event("flush", lambda step, pfn: world.machine.unregister(migrator))])
        assert (result.rc, result.copies) == (0, {"folios": 4, "batched": 4, "discarded": 0})
        assert world.machine.offload.failed_batches == 0
        world.check()

    def test_the_context_manager_takes_it_off_duty(self, machine):
        with pytest.raises(ZeroDivisionError):
            with machine.migrator(McCopy()):
                raise ZeroDivisionError
        assert machine.offload.migrator is None


class MigratorConformance:
    """What every migrator must do; a subclass names only itself."""

    def make(self):
        raise NotImplementedError

    def batch(self, world, orders):
        """A batch of folios of these orders, random bytes in the sources and poison in the destinations."""
        src = np.array([pfn for order in orders for pfn in world.pfns(1, order)], np.int64)
        dst = np.array([pfn for order in orders for pfn in world.pfns(1, order)], np.int64)
        for pfn, order in zip(dst.tolist(), orders):
            world.machine.frames.view(pfn, 1 << order)[:] = POISON
        return FolioBatch(dst, src, np.array(orders, np.uint8), int(world.machine.mem.nodes.frames[0]))

    @pytest.mark.parametrize("orders", [[0], [0] * 40, [9], [4, 0, 9, 1, 0, 7], list(range(10)), [3] * 7])
    def test_copies_and_marks_all(self, orders):
        world = World(4096)
        batch = self.batch(world, orders)
        kept = [array.copy() for array in batch[:3]]
        done = np.zeros(len(orders), np.uint8)
        everything = world.machine.frames.view(1024, 4096).copy()
        migrator = self.make()
        try:
            assert migrator.offload_copy(batch, done) == 0
        finally:
            migrator.close()
        assert (done == 1).all()
        for before, array in zip(kept, batch):
            assert (before == array).all(), "the lists are left as they are"
        for dst, src, order in zip(*kept):
            nr = 1 << int(order)
            everything[dst - 1024:dst - 1024 + nr] = everything[src - 1024:src - 1024 + nr]
        assert (world.machine.frames.view(1024, 4096) == everything).all(), "these bytes and no others"

    def test_an_empty_batch(self, world):
        nothing = np.zeros(0, np.int64)
        migrator = self.make()
        assert migrator.offload_copy(FolioBatch(nothing, nothing, np.zeros(0, np.uint8), int(world.machine.mem.nodes.frames[0])),
                                     np.zeros(0, np.uint8)) == 0
        migrator.close()

    @pytest.mark.parametrize("mode", MODES)
    def test_on_duty(self, mode):
        world = World(2048, 2048)
        pfns = world.pfns(1, 9) + world.pfns(20) + world.pfns(5, 3) + file_folios(world, 3, 2)
        with on_duty(world.machine, self.make()) as migrator:
            assert isinstance(migrator.name, str)
            result = world.migrate(pfns, mode=mode)
        nr = len(pfns)
        assert (result.rc, result.copies) == (0, {"folios": nr, "batched": nr, "discarded": 0})
        assert result.copied_bytes == result.moved_bytes == (512 + 20 + 40 + 12) * PAGE_SIZE
        assert world.machine.offload.batches == result.nr_batches and world.machine.offload.failed_batches == 0
        world.check()

    def test_used_again_after_close(self):
        migrator = self.make()
        for _ in range(2):
            world = World()
            with on_duty(world.machine, migrator):
                assert world.migrate(world.pfns(3)).rc == 0
            world.check()


class TestMcCopy(MigratorConformance):
    """mc_copy copies on the calling thread."""

    def make(self):
        return McCopy()


class TestMcCopyStream(MigratorConformance):
    """mc_copy with the streaming kernel."""

    def make(self):
        return McCopy("stream")


class TestCpuMt(MigratorConformance):
    """cpu_mt copies with three threads."""

    def make(self):
        return CpuMt(3)


class TestCpuMtStream(MigratorConformance):
    """cpu_mt with the streaming kernel."""

    def make(self):
        return CpuMt(4, "stream")


class TestFaultlessFaulty(MigratorConformance):
    """A faulty migrator without a fault is the one it wraps."""

    def make(self):
        migrator = FaultyMigrator(McCopy())
        migrator.close = migrator.migrator.close
        return migrator


class TestBadMigrators:
    """Numbers of threads, kernels and faults that cannot be are refused."""

    @pytest.mark.parametrize("make", [
        lambda: CpuMt(0), lambda: CpuMt(65), lambda: CpuMt("2"), lambda: McCopy("warp"), lambda: CpuMt(2, "warp"),
        lambda: FaultyMigrator(McCopy(), marks="some"), lambda: FaultyMigrator(McCopy(), fails_after=-1)])
    def test_refused(self, make):
        with pytest.raises(InvalidInput):
            make()


class Odd:
    """A migrator that does what ``act(batch, done)`` says."""

    name = "odd"

    def __init__(self, act):
        self.act = act
        self.batches = []

    def offload_copy(self, batch, done):
        self.batches.append([array.tolist() for array in batch[:3]])
        return self.act(batch, done)


def returns(rc, mark=0):
    def act(batch, done):
        done[:mark] = 1
        if mark:
            McCopy().offload_copy(FolioBatch(batch.dst[:mark], batch.src[:mark], batch.order[:mark], batch.frames),
                                  np.zeros(mark, np.uint8))
        return rc
    return act


class TestWorkedOutcomes:
    """Four folios, asynchronous: copies made, by the batch, thrown away, as the table of the rules has them for v6."""

    def run(self, migrator, prepare=lambda world, pfns: None, mode="MIGRATE_ASYNC", kind="anon", events=()):
        world = World()
        pfns = world.pfns(4) if kind == "anon" else file_folios(world, 4)
        world.machine.lru_add_drain()
        prepare(world, pfns)
        with on_duty(world.machine, migrator):
            result = world.migrate(pfns, mode=mode, events=events)
        world.check()
        return result, [pfns.index(pfn) for pfn in result.left.tolist()]

    KINDS = pytest.mark.parametrize("kind", ["anon", "file"])

    @KINDS
    @pytest.mark.parametrize("prepare, mode, copies, left", [
        (dict(), "MIGRATE_ASYNC", (4, 4, 0), []),
        (dict(refs=1), "MIGRATE_ASYNC", (3, 3, 0), [1]),
        (dict(refs=1), "MIGRATE_SYNC", (3, 3, 0), [1]),
        (dict(refs=1, refs_gone_after=1), "MIGRATE_ASYNC", (4, 3, 0), []),
        (dict(refs=1, refs_gone_after=0), "MIGRATE_ASYNC", (4, 3, 0), []),
        (dict(refs=1, refs_from_batch_copy=1, refs_gone_after=1), "MIGRATE_ASYNC", (5, 4, 1), []),
        (dict(refs=1, refs_from_batch_copy=1, refs_gone_after=0), "MIGRATE_ASYNC", (4, 4, 0), []),
        (dict(refs=1, refs_from_batch_copy=1), "MIGRATE_ASYNC", (4, 4, 1), [1]),
        (dict(copy_error=1), "MIGRATE_ASYNC", (3, 1, 0), [1]),
    ])
    def test_others(self, kind, prepare, mode, copies, left):
        result, still = self.run(McCopy(), lambda world, pfns: world.surround(pfns[1], **{"refs_gone_after": -1} | prepare)
                                 if prepare else None, mode, kind)
        assert (tuple(result.copies.values()), still, result.rc) == (copies, left, len(left))

    @KINDS
    @pytest.mark.parametrize("make, copies", [
        (lambda: FaultyMigrator(McCopy(), declines=True), (4, 0, 0)),
        (lambda: FaultyMigrator(McCopy(), fails_after=2), (4, 2, 0)),
        (lambda: FaultyMigrator(McCopy(), fails_after=2, marks="none"), (6, 2, 2)),
        (lambda: FaultyMigrator(McCopy(), fails_after=0), (4, 0, 0)),
        (lambda: FaultyMigrator(McCopy(), fails_after=4), (4, 4, 0)),
        (lambda: Odd(returns(0)), (4, 0, 0)),
        (lambda: Odd(returns(-EIO)), (4, 0, 0)),
        (lambda: Odd(returns(-EIO, 4)), (4, 4, 0)),
        (lambda: Odd(returns(0, 3)), (4, 3, 0)),
    ], ids=["declines", "fails, marks", "fails, marks nothing", "fails at once", "fails too late", "0 without marks",
            "error without marks", "error with all marks", "0 with some marks"])
    def test_migrators(self, kind, make, copies):
        result, still = self.run(make(), kind=kind)
        assert (tuple(result.copies.values()), still, result.rc) == (copies, [], 0)

    def test_return_codes(self, world):
        assert FaultyMigrator(McCopy(), declines=True).offload_copy(None, None) == -EOPNOTSUPP
        with on_duty(world.machine, FaultyMigrator(McCopy(), declines=True)):
            world.migrate(world.pfns(2))
        assert (world.machine.offload.batches, world.machine.offload.failed_batches) == (1, 1)
        world.check()

    def test_a_write_by_a_late_holder_is_kept(self):
        """A reference that comes after the batch copy costs the copy, not the write: the retry copies afresh."""
        world = World()
        address, pfns = world.map(4)
        world.machine.lru_add_drain()
        world.surround(int(pfns[1]), refs=1, refs_from_batch_copy=1, refs_gone_after=1)
        written = bytes([0x5A]) * PAGE_SIZE

        def write(step, pfn):
            world.machine.frames.view(int(pfns[1]), 1)[:] = 0x5A

        with on_duty(world.machine, McCopy()):
            result = world.migrate(pfns, events=[Event("batch_copied", write)])
        content = world.expected[0][2]
        world.expected = [(world.process, address, content[:PAGE_SIZE] + written + content[2 * PAGE_SIZE:])]
        assert tuple(result.copies.values()) == (5, 4, 1)
        world.check()


class TestGate:
    """Only a folio without unexplained references joins the batch; the others go to the single list, and move after it."""

    def test_what_the_migrator_gets(self, world):
        pfns = world.pfns(3) + world.pfns(2, 2)
        world.surround(pfns[1], refs=1)
        odd = Odd(returns(0))
        world.machine.register(odd)
        world.migrate(pfns)
        (dst, src, order), = odd.batches
        assert src == [pfns[0], *pfns[2:]] and order == [0, 0, 2, 2]
        assert (world.folios.nid[dst] == 1).all()
        world.check()

    def test_the_single_list_moves_last(self, world):
        pfns = world.pfns(3)
        world.machine.lru_add_drain()
        world.surround(pfns[0], refs=1, refs_gone_after=0)
        order = []
        world.machine.register(McCopy())
        result = world.migrate(pfns, events=[Event("move", lambda step, pfn: order.append(pfn))])
        assert order == [pfns[1], pfns[2], pfns[0]] and result.rc == 0
        world.check()

    def test_locked_and_unmapped_when_copied(self, world):
        seen = []

        def act(batch, done):
            for pfn in (*batch.src, *batch.dst):
                folio = world.folios[pfn]
                seen.append((int(folio.mapcount), bool(folio.page_flags & 1)))
            return 0

        world.machine.register(Odd(act))
        world.migrate(world.pfns(2) + world.pfns(1, 3))
        assert seen == [(0, True)] * 6
        world.check()


def outcome(world, pfns, result):
    """All that offload must not change: what is left by name, counters, who is where."""
    names = {pfn: i for i, pfn in enumerate(pfns)}
    left = sorted(names.get(pfn, pfn) for pfn in result.left.tolist())
    where = [world.machine.node_of(process, address + i) for process, address, content in world.expected
             for i in range(0, len(content), PAGE_SIZE)]
    return result.rc, left, result.stats, result.targets, result.tlb_flushes, result.moved_bytes, where, world.machine.vmstat


class TestOffloadEqualsVanilla:
    """With any migrator return value, counters, vmstat, what is left and the bytes equal a run without one.

    Left out: the order of moving and of ``left``, which copies were made, and pfns of destinations.
    """

    def build(self, folios, batch_pages, fragmented, **fields):
        world = World(1024, 512, batch_pages=batch_pages, **fields)
        if fragmented:
            world.machine.fragment(1, 1)
        pfns = []
        for kind, order, state in folios:
            new = file_folios(world, 1, order, kind) if kind in ("file", "shmem") else \
                world.pfns(1, order, mlock=kind == "mlocked")
            pfns += new
        world.machine.lru_add_drain()
        for pfn, (_, _, state) in zip(pfns, folios):
            hinder(world, pfn, state)
        return world, pfns

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(FOLIO, max_size=10), st.sampled_from(MODES), st.sampled_from([3, 512]), st.booleans(),
           st.sampled_from([McCopy, lambda: CpuMt(2, "stream"), lambda: FaultyMigrator(McCopy(), fails_after=1),
                            lambda: FaultyMigrator(McCopy(), fails_after=1, marks="none"), lambda: Odd(returns(0))]))
    def test_any_list(self, folios, mode, batch_pages, fragmented, make):
        plain = self.build(folios, batch_pages, fragmented)
        expected = outcome(*plain, plain[0].migrate(plain[1], mode=mode))
        plain[0].check()
        world, pfns = self.build(folios, batch_pages, fragmented)
        with on_duty(world.machine, make()):
            result = world.migrate(pfns, mode=mode)
        assert outcome(world, pfns, result) == expected
        world.check()


class CalledByPython(McCopy):
    """mc_copy, but not taken for the CPU routine: a subclass is called through the hatch."""


class TestCpuRoutineEqualsHatch(TestOffloadEqualsVanilla):
    """The CPU routine, which compiled code calls itself, gives what the same copy through Python gives: all of the result
    but times, copies made and thrown away included, an unreadable folio too."""

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(FOLIO, max_size=10), st.sampled_from(MODES), st.sampled_from([3, 512]), st.booleans(),
           st.sampled_from(["plain", "stream"]))
    def test_any_list(self, folios, mode, batch_pages, unreadable, kernel):
        results = []
        for make in (CalledByPython, McCopy):
            world, pfns = self.build(folios, batch_pages, False)
            if unreadable and pfns:
                world.surround(pfns[len(pfns) // 2], copy_error=1)
            with on_duty(world.machine, make(kernel)):
                result = world.migrate(pfns, mode=mode)
            world.check()
            results.append((outcome(world, pfns, result), result.left.tolist(), result.copies, result.copied_bytes,
                            world.machine.offload.batches))
        assert results[0] == results[1]


SCENARIO = """
import json
from conftest import on_duty
from offload.migrators.cpu_mt import CpuMt
from test_migrate_pages import busy_world
out = []
for mode in ("MIGRATE_ASYNC", "MIGRATE_SYNC"):
    for offloaded in (False, True):
        world, pfns = busy_world()
        if offloaded:
            with on_duty(world.machine, CpuMt(2)):
                result = world.migrate(pfns, mode=mode)
        else:
            result = world.migrate(pfns, mode=mode)
        world.check()
        out.append([result.rc, result.left.tolist(), result.stats, result.targets, result.copies, result.tlb_flushes,
                    result.nr_batches, world.machine.free_blocks(0), world.machine.free_blocks(1),
                    world.machine.mem.folios.refcount.tolist()])
print(json.dumps(out))
"""


class TestWithoutTheCompiler:
    """Compiled or not, a call does the same, down to each frame's reference count."""

    def test_equal(self):
        outs = []
        for disabled in ("0", "1") if not JIT_DISABLED else ("1", "1"):
            done = subprocess.run(
                [sys.executable, "-c", SCENARIO], capture_output=True, text=True, timeout=300,
                env=os.environ | {"NUMBA_DISABLE_JIT": disabled, "PYTHONPATH": os.pathsep.join(
                    [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])})
            assert done.returncode == 0, done.stderr
            outs.append(json.loads(done.stdout))
        assert outs[0] == outs[1]
