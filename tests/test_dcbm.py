"""dcbm: the steps of the reference driver, its completions and knobs, and each thing that can go wrong in it."""

import numpy as np
import pytest
from conftest import World, on_duty
from dma_conformance import DmaConformance
from dma_scripted import ScriptedProvider
from hypothesis import given
from hypothesis import strategies as st
from kernel_conformance import verdicts

from offload.copy_offload import WRITTEN_UNMARKED, FolioBatch
from offload.dmaengine import DmaDevice
from offload.errors import Busy, EngineUnavailable, InvalidInput
from offload.kernels.base import DMA_TRANS_READ_FAILED, DMA_TRANS_WRITE_FAILED, FRAME_SIZE
from offload.migrators.dcbm import (COMPLETIONS, MAX_DMA_CHAN, TIMEOUT_NS, Dcbm, DcbmParameters, merged_runs, parse_bool,
                                    split_by_count)
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.units import EBUSY, EINVAL, EIO, ENODEV, ENOMEM, ETIMEDOUT, parse_unsigned


class TestScripted(DmaConformance):
    """What the tests below take for an engine keeps the contract when nothing is scripted."""

    @staticmethod
    def make():
        return ScriptedProvider()


class TestScriptedInReverse(DmaConformance):
    @staticmethod
    def make():
        return ScriptedProvider(reverse=True)


class TestSplit:
    """Whole folios over the channels by count, in list order."""

    @given(n=st.integers(1, 1 << 20), c=st.integers(1, MAX_DMA_CHAN))
    def test_against_the_rule(self, n, c):
        c = min(n, c)
        first = split_by_count(n, c)
        counts = [(n * (i + 1)) // c - (n * i) // c for i in range(c)]
        assert np.diff(first).tolist() == counts
        assert (first[0], first[-1]) == (0, n) and min(counts) >= 1 and max(counts) - min(counts) <= 1

    @pytest.mark.parametrize("n, c, counts", [(7, 3, [2, 2, 3]), (4, 4, [1] * 4), (512, 16, [32] * 16), (10, 4, [2, 3, 2, 3])])
    def test_by_hand(self, n, c, counts):
        assert np.diff(split_by_count(n, c)).tolist() == counts


class TestMergedRuns:
    """An IOMMU merges what is adjacent in list order."""

    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=30))
    def test_against_a_loop(self, folios):
        frames, order = (np.array(column) for column in zip(*folios))
        expected = [True]
        for (before, size), (frame, _) in zip(folios, folios[1:]):
            expected.append(frame != before + 2 ** size)
        assert merged_runs(frames, order.astype(np.uint8)).tolist() == expected


class Folios(DmaConformance):
    """A batch of random bytes outside any machine."""

    def __init__(self, orders=(0,) * 8):
        self.checked, self.dst, self.src = plan, _, _ = self.plan(0, orders)
        # One base for both ends, as a machine has it.
        apart, rest = divmod(plan.dst_base - plan.src_base, FRAME_SIZE)
        assert rest == 0
        self.batch = FolioBatch(plan.dst + apart, plan.src, plan.order, plan.src_base)
        self.before = self.dst.read(), self.src.read()
        self.done = np.zeros(len(orders), np.uint8)

    def wrong(self):
        """Entries whose bytes are not there; anything else that is wrong is an error."""
        found = verdicts(self.checked, self.before, (self.dst.read(), self.src.read()))
        assert all(entry is not None for _, entry in found), found
        return [entry for _, entry in found]


def dcbm(nr_dma_chan=2, *, completion="descriptor", nr_chans=16, timeout_ns=TIMEOUT_NS, iommu_merges=False, **faults):
    provider = ScriptedProvider(nr_chans, **faults)
    driver = Dcbm(DmaDevice(provider), nr_dma_chan, completion=completion, timeout_ns=timeout_ns, iommu_merges=iommu_merges)
    return driver, provider.log


