"""validate() sees each kind of broken books, and says which page frame it is."""

import numpy as np
import pytest

from conftest import World
from offload.errors import BrokenInvariant
from offload.mm.address_space import add_to_swap_cache
from offload.mm.memmap import (
    PG_deferred_list, PG_dirty, PG_hwpoison, PG_locked, PG_lru, PG_mlocked, PG_movable_ops_isolated, PG_private, PG_swapcache,
    PG_unevictable,
)
from offload.mm.node import NR_ORDERS, PCP_HIGH
from offload.mm.pagetable import PTE_EXCLUSIVE, PTE_HUGE, PTE_HWPOISON, PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, PTRS
from offload.units import PAGE_SHIFT, PAGE_SIZE


@pytest.fixture
def books():
    """A machine with something of everything, in order."""
    world = World(2048, 1024)
    world.address, world.small = world.map(3)
    world.large_address, (world.large,) = world.map(1, 3)
    world.huge_address, (world.huge,) = world.map(1, 9)
    world.file = world.machine.file("32K")
    world.file_address, world.cached = world.map(2, 2, file=world.file, shared=True)
    world.map(1, 2, file=world.machine.file("16K", kind="shmem"), shared=True)
    world.map(1, 2, mlock=True)
    world.ksm_address, (world.ksm,) = world.map(1)
    world.machine.make_ksm(world.ksm, [(world.process._vma_at(world.ksm_address), world.ksm_address)])
    world.machine.swapon("64K")
    world.swap_address, (world.swapped,) = world.map(1, 2)
    world.entry = world.machine.alloc_swap_entries(4)
    add_to_swap_cache(world.machine.table, world.swapped, world.entry)
    world.owned = world.machine.movable_ops_pages(1)[0]
    world.machine.fragment(1, 2)
    world.machine.lru_add_drain()
    world.check()
    return world


def broken(world, *pfns):
    with pytest.raises(BrokenInvariant) as raised:
        world.machine.validate()
    message = str(raised.value)
    assert "\n" not in message and raised.value.errno == 5
    for pfn in pfns:
        assert str(int(pfn)) in message, message
    return message


def entry_of(world, address):
    """Index in Memory.tables of the leaf entry for an address."""
    tables, table = world.machine.mem.tables, int(world.machine.mem.mms.pgd[world.process.mm])
    for shift in (39, 30, 21, 12):
        at = table * PTRS + (address >> shift & PTRS - 1)
        if shift == 12 or tables[at] & PTE_HUGE:
            return at
        table = int(tables[at]) >> PAGE_SHIFT


class TestFrames:
    """Each page is free or in one folio, never both, never neither."""

    def test_used_and_free(self, books):
        books.folios.refcount[FREE] = 1
        assert "exactly one place" in broken(books, FREE)

    def test_neither(self, books):
        # A large folio's tail forgotten: the folio claims fewer pages than it was given.
        books.folios.order[books.large] = 2
        books.machine.mem.orders[books.large:books.large + 4] = 2
        assert "exactly one place" in broken(books, books.large + 4)

    def test_orders_of_tails(self, books):
        books.machine.mem.orders[books.large + 3] = 0
        assert "order differs" in broken(books, books.large)

    def test_negative_refcount(self, books):
        books.folios.refcount[FREE] = -1
        broken(books, FREE)

    def test_bitmap_without_its_count(self, books):
        books.machine.mem.free_areas.nr_free[5] += 1
        assert "order 5" in broken(books)

    def test_free_pages_of_a_node(self, books):
        books.machine.mem.nodes.nr_free_pages[1] -= 1
        assert "node 1" in broken(books)

    def test_overlapping_free_blocks(self, books):
        mem = books.machine.mem
        area = mem.free_areas[0 * NR_ORDERS + 0]
        block = FREE - int(mem.nodes.start_pfn[0])
        mem.free_bits[area.leaf + (block >> 6)] |= np.int64(1) << np.int64(block & 63)
        area.nr_free += 1
        mem.nodes.nr_free_pages[0] += 1
        assert "two free blocks" in broken(books, FREE)


    def test_per_cpu_list(self, books):
        mem, listed = books.machine.mem, int(books.machine.mem.nodes.pcp_count[0])
        assert 0 < listed < PCP_HIGH
        for pfn, message in ((FREE, "free twice"), (mem.pcp[0], "free twice"), (books.small[0], "exactly one place"), (1, "not the node's")):
            mem.pcp[listed], mem.nodes.pcp_count[0] = pfn, listed + 1
            assert message in broken(books, pfn)
        mem.nodes.pcp_count[0] = listed - 1
        assert "exactly one place" in broken(books, mem.pcp[listed - 1])
        mem.nodes.pcp_count[1] = PCP_HIGH + 1
        assert f"pcp_count {PCP_HIGH + 1}" in broken(books)


