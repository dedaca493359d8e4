"""hugetlb: the loop of its own that migrates it, its pools, its mappings, and the checks of its books."""

import numpy as np
import pytest

from conftest import World, random_bytes
from offload.errors import BadAddress, BrokenInvariant, InvalidInput, OutOfMemory, WouldHang
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.migrate.call import TargetControl
from offload.migrate.pages import Event
from offload.migrators.mc_copy import McCopy
from offload.mm.memmap import (
    ALLOC_FAIL, OTHERS_FOREVER, OTHERS_UNTIL_WAIT, PG_dirty, PG_hugetlb, PG_hugetlb_migratable, PG_hugetlb_subpool,
    PG_hugetlb_temporary, PG_hugetlb_unsupported, PG_hwpoison,
)
from offload.syscalls import MPOL_MF_MOVE, MPOL_MF_STRICT, sys_mbind, sys_migrate_pages, sys_move_pages
from offload.units import EACCES, EBUSY, EIO, ENOMEM

HUGE = 2 << 20
NO_THP = {"nr_thp_succeeded": 0, "nr_thp_failed": 0, "nr_thp_split": 0, "nr_split": 0}


class HugeWorld(World):
    """A World whose map() gives huge pages."""

    def __init__(self, *hugepages, pages=4096, nr=None, **fields):
        hugepages = hugepages or (0, 0)
        self.machine = Machine(MachineConfig(nodes=tuple(NodeConfig(pages, hugepages=one) for one in hugepages), poison=True, **fields))
        self.process = self.machine.process()
        self.expected = []

    def huge(self, nr=1, process=None, **options):
        """Map ``nr`` huge pages of random bytes: (address, head pfns)."""
        process = process or self.process
        address = process.mmap(nr * HUGE, hugetlb=True, **options)
        content = random_bytes(nr * HUGE, len(self.expected))
        process.write(address, content)
        self.expected.append((process, address, content))
        return address, self.machine.folios_of(process, address, nr * HUGE)

    def pools(self, name="nr"):
        return self.machine.mem.nodes[f"{name}_hugepages"].tolist()


@pytest.fixture
def huge():
    return HugeWorld()


def counts(result):
    """(rc, base pages moved, base pages failed, targets allocated, returned); the counters of THPs must be 0."""
    assert NO_THP.items() <= result.stats.items()
    return (result.rc, result.stats["nr_succeeded"], result.stats["nr_failed_pages"], result.targets["allocated"],
            result.targets["returned"])