def calls(log, name):
    return [entry[1:] for entry in log if entry[0] == name]


def counters(driver):
    return driver.folios_migrated, driver.folios_failures


@pytest.mark.parametrize("completion", COMPLETIONS)
class TestSteps:
    """What a batch does, step by step, in both rules of completion."""

    @pytest.mark.parametrize("nr_dma_chan, nr_folios, shares", [
        (1, 8, [8]), (3, 8, [2, 3, 3]), (16, 5, [1] * 5), (16, 40, [2, 3] * 8), (2, 1, [1])])
    def test_all_well(self, completion, nr_dma_chan, nr_folios, shares):
        folios = Folios([i % 3 for i in range(nr_folios)])
        driver, log = dcbm(nr_dma_chan, completion=completion)
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert folios.done.tolist() == [1] * nr_folios and folios.wrong() == []
        assert counters(driver) == (nr_folios, 0)
        used = range(len(shares))
        interrupt = "each" if completion == "descriptor" else "last"
        assert calls(log, "prep") == [(i, shares[i], interrupt) for i in used]
        assert calls(log, "wait") == [(i, TIMEOUT_NS) for i in used]
        assert [entry[0] for entry in log] == (["request"] * len(used) + ["prep", "submit"] * len(used) + ["issue"] * len(used)
                                               + ["wait"] * len(used) + ["terminate", "free"] * len(used))
        assert driver.device.nr_free_chans == 16

    def test_channels_are_taken_for_each_batch(self, completion):
        driver, log = dcbm(2, completion=completion)
        for nr_dma_chan in (2, 3):
            driver.nr_dma_chan = nr_dma_chan
            folios = Folios()
            assert driver.offload_copy(folios.batch, folios.done) == 0
        assert calls(log, "request") == [(0,), (1,), (0,), (1,), (2,)]

    def test_first_refusal_ends_the_asking(self, completion):
        driver, log = dcbm(8, completion=completion, refuses_chan={3: -EBUSY})
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert calls(log, "request") == [(0,), (1,), (2,), (3,)] and len(calls(log, "wait")) == 3
        assert folios.wrong() == [] and driver.device.nr_free_chans == 16

    def test_fewer_channels_than_wanted(self, completion):
        driver, log = dcbm(8, completion=completion, nr_chans=2)
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert [nr for _, nr, _ in calls(log, "prep")] == [4, 4]

    @pytest.mark.parametrize("errno", [EBUSY, ENOMEM])
    def test_no_channel(self, completion, errno):
        driver, log = dcbm(2, completion=completion, refuses_chan={0: -errno})
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == -ENODEV
        assert not folios.done.any() and len(folios.wrong()) == 8
        assert counters(driver) == (0, 0) and calls(log, "prep") == []

    @pytest.mark.parametrize("step", ["refuses_prep", "refuses_submit"])
    @pytest.mark.parametrize("number", [0, 1])
    def test_refused(self, completion, step, number):
        driver, log = dcbm(3, completion=completion, **{step: {number}})
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == -EIO
        assert not folios.done.any() and len(folios.wrong()) == 8
        assert counters(driver) == (0, 8)
        assert calls(log, "issue") == [] and len(calls(log, "free")) == 3 and driver.device.nr_free_chans == 16

    def test_a_lost_device(self, completion):
        """An exception of the provider passes through; the channels are given back."""
        driver, log = dcbm(3, completion=completion, raises={1: EngineUnavailable("device lost")})
        folios = Folios([0] * 9)
        with pytest.raises(EngineUnavailable, match="device lost"):
            driver.offload_copy(folios.batch, folios.done)
        assert calls(log, "free") == [(0,), (1,), (2,)] and driver.device.nr_free_chans == 16
        mark = 1 if completion == "descriptor" else WRITTEN_UNMARKED
        assert folios.done.tolist() == [mark] * 3 + [0] * 6 and folios.wrong() == [3, 4, 5, 6, 7, 8]
        assert counters(driver) == ((3, 6) if completion == "descriptor" else (0, 9))

    def test_the_two_sides_merge_differently(self, completion):
        folios = Folios()
        for side in ("dst", "src"):
            adjacent = getattr(folios.batch, side).copy()
            adjacent[1] = adjacent[0] + 1
            other = folios.batch._replace(**{side: adjacent})
            if merged_runs(other.dst, other.order).tolist() == merged_runs(other.src, other.order).tolist():
                continue
            driver, log = dcbm(1, completion=completion, iommu_merges=True)
            assert driver.offload_copy(other, folios.done) == -EINVAL
            assert not folios.done.any() and len(folios.wrong()) == 8
            assert counters(driver) == (0, 8) and calls(log, "prep") == [] and calls(log, "free") == [(0,)]


