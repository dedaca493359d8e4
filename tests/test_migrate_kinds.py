"""Every kind of folio in every mode and rule set: the treatment matrix, and what the moved folio looks like afterwards.

The matrix is worked out by hand from the rules, not computed: (rc, targets allocated, targets returned) per mode.
"""

import random

import numpy as np
import pytest

from conftest import World
from offload.errors import BadAddress, InvalidInput, OutOfMemory, WouldHang
from offload.machine import Machine, NodeConfig
from offload.mm.address_space import add_to_swap_cache
from offload.mm.memmap import (
    OTHERS_FOREVER, OTHERS_UNTIL_WAIT, PG_dirty, PG_hwpoison, PG_ksm, PG_movable_ops, PG_movable_ops_isolated, PG_private,
    PG_swapcache, PG_uptodate, PG_zone_device,
)
from offload.scenario_folios import FolioLevel, check_folio_level
from offload.scenario_format import KINDS_WITH, Fault, check
from offload.units import EBUSY, ENOMEM, PAGE_SIZE, RULE_SETS

MODES = ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC")
KERNELS = tuple(RULE_SETS)


def scenario_of(folios, kernel="7.3", machine=None, **call):
    """A scenario of folios f0, f1 ... and one call. Fault if they cannot be."""
    scenario = {"format": 1, "name": "t/x", "kernel": kernel, "machine": machine or {},
                "folios": [{"name": f"f{i}", **folio} for i, folio in enumerate(folios)],
                "calls": [{"op": "migrate_pages", **call}]}
    check(scenario)
    check_folio_level(scenario)
    return scenario


def run(*folios, calls=1, **fields):
    """The FolioLevel of folios after one call or more, and the last result. The books add up before and after each."""
    scenario = scenario_of(folios, **fields)
    level = FolioLevel(scenario)
    level.machine.validate()
    for _ in range(calls):
        result = level.call(scenario["calls"][0])
        level.machine.validate()
        assert result["data_ok"]
    return level, result


def outcome(result):
    return result["rc"], result["targets"]["allocated"], result["targets"]["returned"]


OK = (0, 1, 0)
EVERY_MODE_OK = (OK, OK, OK)
EAGAIN_UNMAP = ((1, 10, 10),) * 3           # one destination a pass: 10, or 3 + 7
ONCE_A_STAGE = ((1, 1, 1), (1, 2, 2), (1, 2, 2))
WAITS = ((1, 10, 10), (0, 4, 3), (0, 4, 3))

