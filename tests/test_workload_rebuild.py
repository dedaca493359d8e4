"""A snapshot rebuilt: every kind, every order, nothing lost; moved, it is found whole again or said not to be."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from offload.engines import parse_engine
from offload.errors import InvalidInput, OutOfMemory
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.fault import access
from offload.mm.memmap import PG_dirty, PG_ksm, PG_mlocked, PG_partially_mapped, PG_swapcache
from offload.workload import rebuild as rebuild_module
from offload.workload import snapshot as snap
from offload.workload.migrate_process import move_process, result_of
from offload.workload.rebuild import MAX_MAPPERS, rebuild

BASE = 0x7f00_0000_0000
M = 2 << 20
BATCH = parse_engine("batch")


def vma(start, pages, kind="anon", **given):
    fields = dict(prot="rw", shared=kind == "shmem", offset=0, path="" if kind == "anon" else f"/{kind}",
                  inode=0 if kind == "anon" else 7, device="00:01", flags=())
    return snap.SnapshotVma(start=start, end=start + pages * 4096, kind=kind, **{**fields, **given})


def make(vmas, rows, *, seed=1, **given):
    """A snapshot of records (va, page, vma, folio, first_index, nr_mapped, mapcount, bits, order), with random bytes."""
    folios = np.array(sorted(rows), snap.FOLIO_DTYPE) if rows else np.zeros(0, snap.FOLIO_DTYPE)
    nr_pages = int((folios["page"] + folios["nr_mapped"]).max()) if rows else 0
    data = np.random.default_rng(seed).integers(1, 255, (nr_pages, 4096), np.uint8)
    snapshot = snap.Snapshot(**{**dict(pid=1, comm="test", taken="now", kernel="k", vmas=tuple(vmas), folios=folios,
                                       data=data, nr_pages=nr_pages, vm_pin_kib=0, folio_sizes_known=True), **given})
    snap.validate_snapshot(snapshot)
    return snapshot


def check(snapshot, rebuilt=None, **given):
    """Rebuild, compare all bytes through the page table, move, and check books, counts and bytes again."""
    rebuilt = rebuilt or rebuild(snapshot, poison=True)
    rebuilt.machine.validate()
    kept = {(page["row"], page["address"]) for page in rebuilt.pages}
    for row, address in kept:
        at = snapshot.folios[(snapshot.folios["va"] <= address) & (
            address < snapshot.folios["va"] + snapshot.folios["nr_mapped"].astype(np.uint64) * np.uint64(4096))][0]
        if "r" in snapshot.vmas[at["vma"]].prot:
            assert rebuilt.process.read(int(address), 4096) == snapshot.data[row].tobytes()
    moved = move_process(rebuilt, BATCH, validate=True, **given)
    result = result_of(moved)
    assert moved.verified, result
    assert result["pages_seen"] == result["pages_moved"] + result["pages_failed"] + result["pages_skipped"]
    for counts in result["kinds"].values():
        assert counts["pages_seen"] == sum(counts[f"pages_{name}"] for name in ("moved", "failed", "skipped"))
        assert sum(counts["reasons"].values()) == counts["pages_failed"] + counts["pages_skipped"]
    return rebuilt, result


def reasons(result, kind):
    return result["kinds"][kind]["reasons"]


class TestFolios:
    """A folio is rebuilt as it was, as far as page tables here allow."""

    @pytest.mark.parametrize("order", range(10))
    def test_each_order_anonymous(self, order):
        rebuilt, result = check(make([vma(BASE, 1024)], [(BASE, 0, 0, 0, 0, 1 << order, 1, snap.FOLIO_ANON, order)]))
        assert rebuilt.folios.order.tolist() == [order]
        assert result["pages_moved"] == 1 << order

    @pytest.mark.parametrize("order", range(10))
    @pytest.mark.parametrize("kind", ["file", "shmem"])
    def test_each_order_of_a_file(self, kind, order):
        rebuilt, result = check(make([vma(BASE, 1024, kind, shared=True, offset=M)],
                                     [(BASE, 0, 0, 0, 0, 1 << order, 1, snap.FOLIO_DIRTY, order)]))
        assert rebuilt.folios.order.tolist() == [order]
        assert result["kinds"][kind]["pages_moved"] == 1 << order

    def test_pmd_or_pte(self):
        bits = snap.FOLIO_ANON
        rebuilt, result = check(make([vma(BASE, 1024)], [(BASE, 0, 0, 0, 0, 512, 1, bits | snap.FOLIO_THP, 9),
                                                         (BASE + M, 512, 0, 1, 0, 512, 1, bits, 9)]))
        assert rebuilt.machine.mem.folios.entire_mapcount.sum() == 1
        assert result["stats"]["nr_thp_succeeded"] == 2

    def test_above_2m_becomes_several(self):
        rebuilt, result = check(make([vma(BASE, 1024, "file")], [(BASE, 0, 0, 0, 0, 1024, 1, snap.FOLIO_THP, 10)]))
        assert rebuilt.folios.order.tolist() == [9, 9]
        assert any("more than 2M" in note for note in rebuilt.notes)
        assert result["pages_moved"] == 1024

    def test_an_unaligned_large_folio(self):
        rebuilt, _ = check(make([vma(BASE, 64)], [(BASE + 3 * 4096, 0, 0, 0, 0, 16, 1, snap.FOLIO_ANON, 4)]))
        assert rebuilt.folios.order.tolist() == [4]

    def test_partly_mapped_anonymous_is_split_by_the_move(self):
        rebuilt = rebuild(snapshot := make([vma(BASE, 64)], [(BASE, 0, 0, 0, 0, 5, 1, snap.FOLIO_ANON, 4),
                                                             (BASE + 4096 * 8, 5, 0, 0, 8, 2, 1, snap.FOLIO_ANON, 4)]))
        assert rebuilt.folios.order.tolist() == [4]
        assert rebuilt.machine.mem.folios.page_flags[rebuilt.folios.pfn[0]] & PG_partially_mapped
        _, result = check(snapshot, rebuilt)
        assert result["pages_moved"] == 7 and result["stats"]["nr_split"] == 1

    def test_a_partly_mapped_folio_of_a_file_stays_whole(self):
        rebuilt, result = check(make([vma(BASE, 64, "file", offset=4096 * 20)],
                                     [(BASE, 0, 0, 0, 4, 7, 1, 0, 4)]))
        assert rebuilt.folios.order.tolist() == [4] and result["pages_seen"] == 7
        assert any("9 pages belong to large folios" in note for note in rebuilt.notes)

    def test_across_two_vmas(self):
        check(make([vma(BASE, 4), vma(BASE + 4 * 4096, 12, prot="r")],
                   [(BASE, 0, 0, 0, 0, 4, 1, snap.FOLIO_ANON, 4), (BASE + 4 * 4096, 4, 1, 0, 4, 12, 1, snap.FOLIO_ANON, 4)]))

    def test_pages_moved_apart_become_base_pages(self):
        rebuilt, result = check(make([vma(BASE, 64)], [(BASE, 0, 0, 0, 0, 4, 1, snap.FOLIO_ANON, 3),
                                                       (BASE + 4096 * 32, 4, 0, 0, 4, 4, 1, snap.FOLIO_ANON, 3)]))
        assert rebuilt.folios.order.tolist() == [0] * 8 and result["pages_moved"] == 8

    def test_the_same_page_at_two_addresses_is_one(self):
        rebuilt, result = check(make([vma(BASE, 4, "shmem"), vma(BASE + M, 4, "shmem")],
                                     [(BASE, 0, 0, 0, 0, 4, 2, 0, 2), (BASE + M, 0, 1, 0, 0, 4, 2, 0, 2)]), move_all=True)
        assert result["pages_seen"] == result["pages_moved"] == 4 and not rebuilt.helpers

    def test_two_pages_at_one_place_of_a_file(self):
        _, result = check(make([vma(BASE, 4, "file"), vma(BASE + M, 4, "file")],
                               [(BASE, 0, 0, 0, 0, 1, 1, 0, 0), (BASE + M, 1, 1, 1, 0, 1, 1, 0, 0)]))
        assert result["pages_moved"] == result["pages_skipped"] == 1

    def test_a_private_copy_is_anonymous(self):
        _, result = check(make([vma(BASE, 4, "file", prot="rw")],
                               [(BASE, 0, 0, 0, 0, 1, 1, 0, 0), (BASE + 4096, 1, 0, 1, 0, 1, 1, snap.FOLIO_ANON, 0)]))
        assert result["kinds"]["anon"]["pages_moved"] == result["kinds"]["file"]["pages_moved"] == 1

    def test_a_sparse_file_far_away(self):
        check(make([vma(BASE, 1 << 28, "file", offset=1 << 50)],
                   [(BASE, 0, 0, 0, 0, 1, 1, 0, 0), (BASE + (1 << 39), 1, 0, 1, 0, 1, 1, 0, 0)]))

    def test_nothing_at_all(self):
        _, result = check(make([], []))
        assert result["pages_seen"] == 0


class TestState:
    """mlocked, dirty and shared pages are so again."""

    def test_mlocked_and_dirty(self):
        rebuilt, _ = check(make([vma(BASE, 4, flags=("lo",)), vma(BASE + M, 4, "file", shared=True)],
                                [(BASE, 0, 0, 0, 0, 1, 1, snap.FOLIO_ANON | snap.FOLIO_MLOCKED, 0),
                                 (BASE + M, 1, 1, 1, 0, 1, 1, snap.FOLIO_DIRTY, 0)]))
        flags = rebuilt.machine.mem.folios.page_flags[
            rebuilt.machine.folios_of(rebuilt.process, BASE, 4096).tolist()
            + rebuilt.machine.folios_of(rebuilt.process, BASE + M, 4096).tolist()]
        assert flags[0] & PG_mlocked and flags[1] & PG_dirty and not flags[1] & PG_mlocked

    @pytest.mark.parametrize("kind, bits", [("anon", snap.FOLIO_ANON), ("file", 0), ("shmem", 0)])
    @pytest.mark.parametrize("order", [0, 2, 9])
    def test_shared_pages_stay_unless_all_are_moved(self, kind, bits, order):
        snapshot = make([vma(BASE, 512, kind)], [(BASE, 0, 0, 0, 0, 1 << order, 3, bits | snap.FOLIO_THP, order)])
        rebuilt, result = check(snapshot)
        assert len(rebuilt.helpers) == 2 and result["pages_skipped"] == 1 << order
        assert next(iter(reasons(result, kind))).startswith("-EACCES")
        assert check(snapshot, move_all=True)[1]["pages_moved"] == 1 << order

    def test_a_partly_mapped_shared_folio_is_seen_as_shared(self):
        _, result = check(make([vma(BASE, 4, "file")], [(BASE, 0, 0, 0, 0, 2, 2, 0, 4)]))
        assert result["pages_skipped"] == 2

    def test_mappings_are_capped_and_it_is_said(self):
        rebuilt, _ = check(make([vma(BASE, 4, "file")], [(BASE, 0, 0, 0, 0, 1, 300, 0, 0)]))
        assert len(rebuilt.helpers) == MAX_MAPPERS - 1 and any("more than 8 mappings" in note for note in rebuilt.notes)

    def test_unknown_mapcounts(self):
        _, result = check(make([vma(BASE, 4)], [(BASE, 0, 0, 0, 0, 1, 0, snap.FOLIO_ANON | snap.FOLIO_EXCLUSIVE, 0),
                                                (BASE + 4096, 1, 0, 1, 0, 1, 0, snap.FOLIO_ANON, 0)],
                               folio_sizes_known=False))
        assert result["pages_moved"] == result["pages_skipped"] == 1


class TestSwapCache:
    """Anonymous folios in the swap cache are there again, and move with their entries."""

    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_each_order(self, order):
        bits, nr = snap.FOLIO_ANON | snap.FOLIO_SWAPCACHE, 1 << order
        rebuilt, result = check(make([vma(BASE, 2048)], [(BASE, 0, 0, 0, 0, nr, 1, bits, order),
                                                         (BASE + M, nr, 0, 1, 0, 1, 1, snap.FOLIO_ANON, 0),
                                                         (BASE + 2 * M, nr + 1, 0, 2, 0, nr, 1, bits, order)]))
        assert result["pages_moved"] == 2 * nr + 1
        mem = rebuilt.machine.mem
        cached = mem.folios.page_flags & PG_swapcache != 0
        assert np.count_nonzero(cached) == 2 and sorted(mem.folios.private[cached]) == [1, 1 + nr]
        assert mem.nodes.nr_swapcache.tolist() == [0, 2 * nr]

    def test_a_reference_too_many_is_seen(self):
        rebuilt = rebuild(make([vma(BASE, 8)], [(BASE, 0, 0, 0, 0, 1, 1, snap.FOLIO_ANON | snap.FOLIO_SWAPCACHE, 0)]))
        rebuilt.machine.mem.folios.refcount[rebuilt.folios.pfn] += 1
        result = result_of(move_process(rebuilt, BATCH))
        assert reasons(result, "anon") == {"-EAGAIN: references that nothing explains": 1}


class TestKsm:
    """Merged pages are one page again, wherever the process and others map it."""

    BITS = snap.FOLIO_ANON | snap.FOLIO_KSM

    def snapshot(self, mapcount, bits=BITS):
        rows = [(at, 0, number, 0, 0, 1, mapcount, bits, 0)
                for at, number in ((BASE + 4096, 0), (BASE + 5 * 4096, 0), (BASE + M, 1))]
        return make([vma(BASE, 8), vma(BASE + M, 8, "file", prot="rw")],
                    [*rows, (BASE, 1, 0, 3, 0, 1, 1, snap.FOLIO_ANON, 0)])

    @pytest.mark.parametrize("mapcount, helpers", [(3, 0), (5, 2), (300, 5)])
    @pytest.mark.parametrize("bits", [BITS, BITS | snap.FOLIO_SWAPCACHE])
    def test_every_mapping_follows(self, mapcount, helpers, bits):
        rebuilt, result = check(self.snapshot(mapcount, bits), move_all=True)
        assert result["pages_seen"] == result["pages_moved"] == 2 and len(rebuilt.helpers) == helpers
        folios = rebuilt.machine.mem.folios
        (pfn,) = np.flatnonzero(folios.page_flags & PG_ksm)
        assert folios.nid[pfn] == 1 and folios.mapcount[pfn] == 3 + helpers
        everywhere = [*((rebuilt.process, BASE + at) for at in (4096, 5 * 4096, M)), *((one, BASE + 4096) for one in rebuilt.helpers)]
        assert {rebuilt.machine.folios_of(process, at, 4096)[0] for process, at in everywhere} == {pfn}

    def test_shared_with_itself(self):
        _, result = check(self.snapshot(3))
        assert result["pages_moved"] == 1 and next(iter(reasons(result, "anon"))).startswith("-EACCES")

    def test_a_write_takes_a_copy(self):
        rebuilt, _ = check(self.snapshot(3))
        before = rebuilt.process.read(BASE + M, 4096)
        rebuilt.process.write(BASE + 4096, b"x")
        assert rebuilt.process.read(BASE + M, 4096) == before
        rebuilt.machine.validate()


class TestHugetlb:
    """Huge pages of 2 MiB come from a pool of node 0 and change places with temporary ones of node 1."""

    BITS = snap.FOLIO_HUGETLB

    def row(self, at, page=0, number=0, folio=0, mapcount=1, bits=BITS | snap.FOLIO_ANON):
        return at, page, number, folio, 0, 512, mapcount, bits, 9

    @pytest.mark.parametrize("prot", ["rw", "r", ""])
    def test_private(self, prot):
        rebuilt, result = check(make([vma(BASE, 2048, "hugetlb", prot=prot, offset=0), vma(BASE + 8 * M, 8)],
                                     [self.row(BASE), self.row(BASE + 2 * M, 512, 0, 1),
                                      (BASE + 8 * M, 1024, 1, 2, 0, 1, 1, snap.FOLIO_ANON, 0)]))
        assert result["kinds"]["hugetlb"]["pages_moved"] == 1024 and result["pages_moved"] == 1025
        mem = rebuilt.machine.mem
        assert mem.nodes.nr_hugepages.tolist() == [0, 2] and not mem.nodes.surplus_hugepages.any()
        assert mem.mms.hugetlb_usage[rebuilt.process.mm] == 1024

    def test_shared_at_two_addresses(self):
        vmas = [vma(BASE, 1024, "hugetlb", shared=True), vma(BASE + 4 * M, 512, "hugetlb", shared=True, offset=M)]
        bits = self.BITS | snap.FOLIO_DIRTY
        snapshot = make(vmas, [self.row(BASE, bits=bits), self.row(BASE + M, 512, 0, 1, 2, bits),
                               self.row(BASE + 4 * M, 512, 1, 1, 2, bits)])
        rebuilt, result = check(snapshot, move_all=True)
        assert result["pages_moved"] == 1024 and not rebuilt.helpers
        pfns = rebuilt.machine.folios_of(rebuilt.process, BASE + M, M), rebuilt.machine.folios_of(rebuilt.process, BASE + 4 * M, M)
        assert pfns[0] == pfns[1] and rebuilt.machine.mem.folios.page_flags[pfns[0]] & PG_dirty
        assert check(snapshot)[1]["pages_moved"] == 512, "the other is mapped more than once"

    @pytest.mark.parametrize("shared", [False, True])
    def test_others_map_it_too(self, shared):
        bits = self.BITS if shared else self.BITS | snap.FOLIO_ANON
        snapshot = make([vma(BASE, 1024, "hugetlb", shared=shared)], [self.row(BASE, mapcount=3, bits=bits)])
        rebuilt, result = check(snapshot)
        assert len(rebuilt.helpers) == 2 and next(iter(reasons(result, "hugetlb"))).startswith("-EACCES")
        rebuilt, result = check(snapshot, move_all=True)
        assert result["pages_moved"] == 512
        assert {int(rebuilt.machine.folios_of(one, one.vma_index()[0][0], M)[0]) for one in rebuilt.helpers} == {
            int(rebuilt.machine.folios_of(rebuilt.process, BASE, M)[0])}
        if not shared:
            before = rebuilt.process.read(BASE, 8)
            rebuilt.process.write(BASE, b"mine")
            assert rebuilt.helpers[0].read(BASE, 8) == before, "as after a fork"

    @pytest.mark.parametrize("rows, word", [
        ([(BASE, 0, 0, 0, 0, 16, 1, BITS | snap.FOLIO_ANON, 4)], "other sizes"),
        ([(BASE, 0, 0, 0, 0, 1024, 1, BITS | snap.FOLIO_ANON, 10)], "other sizes"),
        ([(BASE, 0, 0, 0, 0, 512, 1, BITS, 9)], "mapped private"),
        ([(BASE, 0, 0, 0, 0, 512, 2, BITS | snap.FOLIO_ANON, 9), (BASE + M, 0, 0, 0, 0, 512, 2, BITS | snap.FOLIO_ANON, 9)],
         "changed under the reader")])
    def test_skipped(self, rows, word):
        _, result = check(make([vma(BASE, 1024, "hugetlb")], rows))
        assert result["pages_moved"] == 0 and word in str(result["kinds"])


class TestSkipped:
    """What is not rebuilt is counted with its reason."""

    @pytest.mark.parametrize("kind, bits, word", [
        ("anon", snap.FOLIO_ZERO_PAGE, "zero page"), ("hugetlb", snap.FOLIO_HUGETLB, "hugetlb"), ("file", snap.FOLIO_KSM, "KSM"),
        ("anon", snap.FOLIO_ANON | snap.FOLIO_HWPOISON, "poisoned"), ("shmem", snap.FOLIO_ANON, "shared mapping")])
    def test_kinds(self, kind, bits, word):
        _, result = check(make([vma(BASE, 4, kind)], [(BASE, 0, 0, 0, 0, 1, 1, bits, 0)]))
        assert result["pages_skipped"] == 1 and word in str(result["kinds"])

    def test_what_was_not_read(self):
        vmas = [dataclasses.replace(vma(BASE, 4), nr_swapped=3), vma(BASE + M, 4, "pfnmap")]
        _, result = check(make(vmas, [], skipped={"pfnmap": 2}))
        assert result["pages_seen"] == result["pages_skipped"] == 5

    def test_above_the_page_tables(self):
        _, result = check(make([vma(1 << 50, 4)], [(1 << 50, 0, 0, 0, 0, 1, 1, snap.FOLIO_ANON, 0)]))
        assert result["pages_skipped"] == 1


SNAPSHOT = make([vma(BASE, 2048)], [(BASE + i * 8192, 2 * i, 0, i, 0, 2, 1, snap.FOLIO_ANON, 1) for i in range(700)])


class Liar(McCopy):
    """Says that it has copied, and has not."""

    def offload_copy(self, batch, done):
        done[:] = 1
        return 0


class TestFailures:
    """An injected fault is survived, or found and named."""

    @pytest.mark.parametrize("faults", [{"declines": True}, {"fails_after": 3}, {"fails_after": 3, "marks": "none"}])
    def test_a_migrator_that_fails(self, faults):
        _, result = check(SNAPSHOT, migrator=FaultyMigrator(McCopy(), **faults))
        assert result["pages_moved"] == 1400

    def test_folios_with_a_reference_too_many_stay_and_the_others_go(self):
        rebuilt = rebuild(SNAPSHOT)
        mem = rebuilt.machine.mem
        held = rebuilt.folios.pfn[[0, 350, 699]]
        mem.folios.refcount[held] += 1
        moved = move_process(rebuilt, BATCH)
        mem.folios.refcount[held] -= 1
        rebuilt.machine.validate()
        result = result_of(moved)
        assert moved.verified and (result["pages_moved"], result["pages_failed"]) == (1394, 6)
        assert reasons(result, "anon") == {"-EAGAIN: references that nothing explains": 6}

    def test_entries_after_a_run_that_failed_are_asked_for_again(self):
        # A shared page ends the run in which the first folio fails.
        snapshot = make([vma(BASE, 8)], [(BASE + i * 4096, i, 0, i, 0, 1, 1 + (i == 2), snap.FOLIO_ANON, 0) for i in range(6)])
        rebuilt = rebuild(snapshot)
        rebuilt.machine.mem.folios.refcount[rebuilt.folios.pfn[0]] += 1
        result = result_of(move_process(rebuilt, BATCH))
        assert result["calls"]["move_pages"] == 2
        assert [result[f"pages_{name}"] for name in ("moved", "failed", "skipped")] == [4, 1, 1]

    def test_bytes_that_did_not_arrive_are_found(self):
        result = result_of(move_process(rebuild(SNAPSHOT), BATCH, migrator=Liar()))
        assert not result["verified"] and result["bad_pages"] == 1400 and result["bad_addresses"][0] == hex(BASE)

    def test_one_wrong_byte_of_a_page_that_stays_is_found(self):
        rebuilt = rebuild(SNAPSHOT)
        pfn = int(rebuilt.folios.pfn[5])
        rebuilt.machine.mem.folios.refcount[pfn] += 1
        rebuilt.machine.frames.view(pfn, 1)[0, 4095] ^= 1
        result = result_of(move_process(rebuilt, BATCH))
        assert result["bad_addresses"] == [hex(BASE + 5 * 8192)]

    def test_no_memory(self, monkeypatch):
        monkeypatch.setattr(rebuild_module.snap, "available_bytes", lambda: 1 << 20)
        with pytest.raises(OutOfMemory, match="--layout-only"):
            rebuild(SNAPSHOT)


class TestLayoutOnly:
    """Without bytes only places are verified, and that is what it says."""

    def test_metadata(self):
        snapshot = dataclasses.replace(SNAPSHOT, data=None)
        result = result_of(move_process(rebuild(snapshot), BATCH, validate=True))
        assert result["verified"] and result["verified_what"] == "placement, books"
        assert result["pages_moved"] == 1400 and result["gbps"] is None and result["moved_bytes"] == 0

    def test_bytes_need_a_place(self):
        with pytest.raises(InvalidInput, match="no place for the bytes"):
            rebuild(SNAPSHOT, nodes=("nowhere", "nowhere"))

    def test_compiled_code_copies_nothing_there(self):
        """Whoever asks it to: its frames' addresses are near 0."""
        machine = Machine(MachineConfig(nodes=(NodeConfig(64, placement="nowhere"),)))
        process = machine.process()
        address = process.mmap(4096)
        buffer = np.full(4096, 7, np.uint8)
        for write in (1, 0):
            assert access(machine.table, process.mm, address, buffer.ctypes.data, 4096, write) == 4096
        assert (buffer == 7).all()


