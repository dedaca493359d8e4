"""move_pages(2): which pages move, in which runs, and what is reported for each."""

import pytest

from conftest import World
from offload.errors import BadAddress, InvalidInput
from offload.jit import JIT_DISABLED
from offload.machine import Machine
from offload.migrate.pages import Event
from offload.mm.memmap import VM_PFNMAP
from offload.syscalls import NOT_WRITTEN
from offload.units import EACCES, EBUSY, EFAULT, ENODEV, ENOENT, ENOMEM, PAGE_SIZE


def move(world, addresses, nids, **options):
    return world.machine.move_pages(world.process, addresses, nids, **options)


def pages(address, nr, order=0):
    return [address + i * (PAGE_SIZE << order) for i in range(nr)]


class TestStatuses:
    """Each page's status is its node, or why it stays; a page that is not moved ends the run, and no more."""

    def test_all_move(self, world):
        address, _ = world.map(5)
        result = move(world, pages(address, 5), 1)
        assert (result.ret, result.status.tolist(), len(result.calls)) == (0, [1] * 5, 1)
        assert result.calls[0].mode.name == "MIGRATE_SYNC" and result.calls[0].reason.trace_name == "syscall_or_cpuset"
        assert world.where(address, 5) == [1] * 5 and result.addresses.tolist() == pages(address, 5)
        world.check()

    def test_nothing_to_do(self, world):
        result = move(world, [], [])
        assert (result.ret, len(result.status), result.calls) == (0, 0, ())
        world.check()

    def test_each_page_to_its_node(self):
        world = World(1024, 1024, 1024)
        address, _ = world.map(6)
        result = move(world, pages(address, 6), [1, 1, 2, 1, 0, 2])
        assert (result.ret, result.status.tolist(), len(result.calls)) == (0, [1, 1, 2, 1, 0, 2], 4)
        assert world.where(address, 6) == [1, 1, 2, 1, 0, 2]
        world.check()

    def test_already_there(self, world):
        address, _ = world.map(3)
        move(world, [address + PAGE_SIZE], 1)
        result = move(world, pages(address, 3), 1)
        assert (result.ret, result.status.tolist(), len(result.calls)) == (0, [1, 1, 1], 2)
        world.check()

    def test_holes(self, world):
        address = world.process.mmap("16K", populate=False)
        for page in (0, 3):
            world.process.write(address + page * PAGE_SIZE, b"x")
        world.process.read(address + PAGE_SIZE, 1)      # the zero page
        unmapped = 1 << 46
        result = move(world, [*pages(address, 4), unmapped, address], 1)
        assert (result.ret, result.status.tolist()) == (0, [1, -EFAULT, -ENOENT, 1, -EFAULT, 1])
        assert world.process.read(address, 1) == world.process.read(address + 3 * PAGE_SIZE, 1) == b"x"
        world.check()

    def test_memory_without_folios(self, world):
        address, _ = world.map(1)
        world.machine.mem.vmas.vm_flags[world.process._vma_at(address)] |= VM_PFNMAP
        assert move(world, [address], 1).status.tolist() == [-EFAULT]
        world.machine.validate()

    def test_bytes_within_a_page(self, world):
        address, _ = world.map(2)
        result = move(world, [address + 7, address + 2 * PAGE_SIZE - 1], 1)
        assert (result.ret, result.status.tolist()) == (0, [1, 1])
        world.check()

    @pytest.mark.parametrize("order", [1, 4, 9])
    def test_the_second_address_of_a_folio(self, world, order):
        """The first queues the whole folio; the second finds it off the LRU, and ends the run."""
        address, _ = world.map(2, order)
        result = move(world, [address, address + PAGE_SIZE, address + (PAGE_SIZE << order)], 1)
        assert (result.ret, result.status.tolist(), len(result.calls)) == (0, [1, -EBUSY, 1], 2)
        assert result.total("nr_succeeded") == 2 << order
        world.check()

    @pytest.mark.parametrize("order", [0, 2, 9])
    def test_mapped_by_several_processes(self, order):
        world = World(2048, 2048)
        address, _ = world.map(2, order)
        child = world.process.fork()
        world.expected.append((child, address, world.expected[0][2]))
        result = move(world, pages(address, 2, order), 1)
        assert (result.ret, result.status.tolist(), result.calls) == (0, [-EACCES, -EACCES], ())
        result = move(world, pages(address, 2, order), 1, move_all=True)
        assert (result.ret, result.status.tolist()) == (0, [1, 1])
        assert world.where(address, 2, order, child) == [1, 1]
        world.check()

    def test_shared_but_already_there(self, world):
        address, _ = world.map(1)
        world.process.fork()
        assert move(world, [address], 0).status.tolist() == [0], "where it is comes before who maps it"
        world.check()

    @pytest.mark.parametrize("pages_each", [1, 8, 16])
    def test_a_large_folio_of_a_file_mapped_in_part_by_two(self, world, pages_each):
        file = world.machine.file("64K")
        address = world.process.mmap(PAGE_SIZE * pages_each, file=file, shared=True, order=4)
        other = world.machine.process()
        other.mmap(PAGE_SIZE * pages_each, file=file, shared=True, order=4)
        assert move(world, [address], 1).status.tolist() == [-EACCES]
        other.exit()
        assert move(world, [address], 1).status.tolist() == [1]
        world.check()

    @pytest.mark.parametrize("order", [4, 9])
    def test_a_large_folio_mapped_twice_by_one(self, order):
        world = World(2048, 2048)
        file = world.machine.file(PAGE_SIZE << order)
        address, _ = world.map(1, order, file=file, shared=True)
        world.process.mmap(PAGE_SIZE << order, order=order, file=file, shared=True)
        assert move(world, [address], 1).status.tolist() == [1]
        world.check()

    def test_a_file_mapped_by_several(self, world):
        file = world.machine.file("8K")
        address, _ = world.map(2, file=file, shared=True)
        other = world.machine.process()
        there = other.mmap("4K", file=file, shared=True)
        result = move(world, pages(address, 2), 1)
        assert (result.ret, result.status.tolist()) == (0, [-EACCES, 1])
        assert other.read(there, 4096) == world.expected[0][2][:4096]
        world.check()