FREE = 1024 + 2040
"""A page of node 0 that nothing above uses."""


class TestEntries:
    """Outside a call every entry maps a page in use, as often as the folio says."""

    def test_migration_entry(self, books):
        tables, at = books.machine.mem.tables, entry_of(books, books.address)
        tables[at] = tables[at] & ~PTE_PRESENT | PTE_MIGRATION
        assert "migration entries" in broken(books, books.address)

    def test_neither_none_nor_present(self, books):
        tables, at = books.machine.mem.tables, entry_of(books, books.address)
        tables[at] &= ~PTE_PRESENT
        broken(books, books.address)

    def test_a_free_page_mapped(self, books):
        tables, at = books.machine.mem.tables, entry_of(books, books.address)
        tables[at] = tables[at] & PAGE_SIZE - 1 | FREE << PAGE_SHIFT
        assert "free pages" in broken(books, FREE)

    @pytest.mark.parametrize("which", ["small", "large", "huge"])
    def test_mapcount(self, books, which):
        pfn = np.atleast_1d(getattr(books, which))[0]
        books.folios.mapcount[pfn] += 1
        books.folios.refcount[pfn] += 1
        assert "mapcount" in broken(books, pfn)

    def test_entire_mapcount(self, books):
        books.folios.entire_mapcount[books.large] = 1
        assert "entire_mapcount" in broken(books, books.large)

    def test_an_entry_lost(self, books):
        books.machine.mem.tables[entry_of(books, books.address)] = 0
        assert "mapcount" in broken(books, books.small[0])

    def test_exclusive_page_of_a_file(self, books):
        books.machine.mem.tables[entry_of(books, books.file_address)] |= PTE_EXCLUSIVE
        assert "exclusive" in broken(books)

    def test_exclusive_page_mapped_twice(self, books):
        child = books.process.fork()
        tables = books.machine.mem.tables
        tables[entry_of(books, books.address)] |= PTE_EXCLUSIVE
        books.process, parent = child, books.process
        tables[entry_of(books, books.address)] |= PTE_EXCLUSIVE
        books.process = parent
        assert "exclusive" in broken(books, books.small[0])

    @pytest.mark.parametrize("counter", ["rss_anon", "rss_file", "rss_shmem"])
    def test_rss(self, books, counter):
        books.machine.mem.mms[counter][books.process.mm] += 1
        assert counter in broken(books)


class TestReferences:
    """Each reference has its reason."""

    @pytest.mark.parametrize("by", [1, -1])
    @pytest.mark.parametrize("which", ["small", "large", "huge", "cached"])
    def test_refcount(self, books, which, by):
        pfn = np.atleast_1d(getattr(books, which))[0]
        if books.folios.refcount[pfn] + by:
            books.folios.refcount[pfn] += by
            assert "refcount" in broken(books, pfn)

    def test_pins(self, books):
        books.folios.pincount[books.small[1]] += 1
        assert "refcount" in broken(books, books.small[1])

    def test_isolated_for_ever(self, books):
        """A folio off the LRU without the reference of who took it off."""
        books.folios.page_flags[books.small[2]] &= ~PG_lru
        assert "refcount" in broken(books, books.small[2])

    def test_others(self, books):
        books.surround(books.small[0], refs=2)
        books.machine.validate()
        books.machine.mem.others.refs_held[books.folios.others[books.small[0]]] = 1
        assert "refcount" in broken(books, books.small[0])


class TestLeftovers:
    """Nothing of a call remains after it."""

    def test_a_lock(self, books):
        books.folios.page_flags[books.small[0]] |= PG_locked
        assert "locked" in broken(books, books.small[0])

    def test_a_state_word(self, books):
        books.folios.migrate_info[books.small[0]] = 4
        assert "state word" in broken(books, books.small[0])


class TestPageCache:
    """Each slot holds the folio that knows it."""

    def slots(self, books):
        return int(books.machine.mem.mappings.slots[books.file.mapping])

    def test_count(self, books):
        books.machine.mem.mappings.nrpages[books.file.mapping] += 1
        assert "nrpages" in broken(books)

    def test_an_empty_slot(self, books):
        books.machine.mem.slots[self.slots(books) + 3] = 0
        assert "nrpages" in broken(books)

    def test_another_folio(self, books):
        books.machine.mem.slots[self.slots(books) + 3] = books.small[0]
        assert "slots" in broken(books, 3)

    def test_the_wrong_place(self, books):
        books.machine.mem.slots[self.slots(books) + 3] = books.cached[1]
        assert "slots" in broken(books, 3)


