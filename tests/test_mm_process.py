"""Processes: mapping, faulting, reading and writing, fork and copy on write, files, large sparse machines."""

import subprocess
import sys

import numpy as np
import pytest

from conftest import World, random_bytes
from offload.errors import BadAddress, Busy, InvalidInput, NotSupported, OutOfMemory, WouldHang
from offload.jit import JIT_DISABLED
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.migrate.pages import Event
from offload.mm.memmap import (
    PG_dirty, PG_ksm, PG_mlocked, PG_partially_mapped, PG_reserved, PG_swapbacked, PG_swapcache, PG_unevictable,
)
from offload.mm.pagetable import PTE_EXCLUSIVE, PTE_HUGE, PTE_PRESENT, PTE_SPECIAL, PTE_SWAP, PTE_UFFD_WP, PTE_WRITE
from offload.scenario_machine import page_entries
from offload.units import PAGE_SIZE

PMD = 2 << 20


class TestMmap:
    """A mapping has the folios asked for, where they fit, and its bytes are zeros until written."""

    @pytest.mark.parametrize("order", range(10))
    def test_orders(self, order, world):
        length = 2 * PAGE_SIZE << order
        address = world.process.mmap(length, order=order)
        assert address % (PAGE_SIZE << order) == 0
        pfns = world.machine.folios_of(world.process, address, length)
        assert (world.folios.order[pfns] == order).all() and len(pfns) == 2
        assert (pfns % (1 << order) == 0).all(), "folios are naturally aligned"
        assert world.process.read(address, length) == bytes(length)
        assert world.process.rss_pages == 2 << order
        world.check()

    def test_a_pmd_sized_folio_is_mapped_by_one_entry(self, world):
        address, (pfn,) = world.map(1, 9)
        assert world.folios.mapcount[pfn] == world.folios.entire_mapcount[pfn] == 1
        assert (page_entries(world.machine, world.process.mm, address, 512) & PTE_HUGE != 0).all()
        world.check()

    def test_smaller_large_folios_are_mapped_by_one_entry_a_page(self, world):
        address, (pfn,) = world.map(1, 8)
        assert (world.folios.mapcount[pfn], world.folios.entire_mapcount[pfn]) == (256, 0)
        world.check()

    @pytest.mark.parametrize("nr_pages, orders", [
        (1, [0]), (7, [2, 1, 0]), (16, [4]), (17, [4, 0]), (31, [4, 3, 2, 1, 0]),
    ])
    def test_the_end_of_a_mapping_gets_smaller_folios(self, world, nr_pages, orders):
        address = world.process.mmap(nr_pages * PAGE_SIZE, order=4)
        pfns = world.machine.folios_of(world.process, address, nr_pages * PAGE_SIZE)
        assert world.folios.order[pfns].tolist() == orders
        world.check()

    def test_an_unaligned_start_gets_smaller_folios(self, world):
        address = world.process.mmap(16 * PAGE_SIZE, order=3, address=(1 << 30) + 3 * PAGE_SIZE)
        pfns = world.machine.folios_of(world.process, address, 16 * PAGE_SIZE)
        assert world.folios.order[pfns].tolist() == [0, 2, 3, 1, 0]
        world.check()

    def test_nothing_before_the_first_touch(self, world):
        address = world.process.mmap("1M", order=4, populate=False)
        assert world.process.rss_pages == 0 and world.machine.node_of(world.process, address) is None
        world.process.write(address + 5 * PAGE_SIZE, b"x")
        assert world.process.rss_pages == 16
        world.check()

    def test_mappings_do_not_meet(self, world):
        places = [(world.process.mmap(nr * PAGE_SIZE), nr * PAGE_SIZE) for nr in (1, 513, 3)]
        for (address, length), (following, _) in zip(places, places[1:]):
            assert address + length <= following
        world.check()

    def test_a_gap_is_used_again(self, world):
        first = world.process.mmap("1M")
        world.process.mmap("1M")
        world.process.munmap(first, 1 << 20)
        assert world.process.mmap("1M") == first
        world.check()

    @pytest.mark.parametrize("wrong", [
        {"length": 0}, {"length": 4097}, {"length": "x"}, {"order": -1}, {"order": 10}, {"nid": 2}, {"prot": "rz"},
        {"offset": 4096}, {"shared": True}, {"address": 4097}, {"address": 0}, {"address": 1 << 47},
    ])
    def test_refused(self, world, wrong):
        with pytest.raises(InvalidInput) as refused:
            world.process.mmap(**{"length": "4K", **wrong})
        assert "\n" not in str(refused.value)
        world.check()
        assert world.process.rss_pages == 0

    def test_refused_where_something_is_mapped(self, world):
        address = world.process.mmap("64K")
        for at in (address, address + 15 * PAGE_SIZE, address - PAGE_SIZE):
            with pytest.raises(InvalidInput, match="mapped already"):
                world.process.mmap("8K", address=at)
        world.check()

    def test_no_gap_left(self, world):
        with pytest.raises(OutOfMemory, match="no gap"):
            world.process.mmap(1 << 47, populate=False)

    def test_munmap_of_a_part_splits_the_vma(self, world):
        address, pfns = world.map(6)
        content = world.expected.pop()[2]
        world.process.munmap(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        for first in (0, 4):
            at = address + first * PAGE_SIZE
            world.expected.append((world.process, at, content[first * PAGE_SIZE:][:2 * PAGE_SIZE]))
        with pytest.raises(BadAddress):
            world.process.read(address + 2 * PAGE_SIZE, 1)
        assert world.folios.refcount[pfns[2:4]].tolist() == [0, 0] or world.machine.mem.sys.lru_batch_nr[0]
        assert world.process.move(address, 2 * PAGE_SIZE, 1).ret == world.process.move(at, 2 * PAGE_SIZE, 1).ret == 0
        world.check()
        with pytest.raises(BadAddress):
            world.process.munmap(address - PAGE_SIZE, PAGE_SIZE)

    def test_munmap_of_a_part_of_a_thp(self, world):
        address, (pfn,) = world.map(1, 9)
        content = world.expected.pop()[2]
        world.process.munmap(address, 100 * PAGE_SIZE)
        world.expected.append((world.process, address + 100 * PAGE_SIZE, content[100 * PAGE_SIZE:]))
        assert (world.folios.mapcount[pfn], world.folios.entire_mapcount[pfn]) == (412, 0)
        assert world.folios.page_flags[pfn] & PG_partially_mapped
        world.check()

    def test_exit_gives_everything_back(self, world):
        free = world.machine.free_blocks(0)
        process = world.machine.process("short-lived")
        process.mmap("1M", order=3)
        process.mmap("4M", order=9)
        process.fork().exit()
        process.exit()
        assert world.machine.free_blocks(0) == free and process not in world.machine.processes
        world.check()

    def test_page_tables_and_rows_are_used_again(self, world):
        sizes = None
        for _ in range(30):
            process = world.machine.process()
            process.mmap("4M", order=9)
            process.mmap("64K")
            process.exit()
            mem = world.machine.mem
            sizes = sizes or (len(mem.tables), len(mem.mms), len(mem.vmas), len(mem.avcs), int(mem.sys.nr_tables[0]))
            assert sizes == (len(mem.tables), len(mem.mms), len(mem.vmas), len(mem.avcs), int(mem.sys.nr_tables[0]))
        world.check()


class TestReadWrite:
    """Memory is read and written through the page table, at any byte."""

    @pytest.mark.parametrize("order", [0, 2, 9])
    def test_unaligned_spans(self, world, order):
        address, _ = world.map(2, order)
        content = bytearray(world.expected[0][2])
        for seed, (at, nr) in enumerate([(0, 1), (4095, 2), (1, 4096), (4097, 1), (len(content) - 1, 1), (17, 0)]):
            piece = random_bytes(nr, seed + 100)
            world.process.write(address + at, piece)
            content[at:at + nr] = piece
            assert world.process.read(address + at, nr) == piece
        world.expected = [(world.process, address, bytes(content))]
        world.check()

    def test_any_buffer_can_be_written(self, world):
        address = world.process.mmap("4K")
        for data in (b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), np.frombuffer(b"abcd", np.uint8)):
            world.process.write(address, data)
            assert world.process.read(address, 4) == b"abcd"
            world.process.write(address, bytes(4))

    def test_neighbouring_mappings_are_one_span(self, world):
        world.process.mmap("4K", address=1 << 30)
        world.process.mmap("4K", address=(1 << 30) + PAGE_SIZE)
        world.process.write((1 << 30) + 4000, b"y" * 200)
        assert world.process.read((1 << 30) + 4000, 200) == b"y" * 200
        world.check()

    def test_reading_maps_the_zero_page_and_writing_replaces_it(self, world):
        address = world.process.mmap("64K", order=4, populate=False)
        assert world.process.read(address, 65536) == bytes(65536)
        assert world.process.rss_pages == 0
        world.process.write(address + 8192, b"z")
        assert world.process.rss_pages == 1
        assert world.process.read(address, 65536) == bytes(8192) + b"z" + bytes(65536 - 8193)
        world.check()

    def test_outside(self, world):
        address, _ = world.map(2)
        for at, nr in ((address - 1, 1), (address + 2 * PAGE_SIZE, 1), (address, 2 * PAGE_SIZE + 1), (0, 1), (1 << 46, 1)):
            with pytest.raises(BadAddress, match="no vma|in no"):
                world.process.read(at, nr)
            with pytest.raises(BadAddress):
                world.process.write(at, b"\1" * nr if nr == 1 else world.expected[0][2] + b"\1")
        world.check()

    def test_protection(self, world):
        read_only = world.process.mmap("4K", prot="r")
        with pytest.raises(BadAddress, match="not writable"):
            world.process.write(read_only, b"x")
        assert world.process.read(read_only, 3) == bytes(3)
        none = world.process.mmap("4K", prot="")
        with pytest.raises(BadAddress, match="not readable"):
            world.process.read(none, 1)
        world.check()

    def test_refused_while_a_migration_runs(self, world):
        address, pfns = world.map(2)
        refused = []

        def use(step, pfn):
            for action in (lambda: world.process.read(address, 1), lambda: world.process.write(address, b"x"),
                           lambda: world.process.mmap("4K"), lambda: world.process.populate(address, 4096), lambda: world.process.munmap(address, PAGE_SIZE),
                           world.process.fork, world.process.exit, lambda: world.process.move(address, 4096, 1),
                           lambda: world.migrate([pfns[1]]), world.machine.validate, world.machine.process,
                           lambda: world.machine.fragment(0, 1), lambda: world.machine.file("4K")):
                with pytest.raises(Busy, match="a migration is running"):
                    action()
                refused.append(step)

        result = world.migrate(pfns, events=[Event("unmapped", use)])
        assert result.rc == 0 and len(refused) == 26
        world.check()