class TestPerDescriptor:
    """Our rule, the default: what was wholly copied counts, whatever became of the others."""

    def test_is_the_default(self):
        assert Dcbm.on_cpu().completion == "descriptor"

    @pytest.mark.parametrize("error", [DMA_TRANS_READ_FAILED, DMA_TRANS_WRITE_FAILED])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_errors_in_the_middle(self, error, reverse):
        driver, _ = dcbm(2, errors={(0, 1): error, (1, 2): error}, reverse=reverse)
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == -EIO
        assert folios.done.tolist() == [1, 0, 1, 1, 1, 1, 0, 1] and folios.wrong() == [1, 6]
        assert counters(driver) == (6, 2)

    @pytest.mark.parametrize("number, done", [(0, [1, 1, 0, 0, 0, 0, 0, 0]), (1, [1, 1, 1, 1, 1, 1, 0, 0])])
    def test_stuck_channel(self, number, done):
        """The first channel whose time is over ends the batch; what had ended is kept."""
        driver, log = dcbm(2, stuck={number: 2}, timeout_ns=5)
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == -ETIMEDOUT
        assert folios.done.tolist() == done and folios.wrong() == np.flatnonzero(np.array(done) == 0).tolist()
        assert counters(driver) == (sum(done), 8 - sum(done))
        assert calls(log, "wait") == [(i, 5) for i in range(number + 1)]

    def test_out_of_order_is_waited_out(self):
        """Hazard 5 of the series does not exist in this rule."""
        driver, _ = dcbm(2, reverse=True)
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert folios.done.all() and folios.wrong() == []

    def test_a_merged_run_has_one_result(self):
        """Folios 1 to 3 are adjacent on both sides: one descriptor of the engine, all of it or nothing."""
        folios = Folios()
        dst, src = np.sort(folios.batch.dst), np.sort(folios.batch.src)
        dst, src = (side[0] + np.array([0, 2, 3, 4, 6, 7, 9, 10]) for side in (dst, src))
        folios.checked = folios.checked._replace(dst=dst - (folios.batch.dst - folios.checked.dst)[0], src=src)
        driver, _ = dcbm(1, iommu_merges=True, errors={(0, 2): DMA_TRANS_READ_FAILED})
        assert driver.offload_copy(folios.batch._replace(dst=dst, src=src), folios.done) == -EIO
        assert folios.done.tolist() == [1, 0, 0, 0, 1, 1, 1, 1] and folios.wrong() == [2]
        assert counters(driver) == (5, 3)

    def test_a_run_ends_with_its_channel(self):
        folios = Folios()
        dst, src = (np.sort(side)[0] + np.arange(8) for side in (folios.batch.dst, folios.batch.src))
        driver, _ = dcbm(2, iommu_merges=True, errors={(0, 2): DMA_TRANS_READ_FAILED})
        assert driver.offload_copy(folios.batch._replace(dst=dst, src=src), folios.done) == -EIO
        assert folios.done.tolist() == [0] * 4 + [1] * 4


