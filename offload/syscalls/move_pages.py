"""move_pages(2): which folios may move, in which runs, and what is reported for each page.

Stands for kernel_move_pages(), do_pages_move(), add_folio_for_migration(), move_pages_and_store_status() and
do_pages_stat() of mm/migrate.c (v7.3). Leaves out compat system calls and waiting for exec_update_lock.
"""

import dataclasses

import numpy as np

from offload.errors import InvalidInput
from offload.jit import jit, jit_entry
from offload.mm.fault import find_vma, lookup_page
from offload.mm.hugetlb import isolate_folio
from offload.mm.memmap import (
    NO_PFN, PG_hugetlb, PG_zone_device, VM_PFNMAP, folio_test_large, page_folio, unpack,
)
from offload.mm.pagetable import (
    PMD_SIZE, PTE_HUGE, PTE_PRESENT, rmap_first, rmap_next, rmap_vma, vma_maps_folio, walk_pmd,
)
from offload.syscalls.creds import capable, cpuset_mems_allowed, find_task
from offload.syscalls.result import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, UNTAG_MASK, failing_allocs, make_result
from offload.units import (
    EACCES, EBUSY, EFAULT, EINVAL, ENODEV, ENOENT, EPERM, MIGRATE_SYNC, MR_SYSCALL, PAGE_SHIFT, PAGE_SIZE,
)

__all__ = ("sys_move_pages", "MoveResult", "do_pages_move", "do_pages_stat", "collect_folio_addresses",
           "folio_maybe_mapped_shared", "vma_migratable", "NOT_WRITTEN")

PAGES_STAT_CHUNK_NR = 16
"""Pages that a query reads, looks up and reports at a time (DO_PAGES_STAT_CHUNK_NR)."""

NOT_WRITTEN = -(1 << 31)
"""A status that the call has not written; whatever the caller's array held stays."""


@dataclasses.dataclass(frozen=True)
class MoveResult:
    """What do_pages_move() did.

    ``ret`` is its value: 0, the number of folios of the failing run plus entries after it, or -errno.
    ``status`` (int32, one per address) is a node, a -errno, or NOT_WRITTEN; a run in which one folio fails writes none of
    its statuses. ``calls`` are the MigrateResults of its migrate_pages() calls, in order. ``addresses`` as passed in.
    """

    ret: int
    status: np.ndarray
    addresses: np.ndarray
    calls: tuple

    def total(self, name):
        """Sum over the calls of a counter of ``stats``, or of a number such as ``moved_bytes`` or ``wall_ns``."""
        return sum(call.stats[name] if name in call.stats else getattr(call, name) for call in self.calls)

    def phases_ns(self):
        """Sum of the calls' phase times."""
        return {phase: sum(call.phases_ns[phase] for call in self.calls) for phase in ("unmap", "flush", "copy", "move")}


@jit
def add_folio_for_migration(mem, mm, vma, address, nid, move_all):
    """Isolate the folio at ``address`` for a move to ``nid``.

    (1, its head): isolated, to be queued. (0, 0): on ``nid`` already. (-errno, 0): why it stays.
    Kernel: add_folio_for_migration() with __add_folio_for_migration().
    """
    if vma == 0 or not vma_migratable(mem, vma):
        return -EFAULT, np.int64(0)
    entry, value, page = lookup_page(mem, mm, address)
    if value & PTE_PRESENT == 0:
        return -ENOENT, np.int64(0)
    if page == NO_PFN:                              # the zero page
        return -EFAULT, np.int64(0)
    pfn = page_folio(mem, page)
    folio = mem.folios[pfn]
    if folio.page_flags & PG_zone_device:
        return -ENOENT, np.int64(0)
    if folio.nid == nid:
        return 0, np.int64(0)
    if not move_all and folio_maybe_mapped_shared(mem, pfn):
        return -EACCES, np.int64(0)
    if not isolate_folio(mem, pfn):
        return -EBUSY, np.int64(0)
    return 1, pfn


@jit
def vma_migratable(mem, vma):
    """Whether pages of a vma may be moved at all: not those of device memory (VM_PFNMAP)."""
    return mem.vmas[vma].vm_flags & VM_PFNMAP == 0


@jit
def folio_maybe_mapped_shared(mem, pfn):
    """Whether several processes may map the folio (folio_maybe_mapped_shared()).

    Small or hugetlb: mapped more than once, wherever. Large: by two processes, exactly; the kernel, which remembers two of
    them and a bit, may still say so after one of three or more has gone.
    """
    if mem.folios[pfn].mapcount <= 1 or not folio_test_large(mem, pfn) or mem.folios[pfn].page_flags & PG_hugetlb:
        return mem.folios[pfn].mapcount > 1
    mapper = np.int64(0)
    cursor = rmap_first(mem, pfn)
    while cursor:
        vma = rmap_vma(mem, pfn, cursor)
        mm = mem.vmas[vma].mm
        if mm != mapper and vma_maps_folio(mem, vma, pfn):
            if mapper:
                return True
            mapper = mm
        cursor = rmap_next(mem, pfn, cursor)
    return False