class TestFork:
    """After a fork both see the same bytes, and what one writes the other does not see."""

    @pytest.mark.parametrize("order", [0, 3, 9])
    @pytest.mark.parametrize("writer", ["parent", "child"])
    def test_copy_on_write(self, order, writer):
        world = World(4096, 1024)
        address, pfns = world.map(2, order)
        child = world.process.fork()
        content = world.expected[0][2]
        world.expected.append((child, address, content))
        assert (world.folios.mapcount[pfns] == 2 * (1 if order == 9 else 1 << order)).all()
        world.check()
        who = world.process if writer == "parent" else child
        who.write(address + 100, b"changed")
        index = 0 if who is world.process else 1
        world.expected[index] = who, address, content[:100] + b"changed" + content[107:]
        world.check()
        assert world.process.rss_pages == child.rss_pages == 2 << order

    def test_the_last_owner_writes_in_place(self, world):
        address, (pfn,) = world.map(1)
        child = world.process.fork()
        child.exit()
        world.machine.lru_add_drain()
        world.process.write(address, b"x")
        assert world.machine.folios_of(world.process, address, 1).tolist() == [pfn]
        world.machine.validate()

    def test_a_pinned_page_is_copied_at_once(self, world):
        address, (pfn,) = world.map(1)
        world.pin(pfn)
        child = world.process.fork()
        world.expected.append((child, address, world.expected[0][2]))
        assert world.folios.mapcount[pfn] == 1
        world.process.write(address, world.expected[0][2])
        assert world.machine.folios_of(world.process, address, 1).tolist() == [pfn], "the pinned page stays the parent's"
        world.check()

    def test_no_room_for_the_copy_of_a_pinned_page(self):
        world = World(16)
        _, pfns = world.map(16)
        world.pin(pfns[9])
        with pytest.raises(OutOfMemory, match="fork"):
            world.process.fork()
        assert world.machine.processes == [world.process] and (world.folios.mapcount[pfns] == 1).all()
        world.check()

    def test_grandchildren(self, world):
        address, pfns = world.map(4, 1)
        child = world.process.fork()
        grandchild = child.fork()
        for process in (child, grandchild):
            world.expected.append((process, address, world.expected[0][2]))
        assert (world.folios.mapcount[pfns] == 6).all()
        assert world.process.move(address, 8 * PAGE_SIZE, 1, move_all=True).ret == 0
        assert world.where(address, 4, 1, grandchild) == [1] * 4
        world.check()
        child.exit()
        del world.expected[1]
        world.check()

    def test_mlock_is_not_inherited(self, world):
        address, (pfn,) = world.map(1, mlock=True)
        child = world.process.fork()
        assert world.folios.page_flags[pfn] & PG_mlocked
        new = child.mmap("4K")
        assert not world.folios.page_flags[world.machine.folios_of(child, new, 1)[0]] & PG_mlocked
        world.check()