class TestLastDescriptor:
    """The driver's rule: all or nothing by the last callback, with the hazards that follow."""

    def test_stuck_channel_marks_none(self):
        driver, _ = dcbm(2, completion="last", stuck={1: 2})
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == -ETIMEDOUT
        assert folios.done.tolist() == [WRITTEN_UNMARKED] * 6 + [0, 0] and folios.wrong() == [6, 7]
        assert counters(driver) == (0, 8)

    def test_hazard_5_out_of_order(self):
        """The last one of each channel ends first and is all that arrives; the driver reports success."""
        driver, _ = dcbm(2, completion="last", reverse=True)
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert folios.done.all() and counters(driver) == (8, 0)
        assert folios.wrong() == [0, 1, 2, 4, 5, 6]

    def test_hazard_6_silent_error(self):
        driver, _ = dcbm(2, completion="last", errors={(0, 1): DMA_TRANS_READ_FAILED, (1, 3): DMA_TRANS_WRITE_FAILED})
        folios = Folios()
        assert driver.offload_copy(folios.batch, folios.done) == 0
        assert folios.done.all() and counters(driver) == (8, 0) and folios.wrong() == [1, 7]


FAULTS = {
    "no channel": dict(refuses_chan={0: -EBUSY}), "one channel": dict(refuses_chan={1: -EBUSY}), "prep": dict(refuses_prep={1}),
    "submit": dict(refuses_submit={0}), "errors": dict(errors={(0, 0): DMA_TRANS_READ_FAILED, (1, 1): DMA_TRANS_WRITE_FAILED}),
    "stuck": dict(stuck={1: 1}), "reverse": dict(reverse=True), "reverse errors": dict(reverse=True, errors={(0, 2): 2}),
    "reverse stuck": dict(reverse=True, stuck={0: 1}), "none": {}}


