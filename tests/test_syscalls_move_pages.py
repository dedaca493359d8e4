"""sys_move_pages(): who may, bad arguments and pointers, and asking where pages are."""

import pytest

from conftest import World
from offload.errors import InvalidInput
from offload.migrate.pages import Event
from offload.mm.memmap import PG_zone_device, VM_PFNMAP
from offload.syscalls import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT, NOT_WRITTEN, move_pages, sys_move_pages
from offload.units import EACCES, EBUSY, EFAULT, EINVAL, ENODEV, ENOENT, ENOMEM, EPERM, ESRCH, PAGE_SIZE

ALL_CAPS = frozenset(("CAP_SYS_NICE", "CAP_SYS_PTRACE"))


def call(world, pages, nodes, flags=MPOL_MF_MOVE, *, caller=None, target=None, **options):
    nodes = [nodes] * len(pages) if isinstance(nodes, int) else nodes
    return sys_move_pages(world.machine, caller or world.process, target, pages, nodes, flags, **options)


def pages(address, nr, step=1):
    return [address + i * step * PAGE_SIZE for i in range(nr)]


def user(world, uid=1000, caps=(), process=None):
    process = process or world.machine.process()
    process.uid, process.caps = uid, frozenset(caps)
    return process


class TestResult:
    def test_success(self, world):
        address, _ = world.map(3)
        result = call(world, pages(address, 3), 1)
        assert (result.ret, result.errno, result.status.tolist(), len(result.calls)) == (0, 0, [1] * 3, 1)
        assert result.trace == result.calls[0].trace
        world.check()

    def test_failed_folios(self, world):
        address, pfns = world.map(3)
        world.pin(pfns[0])
        result = call(world, pages(address, 3), 1)
        assert (result.ret, result.errno, result.status.tolist()) == (1, 0, [NOT_WRITTEN] * 3)
        world.check()

    def test_errno(self, world):
        address, _ = world.map(2)
        result = call(world, pages(address, 2), [1, 7])
        assert (result.ret, result.errno, result.status.tolist()) == (-1, ENODEV, [1, NOT_WRITTEN])
        assert len(result.trace) == 2
        world.check()

    def test_tags_are_removed(self, world):
        address, _ = world.map(1)
        assert call(world, [address | 0x2A << 57], 1).status.tolist() == [1]
        assert call(world, [address | 0x2A << 57], None).status.tolist() == [-EFAULT], "a query does not untag"
        world.check()

    def test_as_many_nodes_as_pages(self, world):
        with pytest.raises(InvalidInput, match="1 nodes for 2 pages"):
            sys_move_pages(world.machine, world.process, None, [0, 0], [1], MPOL_MF_MOVE)


class TestWhoMay:
    """Flags come first, then MOVE_ALL's capability, then the task, then the right to look into it, then its memory."""

    @pytest.mark.parametrize("flags", [MPOL_MF_STRICT | MPOL_MF_MOVE, 8, -1])
    def test_flags(self, world, flags):
        address, _ = world.map(1)
        nobody = user(world)
        target = world.machine.process()
        target.exit()
        result = call(world, [address], 1, flags, caller=nobody, target=target)
        assert (result.ret, result.errno, result.status.tolist(), result.calls) == (-1, EINVAL, [NOT_WRITTEN], ())

    def test_move_all(self, world):
        nobody = user(world)
        target = world.machine.process()
        target.exit()
        assert call(world, [0], 1, MPOL_MF_MOVE_ALL, caller=nobody, target=target).errno == EPERM
        assert call(world, [0], 1, MPOL_MF_MOVE, caller=nobody, target=target).errno == ESRCH
        assert call(world, [0], 1, MPOL_MF_MOVE_ALL, caller=user(world, caps=["CAP_SYS_NICE"])).errno == 0

    def test_flags_0_move(self, world):
        address, _ = world.map(1)
        assert call(world, [address], 1, 0).status.tolist() == [1]

    @pytest.mark.parametrize("caller, target, errno", [
        ((1000, ()), (1000, ()), 0),
        ((1000, ()), (2000, ()), EPERM),
        ((1000, ()), (0, ALL_CAPS), EPERM),
        ((0, ALL_CAPS), (1000, ()), 0),
        ((1000, ("CAP_SYS_PTRACE",)), (2000, ALL_CAPS), 0),
        ((1000, ("CAP_SYS_NICE",)), (2000, ()), EPERM),
        ((1000, ()), (1000, ("CAP_SYS_NICE",)), EPERM),     # the other may do more
        ((0, ()), (0, ALL_CAPS), EPERM),
    ])
    @pytest.mark.parametrize("nodes", [1, None])
    def test_another_process(self, world, caller, target, errno, nodes):
        user(world, *target, process=world.process)
        address, _ = world.map(1)
        result = call(world, [address], nodes, caller=user(world, *caller), target=world.process)
        assert (result.errno, result.status.tolist()) == (errno, [NOT_WRITTEN] if errno else [1 if nodes else 0])
        world.check()

    def test_oneself(self, world):
        address, _ = world.map(1)
        user(world, process=world.process)
        assert call(world, [address], 1, target=world.process).status.tolist() == [1]

    def test_zombie(self, world):
        zombie = world.machine.process()
        zombie.exit()
        zombie.state = "zombie"
        assert call(world, [0], 1, target=zombie).errno == EINVAL
        assert call(world, [0], None, target=zombie).errno == EINVAL
        assert call(world, [0], 1, caller=user(world, 5), target=zombie).errno == EPERM