@jit
def maps_folio(mem, mm, start, end, pfn):
    """Whether any page of the folio is mapped in [start, end), page aligned."""
    for address in range(start, end, PAGE_SIZE):
        entry, value, page = lookup_page(mem, mm, address)
        if page != NO_PFN and page_folio(mem, page) == pfn:
            return True
    return False


@jit_entry
def queue_run(mem_table, mm, starts, ends, vmas, addresses, nids, i, end, nr_writable, move_all, status, queue):
    """Queue folios from entry ``i`` on, until a run ends. (entries looked at, folios queued, result of the last).

    A run ends at entry ``end`` or one for another node (not looked at), or after one that was not queued; that entry's
    result is last. Entries that are not queued while the queue is empty get their status here, if it is one of the
    ``nr_writable`` that can be written: there is nothing to move yet.
    """
    mem = unpack(mem_table)
    nr = 0
    first = i
    while i < end and nids[i] == nids[first]:
        vma = find_vma(starts, ends, vmas, addresses[i])
        rc, pfn = add_folio_for_migration(mem, mm, vma, addresses[i], nids[i], move_all)
        if rc == 1:
            queue[nr] = pfn
            nr += 1
        elif nr or i >= nr_writable:
            return i + 1, nr, rc
        else:
            status[i] = rc if rc else nids[i]
        i += 1
    return i, nr, 1


def do_pages_move(machine, process, addresses, nids, *, move_all=False, events=(), mems_allowed=None, fault=None):
    """Move the page at each address to the node beside it; a MoveResult.

    ``addresses`` and ``nids``: int64 arrays of one length. Folios go to migrate_pages() in runs of one target node, as
    the kernel cuts them; a run that fails ends the call. LRU batches are drained before and off during the call.
    ``mems_allowed``: the nodes that the process's cpuset allows; None: all. ``fault``: the first entry of each array
    ("pages", "nodes", "status") that cannot be accessed.
    """
    nr = len(addresses)
    fault = fault or {}
    nr_readable = min(nr, fault.get("pages", nr), fault.get("nodes", nr))
    nr_writable = min(nr, fault.get("status", nr))
    status = np.full(nr, NOT_WRITTEN, np.int32)
    queue = np.zeros(nr, np.int64)
    index = process.vma_index()
    nr_pages = machine.mem.nodes.nr_pages.tolist()
    calls = []
    nr_taken = 0                                    # calls that had taken their folios when the queue was begun

    def check(i):
        """What is wrong with entry ``i``: -EFAULT (unreadable), -ENODEV, -EACCES, or 0."""
        if i >= nr_readable:
            return -EFAULT
        nid = nids[i]
        if not 0 <= nid < len(nr_pages) or nr_pages[nid] == 0:
            return -ENODEV
        return 0 if mems_allowed is None or nid in mems_allowed else -EACCES

    def store_status(start, end, value):
        status[start:min(end, nr_writable)] = value
        return 0 if end <= nr_writable else -EFAULT

    def move_and_store(nid, end, queued):
        if not queued:
            return 0
        result = machine.migrate_isolated(queue[:queued].copy(), nid, mode=MIGRATE_SYNC, reason=MR_SYSCALL, events=events,
                                          into=calls)
        if result.rc > 0:
            return result.rc + nr - end
        return result.rc or store_status(end - queued, end, nid)

    def run():
        nonlocal nr_taken
        i = queued = 0
        while i < nr:
            err = check(i)
            if err:
                return err
            nid = int(nids[i])
            queue[:queued] = 0
            nr_taken = len(calls)
            i, queued, rc = queue_run(machine.table, process.mm, *index, addresses, nids, i, nr_readable, nr_writable,
                                      move_all, status, queue)
            if rc == 1:
                early = check(i) if i < nr else 0   # found before the queue is moved, and wins
                err = move_and_store(nid, i, queued)
                err = early or err
            else:
                early = store_status(i - 1, i, rc if rc else nid)
                err = move_and_store(nid, i - 1, queued)
                err = early or err - (err > 0)      # that entry has been dealt with
            if err:
                return err
        return 0

    machine.lru_cache_disable()
    try:
        ret = run()
    finally:
        if len(calls) == nr_taken:                  # interrupted between isolating and moving
            machine.putback(queue[queue != 0])
        machine.lru_cache_enable()
    return MoveResult(ret, status, addresses, tuple(calls))