class TestOnAMachine:
    """Whatever happens in the engine, no byte is lost, and the path copies what was not copied."""

    @pytest.mark.parametrize("kernel", ["plain", "stream"])
    @pytest.mark.parametrize("channels", [1, 3, 16])
    def test_cpu_channels(self, channels, kernel):
        world = World()
        pfns = [*world.pfns(9, 0), *world.pfns(3, 4), *world.pfns(1, 9)]
        with on_duty(world.machine, Dcbm.on_cpu(channels, kernel)) as driver:
            result = world.migrate(pfns)
        assert result.rc == 0 and result.copies == {"folios": 13, "batched": 13, "discarded": 0}
        assert counters(driver) == (13, 0) and world.machine.offload.failed_batches == 0
        world.check()

    @pytest.mark.parametrize("fault", FAULTS)
    def test_faults_per_descriptor(self, fault):
        world = World()
        pfns = world.pfns(8)
        with on_duty(world.machine, dcbm(2, **FAULTS[fault])[0]) as driver:
            result = world.migrate(pfns)
        assert (result.rc, result.stats["nr_succeeded"]) == (0, 8)
        assert result.copies == {"folios": 8, "batched": driver.folios_migrated, "discarded": 0}
        assert world.machine.offload.failed_batches == (fault not in ("none", "reverse", "one channel"))
        world.check()

    @pytest.mark.parametrize("fault", ["no channel", "one channel", "prep", "submit", "stuck", "reverse stuck", "none"])
    def test_faults_with_the_drivers_rule(self, fault):
        """Where the driver notices, nothing counts and everything is copied once more."""
        world = World()
        pfns = world.pfns(8)
        with on_duty(world.machine, dcbm(2, completion="last", **FAULTS[fault])[0]) as driver:
            result = world.migrate(pfns)
        if fault == "reverse stuck":                # the last one signals before the channel is stuck
            with pytest.raises(AssertionError, match="bytes wrong"):
                world.check()
            return
        written = {"stuck": 5}.get(fault, 0)
        good = fault in ("none", "one channel")
        assert result.rc == 0 and result.copies == {"folios": 8 + written, "batched": 8 if good else written, "discarded": written}
        assert counters(driver) == ((8, 0) if good else (0, 0) if fault == "no channel" else (0, 8))
        world.check()

    @pytest.mark.parametrize("fault", ["reverse", "errors"])
    def test_hazards_5_and_6_lose_bytes(self, fault):
        """The driver's rule: an unnoticed hole is taken for a copy. Per descriptor the same engine loses nothing."""
        world = World()
        pfns = world.pfns(8)
        with on_duty(world.machine, dcbm(2, completion="last", **FAULTS[fault])[0]) as driver:
            result = world.migrate(pfns)
        assert (result.rc, result.stats["nr_succeeded"], counters(driver)) == (0, 8, (8, 0))
        with pytest.raises(AssertionError, match="bytes wrong"):
            world.check()

    @pytest.mark.parametrize("raised", [KeyboardInterrupt, EngineUnavailable("lost")])
    def test_an_exception_ends_the_call_and_loses_nothing(self, raised):
        world = World()
        pfns = world.pfns(8)
        driver, log = dcbm(2, raises={1: raised})
        with on_duty(world.machine, driver):
            with pytest.raises(type(raised) if isinstance(raised, Exception) else raised):
                world.migrate(pfns)
        assert driver.device.nr_free_chans == 16
        world.check()

    @pytest.mark.parametrize("make, rc, batched", [(McCopy, 1, 3), (lambda: Dcbm.on_cpu(2), 0, 8),
                                                   (lambda: FaultyMigrator(Dcbm.on_cpu(2), fails_after=9), 0, 8)])
    def test_poison_is_not_detected(self, make, rc, batched):
        """The CPU routine ends at the unreadable folio, which fails; an engine reads on."""
        world = World()
        pfns = world.pfns(8)
        world.surround(pfns[3], copy_error=True)
        with on_duty(world.machine, make()):
            result = world.migrate(pfns, mode="MIGRATE_ASYNC")
        assert (result.rc, result.copies["batched"], len(result.left)) == (rc, batched, rc)
        world.check()

    def test_equal_to_mc_copy(self):
        results = []
        for migrator in (McCopy(), Dcbm.on_cpu(3)):
            world = World()
            pfns = [*world.pfns(30, 0), *world.pfns(4, 2)]
            with on_duty(world.machine, migrator):
                result = world.migrate(pfns, mode="MIGRATE_SYNC")
            world.check()
            results.append((result.rc, result.stats, result.copies, result.copied_bytes, world.nodes_of(pfns)))
        assert results[0] == results[1]


class TestOptions:
    """What a driver can be made of."""

    @pytest.mark.parametrize("value", [0, 17, -1, True, 2.0, "2", None])
    def test_refuses_other_numbers(self, value):
        for make in (lambda: dcbm(value), lambda: Dcbm.on_cpu(value)):
            with pytest.raises(InvalidInput, match="from 1 to 16") as caught:
                make()
            assert repr(value) in str(caught.value)

    def test_refuses_other_rules(self):
        with pytest.raises(InvalidInput, match="'first' is not known; use one of: descriptor, last"):
            dcbm(completion="first")
        with pytest.raises(InvalidInput, match="timeout_ns 0 cannot be"):
            dcbm(timeout_ns=0)