class TestCpuset:
    """A node outside the target's cpuset is -EACCES, after -ENODEV."""

    def test_outside(self):
        world = World(64, 64, 64, 0)
        world.process.mems_allowed = frozenset((0, 2, 3))
        address, _ = world.map(4)
        result = call(world, pages(address, 4), [2, 2, 1, 2])
        assert (result.errno, result.status.tolist()) == (EACCES, [2, 2, NOT_WRITTEN, NOT_WRITTEN])
        assert call(world, [address], 3).errno == ENODEV
        assert world.where(address, 4) == [2, 2, 0, 0]
        world.check()

    def test_the_targets_counts(self):
        world = World(64, 64)
        address, _ = world.map(1)
        caller = world.machine.process()
        caller.mems_allowed = frozenset((0,))
        assert call(world, [address], 1, caller=caller, target=world.process).status.tolist() == [1]
        assert call(world, [address], 1, caller=caller).errno == EACCES


class TestPointers:
    """An entry that cannot be read ends the call, what is queued moves; one that cannot be written is found afterwards."""

    @pytest.mark.parametrize("array", ["pages", "nodes"])
    @pytest.mark.parametrize("at", [0, 3])
    def test_unreadable(self, world, array, at):
        address, _ = world.map(5)
        result = call(world, pages(address, 5), 1, fault={array: at})
        assert (result.errno, result.status.tolist()) == (EFAULT, [1] * at + [NOT_WRITTEN] * (5 - at))
        assert world.where(address, 5) == [1] * at + [0] * (5 - at)
        world.check()

    def test_it_wins_over_a_failing_run(self, world):
        address, pfns = world.map(3)
        world.pin(pfns[0])
        result = call(world, pages(address, 3), 1, fault={"pages": 2})
        assert (result.errno, result.status.tolist()) == (EFAULT, [NOT_WRITTEN] * 3)
        assert world.where(address, 3) == [0, 1, 0]
        world.check()

    @pytest.mark.parametrize("at", [0, 3])
    def test_unwritable(self, world, at):
        address, _ = world.map(5)
        result = call(world, pages(address, 5), 1, fault={"status": at})
        assert (result.errno, result.status.tolist()) == (EFAULT, [1] * at + [NOT_WRITTEN] * (5 - at))
        assert world.where(address, 5) == [1] * 5
        world.check()

    @pytest.mark.parametrize("at, moved", [(2, [1, 1, 0, 0, 0]), (3, [1, 1, 0, 1, 0])])
    def test_unwritable_for_an_entry_that_stays(self, world, at, moved):
        """The status of page 2 is written before the queue is moved; failing that ends the call, and the queue moves."""
        address, _ = world.map(5)
        addresses = pages(address, 5)
        addresses[2] = 0
        result = call(world, [*addresses[:4], 0], 1, fault={"status": at})
        assert result.errno == EFAULT
        assert result.status.tolist() == [1, 1, -EFAULT, NOT_WRITTEN, NOT_WRITTEN][:at] + [NOT_WRITTEN] * (5 - at)
        assert world.where(address, 5) == moved
        world.check()

    def test_unwritable_with_nothing_queued(self, world):
        address, _ = world.map(2)
        result = call(world, [0, 0, address], 1, fault={"status": 1})
        assert (result.errno, result.status.tolist()) == (EFAULT, [-EFAULT, NOT_WRITTEN, NOT_WRITTEN])
        assert world.where(address) == [0]
        world.check()