class TestMlock:
    """Locked memory is mlocked, unevictable and counted, until it is unmapped."""

    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_marks(self, world, order):
        address, (pfn,) = world.map(1, order, mlock=True)
        world.machine.lru_add_drain()
        assert world.folios.page_flags[pfn] & PG_mlocked and world.folios.page_flags[pfn] & PG_unevictable
        assert world.machine.mem.nodes.nr_mlock[0] == world.machine.mem.nodes.nr_unevictable[0] == 1 << order
        world.check()
        world.process.munmap(address, PAGE_SIZE << order)
        assert world.machine.mem.nodes.nr_mlock[0] == 0
        world.machine.validate()

    def test_a_file_page_stays_when_unlocked(self, world):
        """What others still map, or the page cache keeps, is evictable again."""
        file = world.machine.file("8K")
        address, pfns = world.map(2, file=file, shared=True, mlock=True)
        world.machine.lru_add_drain()
        assert world.machine.mem.nodes.nr_unevictable[0] == 2
        world.process.munmap(address, 2 * PAGE_SIZE)
        world.expected.clear()
        assert world.machine.mem.nodes.nr_unevictable[0] == 0 and world.machine.mem.nodes.nr_lru_file[0] == 2
        world.check()


class TestFiles:
    """A file's pages are in its page cache once, whoever maps them; private writers get copies of their own."""

    @pytest.mark.parametrize("kind", ["file", "shmem"])
    @pytest.mark.parametrize("order", [0, 3, 9])
    def test_shared_writes_are_seen_by_all(self, kind, order):
        world = World(4096, 1024)
        file = world.machine.file(PAGE_SIZE << order, kind=kind)
        address, pfns = world.map(1, order, file=file, shared=True)
        other = world.machine.process()
        there = other.mmap(PAGE_SIZE << order, file=file, order=order, shared=True)
        world.expected.append((other, there, world.expected[0][2]))
        assert world.machine.folios_of(other, there, PAGE_SIZE << order).tolist() == pfns.tolist()
        assert bool(world.folios.page_flags[pfns[0]] & PG_swapbacked) == (kind == "shmem")
        nodes = world.machine.mem.nodes
        assert nodes.nr_file_pages[0] == 1 << order and nodes.nr_shmem[0] == (1 << order if kind == "shmem" else 0)
        world.check()

    def test_the_cache_outlives_its_mappings(self, world):
        file = world.machine.file("16K")
        address, _ = world.map(4, file=file, shared=True)
        world.process.munmap(address, 4 * PAGE_SIZE)
        process, _, content = world.expected.pop()
        again = process.mmap("16K", file=file, prot="r", shared=True)
        world.expected.append((process, again, content))
        world.check()

    def test_private_writes_stay_private(self, world):
        file = world.machine.file("16K")
        shared, _ = world.map(4, file=file, shared=True)
        private = world.process.mmap("16K", file=file, populate=False)
        content = world.expected[0][2]
        assert world.process.read(private, 4 * PAGE_SIZE) == content
        world.process.write(private + 5000, b"mine")
        world.expected.append((world.process, private, content[:5000] + b"mine" + content[5004:]))
        world.check()
        mem = world.machine.mem
        assert mem.mms.rss_anon[world.process.mm] == 1

    def test_a_private_write_to_a_fresh_page(self, world):
        file = world.machine.file("8K", kind="shmem")
        address, _ = world.map(2, file=file)
        reader = world.process.mmap("8K", file=file, prot="r", shared=True)
        assert world.process.read(reader, 8192) == bytes(8192)
        world.check()

    def test_holes_are_zeros(self, world):
        file = world.machine.file("64K")
        address = world.process.mmap("64K", file=file, shared=True, populate=False)
        world.process.write(address + 5 * PAGE_SIZE, b"island")
        assert world.process.read(address, 65536) == bytes(5 * PAGE_SIZE) + b"island" + bytes(65536 - 5 * PAGE_SIZE - 6)
        world.check()

    def test_offsets(self, world):
        file = world.machine.file("64K")
        whole = world.process.mmap("64K", file=file, shared=True)
        content = random_bytes(65536)
        world.process.write(whole, content)
        part = world.process.mmap("16K", file=file, offset=8192, shared=True, order=4)
        assert world.process.read(part, 16384) == content[8192:8192 + 16384]
        world.check()

    def test_beyond_the_end(self, world):
        file = world.machine.file("8K")
        with pytest.raises(BadAddress, match="beyond the end of its file"):
            world.process.mmap("16K", file=file, shared=True, address=1 << 30)
        assert world.process.read(1 << 30, 8192) == bytes(8192)
        with pytest.raises(BadAddress, match="beyond the end"):
            world.process.read((1 << 30) + 8192, 1)
        world.machine.validate()

    def test_a_shared_writer_dirties(self, world):
        file = world.machine.file("4K")
        address, (pfn,) = world.map(1, file=file, shared=True)
        world.process.munmap(address, PAGE_SIZE)
        world.expected.clear()
        assert world.folios.page_flags[pfn] & PG_dirty and world.machine.mem.nodes.nr_file_dirty[0] == 1
        world.check()

    @pytest.mark.parametrize("wrong, error", [
        ({"size": 0}, InvalidInput), ({"size": "5K"}, InvalidInput), ({"kind": "hugetlb"}, InvalidInput),
        ({"aops": "btrfs"}, InvalidInput), ({"kind": "secretmem", "aops": "filemap"}, InvalidInput),
        ({"busy_buffers": True}, InvalidInput)])
    def test_refused(self, world, wrong, error):
        with pytest.raises(error):
            world.machine.file(**{"size": "4K", **wrong})