class TestLoop:
    """migrate_hugetlbs(): ten passes before anything else on the list."""

    @pytest.mark.parametrize("mode", ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC"))
    def test_plain(self, huge, mode):
        _, pfns = huge.huge(3)
        result = huge.migrate(pfns, mode=mode)
        assert counts(result) == (0, 1536, 0, 3, 0)
        assert result.copies == {"folios": 3, "batched": 0, "discarded": 0}
        assert result.copied_bytes == result.moved_bytes == 3 * HUGE
        assert result.nr_batches == result.tlb_flushes == 1         # of the one batch, which is empty
        assert huge.where(huge.expected[0][1], 3, 9) == [1, 1, 1]
        huge.check()

    def test_before_everything_else(self, huge):
        _, small = huge.map(2)
        _, pfns = huge.huge()
        order = []
        huge.migrate([small[0], pfns[0], small[1]], events=[Event("unmap", lambda step, pfn: order.append(pfn))])
        assert order == [pfns[0], small[0], small[1]]
        huge.check()

    def test_given_up_after_ten_passes(self, huge):
        _, pfns = huge.huge(2)
        _, small = huge.map()
        huge.surround(pfns[0], refs=1)
        result = huge.migrate([small[0], *pfns])
        assert counts(result) == (1, 513, 512, 12, 10)
        assert result.left.tolist() == [pfns[0]]
        huge.check()

    def test_retried_ones_do_not_count_pages_of_a_batch(self, huge):
        # 512 base pages fill a batch; the hugetlb folio between them is moved to the list of those given back.
        _, small = huge.map(600)
        _, pfns = huge.huge()
        huge.surround(pfns[0], refs=1)
        result = huge.migrate([*small[:511], pfns[0], *small[511:]])
        assert result.nr_batches == 2 and counts(result)[:3] == (1, 600, 512)
        huge.check()

    def test_reference_that_goes(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], refs=1, refs_gone_after=4)
        assert counts(huge.migrate(pfns)) == (0, 512, 0, 5, 4)
        huge.check()

    def test_reference_of_the_flush(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], refs=2, refs_from_batch_copy=1, refs_gone_after=1)
        assert counts(huge.migrate(pfns)) == (0, 512, 0, 2, 1)
        huge.check()

    def test_no_memory_ends_the_call(self, huge):
        # The retried folio counts again when the next one ends the call: nr + retry_pages.
        _, pfns = huge.huge(3)
        _, small = huge.map()
        huge.surround(pfns[0], refs=1)
        huge.surround(pfns[1], alloc=ALLOC_FAIL)
        result = huge.migrate([small[0], *pfns])
        assert counts(result) == (-ENOMEM, 0, 1024, 2, 1)
        assert result.left.tolist() == [small[0], *pfns]
        huge.check()

    def test_no_memory_after_success_and_failure(self, huge):
        _, pfns = huge.huge(3)
        huge.folios.page_flags[pfns[0]] |= PG_hugetlb_unsupported
        huge.surround(pfns[2], alloc=ALLOC_FAIL)
        result = huge.migrate(pfns)
        assert counts(result) == (-ENOMEM, 512, 1024, 2, 0)
        assert result.left.tolist() == [pfns[0], pfns[2]]
        huge.check()

    def test_unsupported_size(self, huge):
        _, pfns = huge.huge()
        _, small = huge.map()
        huge.folios.page_flags[pfns[0]] |= PG_hugetlb_unsupported
        result = huge.migrate([*pfns, *small])
        assert counts(result) == (1, 1, 512, 1, 0)
        huge.check()

    def test_empty_list_has_no_batch_of_hugetlb(self, huge):
        assert huge.migrate([]).rc == 0

    def test_one_of_many_is_left(self, huge):
        """The return value counts folios, hugetlb and others together."""
        _, pfns = huge.huge(2)
        _, small = huge.map(2)
        huge.surround(pfns[1], refs=1)
        huge.surround(small[0], refs=1)
        result = huge.migrate([*pfns, *small])
        assert counts(result)[:3] == (2, 513, 513)
        assert result.left.tolist() == [pfns[1], small[0]]
        huge.check()

    def test_no_node_counter_moves(self, huge):
        _, pfns = huge.huge(2)
        huge.surround(pfns[1], refs=1)
        names = [name for name in huge.machine.mem.nodes.dtype.names if name.startswith(("nr_iso", "nr_lru", "nr_anon", "nr_file"))]
        assert names
        before = huge.machine.mem.nodes[names].copy()
        seen = []
        result = huge.migrate(pfns, events=[Event("unmapped", lambda step, pfn: seen.append(huge.machine.mem.nodes[names].copy()))])
        assert len(seen) == 11 and all((one == before).all() for one in (*seen, huge.machine.mem.nodes[names]))
        assert result.stats["nr_succeeded"] == 512

    def test_never_through_the_hatch(self, huge):
        _, pfns = huge.huge(2)
        with huge.machine.migrator(McCopy()):
            result = huge.migrate(pfns)
        assert result.copies == {"folios": 2, "batched": 0, "discarded": 0}
        huge.check()

    @pytest.mark.parametrize("reason", ("demotion", "memory_failure"))
    def test_reasons_do_not_matter_to_the_source(self, huge, reason):
        """Its isolation reference is dropped in all of them."""
        _, pfns = huge.huge()
        huge.migrate(pfns, reason=reason)
        assert huge.folios.refcount[pfns[0]] == 0
        huge.check()


