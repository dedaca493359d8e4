"""Processes: their address space, fork, and reading and writing their memory through the page table.

Stands for struct mm_struct and mm/mmap.c (v7.3) as far as tests and tools need them: mmap, munmap, fork, exit. Leaves
out vma merging, growing stacks, mremap, mprotect and limits. A process is used from Python between migrations only;
what it does during one is an event placed between two steps (migrate/pages.py).
"""

import bisect

import numpy as np

from offload.errors import BadAddress, InvalidInput, NotSupported, OutOfMemory
from offload.mm.fault import access, copy_page_range, populate, zap_range
from offload.mm.memmap import VM_EXEC, VM_HUGETLB, VM_LOCKED, VM_READ, VM_SHARED, VM_WRITE
from offload.mm.pagetable import PMD_SIZE, TASK_SIZE
from offload.units import EFAULT, ENOMEM, HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE, format_size, parse_size

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


class Process:
    """A process of a Machine; made by ``Machine.process()`` or ``fork()``."""

    def __init__(self, machine, mm, name):
        self.machine, self.mm, self.name = machine, mm, name
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
             address=None, hugetlb=False):
        """Map ``length`` bytes (a number, or "64M") and return their address, aligned to the folio order.

        ``order``: folio order to fault in where it fits, 0 to 9. ``nid``: node its folios come from. ``file``: a
        File, mapped from byte ``offset`` on, ``shared`` or private; without one the memory is anonymous.
        ``hugetlb``: MAP_HUGETLB, memory of 2 MiB pages from the pools; the length is rounded up to them.
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
        if shared and file is None:
            raise InvalidInput("shared anonymous memory is shmem; map machine.file(..., kind='shmem') shared")
        align = PAGE_SIZE << order
        if address is None:
            address = self._free_range(length, align)
        elif address % PAGE_SIZE or not 0 < address <= TASK_SIZE - length:
            raise InvalidInput(f"address {address!r:} is not a page of user space; pass a multiple of {PAGE_SIZE}")
        if self._overlaps(address, address + length):
            raise InvalidInput(f"address {address:#x} is mapped already in this process; choose another or None")

        vm_flags = sum(PROT_BITS[letter] for letter in prot) | (VM_SHARED if shared else 0) | (VM_LOCKED if mlock else 0)
        vm_flags |= VM_HUGETLB if hugetlb else 0
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
        if populate and prot:
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

    def munmap(self, address, length):
        """Unmap whole vmas in [address, address + length); NotSupported, and nothing unmapped, if one is only partly inside."""
        self.machine.check_idle()
        areas = list(self._vmas_in(address, length))
        for vma, start, end in areas:
            row = self.machine.mem.vmas[vma]
            if (start, end) != (row.start, row.end):
                raise NotSupported(f"munmap of a part of the vma at {int(row.start):#x}; unmap all of it")
        for vma, start, end in areas:
            zap_range(self.machine.table, vma, start, end)
            self.machine.unlink_vma(vma)
            at = self._vmas.index(vma)
            del self._starts[at], self._ends[at], self._vmas[at]

    def exit(self):
        """Unmap everything; the process cannot be used afterwards."""
        self.machine.check_idle()
        for start, end in list(zip(self._starts, self._ends)):
            self.munmap(start, end - start)
        self.machine.free_mm(self.mm)
        self.machine.processes.remove(self)
        self.mm = 0

    def fork(self, name=None):
        """A child with the same memory: anonymous pages shared until one writes, files mapped alike.

        A page that may be pinned is copied at once. OutOfMemory, and no child, if there is no room for that.
        """
        machine = self.machine
        machine.check_idle()
        child = machine.process(name)
        for start, end, vma in zip(self._starts, self._ends, self._vmas):
            new = machine.new_row("vmas")
            row, old = machine.mem.vmas[new], machine.mem.vmas[vma]
            for field in ("start", "end", "pgoff", "vm_flags", "mapping", "order", "nid", "pol_mode", "pol_nodes", "pol_ilx"):
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
            machine.reserve_tables(end - start)
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
        where = buffer.ctypes.data
        done = 0
        while done < len(buffer):
            at = address + done
            done += access(machine.table, self.mm, at, where + done, len(buffer) - done, write)
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
        reached, rc = populate(machine.table, vma, start, end, write)
        if rc == -ENOMEM:
            raise OutOfMemory(f"no node has room for page {reached:#x} of process {self.name!r}; make the machine's nodes "
                              f"larger or map less")
        if rc == -EFAULT:
            row = machine.mem.vmas[vma]
            what = "beyond the end of its file" if row.mapping and row.pgoff + (reached - row.start >> PAGE_SHIFT) >= \
                machine.mem.mappings[row.mapping].nr_slots else f"not {'writ' if write else 'read'}able"
            raise BadAddress(f"address {int(reached):#x} of process {self.name!r} is {what}")