MATRIX = {
    "anon": ({}, EVERY_MODE_OK),
    "pinned": ({"pinned": True}, EAGAIN_UNMAP),
    "extra reference": ({"extra_refs": 1}, ONCE_A_STAGE),
    "file, extra reference": ({"kind": "file", "extra_refs": 1}, ONCE_A_STAGE),
    "shmem, extra reference": ({"kind": "shmem", "extra_refs": 1}, ONCE_A_STAGE),
    "locked": ({"locked": "until_wait"}, WAITS),
    "locked, not uptodate": ({"locked": "until_wait", "uptodate": False}, ((1, 10, 10), (1, 10, 10), (0, 4, 3))),
    "writeback": ({"kind": "file", "writeback": "until_wait"}, ((1, 1, 1), (1, 2, 2), (0, 2, 1))),
    "dirty, filemap": ({"kind": "file", "dirty": True}, EVERY_MODE_OK),
    "dirty, migrate_folio": ({"kind": "file", "aops": "migrate_folio", "dirty": True}, EVERY_MODE_OK),
    "dirty, buffers": ({"kind": "file", "aops": "buffer", "dirty": True, "private": "releasable"}, EVERY_MODE_OK),
    "dirty, buffer_norefs": ({"kind": "file", "aops": "buffer_norefs", "dirty": True, "private": "releasable"}, EVERY_MODE_OK),
    "dirty, shmem": ({"kind": "shmem", "dirty": True}, EVERY_MODE_OK),
    "dirty, swap cache": ({"swapcache": True, "dirty": True}, EVERY_MODE_OK),
    "clean, no callback": ({"kind": "file", "aops": "none"}, EVERY_MODE_OK),
    "unreleasable, filemap": ({"kind": "file", "private": "unreleasable"}, EVERY_MODE_OK),
    "releasable, no callback": ({"kind": "file", "aops": "none", "private": "releasable"}, EVERY_MODE_OK),
    "unreleasable, no callback": ({"kind": "file", "aops": "none", "private": "unreleasable"}, ONCE_A_STAGE),
    "swap cache": ({"swapcache": True}, EVERY_MODE_OK),
    "swap cache, unmapped": ({"swapcache": True, "maps": 0}, EVERY_MODE_OK),
    "swap cache, large": ({"swapcache": True, "order": 4}, EVERY_MODE_OK),
    "swap cache, extra reference": ({"swapcache": True, "extra_refs": 1}, ONCE_A_STAGE),
    "swap cache, shmem": ({"kind": "shmem", "swapcache": True}, EVERY_MODE_OK),
    "ksm": ({"kind": "ksm"}, EVERY_MODE_OK),
    "ksm, of three processes": ({"kind": "ksm", "maps": 3}, EVERY_MODE_OK),
    "ksm, swap cache": ({"kind": "ksm", "swapcache": True}, EVERY_MODE_OK),
    "ksm, extra reference": ({"kind": "ksm", "extra_refs": 1}, ONCE_A_STAGE),
    "mlocked": ({"mlocked": True}, EVERY_MODE_OK),
    "THP": ({"order": 9}, EVERY_MODE_OK),
    "freed": ({"freed": True}, ((0, 0, 0),) * 3),
    "truncated": ({"kind": "file", "truncated": True, "private": "releasable"}, ((0, 1, 1),) * 3),
    "truncated, unreleasable": ({"kind": "file", "truncated": True, "private": "unreleasable"}, EAGAIN_UNMAP),
    "inaccessible": ({"kind": "file", "inaccessible": True}, ONCE_A_STAGE),
    "inaccessible shmem": ({"kind": "shmem", "inaccessible": True}, ONCE_A_STAGE),
    "secretmem": ({"kind": "file", "aops": "secretmem"}, ONCE_A_STAGE),
    "copy error": ({"copy_error": True}, ONCE_A_STAGE),
    "callback fails once": ({"kind": "file", "callback": ["EBUSY", "ok"]}, ((1, 1, 1), (0, 2, 1), (0, 2, 1))),
    "callback fails ten times": ({"kind": "file", "callback": ["EAGAIN"] * 9 + ["ok"]}, (OK, (0, 2, 1), (0, 2, 1))),
    "no callback to be told": ({"kind": "file", "aops": "none", "callback": ["EBUSY"]}, EVERY_MODE_OK),
    "movable_ops": ({"kind": "movable_ops"}, EVERY_MODE_OK),
    "movable_ops, -EBUSY": ({"kind": "movable_ops", "callback": ["EBUSY"]}, ONCE_A_STAGE),
    "movable_ops, -EAGAIN": ({"kind": "movable_ops", "callback": ["EAGAIN"]}, ONCE_A_STAGE),
    "movable_ops, third time": ({"kind": "movable_ops", "callback": ["EAGAIN", "EAGAIN", "ok"]}, EVERY_MODE_OK),
    "movable_ops, locked": ({"kind": "movable_ops", "locked": "until_wait"}, WAITS),
    "movable_ops, large": ({"kind": "movable_ops", "order": 3}, EVERY_MODE_OK),
}
"""The rows in which all rule sets agree."""

DIFFERENCES = {
    ("dirty, no callback", "6.12"): ({"kind": "file", "aops": "none", "dirty": True}, ONCE_A_STAGE),
    ("dirty, no callback", "7.3"): ({"kind": "file", "aops": "none", "dirty": True}, ONCE_A_STAGE),
    ("dirty, no callback", "mm-next"): ({"kind": "file", "aops": "none", "dirty": True}, ONCE_A_STAGE),
    ("dirty, no callback, unmapped", "6.12"): (     # written out in stage 2, clean in the next pass
        {"kind": "file", "aops": "none", "dirty": True, "maps": 0}, ((1, 1, 1), (1, 2, 2), (0, 2, 1))),
    ("dirty, no callback, unmapped", "7.3"): ({"kind": "file", "aops": "none", "dirty": True, "maps": 0}, ONCE_A_STAGE),
    ("poisoned", "6.12"): ({"hwpoison": "before"}, EVERY_MODE_OK),
    ("poisoned", "7.3"): ({"hwpoison": "before"}, EVERY_MODE_OK),
    ("poisoned", "mm-next"): ({"hwpoison": "before"}, ((1, 0, 0),) * 3),
    ("poisoned meanwhile", "6.12"): ({"hwpoison": "after_unmap"}, EVERY_MODE_OK),
    ("poisoned meanwhile", "7.3"): ({"hwpoison": "after_unmap"}, EVERY_MODE_OK),
    ("poisoned meanwhile", "mm-next"): ({"hwpoison": "after_unmap"}, ((1, 1, 1),) * 3),    # stage 2 asks before it allocates
    ("poisoned, and met", "7.3"): (                 # mapped nowhere after stage 1, so that stage 2 finds it freed
        {"hwpoison": "before", "copy_error": True}, ((1, 1, 1), (0, 1, 1), (0, 1, 1))),
    ("poisoned, and met", "mm-next"): ({"hwpoison": "before", "copy_error": True}, ((1, 0, 0),) * 3),
    ("movable_ops, freed", "6.12"): ({"kind": "movable_ops", "freed": True}, ((0, 0, 0),) * 3),
    ("movable_ops, freed", "7.3"): ({"kind": "movable_ops", "freed": True}, EVERY_MODE_OK),
    ("movable_ops, freed", "mm-next"): ({"kind": "movable_ops", "freed": True}, EVERY_MODE_OK),
}