class TestAttempt:
    """One attempt at one folio."""

    def test_freed(self, huge):
        address, pfns = huge.huge(2)
        isolated = huge.machine.isolate(pfns)
        huge.process.munmap(address, 2 * HUGE)
        huge.expected.clear()
        result = huge.machine.migrate_isolated(isolated, 1, mode="MIGRATE_ASYNC", reason="compaction")
        assert counts(result) == (0, 1024, 0, 0, 0) and not huge.folios.refcount[pfns].any()
        huge.check()

    @pytest.mark.parametrize("mode, expected", (
        ("MIGRATE_ASYNC", (1, 0, 512, 10, 10)), ("MIGRATE_SYNC_LIGHT", (1, 0, 512, 10, 10)), ("MIGRATE_SYNC", (0, 512, 0, 4, 3))))
    @pytest.mark.parametrize("pf_memalloc", (False, True))
    def test_locked(self, huge, mode, expected, pf_memalloc):
        """Waits from the fourth pass, in MIGRATE_SYNC only, PF_MEMALLOC or not."""
        _, pfns = huge.huge()
        huge.surround(pfns[0], lock=OTHERS_UNTIL_WAIT)
        assert counts(huge.migrate(pfns, mode=mode, pf_memalloc=pf_memalloc)) == expected

    def test_locked_for_ever(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], lock=OTHERS_FOREVER)
        with pytest.raises(WouldHang, match=str(pfns[0])) as raised:
            huge.migrate(pfns, mode="MIGRATE_SYNC")
        assert counts(raised.value.result) == (1, 0, 512, 10, 10)

    def test_subpool_without_mapping(self, huge):
        _, pfns = huge.huge()
        huge.folios.page_flags[pfns[0]] |= PG_hugetlb_subpool
        assert counts(huge.migrate(pfns, mode="MIGRATE_SYNC")) == (1, 0, 512, 1, 1)
        huge.check()

    def test_pinned(self, huge):
        _, pfns = huge.huge()
        huge.pin(pfns[0])
        assert counts(huge.migrate(pfns, mode="MIGRATE_SYNC")) == (1, 0, 512, 10, 10)
        huge.check()

    @pytest.mark.parametrize("take, give", [("pin", "unpin"), ("get", "put")])
    def test_a_base_page_of_it_is_taken(self, huge, take, give):
        """GUP takes base pages, whatever maps them; the huge page stays as long as somebody has one."""
        address, (pfn,) = huge.huge()
        before = huge.folios.refcount[pfn]
        getattr(huge.process, take)(address + 5 * 4096, 2 * 4096)
        assert huge.folios.refcount[pfn] == before + 2 and huge.folios.pincount[pfn] == 2 * (take == "pin")
        assert huge.migrate([pfn]).rc == 1
        getattr(huge.process, give)(address + 5 * 4096, 2 * 4096)
        assert huge.migrate([pfn]).rc == 0
        with pytest.raises(InvalidInput, match="not made of pages"):
            getattr(huge.process, take)(address + 1, 4096)
        huge.check()

    def test_unreadable(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], copy_error=1)
        result = huge.migrate(pfns, mode="MIGRATE_SYNC")
        assert counts(result) == (1, 0, 512, 1, 1) and result.left.tolist() == pfns.tolist()
        huge.check()

    @pytest.mark.parametrize("when", ("before", "after_unmap"))
    def test_poisoned_is_refused_by_mm_next(self, when):
        huge = HugeWorld(kernel="mm-next")
        _, pfns = huge.huge()
        if when == "before":
            huge.folios.page_flags[pfns[0]] |= PG_hwpoison
        else:
            huge.surround(pfns[0], poisoned_after_unmap=1)
        result = huge.migrate(pfns, mode="MIGRATE_SYNC")
        assert counts(result) == (1, 0, 512, 1, 1) and result.copies["folios"] == 0
        huge.check()

    @pytest.mark.parametrize("kernel", ("7.3", "6.12"))
    def test_poisoned_leaves_hwpoison_entries_elsewhere(self, kernel):
        huge = HugeWorld(1, 0, kernel=kernel)
        address, pfns = huge.huge()
        child = huge.process.fork()
        huge.expected.clear()
        huge.folios.page_flags[pfns[0]] |= PG_hwpoison
        assert counts(huge.migrate(pfns)) == (0, 512, 0, 1, 0)
        for process in (huge.process, child, huge.process.fork()):
            with pytest.raises(BadAddress):
                process.read(address, 1)
            assert huge.machine.mem.mms.hugetlb_usage[process.mm] == 0
        huge.machine.validate()
        huge.process.munmap(address, HUGE)
        huge.machine.validate()

    def test_poisoned_later_moves_elsewhere(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], poisoned_after_unmap=1)
        assert counts(huge.migrate(pfns)) == (0, 512, 0, 1, 0)
        assert huge.folios.page_flags[pfns[0]] == PG_hwpoison and huge.machine.free_pages(0) == 4095
        huge.check()

    def test_dirty_goes_along(self, huge):
        address, pfns = huge.huge()
        huge.dirty(pfns[0])
        huge.migrate(pfns)
        assert huge.folios.page_flags[huge.machine.folios_of(huge.process, address, HUGE)[0]] & PG_dirty

    def test_all_mappings_follow(self, huge):
        address, pfns = huge.huge()
        children = [huge.process.fork(), huge.process.fork()]
        assert huge.folios.mapcount[pfns[0]] == 3
        huge.migrate(pfns)
        for process in (huge.process, *children):
            assert huge.machine.node_of(process, address) == 1
        assert huge.folios.mapcount[huge.machine.folios_of(huge.process, address, HUGE)[0]] == 3
        huge.check()

    def test_unmapped_meanwhile(self, huge):
        """The last process goes while the folio is unmapped: it moves all the same, and is freed."""
        address, pfns = huge.huge()
        huge.expected.clear()

        def zap(step, pfn):
            huge.machine._running = False
            huge.process.munmap(address, HUGE)
            huge.machine._running = True

        result = huge.migrate(pfns, events=[Event("unmapped", zap)])
        assert counts(result) == (0, 512, 0, 1, 0)
        assert huge.pools() == [0, 0] and huge.machine.free_pages(1) == 4096
        huge.check()

    def test_reference_after_the_copy(self, huge):
        """A private folio is not frozen; a file's is, and what was copied is thrown away."""
        for options, rc in (({}, 0), ({"shared": True}, 1)):
            _, pfns = huge.huge(**options)

            def take(step, pfn):
                huge.folios.refcount[pfn] += 1

            def drop(step, pfn):
                huge.folios.refcount[pfn] -= 1

            result = huge.migrate(pfns, events=[Event("copied", take), Event("undo", drop)])
            if rc == 0:
                huge.folios.refcount[pfns[0]] -= 1  # what was the source is held by the reference alone
                huge.expected.clear()
                assert result.rc == 0
                huge = HugeWorld()
            else:
                assert counts(result) == (1, 0, 512, 10, 10)
                assert result.copies == {"folios": 10, "batched": 0, "discarded": 10}
                huge.check()

    def test_events_in_order(self, huge):
        _, pfns = huge.huge()
        huge.surround(pfns[0], refs=1, refs_gone_after=1)
        steps = []
        names = ("unmap", "unmapped", "move", "copied", "moved", "undo", "move_failed", "flush")
        result = huge.migrate(pfns, events=[Event(name, lambda step, pfn: steps.append(step)) for name in names])
        assert result.rc == 0
        assert steps == ["unmap", "unmapped", "move", "undo", "unmap", "unmapped", "move", "copied", "moved", "flush"]

    @pytest.mark.parametrize("at", ("unmap", "unmapped", "move", "copied", "moved"))
    def test_event_that_raises(self, huge, at):
        """The folio in hand is finished, the rest left, nothing is lost."""
        _, pfns = huge.huge(3)
        _, small = huge.map()

        def fail(step, pfn):
            if pfn == pfns[1] or step == "moved":
                raise KeyError("stop")

        with pytest.raises(KeyError) as raised:
            huge.migrate([*pfns, *small], events=[Event(at, fail)])
        done = 1 if at in ("moved", "unmap") else 2
        # What an "unmap" event interrupts is taken up again, as everywhere.
        assert raised.value.result.stats["nr_succeeded"] in (512 * done, 512 * (done + 1))
        assert raised.value.result.left.tolist()[-1] == small[0]
        huge.check()