@strategies.composite
def snapshots(draw):
    """Some VMAs of random kinds; in each, folios of random orders, mapped whole or in part, shared or not."""
    rows, vmas, page = [], [], 0
    at = BASE
    for number in range(draw(strategies.integers(1, 4))):
        kind = draw(strategies.sampled_from(("anon", "file", "shmem")))
        start, gap = at, 0
        for _ in range(draw(strategies.integers(0, 6))):
            order = draw(strategies.integers(0, 5))
            at = -(-at // (4096 << order)) * (4096 << order)
            first = draw(strategies.integers(0, (1 << order) - 1))
            nr = draw(strategies.integers(1, (1 << order) - first))
            bits = draw(strategies.sampled_from((0, snap.FOLIO_DIRTY, snap.FOLIO_ACTIVE | snap.FOLIO_REFERENCED)))
            if kind == "anon":
                bits |= snap.FOLIO_ANON | draw(strategies.sampled_from((0, 0, snap.FOLIO_SWAPCACHE)))
                if order == 0:
                    bits |= draw(strategies.sampled_from((0, 0, snap.FOLIO_KSM)))
            rows.append((at + first * 4096, page, number, len(rows), first, nr, draw(strategies.integers(0, 10)), bits, order))
            page += nr
            at += 4096 << order
            gap = draw(strategies.integers(0, 2)) * 4096
            at += gap
        at += 4096
        vmas.append(vma(start, (at - start) // 4096, kind, inode=number + 1 if kind != "anon" else 0, offset=start & (1 << 30) - 1,
                        shared=kind == "shmem" or kind == "file" and draw(strategies.booleans()),
                        flags=draw(strategies.sampled_from(((), ("lo",))))))
        at += draw(strategies.integers(0, 3)) * 4096
    return make(vmas, rows, seed=draw(strategies.integers(0, 9)))


class TestAnything:
    """Whatever a snapshot says, no byte is lost and the counts add up."""

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(snapshots(), strategies.booleans())
    def test_rebuilt_and_moved(self, snapshot, move_all):
        _, result = check(snapshot, move_all=move_all)
        assert result["pages_seen"] == snapshot.nr_pages and result["pages_failed"] == 0
        if move_all:
            assert result["pages_moved"] == snapshot.nr_pages