class TestMatrix:
    """What becomes of one folio of each kind, and how many destinations that costs."""

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("row", MATRIX)
    def test_row(self, row, kernel):
        folio, expected = MATRIX[row]
        for mode, (rc, allocated, returned) in zip(MODES, expected):
            level, result = run(folio, kernel=kernel, mode=mode)
            assert outcome(result) == (rc, allocated, returned), mode
            assert result["left"] == ["f0"] * rc
            nr = 1 << folio.get("order", 0)
            assert result["stats"]["nr_succeeded"] == nr * (1 - rc) and result["stats"]["nr_failed_pages"] == nr * rc, mode
            assert result["nr_isolated"] == (0 if rc or folio.get("kind") == "movable_ops" else -nr), mode
            if "f0" in result["folios"]:
                assert result["folios"]["f0"]["node"] == 1 - rc, mode

    @pytest.mark.parametrize("row, kernel", DIFFERENCES)
    def test_difference(self, row, kernel):
        folio, expected = DIFFERENCES[row, kernel]
        for mode, one in zip(MODES, expected):
            assert outcome(run(folio, kernel=kernel, mode=mode)[1]) == one, mode

    @pytest.mark.parametrize("mode", MODES)
    def test_locked_and_pf_memalloc(self, mode):
        assert outcome(run({"locked": "until_wait"}, mode=mode, pf_memalloc=True)[1]) == (1, 10, 10)


    @pytest.mark.parametrize("mode", MODES)
    def test_a_target_without_memory(self, mode):
        """Every allocation fails; what was there stays, a large folio in pieces."""
        level, result = run({}, {"order": 2}, mode=mode, machine={"nodes": [{"pages": 4096}, {"pages": 0}]})
        assert outcome(result) == (-ENOMEM, 1, 0) and result["left"] == ["f0", "f1"]
        level, result = run({"order": 2}, {}, mode=mode, machine={"nodes": [{"pages": 4096}, {"pages": 0}]})
        assert outcome(result) == (-ENOMEM, 2, 0) and result["left"] == ["f1", "f0/1", "f0/2", "f0/3", "f0/0"]