class TestFiles:
    """Shared mappings: folios in the page cache of a hugetlbfs file."""

    def test_moves(self, huge):
        address, pfns = huge.huge(2, shared=True)
        assert (huge.folios.refcount[pfns] == 513).all()
        child = huge.process.fork()
        for page in range(2):
            child.read(address + page * HUGE, 1)    # fork leaves entries of files to be faulted in
        result = huge.migrate(pfns)
        assert counts(result) == (0, 1024, 0, 2, 0)
        assert huge.machine.node_of(child, address + HUGE) == 1
        assert not huge.folios.refcount[pfns].any()
        huge.check()

    def test_two_processes_share(self, huge):
        file = huge.machine.hugetlb_file("4M")
        address, pfns = huge.huge(2, file=file, shared=True)
        other = huge.machine.process()
        there = other.mmap("2M", file=file, offset=HUGE, shared=True, hugetlb=True)
        assert other.read(there, HUGE) == huge.expected[0][2][HUGE:]
        huge.migrate(pfns)
        assert huge.machine.node_of(other, there) == 1
        other.write(there, b"new")
        assert huge.process.read(address + HUGE, 3) == b"new"

    def test_subpool_goes_along(self, huge):
        address, pfns = huge.huge(shared=True)
        huge.folios.page_flags[pfns[0]] |= PG_hugetlb_subpool
        assert huge.migrate(pfns).rc == 0
        assert huge.folios.page_flags[huge.machine.folios_of(huge.process, address, HUGE)[0]] & PG_hugetlb_subpool
        huge.check()

    def test_outlives_its_process(self, huge):
        file = huge.machine.hugetlb_file("2M")
        _, pfns = huge.huge(file=file, shared=True)
        huge.expected.clear()
        huge.process.exit()
        assert huge.folios.refcount[pfns[0]] == 512 and huge.migrate(pfns).stats["nr_succeeded"] == 512
        huge.machine.validate()