class TestConfigurations:
    """A machine that cannot be is refused, with the value and the remedy."""

    @pytest.mark.parametrize("make, says", [
        (lambda: Machine(nodes=[]), "at least one node"), (lambda: Machine(nodes=["5000"]), "5000"),
        (lambda: Machine(nodes=["4K"] * 65), "65"), (lambda: Machine(nodes=["4K"], placement="moon"), "moon"),
        (lambda: Machine(nodes=["4K"], batch_pages=0), "batch_pages"), (lambda: Machine(copy_kernel="warp"), "warp"),
        (lambda: Machine(MachineConfig(), batch_pages=3), "not both"), (lambda: NodeConfig(-1), "-1"),
        (lambda: MachineConfig(nodes=(NodeConfig(), NodeConfig(placement="nowhere"))), "mixed"),
    ])
    def test_refused(self, make, says):
        with pytest.raises(InvalidInput, match=says) as refused:
            make()
        assert "\n" not in str(refused.value)

    def test_more_than_this_host_can_hold(self):
        with pytest.raises(OutOfMemory, match="smaller"):
            Machine(nodes=["2000000T"])

    def test_nodes_in_three_spellings(self):
        machine = Machine(nodes=["4M", 1024, NodeConfig(1024)])
        assert machine.mem.nodes.nr_pages.tolist() == [1024] * 3


