"""migrate_pages(): what becomes of each kind of folio in each mode, batches, failures, retries; nothing is ever lost."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import World, on_duty
from offload.errors import InvalidInput, WouldHang
from offload.migrate import pages
from offload.migrate.call import STEPS
from offload.migrate.pages import Event
from offload.migrators.cpu_mt import CpuMt
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.memmap import (
    OTHERS_FOREVER, OTHERS_UNTIL_WAIT, PG_active, PG_dirty, PG_mlocked, PG_private, PG_referenced, PG_uptodate,
)
from offload.units import ENOMEM, PAGE_SIZE

MODES = ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC")
NO_STATS = dict.fromkeys(("nr_succeeded", "nr_failed_pages", "nr_thp_succeeded", "nr_thp_failed", "nr_thp_split", "nr_split"), 0)


def stats(**counters):
    return NO_STATS | counters


def put_private(world, pfn):
    folio = world.folios[pfn]
    folio.page_flags |= PG_private
    folio.private = 4711
    folio.refcount += 1


def file_folios(world, nr=1, order=0, kind="file"):
    return world.pfns(nr, order, file=world.machine.file(nr * PAGE_SIZE << order, kind=kind), shared=True)


# What stands in the folio's way, and per mode (moves?, targets allocated, returned).
FAILS_UNMAP = [(False, 10, 10)] * 3
FAILS_MOVE = [(False, 1, 1), (False, 2, 2), (False, 2, 2)]
OK = [(True, 1, 0)] * 3
OBSTACLES = {
    "idle": (lambda world, pfn: None, OK),
    "referenced": (lambda world, pfn: world.surround(pfn, refs=1), FAILS_MOVE),
    "locked": (lambda world, pfn: world.surround(pfn, lock=OTHERS_UNTIL_WAIT), [(False, 10, 10), (True, 4, 3), (True, 4, 3)]),
    "writeback": (lambda world, pfn: world.surround(pfn, writeback=OTHERS_UNTIL_WAIT),
                  [(False, 1, 1), (False, 2, 2), (True, 2, 1)]),
    "dirty": (lambda world, pfn: world.dirty(pfn), OK),
    "unreadable": (lambda world, pfn: world.surround(pfn, copy_error=1), FAILS_MOVE),
}


def locked_not_uptodate(world, pfn):
    world.surround(pfn, lock=OTHERS_UNTIL_WAIT)
    world.folios.page_flags[pfn] &= ~PG_uptodate


ANON_ONLY = {
    "pinned": (lambda world, pfn: world.pin(pfn), FAILS_UNMAP),
    "locked, being read": (locked_not_uptodate, [(False, 10, 10), (False, 10, 10), (True, 4, 3)]),
}
FILE_ONLY = {
    "pinned": (lambda world, pfn: world.pin(pfn), FAILS_MOVE),
    "private": (put_private, OK),
}
KINDS = {
    "anon": (lambda world, order: world.pfns(1, order), OBSTACLES | ANON_ONLY),
    "mlocked": (lambda world, order: world.pfns(1, order, mlock=True), {"idle": OBSTACLES["idle"]}),
    "file": (lambda world, order: file_folios(world, 1, order), {
        name: case for name, case in (OBSTACLES | FILE_ONLY).items() if name != "dirty"}),
    "shmem": (lambda world, order: file_folios(world, 1, order, "shmem"), {
        name: case for name, case in (OBSTACLES | FILE_ONLY).items() if name != "private"}),
}
MATRIX = [(kind, obstacle, order) for kind, (_, obstacles) in KINDS.items() for obstacle in obstacles
          for order in (0, 4, 9) if (kind, obstacle, order) != ("anon", "unreadable", 4)]


class TestMatrix:
    """A folio alone in the list: whether it moves, the counters, the targets, vmstat and the trace lines."""

    @pytest.mark.parametrize("mode", range(3), ids=MODES)
    @pytest.mark.parametrize("kind, obstacle, order", MATRIX)
    def test_alone(self, kind, obstacle, order, mode):
        world = World(1024, 1024)
        make, obstacles = KINDS[kind]
        hinder, outcomes = obstacles[obstacle]
        pfn, = make(world, order)
        world.machine.lru_add_drain()
        hinder(world, pfn)
        moves, allocated, returned = outcomes[mode]
        address = world.expected[0][1]
        nr, thp = 1 << order, int(order == 9)
        result = world.migrate([pfn], mode=MODES[mode], reason="demotion")

        assert (result.rc, result.left.tolist()) == ((0, []) if moves else (1, [pfn]))
        assert result.stats == (stats(nr_succeeded=nr, nr_thp_succeeded=thp) if moves else
                                stats(nr_failed_pages=nr, nr_thp_failed=thp))
        assert result.targets == {"allocated": allocated, "returned": returned}
        assert world.machine.vmstat == {
            "pgmigrate_success": nr * moves, "pgmigrate_fail": nr * (not moves), "thp_migration_success": thp * moves,
            "thp_migration_fail": thp * (not moves), "thp_migration_split": 0}
        assert result.trace == (
            f"mm_migrate_pages_start: mode={MODES[mode]} reason=demotion",
            f"mm_migrate_pages: nr_succeeded={nr * moves} nr_failed={nr * (not moves)} nr_thp_succeeded={thp * moves} "
            f"nr_thp_failed={thp * (not moves)} nr_thp_split=0 nr_split=0 mode={MODES[mode]} reason=demotion")
        assert result.moved_bytes == nr * PAGE_SIZE * moves
        assert result.copies["folios"] == moves and result.copied_bytes == nr * PAGE_SIZE * moves
        assert world.where(address) == [int(moves)]
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_locked_and_the_caller_reclaims(self, mode, world):
        pfn, = world.pfns()
        world.surround(pfn, lock=OTHERS_UNTIL_WAIT)
        result = world.migrate([pfn], mode=mode, pf_memalloc=True)
        assert (result.rc, result.targets) == (1, {"allocated": 10, "returned": 10})
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("order", [0, 3, 9])
    def test_freed_meanwhile(self, mode, order, world):
        address, pfns = world.map(1, order)
        world.machine.isolate(pfns)
        world.process.munmap(address, PAGE_SIZE << order)
        world.expected.clear()
        result = world.machine.migrate_isolated(pfns, 1, mode=mode, reason="compaction")
        assert (result.rc, result.targets) == (0, {"allocated": 0, "returned": 0})
        assert result.stats == stats(nr_succeeded=1 << order, nr_thp_succeeded=int(order == 9))
        assert world.machine.free_pages(0) == 2048 and result.moved_bytes == 0
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_truncated_with_private_data(self, mode, world):
        file = world.machine.file("4K")
        address, (pfn,) = world.map(1, file=file, shared=True)
        put_private(world, pfn)
        world.machine.isolate([pfn])
        world.process.munmap(address, PAGE_SIZE)
        world.expected.clear()
        mem = world.machine.mem
        mem.slots[mem.mappings.slots[file.mapping]] = 0
        mem.mappings.nrpages[file.mapping] -= 1
        mem.nodes.nr_file_pages[0] -= 1
        mem.nodes.nr_file_dirty[0] = 0
        mem.folios.refcount[pfn] -= 1
        mem.folios.mapping[pfn] = 0
        result = world.machine.migrate_isolated(np.array([pfn]), 1, mode=mode, reason="compaction")
        assert (result.rc, result.targets) == (0, {"allocated": 1, "returned": 1})
        assert result.stats == stats(nr_succeeded=1)
        world.check()


class TestReasons:
    """Some reasons change what the path does: memory failure keeps the source, longterm pin is patient."""

    def test_demotion_leaves_nr_isolated_to_its_caller(self, world):
        """Which Machine.migrate_pages() is, and lowers it; whoever isolates for himself has to."""
        pfns = world.pfns(3) + file_folios(world, 2)
        result = world.migrate(pfns[:1] + pfns[-1:], reason="demotion")
        assert result.rc == 0
        world.check()
        folios = world.machine.isolate(pfns[1:4])
        world.machine.migrate_isolated(folios, 1, mode="MIGRATE_ASYNC", reason="demotion")
        nodes = world.machine.mem.nodes
        assert (nodes.nr_isolated_anon.tolist(), nodes.nr_isolated_file.tolist()) == ([2, 0], [1, 0])
        nodes.nr_isolated_anon[0] = nodes.nr_isolated_file[0] = 0
        world.check()

    def test_memory_failure_keeps_the_source(self, world):
        pfn, = world.pfns()
        world.machine.lru_add_drain()
        result = world.migrate([pfn], reason="memory_failure")
        assert (result.rc, world.folios.refcount[pfn], world.folios.nid[pfn]) == (0, 1, 0)
        world.machine.mem.nodes.nr_isolated_anon[0] += 1
        world.machine.putback([pfn])
        world.machine.lru_add_drain()
        assert world.machine.free_pages(0) == 2048
        world.check()

    def test_longterm_pin_tries_a_split_again(self):
        world = World(256, 256)
        world.machine.fragment(1, 0)
        pfns = world.pfns(2, 3)
        world.surround(pfns[0], refs=1)
        result = world.migrate(pfns, reason="longterm_pin")
        assert (result.rc, result.left.tolist()) == (2, pfns[:1])
        assert result.stats == stats(nr_succeeded=8, nr_failed_pages=8, nr_split=1)
        assert result.targets == {"allocated": 10 + 1 + 8, "returned": 0}
        world.check()


class TestState:
    """A moved folio is what it was: flags, private data, dirtiness, place in its file, locked memory."""

    def test_flags(self, world):
        address, (pfn,) = world.map()
        world.machine.lru_add_drain()
        world.folios.page_flags[pfn] |= PG_referenced | PG_dirty | PG_active
        world.folios.cpupid[pfn] = 99
        world.migrate([pfn])
        dst, = world.machine.folios_of(world.process, address, 1)
        flags = PG_referenced | PG_dirty | PG_active | PG_uptodate
        assert world.folios.page_flags[dst] & flags == flags and world.folios.cpupid[dst] == 99
        world.check()

    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_mlocked(self, world, order):
        address, (pfn,) = world.map(1, order, mlock=True)
        assert world.migrate([pfn]).rc == 0
        world.machine.lru_add_drain()
        dst, = world.machine.folios_of(world.process, address, 1)
        assert world.folios.page_flags[dst] & PG_mlocked
        assert world.machine.mem.nodes.nr_mlock.tolist() == [0, 1 << order]
        assert world.machine.mem.nodes.nr_unevictable.tolist() == [0, 1 << order]
        world.check()

    @pytest.mark.parametrize("kind", ["file", "shmem"])
    def test_page_cache(self, world, kind):
        pfns = file_folios(world, 3, 2, kind)
        if kind == "file":
            put_private(world, pfns[1])
        assert world.migrate(pfns).rc == 0
        process, address, content = world.expected[0]
        dsts = world.machine.folios_of(process, address, len(content))
        nodes = world.machine.mem.nodes
        assert nodes.nr_file_pages.tolist() == [0, 12] and nodes.nr_file_mapped.tolist() == [0, 12]
        assert nodes.nr_shmem.tolist() == [0, 12 * (kind == "shmem")]
        assert nodes.nr_file_dirty.tolist() == [0, 12 * (kind == "file")]
        if kind == "file":
            assert world.folios.private[dsts].tolist() == [0, 4711, 0]
            world.folios.page_flags[dsts[1]] &= ~PG_private
            world.folios.refcount[dsts[1]] -= 1
        world.check()

    @pytest.mark.parametrize("order", [0, 3, 9])
    def test_mapped_by_several(self, order):
        world = World(4096, 2048)
        address, pfns = world.map(2, order)
        for _ in range(3):
            world.expected.append((world.process.fork(), address, world.expected[0][2]))
        result = world.migrate(pfns)
        assert result.rc == 0
        for process, _, _ in world.expected:
            assert world.where(address, 2, order, process) == [1, 1]
        world.check()

    def test_part_of_a_file_mapped(self, world):
        """A folio of which a mapping covers only some pages keeps them all."""
        file = world.machine.file("64K")
        address, pfns = world.map(1, 4, file=file, shared=True)
        part = world.process.mmap("8K", file=file, offset=3 * PAGE_SIZE, shared=True)
        world.expected.append((world.process, part, world.expected[0][2][3 * PAGE_SIZE:5 * PAGE_SIZE]))
        assert world.migrate(pfns).rc == 0
        assert world.where(part) == [1]
        world.check()

    def test_with_the_streaming_kernel(self):
        world = World(4096, 4096, copy_kernel="stream")
        pfns = [pfn for order in range(10) for pfn in world.pfns(2, order)]
        assert world.migrate(pfns, mode="MIGRATE_SYNC").copied_bytes == 2 * 1023 * PAGE_SIZE
        world.check()

    def test_within_the_node(self, world):
        pfns = world.pfns(4)
        result = world.migrate(pfns, nid=0)
        assert result.rc == 0
        world.check()


class TestBatches:
    """A batch closes with the folio with which its pages reach the limit."""

    @pytest.mark.parametrize("orders, batch_pages, batches", [
        ([0] * 511, 512, 1), ([0] * 512, 512, 1), ([0] * 513, 512, 2), ([9, 9], 512, 2), ([0, 9], 512, 1), ([9, 0], 512, 2),
        ([0] * 7, 3, 3), ([2, 2, 2], 5, 2), ([9] * 3, 1 << 18, 1), ([0] * 5, 1, 5),
    ])
    def test_cut(self, orders, batch_pages, batches):
        world = World(2048, 2048, batch_pages=batch_pages)
        pfns = []
        for order in sorted(set(orders), reverse=True):
            pfns.append((order, world.pfns(orders.count(order), order)))
        left = {order: list(them) for order, them in pfns}
        pfns = [left[order].pop(0) for order in orders]
        result = world.migrate(pfns)
        assert (result.rc, result.nr_batches, result.tlb_flushes) == (0, batches, batches)
        assert result.stats["nr_succeeded"] == sum(1 << order for order in orders)
        world.check()

    def test_the_folios_of_a_synchronous_call_first_go_together(self, world):
        pfns = world.pfns(4)
        world.pin(pfns[1])
        result = world.migrate(pfns, mode="MIGRATE_SYNC")
        assert (result.nr_batches, result.tlb_flushes) == (2, 2)
        assert result.left.tolist() == [pfns[1]]
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_an_empty_list(self, world, mode):
        result = world.migrate([], mode=mode)
        assert (result.rc, result.stats, len(result.left)) == (0, NO_STATS, 0)
        world.check()


class TestOrder:
    """What is left is in the order in which the kernel gives it back."""

    def build(self, world):
        pfns = world.pfns(6)
        a, pinned, c, held, writeback, f = pfns
        world.pin(pinned)
        world.surround(held, refs=1)
        world.surround(writeback, writeback=OTHERS_UNTIL_WAIT)
        return pfns, pinned, held, writeback

    def test_async(self, world):
        pfns, pinned, held, writeback = self.build(world)
        result = world.migrate(pfns)
        assert (result.rc, result.left.tolist()) == (3, [writeback, held, pinned])
        world.check()

    def test_sync_light(self, world):
        pfns, pinned, held, writeback = self.build(world)
        result = world.migrate(pfns, mode="MIGRATE_SYNC_LIGHT")
        assert (result.rc, result.left.tolist()) == (3, [pinned, writeback, held])
        world.check()

    def test_sync(self, world):
        pfns, pinned, held, writeback = self.build(world)
        result = world.migrate(pfns, mode="MIGRATE_SYNC")
        assert (result.rc, result.left.tolist()) == (2, [pinned, held])
        world.check()


class TestRetries:
    """Ten attempts in all: of an asynchronous call, or three and seven of a synchronous one."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("gone_after, moves", [(0, True), (1, True), (3, True), (9, True), (10, False)])
    @pytest.mark.parametrize("kind", ["anon", "file"])
    def test_references_that_go(self, world, mode, gone_after, moves, kind):
        pfns = world.pfns(3) if kind == "anon" else file_folios(world, 3)
        world.surround(pfns[1], refs=2, refs_gone_after=gone_after)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, result.stats["nr_succeeded"]) == ((0, 3) if moves else (1, 2))
        assert result.copies == {"folios": 2 + moves, "batched": 0, "discarded": 0}
        stages = 2 if mode != "MIGRATE_ASYNC" and gone_after >= 3 else 1
        assert result.targets == {"allocated": 2 + stages, "returned": stages - moves}
        world.check()

    def test_a_reference_between_copy_and_freeze(self, world):
        """A page-cache folio is frozen after the copy: a reference that appears then costs one copy."""
        pfns = file_folios(world, 2)

        def take(step, pfn):
            world.folios.refcount[pfn] += 1

        result = world.migrate(pfns, events=[Event("copied", take, folio=pfns[0])])
        world.folios.refcount[pfns[0]] -= 1
        assert result.copies == {"folios": 2, "batched": 0, "discarded": 1} and result.left.tolist() == [pfns[0]]
        world.check()


