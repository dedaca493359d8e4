"""Processes: their address space, fork, and reading and writing their memory through the page table.

Stands for struct mm_struct, mm/mmap.c, mm/mprotect.c, mm/mremap.c, mm/madvise.c and mm/msync.c (v7.3) as far as tests and
tools need them. Leaves out vma merging, growing stacks and limits. A process is used from Python between migrations; during
one, by an event placed between two steps (migrate/pages.py), inside ``machine.other_task()``.
"""

import bisect

import numpy as np

from offload.errors import BadAddress, Busy, InvalidInput, OutOfMemory, WouldHang
from offload.mm.fault import (
    access, change_protection, copy_page_range, fill_page_cache, map_pfn_range, move_page_tables, populate, populate_anonymous,
    split_pmds, zap_range,
)
from offload.mm.gup import get_user_page, put_user_page
from offload.mm.madvise import madvise_cold, madvise_free, writeback_range
from offload.mm.memmap import (
    FRAMES_FAR, NO_PFN, VM_DONTCOPY, VM_EXEC, VM_HUGETLB, VM_LOCKED, VM_PFNMAP, VM_READ, VM_SHARED, VM_WRITE,
)
from offload.mm.swap import swap_candidate, swap_out_folio
from offload.mm.pagetable import PMD_SIZE, PTE_UFFD_WP, PTE_WRITE, TASK_SIZE
from offload.units import EAGAIN, EFAULT, ENOMEM, HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE, format_size, parse_size

__all__ = ("Process", "File")

PROT_BITS = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}
MMAP_BASE = 0x10_0000_0000
"""Where mmap() without an address begins to look."""


class File:
    """A file's page cache: made by ``Machine.file()``, mapped by ``Process.mmap(file=...)``. Holes read as zeros."""

    def __init__(self, machine, mapping, kind, nr_pages):
        self.machine, self.mapping, self.kind, self.nr_pages = machine, mapping, kind, nr_pages

    def __repr__(self):
        return f"<{self.kind} file of {self.nr_pages} pages>"

    def read_ahead(self, vma, dirty=False):
        """Fill its page cache, ``dirty`` or clean, with folios such as faults of the vma would bring. OutOfMemory."""
        self.machine.reserve_frame_ops(2 * self.nr_pages)
        if fill_page_cache(self.machine.table, vma, dirty):
            raise OutOfMemory(f"no node has room for {self!r}; make the machine's nodes larger")