class TestParameters:
    """The knobs take and give text, as under /sys/module/dcbm/parameters."""

    @pytest.fixture
    def knobs(self):
        world = World()
        yield DcbmParameters(dcbm(1)[0], world.machine.offload)

    def test_at_first(self, knobs):
        assert [knobs.read(name) for name in knobs.names] == [
            "N\n", "1\n", "compaction,memory_failure,memory_hotplug,syscall_or_cpuset,mempolicy_mbind,numa_misplaced,"
            "contig_range,longterm_pin,demotion,damon\n", "0\n", "0\n"]

    @pytest.mark.parametrize("text, value", [*((text, True) for text in ("1", "y\n", "Yes", "t", "on\n", "ON", "enabled")),
                                             *((text, False) for text in ("0", "n\n", "No", "f", "off\n", "oFF", "disabled"))])
    def test_boolean_words(self, text, value):
        assert parse_bool(text) is value

    @pytest.mark.parametrize("text", ["", "\n", "2", "o", "ok", " 1", "-1"])
    def test_no_boolean_words(self, knobs, text):
        with pytest.raises(InvalidInput, match="no boolean word"):
            knobs.write("offloading", text)
        assert not knobs.offloading

    def test_on_and_off(self, knobs):
        for word, on in (("1\n", True), ("on", True), ("n", False), ("0", False), ("y", True)):
            knobs.write("offloading", word)
            assert (knobs.read("offloading") == "Y\n") is on and (knobs.copy_offload.migrator is knobs.dcbm) is on

    def test_an_error_goes_to_the_writer(self, knobs):
        other = McCopy()
        knobs.copy_offload.register(other)
        with pytest.raises(Busy, match="registered already"):
            knobs.write("offloading", "1")
        assert knobs.read("offloading") == "N\n"
        knobs.write("offloading", "0")              # no change, so it does not touch the other one
        assert knobs.copy_offload.migrator is other
        knobs.copy_offload.unregister(other)
        knobs.write("offloading", "1")
        assert knobs.offloading

    @pytest.mark.parametrize("text, value", [("1", 1), ("16\n", 16), ("0x10", 16), ("010", 8), ("+3", 3)])
    def test_nr_dma_chan(self, knobs, text, value):
        knobs.write("nr_dma_chan", text)
        assert knobs.dcbm.nr_dma_chan == value and knobs.read("nr_dma_chan") == f"{value}\n"

    @pytest.mark.parametrize("text", ["0", "17", "-1", "", "two", " 2", "2 ", "2\n\n", "0x", "1.0", "++2"])
    def test_no_nr_dma_chan(self, knobs, text):
        with pytest.raises(InvalidInput, match="from 1 to 16"):
            knobs.write("nr_dma_chan", text)
        assert knobs.dcbm.nr_dma_chan == 1

    def test_reason_mask_is_kept_while_off(self, knobs):
        knobs.write("reason_mask", "demotion\n")
        assert knobs.read("reason_mask") == "demotion\n" and knobs.copy_offload.reasons == "none"
        knobs.write("offloading", "1")
        assert knobs.copy_offload.reasons == "demotion"
        knobs.write("reason_mask", "none,compaction")
        assert knobs.copy_offload.reasons == "compaction"       # at once
        with pytest.raises(InvalidInput, match="magic"):
            knobs.write("reason_mask", "magic")
        assert knobs.read("reason_mask") == "compaction\n"
        knobs.write("offloading", "0")
        assert knobs.read("reason_mask") == "compaction\n"

    def test_counters_count_and_are_reset_by_any_write(self, knobs):
        for name, other in (("folios_migrated", "folios_failures"), ("folios_failures", "folios_migrated")):
            knobs.dcbm.folios_migrated, knobs.dcbm.folios_failures = 7, 9
            kept = knobs.read(other)
            knobs.write(name, "anything")
            assert knobs.read(name) == "0\n" and knobs.read(other) == kept

    def test_what_there_is(self, knobs):
        for call in (lambda: knobs.read("threads"), lambda: knobs.write("threads", "1")):
            with pytest.raises(InvalidInput, match="no parameter 'threads'; it has offloading, nr_dma_chan"):
                call()


class TestUnsigned:
    """Numbers as kstrtoul() takes them."""

    @pytest.mark.parametrize("text, value", [("0", 0), ("00", 0), ("0x1F", 31), ("017", 15), ("7\n", 7), ("08", None),
                                             ("1_0", None), ("0x", None), ("", None), ("٣", None)])
    def test_numbers(self, text, value):
        assert parse_unsigned(text) == value