class TestAfterwards:
    """What the moved folio looks like, and what the counters say."""

    def test_swap_cache(self):
        level, result = run({"swapcache": True, "order": 2, "dirty": True}, {"swapcache": True})
        mem = level.machine.mem
        large, small = (int(stretch.holder[0]) for stretch in level.stretches)
        assert [int(mem.folios.private[pfn]) for pfn in (large, small)] == [1, 5]
        assert mem.folios.page_flags[large] & PG_swapcache and mem.folios.page_flags[large] & PG_dirty
        slots = mem.slots[int(mem.mappings.slots[mem.sys.swap_space[0]]):]
        assert slots[:6].tolist() == [0, large, large, large, large, small]
        assert mem.nodes.nr_swapcache.tolist() == [0, 5] and mem.nodes.nr_file_pages.tolist() == [0, 5]
        wanted = {"node": 1, "refcount": 8, "mapcount": 4, "dirty": True, "swapcache": True, "mlocked": False, "present": True,
                  "data_ok": True}
        assert {key: result["folios"]["f0"][key] for key in wanted} == wanted

    def test_shmem_in_the_swap_cache_follows_in_both(self):
        level, result = run({"kind": "shmem", "swapcache": True, "order": 2})
        mem = level.machine.mem
        assert mem.nodes.nr_file_pages.tolist() == [0, 8] and mem.nodes.nr_shmem.tolist() == [0, 4]
        assert result["folios"]["f0"]["refcount"] == 4 + 4 + 4

    def test_ksm(self):
        level, result = run({"kind": "ksm", "maps": 3})
        mem = level.machine.mem
        pfn = int(level.stretches[0].holder[0])
        assert mem.folios.page_flags[pfn] & PG_ksm and mem.anon_vmas.kpfn[-mem.folios.mapping[pfn]] == pfn
        assert mem.anon_vmas.refcount.sum() == 0    # no anon_vma is held for it
        assert result["folios"]["f0"]["mapcount"] == 3

    def test_private_data_goes_along(self):
        for aops in ("filemap", "buffer", "buffer_norefs"):
            level, result = run({"kind": "file", "aops": aops, "private": "unreleasable"})
            pfn = int(level.stretches[0].holder[0])
            assert level.machine.mem.folios.page_flags[pfn] & PG_private and level.machine.mem.folios.private[pfn]
            assert result["folios"]["f0"]["refcount"] == 1 + 1 + 1 + 1      # page cache, private data, mapping, LRU batch

    def test_private_data_is_released(self):
        level, result = run({"kind": "file", "aops": "none", "private": "releasable"})
        assert result["folios"]["f0"]["refcount"] == 1 + 1 + 1

    @pytest.mark.parametrize("kind, order, counters", [
        ("shmem", 9, {"nr_file_pages": 512, "nr_shmem": 512, "nr_shmem_thps": 512, "nr_file_dirty": 0}),
        ("shmem", 0, {"nr_file_pages": 1, "nr_shmem": 1, "nr_shmem_thps": 0, "nr_file_dirty": 0}),
        ("file", 4, {"nr_file_pages": 16, "nr_shmem": 0, "nr_shmem_thps": 0, "nr_file_dirty": 16})])
    def test_counters_of_the_page_cache(self, kind, order, counters):
        level, _ = run({"kind": kind, "order": order, "dirty": True})
        for name, nr in counters.items():
            assert level.machine.mem.nodes[name].tolist() == [0, nr], name

    def test_large_anonymous_folios_are_counted_by_order(self):
        level, _ = run({"order": 4, "count": 3}, {"order": 9}, {"order": 4, "alloc": "fail"}, {"kind": "file", "order": 4})
        counted = level.machine.mem.mthp_nr_anon
        assert counted[4] == 3 and counted[9] == 1 and counted.sum() == 4

    def test_movable_ops(self):
        for callback, node, refs in ((["ok"], 1, 1), (["EBUSY"], 0, 2)):
            level, result = run({"kind": "movable_ops", "callback": callback})
            assert (result["folios"]["f0"]["node"], result["folios"]["f0"]["refcount"]) == (node, refs)
            assert result["copies"] == {"folios": 0, "batched": 0, "discarded": 0}
            flags = level.machine.mem.folios.page_flags[level.stretches[0].holder[0]]
            assert flags & PG_movable_ops and bool(flags & PG_movable_ops_isolated) == (refs == 2)

    @pytest.mark.parametrize("cpus, expected", [((True, True), 7), ((True, False), -1), ((False, False), 7)])
    def test_cpupid_between_tiers(self, cpus, expected):
        """In tiering mode it is a time that means nothing in the other tier."""
        for tiering, cpupid in ((True, expected), (False, 7)):
            machine = Machine(nodes=[NodeConfig(512, cpus=each) for each in cpus], memory_tiering=tiering)
            process = machine.process()
            pfn, = machine.folios_of(process, process.mmap("4K"), PAGE_SIZE)
            machine.mem.folios.cpupid[pfn] = 7
            machine.migrate_pages([pfn], 1)
            moved, = machine.folios_of(process, process._starts[0], PAGE_SIZE)
            assert machine.mem.folios.cpupid[moved] == cpupid

    def test_write_out_cleans_and_restores(self):
        """6.12: the folio stays, mapped and clean, and moves when it is asked again."""
        for kind in ("shmem", "file"):
            folio = {"kind": kind, "aops": "none", "pte_dirty": True}
            assert outcome(run(folio, kernel="6.12", mode="MIGRATE_SYNC", calls=2)[1]) == (0, 1, 0)
        level, result = run(folio, kernel="6.12", mode="MIGRATE_SYNC")
        assert (result["rc"], result["folios"]["f0"]["dirty"], result["folios"]["f0"]["mapcount"]) == (1, False, 1)
        assert level.machine.mem.nodes.nr_file_dirty.sum() == 0


class TestPoison:
    """Bad memory: hwpoison entries, and pages that are never given out again."""

    @pytest.mark.parametrize("kernel", ["6.12", "7.3"])
    def test_a_mapped_page_gets_a_hwpoison_entry(self, kernel):
        level, result = run({"hwpoison": "before"}, {}, kernel=kernel)
        assert result["stats"]["nr_succeeded"] == 2
        process, address = level.stretches[0].mappings[0]
        assert process.rss_pages == 1               # the other folio's
        level.machine.lru_add_drain()
        bad = np.flatnonzero(level.machine.mem.folios.page_flags & PG_hwpoison)
        assert len(bad) == 1 and level.machine.mem.folios.refcount[bad[0]] == 0
        assert level.machine.free_pages(0) == 4096 - 1 and level.machine.free_pages(1) == 4096 - 1
        with pytest.raises(BadAddress, match="not readable"):
            process.read(address, 1)
        level.machine.validate()

    def test_it_is_not_restored_when_the_move_fails(self):
        level, result = run({"hwpoison": "before", "extra_refs": 1})
        assert (result["rc"], result["folios"]["f0"]["mapcount"], result["folios"]["f0"]["present"]) == (1, 0, False)
        assert level.stretches[0].mappings[0][0].rss_pages == 0

    def test_mm_next_restores_what_it_finds_bad_in_the_batch(self):
        level, result = run({"hwpoison": "after_unmap"}, {}, kernel="mm-next")
        assert (result["rc"], result["folios"]["f0"]["mapcount"], result["folios"]["f0"]["present"]) == (1, 1, True)

    def test_a_pmd_is_moved_whole(self):
        level, result = run({"order": 9, "hwpoison": "before"})
        assert (result["rc"], result["folios"]["f0"]["mapcount"]) == (0, 1)
        assert level.machine.free_pages(0) == 4096 - 1      # all but the bad page of the source

    def test_only_the_first_page_of_a_pte_mapped_folio_is_bad(self):
        level, result = run({"order": 4, "hwpoison": "before"})
        assert result["folios"]["f0"]["mapcount"] == 15 and level.stretches[0].mappings[0][0].rss_pages == 15

    def test_a_split_leaves_the_mark_on_the_first_piece(self):
        """Unmapped by the split, it is freed unless the swap cache holds it."""
        folio = {"order": 4, "hwpoison": "before", "partially_mapped": 2}
        level, result = run(folio, kernel="mm-next")
        assert result["left"] == [] and level.machine.free_pages(0) == 4096 - 1
        _, result = run({**folio, "swapcache": True}, kernel="mm-next")
        assert result["left"] == ["f0/0"] and result["stats"]["nr_succeeded"] == 15

    def test_a_bad_page_is_not_allocated_again(self):
        world = World(64, 64)
        pfns = world.pfns(4)
        world.folios.page_flags[pfns[1]] |= PG_hwpoison
        world.expected.clear()
        world.process.exit()
        world.machine.lru_add_drain()
        assert world.machine.free_pages(0) == 63
        world.process = world.machine.process()
        world.map(63)
        assert pfns[1] not in world.expected[0][0].machine.folios_of(*world.expected[0][:2], 63 * PAGE_SIZE)
        world.check()