class TestSwapCache:
    """A folio in the swap cache has its slots, and they have it."""

    def slot(self, books, i):
        mem = books.machine.mem
        return int(mem.mappings.slots[mem.sys.swap_space[0]]) + books.entry + i

    def test_an_empty_slot(self, books):
        books.machine.mem.slots[self.slot(books, 2)] = 0
        assert "swap entries" in broken(books, books.entry + 2)

    def test_another_folio(self, books):
        books.machine.mem.slots[self.slot(books, 2)] = books.small[0]
        assert "swap entries" in broken(books, books.entry + 2)

    def test_a_slot_that_nobody_has(self, books):
        books.machine.mem.slots[self.slot(books, 5)] = books.swapped
        assert "swap entries" in broken(books, books.entry + 5)

    def test_the_wrong_entry(self, books):
        books.folios.private[books.swapped] += 1
        assert "swap entries" in broken(books, books.entry)

    def test_count(self, books):
        books.machine.mem.mappings.nrpages[books.machine.mem.sys.swap_space[0]] += 1
        assert "nrpages" in broken(books)

    def test_references(self, books):
        books.folios.page_flags[books.swapped] &= ~PG_swapcache
        assert "refcount" in broken(books, books.swapped)


class TestKsm:
    """A KSM page is mapped read-only where its stable node says."""

    def test_stable_node(self, books):
        books.machine.mem.anon_vmas.kpfn[-books.folios.mapping[books.ksm]] = books.small[0]
        assert "stable node" in broken(books, books.ksm)

    @pytest.mark.parametrize("bit", [PTE_WRITE, PTE_EXCLUSIVE])
    def test_writable(self, books, bit):
        books.machine.mem.tables[entry_of(books, books.ksm_address)] |= bit
        assert "KSM" in broken(books, books.ksm)

    def test_unknown_mapping(self, books):
        books.machine.mem.rmap_items.address[1] += PAGE_SIZE
        assert "KSM" in broken(books, books.ksm)


class TestOwners:
    """A movable_ops page has its owner's reference, and the isolation's with the mark."""

    def test_an_owner_that_let_go(self, books):
        books.folios.private[books.owned] = 0
        assert "refcount" in broken(books, books.owned)

    def test_the_mark(self, books):
        books.folios.page_flags[books.owned] |= PG_movable_ops_isolated
        assert "refcount" in broken(books, books.owned)

    def test_private_data(self, books):
        books.folios.page_flags[books.cached[0]] |= PG_private
        assert "refcount" in broken(books, books.cached[0])


class TestPoison:
    """Bad pages are out of the allocator, and only they have hwpoison entries."""

    def test_a_bad_page_among_the_free(self, books):
        books.folios.page_flags[FREE] |= PG_hwpoison
        assert "exactly one place" in broken(books, FREE)

    def test_an_entry_for_a_good_page(self, books):
        books.machine.mem.tables[entry_of(books, books.address)] = int(books.small[0]) << PAGE_SHIFT | PTE_HWPOISON | PTE_SPECIAL
        assert "hwpoison" in broken(books, books.small[0])


class TestNodeCounters:
    """The counters of a node are sums over its folios."""

    @pytest.mark.parametrize("nid", [0, 1])
    @pytest.mark.parametrize("counter", [
        "nr_isolated_anon", "nr_isolated_file", "nr_lru_anon", "nr_lru_file", "nr_unevictable", "nr_anon_mapped",
        "nr_file_mapped", "nr_file_pages", "nr_shmem", "nr_shmem_thps", "nr_swapcache", "nr_file_dirty", "nr_mlock",
        "nr_deferred_split"])
    def test_counter(self, books, counter, nid):
        books.machine.mem.nodes[counter][nid] += 1
        message = broken(books)
        assert counter in message and f"node {nid}" in message

    @pytest.mark.parametrize("flag, counter, which", [
        (PG_mlocked, "nr_mlock", "small"), (PG_dirty, "nr_file_dirty", "cached"), (PG_deferred_list, "nr_deferred_split", "huge"),
        (PG_unevictable, "nr_lru", "small")])
    def test_flag_without_its_counter(self, books, flag, counter, which):
        books.folios.page_flags[np.atleast_1d(getattr(books, which))[0]] |= flag
        assert counter in broken(books)

    def test_large_anonymous_folios(self, books):
        books.machine.mem.mthp_nr_anon[3] += 1
        assert "order 3" in broken(books)