class TestQuery:
    """Without nodes the call only tells where pages are."""

    def test_kinds(self, world):
        address = world.process.mmap("16K", populate=False)
        world.process.write(address, b"x")
        world.process.read(address + PAGE_SIZE, 1)
        there = world.process.mmap("4M", nid=1, order=9)
        result = call(world, [*pages(address, 3), address + 5, there, there + 5 * PAGE_SIZE, 0], None, 0)
        assert (result.ret, result.status.tolist()) == (0, [0, -EFAULT, -ENOENT, 0, 1, 1, -EFAULT])
        assert result.calls == () and result.trace == ()
        world.check()

    def test_device_memory(self, world):
        address = world.process.mmap("4K", populate=False)
        world.process.read(address, 1)
        world.machine.mem.vmas.vm_flags[world.process._vma_at(address)] |= VM_PFNMAP
        assert call(world, [address], None, 0).status.tolist() == [-ENOENT]
        assert call(world, [address], 1).status.tolist() == [-EFAULT]

    def test_dax(self, world):
        address, pfns = world.map(1)
        world.folios.page_flags[pfns[0]] |= PG_zone_device
        assert call(world, [address], None, 0).status.tolist() == [-ENOENT]
        assert call(world, [address], 1).status.tolist() == call(world, [address], 0).status.tolist() == [-ENOENT]

    def test_shared_pages_too(self, world):
        address, _ = world.map(1)
        world.process.fork()
        assert call(world, [address], None, 0).status.tolist() == [0]

    def test_cpuset_and_flags_do_not_matter(self, world):
        world.process.mems_allowed = frozenset((0,))
        address, _ = world.map(1, nid=1)
        assert call(world, [address], None, MPOL_MF_MOVE).status.tolist() == [1]
        assert call(world, [address], None, MPOL_MF_STRICT).errno == EINVAL

    def test_nothing(self, world):
        result = call(world, [], None, 0)
        assert (result.ret, result.errno, result.status.tolist()) == (0, 0, [])

    @pytest.mark.parametrize("at, written", [(0, 0), (15, 0), (16, 16), (31, 16), (32, 32), (39, 32), (40, 40)])
    def test_unreadable(self, world, at, written):
        address, _ = world.map(40)
        result = call(world, pages(address, 40), None, 0, fault={"pages": at})
        assert result.status.tolist() == [0] * written + [NOT_WRITTEN] * (40 - written)
        assert result.errno == (EFAULT if at < 40 else 0)

    @pytest.mark.parametrize("at", [0, 5, 16, 39, 40])
    def test_unwritable(self, world, at):
        address, _ = world.map(40)
        result = call(world, pages(address, 40), None, 0, fault={"status": at})
        assert result.status.tolist() == [0] * at + [NOT_WRITTEN] * (40 - at)
        assert result.errno == (EFAULT if at < 40 else 0)


class TestAllocFail:
    """Target allocations that are made to fail are counted over the whole system call."""

    @pytest.mark.parametrize("nth, status, moved", [
        (1, [NOT_WRITTEN] * 4, [0, 0, 0, 0]), (2, [1] + [NOT_WRITTEN] * 3, [1, 0, 0, 0]),
        (4, [1, 2, 1, NOT_WRITTEN], [1, 2, 1, 0]), (5, [1, 2, 1, 2], [1, 2, 1, 2])])
    def test_over_runs(self, nth, status, moved):
        world = World(64, 64, 64)
        address, _ = world.map(4)
        result = call(world, pages(address, 4), [1, 2, 1, 2], alloc_fail=(0, nth, 1))
        assert (result.errno, result.status.tolist()) == (ENOMEM if nth < 5 else 0, status)
        assert world.where(address, 4) == moved
        world.check()

    def test_of_an_order(self, world):
        """Too large to be found room for, a THP is split, and its pages move."""
        world = World(2048, 2048)
        small, _ = world.map(1)
        huge, _ = world.map(1, 9)
        result = call(world, [small, huge], 1, alloc_fail=(9, 1, None))
        assert (result.ret, result.status.tolist()) == (0, [1, 1])
        assert result.calls[0].stats["nr_thp_split"] == 1
        assert call(world, [small], 0).status.tolist() == [0], "it is over with the call"
        world.check()

    def test_a_few_times(self):
        world = World(4096, 4096)
        address, _ = world.map(4, 9)
        result = call(world, pages(address, 4, 512), 1, alloc_fail=(9, 2, 2))
        assert result.ret == 0 and result.calls[0].stats["nr_thp_split"] == 2
        assert result.calls[0].stats["nr_thp_succeeded"] == 2
        world.check()

    @pytest.mark.parametrize("alloc_fail", [(-1, 1, None), (0, 0, None), (0, 1, 0)])
    def test_wrong(self, world, alloc_fail):
        with pytest.raises(InvalidInput, match="alloc_fail"):
            call(world, [], 1, alloc_fail=alloc_fail)


class TestInterrupted:
    """Ctrl-C anywhere leaves no folio isolated."""

    def test_in_the_middle(self, world):
        address, _ = world.map(4)

        def interrupt(step, pfn):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            call(world, pages(address, 4), 1, events=[Event("copied", interrupt)], alloc_fail=(0, 3, None))
        world.check()
        assert call(world, pages(address, 4), 0).ret == 0, "no allocation fails any more"
        world.check()

    def test_between_isolating_and_moving(self, world, monkeypatch):
        address, _ = world.map(4)
        queue_run = move_pages.queue_run

        def interrupted(*args):
            queue_run(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(move_pages, "queue_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(world, pages(address, 4), 1)
        world.check()

    def test_in_the_second_run(self, world, monkeypatch):
        address, _ = world.map(4)
        call(world, [address], 1)
        queue_run = move_pages.queue_run
        runs = []

        def interrupted(*args):
            done = queue_run(*args)
            runs.append(done)
            if len(runs) == 2:
                raise KeyboardInterrupt
            return done

        monkeypatch.setattr(move_pages, "queue_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(world, pages(address, 4), [0, 1, 1, 1])
        assert world.where(address, 4) == [0, 0, 0, 0]
        world.check()


class TestSecondAddress:
    def test_the_same_page_three_times(self, world):
        address, _ = world.map(1)
        assert call(world, [address] * 3, 1).status.tolist() == [1, -EBUSY, 1]
        world.check()