class TestSplit:
    """Splitting of what has caches and private data, told outcomes, order of the pieces."""

    @pytest.mark.parametrize("kernel, pieces", [("7.3", [1, 2, 3, 0]), ("mm-next", [1, 2, 3, 0]), ("6.12", [3, 2, 1, 0])])
    def test_order_of_pieces(self, kernel, pieces):
        _, result = run({"order": 2, "alloc": "fail_all"}, kernel=kernel)
        assert result["left"] == [f"f0/{i}" for i in pieces]

    @pytest.mark.parametrize("kind", ["anon", "shmem"])
    def test_swap_cache(self, kind):
        level, result = run({"kind": kind, "order": 2, "swapcache": True, "alloc": "fail"})
        assert (result["rc"], result["stats"]["nr_split"], result["stats"]["nr_succeeded"]) == (0, 1, 4)
        mem = level.machine.mem
        heads = level.stretches[0].holder
        assert mem.folios.private[heads].tolist() == [1, 2, 3, 4] and mem.nodes.nr_swapcache.tolist() == [0, 4]
        assert (mem.folios.page_flags[heads] & PG_swapcache != 0).all()

    def test_shmem_thp(self):
        level, result = run({"kind": "shmem", "order": 9, "alloc": "fail"})
        assert (result["rc"], result["stats"]["nr_thp_split"]) == (0, 1)
        assert level.machine.mem.nodes.nr_shmem_thps.tolist() == [0, 0]
        assert level.machine.mem.nodes.nr_shmem.tolist() == [0, 512]

    @pytest.mark.parametrize("folio, split", [
        ({}, True), ({"extra_refs": 1}, False), ({"pinned": True}, False), ({"maps": 0, "swapcache": True}, False),
        ({"kind": "file"}, True), ({"kind": "file", "writeback": "forever"}, False),
        ({"kind": "file", "private": "releasable"}, True), ({"kind": "file", "private": "unreleasable"}, False),
        ({"kind": "movable_ops"}, False), ({"split": ["EBUSY"]}, False), ({"split": ["ok"], "extra_refs": 1}, True),
        ({"split": ["ok"], "pinned": True}, False), ({"split": ["ok"], "kind": "movable_ops"}, False)])
    def test_who_can_be_split(self, folio, split):
        level, result = run({"order": 2, "alloc": "fail", **folio})
        assert result["stats"]["nr_split"] == split
        assert result["rc"] == (-12 if not split else 1 if folio.get("extra_refs") else 0)

    def test_truncated(self):
        """Its buffers are not even asked: without a mapping it is -EBUSY, here before a destination is wanted."""
        level, result = run({"kind": "file", "order": 9, "truncated": True, "private": "releasable"},
                            machine={"thp_migration": False})
        assert (result["rc"], result["stats"]["nr_split"], result["stats"]["nr_thp_failed"]) == (1, 0, 1)
        assert result["folios"]["f0"]["refcount"] == 2

    def test_references_stay_with_the_head(self):
        folio = {"order": 2, "alloc": "fail_all", "split": ["ok"], "extra_refs": 1, "extra_refs_gone_after": 0}
        level, result = run(folio, {"order": 2, "alloc": "fail_all"})
        assert result["left"] == ["f0/1", "f0/2", "f0/3", "f0/0", "f1/1", "f1/2", "f1/3", "f1/0"]
        assert [result["folios"][f"f0/{i}"]["refcount"] for i in range(4)] == [3, 2, 2, 2]

    @pytest.mark.parametrize("callback, left", [(["EBUSY"], ["f0/1", "f0/2", "f0/3", "f0/0"]), (["EBUSY", "ok"], ["f0/1"])])
    def test_pieces_have_the_same_owner(self, callback, left):
        """A script of the callback's outcomes goes on from piece to piece, in list order."""
        level, result = run({"kind": "file", "order": 2, "alloc": "fail", "callback": callback})
        assert result["left"] == left

    def test_a_zero_page_keeps_the_mark_of_userfaultfd(self):
        world = World()
        address = world.process.mmap(4 * PAGE_SIZE, order=2)
        world.process.write(address, b"x")
        world.process.uffd_wp(address, 4 * PAGE_SIZE)
        world.machine.fragment(1, 0)
        assert world.process.move(address, 4 * PAGE_SIZE, 1).total("nr_split") == 1
        assert world.machine.node_of(world.process, address + PAGE_SIZE) is None, "a zero page"
        with pytest.raises(WouldHang, match="userfaultfd"):
            world.process.write(address + PAGE_SIZE, b"x")
        world.check()

    def test_each_attempt_has_its_outcome(self):
        """Two destinations too many: the attempts of a long-term pin until the third."""
        folio = {"order": 2, "alloc": "fail", "split": ["EAGAIN", "EAGAIN", "ok"]}
        assert run(folio, reason="longterm_pin")[1]["targets"]["allocated"] == 3 + 4
        assert run(folio)[1]["rc"] == -12

    def test_counters(self):
        level, _ = run({"order": 9, "alloc": "fail"}, {"order": 4, "alloc": "fail"},
                       {"order": 9, "partially_mapped": 9, "split": ["EBUSY"]})
        sys = level.machine.mem.sys[0]
        assert (sys.thp_split_page, sys.thp_split_page_failed) == (1, 1)

    def test_pf_memalloc_sleeps_on_the_lock_of_what_is_to_be_split(self):
        """Unlike the unmap: stage 2 of SYNC_LIGHT splits it and its pieces move."""
        folio = {"order": 4, "partially_mapped": 4, "locked": "until_wait"}
        assert run(folio, mode="MIGRATE_SYNC_LIGHT", pf_memalloc=True)[1]["stats"]["nr_split"] == 1
        assert run(folio, pf_memalloc=True)[1]["stats"]["nr_split"] == 0

    def test_private_data_of_a_split_folio_is_gone(self):
        level, result = run({"kind": "file", "order": 2, "private": "releasable", "alloc": "fail"})
        assert not (level.machine.mem.folios.page_flags & PG_private).any()


