"""The four protocols of the batch-copy series: the table of worked outcomes row by row, hazards, registration.

The rows are those of docs/protocols.md. They are run as scenarios, whose bytes are judged by reading them back.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_copy_offload
from conftest import World, on_duty
from offload.cli import main
from offload.copy_offload import V5_REASONS
from offload.errors import Busy, EngineUnavailable, InvalidInput
from offload.experiment.bench import Bench
from offload.experiment.config import BenchConfig
from offload.migrate.pages import Event
from offload.migrate.state import FOLIO_CONTENT_COPIED
from offload.migrators.cpu_mt import CpuMt
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.memmap import PG_private
from offload.scenario import run_scenario
from offload.units import PROTOCOLS, MigrateReason
from test_migrate_pages import FOLIO, MODES

MARKS_A_BATCH = ("v4", "flags", "v5")       # one verdict for the batch list
LOST = "write lost"


def run(protocol, folios, mode="MIGRATE_ASYNC", **offload):
    """What came of the call: ((copies performed, by the batch, discarded), names left, "" or LOST)."""
    scenario = {"format": 1, "name": "protocols/row", "folios": folios, "calls": [{"op": "migrate_pages", "mode": mode}]}
    if protocol != "off":
        scenario["offload"] = {"protocol": protocol, "migrator": "mc_copy"} | offload
    result, = run_scenario(scenario)
    left = result["left"]
    assert result["rc"] == len(left) == result["stats"]["nr_failed_pages"]
    assert result["stats"]["nr_succeeded"] == len(folios) - len(left)
    assert [result["vmstat"][name] for name in ("pgmigrate_success", "pgmigrate_fail")] == [len(folios) - len(left), len(left)]
    copies = result["copies"]
    return ((copies["folios"], copies["batched"], copies["discarded"]), "".join(left), "" if result["data_ok"] else LOST)


def b(**fields):
    """Folios a b c d, of which b is special."""
    return [{"name": "a"}, {"name": "b"} | fields, {"name": "c"}, {"name": "d"}]


LATE = {"extra_refs": 1, "extra_refs_from": "batch_copy"}
SYNC = {"mode": "MIGRATE_SYNC"}
# name: (folios, options, without offload, v4 flags v5, v6)
ROWS = {
    "all free": (b(), {}, ((4, 0, 0), "", ""), ((4, 4, 0), "", ""), ((4, 4, 0), "", "")),
    "b is held throughout": (b(extra_refs=1), {}, ((3, 0, 0), "b", ""), ((4, 4, 1), "b", ""), ((3, 3, 0), "b", "")),
    "b is held throughout, SYNC": (b(extra_refs=1), SYNC, ((3, 0, 0), "b", ""), ((5, 5, 2), "b", ""), ((3, 3, 0), "b", "")),
    "early reference writes, goes after a failed move": (
        b(extra_refs=1, extra_refs_gone_after=1, extra_refs_write=True), {},
        ((4, 0, 0), "", ""), ((4, 4, 0), "", LOST), ((4, 3, 0), "", "")),
    "early reference writes, goes before the first move": (
        b(extra_refs=1, extra_refs_gone_after=0, extra_refs_write=True), {},
        ((4, 0, 0), "", ""), ((4, 4, 0), "", LOST), ((4, 3, 0), "", "")),
    "early reference writes, goes after a failed move, SYNC": (
        b(extra_refs=1, extra_refs_gone_after=1, extra_refs_write=True), SYNC,
        ((4, 0, 0), "", ""), ((4, 4, 0), "", LOST), ((4, 3, 0), "", "")),
    "early reference writes, goes after three, SYNC": (
        b(extra_refs=1, extra_refs_gone_after=3, extra_refs_write=True), SYNC,
        ((4, 0, 0), "", ""), ((5, 5, 1), "", ""), ((4, 4, 0), "", "")),
    "early reference writes, goes after four, SYNC": (
        b(extra_refs=1, extra_refs_gone_after=4, extra_refs_write=True), SYNC,
        ((4, 0, 0), "", ""), ((5, 5, 1), "", ""), ((4, 3, 0), "", "")),
    "late reference writes, goes after a failed move": (
        b(extra_refs_gone_after=1, extra_refs_write=True, **LATE), {},
        ((4, 0, 0), "", ""), ((4, 4, 0), "", LOST), ((5, 4, 1), "", "")),
    "late reference writes, goes before the first move": (
        b(extra_refs_gone_after=0, extra_refs_write=True, **LATE), {},
        ((4, 0, 0), "", ""), ((4, 4, 0), "", LOST), ((4, 4, 0), "", LOST)),
    "late reference stays": (b(**LATE), {}, ((3, 0, 0), "b", ""), ((4, 4, 1), "b", ""), ((4, 4, 1), "b", "")),
    "poison": (b(copy_error=True), {}, ((3, 0, 0), "b", ""), ((4, 1, 1), "b", ""), ((3, 1, 0), "b", "")),
    "the driver declines": (b(), {"declines": True}, None, ((4, 0, 0), "", ""), ((4, 0, 0), "", "")),
    "the driver fails after a and b, marks them": (
        b(), {"fails_after": 2}, None, ((6, 2, 2), "", ""), ((4, 2, 0), "", "")),
    "the driver fails after a and b, marks none": (
        b(), {"fails_after": 2, "marks": "none"}, None, ((6, 2, 2), "", ""), ((6, 2, 2), "", "")),
}
CASES = [pytest.param(protocol, *row[:2], row[2 if protocol == "off" else 4 if protocol == "v6" else 3], id=f"{protocol}: {name}")
         for name, row in ROWS.items() for protocol in ("off", *PROTOCOLS) if protocol != "off" or row[2]]


class TestWorkedOutcomes:
    """Every row of the table, in every column."""

    @pytest.mark.parametrize("protocol, folios, options, expected", CASES)
    def test_row(self, protocol, folios, options, expected):
        assert run(protocol, folios, **options) == expected

    @pytest.mark.parametrize("protocol, late, left", [
        ("off", False, "ma"), ("v6", False, "ma"), ("v6", True, "am"), *((protocol, late, "am") for protocol in MARKS_A_BATCH
                                                                        for late in (False, True))])
    def test_order_of_left(self, protocol, late, left):
        """A movable_ops page is on the single list, undone after the batch list; in v6 the gate sends a held folio there too."""
        folios = [{"name": "m", "kind": "movable_ops", "callback": ["EAGAIN"]}, {"name": "a", "extra_refs": 1}]
        if late:
            folios[1]["extra_refs_from"] = "batch_copy"
        assert run(protocol, folios)[1] == left

    @pytest.mark.parametrize("migrator", ["mc_copy", "cpu_mt"])
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_the_copier_makes_no_difference(self, protocol, migrator):
        """The CPU routine runs in compiled code, others are called by Python; the verdict on a batch is the same."""
        for folios, options, _, batch, folio in ROWS.values():
            assert run(protocol, folios, **options | {"migrator": migrator}) == (folio if protocol == "v6" else batch)


class Liar(McCopy):
    """Returns 0, has written nothing and marks nothing."""

    def offload_copy(self, batch, done):
        return 0


class TestVerdict:
    """v4, flags and v5 believe the return code, v6 believes marks."""

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_driver_that_returns_0_and_marks_nothing(self, protocol):
        world = World(protocol=protocol)
        address, pfns = world.map(4)
        with on_duty(world.machine, Liar()):
            result = world.migrate(pfns)
        assert (result.rc, result.moved_bytes) == (0, 4 * 4096)
        if protocol == "v6":
            assert result.copies == {"folios": 4, "batched": 0, "discarded": 0}
            world.check()
        else:
            assert result.copies == {"folios": 0, "batched": 0, "discarded": 0}, "no copy, and none thrown away"
            assert world.process.read(address, 4 * 4096) == b"\xaa" * (4 * 4096), "every page is garbage"

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_lie_is_good_for_one_batch(self, protocol):
        """Completions of one batch do not leak into the next."""
        world = World(batch_pages=2, protocol=protocol)
        address, pfns = world.map(6)

        class Once(McCopy):
            calls = 0

            def offload_copy(self, batch, done):
                self.calls += 1
                return super().offload_copy(batch, done) if self.calls != 2 else 0
        with on_duty(world.machine, Once()):
            result = world.migrate(pfns)
        wrong = protocol != "v6"
        assert result.copies == {"folios": 4 if wrong else 6, "batched": 4, "discarded": 0}
        content = world.expected[0][2]
        if wrong:
            content = content[:2 * 4096] + b"\xaa" * (2 * 4096) + content[4 * 4096:]
        assert world.process.read(address, 6 * 4096) == content

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_removed_between_decision_and_copy(self, protocol):
        """The call lands in the CPU routine: the batch is copied all the same."""
        world = World(protocol=protocol)
        pfns = world.pfns(4)
        migrator = CpuMt(2)
        world.machine.register(migrator)
        result = world.migrate(pfns, events=[Event("flush", lambda step, pfn: world.machine.unregister(migrator))])
        assert result.copies == {"folios": 4, "batched": 4, "discarded": 0}
        world.check()

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_migrator_that_raises(self, protocol):
        """Its batch counts as failed, nobody takes it for copied."""
        world = World(protocol=protocol)
        pfns = world.pfns(4)

        class Broken(McCopy):
            def offload_copy(self, batch, done):
                done[0] = 1
                raise ZeroDivisionError
        with on_duty(world.machine, Broken()), pytest.raises(ZeroDivisionError) as raised:
            world.migrate(pfns)
        assert raised.value.result.rc == 0
        if protocol != "v6":                        # in v6 it has marked what it did not write
            world.check()


class TestWhereTheMarkLives:
    """The word on the destination, looked at between the steps of a call."""

    def watch(self, protocol, folio_state=None, steps=("flushed", "batch_copied", "copied", "move_failed", "undo")):
        """[(step, private & 7, migrate_info & 7)] of the destination of the one folio migrated."""
        world = World(1024, 1024, protocol=protocol)
        pfn, = world.pfns(1)
        if folio_state:
            world.surround(pfn, **folio_state)
        dst, seen = [], []

        def find(step, pfn):
            dst.append(int(np.flatnonzero((world.folios.nid == 1) & (world.folios.refcount > 0))[0]))

        def look(step, _):
            folio = world.folios[dst[0]]
            seen.append((step, int(folio.private) & 7, int(folio.migrate_info) & 7))
        with on_duty(world.machine, McCopy()):
            world.migrate([pfn], events=[Event("unmapped", find), *(Event(step, look) for step in steps)])
        world.machine.validate()
        return seen

    def test_v6(self):
        assert self.watch("v6") == [("flushed", 0, 1), ("batch_copied", 0, 5), ("copied", 0, 0)]

    def test_v5_is_written_only_around_the_callback(self):
        assert self.watch("v5") == [("flushed", 0, 1), ("batch_copied", 0, 1), ("copied", 0, 0)]

    @pytest.mark.parametrize("protocol", ["v4", "flags"])
    def test_v4_and_flags_use_private(self, protocol):
        assert self.watch(protocol) == [("flushed", 1, 0), ("batch_copied", 1, 0), ("copied", 0, 0)]

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_failed_move_leaves_no_mark(self, protocol):
        """record() writes the whole word: old states and anon_vma are there for the retry, the bit is not."""
        seen = self.watch(protocol, {"refs": 1, "refs_from_batch_copy": 1}, steps=("move_failed", "undo"))
        word = (0, 1) if protocol in ("v5", "v6") else (1, 0)
        assert seen == [("move_failed", *word)] * 10 + [("undo", *word)]

    def test_the_bit_is_the_kernels(self):
        assert FOLIO_CONTENT_COPIED == 1 << 2


class TestNobodyInterferes:
    """Where nobody writes behind the path's back, return value, counters, what is left, placement and bytes are the same in all
    protocols, and as without offload. Left out: which copies were made, and order."""

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(FOLIO, max_size=10), st.sampled_from(MODES), st.sampled_from([3, 512]), st.booleans(),
           st.sampled_from([McCopy, lambda: CpuMt(2), lambda: FaultyMigrator(McCopy(), fails_after=1),
                            lambda: FaultyMigrator(McCopy(), fails_after=1, marks="none"),
                            lambda: FaultyMigrator(McCopy(), declines=True)]))
    def test_any_list(self, folios, mode, batch_pages, fragmented, make):
        build = test_copy_offload.TestOffloadEqualsVanilla().build
        outcomes = []
        for protocol in (None, *PROTOCOLS):
            world, pfns = build(folios, batch_pages, fragmented, protocol=protocol or "v6")
            if protocol:
                with on_duty(world.machine, make()):
                    result = world.migrate(pfns, mode=mode)
            else:
                result = world.migrate(pfns, mode=mode)
            world.check(protocol)
            assert result.copies["folios"] >= result.copies["discarded"] >= 0
            outcomes.append(test_copy_offload.outcome(world, pfns, result))
        assert outcomes == [outcomes[0]] * 5


class Owner:
    def __init__(self, going=False):
        self.going = going


class Driver:
    """A driver without the attributes that protocols ask for."""

    name = "driver"
    batches = 0

    def offload_copy(self, batch, done):
        self.batches += 1
        return -95


def wanted(machine, reason, world):
    """Whether a batch of this reason goes through the hatch."""
    before = machine.offload.batches
    result = world.migrate(world.pfns(1), reason=reason)
    assert result.rc == 0
    return machine.offload.batches > before


class TestRegistration:
    """Who may register, and for which reasons, in each protocol."""

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_owner(self, protocol):
        world = World(protocol=protocol)
        driver = Driver()
        if protocol == "v5":
            with pytest.raises(InvalidInput, match="'driver' has no owner") as refused:
                world.machine.register(driver)
            assert refused.value.errno == 22 and world.machine.offload.migrator is None
            driver.owner = Owner()
        world.machine.register(driver)
        with pytest.raises(Busy):
            world.machine.register(driver)
        world.machine.unregister(driver)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_an_owner_that_is_going_away(self, protocol):
        machine = World(protocol=protocol).machine
        driver = Driver()
        driver.owner = Owner(going=True)
        with pytest.raises(EngineUnavailable, match="going away") as refused:
            machine.register(driver)
        assert refused.value.errno == 19 and machine.offload.migrator is None and machine.offload.reasons == "none"
        machine.register(McCopy())
        with pytest.raises(Busy):                   # who is on duty is asked first
            machine.register(driver)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("asked", ["all", "none", "demotion,damon"])
    def test_reasons(self, protocol, asked):
        world = World(protocol=protocol)
        with world.machine.migrator(McCopy(), asked):
            for reason in MigrateReason:
                expected = asked == "all" or reason.trace_name in asked.split(",")
                if protocol == "v5":
                    expected = expected and reason.trace_name in ("compaction", "syscall_or_cpuset", "demotion",
                                                                  "numa_misplaced")
                assert wanted(world.machine, reason.trace_name, world) == expected, reason

    def test_v5_reasons(self):
        assert V5_REASONS == 0b100101001

    @pytest.mark.parametrize("protocol", ["v4", "flags"])
    def test_should_batch_answers(self, protocol):
        world = World(protocol=protocol)
        driver = Driver()
        driver.should_batch = lambda reason: reason in (MigrateReason.MR_DEMOTION, MigrateReason.MR_DAMON)
        world.machine.register(driver)
        assert world.machine.offload.reasons == "demotion,damon"
        world.machine.unregister(driver)
        world.machine.register(driver, "demotion,compaction")
        assert world.machine.offload.reasons == "demotion"
        world.machine.unregister(driver)
        driver.should_batch = None                  # no callback: never
        world.machine.register(driver)
        assert not any(wanted(world.machine, reason.trace_name, world) for reason in MigrateReason)

    @pytest.mark.parametrize("protocol", ["v5", "v6"])
    def test_should_batch_is_not_asked(self, protocol):
        world = World(protocol=protocol)
        driver = Driver()
        driver.owner, driver.should_batch = Owner(), None
        world.machine.register(driver)
        assert wanted(world.machine, "compaction", world)

    @pytest.mark.parametrize("protocol", MARKS_A_BATCH)
    def test_a_mask_is_changed_in_v6_alone(self, protocol):
        machine = World(protocol=protocol).machine
        migrator = McCopy()
        machine.register(migrator)
        before = machine.offload.reasons
        with pytest.raises(InvalidInput, match=f"{protocol}.*only v6"):
            machine.offload.set_reason_mask(migrator, "demotion")
        assert machine.offload.reasons == before and machine.offload.protocol == protocol

    @pytest.mark.parametrize("word", ["v3", "", 6, None])
    def test_no_such_protocol(self, word):
        with pytest.raises(InvalidInput, match="protocol .* is not known; use one of: v6, v5, flags, v4"):
            World(protocol=word)


class TestTheGate:
    """Only v6 looks at references before it copies; nobody looks at the mode."""

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_held_folio_goes_to_the_single_list(self, protocol):
        """And is moved after the batch list, in each pass."""
        world = World(protocol=protocol)
        pfns = world.pfns(4)
        world.surround(pfns[1], refs=1, refs_gone_after=0)
        order = []
        with on_duty(world.machine, McCopy()):
            result = world.migrate(pfns, events=[Event("move", lambda step, pfn: order.append(pfns.index(pfn)))])
        assert (order, result.copies["batched"]) == (([0, 2, 3, 1], 3) if protocol == "v6" else ([0, 1, 2, 3], 4))
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_no_version_looks_at_the_mode(self, protocol, mode):
        world = World(protocol=protocol)
        with on_duty(world.machine, McCopy()):
            assert world.migrate(world.pfns(3), mode=mode).copies["batched"] == 3
        world.check()


class TestHazards:
    """The hazards of the series that can be shown without a device; 1 and 2 are rows of the table, 3 is its last lost write."""

    LATE_WRITER = b(extra_refs_gone_after=0, extra_refs_write=True, **LATE)

    @pytest.mark.parametrize("protocol", MARKS_A_BATCH)
    @pytest.mark.parametrize("gone_after", [0, 1, 2, 5, 9])
    def test_1_and_2_a_stale_copy_is_used(self, protocol, gone_after):
        """A reference held since before the unmap is not looked at, and a retry skips the copy again."""
        folios = b(extra_refs=1, extra_refs_gone_after=gone_after, extra_refs_write=True)
        assert run(protocol, folios) == ((4, 4, 0), "", LOST)
        assert run("v6", folios) == ((4, 3, 0), "", ""), "closed by the gate"
        assert run("off", folios) == ((4, 0, 0), "", "")

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_3_a_late_writer(self, protocol):
        assert run(protocol, self.LATE_WRITER)[2] == LOST, "no protocol closes it"
        assert run("off", self.LATE_WRITER)[2] == ""

    def buffers(self, protocol, locked):
        """Four file folios with buffer heads; somebody writes into the second through its buffer after the batch copy.

        ``locked``: and holds the buffer's lock during the first move attempt. (copies, whether the write arrived).
        """
        world = World(1024, 1024, protocol=protocol if protocol != "off" else "v6")
        file = world.machine.file(4 * 4096, aops="buffer_norefs")
        pfns = world.pfns(4, file=file, shared=True)
        for pfn in pfns:
            world.folios.page_flags[pfn] |= PG_private
            world.folios.private[pfn] = 4711
            world.folios.refcount[pfn] += 1
        process, address, content = world.expected[0]

        def write(step, _):
            world.machine.frames.view(pfns[1], 1)[:] = 0x77
            if locked:
                world.surround(pfns[1], buffers_locked=1)

        def unlock(step, _):
            world.surround(pfns[1], buffers_locked=0)
        events = [Event("batch_copied", write), Event("move_failed", unlock)]
        if protocol == "off":
            result = world.migrate(pfns, events=events)
        else:
            with on_duty(world.machine, McCopy()):
                result = world.migrate(pfns, events=events)
        assert result.rc == 0
        copies = tuple(result.copies[name] for name in ("folios", "batched", "discarded"))
        found = process.read(address, 4 * 4096)
        assert found[:4096] == content[:4096] and found[2 * 4096:] == content[2 * 4096:]
        return copies, found[4096:2 * 4096] == b"\x77" * 4096

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_4_a_write_through_a_buffer(self, protocol):
        """A buffer user needs neither folio lock nor reference; the batch copy runs before the buffer locks are taken."""
        assert self.buffers(protocol, locked=False) == ((4, 4, 0), False)
        assert self.buffers("off", locked=False) == ((4, 0, 0), True)

    @pytest.mark.parametrize("protocol, expected", [("off", ((4, 0, 0), True)), ("v6", ((5, 4, 1), True)),
                                                    *((protocol, ((4, 4, 0), False)) for protocol in MARKS_A_BATCH)])
    def test_4_with_the_buffer_locked_meanwhile(self, protocol, expected):
        """The first attempt fails before it reads the mark; record() overwrites it, so v6 copies afresh."""
        assert self.buffers(protocol, locked=True) == expected

    @pytest.mark.parametrize("protocol", ["off", *PROTOCOLS])
    @pytest.mark.parametrize("declines", [False, True])
    def test_10_secret_memory(self, protocol, declines):
        """It joins the batch and is refused (-EBUSY) only in the move: its bytes stay in a destination that is then freed."""
        world = World(1024, 1024, protocol=protocol if protocol != "off" else "v6")
        file = world.machine.file(4096, aops="secretmem")
        pfn, = world.pfns(1, file=file, shared=True)
        free = world.machine.free_pages(1)
        dst = []

        def find(step, _):
            dst.append(int(np.flatnonzero((world.folios.nid == 1) & (world.folios.refcount > 0))[0]))
        events = [Event("unmapped", find)]
        if protocol == "off":
            result = world.migrate([pfn], events=events)
        else:
            with on_duty(world.machine, FaultyMigrator(McCopy(), declines=declines)):
                result = world.migrate([pfn], events=events)
        read = protocol != "off" and not declines
        assert (result.rc, result.left.tolist()) == (1, [pfn])
        assert result.copies == dict.fromkeys(("folios", "batched", "discarded"), int(read))
        assert world.machine.free_pages(1) == free
        assert (world.machine.frames.view(dst[0], 1).tobytes() == world.expected[0][2]) == read
        world.check()


class TestCommandLine:
    """``--protocol`` reaches the machine; a word that is none is one line."""

    @pytest.mark.parametrize("command", [("bench",), ("migrate", "--pid", "self")])
    def test_no_such_protocol(self, command, capsys):
        assert main([*command, "--protocol", "v3"]) == 2
        assert capsys.readouterr().err == "offload: protocol 'v3' is not known; use one of: v6, v5, flags, v4\n"

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_bench(self, protocol):
        config = BenchConfig.parse(size="2M", orders="0", engines="batch", protocol=protocol)
        assert f"--protocol {protocol} " in config.command_line()
        assert Bench(config).machine.offload.protocol == protocol
