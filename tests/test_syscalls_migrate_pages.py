"""migrate_pages(2): node pairs, what is queued, what is counted, and who may."""

import pytest

from conftest import World
from offload.mm.memmap import PG_reserved, VM_PFNMAP
from offload.syscalls import MPOL_MF_MOVE, queue_pages, sys_migrate_pages
from offload.syscalls.migrate_pages import get_nodes, next_pair
from offload.units import EINVAL, ENOMEM, EPERM, ESRCH, PAGE_SIZE


def call(world, old, new, *, caller=None, target=None, maxnode=64, **options):
    return sys_migrate_pages(world.machine, caller or world.process, target, maxnode, old, new, **options)


def user(process, uid=1000, caps=()):
    process.uid, process.caps = uid, frozenset(caps)
    return process


class TestMasks:
    """A mask has maxnode - 1 bits; what lies beyond is not read."""

    @pytest.mark.parametrize("nids, maxnode, expected", [
        ([0, 1], 64, (0, {0, 1})), ([1], 2, (0, set())), ([1], 3, (0, {1})), ([0], 1, (0, set())), (None, 64, (0, set())),
        (None, 0, (0, set())), ([0], 0, (-EINVAL, set())), ([0], 32769, (0, {0})), ([0], 32770, (-EINVAL, set())),
        ([63], 64, (0, set())), ([62], 64, (0, {62})), ([1023], 32769, (0, {1023})), ([1024], 32769, (-EINVAL, set())),
        ([1024], 1025, (0, set())), ([], 64, (0, set()))])
    def test_get_nodes(self, nids, maxnode, expected):
        assert get_nodes(nids, maxnode) == expected


class TestPairs:
    """A destination that is still a source waits for it to be emptied, where that can be had."""

    @staticmethod
    def pairs(old, new):
        left, found = set(old), []
        while pair := next_pair(left, frozenset(old), frozenset(new)):
            left.remove(pair[0])
            found.append(pair)
        return found

    @pytest.mark.parametrize("old, new, expected", [
        ([0], [1], [(0, 1)]),
        ([0, 1], [1, 2], [(1, 2), (0, 1)]),
        ([0, 1, 2], [0], [(2, 0), (1, 0)]),
        ([0], [1, 2], [(0, 1)]),
        ([0, 1], [0, 1], []),
        ([2, 3, 4], [3, 4, 5], [(4, 5), (3, 4), (2, 3)]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5], [(7, 4), (6, 3), (2, 5), (1, 4), (0, 3)]),
        ([0, 1, 2, 3], [4, 5], [(0, 4), (1, 5), (2, 4), (3, 5)]),
        ([0, 1], [1, 0], []),                       # sets have no order
        ([1, 2], [0, 3], [(1, 0), (2, 3)]),
        ([], [1], []),
    ])
    def test_pairs(self, old, new, expected):
        assert self.pairs(old, new) == expected