class TestNoMemory:
    """Without a target the call ends with -ENOMEM: what is unmapped still moves, the rest is not tried."""

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_unmapped(self, mode):
        world = World(256, 8)
        world.machine.process().mmap("32K", nid=1)
        pfns = world.pfns(4)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, result.left.tolist(), result.tlb_flushes) == (-ENOMEM, pfns, 0)
        assert result.stats == stats(nr_failed_pages=1) and result.targets == {"allocated": 1, "returned": 0}
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_some_unmapped(self, mode):
        world = World(256, 3)
        pfns = world.pfns(5)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, result.left.tolist(), result.tlb_flushes) == (-ENOMEM, pfns[3:], 1)
        assert result.stats == stats(nr_succeeded=3, nr_failed_pages=1)
        assert result.targets == {"allocated": 4, "returned": 0}
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_in_the_second_batch(self, mode):
        world = World(256, 5, batch_pages=4)
        pfns = world.pfns(11)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, result.left.tolist(), result.nr_batches) == (-ENOMEM, pfns[5:], 2)
        assert result.stats == stats(nr_succeeded=5, nr_failed_pages=1)
        world.check()

    def test_those_to_be_retried_count_as_failed(self):
        world = World(256, 2)
        pfns = world.pfns(4)
        world.pin(pfns[0])
        result = world.migrate(pfns)
        assert result.rc == -ENOMEM and result.stats == stats(nr_succeeded=2, nr_failed_pages=2)
        assert sorted(result.left.tolist()) == [pfns[0], pfns[3]]
        world.check()

    def test_in_the_second_stage(self):
        """The asynchronous stage found a place for all; the one tried again alone does not."""
        world = World(256, 2)
        pfns = world.pfns(2)
        world.surround(pfns[0], refs=1)
        filler = world.machine.process()
        result = world.migrate(pfns, mode="MIGRATE_SYNC", events=[Event("undo", lambda step, pfn: None)])
        assert result.rc == 1 and result.left.tolist() == pfns[:1]
        filler.mmap("4K", nid=1)
        assert world.migrate(pfns[:1], mode="MIGRATE_SYNC").rc == -ENOMEM
        world.check()


