"""A snapshot brought back to life: a machine whose node 0 holds the process as it was, folio for folio, byte for byte.

Stands for no kernel file. What a fault would have built over time (mm/fault.py) is put in place at once by compiled
loops: folios, page caches, page-table entries, reverse map, bytes.

How a folio of the snapshot is rebuilt. The rules are:

* mapped in one piece or with holes, in one VMA or in several that number its pages alike: one folio of its order, and
  what was mapped of it is mapped. The pages that were not are zeros; nobody looks at them.
* anonymous and only partly mapped, and not shared: as above, and marked partially mapped, so that a move splits it first.
* of more than 2 MiB: folios of 2 MiB, the largest that page tables map here.
* anything else (its pages moved apart by mremap(2); records that contradict each other because the process was running
  while it was read): base pages. They are counted.
* mapped by other processes too (mapcount): mapped by helper processes as well, MAX_MAPPERS mappings at most; what
  counts for move_pages(2) is whether there is more than one. Helpers map the file, or the same addresses through the
  same anon_vma as after a fork. They map whole folios, since how much others map of one cannot be seen.
* merged pages (KSM): one page with a stable node, mapped at all of the process's addresses that had it. Helpers map it at the
  first of them.
* anonymous pages in the swap cache: there again, with an entry of a swap space made for them.
* huge pages of hugetlb, if they are of 2 MiB: taken from a pool on node 0 that holds as many, mapped by faults.

Not rebuilt, with a reason for each (`Rebuilt.skipped`): huge pages of other sizes, poisoned pages, the zero page, what is
swapped out, and mappings of devices or of the kernel. Left out without mention: private data of file systems (buffer heads:
one more reference that a move takes along), writeback, and mlock by other processes than this.
"""

import dataclasses

import numpy as np

from offload.errors import InvalidInput, OutOfMemory
from offload.jit import jit, jit_entry
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.mm.address_space import filemap_add_folio, filemap_get_folio, folio_mark_dirty, swap_cache_add_folio
from offload.mm.fault import change_protection, lookup_page
from offload.mm.frames import POISON, copy_memory, frame_address, zero_frames
from offload.mm.hugetlb import set_huge_pte
from offload.mm.memmap import (
    AOPS_FILEMAP, AOPS_MIGRATE_FOLIO, FIRST_PFN, FOLIO_DTYPE as MEMMAP_DTYPE, MAPPING_FILE, MAPPING_HUGETLB, MAPPING_SHMEM, NO_PFN,
    PG_active, PG_dirty, PG_referenced, PG_swapbacked, PG_uptodate, VM_HUGETLB, VM_READ, VM_WRITE, records, unpack,
)
from offload.mm.node import alloc_pages_node, deferred_split_folio, folio_add_lru, folio_put_refs
from offload.mm.pagetable import (
    PMD_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_HUGE, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, PTE_YOUNG, PTRS, TASK_SIZE,
    add_rss, folio_add_rmap, pgtable_deposit, set_pte, vma_address, walk_alloc_pmd, walk_alloc_pte,
)
from offload.mm.process import File
from offload.units import (
    HPAGE_PMD_NR, HPAGE_PMD_ORDER, MAX_PAGE_ORDER, NR_MAX_BATCHED_MIGRATION, PAGE_SHIFT, PAGE_SIZE, format_size,
)
from offload.workload import snapshot as snap
from offload.workload.snapshot import MAX_FOLIO_ORDER

__all__ = ("rebuild", "Rebuilt", "Skipped", "MAX_MAPPERS", "PAGE_DTYPE", "RUN_DTYPE", "PLAN_DTYPE", "KINDS",
           "locate_pages", "compare_pages")

MAX_MAPPERS = 8
"""Mappings that a page gets at most, however many it had: a page of the C library has hundreds."""

KINDS = ("anon", "file", "shmem", "hugetlb")
"""What is rebuilt; ``PAGE_DTYPE["kind"]`` is an index into it."""
HUGETLB = KINDS.index("hugetlb")

PLAN_DTYPE = np.dtype([(name, np.int64) for name in (
    "snapshot_folio", "order", "kind", "anon",
    "mapping",                      # minus an anon_vma, or the row of an address space
    "index",                        # of the head page there
    "first_run", "nr_runs", "nr_mapped",    # nr_mapped: distinct pages
    "page_flags", "dirty", "partially_mapped",
    "extra",                        # helper processes that map it
    "ksm",                          # 1: a merged page, in each of its runs
    "swap_entry",                   # 0: not in the swap cache
    "pfn",                          # where it was built
)], align=True)
"""One folio to build."""

RUN_DTYPE = np.dtype([(name, np.int64) for name in (
    "vma", "address", "row", "first_page", "nr_pages", "bits", "huge",
)], align=True)
"""Pages of one folio that are mapped one after the other; ``row`` of the snapshot's data, ``bits`` of their PTEs."""

PAGE_DTYPE = np.dtype([(name, np.int64) for name in (
    "row", "address", "folio", "kind",
    "mapping", "index",             # of a file's page; mapping is 0 for an anonymous one
)], align=True)
"""One page that was rebuilt, in ascending order of its first address; ``folio`` is an index into ``Rebuilt.folios``."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Pages that were there and are not rebuilt."""

    kind: str
    pages: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Rebuilt:
    """A machine that holds the process of a snapshot, all of it on node 0; node 1 has room for it and is empty."""

    machine: Machine
    process: object
    helpers: tuple
    """Processes that stand for all others that map the same pages."""
    snapshot: snap.Snapshot
    folios: np.recarray
    """PLAN_DTYPE."""
    runs: np.recarray
    """RUN_DTYPE; those of a folio follow each other."""
    pages: np.recarray
    """PAGE_DTYPE, each page once."""
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    """What is different from the snapshot; each a sentence on one line."""

    @property
    def pages_seen(self):
        return len(self.pages) + sum(one.pages for one in self.skipped)