class TestMoving:
    def test_one_node(self):
        world = World(2048, 2048, 2048)
        first, _ = world.map(3)
        second, _ = world.map(1, 9)
        third, _ = world.map(2, nid=1)
        result = call(world, [0], [2])
        assert (result.ret, result.errno, result.status, len(result.calls)) == (0, 0, None, 1)
        assert world.where(first, 3) == [2] * 3 and world.where(second, 1, 9) == [2] and world.where(third, 2) == [1] * 2
        assert result.calls[0].mode.name == "MIGRATE_SYNC" and result.calls[0].reason.trace_name == "syscall_or_cpuset"
        assert result.trace == result.calls[0].trace
        world.check()

    def test_no_page_moves_twice(self):
        world = World(64, 64, 64)
        first, _ = world.map(3)
        second, _ = world.map(3, nid=1)
        result = call(world, [0, 1], [1, 2])
        assert result.ret == 0 and [c.stats["nr_succeeded"] for c in result.calls] == [3, 3]
        assert world.where(first, 3) == [1] * 3 and world.where(second, 3) == [2] * 3
        world.check()

    def test_nothing_there(self, world):
        assert call(world, [0], [1]).calls == ()
        world.map(1)
        assert call(world, [1], [0]).calls == ()
        assert call(world, None, [1]).ret == call(world, [], [1]).ret == 0
        world.check()

    def test_what_stays_is_counted_in_folios(self):
        world = World(2048, 2048, 2048)
        address, pfns = world.map(3)
        huge, huge_pfns = world.map(1, 9)
        world.pin(pfns[1])
        world.pin(huge_pfns[0])
        assert call(world, [0], [1]).ret == 2
        assert world.where(address, 3) == [1, 0, 1] and world.where(huge, 1, 9) == [0]
        world.check()

    def test_sum_over_pairs(self):
        world = World(64, 64, 64)
        world.pin(world.map(3)[1][0])
        world.pin(world.map(3, nid=1)[1][0])
        assert call(world, [0, 1], [1, 2]).ret == 2
        world.check()

    def test_what_cannot_be_queued_is_counted(self, world):
        address, pfns = world.map(3)
        large, _ = world.map(1, 4)
        taken = world.machine.isolate(pfns[:1])
        assert call(world, [0], [1]).ret == 1
        world.machine.putback(taken)
        assert world.where(address, 3) == [0, 1, 1] and world.where(large) == [1]
        world.check()

    def test_a_folio_mapped_twice_in_one_process(self, world):
        """Small: counted once more; large: once for each entry of the second mapping."""
        file = world.machine.file("80K")
        world.process.mmap("4K", file=file, offset=64 << 10, shared=True)
        world.process.mmap("4K", file=file, offset=64 << 10, shared=True)
        world.process.mmap("64K", file=file, shared=True, order=4)
        assert call(world, [0], [1]).ret == 1
        world.process.mmap("64K", file=file, shared=True, order=4)
        assert call(world, [1], [0]).ret == 1, "the large folio that was met last is passed over"
        world.map(1, 4)
        world.process.mmap("64K", file=file, shared=True, order=4)
        assert call(world, [0], [1]).ret == 1 + 16
        world.check()

    def test_a_folio_with_a_copied_page_in_the_middle(self, world):
        address, _ = world.map(1, 4)
        child = world.process.fork()
        world.process.write(address + 3 * PAGE_SIZE, world.expected[0][2][3 * PAGE_SIZE:4 * PAGE_SIZE])
        child.exit()
        result = call(world, [0], [1])
        assert result.ret == 0 and world.where(address, 16) == [1] * 16
        world.check()

    def test_shared_pages(self, world):
        address, _ = world.map(3)
        child = world.process.fork()
        user(world.process)
        result = call(world, [0], [1])
        assert (result.ret, result.calls) == (0, ()), "passed over in silence"
        assert call(world, [0], [1], caller=child, target=world.process).ret == 0
        assert world.where(address, 3) == [1] * 3
        world.check()

    def test_memory_that_cannot_move(self, world):
        address, _ = world.map(1)
        device, _ = world.map(1)
        kernel, pfns = world.map(1)
        world.machine.mem.vmas.vm_flags[world.process._vma_at(device)] |= VM_PFNMAP
        world.folios.page_flags[pfns[0]] |= PG_reserved
        assert call(world, [0], [1]).ret == 0
        assert (world.where(address), world.where(device), world.where(kernel)) == ([1], [0], [0])

    def test_no_room(self):
        """The first error ends it; what has moved has moved."""
        world = World(64, 2, 64)
        first, _ = world.map(4)
        second, _ = world.map(1, nid=2)
        result = call(world, [0, 2], [1, 3 - 2 + 1])
        assert (result.ret, result.errno) == (-1, ENOMEM)
        assert world.where(first, 4) == [1, 1, 0, 0] and world.where(second) == [2]
        world.check()

    def test_failing_allocations(self):
        world = World(64, 64, 64)
        address, _ = world.map(3)
        second, _ = world.map(3, nid=1)
        result = call(world, [0, 1], [1, 2], alloc_fail=(0, 5, None))
        assert (result.ret, result.errno) == (-1, ENOMEM)
        assert world.where(second, 3) == [2] * 3 and world.where(address, 3) == [1, 0, 0]
        assert world.machine.mem.sys.alloc_fail_times[0] == 0
        world.check()

    def test_interrupted_between_isolating_and_moving(self, world, monkeypatch):
        address, _ = world.map(3)
        queue_vma = queue_pages.queue_vma

        def interrupted(*args):
            queue_vma(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(queue_pages, "queue_vma", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(world, [0], [1])
        monkeypatch.undo()
        assert world.machine.mem.sys.lru_disabled[0] == 0
        world.check()
        assert call(world, [0], [1]).ret == 0


class TestWhoMay:
    """Masks first, then the task, the right to look into it, the nodes asked for, and its memory last."""

    def test_order(self, world):
        nobody = user(world.machine.process())
        gone = world.machine.process()
        gone.exit()
        assert call(world, [0], [1], maxnode=0, caller=nobody, target=gone).errno == EINVAL
        assert call(world, [0], [7], caller=nobody, target=gone).errno == ESRCH
        gone.state = "zombie"
        assert call(world, [0], [7], caller=nobody, target=gone).errno == EPERM
        assert call(world, [0], [7], target=gone).errno == EINVAL
        assert call(world, [0], [1], target=gone).errno == EINVAL

    @pytest.mark.parametrize("caps, errno", [((), EPERM), (("CAP_SYS_NICE",), EINVAL)])
    def test_outside_the_cpuset(self, caps, errno):
        world = World(64, 64, 64)
        world.process.mems_allowed = frozenset((0, 2))
        address, _ = world.map(2)
        user(world.process, 1000, caps)
        assert call(world, [0], [1]).errno == errno
        assert call(world, [0], [2]).ret == 0 and world.where(address, 2) == [2, 2]
        world.check()

    def test_outside_the_callers_only(self):
        world = World(64, 64)
        address, _ = world.map(1)
        caller = world.machine.process()
        caller.mems_allowed = frozenset((0,))
        assert call(world, [0], [1], caller=caller, target=world.process).errno == EINVAL
        assert world.where(address) == [0]

    def test_nodes_that_are_not_there(self):
        world = World(64, 64, 0)
        address, _ = world.map(1)
        assert call(world, [0], [2]).errno == call(world, [0], []).errno == call(world, [0], None).errno == EINVAL
        assert call(world, [0], [1, 7]).ret == 0 and world.where(address) == [1]
        user(world.process)
        assert call(world, [1], [0, 7]).errno == EPERM
        world.check()

    @pytest.mark.parametrize("uid, errno", [(1000, 0), (2000, EPERM)])
    def test_another_user(self, world, uid, errno):
        user(world.process)
        address, _ = world.map(1)
        assert call(world, [0], [1], caller=user(world.machine.process(), uid), target=world.process).errno == errno
        assert world.where(address) == [0 if errno else 1]

    def test_flag(self):
        assert MPOL_MF_MOVE == 2