class TestSplit:
    """A large folio that finds no block of its size, or is mapped in part, is split and its pieces go one by one."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("order", [1, 3, 9])
    @pytest.mark.parametrize("kind", ["anon", "shmem"])
    def test_no_block_that_large(self, mode, order, kind):
        world = World(1024, 2048)
        world.machine.fragment(1, 0)
        pfns = world.pfns(1, order) if kind == "anon" else file_folios(world, 1, order, kind)
        nr, thp = 1 << order, int(order == 9)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, len(result.left)) == (0, 0)
        assert result.stats == stats(nr_succeeded=nr, nr_thp_failed=thp, nr_thp_split=thp, nr_split=1)
        assert result.targets == {"allocated": 1 + nr, "returned": 0}
        process, address, content = world.expected[0]
        process.read(address, len(content))         # pieces of a file are faulted in again
        assert world.where(address, nr) == [1] * nr
        world.check()

    def test_numa_balancing_does_not_split(self):
        world = World(1024, 1024)
        world.machine.fragment(1, 0)
        pfns = world.pfns(1, 3)
        result = world.migrate(pfns, reason="numa_misplaced")
        assert (result.rc, result.left.tolist()) == (-ENOMEM, pfns)
        assert result.stats == stats(nr_failed_pages=8) and world.folios.order[pfns[0]] == 3
        world.check()

    def test_pieces_that_find_no_room(self):
        world = World(256, 4)
        pfn, = world.pfns(1, 3)
        result = world.migrate([pfn])
        assert (result.rc, result.left.tolist()) == (1, [pfn + 5, pfn + 6, pfn + 7, pfn])
        assert result.stats == stats(nr_succeeded=4, nr_failed_pages=1, nr_split=1)
        world.check()

    def test_a_held_folio_is_not_split(self):
        world = World(256, 256)
        world.machine.fragment(1, 0)
        pfns = world.pfns(2, 3)
        world.surround(pfns[0], refs=1)
        result = world.migrate(pfns)
        assert (result.rc, result.left.tolist()) == (-ENOMEM, pfns)
        assert result.stats == stats(nr_failed_pages=8) and (world.folios.order[pfns] == 3).all()
        world.check()

    def test_pages_of_zeros_need_no_target(self):
        world = World(256, 256)
        world.machine.fragment(1, 0)
        address, (pfn,) = world.map(1, 3)
        content = bytearray(world.expected[0][2])
        for page in (0, 5):
            content[page * PAGE_SIZE:(page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        world.process.write(address, content)
        world.expected = [(world.process, address, bytes(content))]
        result = world.migrate([pfn])
        assert (result.rc, result.stats) == (0, stats(nr_succeeded=8, nr_split=1))
        assert result.targets == {"allocated": 1 + 6, "returned": 0} and world.process.rss_pages == 6
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("order", [2, 4, 8])
    def test_a_second_move_splits(self, world, mode, order):
        """Unmapping entry by entry marks the folio as mapped in part, and the mark moves along."""
        address, pfns = world.map(1, order)
        assert world.migrate(pfns, mode=mode).stats == stats(nr_succeeded=1 << order)
        pfns = world.machine.folios_of(world.process, address, PAGE_SIZE << order)
        result = world.migrate(pfns, nid=0, mode=mode)
        assert (result.rc, result.stats) == (0, stats(nr_succeeded=1 << order, nr_split=1))
        world.check()

    @pytest.mark.parametrize("mode, outcome", [
        ("MIGRATE_ASYNC", stats(nr_failed_pages=16)), ("MIGRATE_SYNC", stats(nr_succeeded=15, nr_failed_pages=1, nr_split=1))])
    def test_the_second_stage_splits(self, world, mode, outcome):
        """What the first stage has unmapped entry by entry is marked as mapped in part, and is split by the second."""
        pfns = world.pfns(1, 4)
        world.surround(pfns[0], copy_error=1)
        result = world.migrate(pfns, mode=mode)
        assert (result.rc, result.left.tolist(), result.stats) == (1, pfns, outcome)
        world.check()

    @pytest.mark.parametrize("order", [1, 9])
    def test_these_can_move_as_often_as_they_like(self, world, order):
        address, pfns = world.map(1, order)
        for nid in (1, 0, 1):
            pfns = world.machine.folios_of(world.process, address, PAGE_SIZE << order)
            result = world.migrate(pfns, nid=nid)
            assert (result.rc, result.stats["nr_split"]) == (0, 0)
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    def test_without_thp_migration(self, mode):
        world = World(2048, 2048, thp_migration=False)
        pfns = world.pfns(1, 9) + world.pfns(1, 4)
        result = world.migrate(pfns, mode=mode)
        assert result.rc == 0
        assert result.stats == stats(nr_succeeded=528, nr_thp_failed=1, nr_thp_split=1, nr_split=1)
        world.check()

    def test_without_thp_migration_and_held(self):
        world = World(1024, 1024, thp_migration=False)
        pfns = world.pfns(1, 9)
        world.surround(pfns[0], refs=1)
        result = world.migrate(pfns)
        assert (result.rc, result.left.tolist()) == (1, pfns)
        assert result.stats == stats(nr_failed_pages=512, nr_thp_failed=1)
        assert result.targets == {"allocated": 0, "returned": 0}
        world.check()


class TestHang:
    """Where the kernel would sleep for ever the call ends with WouldHang, all else done and nothing lost."""

    @pytest.mark.parametrize("obstacle, mode", [("lock", "MIGRATE_SYNC"), ("lock", "MIGRATE_SYNC_LIGHT"),
                                                ("writeback", "MIGRATE_SYNC")])
    def test_never_released(self, world, obstacle, mode):
        pfns = world.pfns(4)
        world.surround(pfns[1], **{obstacle: OTHERS_FOREVER})
        with pytest.raises(WouldHang, match=f"folio {pfns[1]}") as hung:
            world.migrate(pfns, mode=mode)
        result = hung.value.result
        assert result.left.tolist() == [pfns[1]] and result.stats["nr_succeeded"] == 3
        world.check()

    @pytest.mark.parametrize("obstacle, mode", [("lock", "MIGRATE_ASYNC"), ("writeback", "MIGRATE_ASYNC"),
                                                ("writeback", "MIGRATE_SYNC_LIGHT")])
    def test_who_does_not_wait_does_not_hang(self, world, obstacle, mode):
        pfns = world.pfns(2)
        world.surround(pfns[0], **{obstacle: OTHERS_FOREVER})
        assert world.migrate(pfns, mode=mode).left.tolist() == pfns[:1]
        world.check()


def busy_world():
    """A list on which every step of a call is reached, in more than one batch."""
    world = World(1024, 1024, batch_pages=16)
    pfns = world.pfns(6) + file_folios(world, 4) + world.pfns(3, 2) + world.pfns(2)
    world.pin(pfns[1])
    world.surround(pfns[3], refs=1)
    world.surround(pfns[7], refs=1, refs_gone_after=2)
    world.surround(pfns[5], refs=1, refs_from_batch_copy=1, refs_gone_after=1)
    return world, pfns


class TestInterrupted:
    """Whatever an event or a migrator raises, at whatever step, nothing is lost and it is raised again."""

    @pytest.mark.parametrize("migrator", [None, McCopy], ids=["alone", "offload"])
    @pytest.mark.parametrize("mode", ["MIGRATE_ASYNC", "MIGRATE_SYNC"])
    @pytest.mark.parametrize("step", STEPS)
    def test_every_step(self, step, mode, migrator):
        for after in (0, 3):
            world, pfns = busy_world()
            if migrator:
                world.machine.register(migrator())
            calls = []

            def interrupt(step, pfn):
                calls.append(pfn)
                if len(calls) > after:
                    raise KeyboardInterrupt

            total = int((1 << world.folios.order[pfns].astype(int)).sum())
            try:
                result = world.migrate(pfns, mode=mode, events=[Event(step, interrupt)])
                assert len(calls) <= after, "it was raised again"
            except KeyboardInterrupt as raised:
                result = raised.result
                assert len(calls) == after + 1, "and no event runs after it"
            assert calls, "the step is reached"
            left = int((1 << world.folios.order[result.left].astype(int)).sum())
            assert result.stats["nr_succeeded"] + left == total
            world.check(f"step {step}, mode {mode}, after {after}")

    @pytest.mark.parametrize("mode", ["MIGRATE_ASYNC", "MIGRATE_SYNC"])
    def test_while_compiled_code_runs(self, mode, monkeypatch):
        """Python raises a signal's KeyboardInterrupt when the compiled function returns, whatever it returns."""
        compiled = pages.migrate_pages_run
        for at in range(20):
            world, pfns = busy_world()
            world.machine.register(CpuMt(1))
            runs = []

            def interrupted(*tables):
                runs.append(compiled(*tables))
                if len(runs) == at + 1:
                    raise KeyboardInterrupt
                return runs[-1]

            monkeypatch.setattr(pages, "migrate_pages_run", interrupted)
            total = int((1 << world.folios.order[pfns].astype(int)).sum())
            vmstat = world.machine.vmstat
            try:
                result = world.migrate(pfns, mode=mode, events=[Event("moved", lambda step, pfn: None)])
                assert len(runs) <= at
            except KeyboardInterrupt as raised:
                result = raised.result
            left = int((1 << world.folios.order[result.left].astype(int)).sum())
            assert result.stats["nr_succeeded"] + left == total
            assert world.machine.vmstat["pgmigrate_success"] == vmstat["pgmigrate_success"] + result.stats["nr_succeeded"]
            world.check(f"mode {mode}, run {at}")
            if len(runs) <= at:
                break
        else:
            pytest.fail("the call does not end")
        assert at > 4

    def test_copies_count_after_an_error_too(self, world):
        pfns = world.pfns(4)
        world.machine.register(McCopy())

        def fail(step, pfn):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as raised:
            world.migrate(pfns, events=[Event("flushed", fail)])
        assert raised.value.result.copies == {"folios": 4, "batched": 4, "discarded": 0}
        world.check()

    def test_a_migrator_that_raises(self, world):
        class Broken:
            name = "broken"

            def offload_copy(self, batch, done):
                raise ZeroDivisionError("driver bug")

        pfns = world.pfns(5)
        world.machine.register(Broken())
        with pytest.raises(ZeroDivisionError, match="driver bug") as raised:
            world.migrate(pfns)
        assert raised.value.result.stats["nr_succeeded"] == 5
        world.check()

    def test_the_rest_is_left_untried(self):
        world = World(batch_pages=2)
        pfns = world.pfns(6)

        def interrupt(step, pfn):
            raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough") as raised:
            world.migrate(pfns, events=[Event("moved", interrupt)])
        result = raised.value.result
        assert result.stats == stats(nr_succeeded=2) and result.left.tolist() == pfns[2:]
        world.check()

    def test_the_machine_can_be_used_again(self, world):
        pfns = world.pfns(4)

        def interrupt(step, pfn):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            world.migrate(pfns, events=[Event("unmap", interrupt)])
        left = [pfn for pfn in pfns if world.folios.refcount[pfn]]
        world.check()
        process, address, content = world.expected[0]
        assert world.machine.migrate_pages(world.machine.folios_of(process, address, len(content)), 0).rc == 0
        assert len(left) in (0, 4)
        world.check()


