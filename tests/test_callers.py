"""The kernel's own callers: how each asks migrate_pages(), and what it makes of the answer."""

import numpy as np
import pytest

from conftest import World
from offload.callers import (
    alloc_contig_migrate_range, compact_node, cpuset_migrate_mm, damon_migrate_folio_list, demote_folio_list, do_migrate_range,
    migrate_longterm_unpinnable_folios, migrate_misplaced_folio, soft_offline_folio,
)
from offload.errors import InvalidInput
from offload.migrate.pages import Event
from offload.mm.memmap import PG_hwpoison, PG_writeback
from offload.units import EACCES, EAGAIN, EBUSY, ENOMEM, PAGE_SIZE


@pytest.fixture
def world():
    return World(2048, 2048, 2048)


def asked(result):
    """Mode and reason of its calls."""
    return {(call.mode.name, call.reason.trace_name) for call in result.calls}


def interrupt(*args, **options):
    raise KeyboardInterrupt


class TestCompaction:
    """Folios go from the bottom of the node to its top, into blocks that compaction holds for itself."""

    @staticmethod
    def world(nr=70, order=0, pages=2048, largest=3, **options):
        """A world whose first node has ``nr`` folios at its bottom and no free block above order ``largest``."""
        world = World(pages, 64)
        _, pfns = world.map(nr, order, **options)
        world.machine.fragment(0, largest)
        world.machine.lru_add_drain()
        return world, pfns

    @staticmethod
    def succeeded(result):
        return sum(call.stats["nr_succeeded"] for call in result.calls)

    def test_all(self):
        world, pfns = self.world()
        free = world.machine.free_pages(0)
        result = compact_node(world.machine, 0)
        assert result.status == "complete" and asked(result) == {("MIGRATE_SYNC", "compaction")}
        assert [call.stats["nr_succeeded"] for call in result.calls] == [32, 32, 6]
        start = world.machine.mem.nodes.start_pfn[0]
        _, address, content = world.expected[0]
        now = world.machine.folios_of(world.process, address, len(content)) - start
        assert len(set(now)) == 70 and now.min() == 3 * 512 + 1 and now.max() < 3 * 512 + 80, "the bottom of the highest pageblock"
        assert world.machine.free_pages(0) == free and world.machine.free_pages(1) == 64
        world.check()
        world.machine.defragment(0)
        world.check()

    def test_until_there_is_a_block(self):
        world, _ = self.world(64, largest=3)
        result = compact_node(world.machine, 0, order=5, mode="MIGRATE_ASYNC")
        assert result.status == "success" and asked(result) == {("MIGRATE_ASYNC", "compaction")}
        assert self.succeeded(result) == 32
        assert compact_node(world.machine, 0, order=5).calls == ()
        world.check()

    @pytest.mark.parametrize("order, moved", [(2, 0), (3, 160)])
    def test_folios_as_large_as_what_is_wanted_stay(self, order, moved):
        world, _ = self.world(40, 2, largest=1 if order == 2 else 2)
        world.machine.fragment(0, 1)
        result = compact_node(world.machine, 0, order=order)
        assert (self.succeeded(result) > 0) == (moved > 0)
        world.check()

    def test_a_large_folio_takes_a_large_block(self):
        world, _ = self.world(20, 2, largest=8)
        result = compact_node(world.machine, 0)
        assert self.succeeded(result) == 80 and sum(c.stats["nr_split"] for c in result.calls) == 0
        world.check()

    def test_or_is_split(self):
        """Only single pages are free at the top."""
        world, _ = self.world(20, 2, largest=0)
        result = compact_node(world.machine, 0)
        assert self.succeeded(result) == 80 and sum(c.stats["nr_split"] for c in result.calls) == 20
        world.check()

    def test_pageblocks_that_are_free_are_left_alone(self):
        world = World(2048)
        world.map(70)
        world.machine.lru_add_drain()
        result = compact_node(world.machine, 0)
        assert result.status == "complete" and [call.rc for call in result.calls] == [-ENOMEM]
        assert world.machine.free_blocks(0)[9:] == [1, 1]
        world.check()

    def test_no_room(self):
        world, pfns = self.world(900)
        world.process.mmap(PAGE_SIZE * (world.machine.free_pages(0) - 40))
        result = compact_node(world.machine, 0)
        assert result.status == "complete" and result.calls[-1].rc == -ENOMEM and self.succeeded(result) == 40
        world.check()

    def test_unused_destinations_return(self):
        world, pfns = self.world()
        for pfn in pfns[::3]:
            world.surround(pfn, refs=1, refs_gone_after=100)
        world.folios.page_flags[pfns[1]] |= PG_writeback
        free = world.machine.free_pages(0)
        result = compact_node(world.machine, 0, mode="MIGRATE_ASYNC")
        assert self.succeeded(result) == 70 - 24 - 1 and world.machine.free_pages(0) == free
        world.folios.page_flags[pfns[1]] &= ~PG_writeback
        world.check()

    def test_returned_ones_are_used_again(self):
        """A page-cache folio with an unexplained reference is isolated, fails, and its destination is not lost."""
        world = World(2048)
        _, pfns = world.map(40, file=world.machine.file("160K"), shared=True)
        world.machine.fragment(0, 3)
        world.machine.lru_add_drain()
        for pfn in pfns[::2]:
            world.surround(pfn, refs=1)
        free = world.machine.free_pages(0)
        result = compact_node(world.machine, 0)
        assert self.succeeded(result) == 20 and sum(c.targets["returned"] for c in result.calls) > 20
        assert world.machine.free_pages(0) == free
        world.check()

    @pytest.mark.parametrize("mode, isolated", [("MIGRATE_ASYNC", 4), ("MIGRATE_SYNC_LIGHT", 4), ("MIGRATE_SYNC", 5)])
    def test_writeback_is_waited_for_or_passed_over(self, mode, isolated):
        world = World(2048)
        _, pfns = world.map(5, file=world.machine.file("20K"), shared=True)
        world.machine.fragment(0, 3)
        world.surround(pfns[2], writeback=1)
        assert compact_node(world.machine, 0, gfp_fs=False).calls == ()
        result = compact_node(world.machine, 0, mode=mode)
        assert self.succeeded(result) == isolated and len(result.calls[0].left) == 0

    @pytest.mark.parametrize("mode, aops, moved", [
        ("MIGRATE_ASYNC", "none", 0), ("MIGRATE_ASYNC", "filemap", 1), ("MIGRATE_SYNC_LIGHT", "none", 0), ("MIGRATE_SYNC", "none", 0)])
    def test_dirty(self, mode, aops, moved):
        """A dirty folio whose file system cannot migrate is not even isolated, unless the caller would wait for anything."""
        world = World(2048)
        _, pfns = world.map(1, file=world.machine.file("4K", aops=aops), shared=True)
        world.machine.fragment(0, 3)
        world.dirty(pfns[0])
        world.machine.mem.nodes.nr_file_dirty[0] = 1
        result = compact_node(world.machine, 0, mode=mode)
        assert self.succeeded(result) == moved and len(result.calls) == (moved or mode == "MIGRATE_SYNC")

    @pytest.mark.parametrize("mlock, moved", [(False, 1), (True, 0)])
    def test_inaccessible(self, mlock, moved):
        world = World(2048)
        file = world.machine.file("4K")
        world.map(1, file=file, shared=True, mlock=mlock)
        world.machine.fragment(0, 3)
        world.machine.mem.mappings.inaccessible[file.mapping] = 1
        assert len(compact_node(world.machine, 0).calls) == moved
        world.machine.mem.mappings.inaccessible[file.mapping] = 0
        world.check()

    def test_pinned_and_unevictable(self):
        world = World(2048)
        _, pinned = world.map(2)
        world.map(2, mlock=True)
        world.machine.fragment(0, 3)
        world.pin(pinned[0])
        result = compact_node(world.machine, 0, unevictable=False)
        assert self.succeeded(result) == 1 and len(result.calls) == 1
        assert self.succeeded(compact_node(world.machine, 0)) == 2
        world.check()

    @pytest.mark.parametrize("step", ["unmapped", "moved"])
    def test_interrupted(self, step):
        world, _ = self.world()
        free = world.machine.free_pages(0)
        with pytest.raises(KeyboardInterrupt):
            compact_node(world.machine, 0, events=[Event(step, interrupt)])
        assert world.machine.free_pages(0) == free
        world.check()

    def test_interrupted_between(self, monkeypatch):
        world, _ = self.world()
        monkeypatch.setattr(world.machine, "migrate_isolated", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compact_node(world.machine, 0)
        world.check()


class TestNumaFault:
    def test_moves(self, world):
        for order in (0, 4, 9):
            address, _ = world.map(1, order)
            world.machine.lru_add_drain()
            result = migrate_misplaced_folio(world.machine, world.process, address + 5, 1)
            assert result.ret == 0 and asked(result) == {("MIGRATE_ASYNC", "numa_misplaced")}
            assert world.where(address, 1, order) == [1]
            assert migrate_misplaced_folio(world.machine, world.process, address, 1).calls == ()
        world.check()

    def test_not_on_the_lru_yet(self, world):
        address, _ = world.map(1)
        assert migrate_misplaced_folio(world.machine, world.process, address, 1).ret == -EAGAIN
        world.check()

    def test_shared_text(self, world):
        file = world.machine.file("16K")
        text = world.process.mmap("16K", file=file, prot="rx")
        world.machine.lru_add_drain()
        assert migrate_misplaced_folio(world.machine, world.process, text, 1).ret == 0
        other = world.machine.process()
        other.mmap("16K", file=file, prot="rx")
        result = migrate_misplaced_folio(world.machine, world.process, text + PAGE_SIZE, 1)
        assert (result.ret, result.calls) == (-EACCES, ())
        assert migrate_misplaced_folio(world.machine, other, other._starts[0] + PAGE_SIZE, 1).ret == -EACCES
        data = world.process.mmap("16K", file=file, prot="r")
        assert migrate_misplaced_folio(world.machine, world.process, data + PAGE_SIZE, 1).ret == 0
        world.check()

    def test_dirty_file(self, world):
        address, pfns = world.map(1, file=world.machine.file("4K"), shared=True)
        world.machine.lru_add_drain()
        world.dirty(pfns[0])
        assert migrate_misplaced_folio(world.machine, world.process, address, 1).ret == -EAGAIN

    def test_dirty_shmem(self, world):
        address, pfns = world.map(1, file=world.machine.file("4K", kind="shmem"), shared=True)
        world.machine.lru_add_drain()
        world.dirty(pfns[0])
        assert migrate_misplaced_folio(world.machine, world.process, address, 1).ret == 0

    def test_no_room(self):
        world = World(2048, 512)
        huge, _ = world.map(1, 9)
        result = migrate_misplaced_folio(world.machine, world.process, huge, 1)
        assert (result.ret, result.calls) == (-EAGAIN, ())
        world.check()

    def test_no_block_of_the_size(self):
        """A folio that a NUMA fault moves is not split."""
        world = World(2048, 1024)
        world.machine.fragment(1, 3)
        huge, _ = world.map(1, 9)
        result = migrate_misplaced_folio(world.machine, world.process, huge, 1)
        assert result.ret == -EAGAIN and result.calls[0].rc == -ENOMEM and world.where(huge, 1, 9) == [0]
        world.check()

    def test_stays(self, world):
        address, pfns = world.map(1)
        world.machine.lru_add_drain()
        world.pin(pfns[0])
        result = migrate_misplaced_folio(world.machine, world.process, address, 1)
        assert result.ret == -EAGAIN and result.calls[0].rc == 1
        world.check()

    def test_nothing_there(self, world):
        address = world.process.mmap("4K", populate=False)
        with pytest.raises(InvalidInput, match="no page is mapped"):
            migrate_misplaced_folio(world.machine, world.process, address, 1)


class TestDemotion:
    def test_falls_back_to_the_nodes_allowed(self):
        world = World(64, 2, 3, 64)
        address, pfns = world.map(6)
        world.pin(pfns[0])
        result = demote_folio_list(world.machine, pfns, 1, (1, 2))
        assert result.ret == 5 and asked(result) == {("MIGRATE_ASYNC", "demotion")}
        assert sorted(world.where(address, 6)) == [0, 1, 1, 2, 2, 2]
        world.check()

    def test_nowhere_else(self):
        world = World(64, 2, 64)
        address, pfns = world.map(4)
        result = demote_folio_list(world.machine, pfns, 1)
        assert result.ret == 2 and result.calls[0].rc == -ENOMEM and world.where(address, 4) == [1, 1, 0, 0]
        world.check()

    def test_what_cannot_be_isolated_is_passed_over(self, world):
        address, pfns = world.map(3)
        result = demote_folio_list(world.machine, [pfns[0], pfns[0], pfns[2], 5], 1)
        assert result.ret == 2 and world.where(address, 3) == [1, 0, 1]
        assert demote_folio_list(world.machine, [], 1).ret == 0
        world.check()

    def test_interrupted(self, world, monkeypatch):
        address, pfns = world.map(3)
        with pytest.raises(KeyboardInterrupt):
            demote_folio_list(world.machine, pfns, 1, events=[Event("copied", interrupt)])
        world.check()
        monkeypatch.setattr(world.machine, "migrate_isolated", interrupt)
        world.machine.lru_add_drain()
        with pytest.raises(KeyboardInterrupt):
            demote_folio_list(world.machine, world.machine.folios_of(world.process, address, 3 * PAGE_SIZE), 2)
        world.check()


class TestDamon:
    def test_moves(self):
        world = World(64, 2, 64)
        address, pfns = world.map(4)
        world.pin(pfns[3])
        result = damon_migrate_folio_list(world.machine, pfns, 1)
        assert result.ret == 3 and asked(result) == {("MIGRATE_ASYNC", "damon")}
        assert world.where(address, 4) == [1, 1, 2, 0]
        world.check()

    def test_those_that_are_there_stay(self, world):
        there = world.pfns(2, nid=1)
        result = damon_migrate_folio_list(world.machine, [*there, *world.pfns(1)], 1)
        assert result.ret == 1 and world.folios.refcount[there].tolist() == [1, 1]
        world.check()


class TestContigRange:
    def test_clears(self, world):
        address, pfns = world.map(3)
        result = alloc_contig_migrate_range(world.machine, pfns)
        assert result.ret == 0 and asked(result) == {("MIGRATE_SYNC", "contig_range")} and len(result.calls) == 1
        assert not np.isin(world.machine.folios_of(world.process, address, 3 * PAGE_SIZE), pfns).any()
        world.check()

    def test_five_tries(self, world):
        _, pfns = world.map(3)
        world.pin(pfns[1])
        result = alloc_contig_migrate_range(world.machine, pfns)
        assert (result.ret, len(result.calls)) == (-EBUSY, 5)
        assert [call.left.tolist() for call in result.calls] == [[pfns[1]]] * 5
        assert world.machine.mem.sys.lru_disabled[0] == 0
        world.check()

    def test_goes_at_the_second(self, world):
        _, pfns = world.map(3)
        world.surround(pfns[1], refs=1, refs_gone_after=12)
        result = alloc_contig_migrate_range(world.machine, pfns)
        assert (result.ret, len(result.calls)) == (0, 2)
        world.check()

    def test_no_room(self):
        world = World(64, 64)
        _, pfns = world.map(4)
        world.process.mmap("112K")
        world.process.mmap("384K", populate=True)
        result = alloc_contig_migrate_range(world.machine, pfns)
        assert (result.ret, len(result.calls)) == (-ENOMEM, 1) or world.machine.free_pages(0) + world.machine.free_pages(1)
        world.check()

    def test_interrupted(self, world):
        _, pfns = world.map(3)
        world.pin(pfns[1])
        moved = []

        def second_time(step, pfn):
            moved.append(pfn)
            if len(moved) == 30:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            alloc_contig_migrate_range(world.machine, pfns, events=[Event("unmap", second_time)])
        world.check()


class TestOffline:
    @pytest.mark.parametrize("room, where", [((64, 64, 64), [1] * 3), ((64, 1, 64), [1, 2, 2])])
    def test_other_nodes_first(self, room, where):
        world = World(*room)
        address, pfns = world.map(3)
        result = do_migrate_range(world.machine, pfns)
        assert result.ret == 0 and asked(result) == {("MIGRATE_SYNC", "memory_hotplug")}
        assert world.where(address, 3) == where
        world.check()

    def test_the_only_node(self):
        world = World(64, 0)
        address, pfns = world.map(3)
        assert do_migrate_range(world.machine, pfns).ret == 0
        assert not np.isin(world.machine.folios_of(world.process, address, 3 * PAGE_SIZE), pfns).any()
        world.check()

    def test_stays(self, world):
        _, pfns = world.map(3)
        world.pin(pfns[0])
        assert do_migrate_range(world.machine, pfns).ret == 1
        assert do_migrate_range(world.machine, []).ret == 0
        world.check()


class TestSoftOffline:
    def test_the_page_is_kept_for_ever(self, world):
        address, pfns = world.map(2)
        free = world.machine.free_pages(0)
        result = soft_offline_folio(world.machine, pfns[0])
        assert result.ret == 0 and asked(result) == {("MIGRATE_SYNC", "memory_failure")}
        assert world.folios.page_flags[pfns[0]] & PG_hwpoison and world.folios.refcount[pfns[0]] == 1
        assert world.machine.free_pages(0) == free - 1 and world.where(address, 2) == [0, 0]
        world.check()
        assert soft_offline_folio(world.machine, pfns[0]).ret == -EBUSY

    def test_stays(self, world):
        _, pfns = world.map(2)
        world.pin(pfns[0])
        result = soft_offline_folio(world.machine, pfns[0])
        assert result.ret == -EBUSY and result.calls[0].rc == 1
        assert soft_offline_folio(world.machine, world.map(1, 4)[1][0]).calls == ()
        world.check()

    def test_no_room(self):
        world = World(2)
        _, pfns = world.map(2)
        assert soft_offline_folio(world.machine, pfns[0]).ret == -ENOMEM
        world.check()


class TestLongtermPin:
    def test_pin_again(self, world):
        address, pfns = world.map(2)
        result = migrate_longterm_unpinnable_folios(world.machine, pfns)
        assert result.ret == -EAGAIN and asked(result) == {("MIGRATE_SYNC", "longterm_pin")}
        assert migrate_longterm_unpinnable_folios(world.machine, []).ret == 0
        world.check()

    def test_stays(self, world):
        _, pfns = world.map(2)
        world.pin(pfns[0])
        result = migrate_longterm_unpinnable_folios(world.machine, pfns)
        assert result.ret == -ENOMEM and result.calls[0].rc == 1
        world.check()


class TestCpuset:
    def test_shared_pages_too_and_nobody_asks(self):
        world = World(64, 64, 64)
        address, pfns = world.map(3)
        second, _ = world.map(2, nid=1)
        world.process.fork()
        world.surround(pfns[1], refs=1)
        result = cpuset_migrate_mm(world.machine, world.process, [0, 1], [1, 2])
        assert result.ret == 0 and asked(result) == {("MIGRATE_SYNC", "syscall_or_cpuset")}
        assert world.where(address, 3) == [1, 0, 1] and world.where(second, 2) == [2, 2]
        world.check()