class TestPools:
    """What is free, surplus, temporary."""

    def test_faults_take_from_the_pool_first(self):
        world = HugeWorld(2, 0)
        assert world.pools("free") == [2, 0] and world.machine.free_pages(0) == 4096 - 1024
        address, _ = world.huge(3)
        assert (world.pools(), world.pools("free"), world.pools("surplus")) == ([3, 0], [0, 0], [1, 0])
        world.check()
        world.expected.clear()
        world.process.munmap(address, 3 * HUGE)
        assert (world.pools(), world.pools("free"), world.pools("surplus")) == ([2, 0], [2, 0], [0, 0])
        world.check()

    def test_move_to_an_empty_pool_moves_the_pool_page(self):
        world = HugeWorld(2, 0)
        _, pfns = world.huge(2)
        assert world.migrate(pfns).rc == 0
        assert (world.pools(), world.pools("free")) == ([0, 2], [0, 0])
        assert world.machine.free_pages(0) == 4096
        world.check()

    def test_move_to_a_pool_with_room(self):
        world = HugeWorld(1, 2)
        _, pfns = world.huge()
        assert world.migrate(pfns).rc == 0
        assert (world.pools(), world.pools("free")) == ([1, 2], [1, 1])
        world.check()

    def test_surplus_goes_along(self, huge):
        _, pfns = huge.huge(2)
        assert huge.pools("surplus") == [2, 0]
        huge.migrate(pfns[:1])
        assert (huge.pools(), huge.pools("surplus")) == ([1, 1], [1, 1])
        huge.check()

    def test_failed_move_leaves_no_trace(self):
        world = HugeWorld(1, 1)
        _, pfns = world.huge(2)
        assert (world.pools(), world.pools("free")) == ([1, 1], [0, 0])      # the other node's, before a surplus one
        world.surround(pfns[0], refs=1)
        world.migrate(pfns[:1])
        assert (world.pools(), world.pools("free")) == ([1, 1], [0, 0]) and world.machine.free_pages(1) == 4096 - 512
        world.check()

    def test_poisoned_pages_are_passed_over(self):
        world = HugeWorld(2, 0)
        first = int(world.machine.mem.nodes.hugepage_freelist[0])
        world.folios.page_flags[first] |= PG_hwpoison
        _, pfns = world.huge()
        assert pfns[0] != first and world.pools("free") == [1, 0]
        world.check()

    def test_no_room_for_the_pool(self):
        with pytest.raises(OutOfMemory, match="node 0 of 1024 pages has no room for 3 huge pages"):
            HugeWorld(3, 0, pages=1024)
        with pytest.raises(InvalidInput, match="hugepages -1"):
            NodeConfig(hugepages=-1)

    def test_dequeued_memory_is_poisoned_or_zero(self):
        world = HugeWorld(1, 0)
        address, pfns = world.huge()
        world.process.munmap(address, HUGE)
        address = world.process.mmap(HUGE, hugetlb=True, populate=False)
        assert not any(world.process.read(address, HUGE))
        assert world.machine.folios_of(world.process, address, HUGE)[0] == pfns[0]