class TestEvents:
    """Events run at the steps they name, in the order of the path, with the folio they name."""

    def test_the_steps_of_a_move(self, world):
        pfn, = world.pfns()
        seen = []
        result = world.migrate([pfn], events=[Event(step, lambda step, pfn: seen.append((step, pfn))) for step in STEPS])
        dst = world.machine.folios_of(world.process, world.expected[0][1], 1)[0]
        assert seen == [("unmap", pfn), ("unmapped", pfn), ("flush", 0), ("flushed", 0), ("batch_copied", 0), ("move", pfn),
                        ("copied", pfn), ("moved", dst)]
        assert result.rc == 0
        world.check()

    def test_one_folio_only(self, world):
        pfns = world.pfns(5)
        seen = []
        world.migrate(pfns, events=[Event("unmapped", lambda step, pfn: seen.append(pfn), folio=pfns[2])])
        assert seen == [pfns[2]]
        world.check()

    def test_unknown_step(self):
        with pytest.raises(InvalidInput, match="'sleep'"):
            Event("sleep", print)

    def test_they_do_not_change_the_outcome(self):
        plain, watched = busy_world(), busy_world()
        results = [plain[0].migrate(plain[1]),
                   watched[0].migrate(watched[1], events=[Event(step, lambda step, pfn: None) for step in STEPS])]
        for field in ("rc", "stats", "targets", "copies", "tlb_flushes", "nr_batches", "moved_bytes"):
            assert getattr(results[0], field) == getattr(results[1], field), field
        assert results[0].left.tolist() == results[1].left.tolist()
        # Without events the walks to a small folio's entry are saved: the same entries, records and counters all the same.
        for world, _ in (plain, watched):
            world.machine.mem.nodes.frames[:] = 0
        for name in ("folios", "tables", "nodes", "mms", "vmas", "anon_vmas", "slots", "orders", "free_bits"):
            arrays = [getattr(world.machine.mem, name) for world, _ in (plain, watched)]
            assert np.array_equal(*arrays), name