def rebuild(snapshot, *, nodes=("host", "host"), batch_pages=NR_MAX_BATCHED_MIGRATION, protocol="v6", copy_kernel="plain", poison=False,
            progress=None):
    """Build a machine of two nodes and the process of ``snapshot`` on node 0 of it: a `Rebuilt`.

    ``nodes``: the placements of the two; a layout-only snapshot gives a machine of placement "nowhere". ``batch_pages``, ``protocol``, ``copy_kernel`` and ``poison`` as in
    MachineConfig. ``progress(done_pages, total_pages)`` is called now and then.

    The snapshot must be consistent, as load() and read_process() have checked. OutOfMemory if the two nodes, which both get
    filled, do not fit into the memory available; InvalidInput if the snapshot has bytes and the nodes are nowhere.
    """
    if "nowhere" in nodes and not snapshot.layout_only:
        raise InvalidInput("nodes nowhere,nowhere have no place for the bytes of this snapshot; leave them out of it (data=None), or use host,host")
    skipped = _Skipping(snapshot)
    runs = _runs(snapshot, skipped)
    plan = _plan_folios(snapshot, runs, skipped)
    nr_pages = int((np.int64(1) << plan.folios.order).sum())
    machine = _machine(snapshot, nodes, nr_pages, np.count_nonzero(plan.folios.kind == HUGETLB), poison=poison, batch_pages=batch_pages,
                       protocol=protocol, copy_kernel=copy_kernel)
    process = machine.process(snapshot.comm or f"pid {snapshot.pid}")
    _map_vmas(machine, process, snapshot, plan)
    _swapon(machine, plan)
    _fault_in_hugetlb(machine, process, snapshot, plan)
    _build(machine, process, snapshot, plan, nr_pages, progress)
    helpers = _share(machine, process, plan)
    _merge(machine, plan)
    machine.lru_add_drain()
    _touch(machine, nr_pages)
    return Rebuilt(machine, process, helpers, snapshot, plan.folios, plan.runs, plan.pages, skipped.result(plan.pages.row),
                   tuple(_notes(snapshot, plan)))


# --- what is left out ----------------------------------------------------------------------------------------

REASONS = {
    "zero": "the zero page, which is never migrated (-EFAULT)",
    "hugetlb": "hugetlb pages of other sizes than 2 MiB are not supported",
    "hugetlb_file": "a page of a hugetlbfs file that is mapped private",
    "not_ksm": "called merged (KSM), and not an anonymous base page",
    "hwpoison": "hardware-poisoned",
    "torn": "the process changed under the reader: another page has its place in the file",
    "contradiction": "an anonymous page in a shared mapping: no process has that",
    "above": "above the 128 TiB that page tables reach here",
    "offset": "its file offset is not a whole page",
    "swapped": "swapped out (-ENOENT)",
    "pfnmap": "device memory, not migratable (-EFAULT)",
    "vdso": "a page of the kernel's own",
    "secretmem": "secret memory, never migrated",
    "other": "a driver's or special mapping",
}


class _Skipping:
    # Counts what is not rebuilt: rows of data by record, and what the snapshot has counted already.

    def __init__(self, snapshot):
        self.snapshot = snapshot
        self.records = []                           # (records, reason) in order of finding

    def take(self, records_, bad, reason):
        # The records that are not bad; the others are noted.
        if bad.any():
            self.records.append((records_[bad], reason))
        return records_[~bad]

    def result(self, kept_rows):
        seen = np.zeros(self.snapshot.nr_pages + 1, bool)
        seen[kept_rows] = True
        counts = {}
        kinds = np.array([vma.kind for vma in self.snapshot.vmas])
        for given, reason in self.records:
            anon = given["bits"] & snap.FOLIO_ANON != 0
            names = np.where(anon, "anon", kinds[given["vma"]])
            for name in np.unique(names):
                these = given[names == name]
                rows = np.unique(_expand(these["page"].astype(np.int64), these["nr_mapped"]))
                rows = rows[~seen[rows]]
                seen[rows] = True
                if len(rows):
                    counts[str(name), reason] = counts.get((str(name), reason), 0) + len(rows)
        for kind, pages in self.snapshot.skipped.items():
            counts[kind, kind] = counts.get((kind, kind), 0) + pages
        for vma in self.snapshot.vmas:
            if vma.kind in snap.READ_KINDS and vma.nr_swapped:
                key = "anon" if vma.kind == "file" else vma.kind, "swapped"     # of a file: private copies
                counts[key] = counts.get(key, 0) + vma.nr_swapped
        return tuple(Skipped(kind, pages, REASONS[reason]) for (kind, reason), pages in counts.items() if pages)


# --- what there is to build ----------------------------------------------------------------------------------

@dataclasses.dataclass
class _Plan:
    folios: np.recarray
    runs: np.recarray
    pages: np.recarray
    run_vma: np.ndarray             # index into snapshot.vmas, for each run
    file_of_vma: np.ndarray         # number of a file for each VMA, -1 for none
    file_first: np.ndarray          # for each file: the page of it that is the first here
    file_pages: np.ndarray          # and how many there are from it on
    file_kind: np.ndarray           # index into KINDS
    vma_pgoff: np.ndarray           # of each VMA's start, in the rebuilt numbering
    nr_cut: int = 0                 # folios of more than 2 MiB that were cut
    nr_scattered: int = 0           # folios that became base pages
    nr_partial: int = 0             # anonymous folios, partly mapped
    nr_unmapped: int = 0            # pages of folios that are in them and not mapped here
    nr_capped: int = 0              # folios with more mappings than MAX_MAPPERS