class TestTargets:
    """alloc_hugetlb_folio_nodemask(): pools of the allowed nodes first, then fresh memory as far as the reason lets it."""

    @pytest.mark.parametrize("reason, falls_back", (
        ("memory_hotplug", True), ("memory_failure", True), ("syscall_or_cpuset", True), ("mempolicy_mbind", True),
        ("compaction", False), ("numa_misplaced", False), ("contig_range", False), ("longterm_pin", False), ("demotion", False),
        ("damon", False)))
    def test_fallback_by_reason(self, reason, falls_back):
        world = HugeWorld(0, 0, 0)
        address, pfns = world.huge()
        world.map(4096 - 511, nid=1)
        target = TargetControl(1, nmask=(1, 2))
        isolated = world.machine.isolate(pfns)
        result = world.machine.migrate_isolated(isolated, target, mode="MIGRATE_SYNC", reason=reason)
        assert result.rc == (0 if falls_back else -ENOMEM)
        assert world.machine.node_of(world.process, address) == (2 if falls_back else 0)
        world.machine.validate()

    def test_pools_of_other_nodes_are_used_whatever_the_reason(self):
        world = HugeWorld(1, 0, 1)
        address, pfns = world.huge()
        isolated = world.machine.isolate(pfns)
        assert world.machine.migrate_isolated(isolated, TargetControl(1, nmask=(1, 2)), mode="MIGRATE_SYNC", reason="compaction").rc == 0
        assert world.machine.node_of(world.process, address) == 2
        world.check()

    @pytest.mark.parametrize("reason", ("syscall_or_cpuset", "memory_hotplug"))
    def test_one_node_means_that_node(self, reason):
        world = HugeWorld(0, 0, 4)
        _, pfns = world.huge(nid=0)
        world.map(4096 - 511, nid=1)
        result = world.migrate(pfns, reason=reason)
        assert counts(result) == (-ENOMEM, 0, 512, 1, 0)

    def test_interleaved(self, huge):
        address, pfns = huge.huge(4)
        result = sys_mbind(huge.machine, huge.process, address, 4 * HUGE, "interleave", [0, 1], MPOL_MF_MOVE)
        assert result.ret == 0
        huge.check()