class TestSparse:
    """Address space costs nothing until it is touched."""

    def test_a_terabyte(self, world):
        span = 1 << 33 if JIT_DISABLED else 1 << 40
        address = world.process.mmap(span, populate=False)
        tables = len(world.machine.mem.tables)
        places = [address + at for at in (0, span // 256, span * 3 // 4, span - PAGE_SIZE)]
        for at in places:
            world.process.write(at, b"here")
        assert world.process.rss_pages == 4 and len(world.machine.mem.tables) <= 2 * tables
        assert world.machine.folio_addresses(world.process, [(address, address + span)]).tolist() == sorted(places)
        result = world.process.move(address, span, 1)
        assert result.ret == 0 and result.total("nr_succeeded") == 4
        assert [world.process.read(at, 4) for at in places] == [b"here"] * 4
        world.process.munmap(address, span)
        world.check()


class TestNowhere:
    """A machine that is metadata only moves metadata, and refuses to touch bytes it does not have."""

    @pytest.fixture
    def nowhere(self):
        return Machine(nodes=[2048, 2048], placement="nowhere")

    def test_no_bytes(self, nowhere):
        process = nowhere.process()
        address = process.mmap("64K", order=2)
        for refused in (lambda: process.read(address, 1), lambda: process.write(address, b"x")):
            with pytest.raises(NotSupported, match="metadata only"):
                refused()
        nowhere.validate()

    def test_moves(self, nowhere):
        process = nowhere.process()
        address = process.mmap("1M", order=2)
        result = process.move(address, "1M", 1)
        assert result.ret == 0 and result.total("nr_succeeded") == 256 and result.total("moved_bytes") == 1 << 20
        assert result.total("copied_bytes") == 0
        nowhere.validate()

    @pytest.mark.skipif(JIT_DISABLED, reason="65536 folios take minutes without the compiler")
    def test_256_gib_under_5_gib(self):
        code = """
import resource
from offload.machine import Machine
machine = Machine(nodes=["128G", "128G"], placement="nowhere")
assert machine.free_pages(0) == machine.free_pages(1) == 1 << 25
process = machine.process()
address = process.mmap("256M")
result = process.move(address, "256M", 1)
assert result.ret == 0 and result.total("nr_succeeded") == 65536, result
assert machine.free_pages(1) == (1 << 25) - 65536
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 5 << 30


def entries(world, address, nr=1, process=None):
    return page_entries(world.machine, (process or world.process).mm, address, nr)


class TestProtection:
    """mprotect, userfaultfd, and what becomes of vmas and PMD leaves at the edges."""

    def test_read_only_and_back(self, world):
        address, _ = world.map(4)
        world.process.mprotect(address + PAGE_SIZE, 2 * PAGE_SIZE, "r")
        with pytest.raises(BadAddress, match="not writable"):
            world.process.write(address + PAGE_SIZE, b"x")
        assert (entries(world, address, 4) & PTE_WRITE != 0).tolist() == [True, False, False, True]
        world.process.move(address, 4 * PAGE_SIZE, 1)
        world.check()
        world.process.mprotect(address + PAGE_SIZE, PAGE_SIZE, "rw")
        world.process.write(address + PAGE_SIZE, world.expected[0][2][PAGE_SIZE:2 * PAGE_SIZE])
        assert world.where(address, 4) == [1, 1, 1, 1]
        world.check()

    def test_no_access(self, world):
        address, _ = world.map(1)
        world.process.mprotect(address, PAGE_SIZE, "")
        with pytest.raises(BadAddress, match="not readable"):
            world.process.read(address, 1)
        assert world.process.move(address, PAGE_SIZE, 1).ret == 0
        world.process.mprotect(address, PAGE_SIZE, "rw")
        world.check()
        with pytest.raises(InvalidInput):
            world.process.mprotect(address, PAGE_SIZE, "rq")
        with pytest.raises(InvalidInput, match="not made of pages"):
            world.process.mprotect(address, 100, "r")

    def test_a_pmd_leaf_across_an_edge_is_split(self, world):
        address, (pfn,) = world.map(1, 9)
        world.process.mprotect(address + 100 * PAGE_SIZE, PAGE_SIZE, "r")
        assert world.folios.entire_mapcount[pfn] == 0 and world.folios.mapcount[pfn] == 512
        world.check()

    def test_a_move_keeps_the_mark_of_userfaultfd(self, world):
        address, _ = world.map(4)
        world.process.uffd_wp(address, 4 * PAGE_SIZE)
        world.process.move(address, 4 * PAGE_SIZE, 1)
        assert ((entries(world, address, 4) & (PTE_UFFD_WP | PTE_WRITE)) == PTE_UFFD_WP).all()
        with pytest.raises(WouldHang, match="userfaultfd"):
            world.process.write(address, b"x")
        world.check()

    def test_split_pmd(self, world):
        address, (pfn,) = world.map(1, 9)
        world.process.split_pmd(address, PAGE_SIZE)
        assert world.folios.mapcount[pfn] == 512
        world.check()

    @pytest.mark.parametrize("to, huge", [(4 * PMD, True), (4 * PMD + PAGE_SIZE, False)])
    def test_mremap_moves_entries_as_they_are(self, world, to, huge):
        address, (pfn,) = world.map(1, 9)
        _, _, content = world.expected.pop()
        before = world.folios.refcount[pfn]
        assert world.process.mremap(address, PMD, address + to) == address + to
        world.expected.append((world.process, address + to, content))
        assert (world.folios.entire_mapcount[pfn] == 1) == huge
        assert not huge or world.folios.refcount[pfn] == before
        with pytest.raises(BadAddress):
            world.process.read(address, 1)
        world.check()
        assert world.process.move(address + to, PMD, 1).ret == 0
        world.check()

    def test_mremap_of_a_part_and_refusals(self, world):
        address, _ = world.map(4)
        with pytest.raises(InvalidInput, match="cannot be moved to"):
            world.process.mremap(address, PAGE_SIZE, address + 2 * PAGE_SIZE)
        with pytest.raises(BadAddress, match="beyond its vma"):
            world.process.mremap(address, 8 * PAGE_SIZE, address + PMD)
        content = world.expected.pop()[2]
        world.process.mremap(address + PAGE_SIZE, PAGE_SIZE, address + PMD)
        world.expected.append((world.process, address + PMD, content[PAGE_SIZE:2 * PAGE_SIZE]))
        world.expected.append((world.process, address + 2 * PAGE_SIZE, content[2 * PAGE_SIZE:]))
        world.check()


class TestPartiallyMapped:
    """A large anonymous folio is queued for splitting when a page of it loses its last mapping and others have theirs."""

    def shared(self, world, order):
        address, (pfn,) = world.map(1, order)
        return address, pfn, world.process.fork()

    def partial(self, world, pfn):
        return world.folios.page_flags[pfn] & PG_partially_mapped != 0

    @pytest.mark.parametrize("order", [2, 4, 9])
    def test_two_processes(self, world, order):
        """As long as somebody maps each page it is whole, however many entries there are."""
        address, pfn, child = self.shared(world, order)
        half = PAGE_SIZE << order - 1
        world.expected.clear()
        child.dontneed(address, half)
        assert not self.partial(world, pfn)
        world.process.dontneed(address + half, half)
        assert not self.partial(world, pfn), "each page has one mapping"
        world.process.dontneed(address, PAGE_SIZE)
        assert self.partial(world, pfn)
        assert world.process.move(address + PAGE_SIZE, half - PAGE_SIZE, 1, move_all=True).total("nr_split") == 1
        world.check()

    def test_the_same_half(self, world):
        """There are as many entries as pages then, but not of each."""
        address, pfn, child = self.shared(world, 4)
        world.expected.clear()
        for process in (child, world.process):
            process.dontneed(address, 8 * PAGE_SIZE)
        assert world.folios.mapcount[pfn] == 16 and self.partial(world, pfn)
        world.check()

    @pytest.mark.parametrize("pages", [512, 511])
    def test_the_last_pmd_goes(self, world, pages):
        address, pfn, child = self.shared(world, 9)
        child.dontneed(address, PAGE_SIZE)          # of its PTEs now
        if pages == 512:
            child.munmap(address, PMD)
            child = world.process.fork()
            child.split_pmd(address, PMD)
        world.expected.clear()
        world.process.munmap(address, PMD)
        assert self.partial(world, pfn) == (pages < 512)
        world.check()


class TestZeroPage:
    """Reads of untouched memory map the zero page, a huge one where a folio of that order would fit."""

    def test_huge(self, world):
        address = world.process.mmap(2 * PMD, order=9, populate=False)
        assert world.process.read(address + 5, 3) == bytes(3)
        assert ((entries(world, address, 512) & (PTE_HUGE | PTE_SPECIAL)) == PTE_HUGE | PTE_SPECIAL).all()
        assert world.process.rss_pages == 0 and not entries(world, address + PMD, 512).any()
        world.check()
        world.process.write(address + PAGE_SIZE, b"x")
        assert world.process.rss_pages == 512 and world.process.read(address, PMD) == bytes(PAGE_SIZE) + b"x" + bytes(PMD - PAGE_SIZE - 1)
        world.check()

    def test_huge_without_room_is_split(self):
        world = World(256)
        address = world.process.mmap(PMD, order=9, populate=False)
        world.process.read(address, 1)
        world.process.write(address + PAGE_SIZE, b"x")
        assert world.process.rss_pages == 1 and world.process.read(address, PMD)[PAGE_SIZE] == ord("x")
        world.check()
        world.process.munmap(address, PMD)
        world.check()

    def test_fork_and_part(self, world):
        address = world.process.mmap(2 * PMD, order=9, populate=False)
        world.process.read(address, 1)
        world.process.write(address + PMD, b"y")          # memory of its own: now page tables are copied
        child = world.process.fork()
        assert (entries(world, address, 512, child) & PTE_SPECIAL != 0).all()
        child.dontneed(address, PAGE_SIZE)
        assert entries(world, address, 2, child).tolist()[0] == 0
        world.check()


class TestForkCopies:
    """fork() copies page tables only where that cannot be made up for by faults (vma_needs_copy())."""

    @pytest.mark.parametrize("shared", [True, False])
    def test_files_are_faulted_in_again(self, world, shared):
        file = world.machine.file("16K")
        address = world.process.mmap("16K", file=file, shared=shared, prot="r")
        child = world.process.fork()
        assert not entries(world, address, 4, child).any()
        assert child.read(address, 4) == bytes(4)
        world.check()

    def test_a_private_mapping_with_pages_of_its_own(self, world):
        file = world.machine.file("16K")
        address = world.process.mmap("16K", file=file, populate=False)
        world.process.read(address, 4 * PAGE_SIZE)
        world.process.write(address, b"own")
        child = world.process.fork()
        assert (entries(world, address, 4, child) & PTE_PRESENT != 0).all()
        child.write(address, b"his")
        assert (world.process.read(address, 3), child.read(address, 3)) == (b"own", b"his")
        world.check()

    def test_dontfork(self, world):
        address, _ = world.map(4)
        world.process.dontfork(address + PAGE_SIZE, PAGE_SIZE)
        child = world.process.fork()
        with pytest.raises(BadAddress):
            child.read(address + PAGE_SIZE, 1)
        assert child.read(address, PAGE_SIZE) == world.expected[0][2][:PAGE_SIZE]
        world.check()

    @pytest.mark.parametrize("order", [4, 9])
    def test_a_large_folio_whose_other_owner_has_gone_is_written_in_place(self, world, order):
        address, (pfn,) = world.map(1, order)
        world.process.split_pmd(address, PAGE_SIZE)
        child = world.process.fork()
        child.exit()
        world.process.write(address, world.expected[0][2][:10])
        assert world.machine.folios_of(world.process, address, PAGE_SIZE << order).tolist() == [pfn]
        assert entries(world, address)[0] & PTE_EXCLUSIVE
        world.check()

    @pytest.mark.parametrize("order", [4, 9])
    def test_one_that_is_still_shared_is_copied(self, world, order):
        address, (pfn,) = world.map(1, order)
        child = world.process.fork()
        child.munmap(address, PAGE_SIZE)            # not that page, but the folio
        world.process.write(address, world.expected[0][2][:10])
        assert world.machine.folios_of(world.process, address, PAGE_SIZE)[0] != pfn
        world.check()


class TestPins:
    """pin() is FOLL_PIN | FOLL_LONGTERM, get() is FOLL_GET; unpin() and put() give back what was taken."""

    @pytest.mark.parametrize("order", [0, 9])
    def test_a_pinned_page_stays(self, world, order):
        address, (pfn,) = world.map(1, order)
        world.process.pin(address)
        assert world.folios.pincount[pfn] == 1 and world.process.move(address, PAGE_SIZE << order, 1).ret == 1
        world.check()
        world.process.unpin(address)
        assert world.process.move(address, PAGE_SIZE << order, 1).ret == 0
        world.check()
        with pytest.raises(InvalidInput, match="not pinned"):
            world.process.unpin(address)

    def test_a_held_page_stays(self, world):
        address, _ = world.map(1)
        world.process.get(address)
        assert world.process.move(address, PAGE_SIZE, 1).ret == 1
        world.check()
        world.process.put(address)
        with pytest.raises(InvalidInput, match="not held"):
            world.process.put(address)
        assert world.process.move(address, PAGE_SIZE, 1).ret == 0
        world.check()

    def test_a_shared_page_is_unshared_first(self, world):
        address, (pfn,) = world.map(1)
        child = world.process.fork()
        child.mprotect(address, PAGE_SIZE, "r")
        child.pin(address)
        assert world.machine.folios_of(child, address, PAGE_SIZE)[0] != pfn and world.folios.pincount[pfn] == 0
        assert child.read(address, PAGE_SIZE) == world.expected[0][2]
        world.check()

    def test_untouched_and_zero_pages(self, world):
        address = world.process.mmap("8K", populate=False, prot="r")
        world.process.get(address)
        world.process.pin(address + PAGE_SIZE)
        assert world.process.rss_pages == 1, "a reference on the zero page is none; a pin brings a page of its own"
        world.process.put(address)
        world.check()

    def test_exit_gives_them_back(self, world):
        free = world.machine.free_pages(0)
        process = world.machine.process()
        address = process.mmap("16K")
        process.pin(address, 2 * PAGE_SIZE)
        process.get(address)
        process.exit(reaped=False)
        world.machine.lru_add_drain()
        assert world.machine.free_pages(0) == free and process.state == "zombie"
        world.check()


class TestAdvice:
    """MADV_COLD, MADV_FREE, MADV_DONTNEED, MADV_PAGEOUT, and msync."""

    def test_dontneed(self, world):
        address, _ = world.map(4)
        content = world.expected.pop()[2]
        world.process.dontneed(address + PAGE_SIZE, PAGE_SIZE)
        assert world.process.read(address, 3 * PAGE_SIZE) == content[:PAGE_SIZE] + bytes(PAGE_SIZE) + content[2 * PAGE_SIZE:3 * PAGE_SIZE]
        locked = world.process.mmap("4K", mlock=True)
        with pytest.raises(InvalidInput, match="EINVAL"):
            world.process.dontneed(locked, PAGE_SIZE)
        world.check()

    @pytest.mark.parametrize("order", [0, 9])
    def test_free(self, world, order):
        address, (pfn,) = world.map(1, order)
        world.process.free(address, PAGE_SIZE << order)
        assert world.folios.page_flags[pfn] & (PG_swapbacked | PG_dirty) == 0
        assert world.machine.mem.nodes.nr_lru_file[0] == 1 << order
        world.check()
        world.process.move(address, PAGE_SIZE << order, 1)
        (pfn,) = world.machine.folios_of(world.process, address, PAGE_SIZE)
        assert world.folios.page_flags[pfn] & PG_swapbacked == 0 and world.where(address) == [1]
        world.check()

    def test_cold(self, world):
        address, pfns = world.map(2)
        world.process.cold(address, 2 * PAGE_SIZE)
        world.check()
        file = world.process.mmap("4K", file=world.machine.file("4K"))
        with pytest.raises(InvalidInput, match="MADV_FREE"):
            world.process.free(file, PAGE_SIZE)

    @pytest.mark.parametrize("order", [0, 3, 9])
    def test_swap_out_and_in(self, world, order):
        world.machine.swapon("8M")
        address, pfns = world.map(2, order)
        nbytes = 2 * PAGE_SIZE << order
        world.process.swapout(address, nbytes)
        assert (entries(world, address, 2 << order) & PTE_SWAP != 0).all() and world.process.rss_pages == 0
        assert world.folios.refcount[pfns].tolist() == [0, 0], "the folios are freed"
        world.machine.validate()
        assert world.process.move(address, nbytes, 1).addresses.size == 0, "there is no folio to move"
        world.check()                               # reads it all in
        (pfn, *_) = world.machine.folios_of(world.process, address, PAGE_SIZE)
        assert world.folios.page_flags[pfn] & PG_swapcache
        assert world.process.move(address, nbytes, 1).ret == 0
        world.check()
        world.process.write(address, world.expected[0][2])
        (pfn, *_) = world.machine.folios_of(world.process, address, PAGE_SIZE)
        assert world.folios.page_flags[pfn] & PG_swapcache and entries(world, address)[0] & PTE_WRITE
        world.process.munmap(address, nbytes)
        world.machine.lru_add_drain()
        assert not world.machine.mem.swap_map.any() and not world.machine.mem.nodes.nr_swapcache.any()
        world.machine.validate()

    def test_swapped_pages_and_fork(self, world):
        world.machine.swapon("64K")
        address, _ = world.map(2)
        world.process.swapout(address, 2 * PAGE_SIZE)
        child = world.process.fork()
        assert world.machine.mem.swap_map.max() == 2
        child.read(address, PAGE_SIZE)              # reads it into the swap cache
        world.machine.validate()
        child.write(address, b"child")
        assert world.process.read(address, 5) == world.expected[0][2][:5]
        assert world.process.move(address, PAGE_SIZE, 1, move_all=True).ret == 0
        world.check()
        child.exit()
        world.check()

    @pytest.mark.parametrize("order", [0, 9])
    def test_what_somebody_holds_stays_in_the_swap_cache(self, world, order):
        world.machine.swapon("4M")
        address, (pfn,) = world.map(1, order)
        world.process.get(address)
        world.process.swapout(address, PAGE_SIZE << order)
        world.machine.lru_add_drain()
        assert world.folios.refcount[pfn] == 1 + (1 << order), "the holder's and the swap cache's"
        assert world.folios.page_flags[pfn] & (PG_swapcache | PG_dirty) == PG_swapcache, "it has been written out"
        world.process.put(address)
        world.check()

    def test_what_is_not_swapped_out(self, world):
        world.machine.swapon("64K")
        address, pfns = world.map(4)
        world.process.pin(address)
        child = world.process.fork()
        child.munmap(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        world.process.swapout(address, 4 * PAGE_SIZE)
        out = entries(world, address, 4) & PTE_SWAP != 0
        assert out.tolist() == [False, False, True, True], "neither the pinned page nor the one that is shared"
        world.check()

    def test_no_swap_space(self, world):
        address, _ = world.map(2)
        with pytest.raises(InvalidInput, match="swapon"):
            world.process.swapout(address, PAGE_SIZE)
        world.machine.swapon("4K")
        with pytest.raises(OutOfMemory, match="free entries"):
            world.process.swapout(address, 2 * PAGE_SIZE)
        world.check()

    @pytest.mark.parametrize("kind, aops, clean", [("file", "filemap", True), ("file", "none", False), ("shmem", None, False)])
    def test_msync(self, world, kind, aops, clean):
        file = world.machine.file("16K", kind=kind, aops=aops)
        address = world.process.mmap("16K", file=file, shared=True)
        world.process.write(address, b"x" * 4 * PAGE_SIZE)
        pfns = world.machine.folios_of(world.process, address, 4 * PAGE_SIZE)
        world.process.munmap(address, PAGE_SIZE)    # takes the dirty bit to the folio
        world.process.msync(address + PAGE_SIZE, 3 * PAGE_SIZE)
        dirty = [bool(entry & 1 << 3) for entry in entries(world, address + PAGE_SIZE, 3)]
        assert dirty == [not clean] * 3 and bool(world.folios.page_flags[pfns[1]] & PG_dirty) == False
        assert world.folios.page_flags[pfns[0]] & PG_dirty, "outside the range"
        world.check()
        world.process.write(address + PAGE_SIZE, b"y")
        assert entries(world, address + PAGE_SIZE)[0] & PTE_WRITE
        world.check()


class TestMlockTwice:
    """A folio that two locked vmas map stays mlocked until both have let it go."""

    def test_two_processes(self, world):
        file = world.machine.file("4K")
        address = world.process.mmap("4K", file=file, shared=True, mlock=True)
        other = world.machine.process()
        other.mmap("4K", file=file, shared=True, mlock=True, address=address)
        world.machine.lru_add_drain()
        (pfn,) = world.machine.folios_of(world.process, address, PAGE_SIZE)
        world.process.munmap(address, PAGE_SIZE)
        assert world.folios.page_flags[pfn] & PG_mlocked
        world.check()
        other.munmap(address, PAGE_SIZE)
        assert not world.folios.page_flags[pfn] & PG_mlocked
        world.check()


class TestSpecialMemory:
    """Device memory, the vdso, and KSM."""

    def test_pfnmap(self, world):
        address = world.process.mmap("8K", pfnmap=True, shared=True)
        for refused in (lambda: world.process.read(address, 1), lambda: world.process.write(address, b"x"),
                        lambda: world.process.pin(address)):
            with pytest.raises(BadAddress, match="device memory"):
                refused()
        child = world.process.fork()
        assert (entries(world, address, 2, child) & PTE_SPECIAL != 0).all()
        world.check()

    def test_the_vdso_is_mapped_by_init_too(self, world):
        vdso = world.machine.vdso()
        address = world.process.mmap(PAGE_SIZE, file=vdso, prot="rx")
        (pfn,) = world.machine.folios_of(world.process, address, PAGE_SIZE)
        assert world.folios.mapcount[pfn] == 2 and world.folios.page_flags[pfn] & PG_reserved
        assert world.process.move(address, PAGE_SIZE, 1).status.tolist() == [-13]
        assert world.process.move(address, PAGE_SIZE, 1, move_all=True).status.tolist() == [-16]
        world.check()
        world.process.munmap(address, PAGE_SIZE)
        world.check()

    def test_ksm(self, world):
        address = world.process.mmap("16K")
        for i, word in enumerate((b"same", b"same", b"else", b"same")):
            world.process.write(address + i * PAGE_SIZE, word)
        world.machine.ksm_merge([(world.process, address + i * PAGE_SIZE) for i in range(4)])
        pfns = [int(entry) >> 12 for entry in entries(world, address, 4)]
        assert pfns[0] == pfns[1] == pfns[3] != pfns[2] and world.folios.mapcount[pfns[0]] == 3
        assert world.folios.page_flags[pfns[0]] & PG_ksm
        world.check()
        world.process.write(address, b"mine")
        assert [world.process.read(address + i * PAGE_SIZE, 4) for i in range(4)] == [b"mine", b"same", b"else", b"same"]
        assert world.process.move(address + PAGE_SIZE, PAGE_SIZE, 1, move_all=True).ret == 0
        assert world.where(address, 4) == [0, 1, 0, 1]
        world.check()
        with pytest.raises(InvalidInput, match="ksmd"):
            world.machine.ksm_merge([(world.process, world.process.mmap("4K", populate=False))])


def test_folios_of_takes_sizes_as_text():
    machine = Machine(nodes=["8M", "8M"])
    process = machine.process()
    va = process.mmap("64K")
    assert machine.folios_of(process, va, "16K").tolist() == machine.folios_of(process, va, 4 * PAGE_SIZE).tolist()
    with pytest.raises(InvalidInput, match="length '3X'"):
        machine.folios_of(process, va, "3X")