@jit_entry
def do_pages_stat_array(mem_table, mm, starts, ends, vmas, addresses, first, end, status):
    """The node of each page of a chunk, or -EFAULT (no vma, the zero page), -ENOENT (nothing there)."""
    mem = unpack(mem_table)
    for i in range(first, end):
        vma = find_vma(starts, ends, vmas, addresses[i])
        value = page = np.int64(0)
        if vma:
            entry, value, page = lookup_page(mem, mm, addresses[i])
        if vma == 0:
            status[i] = -EFAULT
        elif page != NO_PFN and mem.folios[page_folio(mem, page)].page_flags & PG_zone_device == 0:
            status[i] = mem.folios[page_folio(mem, page)].nid
        elif page == NO_PFN and value & PTE_PRESENT and vma_migratable(mem, vma):       # the zero page
            status[i] = -EFAULT
        else:
            status[i] = -ENOENT


def do_pages_stat(machine, process, addresses, *, fault=None):
    """Where the page at each address is: (0 or -EFAULT, status). Nothing moves.

    Chunk by chunk: one whose addresses cannot all be read, or whose status cannot all be written, ends it.
    """
    nr = len(addresses)
    fault = fault or {}
    status = np.full(nr, NOT_WRITTEN, np.int32)
    index = process.vma_index()
    for first in range(0, nr, PAGES_STAT_CHUNK_NR):
        end = min(first + PAGES_STAT_CHUNK_NR, nr)
        if fault.get("pages", nr) < end:
            return -EFAULT, status
        nr_writable = fault.get("status", nr)
        do_pages_stat_array(machine.table, process.mm, *index, addresses, first, min(end, max(nr_writable, first)), status)
        if nr_writable < end:
            return -EFAULT, status
    return 0, status


def sys_move_pages(machine, caller, target, pages, nodes, flags, *, fault=None, alloc_fail=None, events=()):
    """move_pages(2): the SyscallResult.

    ``caller`` and ``target`` are processes; target None is pid 0, the caller. ``pages``: int64 addresses, tags allowed.
    ``nodes``: a node for each, or None to ask where they are. ``flags``: bits MPOL_MF_*. ``fault``: see do_pages_move();
    ``alloc_fail``: see failing_allocs(). InvalidInput if there are not as many nodes as pages.
    """
    machine.check_idle()
    pages = np.ascontiguousarray(pages, np.int64)
    status = np.full(len(pages), NOT_WRITTEN, np.int32)
    if flags & ~(MPOL_MF_MOVE | MPOL_MF_MOVE_ALL):
        return make_result(-EINVAL, status=status)
    if flags & MPOL_MF_MOVE_ALL and not capable(caller, "CAP_SYS_NICE"):
        return make_result(-EPERM, status=status)
    if target is None:
        target = caller
    err = find_task(caller, target)
    if err == 0 and target.mm == 0:
        err = -EINVAL
    if err:
        return make_result(err, status=status)
    if nodes is None:
        err, status = do_pages_stat(machine, target, pages, fault=fault)
        return make_result(err, status=status)
    nodes = np.ascontiguousarray(nodes, np.int64)
    if nodes.shape != pages.shape:
        raise InvalidInput(f"{len(nodes)} nodes for {len(pages)} pages; pass one for each")
    with failing_allocs(machine, alloc_fail):
        result = do_pages_move(machine, target, pages & UNTAG_MASK, nodes, move_all=flags & MPOL_MF_MOVE_ALL != 0,
                               events=events, mems_allowed=cpuset_mems_allowed(target), fault=fault)
    return make_result(result.ret, result.calls, result.status)


@jit_entry
def collect_folio_addresses(mem_table, mm, start, address, end, out):
    """Addresses in [address, end) at which a folio's first mapped page of those from ``start`` on stands.

    Stops when ``out`` is full, with the address to go on from: (how many it got, address). The range is of one vma.
    """
    mem = unpack(mem_table)
    nr = 0
    last = np.int64(NO_PFN)
    while address < end and nr < len(out):
        pmd = walk_pmd(mem, mm, address)
        if pmd == 0 or mem.tables[pmd] == 0:
            address = (address | PMD_SIZE - 1) + 1
            continue
        entry, value, page = lookup_page(mem, mm, address)
        if page != NO_PFN and page_folio(mem, page) != last:
            last = page_folio(mem, page)
            # Copy on write can have put a page of another folio between two pages of this one.
            if not maps_folio(mem, mm, max(start, address - (page - last << PAGE_SHIFT)), address, last):
                out[nr] = address
                nr += 1
        address = (address | PMD_SIZE - 1) + 1 if value & PTE_HUGE else address + PAGE_SIZE
    return nr, address