class TestSystemCalls:
    """move_pages(2), migrate_pages(2), mbind(2) with huge pages."""

    def test_move_pages(self, huge):
        address, _ = huge.huge(3)
        pages = [address, address + 5 * 4096, address + HUGE, address + 2 * HUGE + 411 * 4096]
        result = sys_move_pages(huge.machine, huge.process, None, pages, [1, 1, 1, 0], MPOL_MF_MOVE)
        assert result.ret == 0 and result.status.tolist() == [1, -EBUSY, 1, 0]
        assert sum(call.stats["nr_succeeded"] for call in result.calls) == 1024
        assert huge.where(address, 3, 9) == [1, 1, 0]
        huge.check()

    def test_shared_ones_stay(self, huge):
        address, _ = huge.huge()
        huge.process.fork()
        result = sys_move_pages(huge.machine, huge.process, None, [address], [1], MPOL_MF_MOVE)
        assert result.status.tolist() == [-EACCES]
        huge.check()

    def test_alloc_fail(self, huge):
        address, _ = huge.huge(2)
        result = sys_move_pages(huge.machine, huge.process, None, [address, address + HUGE], [1, 1], MPOL_MF_MOVE, alloc_fail=(9, 2, None))
        assert (result.ret, result.errno) == (-1, ENOMEM)
        assert huge.where(address, 2, 9) == [1, 0]
        huge.check()

    def test_migrate_pages(self, huge):
        address, _ = huge.huge(2)
        assert sys_migrate_pages(huge.machine, huge.process, None, 64, [0], [1], ).ret == 0
        assert huge.where(address, 2, 9) == [1, 1]
        huge.check()

    def test_mbind(self, huge):
        address, _ = huge.huge(2)
        assert sys_mbind(huge.machine, huge.process, address, 2 * HUGE, "bind", [1], MPOL_MF_MOVE).ret == 0
        assert huge.where(address, 2, 9) == [1, 1]
        huge.check()

    def test_mbind_preferred_may_fall_back_and_preferred_many_not(self):
        for policy, errno in (("preferred", 0), ("preferred_many", EIO)):
            world = HugeWorld(0, 0, 0)
            address, _ = world.huge()
            world.map(4096, nid=1)
            result = sys_mbind(world.machine, world.process, address, HUGE, policy, [1], MPOL_MF_MOVE | MPOL_MF_STRICT)
            assert result.errno == errno, policy


class TestProcesses:
    """Faults, forks and copies on write in hugetlb vmas."""

    def test_length_is_rounded_up(self, huge):
        address = huge.process.mmap(4096, hugetlb=True)
        assert address % HUGE == 0 and huge.process.read(address + HUGE - 1, 1) == b"\0"
        huge.machine.validate()

    def test_not_in_the_resident_set(self, huge):
        huge.huge(2)
        assert huge.process.rss_pages == 0 and huge.machine.mem.mms.hugetlb_usage[huge.process.mm] == 1024

    def test_copy_on_write(self, huge):
        address, (pfn,) = huge.huge()
        child = huge.process.fork()
        child.write(address, b"child")
        assert huge.machine.folios_of(child, address, HUGE)[0] != pfn
        assert child.read(address + 5, HUGE - 5) == huge.expected[0][2][5:]
        huge.process.write(address, huge.expected[0][2][:1])        # alone again: no copy
        assert huge.machine.folios_of(huge.process, address, HUGE)[0] == pfn
        huge.check()
        child.exit()
        huge.check()

    def test_read_maps_memory_and_write_reuses_it(self, huge):
        address = huge.process.mmap(HUGE, hugetlb=True, populate=False)
        assert not any(huge.process.read(address, 100))
        pfn = huge.machine.folios_of(huge.process, address, HUGE)[0]
        huge.process.write(address, b"x")
        assert huge.machine.folios_of(huge.process, address, HUGE)[0] == pfn
        huge.machine.validate()

    def test_pinned_is_copied_by_fork(self, huge):
        address, (pfn,) = huge.huge()
        huge.pin(pfn)
        child = huge.process.fork()
        assert huge.machine.folios_of(child, address, HUGE)[0] != pfn and huge.folios.mapcount[pfn] == 1
        assert child.read(address, HUGE) == huge.expected[0][2]
        huge.check()

    def test_no_memory(self):
        world = HugeWorld(0, 0, pages=512)
        with pytest.raises(OutOfMemory):
            world.huge(3)

    @pytest.mark.parametrize("options, message", (
        ({"mlock": True}, "never mlocked"), ({"address": 4096}, "multiples of 2097152"), ({"offset": 4096}, "multiples of 2097152")))
    def test_what_cannot_be(self, huge, options, message):
        with pytest.raises(InvalidInput, match=message):
            huge.process.mmap(HUGE, hugetlb=True, **options)

    def test_files(self, huge):
        file = huge.machine.hugetlb_file("2M")
        for options in ({"file": file, "hugetlb": True}, {"file": file, "shared": True},
                        {"file": huge.machine.file("2M"), "hugetlb": True, "shared": True}):
            with pytest.raises(InvalidInput, match="hugetlb"):
                huge.process.mmap(HUGE, **options)
        with pytest.raises(InvalidInput, match="multiple of 2 MiB"):
            huge.machine.hugetlb_file("1M")


