"""mbind(2): policies, what moves and where to, and what is reported."""

import pytest

from conftest import World
from offload.errors import InvalidInput, NotSupported, OutOfMemory
from offload.mm.memmap import VM_HUGETLB
from offload.mm.mempolicy import (
    MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED, MPOL_PREFERRED_MANY,
)
from offload.syscalls import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT, mbind, sys_mbind
from offload.units import EFAULT, EINVAL, EIO, EPERM, PAGE_SIZE


def call(world, address, nr, mode, nodes, flags=MPOL_MF_MOVE, **options):
    return sys_mbind(world.machine, world.process, address, nr * PAGE_SIZE, mode, nodes, flags, **options)


@pytest.fixture
def world():
    return World(2048, 2048, 2048)


def policy_at(world, address):
    row = world.machine.mem.vmas[world.process._vma_at(address)]
    return row.pol_mode, row.pol_nodes


class TestPolicies:
    """Where misplaced pages go."""

    @pytest.mark.parametrize("mode, nodes, expected", [
        ("bind", [1], [1] * 6), ("bind", [1, 2], [1] * 6), ("bind", [0, 1], [0] * 6),
        ("preferred", [2], [2] * 6), ("preferred", [1, 2], [1] * 6), ("preferred_many", [1, 2], [1] * 6),
        ("interleave", [1, 2], [1, 2] * 3), ("interleave", [0, 1], [0] * 6), ("interleave", [2], [2] * 6),
        ("local", [], [0] * 6), ("default", [], [0] * 6), ("preferred", [], [0] * 6),
        (MPOL_BIND, [2], [2] * 6)])
    def test_from_node_0(self, world, mode, nodes, expected):
        address, _ = world.map(6)
        result = call(world, address, 6, mode, nodes)
        assert (result.ret, result.errno, result.status) == (0, 0, None)
        assert world.where(address, 6) == expected
        for one in result.calls:
            assert one.mode.name == "MIGRATE_SYNC" and one.reason.trace_name == "mempolicy_mbind"
        world.check()

    @pytest.mark.parametrize("mode", ["local", "default", "preferred"])
    def test_home(self, mode):
        """The process runs on the first node that has CPUs; pages that are there already move all the same."""
        world = World(64, 64)
        world.machine.mem.nodes.cpus[0] = 0
        address, _ = world.map(2)
        assert call(world, address, 2, mode, []).ret == 0 and world.where(address, 2) == [1, 1]
        assert call(world, address, 2, mode, []).calls[0].stats["nr_succeeded"] == 2
        world.check()

    def test_interleaving_counts_pages_of_the_mapping(self):
        world = World(64, 64, 64, 64)
        address, _ = world.map(8)
        assert call(world, address, 8, "interleave", [1, 2, 3]).ret == 0
        assert world.where(address, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
        world.check()

    def test_interleaving_large_folios(self):
        world = World(4096, 2048, 2048)
        address, _ = world.map(4, 9)
        assert call(world, address, 2048, "interleave", [1, 2]).ret == 0
        assert world.where(address, 4, 9) == [1, 2, 1, 2]
        world.check()

    def test_pieces_of_a_split_folio_are_interleaved(self, world):
        address, _ = world.map(1, 9)
        result = call(world, address, 512, "interleave", [1, 2], alloc_fail=(9, 1, None))
        assert result.ret == 0 and world.where(address, 512) == [1, 2] * 256
        world.check()

    def test_the_policy_stays_on_the_vma(self, world):
        address, _ = world.map(2)
        for mode, nodes, expected in (("bind", [1, 2], (MPOL_BIND, 6)), ("preferred", [1, 2], (MPOL_PREFERRED, 2)),
                                      ("interleave", [0, 2], (MPOL_INTERLEAVE, 5)), ("local", [], (MPOL_LOCAL, 0)),
                                      ("preferred_many", [0, 1], (MPOL_PREFERRED_MANY, 3)), ("default", [], (MPOL_DEFAULT, 0))):
            assert call(world, address, 2, mode, nodes, 0).ret == 0
            assert policy_at(world, address) == expected
        assert world.where(address, 2) == [0, 0]
        call(world, address, 2, "bind", [2], 0)
        child = world.process.fork()
        row = world.machine.mem.vmas[child._vma_at(address)]
        assert (row.pol_mode, row.pol_nodes) == (MPOL_BIND, 4)


class TestRoom:
    """bind keeps to its nodes, the others find room elsewhere."""

    @pytest.mark.parametrize("mode, nodes, expected", [
        ("bind", [1], [1, 1, 0, 0]), ("bind", [1, 2], [1, 1, 2, 2]), ("preferred", [1], [1, 1, 2, 2]),
        ("preferred_many", [1], [1, 1, 2, 2]), ("preferred_many", [1, 2], [1, 1, 2, 2]), ("interleave", [1, 2], [1, 2, 1, 2])])
    def test_full(self, mode, nodes, expected):
        world = World(64, 2, 64)
        address, _ = world.map(4)
        assert call(world, address, 4, mode, nodes).ret == 0, "without STRICT a full node is no error"
        assert world.where(address, 4) == expected
        world.check()

    @pytest.mark.parametrize("rooms, nid, expected", [
        ((64, 64, 64, 2), 3, [3, 3, 0, 0]), ((64, 1, 1, 64), 1, [1, 2, 3, 3]), ((64, 64, 2, 1), 2, [2, 2, 3, 0])])
    def test_order_of_a_zonelist(self, rooms, nid, expected):
        """From the node on round, as build_zonelists() has it with all distances alike: from the last to the first."""
        world = World(*rooms)
        address, _ = world.map(4, nid=0)
        assert call(world, address, 4, "preferred", [nid]).ret == 0 and world.where(address, 4) == expected
        world.check()

    @pytest.mark.parametrize("mode", ["bind", "preferred"])
    def test_strict(self, mode):
        world = World(64, 2)
        address, _ = world.map(4)
        result = call(world, address, 4, mode, [1], MPOL_MF_STRICT | MPOL_MF_MOVE)
        assert result.errno == (EIO if mode == "bind" else 0), "preferred falls back to the node it came from"
        assert result.calls[0].rc == (-12 if mode == "bind" else 0)
        world.check()

    def test_failing_allocations(self, world):
        address, _ = world.map(4)
        result = call(world, address, 4, "bind", [1], MPOL_MF_STRICT | MPOL_MF_MOVE, alloc_fail=(0, 3, 1))
        assert result.errno == EIO and world.where(address, 4) == [1, 1, 0, 0]
        world.check()


class TestStrict:
    """Alone it reports a misplaced page and does nothing; with MOVE it reports one that stays, with the policy set."""

    def test_alone(self, world):
        address, _ = world.map(4)
        assert call(world, address, 4, "bind", [1], MPOL_MF_STRICT).errno == EIO
        assert policy_at(world, address) == (MPOL_DEFAULT, 0)
        assert call(world, address, 4, "bind", [0, 1], MPOL_MF_STRICT).ret == 0
        assert policy_at(world, address) == (MPOL_BIND, 3)
        assert call(world, address, 4, "default", [], MPOL_MF_STRICT).ret == 0
        world.check()

    @pytest.mark.parametrize("order", [0, 4, 9])
    @pytest.mark.parametrize("flags, errno", [(MPOL_MF_MOVE, 0), (MPOL_MF_STRICT | MPOL_MF_MOVE, EIO)])
    def test_a_page_that_stays(self, world, order, flags, errno):
        address, pfns = world.map(2, order)
        world.pin(pfns[0])
        assert call(world, address, 2 << order, "bind", [1], flags).errno == errno
        assert world.where(address, 2, order) == [0, 1] and policy_at(world, address) == (MPOL_BIND, 2)
        world.check()

    @pytest.mark.parametrize("flags, errno", [(MPOL_MF_MOVE, 0), (MPOL_MF_STRICT | MPOL_MF_MOVE, EIO)])
    def test_a_page_that_cannot_be_isolated(self, world, flags, errno):
        address, pfns = world.map(3)
        taken = world.machine.isolate(pfns[1:2])
        assert call(world, address, 3, "bind", [1], flags).errno == errno
        world.machine.putback(taken)
        assert world.where(address, 3) == [1, 0, 1]
        world.check()

    @pytest.mark.parametrize("flags, moved", [
        (MPOL_MF_MOVE, 0), (MPOL_MF_STRICT | MPOL_MF_MOVE, 0), (MPOL_MF_MOVE_ALL, 1), (MPOL_MF_STRICT | MPOL_MF_MOVE_ALL, 1)])
    def test_shared_pages_are_not_misplaced(self, world, flags, moved):
        address, _ = world.map(2)
        world.process.fork()
        assert call(world, address, 2, "bind", [1], flags).errno == 0
        assert world.where(address, 2) == [moved] * 2
        world.check()

    def test_alone_shared_pages_are(self, world):
        address, _ = world.map(2)
        world.process.fork()
        assert call(world, address, 2, "bind", [1], MPOL_MF_STRICT).errno == EIO


class TestArguments:
    @pytest.mark.parametrize("mode, nodes, options, errno", [
        ("bind", [], {}, EINVAL), ("bind", None, {}, EINVAL), ("interleave", [], {}, EINVAL), ("preferred_many", [], {}, EINVAL),
        ("local", [0], {}, EINVAL), ("default", [0], {}, EINVAL), ("bind", [3], {}, EINVAL), ("bind", [3, 9], {}, EINVAL),
        ("bind", [1, 3], {}, 0), (7, [1], {}, EINVAL), (-1, [1], {}, EINVAL), ("bind", [1], {"maxnode": 2}, EINVAL),
        ("bind", [1], {"maxnode": 3}, 0), ("bind", [1], {"maxnode": 0}, EINVAL), ("bind", [1], {"maxnode": 40000}, EINVAL),
        ("bind", [1], {"flags": 8}, EINVAL), ("default", None, {}, 0)])
    def test_errno(self, mode, nodes, options, errno):
        world = World(64, 64, 64, 0)
        address, _ = world.map(2)
        assert call(world, address, 2, mode, nodes, **options).errno == errno
        assert world.where(address, 2) == [0 if errno or mode == "default" else 1] * 2
        world.check()

    def test_move_all_needs_a_capability(self, world):
        world.process.uid, world.process.caps = 1000, frozenset()
        address, _ = world.map(1)
        assert call(world, address + 1, 1, "bind", [1], MPOL_MF_MOVE_ALL).errno == EPERM, "before alignment"
        assert call(world, address, 1, "bind", [1], MPOL_MF_MOVE).errno == 0
        assert world.where(address) == [1]

    def test_cpuset(self, world):
        world.process.mems_allowed = frozenset((0, 2))
        address, _ = world.map(1)
        assert call(world, address, 1, "bind", [1]).errno == EINVAL
        assert call(world, address, 1, "bind", [1, 2]).errno == 0 and world.where(address) == [2]
        world.check()

    def test_addresses(self, world):
        address, _ = world.map(3)
        assert call(world, address + 1, 2, "bind", [1]).errno == EINVAL
        assert call(world, address, 0, "bind", []).ret == 0, "an empty range is looked at before the policy"
        assert call(world, address + 1, 0, "bind", [1]).errno == EINVAL
        assert sys_mbind(world.machine, world.process, address, 2 * PAGE_SIZE + 1, "bind", [1], MPOL_MF_MOVE).ret == 0
        assert sys_mbind(world.machine, world.process, address | 5 << 57, 3 * PAGE_SIZE, "bind", [1], MPOL_MF_MOVE).ret == 0
        assert sys_mbind(world.machine, world.process, address, 1 << 64, "bind", [1], 0).ret == 0, "wraps to nothing"
        assert sys_mbind(world.machine, world.process, address, (1 << 64) - 5000, "bind", [1], 0).errno == EINVAL

    def test_holes(self, world):
        first, _ = world.map(2, address=1 << 30)
        second, _ = world.map(2, address=(1 << 30) + 3 * PAGE_SIZE)
        for at, nr in ((first, 5), (first, 3), (first - PAGE_SIZE, 2), (1 << 45, 1)):
            assert call(world, at, nr, "bind", [1]).errno == EFAULT
        assert world.where(first, 2) == world.where(second, 2) == [0, 0] and policy_at(world, first) == (MPOL_DEFAULT, 0)
        assert call(world, first, 2, "bind", [1]).errno == 0
        assert call(world, first, 5, "default", []).errno == 0, "holes do not matter to the default policy"
        assert call(world, 1 << 45, 1, "default", []).errno == EFAULT, "but there must be something"
        world.check()

    def test_several_vmas(self, world):
        first, _ = world.map(2, address=1 << 30)
        second, _ = world.map(2, address=(1 << 30) + 2 * PAGE_SIZE)
        assert call(world, first, 4, "bind", [1]).ret == 0
        assert world.where(first, 4) == [1] * 4 and policy_at(world, second) == (MPOL_BIND, 2)
        world.check()

    def test_part_of_a_vma(self, world):
        """It is split; interleaving goes on counting from where the memory was mapped."""
        world = World(64, 64, 64)
        address, _ = world.map(8)
        assert call(world, address + 3 * PAGE_SIZE, 4, "interleave", [1, 2]).ret == 0
        assert world.where(address, 8) == [0, 0, 0, 2, 1, 2, 1, 0]
        assert [policy_at(world, address + i * PAGE_SIZE)[0] for i in (2, 3, 6, 7)] == [0, MPOL_INTERLEAVE, MPOL_INTERLEAVE, 0]
        world.check()

    def test_part_of_a_thp(self, world):
        """The whole folio moves, mapped by PTEs by then."""
        address, _ = world.map(1, 9)
        result = call(world, address, 256, "bind", [1])
        assert result.ret == 0 and result.calls[0].stats["nr_thp_succeeded"] == 1
        assert world.where(address, 2, 8) == [1, 1] and policy_at(world, address + (1 << 20)) == (MPOL_DEFAULT, 0)
        world.check()

    def test_inside_a_hugetlb_page(self, world):
        address, _ = world.map(2, 9)
        vma = world.process._vma_at(address)
        world.machine.mem.vmas.vm_flags[vma] |= VM_HUGETLB
        assert call(world, address, 5, "bind", [1], 0).errno == EINVAL
        assert call(world, address, 1024, "bind", [1], 0).errno == 0

    def test_names(self, world):
        with pytest.raises(InvalidInput, match="policy 'sticky' is not known; use one of: default, preferred"):
            call(world, 0, 1, "sticky", [])
        for mode in (6, MPOL_BIND | 1 << 15):
            with pytest.raises(NotSupported, match="is not supported"):
                call(world, 0, 1, mode, [1])

    def test_interrupted_between_isolating_and_moving(self, world, monkeypatch):
        address, _ = world.map(3)

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(mbind, "mbind_range", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(world, address, 3, "bind", [1])
        assert world.machine.mem.sys.lru_disabled[0] == 0
        world.check()


class TestFaults:
    """What is touched after mbind() comes from where the policy says."""

    @pytest.mark.parametrize("mode, nodes, expected", [
        ("bind", [2], [2] * 4), ("bind", [1, 2], [1] * 4), ("interleave", [1, 2], [1, 2, 1, 2]), ("local", [], [0] * 4),
        ("preferred", [1], [1] * 4), ("preferred_many", [1, 2], [1] * 4)])
    def test_anonymous(self, world, mode, nodes, expected):
        address = world.process.mmap("16K", populate=False, nid=0)
        call(world, address, 4, mode, nodes, 0)
        world.process.populate(address, 4 * PAGE_SIZE)
        assert world.where(address, 4) == expected
        world.check()

    @pytest.mark.parametrize("order, where", [(0, [1, 2, 1, 2]), (1, [1, 1, 2, 2])])
    def test_a_file(self, world, order, where):
        address = world.process.mmap("16K", populate=False, file=world.machine.file("16K"), shared=True, order=order)
        call(world, address, 4, "interleave", [1, 2], 0)
        world.process.populate(address, 4 * PAGE_SIZE)
        assert world.where(address, 4) == where
        world.check()

    def test_copy_on_write(self, world):
        address, _ = world.map(2)
        world.process.fork()
        call(world, address, 2, "bind", [2], 0)
        world.process.write(address, world.expected[0][2][:1])
        assert world.where(address, 2) == [2, 0]
        world.check()

    @pytest.mark.parametrize("mode, full", [("bind", True), ("preferred", False), ("interleave", False)])
    def test_no_room(self, mode, full):
        world = World(64, 1, 64)
        address = world.process.mmap("8K", populate=False)
        call(world, address, 2, mode, [1], 0)
        if full:
            with pytest.raises(OutOfMemory):
                world.process.populate(address, 2 * PAGE_SIZE)
        else:
            world.process.populate(address, 2 * PAGE_SIZE)
        assert world.where(address, 2) == [1, None if full else 2]
        world.check()