class TestRefused:
    """A call that cannot be is refused before anything happens."""

    @pytest.mark.parametrize("wrong", [{"nid": 2}, {"nid": -1}, {"mode": "eager"}, {"reason": "whim"}])
    def test_refused(self, world, wrong):
        pfns = world.pfns(3)
        with pytest.raises(InvalidInput):
            world.machine.migrate_pages(pfns, **{"nid": 1, **wrong})
        world.check()

    def test_a_node_without_memory(self):
        world = World(64, 0)
        with pytest.raises(InvalidInput, match="no memory"):
            world.migrate(world.pfns(2))
        world.check()


FOLIO = st.tuples(
    st.sampled_from(["anon", "anon", "file", "shmem", "mlocked", "forked"]), st.sampled_from([0, 0, 1, 2, 4]),
    st.sampled_from(["idle"] * 4 + ["pinned", "held", "goes", "comes", "locked", "writeback", "unreadable", "dirty", "no target",
                                     "no piece"]))
MIGRATORS = {"none": lambda: None, "mc_copy": McCopy, "cpu_mt": lambda: CpuMt(2),
             "faulty": lambda: FaultyMigrator(McCopy(), fails_after=2, marks="none")}


def hinder(world, pfn, how):
    match how:
        case "pinned": world.pin(pfn)
        case "held": world.surround(pfn, refs=2)
        case "goes": world.surround(pfn, refs=1, refs_gone_after=2)
        case "comes": world.surround(pfn, refs=1, refs_from_batch_copy=1, refs_gone_after=1)
        case "locked": world.surround(pfn, lock=OTHERS_UNTIL_WAIT)
        case "writeback": world.surround(pfn, writeback=OTHERS_UNTIL_WAIT)
        case "unreadable": world.surround(pfn, copy_error=1)
        case "no target": world.surround(pfn, alloc=1)
        case "no piece": world.surround(pfn, alloc=2)
        case "dirty" if world.folios.mapping[pfn] < 0: world.dirty(pfn)