class TestBooks:
    """validate() sees each kind of broken pool."""

    @pytest.fixture
    def books(self):
        world = HugeWorld(2, 1)
        world.huge(1)
        world.huge(1, shared=True)
        world.check()
        return world

    def broken(self, world, *words):
        with pytest.raises(BrokenInvariant) as raised:
            world.machine.validate()
        assert all(str(word) in str(raised.value) for word in words), raised.value

    @pytest.mark.parametrize("name", ("nr_hugepages", "free_hugepages"))
    def test_counts(self, books, name):
        books.machine.mem.nodes[name][1] += 1
        self.broken(books, name, "node 1")

    def test_surplus(self, books):
        books.machine.mem.nodes.surplus_hugepages[0] = 3
        self.broken(books, "surplus", "node 0")

    def test_lost_from_the_list(self, books):
        pfn = int(books.machine.mem.nodes.hugepage_freelist[1])
        books.machine.mem.nodes.hugepage_freelist[1] = 0
        self.broken(books, "free in the hugetlb pool of node 1", pfn)

    def test_list_goes_round(self, books):
        pfn = int(books.machine.mem.nodes.hugepage_freelist[1])
        books.folios.index[pfn] = pfn
        self.broken(books, "free in the hugetlb pool of node 1", pfn)

    def test_temporary(self, books):
        pfn = books.machine.folios_of(*books.expected[0][:2], HUGE)[0]
        books.folios.page_flags[pfn] |= PG_hugetlb_temporary
        self.broken(books, "temporary", pfn)

    def test_usage(self, books):
        books.machine.mem.mms.hugetlb_usage[books.process.mm] -= 512
        self.broken(books, "hugetlb_usage")

    def test_reference_of_an_isolated_one(self, books):
        pfn = books.machine.folios_of(*books.expected[0][:2], HUGE)[0]
        books.folios.page_flags[pfn] &= ~PG_hugetlb_migratable
        self.broken(books, "refcount", pfn)

    def test_used_but_free(self, books):
        pfn = int(books.machine.mem.nodes.hugepage_freelist[1])
        books.folios.page_flags[pfn] = 0
        self.broken(books, "exactly one place", pfn)

    def test_file_of_another_kind(self, books):
        pfn = books.machine.folios_of(*books.expected[1][:2], HUGE)[0]
        books.machine.mem.mappings.kind[books.folios.mapping[pfn]] = 1
        self.broken(books, "another kind", pfn)

    def test_flags_are_hugetlb_s(self, books):
        pfn = books.machine.folios_of(*books.expected[0][:2], HUGE)[0]
        assert books.folios.page_flags[pfn] & PG_hugetlb and books.folios.order[pfn] == 9


class TestSpeed:
    """A list without hugetlb folios does not look at them again."""

    def test_flag_stays_down(self, huge):
        huge.huge()
        pfns = huge.pfns(3)
        result = huge.migrate(pfns)
        assert np.array_equal(result.left, []) and result.stats["nr_succeeded"] == 3
        huge.check()
