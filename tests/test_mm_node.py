"""A node's frames: the buddy allocator through mmap and munmap, fragmentation, and the LRU batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import World, make_machine
from offload.callers import compact_node, migrate_misplaced_folio
from offload.errors import InvalidInput, OutOfMemory
from offload.mm.memmap import FIRST_PFN, LRU_BATCH_SIZE, PG_lru
from offload.mm.node import PCP_BATCH, PCP_HIGH
from offload.units import EAGAIN, ENOMEM, PAGE_SIZE

MAX_ORDER = 10


def whole_blocks(nr_pages):
    """Free blocks of each order of an untouched node: as large as alignment and the end allow."""
    blocks, at = [0] * (MAX_ORDER + 1), 0
    while at < nr_pages:
        order = MAX_ORDER
        while at % (1 << order) or at + (1 << order) > nr_pages:
            order -= 1
        blocks[order] += 1
        at += 1 << order
    return blocks


class TestFreshNode:
    """A node hands out all of its pages, and only those, in the largest aligned blocks."""

    @pytest.mark.parametrize("nr_pages", [1, 2, 3, 511, 512, 1023, 1024, 1025, 1535, 2048, 3001])
    def test_odd_sizes(self, nr_pages):
        machine = make_machine(nr_pages, 1024)
        assert machine.free_blocks(0) == whole_blocks(nr_pages)
        process = machine.process()
        process.mmap(nr_pages * PAGE_SIZE)
        pfns = machine.folios_of(process, *process_range(process))
        assert machine.free_pages(0) == 0 and machine.free_pages(1) == 1024
        assert sorted(pfns) == list(range(FIRST_PFN, FIRST_PFN + nr_pages))
        machine.validate()
        process.exit()
        machine.lru_add_drain()
        assert machine.free_blocks(0) == whole_blocks(nr_pages)
        machine.validate()

    def test_a_node_without_memory(self):
        machine = make_machine(0, 1024)
        assert machine.mem.nodes.nr_free_pages.tolist() == [0, 1024]
        for refused in (lambda: machine.free_pages(0), lambda: machine.process().mmap("4K", nid=0)):
            with pytest.raises(InvalidInput, match="no memory"):
                refused()
        machine.validate()

    @pytest.mark.parametrize("nid", [-1, 2, "0", None, True, 1.0])
    def test_nodes_that_are_not_there(self, machine, nid):
        with pytest.raises(InvalidInput, match="is not there"):
            machine.free_blocks(nid)


def process_range(process):
    return process._starts[0], process._ends[-1] - process._starts[0]


class TestFull:
    """A node really runs full: the allocation that finds nothing fails, and nothing is lost by it."""

    @pytest.mark.parametrize("order", range(10))
    def test_every_order_fills_the_machine(self, order):
        machine = make_machine(1024)
        process = machine.process()
        address = process.mmap(1024 * PAGE_SIZE, order=order)
        pfns = machine.folios_of(process, address, 1024 * PAGE_SIZE)
        assert len(pfns) == 1024 >> order and (machine.mem.folios.order[pfns] == order).all()
        assert machine.free_blocks(0) == [0] * (MAX_ORDER + 1)
        machine.validate()
        with pytest.raises(OutOfMemory, match="no node has room"):
            process.mmap("4K")
        machine.validate()

    def test_largest_block(self):
        """Order 10 exists as a block, though page tables map no folio of it."""
        machine = make_machine(2048)
        assert machine.free_blocks(0)[10] == 2
        process = machine.process()
        with pytest.raises(InvalidInput, match="order 10"):
            process.mmap("4M", order=10)
        process.mmap("4K")
        assert machine.free_blocks(0) == [1] * 11
        machine.validate()

    def test_what_was_mapped_before_the_end_stays(self):
        machine = make_machine(64)
        process = machine.process()
        with pytest.raises(OutOfMemory):
            process.mmap(65 * PAGE_SIZE, address=1 << 30)
        assert process.rss_pages == 64
        process.write(1 << 30, b"x" * 64 * PAGE_SIZE)
        machine.validate()
        process.munmap(1 << 30, 65 * PAGE_SIZE)
        machine.lru_add_drain()
        assert machine.free_pages(0) == 64
        machine.validate()

    def test_large_folios_fall_back_to_smaller_ones(self):
        machine = make_machine(1024)
        machine.fragment(0, 4)
        process = machine.process()
        address = process.mmap("2M", order=9)
        orders = machine.mem.folios.order[machine.folios_of(process, address, 2 << 20)]
        assert orders.max() == 4 and (1 << orders.astype(int)).sum() == 512
        machine.validate()

    def test_base_pages_come_from_the_nearest_node(self):
        machine = make_machine(16, 16, 16)
        process = machine.process()
        address = process.mmap(32 * PAGE_SIZE, nid=1)
        nids = [machine.node_of(process, address + i * PAGE_SIZE) for i in range(32)]
        assert nids == [1] * 16 + [0] * 16
        machine.validate()


class TestMerging:
    """Freed blocks merge with their buddies as far as they reach, in whatever order they come."""

    @pytest.mark.parametrize("seed", range(5))
    def test_random_order(self, seed):
        rng = np.random.default_rng(seed)
        machine = make_machine(2048, 1500)
        process = machine.process()
        places = []
        for nid, nr_pages in enumerate((2048, 1500)):
            left = nr_pages
            while left:
                order = int(rng.integers(0, 10))
                nr = min(1 << order, left)
                places.append((process.mmap(nr * PAGE_SIZE, order=order, nid=nid), nr * PAGE_SIZE))
                left -= nr
        assert machine.free_pages(0) == machine.free_pages(1) == 0, f"seed {seed}"
        machine.validate()
        for i in rng.permutation(len(places)):
            process.munmap(*places[i])
        machine.lru_add_drain()
        assert machine.free_blocks(0) == whole_blocks(2048), f"seed {seed}"
        assert machine.free_blocks(1) == whole_blocks(1500), f"seed {seed}"
        machine.validate()


class TestPerCpuList:
    """Base pages that are freed go on a list and are handed out from there; nobody sees less memory for it."""

    @staticmethod
    def free(world, mapped, which):
        """Unmap the pages ``which`` of a mapping of base pages, in this order."""
        world.machine.lru_add_drain()
        for i in which:
            world.process.munmap(mapped[0] + i * PAGE_SIZE, PAGE_SIZE)

    def map(self, world, nr, order=0):
        address = world.process.mmap(nr * PAGE_SIZE << order, order=order)
        return address, world.machine.folios_of(world.process, address, nr * PAGE_SIZE << order).tolist()

    @staticmethod
    def listed(machine, nid=0):
        return machine.mem.pcp[nid * PCP_HIGH:][:machine.mem.nodes.pcp_count[nid]].tolist()

    def test_pages_come_in_order_of_address(self, world):
        assert self.map(world, 2 * PCP_BATCH + 5)[1] == list(range(FIRST_PFN, FIRST_PFN + 2 * PCP_BATCH + 5))

    def test_what_was_freed_last_is_handed_out_first(self, world):
        mapped = self.map(world, 10)
        self.free(world, mapped, (2, 7, 4))
        assert self.map(world, 3)[1] == [mapped[1][i] for i in (4, 7, 2)]

    def test_what_does_not_fit_sends_all_back(self, world):
        mapped = self.map(world, 1024)
        order = np.random.default_rng(0).permutation(1024).tolist()
        assert self.listed(world.machine) == []
        self.free(world, mapped, order[:PCP_HIGH])
        assert self.listed(world.machine) == [mapped[1][i] for i in order[:PCP_HIGH]]
        world.machine.validate()
        self.free(world, mapped, order[PCP_HIGH:PCP_HIGH + 1])
        assert self.listed(world.machine) == [mapped[1][order[PCP_HIGH]]]
        assert world.machine.free_pages(0) == 1024 + PCP_HIGH + 1
        world.machine.validate()
        assert world.machine.free_blocks(0)[10] == 1 and self.listed(world.machine) == []
        self.free(world, mapped, order[PCP_HIGH + 1:])
        assert world.machine.free_blocks(0) == whole_blocks(2048)

    def test_small_blocks_are_used_up_first(self, world):
        mapped = self.map(world, 512)
        holes = [*range(0, 40, 2), *range(100, 108)]        # 20 of one page, two blocks of four
        self.free(world, mapped, holes)
        blocks = world.machine.free_blocks(0)
        assert blocks[0] == 20 and blocks[2] == 2
        assert self.map(world, 28)[1] == [mapped[1][i] for i in holes]
        assert self.listed(world.machine) == [512 + FIRST_PFN + i for i in reversed(range(PCP_BATCH - 28))]
        world.machine.validate()

    def test_a_large_folio_gets_what_lies_on_the_list(self):
        world = World(1024, 1024)
        kept = self.map(world, 512)
        mapped = self.map(world, 512)
        self.free(world, mapped, range(512))
        assert self.listed(world.machine) and world.machine.mem.nodes.nr_free_pages[0] < 512
        assert self.map(world, 1, 9)[1] == [kept[1][-1] + 1]
        assert world.machine.free_pages(0) == 0
        world.machine.validate()

    def test_migration_fills_a_node_to_the_last_page(self):
        world = World(256, 100)
        address, pfns = world.map(110)
        result = world.migrate(pfns)
        assert (result.rc, result.stats["nr_succeeded"]) == (-ENOMEM, 100) and world.machine.free_pages(1) == 0
        world.check()

    def test_numa_balancing_counts_it(self):
        world = World(64, 64)
        others = self.map(world, 2)
        world.process.mmap(62 * PAGE_SIZE, nid=1)
        world.machine.lru_add_drain()
        assert world.machine.mem.nodes.nr_free_pages[1] == 0 and world.machine.free_pages(1) == 2
        assert migrate_misplaced_folio(world.machine, world.process, others[0], 1).ret == 0
        world.machine.lru_add_drain()
        assert migrate_misplaced_folio(world.machine, world.process, others[0] + PAGE_SIZE, 1).ret == -EAGAIN
        world.check()

    def test_compaction_finds_what_lies_on_it(self):
        """A block that is free but for pages on the list is what compaction wants; it has nothing to do."""
        world = World(1024)
        world.map(1)
        mapped = self.map(world, 1023)
        self.free(world, mapped, range(511, 1023))
        result = compact_node(world.machine, 0, order=9)
        assert (result.status, result.calls) == ("success", ())
        world.check()


class TestFragment:
    """fragment() leaves no free block above an order, defragment() gives everything back."""

    @pytest.mark.parametrize("order", range(10))
    @pytest.mark.parametrize("nr_pages", [1024, 1537])
    def test_every_order(self, order, nr_pages):
        machine = make_machine(nr_pages, 1024)
        machine.fragment(0, order)
        blocks = machine.free_blocks(0)
        assert not any(blocks[order + 1:]) and blocks[order]
        assert machine.free_pages(0) == nr_pages - (nr_pages >> order + 1)
        machine.validate()
        machine.fragment(0, order)
        assert machine.free_blocks(0) == blocks, "a second time changes nothing"
        machine.defragment(0)
        assert machine.free_blocks(0) == whole_blocks(nr_pages)
        assert machine.free_blocks(1) == whole_blocks(1024)
        machine.validate()

    def test_a_node_smaller_than_the_largest_block(self):
        """It has no bits for such blocks; the next node's first page, free on its own, is not taken for one."""
        machine = make_machine(512, 1024)
        process = machine.process()
        process.mmap(512 * PAGE_SIZE)
        first = process.mmap("4K", nid=1)
        process.mmap("4K", nid=1)
        process.munmap(first, PAGE_SIZE)
        machine.lru_add_drain()
        blocks = machine.free_blocks(1)
        assert blocks[0] == 1
        machine.fragment(0, 3)
        assert (machine.free_pages(0), machine.free_blocks(1)) == (0, blocks)
        machine.validate()

    def test_finer_and_finer(self, machine):
        process = machine.process()
        process.mmap(777 * PAGE_SIZE)
        free = machine.free_pages(0)
        for order in (7, 3, 0):
            machine.fragment(0, order)
            assert not any(machine.free_blocks(0)[order + 1:])
            machine.validate()
        machine.defragment(0)
        assert machine.free_pages(0) == free
        machine.validate()

    @pytest.mark.parametrize("order", [-1, 10, 11])
    def test_refused(self, machine, order):
        with pytest.raises(InvalidInput, match=f"order {order}"):
            machine.fragment(0, order)