class TestAnything:
    """Whatever stands on the list, in whatever state: no byte is lost, the books add up, the counters agree."""

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(FOLIO, max_size=14), st.sampled_from(MODES), st.sampled_from([1, 7, 512]),
           st.sampled_from([40, 512]), st.sampled_from(list(MIGRATORS)), st.sampled_from([None, 0, 2]),
           st.booleans(), st.randoms(use_true_random=False))
    def test_anything(self, folios, mode, batch_pages, target_pages, migrator, fragmented, watched, random):
        world = World(1024, target_pages, batch_pages=batch_pages)
        if fragmented is not None:
            world.machine.fragment(1, fragmented)
        pfns, states = [], []
        for kind, order, state in folios:
            if kind in ("file", "shmem"):
                new = file_folios(world, 1, order, kind)
            else:
                new = world.pfns(1, order, mlock=kind == "mlocked")
            if kind == "forked":
                _, address, content = world.expected[-1]
            pfns += new
            states += [state]
        if any(kind == "forked" for kind, _, _ in folios):
            child = world.process.fork()
            world.expected += [(child, address, content) for _, address, content in list(world.expected)]
        world.machine.lru_add_drain()
        for pfn, state in zip(pfns, states):
            hinder(world, pfn, state)
        random.shuffle(pfns)
        total = int((1 << world.folios.order[pfns].astype(int)).sum()) if pfns else 0
        made = MIGRATORS[migrator]()
        events = [Event("flush", lambda step, pfn: None)] if watched else []
        if made:
            with on_duty(world.machine, made):
                result = world.migrate(pfns, mode=mode, events=events)
        else:
            result = world.migrate(pfns, mode=mode, events=events)

        succeeded, failed = result.stats["nr_succeeded"], result.stats["nr_failed_pages"]
        left = int((1 << world.folios.order[result.left].astype(int)).sum()) if len(result.left) else 0
        assert succeeded + left == total, "each page is moved or left"
        assert (result.rc == 0) == (len(result.left) == 0)
        assert len(set(result.left.tolist())) == len(result.left)
        assert failed <= left
        if result.rc >= 0 and not result.stats["nr_split"]:
            assert succeeded + failed == total
        assert result.moved_bytes <= succeeded * PAGE_SIZE
        vmstat = world.machine.vmstat
        assert (vmstat["pgmigrate_success"], vmstat["pgmigrate_fail"]) == (succeeded, failed)
        assert result.copies["discarded"] >= 0 and result.copies["batched"] <= result.copies["folios"]
        world.check()