class TestBuffers:
    """buffer_migrate_folio() locks the buffers, buffer_norefs also wants nobody to use them."""

    def world(self, aops="buffer", **fields):
        world = World()
        file = world.machine.file("16K", aops=aops, **fields)
        world.address, world.cached = world.map(1, file=file, shared=True)
        if not fields:
            world.folios.page_flags[world.cached] |= PG_private
            world.folios.private[world.cached] = world.cached
            world.folios.refcount[world.cached] += 1
        return world

    @pytest.mark.parametrize("mode, uptodate, moves", [
        ("MIGRATE_ASYNC", True, False), ("MIGRATE_SYNC_LIGHT", True, True), ("MIGRATE_SYNC_LIGHT", False, False),
        ("MIGRATE_SYNC", False, True)])
    def test_locked(self, mode, uptodate, moves):
        world = self.world()
        world.surround(world.cached[0], buffers_locked=OTHERS_UNTIL_WAIT)
        if not uptodate:
            world.folios.page_flags[world.cached[0]] &= ~PG_uptodate
        result = world.migrate(world.cached, mode=mode)
        assert result.rc == 1 - moves and world.where(world.address) == [int(moves)]
        assert result.targets["allocated"] == (1 if mode == "MIGRATE_ASYNC" else 2)
        world.check()

    def test_locked_for_ever(self):
        world = self.world()
        world.surround(world.cached[0], buffers_locked=OTHERS_FOREVER)
        with pytest.raises(WouldHang):
            world.migrate(world.cached, mode="MIGRATE_SYNC")
        world.check()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("aops, moves", [("buffer", True), ("buffer_norefs", False)])
    def test_used_by_a_journal(self, aops, moves, mode):
        world = self.world(aops, busy_buffers=True)
        assert world.folios.page_flags[world.cached[0]] & PG_private
        result = world.migrate(world.cached, mode=mode)
        assert (result.rc, world.where(world.address)) == ((0, [1]) if moves else (1, [0]))
        world.check()

    def test_no_buffers(self):
        world = World()
        _, cached = world.map(1, file=world.machine.file("4K", aops="buffer"), shared=True)
        world.surround(cached[0], buffers_locked=OTHERS_FOREVER)
        assert world.migrate(cached).rc == 0
        world.check()