class TestFailingRuns:
    """A run in which one folio fails writes no status, and the value returned counts it and all entries after it."""

    def test_all_of_one_run(self, world):
        address, pfns = world.map(5)
        world.pin(pfns[1])
        result = move(world, pages(address, 5), 1)
        assert (result.ret, result.status.tolist()) == (1, [NOT_WRITTEN] * 5)
        assert world.where(address, 5) == [1, 0, 1, 1, 1]
        world.check()

    def test_entries_after_the_run(self, world):
        address, pfns = world.map(6)
        world.pin(pfns[0])
        world.pin(pfns[1])
        result = move(world, pages(address, 6), [1, 1, 1, 0, 1, 1])
        assert result.ret == 2 + 3 and result.status.tolist() == [NOT_WRITTEN] * 6 and len(result.calls) == 1
        assert world.where(address, 6) == [0, 0, 1, 0, 0, 0]
        world.check()

    def test_the_entry_that_ended_the_run_is_dealt_with(self, world):
        address, pfns = world.map(4)
        world.pin(pfns[0])
        result = move(world, [address, address + PAGE_SIZE, 1 << 46, address + 2 * PAGE_SIZE], 1)
        # One folio, the entry with the bad address and the one after it, less the bad one, whose status is known.
        assert (result.ret, result.status.tolist()) == (2, [NOT_WRITTEN, NOT_WRITTEN, -EFAULT, NOT_WRITTEN])
        assert world.where(address, 4) == [0, 1, 0, 0]
        world.check()

    def test_runs_before_keep_their_statuses(self, world):
        address, pfns = world.map(4)
        move(world, [address + 3 * PAGE_SIZE], 1)
        pinned = world.machine.folios_of(world.process, address + 2 * PAGE_SIZE, 1)[0]
        world.pin(pinned)
        result = move(world, pages(address, 4), [1, 0, 1, 0])
        assert (result.ret, result.status.tolist()) == (2, [1, 0, NOT_WRITTEN, NOT_WRITTEN])
        world.check()

    def test_no_room(self):
        world = World(64, 2)
        address, _ = world.map(4)
        result = move(world, pages(address, 4), 1)
        assert (result.ret, result.status.tolist()) == (-ENOMEM, [NOT_WRITTEN] * 4)
        assert world.where(address, 4) == [1, 1, 0, 0]
        world.check()


class TestNodes:
    """A node that is not there is -ENODEV, when its entry comes up; what is queued before it still moves."""

    @pytest.mark.parametrize("nid", [-1, 2, 64, 1 << 40])
    def test_at_once(self, world, nid):
        address, _ = world.map(2)
        result = move(world, pages(address, 2), [nid, 1])
        assert (result.ret, result.status.tolist()) == (-ENODEV, [NOT_WRITTEN] * 2)
        assert world.where(address, 2) == [0, 0]
        world.check()

    def test_later(self, world):
        address, _ = world.map(4)
        result = move(world, pages(address, 4), [1, 1, 7, 1])
        assert (result.ret, result.status.tolist()) == (-ENODEV, [1, 1, NOT_WRITTEN, NOT_WRITTEN])
        assert world.where(address, 4) == [1, 1, 0, 0]
        world.check()

    def test_it_wins_over_a_failing_run(self, world):
        address, pfns = world.map(3)
        world.pin(pfns[0])
        result = move(world, pages(address, 3), [1, 1, 7])
        assert (result.ret, result.status.tolist()) == (-ENODEV, [NOT_WRITTEN] * 3)
        assert world.where(address, 3) == [0, 1, 0]
        world.check()

    def test_but_not_over_one_that_failed_before(self, world):
        address, pfns = world.map(3)
        world.pin(pfns[0])
        result = move(world, pages(address, 3), [1, 0, 7])
        assert (result.ret, result.status.tolist()) == (1 + 2, [NOT_WRITTEN] * 3)
        world.check()

    def test_a_node_without_memory(self):
        world = World(64, 0)
        address, _ = world.map(1)
        assert move(world, [address], 1).ret == -ENODEV
        world.check()