def _runs(snapshot, skipped):
    # The records that can be rebuilt, those of folios above 2 MiB cut into such of 2 MiB.
    runs, vmas = snapshot.folios, snapshot.vmas
    of_vma = lambda values: np.array(values)[runs["vma"]] if len(runs) else np.zeros(0, bool)
    for reason, bad in (
            ("zero", lambda: runs["bits"] & snap.FOLIO_ZERO_PAGE != 0),
            ("hugetlb", lambda: ((runs["bits"] & snap.FOLIO_HUGETLB != 0) | of_vma([vma.kind == "hugetlb" for vma in vmas]))
             & ~((runs["order"] == HPAGE_PMD_ORDER) & (runs["nr_mapped"] == HPAGE_PMD_NR) & (runs["va"] % np.uint64(PMD_SIZE) == 0)
                 & of_vma([vma.kind == "hugetlb" and (vma.start | vma.end | vma.offset) % PMD_SIZE == 0 for vma in vmas]))),
            ("hugetlb_file", lambda: (runs["bits"] & snap.FOLIO_ANON == 0) & of_vma(
                [vma.kind == "hugetlb" and not vma.shared for vma in vmas])),
            ("not_ksm", lambda: (runs["bits"] & snap.FOLIO_KSM != 0) & ((runs["bits"] & snap.FOLIO_ANON == 0) | (runs["order"] > 0))),
            ("hwpoison", lambda: runs["bits"] & snap.FOLIO_HWPOISON != 0),
            ("contradiction", lambda: (runs["bits"] & snap.FOLIO_ANON != 0) & of_vma(
                [vma.shared and vma.kind != "anon" for vma in vmas])),
            ("above", lambda: of_vma([vma.end > TASK_SIZE for vma in vmas])),
            ("offset", lambda: of_vma([vma.kind != "anon" and vma.offset % PAGE_SIZE != 0 for vma in vmas]))):
        runs = skipped.take(runs, bad(), reason)
    return runs