class Balloon:
    """An owner of movable_ops pages: copies bytes, remembers what it was asked."""

    def __init__(self, machine, answers=()):
        self.machine, self.answers, self.asked = machine, list(answers), []

    def isolate_page(self, pfn):
        self.asked.append(("isolate", pfn))
        return self.answers != [False]

    def migrate_page(self, dst, src, mode):
        self.asked.append(("migrate", src, mode.name))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        if answer == 0:
            self.machine.frames.view(dst, 1)[:] = self.machine.frames.view(src, 1)
        return answer

    def putback_page(self, pfn):
        self.asked.append(("putback", pfn))


class TestOwners:
    """A movable_ops page is moved by its owner's Python code, in the middle of a compiled call."""

    def setup(self, *answers, nr=1):
        world = World()
        owner = Balloon(world.machine, answers)
        world.pages = world.machine.movable_ops_pages(0, owner, nr=nr)
        for pfn in world.pages:
            world.machine.frames.view(pfn, 1)[:] = pfn % 251
        return world, owner

    def pages_of(self, world):
        return np.flatnonzero(world.folios.page_flags & PG_movable_ops)

    def test_moves_with_others(self):
        world, owner = self.setup(nr=2)
        before = world.pfns(3)
        result = world.migrate([before[0], world.pages[0], before[1], world.pages[1], before[2]])
        assert (result.rc, result.stats["nr_succeeded"], result.copies["folios"]) == (0, 5, 3)
        moved = self.pages_of(world)
        assert world.nodes_of(moved) == [1, 1] and world.folios.refcount[moved].tolist() == [1, 1]
        assert [int(world.machine.frames.view(pfn, 1)[0, 0]) for pfn in moved] == [pfn % 251 for pfn in world.pages]
        assert [one[0] for one in owner.asked] == ["isolate", "isolate", "migrate", "migrate"]
        world.check()

    @pytest.mark.parametrize("mode, asked", [
        ("MIGRATE_ASYNC", ["MIGRATE_ASYNC"]), ("MIGRATE_SYNC", ["MIGRATE_ASYNC", "MIGRATE_SYNC"])])
    def test_refuses(self, mode, asked):
        world, owner = self.setup(-EBUSY, -EBUSY)
        result = world.migrate(world.pages, mode=mode)
        assert result.rc == 1 and [one[2] for one in owner.asked if one[0] == "migrate"] == asked
        assert owner.asked[-1] == ("putback", world.pages[0]) and world.nodes_of(world.pages) == [0]
        world.check()

    def test_does_not_let_it_be_isolated(self):
        world, owner = self.setup(False)
        with pytest.raises(InvalidInput, match="its owner does not give it"):
            world.migrate([*world.pfns(1), *world.pages])
        world.check()

    @pytest.mark.parametrize("answer, error", [(ValueError("broken"), ValueError), (1, InvalidInput), (None, InvalidInput),
                                               (True, InvalidInput)])
    def test_an_owner_that_fails(self, answer, error):
        """The error is raised after the batch has been finished; nothing is lost."""
        world, owner = self.setup(answer)
        with pytest.raises(error) as raised:
            world.migrate([*world.pfns(2), *world.pages, *world.pfns(1)])
        assert raised.value.result.left.tolist() == world.pages.tolist()
        world.check()

    def test_given_back_if_another_folio_cannot_be_isolated(self):
        """A page is asked for when its turn comes: those before the folio that fails go back to their owner, none after it is asked."""
        world, owner = self.setup(nr=3)
        first, second, third = world.pages
        folio = world.pfns(1)[0]
        with pytest.raises(InvalidInput, match=f"folio {folio} cannot be isolated"):
            world.migrate([first, folio, second, folio, third])
        assert owner.asked == [("isolate", first), ("isolate", second), ("putback", first), ("putback", second)]
        world.check()

    def test_named_twice(self):
        world, owner = self.setup()
        with pytest.raises(InvalidInput, match="cannot be isolated"):
            world.migrate([*world.pages, *world.pages])
        assert owner.asked == [("isolate", world.pages[0]), ("putback", world.pages[0])]
        world.check()

    def test_isolated_once(self):
        world, owner = self.setup()
        world.machine.isolate(world.pages)
        with pytest.raises(InvalidInput):
            world.machine.isolate(world.pages)
        world.machine.putback(world.pages)
        world.check()

    def test_no_room(self):
        world = World(64, 64)
        with pytest.raises(OutOfMemory):
            world.machine.movable_ops_pages(0, nr=65)
        assert world.machine.free_pages(0) == 64
        world.check()