class TestProcessMove:
    """Process.move() moves a range, naming each folio once."""

    @pytest.mark.parametrize("order", [0, 3, 9])
    def test_range(self, world, order):
        address, _ = world.map(3, order)
        result = world.process.move(address, 3 * PAGE_SIZE << order, 1)
        assert (result.ret, result.status.tolist()) == (0, [1] * 3)
        assert result.total("moved_bytes") == 3 * PAGE_SIZE << order and sum(result.phases_ns().values()) > 0
        world.check()

    def test_part_of_a_range(self, world):
        address, _ = world.map(8)
        assert world.process.move(address + 2 * PAGE_SIZE, "12K", 1).ret == 0
        assert world.where(address, 8) == [0, 0, 1, 1, 1, 0, 0, 0]
        world.check()

    def test_several_mappings(self, world):
        first, _ = world.map(2, address=1 << 30)
        second, _ = world.map(1, 1, address=(1 << 30) + 4 * PAGE_SIZE)
        assert world.process.move(1 << 30, "24K", 1).status.tolist() == [1, 1, 1]
        world.check()

    def test_a_folio_with_a_copied_page_in_the_middle(self, world):
        address, _ = world.map(2, 4)
        child = world.process.fork()
        world.process.write(address + 3 * PAGE_SIZE, world.expected[0][2][3 * PAGE_SIZE:4 * PAGE_SIZE])
        child.exit()
        at = world.process.folio_addresses(address, 32 * PAGE_SIZE)
        assert at.tolist() == [address, address + 3 * PAGE_SIZE, address + 16 * PAGE_SIZE]
        assert world.process.folio_addresses(address + PAGE_SIZE, 8 * PAGE_SIZE).tolist() == [
            address + PAGE_SIZE, address + 3 * PAGE_SIZE]
        result = world.process.move(address, 32 * PAGE_SIZE, 1)
        assert (result.ret, result.status.tolist()) == (0, [1, 1, 1])
        world.check()

    @pytest.mark.skipif(JIT_DISABLED, reason="131,072 pages, too slow uncompiled")
    def test_more_folios_than_are_looked_up_at_once(self):
        machine = Machine(nodes=["1G", "1G"], placement="nowhere")
        process = machine.process()
        address = process.mmap("512M", order=1)
        at = process.folio_addresses(address, 512 << 20)
        assert len(at) == 1 << 16 and (at[1:] - at[:-1] == 8192).all()
        assert process.folio_addresses(address + PAGE_SIZE, (512 << 20) - PAGE_SIZE).tolist() == [
            address + PAGE_SIZE, *at[1:].tolist()]

    def test_outside(self, world):
        with pytest.raises(BadAddress):
            world.process.move(1 << 30, "4K", 1)
        address, _ = world.map(1)
        with pytest.raises(InvalidInput):
            world.process.move(address, "3K", 1)
        assert world.process.move(address, "4K", 9).ret == -ENODEV
        world.check()

    def test_interrupted(self, world):
        """An exception in the middle leaves everything in place and the LRU batch switched on again."""
        address, _ = world.map(40)

        def interrupt(step, pfn):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            world.process.move(address, 40 * PAGE_SIZE, 1, events=[Event("copied", interrupt)])
        assert world.machine.mem.sys.lru_disabled[0] == 0
        world.check()
        assert world.process.move(address, 40 * PAGE_SIZE, 0).ret == 0
        world.check()

    def test_there_and_back_many_times(self):
        world = World(1024, 1024)
        world.map(5)
        world.map(2, 3)
        world.map(1, 9)
        for turn in range(3 if JIT_DISABLED else 10):
            for _, address, content in world.expected:
                assert world.process.move(address, len(content), 1 - turn % 2).ret == 0
            world.check(f"turn {turn}")
        assert sum(world.machine.free_pages(nid) for nid in (0, 1)) == 2048 - 5 - 16 - 512