def _expand(first, lengths):
    # first[0], first[0] + 1, ... of each run: [7, 3], [2, 1] as [7, 8, 3].
    lengths = lengths.astype(np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(first, lengths) + within


def _cut(columns, lengths):
    # Runs cut where first_index crosses a multiple of 512: which run each piece is of, where in it it begins, its length.
    head = columns["first_index"] >> HPAGE_PMD_ORDER
    tail = columns["first_index"] + lengths - 1 >> HPAGE_PMD_ORDER
    pieces = tail - head + 1
    of = np.repeat(np.arange(len(lengths)), pieces)
    block = _expand(head, pieces)
    begin = np.maximum(columns["first_index"][of], block << HPAGE_PMD_ORDER)
    end = np.minimum((columns["first_index"] + lengths)[of], block + 1 << HPAGE_PMD_ORDER)
    return of, begin - columns["first_index"][of], end - begin


def _plan_folios(snapshot, given, skipped):
    vmas = snapshot.vmas
    as_int = lambda name: given[name].astype(np.int64)
    start = np.array([min(vma.start, TASK_SIZE) for vma in vmas], np.int64)
    column = {name: as_int(name) for name in ("va", "page", "vma", "folio", "first_index", "nr_mapped", "mapcount", "bits",
                                              "order")}
    column["record"] = np.arange(len(given))
    file_of_vma, nr_files = _files(snapshot)
    pgoff = np.array([min(vma.offset, 1 << 62) >> PAGE_SHIFT if _has_file(vma) else vma.start >> PAGE_SHIFT
                      for vma in vmas] or [0], np.int64)
    kind_of_vma = np.array([KINDS.index(vma.kind) if vma.kind in KINDS else 0 for vma in vmas] or [0])
    kind = kind_of_vma[column["vma"]]
    anon = (column["bits"] & int(snap.FOLIO_ANON) != 0) | (kind == 0)
    column["kind"], column["anon"] = np.where(anon & (kind != HUGETLB), 0, kind), anon

    # 1. folios above 2 MiB become several
    huge = column["order"] > HPAGE_PMD_ORDER
    nr_cut = len(np.unique(column["folio"][huge]))
    of, skip, nr = _cut(column, np.where(huge, column["nr_mapped"], 1))
    length = np.where(huge[of], nr, column["nr_mapped"][of])
    skip = np.where(huge[of], skip, 0)
    column = {name: values[of] for name, values in column.items()}
    anon = anon[of]
    block = np.where(huge[of], column["first_index"] + skip >> HPAGE_PMD_ORDER, 0)
    column["va"] += skip << PAGE_SHIFT
    column["page"] += skip
    column["first_index"] = np.where(huge[of], column["first_index"] + skip & HPAGE_PMD_NR - 1, column["first_index"])
    column["order"] = np.minimum(column["order"], HPAGE_PMD_ORDER)
    column["nr_mapped"] = length

    # 2. a folio whose records agree on where its head is stays whole
    folio = np.unique(column["folio"] << MAX_FOLIO_ORDER | block, return_inverse=True)[1]
    index = pgoff[column["vma"]] + (column["va"] - start[column["vma"]] >> PAGE_SHIFT) - column["first_index"]
    # Where that index counts: a file's number; below 0 for anonymous pages, of the address space or over a file.
    space = np.where(anon, -2 - file_of_vma[column["vma"]], file_of_vma[column["vma"]])
    by = np.lexsort((column["va"], column["first_index"], folio))
    column = {name: values[by] for name, values in column.items()}
    folio, index, space = folio[by], index[by], space[by]
    same = folio[1:] == folio[:-1]
    disagree = (index[1:] != index[:-1]) | (space[1:] != space[:-1])
    overlap = column["first_index"][1:] < np.maximum.accumulate(
        column["first_index"] + column["nr_mapped"] + (folio << 20))[:-1] - (folio[1:] << 20) if len(folio) else same
    overlap = overlap & (space[1:] < 0)
    scattered = index < 0
    scattered |= (space >= 0) & (index & (np.int64(1) << column["order"]) - 1 != 0)
    scattered[1:] |= same & (disagree | overlap)
    scattered &= column["bits"] & int(snap.FOLIO_KSM) == 0          # one page at several addresses
    bad = np.zeros(int(folio.max()) + 1 if len(folio) else 0, bool)
    bad[folio[scattered]] = True
    loose = bad[folio]
    nr_scattered = int(np.count_nonzero(np.bincount(folio[loose & (column["order"] > 0) & (column["kind"] != HUGETLB)], minlength=1)))
    if loose.any():
        column, folio, index, space = _base_pages(column, folio, index, space, loose)

    # 3. no two folios at one place of a file, and no pieces of huge pages
    if len(folio):
        keep = ~(_collide(column, folio, index, space) | (column["kind"] == HUGETLB) & (column["order"] == 0))
        bad_records = np.unique(column["record"][~keep])
        if len(bad_records):
            chosen = np.zeros(len(given), bool)
            chosen[bad_records] = True
            skipped.take(given, chosen, "torn")
            column = {name: values[keep] for name, values in column.items()}
            folio, index, space = folio[keep], index[keep], space[keep]
    return _finish_plan(snapshot, column, folio, index, space, file_of_vma, nr_files, pgoff, nr_cut, nr_scattered)


def _base_pages(column, folio, index, space, loose):
    # The loose runs page by page, each a folio of its own; the same page of a file at two addresses is one.
    lengths = np.where(loose, column["nr_mapped"], 1)
    of = np.repeat(np.arange(len(lengths)), lengths)
    within = _expand(np.zeros(len(lengths), np.int64), lengths)
    loose = loose[of]
    column = {name: values[of] for name, values in column.items()}
    index, space, folio = index[of], space[of], folio[of]
    page_index = index + column["first_index"] + within
    index = np.where(loose, page_index, index)
    column["va"] = column["va"] + np.where(loose, within << PAGE_SHIFT, 0)
    column["page"] = column["page"] + np.where(loose, within, 0)
    for name, value in (("first_index", 0), ("nr_mapped", 1), ("order", 0)):
        column[name] = np.where(loose, value, column[name])
    column["bits"] = np.where(loose, column["bits"] & ~int(snap.FOLIO_THP), column["bits"])
    # A new number for each: of a file (file, page, row of data), of an anonymous one its address.
    key = (np.where(loose, column["page"], 0), np.where(loose, np.where(space >= 0, index, column["va"]), 0),
           np.where(loose, space, folio), loose)
    by = np.lexsort(key)
    new = np.r_[True, np.any([one[by][1:] != one[by][:-1] for one in key], axis=0)]
    folio[by] = np.cumsum(new) - 1
    by = np.lexsort((column["va"], column["first_index"], folio))
    return {name: values[by] for name, values in column.items()}, folio[by], index[by], space[by]


def _collide(column, folio, index, space):
    # True for the runs of file folios that overlap one with a lower index (or an earlier number) in the same file.
    first = np.flatnonzero(np.r_[True, folio[1:] != folio[:-1]])
    of_file = first[space[first] >= 0]
    by = of_file[np.lexsort((folio[of_file], index[of_file], space[of_file]))]
    end = index[by] + (np.int64(1) << column["order"][by])
    out = np.zeros(int(folio.max()) + 1, bool)
    at_file, reached = -1, 0
    change = np.r_[True, space[by][1:] != space[by][:-1]] if len(by) else np.zeros(0, bool)
    # Where nothing overlaps, which is nearly always, one comparison of neighbours says so.
    if len(by) > 1 and ((index[by][1:] < end[:-1]) & ~change[1:]).any():
        for number, begin, stop, file in zip(folio[by].tolist(), index[by].tolist(), end.tolist(), space[by].tolist()):
            if file != at_file:
                at_file, reached = file, begin
            if begin < reached:
                out[number] = True
            else:
                reached = stop
    return out[folio]


def _has_file(vma):
    # Whether pages of a VMA can be of a file. Private hugetlb memory has anonymous pages only, wherever they came from.
    return vma.kind in ("file", "shmem") or vma.kind == "hugetlb" and vma.shared


def _files(snapshot):
    # A number for the file of each VMA, -1 for none. Without frame numbers the path counts too, as for the reader.
    numbers, of_vma = {}, []
    for at, vma in enumerate(snapshot.vmas):
        if not _has_file(vma):
            of_vma.append(-1)
            continue
        name = (vma.kind, vma.device, vma.inode, None if snapshot.folio_sizes_known else vma.path,
                at if not vma.inode else None)
        of_vma.append(numbers.setdefault(name, len(numbers)))
    return np.array(of_vma or [-1], np.int64), len(numbers)


def _finish_plan(snapshot, column, folio, index, space, file_of_vma, nr_files, pgoff, nr_cut, nr_scattered):
    vmas = snapshot.vmas
    # Files begin, for us, at the first page that any VMA maps; aligned, so that folios stay aligned.
    file_first = np.zeros(nr_files, np.int64)
    file_pages = np.zeros(nr_files, np.int64)
    file_kind = np.ones(nr_files, np.int64)
    of_file = space >= 0
    used = np.zeros(len(file_of_vma), bool)
    used[column["vma"]] = True
    if nr_files:
        lowest = np.full(nr_files, np.iinfo(np.int64).max)
        in_use = np.flatnonzero(used & (file_of_vma >= 0))
        np.minimum.at(lowest, file_of_vma[in_use], pgoff[in_use])
        np.minimum.at(lowest, space[of_file], index[of_file])
        file_first = np.where(lowest == np.iinfo(np.int64).max, 0, lowest & -HPAGE_PMD_NR)
        end = file_first.copy()
        np.maximum.at(end, space[of_file], index[of_file] + (np.int64(1) << column["order"][of_file]))
        file_pages = end - file_first
        for vma, number in zip(vmas, file_of_vma.tolist()):
            if number >= 0:
                file_kind[number] = KINDS.index(vma.kind)
    vma_pgoff = pgoff - np.where(file_of_vma >= 0, file_first[file_of_vma] if nr_files else 0, 0)
    index = index - np.where(of_file | (space < -1), _of(file_first, file_of_vma[column["vma"]]), 0)

    # Folios in order of their first address, so that the allocator hands out frames in that order.
    first = np.flatnonzero(np.r_[True, folio[1:] != folio[:-1]]) if len(folio) else np.zeros(0, np.int64)
    lowest = np.minimum.reduceat(column["va"], first) if len(first) else np.zeros(0, np.int64)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(lowest, kind="stable")] = np.arange(len(first))
    number = rank[np.cumsum(np.r_[True, folio[1:] != folio[:-1]]) - 1] if len(folio) else folio
    by = np.lexsort((column["va"], number))
    column = {name: values[by] for name, values in column.items()}
    number, index, space = number[by], index[by], space[by]
    first = np.flatnonzero(np.r_[True, number[1:] != number[:-1]]) if len(number) else np.zeros(0, np.int64)

    folios, runs = records(len(first), PLAN_DTYPE), records(len(number), RUN_DTYPE)
    nr = column["nr_mapped"]
    huge = ((column["bits"] & int(snap.FOLIO_THP) != 0) & (column["order"] == HPAGE_PMD_ORDER) & (nr == HPAGE_PMD_NR)
            & (column["va"] & PMD_SIZE - 1 == 0))
    runs.address, runs.row, runs.first_page, runs.nr_pages = column["va"], column["page"], column["first_index"], nr
    runs.huge = np.where(huge | (column["kind"] == HUGETLB), PTE_HUGE, 0)
    plan = _Plan(folios, runs, None, column["vma"], file_of_vma, file_first, file_pages, file_kind, vma_pgoff,
                 nr_cut=nr_cut, nr_scattered=nr_scattered)
    if not len(first):
        plan.pages = records(0, PAGE_DTYPE)
        return plan

    # Pages, each once, with the number of its addresses here.
    rows = _expand(column["page"], nr)
    page_run = np.repeat(np.arange(len(nr)), nr)
    address = _expand(column["va"] >> PAGE_SHIFT, nr) << PAGE_SHIFT
    own = np.bincount(rows, minlength=1)[rows]
    by_row = np.lexsort((address, rows))
    once = by_row[np.r_[True, rows[by_row][1:] != rows[by_row][:-1]]]
    once = np.sort(once)
    pages = records(len(once), PAGE_DTYPE)
    pages.row, pages.address, pages.folio = rows[once], address[once], number[page_run[once]]
    pages.kind = column["kind"][page_run[once]]
    page_index = index[page_run[once]] + _expand(column["first_index"], nr)[once]
    pages.index = np.where(space[page_run[once]] >= 0, page_index, 0)
    pages = pages[np.argsort(pages.address, kind="stable")]
    plan.pages = pages

    # Folios.
    begin_page = np.r_[0, np.cumsum(nr)[:-1]]
    own_run = np.maximum.reduceat(own, begin_page)
    known = column["mapcount"] > 0
    exclusive = column["bits"] & int(snap.FOLIO_EXCLUSIVE) != 0
    want = np.where(known, column["mapcount"], np.where(exclusive | (own_run > 1), own_run, own_run + 1))
    extra = np.maximum.reduceat(np.minimum(want, MAX_MAPPERS) - own_run, first)
    plan.nr_capped = int(np.count_nonzero(np.maximum.reduceat(want, first) > MAX_MAPPERS))
    some = lambda bit: np.bitwise_or.reduceat(column["bits"], first) & int(bit) != 0
    folios.snapshot_folio, folios.order, folios.kind, folios.anon = (
        column[name][first] for name in ("folio", "order", "kind", "anon"))
    folios.index, folios.first_run = index[first], first
    folios.nr_runs = np.diff(np.r_[first, len(number)])
    folios.nr_mapped = np.bincount(pages.folio, minlength=len(first))
    folios.extra = np.maximum(extra, 0)
    folios.page_flags = np.where(some(snap.FOLIO_REFERENCED), PG_referenced, 0) | np.where(some(snap.FOLIO_ACTIVE),
                                                                                          PG_active, 0)
    folios.dirty = some(snap.FOLIO_DIRTY)
    folios.ksm = some(snap.FOLIO_KSM)
    cached = some(snap.FOLIO_SWAPCACHE) & (folios.kind == 0)
    folios.swap_entry = np.where(cached, np.cumsum(np.where(cached, np.int64(1) << folios.order, 0)), 0)
    folios.swap_entry -= np.where(cached, (np.int64(1) << folios.order) - 1, 0)     # counted from 1, as swap entries are
    whole = folios.nr_mapped == np.int64(1) << folios.order
    folios.partially_mapped = ~whole & (folios.kind == 0) & (folios.order > 1) & (folios.extra == 0)
    plan.nr_partial = int(folios.partially_mapped.sum())
    plan.nr_unmapped = int(((np.int64(1) << folios.order) - folios.nr_mapped).sum())

    # Page-table entries.
    writable = np.array(["w" in vma.prot for vma in vmas])[column["vma"]]
    shared = np.array([vma.shared for vma in vmas])[column["vma"]]
    all_dirty = np.array([vma.nr_present > 0 and vma.dirty_kib << 10 >= vma.nr_present * PAGE_SIZE for vma in vmas])
    anon = column["anon"]
    alone = folios.extra[number] == 0
    dirty = (folios.dirty[number] != 0) | all_dirty[column["vma"]]
    bits = np.full(len(number), PTE_PRESENT | PTE_YOUNG, np.int64)
    bits |= np.where(anon, PTE_DIRTY, 0) | np.where(anon & alone, PTE_EXCLUSIVE, 0)
    bits |= np.where(writable & anon & alone, PTE_WRITE, 0)
    bits |= np.where(writable & ~anon & shared & dirty, PTE_WRITE | PTE_DIRTY, 0)
    runs.bits = bits
    return plan