class TestKsmOfOneProcess:
    """A KSM page that one process maps at several addresses, and its children too."""

    def test_every_mapping_follows(self):
        world = World()
        address, pfns = world.map(4)
        vma = world.process._vma_at(address)
        world.machine.make_ksm(int(pfns[0]), [(vma, address)])
        child = world.process.fork()
        world.check()
        result = world.migrate(pfns[:1])
        assert result.rc == 0 and world.where(address) == [1] and world.where(address, process=child) == [1]
        world.expected.append((child, *world.expected[0][1:]))
        world.check()
        child.exit()
        world.expected.pop()
        assert world.migrate(world.machine.folios_of(world.process, address, PAGE_SIZE), 0).rc == 0
        assert world.where(address) == [0]
        world.check()


class TestZoneDevice:
    """Device memory that is neither private nor coherent stays mapped, and cannot be split."""

    @pytest.mark.parametrize("order", [0, 4])
    def test_stays(self, order):
        world = World()
        pfns = world.pfns(1, order)
        world.folios.page_flags[pfns[0]] |= PG_zone_device
        result = world.migrate(pfns)
        assert (result.rc, result.targets["returned"], result.stats["nr_split"]) == (1, 10, 0)
        world.check()

    def test_is_not_split(self):
        world = World(512, 512)
        world.machine.fragment(1, 0)
        pfns = world.pfns(1, 4)
        world.folios.page_flags[pfns[0]] |= PG_zone_device
        assert world.migrate(pfns).rc == -12
        world.check()


class TestSwapSpace:
    """A machine has one swap space, and hands its entries out once."""

    def test_entries(self):
        world = World()
        world.machine.swapon("16K")
        assert world.machine.alloc_swap_entries(3) == 1 and world.machine.alloc_swap_entries(1) == 4
        with pytest.raises(OutOfMemory):
            world.machine.alloc_swap_entries(1)
        with pytest.raises(InvalidInput, match="one"):
            world.machine.swapon("16K")

    def test_a_folio_goes_with_the_process_that_alone_used_its_entry(self):
        world = World()
        world.machine.swapon("16K")
        address, (pfn,) = world.map(1)
        entry = world.machine.alloc_swap_entries(1)
        add_to_swap_cache(world.machine.table, pfn, entry)
        world.machine.lru_add_drain()
        world.expected.clear()
        world.process.exit()
        world.check()
        assert world.folios.refcount[pfn] == 0      # free_swap_cache(): no page table refers to the slot
        assert not world.machine.mem.nodes.nr_swapcache.any()


def any_folio(rng):
    """A folio that can be, with some of the fields that the format has."""
    while True:
        folio = any_fields(rng)
        try:
            scenario_of([folio])
            return folio
        except Fault:
            pass


def any_fields(rng):
    def perhaps(chance, key, *values):
        if rng.random() < chance:
            folio[key] = rng.choice(values)

    kind = rng.choice(["anon", "anon", "file", "file", "shmem", "ksm", "movable_ops"])
    folio = {"kind": kind}
    if kind != "ksm":
        folio["order"] = rng.choice([0, 0, 0, 2, 4])
    for key in ("dirty", "pte_dirty", "mlocked", "active", "copy_error", "pinned", "freed", "truncated", "inaccessible"):
        perhaps(.1, key, True)
    perhaps(.2, "maps", 0, 2, 3)
    perhaps(.1, "uptodate", False)
    perhaps(.15, "hwpoison", "before", "after_unmap")
    perhaps(.15, "locked", "until_wait")
    perhaps(.1, "writeback", "until_wait")
    perhaps(.2, "alloc", "fail", "fail_all")
    perhaps(.2, "extra_refs", 1, 3)
    perhaps(.1, "zero_filled", 1, 2)
    perhaps(.2, "partially_mapped", 1, 2)
    perhaps(.2, "swapcache", True)
    perhaps(.3, "private", "releasable", "unreleasable")
    perhaps(.4, "aops", "migrate_folio", "filemap", "buffer", "buffer_norefs", "none", "secretmem")
    perhaps(.2, "split", ["ok"], ["EBUSY", "ok"], ["EAGAIN"])
    perhaps(.2, "callback", ["EAGAIN", "ok"], ["EINVAL"])
    return {key: value for key, value in folio.items() if kind in KINDS_WITH.get(key, (kind,))}


class TestAnything:
    """Whatever the folios are: no byte is lost, the books add up, and succeeded and failed pages are all of them."""

    @pytest.mark.parametrize("seed", range(60))
    def test_seed(self, seed):
        rng = random.Random(seed)
        folios = [any_folio(rng) for _ in range(rng.choice([1, 2, 5]))]
        kernel, mode = rng.choice(KERNELS), rng.choice(MODES)
        _, result = run(*folios, kernel=kernel, mode=mode, machine={"nodes": [{"pages": 512}, {"pages": 512}]})
        stats = result["stats"]
        assert (result["rc"] == 0) == (not result["left"])
        if not any("alloc" in folio for folio in folios):
            assert stats["nr_succeeded"] + stats["nr_failed_pages"] == sum(1 << folio.get("order", 0) for folio in folios)


class TestConfig:
    def test_kernel(self):
        with pytest.raises(InvalidInput, match="mm-next"):
            World(kernel="7.4")