class TestAnySequence:
    """Whatever is mapped and unmapped, free pages are the node's pages less those mapped."""

    @settings(max_examples=25, deadline=None)
    @given(st.integers(200, 1100), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 30)), max_size=25))
    def test_counts(self, nr_pages, steps):
        machine = make_machine(nr_pages)
        process = machine.process()
        mapped = []
        for order, nr, unmap in steps:
            nbytes = nr * PAGE_SIZE << order
            before = machine.free_pages(0)
            if unmap < len(mapped):
                process.munmap(*mapped.pop(unmap))
            elif nbytes // PAGE_SIZE > before:
                address = 1 << 40
                with pytest.raises(OutOfMemory):
                    process.mmap(nbytes, order=order, address=address)
                assert machine.free_pages(0) == 0
                process.munmap(address, nbytes)
            else:
                mapped.append((process.mmap(nbytes, order=order), nbytes))
            machine.lru_add_drain()
            assert machine.free_pages(0) == nr_pages - sum(nbytes for _, nbytes in mapped) // PAGE_SIZE
            assert sum(nr << order for order, nr in enumerate(machine.free_blocks(0))) == machine.free_pages(0)
        machine.validate()


class TestLruBatch:
    """A new folio waits for the LRU in a batch that holds a reference, until the batch is drained."""

    @staticmethod
    def state(world, pfns):
        return [(int(world.folios.refcount[pfn]), bool(world.folios.page_flags[pfn] & PG_lru)) for pfn in pfns]

    def test_one_more_reference_until_drained(self, world):
        pfns = world.pfns(3)
        assert self.state(world, pfns) == [(2, False)] * 3
        world.machine.validate()
        world.machine.lru_add_drain()
        assert self.state(world, pfns) == [(1, True)] * 3
        world.check()

    def test_drained_when_full(self, world):
        pfns = world.pfns(LRU_BATCH_SIZE - 1)
        assert self.state(world, pfns) == [(2, False)] * 30
        last = world.pfns(1)
        assert self.state(world, pfns + last) == [(1, True)] * 31
        assert self.state(world, world.pfns(1)) == [(2, False)]
        world.check()

    def test_drained_by_a_large_folio(self, world):
        small = world.pfns(2)
        large = world.pfns(1, 1)
        assert self.state(world, small) == [(1, True)] * 2
        assert self.state(world, large) == [(2, True)], "one reference a mapped page, none for the batch"
        world.check()

    def test_off_while_disabled(self, world):
        machine = world.machine
        first = world.pfns(1)
        machine.lru_cache_disable()
        machine.lru_cache_disable()
        assert self.state(world, first + world.pfns(1)) == [(1, True)] * 2
        machine.lru_cache_enable()
        assert self.state(world, world.pfns(1)) == [(1, True)], "they nest"
        machine.lru_cache_enable()
        assert self.state(world, world.pfns(1)) == [(2, False)]
        world.check()

    def test_off_during_move_pages(self, world):
        address, _ = world.map(3)
        result = world.process.move(address, 3 * PAGE_SIZE, 1)
        assert result.ret == 0
        pfns = world.machine.folios_of(world.process, address, 3 * PAGE_SIZE)
        assert self.state(world, pfns) == [(1, True)] * 3
        world.check()

    def test_a_plain_call_leaves_them_in_the_batch(self, world):
        address, pfns = world.map(3)
        assert world.migrate(pfns).rc == 0
        pfns = world.machine.folios_of(world.process, address, 3 * PAGE_SIZE)
        assert self.state(world, pfns) == [(2, False)] * 3
        world.check()

    def test_a_folio_freed_while_in_the_batch(self, world):
        process = world.machine.process()
        address = process.mmap("4K")
        free = world.machine.free_pages(0)
        process.munmap(address, PAGE_SIZE)
        assert world.machine.free_pages(0) == free, "the batch holds it"
        world.machine.validate()
        world.machine.lru_add_drain()
        assert world.machine.free_pages(0) == free + 1
        world.check()


class TestIsolation:
    """Isolating takes folios off the LRU, all or none; putting back returns them."""

    def test_there_and_back(self, world):
        machine = world.machine
        pfns = world.pfns(5) + world.pfns(2, 3)
        machine.isolate(pfns)
        assert machine.mem.nodes.nr_isolated_anon.tolist() == [5 + 16, 0]
        machine.validate()
        machine.putback(pfns)
        world.check()

    @pytest.mark.parametrize("wrong", ["twice", "tail", "free", "outside", "negative", "table"])
    def test_all_or_none(self, world, wrong):
        pfns = world.pfns(2, 2)
        bad = {"twice": pfns[0], "tail": pfns[0] + 1, "free": 3000, "outside": 1 << 20, "negative": -1,
               "table": [[1]]}[wrong]
        with pytest.raises(InvalidInput):
            world.machine.isolate([[pfns[0]]] if wrong == "table" else [*pfns, bad])
        world.check()

    def test_none_at_all(self, world):
        assert len(world.machine.isolate([])) == 0
        world.check()