class Process:
    """A process of a Machine; made by ``Machine.process()`` or ``fork()``."""

    def __init__(self, machine, mm, name, uid=0, caps=None, mems_allowed=None):
        self.machine, self.mm, self.name = machine, mm, name
        self.uid, self.caps, self.mems_allowed = uid, caps, mems_allowed
        self.state = "alive"
        self.pins, self.gets = {}, {}                         # address of a page -> pages that somebody has taken there
        self._starts, self._ends, self._vmas = [], [], []     # sorted by address

    def __repr__(self):
        return f"<process {self.name!r}: {len(self._vmas)} vmas, {self.rss_pages} pages resident>"

    @property
    def rss_pages(self):
        """Base pages resident: anonymous, file and shmem."""
        row = self.machine.mem.mms[self.mm]
        return int(row.rss_anon + row.rss_file + row.rss_shmem)

    def vma_index(self):
        """(starts, ends, rows of Memory.vmas) of its vmas as int64 arrays, sorted by address, for find_vma()."""
        return tuple(np.array(one, np.int64) for one in (self._starts, self._ends, self._vmas))

    # --- mapping (mm/mmap.c) ----------------------------------------------------------------------------------

    def mmap(self, length, *, order=0, nid=0, prot="rw", file=None, offset=0, shared=False, mlock=False, populate=True,
             address=None, hugetlb=False, pfnmap=False):
        """Map ``length`` bytes (a number, or "64M") and return their address, aligned to the folio order.

        ``order``: folio order to fault in where it fits, 0 to 9. ``nid``: node its folios come from. ``file``: a
        File, mapped from byte ``offset`` on, ``shared`` or private; without one the memory is anonymous.
        ``hugetlb``: MAP_HUGETLB, memory of 2 MiB pages from the pools; the length is rounded up to them.
        ``pfnmap``: device memory, which has no folios and no bytes here.
        ``populate``: fault everything in now, for writing if ``prot`` has "w". InvalidInput for values that cannot
        be; OutOfMemory if the nodes have no room (the mapping stays, populated in part).
        """
        machine = self.machine
        machine.check_idle()
        length = parse_size(length, what="length")
        if hugetlb:
            order, length = HPAGE_PMD_ORDER, -(-length // PMD_SIZE) * PMD_SIZE
            if file is None and shared:
                file = machine.hugetlb_file(length)
            self._check_hugetlb(file, offset, shared, mlock, address)
        if not 0 <= order <= HPAGE_PMD_ORDER:
            raise InvalidInput(f"order {order!r} is not one that page tables can map here; use 0 to {HPAGE_PMD_ORDER}")
        machine.check_nid(nid)
        if set(prot) - set("rwx"):
            raise InvalidInput(f"prot {prot!r} is not a protection; use letters of 'rwx'")
        if offset % PAGE_SIZE or (offset and file is None):
            raise InvalidInput(f"offset {offset!r} needs a file and a multiple of {PAGE_SIZE}")
        if file is not None and file.kind == "hugetlb" and not hugetlb:
            raise InvalidInput(f"{file!r} is mapped by huge pages only; pass hugetlb=True")
        if pfnmap and (file is not None or mlock or hugetlb):
            raise InvalidInput("device memory is no file, no huge page and never mlocked; leave those out with pfnmap")
        if shared and file is None and not pfnmap:
            raise InvalidInput("shared anonymous memory is shmem; map machine.file(..., kind='shmem') shared")
        align = PAGE_SIZE << order
        if address is None:
            address = self._free_range(length, align)
        elif address % PAGE_SIZE or not 0 < address <= TASK_SIZE - length:
            raise InvalidInput(f"address {address!r:} is not a page of user space; pass a multiple of {PAGE_SIZE}")
        if self._overlaps(address, address + length):
            raise InvalidInput(f"address {address:#x} is mapped already in this process; choose another or None")

        vm_flags = sum(PROT_BITS[letter] for letter in prot) | (VM_SHARED if shared else 0) | (VM_LOCKED if mlock else 0)
        vm_flags |= (VM_HUGETLB if hugetlb else 0) | (VM_PFNMAP if pfnmap else 0)
        vma = machine.new_row("vmas")
        row = machine.mem.vmas[vma]
        row.mm, row.start, row.end, row.vm_flags, row.order, row.nid = self.mm, address, address + length, vm_flags, order, nid
        row.pgoff = row.pol_ilx = offset >> PAGE_SHIFT if file else address >> PAGE_SHIFT
        if file:
            row.mapping = file.mapping
            mapping = machine.mem.mappings[file.mapping]
            row.next_in_mapping, mapping.first_vma = mapping.first_vma, vma
        if not shared:
            machine.link_anon_vma(vma, machine.new_anon_vma())
        self._insert(vma, address, address + length)
        if pfnmap:
            machine.reserve_tables(length)
            map_pfn_range(machine.table, vma, PTE_WRITE if "w" in prot and shared else 0)
        elif populate and prot:
            self.populate(address, length)
        return address

    @staticmethod
    def _check_hugetlb(file, offset, shared, mlock, address):
        """InvalidInput for what a hugetlb mapping cannot be."""
        if file is not None and (file.kind != "hugetlb" or not shared):
            raise InvalidInput(f"{file!r} cannot be mapped so with hugetlb; map machine.hugetlb_file(...) shared, or no file")
        if offset % PMD_SIZE or address is not None and address % PMD_SIZE:
            raise InvalidInput(f"offset {offset!r} and address {address!r} of a hugetlb mapping are multiples of {PMD_SIZE}")
        if mlock:
            raise InvalidInput("hugetlb memory is never mlocked; leave mlock out")

    def populate(self, address, length):
        """Fault in [address, address + length), for writing where the vma allows it. OutOfMemory if a node is full."""
        self.machine.check_idle()                   # it may replace the page tables
        for vma, start, end in self._vmas_in(address, length):
            self._populate(vma, start, end, self.machine.mem.vmas[vma].vm_flags & VM_WRITE != 0)

    def split_vma(self, address):
        """Make a vma begin at ``address`` (a page inside one, or the beginning of one). A PMD leaf across it is split."""
        machine = self.machine
        vma = self._vma_at(address)
        if self._starts[self._vmas.index(vma)] == address:
            return
        if address % PMD_SIZE:
            split_pmds(machine.table, self.mm, address, address + 1)
        new = self._dup_vma(vma, machine.new_row("vmas"))
        row, old = machine.mem.vmas[new], machine.mem.vmas[vma]
        row.start = old.end = address
        row.pgoff = old.pgoff + (address - old.start >> PAGE_SHIFT)
        at = self._vmas.index(vma)
        end, self._ends[at] = self._ends[at], address
        self._insert(new, address, end)

    def _dup_vma(self, vma, new):
        """Make row ``new`` a copy of the vma, found by the same reverse maps (vm_area_dup(), anon_vma_clone())."""
        machine = self.machine
        row, old = machine.mem.vmas[new], machine.mem.vmas[vma]
        for field in old.dtype.names:
            row[field] = old[field]
        row.first_avc = row.next_in_mapping = 0
        if row.mapping:
            mapping = machine.mem.mappings[row.mapping]
            row.next_in_mapping, mapping.first_vma = mapping.first_vma, new
        for anon_vma in machine.anon_vmas_of(vma):
            machine.link_anon_vma(new, anon_vma, owner=False)
        return new

    def _remove(self, vma):
        """Take a vma whose pages are gone out of the process and the reverse maps."""
        self.machine.unlink_vma(vma)
        at = self._vmas.index(vma)
        del self._starts[at], self._ends[at], self._vmas[at]

    def _split_at_edges(self, address, length):
        """Let vmas begin and end at the edges of the range; (row, start, end) of those inside."""
        self._check_range(address, length)
        for edge in (address, address + length):
            if any(start < edge < end for start, end in zip(self._starts, self._ends)):
                self.split_vma(edge)
        return list(self._vmas_in(address, length))

    def _check_range(self, address, length):
        """InvalidInput for a range that is not made of pages, huge ones where it begins or ends in hugetlb memory."""
        self._check_pages(address, length)
        for edge in (address, address + length):
            if edge % PMD_SIZE and any(start < edge < end and self._is_hugetlb(vma)
                                       for start, end, vma in zip(self._starts, self._ends, self._vmas)):
                raise InvalidInput(f"range {address:#x}, {length} bytes ends inside a hugetlb page; pass multiples of {PMD_SIZE}")

    @staticmethod
    def _check_pages(address, length):
        if address % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
            raise InvalidInput(f"range {address:#x}, {length} bytes is not made of pages; pass multiples of {PAGE_SIZE}")

    def _is_hugetlb(self, vma):
        return self.machine.mem.vmas[vma].vm_flags & VM_HUGETLB != 0

    def _refuse_hugetlb(self, address, length, what):
        for vma, start, _ in self._vmas_in(address, length):
            if self._is_hugetlb(vma):
                raise InvalidInput(f"the vma at {start:#x} is hugetlb memory; {what} is not for it")

    def munmap(self, address, length):
        """Unmap [address, address + length); vmas that reach beyond it are split. BadAddress if none begins in it."""
        self.machine.check_idle()
        for vma, start, end in self._split_at_edges(address, length):
            zap_range(self.machine.table, vma, start, end)
            self._remove(vma)

    def mprotect(self, address, length, prot):
        """Give the range the protection ``prot`` (letters of "rwx"): entries lose write access with the vma."""
        self.machine.check_idle()
        if set(prot) - set("rwx"):
            raise InvalidInput(f"prot {prot!r} is not a protection; use letters of 'rwx'")
        for vma, start, end in self._split_at_edges(address, length):
            row = self.machine.mem.vmas[vma]
            row.vm_flags = row.vm_flags & ~(VM_READ | VM_WRITE | VM_EXEC) | sum(PROT_BITS[letter] for letter in prot)
            if "w" not in prot:
                change_protection(self.machine.table, self.mm, start, end, PTE_WRITE, 0)

    def dontneed(self, address, length):
        """madvise(MADV_DONTNEED): unmap the pages; anonymous ones read as zeros afterwards."""
        self.machine.check_idle()
        for vma, start, end in self._advised(address, length, hugetlb=True):
            zap_range(self.machine.table, vma, start, end)

    def cold(self, address, length):
        """madvise(MADV_COLD): the pages become old and inactive."""
        self.machine.check_idle()
        for vma, start, end in self._advised(address, length):
            madvise_cold(self.machine.table, self.mm, start, end)

    def free(self, address, length):
        """madvise(MADV_FREE): anonymous pages become clean and may be dropped; until then they keep their contents."""
        self.machine.check_idle()
        for vma, start, end in self._advised(address, length):
            if self.machine.mem.vmas[vma].mapping:
                raise InvalidInput(f"the vma at {start:#x} is a file's; MADV_FREE is for anonymous memory")
            madvise_free(self.machine.table, self.mm, start, end)

    def swapout(self, address, length):
        """madvise(MADV_PAGEOUT) of anonymous memory: swap out the folios that lie in the range and are the process's alone.

        OutOfMemory when the swap space is full (folios before are out); InvalidInput without one.
        """
        machine = self.machine
        machine.check_idle()
        for vma, start, end in self._advised(address, length):
            at = start
            while at < end:
                pfn, order = (int(one) for one in swap_candidate(machine.table, self.mm, at, end))
                if pfn != NO_PFN:
                    swap_out_folio(machine.table, pfn, machine.alloc_swap_entries(1 << order))
                at += PAGE_SIZE << order

    def _advised(self, address, length, hugetlb=False):
        """The parts of vmas that an madvise() call is about; InvalidInput for those it cannot be (EINVAL)."""
        self._check_range(address, length)
        areas = list(self._vmas_in(address, length))
        for vma, start, _ in areas:
            if self.machine.mem.vmas[vma].vm_flags & (VM_LOCKED | VM_PFNMAP | (0 if hugetlb else VM_HUGETLB)):
                raise InvalidInput(f"the vma at {start:#x} is mlocked, hugetlb or device memory; madvise() refuses (EINVAL)")
        return areas

    def msync(self, address, length):
        """msync(MS_SYNC): write dirty pages of shared file mappings back; those of files without a store stay dirty."""
        self.machine.check_idle()
        self._check_range(address, length)
        for vma, start, end in self._vmas_in(address, length):
            row = self.machine.mem.vmas[vma]
            if row.mapping and row.vm_flags & VM_SHARED:
                first = int(row.pgoff) + (start - int(row.start) >> PAGE_SHIFT)
                writeback_range(self.machine.table, int(row.mapping), first, first + (end - start >> PAGE_SHIFT))

    def uffd_wp(self, address, length):
        """Write-protect the mapped pages of the range through userfaultfd: a write to one waits for its handler (WouldHang)."""
        self.machine.check_idle()
        self._check_range(address, length)
        self._refuse_hugetlb(address, length, "write protection through userfaultfd")
        for _, start, end in self._vmas_in(address, length):
            for edge in (start, end):
                if edge % PMD_SIZE:
                    split_pmds(self.machine.table, self.mm, edge, edge + 1)
            change_protection(self.machine.table, self.mm, start, end, PTE_WRITE, PTE_UFFD_WP)

    def mremap(self, address, length, new_address):
        """Move the mapping of a range of one vma to ``new_address``, where nothing is mapped; pages stay as they are."""
        machine = self.machine
        machine.check_idle()
        self._check_range(address, length)
        self._refuse_hugetlb(address, length, "mremap()")
        if new_address % PAGE_SIZE or not 0 < new_address <= TASK_SIZE - length or self._overlaps(new_address, new_address + length):
            raise InvalidInput(f"address {new_address:#x} cannot be moved to; choose a multiple of {PAGE_SIZE} where nothing is mapped")
        if self._ends[self._vmas.index(self._vma_at(address))] < address + length:
            raise BadAddress(f"range {address:#x}, {length} bytes reaches beyond its vma; move vmas one by one")
        (vma, start, end), = self._split_at_edges(address, length)
        machine.reserve_tables(length)
        new = self._dup_vma(vma, machine.new_row("vmas"))
        row = machine.mem.vmas[new]
        row.start, row.end = new_address, new_address + length
        move_page_tables(machine.table, self.mm, start, new_address, length)
        self._remove(vma)
        self._insert(new, new_address, new_address + length)
        return new_address

    def dontfork(self, address, length):
        """madvise(MADV_DONTFORK): leave the range out of later forks."""
        self.machine.check_idle()
        for vma, start, end in self._split_at_edges(address, length):
            self.machine.mem.vmas.vm_flags[vma] |= VM_DONTCOPY

    def split_pmd(self, address, length):
        """Have every page of the range mapped by a PTE of its own."""
        self.machine.check_idle()
        self._refuse_hugetlb(address, length, "splitting")
        split_pmds(self.machine.table, self.mm, address, address + length)

    def exit(self, reaped=True):
        """Unmap everything and give back what it has pinned. Not reaped by its parent it is a zombie: there, without memory."""
        self.machine.check_idle()
        for taken, pin in ((self.pins, True), (self.gets, False)):      # with the files that held them
            for pages in taken.values():
                for page in pages:
                    put_user_page(self.machine.table, page, pin)
            taken.clear()
        for start, end in list(zip(self._starts, self._ends)):
            self.munmap(start, end - start)
        self.machine.free_mm(self.mm)
        self.machine.processes.remove(self)
        self.mm = 0
        self.state = "dead" if reaped else "zombie"

    # --- pages that others hold (mm/gup.c) --------------------------------------------------------------------

    def pin(self, address, length=PAGE_SIZE):
        """Pin the pages of the range (FOLL_PIN | FOLL_LONGTERM), faulted in for writing where the vma allows it."""
        self._take(address, length, self.pins, True)

    def unpin(self, address, length=PAGE_SIZE):
        """Give one pin back of each page that was pinned at these addresses, wherever it is now."""
        self._give(address, length, self.pins, True)

    def get(self, address, length=PAGE_SIZE):
        """Take a plain reference on each page of the range (FOLL_GET)."""
        self._take(address, length, self.gets, False)

    def put(self, address, length=PAGE_SIZE):
        """Give one such reference back."""
        self._give(address, length, self.gets, False)

    def _take(self, address, length, taken, pin):
        machine = self.machine
        machine.check_idle()
        self._check_pages(address, length)          # also base pages of a huge one
        for at in range(address, address + length, PAGE_SIZE):
            vma = self._vma_at(at)
            machine.reserve_tables(PAGE_SIZE)
            rc, page = get_user_page(machine.table, vma, at, pin)
            if rc:
                self._complain(vma, at, rc, pin)
            taken.setdefault(at, []).append(page)

    def _give(self, address, length, taken, pin):
        self.machine.check_idle()
        for at in range(address, address + length, PAGE_SIZE):
            if not taken.get(at):
                raise InvalidInput(f"page {at:#x} of process {self.name!r} is not {'pinned' if pin else 'held'}; "
                                   f"{'pin()' if pin else 'get()'} it first")
            put_user_page(self.machine.table, taken[at].pop(), pin)

    def fork(self, name=None):
        """A child with the same memory: anonymous pages shared until one writes, files mapped alike.

        A page that may be pinned is copied at once. OutOfMemory, and no child, if there is no room for that.
        """
        machine = self.machine
        machine.check_idle()
        child = machine.process(name, uid=self.uid, caps=self.caps, mems_allowed=self.mems_allowed)
        for start, end, vma in zip(self._starts, self._ends, self._vmas):
            if machine.mem.vmas[vma].vm_flags & VM_DONTCOPY:
                continue
            new = machine.new_row("vmas")
            row, old = machine.mem.vmas[new], machine.mem.vmas[vma]
            for field in ("start", "end", "pgoff", "vm_flags", "mapping", "order", "nid", "pol_mode", "pol_nodes", "pol_ilx",
                          "has_anon"):
                row[field] = old[field]
            row.vm_flags &= ~VM_LOCKED              # mlock is not inherited
            row.mm = child.mm
            if row.mapping:
                mapping = machine.mem.mappings[row.mapping]
                row.next_in_mapping, mapping.first_vma = mapping.first_vma, new
            if old.anon_vma:
                # The child's own anon_vma for its new pages; the parent's, since its pages may be mapped here.
                machine.link_anon_vma(new, machine.new_anon_vma())
                for anon_vma in machine.anon_vmas_of(vma):
                    machine.link_anon_vma(new, anon_vma, owner=False)
            child._insert(new, start, end)
            copied = row.has_anon or row.vm_flags & VM_PFNMAP or row.vm_flags & (VM_HUGETLB | VM_SHARED) == VM_HUGETLB
            if not copied:                          # vma_needs_copy(): the child faults in what it touches
                continue
            machine.reserve_tables(end - start)
            machine.reserve_frame_ops(2 * (end - start) // PAGE_SIZE)
            rc = copy_page_range(machine.table, vma, new)
            if rc:
                child.exit()
                raise OutOfMemory(f"fork of {self.name!r}: no room to copy pinned pages")
        return child

    # --- access -----------------------------------------------------------------------------------------------

    def read(self, address, nbytes):
        """The ``nbytes`` bytes at ``address``, faulted in as needed. BadAddress outside every vma or not readable."""
        buffer = bytearray(nbytes)
        self._access(address, np.frombuffer(buffer, np.uint8), False)
        return bytes(buffer)

    def write(self, address, data):
        """Write ``data`` (bytes, or anything with a buffer) at ``address``, faulting and copying on write as needed.

        BadAddress outside every vma or not writable (what lies before is written); OutOfMemory likewise.
        """
        self._access(address, np.frombuffer(data, np.uint8).reshape(-1), True)

    def _access(self, address, buffer, write):
        machine = self.machine
        machine.check_idle()
        machine.check_frames("read or write memory")
        refused = next(((vma, start) for vma, start, _ in self._vmas_in(address, len(buffer)) if self._refuses(vma, write)), None)
        if refused:                                 # what lies before is accessed all the same
            before = buffer[:refused[1] - address]
            if len(before):
                self._access(address, before, write)
            self._complain(*refused, -EFAULT, write)
        where = buffer.ctypes.data
        if machine.frames.kind == FRAMES_FAR:
            machine.frames.keep(buffer)
        done = 0
        while done < len(buffer):
            at = address + done
            done += access(machine.table, self.mm, at, where + done, len(buffer) - done, write)
            machine.frames.drain()
            at = address + done
            if done < len(buffer):
                vma = self._vma_at(at)
                self._populate(vma, at & -PAGE_SIZE, (at & -PAGE_SIZE) + PAGE_SIZE, write)

    # --- moving -----------------------------------------------------------------------------------------------

    def move(self, address, length, nid, *, move_all=False, events=()):
        """Move the folios in [address, address + length) to node ``nid``, as move_pages(2) does.

        MIGRATE_SYNC, reason syscall_or_cpuset. Returns a :class:`offload.syscalls.MoveResult`. ``length``: bytes, or
        "64M". ``move_all`` (MPOL_MF_MOVE_ALL) also moves folios that other processes map.
        """
        addresses = self.folio_addresses(address, parse_size(length, what="length"))
        return self.machine.move_pages(self, addresses, nid, move_all=move_all, events=events)

    def folio_addresses(self, address, length):
        """Address of the first mapped page of each folio in the range, int64, ascending: one address a folio."""
        return self.machine.folio_addresses(self, [(start, end) for _, start, end in self._vmas_in(address, length)])

    # --- vmas -------------------------------------------------------------------------------------------------

    def _insert(self, vma, start, end):
        at = bisect.bisect(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._vmas.insert(at, vma)

    def _overlaps(self, start, end):
        at = bisect.bisect_left(self._ends, start + 1)
        return at < len(self._starts) and self._starts[at] < end

    def _free_range(self, length, align):
        """The lowest gap above MMAP_BASE that fits, with an unmapped page table between neighbours."""
        start = MMAP_BASE
        for low, high in zip(self._starts, self._ends):
            if start + length <= low:
                break
            start = max(start, -(-(high + 1) // PMD_SIZE) * PMD_SIZE)
        start = -(-start // align) * align
        if start + length > TASK_SIZE:
            raise OutOfMemory(f"no gap of {format_size(length)} in the address space of {self.name!r}; unmap something")
        return start

    def _vma_at(self, address):
        at = bisect.bisect(self._starts, address) - 1
        if at < 0 or address >= self._ends[at]:
            raise BadAddress(f"address {address:#x} is in no vma of process {self.name!r}; mmap() returns valid ones")
        return self._vmas[at]

    def _vmas_in(self, address, length):
        """(row, start, end) of the parts of vmas in the range; BadAddress if there is none at its start."""
        self._vma_at(address)
        at = bisect.bisect(self._starts, address) - 1
        while at < len(self._starts) and self._starts[at] < address + length:
            yield self._vmas[at], max(self._starts[at], address), min(self._ends[at], address + length)
            at += 1

    def _populate(self, vma, start, end, write):
        machine = self.machine
        machine.reserve_tables(end - start)
        row = machine.mem.vmas[vma]
        anonymous = row.mapping == 0 and row.vm_flags & VM_HUGETLB == 0 and not self._refuses(vma, write)
        while start < end:
            rc = 0
            if anonymous:
                start, rc = populate_anonymous(machine.table, vma, start, end, write)
            if rc == 0 and start < end:
                start, rc = populate(machine.table, vma, start, end, write)
            if rc:
                self._complain(vma, int(start), rc, write)

    def _refuses(self, vma, write):
        """Whether the vma's protection forbids the access to all of its pages, mapped or not, or they have no bytes."""
        return self.machine.mem.vmas[vma].vm_flags & ((VM_WRITE if write else VM_READ) | VM_PFNMAP) != (VM_WRITE if write else VM_READ)

    def _complain(self, vma, address, rc, write):
        """Raise what a fault that ended with ``rc`` means to the process."""
        machine = self.machine
        if rc == -ENOMEM:
            raise OutOfMemory(f"no node has room for page {address:#x} of process {self.name!r}; make the machine's nodes "
                              f"larger or map less")
        if rc == -EAGAIN and machine.batch_mode is not None:
            raise Busy(f"page {address:#x} of process {self.name!r} is being migrated: the task would wait for that to end")
        if rc == -EAGAIN:
            raise WouldHang(f"page {address:#x} of process {self.name!r} is write-protected by userfaultfd, and nobody lifts that: "
                            f"the writer would sleep for ever")
        row = machine.mem.vmas[vma]
        if row.vm_flags & VM_PFNMAP:
            raise BadAddress(f"address {address:#x} of process {self.name!r} is device memory, which has no bytes here")
        what = "beyond the end of its file" if row.mapping and row.pgoff + (address - row.start >> PAGE_SHIFT) >= \
            machine.mem.mappings[row.mapping].nr_slots else f"not {'writ' if write else 'read'}able"
        raise BadAddress(f"address {address:#x} of process {self.name!r} is {what}")