def _of(values, numbers):
    return np.where(numbers >= 0, values[np.maximum(numbers, 0)], 0) if len(values) else np.zeros(len(numbers), np.int64)


# --- building it ---------------------------------------------------------------------------------------------

def _machine(snapshot, nodes, nr_pages, hugepages, **fields):
    block = 1 << MAX_PAGE_ORDER
    node_pages = -(-(nr_pages + nr_pages // 16) // block) * block + 2 * block
    need = 2 * node_pages * MEMMAP_DTYPE.itemsize
    if not snapshot.layout_only:
        need += sum(placement != "device" for placement in nodes) * nr_pages * PAGE_SIZE
    available = snap.available_bytes()
    if available is not None and need > available:
        remedy = ("free some memory, or use --layout-only" if not snapshot.layout_only else
                  "free some memory")
        raise OutOfMemory(f"two nodes for the {format_size(nr_pages * PAGE_SIZE)} of pid {snapshot.pid} need "
                          f"{format_size(need)} and {format_size(available)} are available; {remedy}")
    if snapshot.layout_only:
        nodes = ("nowhere", "nowhere")
    return Machine(MachineConfig(nodes=(NodeConfig(node_pages, placement=nodes[0], hugepages=int(hugepages)),
                                        NodeConfig(node_pages, placement=nodes[1])), **fields))


def _map_vmas(machine, process, snapshot, plan):
    # VMAs that have pages, their files, and for each run and folio the rows of the machine's tables.
    mapped = np.unique(plan.run_vma)
    used_files = np.unique(plan.file_of_vma[mapped]) if len(mapped) else mapped
    used_files = used_files[used_files >= 0]
    files = dict(zip(used_files.tolist(), _new_files(machine, plan.file_kind[used_files], plan.file_pages[used_files])))
    for number in mapped.tolist():
        vma = snapshot.vmas[number]
        file = files.get(int(plan.file_of_vma[number]))
        process.mmap(vma.end - vma.start, address=vma.start, prot=vma.prot, file=file,
                     offset=int(plan.vma_pgoff[number]) << PAGE_SHIFT if file else 0,
                     shared=vma.shared and file is not None, populate=False, hugetlb=vma.kind == "hugetlb",
                     mlock=vma.locked and vma.kind != "hugetlb")
    rows = np.zeros(len(snapshot.vmas) + 1, np.int64)
    rows[mapped] = process.vma_index()[2]           # both are in ascending order of address
    plan.runs.vma = rows[plan.run_vma]
    mem = machine.mem
    first = plan.runs.vma[plan.folios.first_run] if len(plan.folios) else np.zeros(0, np.int64)
    plan.folios.mapping = np.where(plan.folios.anon, -mem.vmas.anon_vma[first], mem.vmas.mapping[first])
    plan.pages.mapping = np.maximum(plan.folios.mapping[plan.pages.folio], 0)
    # A folio across VMAs must be found in each of them; a merged one is through its stable node.
    folio = np.repeat(np.arange(len(plan.folios)), plan.folios.nr_runs)
    anon = plan.folios.anon[folio] != 0
    linked = anon & (plan.folios.ksm[folio] == 0)
    pairs = np.unique(plan.runs.vma[linked] << 32 | -plan.folios.mapping[folio[linked]])
    for vma, anon_vma in zip((pairs >> 32).tolist(), (pairs & 0xffffffff).tolist()):
        if mem.vmas.anon_vma[vma] != anon_vma:
            machine.link_anon_vma(vma, anon_vma, owner=False)
            mem = machine.mem
    mem.vmas.has_anon[plan.runs.vma[anon]] = 1


def _new_files(machine, kinds, sizes):
    # Files with empty page caches, as Machine.file(), but with one growth of the slots for all: large and sparse ones
    # then cost address space only.
    first = len(machine.mem.slots)
    try:
        slots = np.zeros(first + int(sizes.sum()), np.int64)
    except (MemoryError, ValueError):
        raise OutOfMemory(f"no room for page caches of {format_size(int(sizes.sum()) * PAGE_SIZE)} of mapped files on this "
                          f"host; leave out the process with the largest mappings") from None
    slots[:first] = machine.mem.slots
    machine._set_mem(machine.mem._replace(slots=slots))
    files = []
    for kind, size in zip(kinds.tolist(), sizes.tolist()):
        mapping = machine.new_row("mappings")
        row = machine.mem.mappings[mapping]
        row.kind, row.aops = {"file": (MAPPING_FILE, AOPS_FILEMAP), "shmem": (MAPPING_SHMEM, AOPS_MIGRATE_FOLIO),
                              "hugetlb": (MAPPING_HUGETLB, 0)}[KINDS[kind]]
        row.slots, row.nr_slots = first, size
        first += size
        files.append(File(machine, mapping, KINDS[kind], size))
    return files


def _reserve(machine, addresses, nr_pages):
    # Page tables for runs at ``addresses``, however far apart.
    first, last = addresses >> 21, addresses + (nr_pages << PAGE_SHIFT) - 1 >> 21
    leaves = np.unique(_expand(first, last - first + 1))
    nr_tables = len(leaves) + len(np.unique(leaves >> 9)) + len(np.unique(leaves >> 18)) + 1
    machine.reserve_tables(nr_tables * PMD_SIZE)


def _swapon(machine, plan):
    # A swap space whose entries are all of the folios that are in the swap cache.
    cached = plan.folios[plan.folios.swap_entry > 0]
    if len(cached):
        nr = int((np.int64(1) << cached.order).sum())
        machine.swapon(nr * PAGE_SIZE)
        machine.alloc_swap_entries(nr)


def _fault_in_hugetlb(machine, process, snapshot, plan):
    # Huge pages come from the pool by faults, as the process got them.
    for number in np.flatnonzero(plan.folios.kind == HUGETLB):
        folio = plan.folios[number]
        for run in plan.runs[folio.first_run:folio.first_run + folio.nr_runs]:
            vm_flags = machine.mem.vmas.vm_flags[run.vma]
            machine.mem.vmas.vm_flags[run.vma] |= VM_READ       # a fault of PROT_NONE memory would be refused
            process._populate(int(run.vma), int(run.address), int(run.address) + PMD_SIZE, vm_flags & VM_WRITE != 0)
            machine.mem.vmas.vm_flags[run.vma] = vm_flags
            if folio.anon and folio.extra:
                change_protection(machine.table, process.mm, run.address, run.address + PMD_SIZE, PTE_WRITE | PTE_EXCLUSIVE, 0)
        (folio.pfn,) = machine.folios_of(process, int(run.address), PMD_SIZE)
        if folio.dirty:
            machine.mem.folios.page_flags[folio.pfn] |= PG_dirty
        if not snapshot.layout_only:
            machine.frames.write(int(folio.pfn), snapshot.data[run.row:run.row + HPAGE_PMD_NR].reshape(-1))


def _merge(machine, plan):
    # What is mapped already as ordinary anonymous pages becomes merged pages.
    for one in np.flatnonzero(plan.folios.ksm):
        folio = plan.folios[one]
        runs = plan.runs[folio.first_run:folio.first_run + folio.nr_runs]
        machine.make_ksm(int(folio.pfn), list(zip(runs.vma.tolist(), runs.address.tolist())))


_PIECE_PAGES = 1 << 15


def _build(machine, process, snapshot, plan, nr_pages, progress):
    folios, runs = plan.folios, plan.runs
    if not len(folios):
        return
    _reserve(machine, runs.address, runs.nr_pages)
    data = 0 if snapshot.layout_only else snapshot.data.ctypes.data
    done = np.cumsum(np.int64(1) << folios.order)
    at = 0
    while at < len(folios):
        end = max(int(np.searchsorted(done, (done[at - 1] if at else 0) + _PIECE_PAGES)), at + 1)
        machine.reserve_frame_ops(2 * (end - at) + int(folios.nr_runs[at:end].sum()))
        reached = build_folios(machine.table, folios, at, min(end, len(folios)), runs, data, 0)
        if reached < min(end, len(folios)):
            raise OutOfMemory(f"node 0 of {machine.mem.nodes.nr_pages[0]} pages has no room for folio {reached} of order "
                              f"{folios.order[reached]}; please report this")
        at = reached
        if machine.frames is not None:
            machine.frames.drain()
        if progress is not None:
            progress(int(done[at - 1]), nr_pages)


def _touch(machine, nr_pages):
    # Poison the frames that the move will take: a missing copy shows, and the host's first fault of each, which costs
    # many times a copy, is not in the time of the move.
    if machine.frames is None:
        return
    node = machine.mem.nodes[1]
    nr_pages = min(nr_pages + (1 << MAX_PAGE_ORDER), int(node.nr_pages))
    for at in range(0, nr_pages, _PIECE_PAGES):
        machine.frames.fill(int(node.start_pfn) + at, min(_PIECE_PAGES, nr_pages - at), POISON)


def _share(machine, process, plan):
    # Helper processes for the mappings that others have.
    folios, runs = plan.folios, plan.runs
    helpers = []
    if not len(folios):
        return ()
    # One line per (folio, VMA of ours); a file is mapped as a whole, wherever.
    folio = np.repeat(np.arange(len(folios)), folios.nr_runs)
    first_only = (folios.ksm[folio] == 0) | (np.arange(len(runs)) == folios.first_run[folio])
    pairs = np.unique((folio << 32 | np.where(folios.anon[folio], runs.vma, 0))[first_only])
    for level in range(int(folios.extra.max())):
        wanted = pairs[folios.extra[pairs >> 32] > level]
        folio, vma = wanted >> 32, wanted & 0xffffffff
        helper = machine.process(f"other {level + 1}")
        helpers.append(helper)
        target = np.zeros(len(folio), np.int64)
        anon = vma > 0
        for row in np.unique(vma[anon]).tolist():
            area = machine.mem.vmas[row]
            start, end, pgoff = int(area.start), int(area.end), int(area.pgoff)
            copy = _mmap_row(helper, end - start, start, area.vm_flags & VM_HUGETLB != 0)
            machine.mem.vmas[copy].pgoff, machine.mem.vmas[copy].has_anon = pgoff, 1
            for anon_vma in machine.anon_vmas_of(row):
                machine.link_anon_vma(copy, anon_vma, owner=False)
            target[anon & (vma == row)] = copy
        for mapping in np.unique(folios.mapping[folio[~anon]]).tolist():
            size = int(machine.mem.mappings[mapping].nr_slots)
            huge = bool(machine.mem.mappings[mapping].kind == MAPPING_HUGETLB)
            file = File(machine, mapping, "hugetlb" if huge else "file", size)
            address = helper.mmap(size << PAGE_SHIFT, file=file, shared=True, prot="r", order=HPAGE_PMD_ORDER,
                                  populate=False, hugetlb=huge)
            target[~anon & (folios.mapping[folio] == mapping)] = helper._vma_at(address)
        mem = machine.mem
        address = np.maximum(mem.vmas.start[target] + (folios.index[folio] - mem.vmas.pgoff[target] << PAGE_SHIFT), 0)
        _reserve(machine, address, np.int64(1) << folios.order[folio])
        huge = np.maximum.reduceat(runs.huge, folios.first_run)[folio]
        hugetlb = folios.kind[folio] == HUGETLB
        share_folios(machine.table, folios.pfn[folio[~hugetlb]], target[~hugetlb], huge[~hugetlb])
        if hugetlb.any():
            share_hugetlb(machine.table, folios.pfn[folio[hugetlb]], target[hugetlb])
    return tuple(helpers)


def _mmap_row(process, length, address, hugetlb):
    process.mmap(length, address=address, prot="r", populate=False, hugetlb=bool(hugetlb))
    return process._vma_at(address)


def _notes(snapshot, plan):
    # What is not as it was.
    def folios(nr, one, several):
        return f"{nr} {one if nr == 1 else several}"

    if plan.nr_cut:
        yield f"{folios(plan.nr_cut, 'folio', 'folios')} of more than 2M rebuilt as folios of 2M"
    if plan.nr_scattered:
        yield (f"{folios(plan.nr_scattered, 'large folio', 'large folios')} rebuilt as base pages: mapped at places that "
               f"do not fit together")
    if plan.nr_partial:
        yield (f"{folios(plan.nr_partial, 'anonymous folio is', 'anonymous folios are')} only partly mapped: move_pages(2) "
               f"splits those before it moves them")
    if plan.nr_unmapped:
        yield (f"{plan.nr_unmapped} pages belong to large folios and are not mapped by the process: they move along, are "
               f"zeros here and not counted as seen")
    if plan.nr_capped:
        yield (f"{folios(plan.nr_capped, 'folio has', 'folios have')} more than {MAX_MAPPERS} mappings; {MAX_MAPPERS} were "
               f"rebuilt")
    for nr, what in ((snapshot.nr_changed, "changed while being read: rebuilt with the bytes read last"),
                     (snapshot.nr_vanished, "went away while being read: rebuilt with what was read in their place"),
                     (snapshot.nr_unreadable, "could not be read: rebuilt as zeros")):
        if nr:
            yield f"{nr} pages {what}"


# --- entries into compiled code ------------------------------------------------------------------------------

@jit
def map_run(mem, vma, address, pfn, first_page, nr_pages, bits, huge):
    """Map pages of a folio, with a reference for each entry: a PMD leaf if ``huge``, else PTEs; what is in the way stays.

    Unlike map_folio() it can map a folio of 2 MiB by PTEs.
    """
    area = mem.vmas[vma]
    folio = mem.folios[pfn]
    if huge:
        pmd = walk_alloc_pmd(mem, area.mm, address)
        if mem.tables[pmd] == 0:
            folio.refcount += 1
            pgtable_deposit(mem, area.mm)
            set_pte(mem, pmd, pfn, bits | PTE_HUGE)
            folio_add_rmap(mem, pfn, vma, np.int64(PTE_HUGE))
            add_rss(mem, area.mm, pfn, nr_pages)
        return
    for i in range(nr_pages):
        pte = walk_alloc_pte(mem, area.mm, address + (i << PAGE_SHIFT))
        if pte and mem.tables[pte] == 0:
            folio.refcount += 1
            set_pte(mem, pte, pfn + first_page + i, bits)
            folio_add_rmap(mem, pfn, vma, np.int64(0))
            add_rss(mem, area.mm, pfn, 1)


@jit_entry
def build_folios(mem_table, folios, first, last, runs, data, nid):
    """Build folios ``first`` .. ``last - 1`` of a plan on node ``nid``, but for those that have a pfn already; their bytes come
    from address ``data``, or from nowhere if that is 0. Returns ``last``, or the first that found no room.
    """
    mem = unpack(mem_table)
    for i in range(first, last):
        plan = folios[i]
        if plan.pfn:
            continue
        # 1. the folio
        pfn = alloc_pages_node(mem, nid, plan.order)
        if pfn == NO_PFN:
            return i
        plan.pfn = pfn
        folio = mem.folios[pfn]
        nr_pages = np.int64(1) << plan.order
        folio.page_flags |= PG_uptodate | plan.page_flags
        if plan.mapping < 0:
            folio.page_flags |= PG_swapbacked
            folio.mapping = np.int32(plan.mapping)
            folio.index = plan.index
            if folio.order:
                mem.mthp_nr_anon[folio.order] += 1
        else:
            filemap_add_folio(mem, plan.mapping, pfn, plan.index)
        # 2. its bytes and its mappings
        if plan.nr_mapped < nr_pages or data == 0:
            zero_frames(mem, pfn, nr_pages)
        for r in range(plan.first_run, plan.first_run + plan.nr_runs):
            run = runs[r]
            if data:
                copy_memory(mem, frame_address(mem, pfn) + (run.first_page << PAGE_SHIFT), data + (run.row << PAGE_SHIFT),
                            run.nr_pages << PAGE_SHIFT)
            map_run(mem, run.vma, run.address, pfn, run.first_page, run.nr_pages, run.bits, run.huge)
        # 3. its state
        if plan.dirty:
            folio_mark_dirty(mem, pfn)
        if plan.partially_mapped:
            deferred_split_folio(mem, pfn, True)
        if plan.swap_entry:
            swap_cache_add_folio(mem, pfn, plan.swap_entry)
        folio_add_lru(mem, pfn)
        folio_put_refs(mem, pfn, 1)                 # the allocation's
    return last


@jit_entry
def share_folios(mem_table, pfns, vmas, huge):
    """Map each folio, read-only, into the vma beside it of another process: all of it that fits there and finds none.

    The vma is in the folio's reverse map already. ``huge``: PTE_HUGE to map it by a PMD leaf, else 0.
    """
    mem = unpack(mem_table)
    for i in range(len(pfns)):
        pfn, vma = pfns[i], vmas[i]
        area = mem.vmas[vma]
        address = vma_address(mem, vma, mem.folios[pfn].index)
        nr_pages = np.int64(1) << mem.folios[pfn].order
        first = max(np.int64(0), area.start - address >> PAGE_SHIFT)
        last = min(nr_pages, area.end - address >> PAGE_SHIFT)
        leaf = huge[i] if last - first == PTRS and address & PMD_SIZE - 1 == 0 else np.int64(0)
        map_run(mem, vma, address + (first << PAGE_SHIFT), pfn, first, last - first, np.int64(PTE_PRESENT | PTE_YOUNG),
                leaf)


@jit_entry
def share_hugetlb(mem_table, pfns, vmas):
    """As share_folios(), for hugetlb folios and hugetlb vmas."""
    mem = unpack(mem_table)
    for i in range(len(pfns)):
        mm = mem.vmas[vmas[i]].mm
        entry = walk_alloc_pmd(mem, mm, vma_address(mem, vmas[i], mem.folios[pfns[i]].index))
        mem.folios[pfns[i]].refcount += 1
        set_huge_pte(mem, vmas[i], entry, pfns[i], np.int64(PTE_PRESENT | PTE_YOUNG))
        mem.mms[mm].hugetlb_usage += HPAGE_PMD_NR


@jit_entry
def locate_pages(mem_table, mm, pages, pfns):
    """The frame of each of ``pages`` (PAGE_DTYPE): a pfn, 0 if there is none, -1 for the zero page.

    A page of a file that is not mapped any more is looked up in the page cache.
    """
    mem = unpack(mem_table)
    for i in range(len(pages)):
        page = pages[i]
        entry, value, pfn = lookup_page(mem, mm, page.address)
        if value & PTE_PRESENT and value & PTE_SPECIAL:
            pfn = np.int64(-1)
        elif pfn == NO_PFN and page.mapping:
            head = filemap_get_folio(mem, page.mapping, page.index)
            if head != NO_PFN:
                pfn = head + page.index - mem.folios[head].index
        pfns[i] = pfn


@jit_entry
def compare_pages(frames, pfns, data, rows, same):
    """Whether frame ``pfns[i]`` has the bytes of row ``rows[i]`` of ``data``; a zero page (-1) has zeros, 0 has none.

    ``frames`` and ``data`` are uint64 of shape (pages, 512); frame 0 of ``frames`` is FIRST_PFN.
    """
    for i in range(len(pfns)):
        different = np.uint64(0)
        at, row = pfns[i] - FIRST_PFN, rows[i]
        if pfns[i] < 0:
            for j in range(data.shape[1]):
                different |= data[row, j]
        elif pfns[i] > 0:
            for j in range(data.shape[1]):
                different |= frames[at, j] ^ data[row, j]
        same[i] = pfns[i] != 0 and different == 0
