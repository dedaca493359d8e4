"""What other tasks do to a folio while it is migrated, ready-made: actions that can be placed between the steps of a call.

Stands for the other side of mm/migrate.c (v7.3): page faults that meet a migration entry (migration_entry_wait()), gup.c,
page-cache lookups, and fork, munmap, mprotect and mremap as they treat migration entries; and a CPU that still has an
old translation. Leaves out memory failure, reclaim and compaction, which cannot get at an isolated folio.

An action knows its process and address; ``action.at(step)`` gives the events for a call::

    fault = CpuFault(process, address, write=b"x")
    machine.migrate_pages(folios, 1, events=fault.at("unmapped"))
    fault.outcome                                   # "waited"

``outcome`` says what came of it (None: the step was never reached), ``error`` what it raised: an action that fails, as a real
one would, does not end the migration. The step boundaries and what each actor sees there: docs/page_migration.md.
"""

import numpy as np

from offload.errors import InvalidInput, OffloadError
from offload.jit import jit_entry
from offload.migrate.call import STEPS
from offload.migrate.pages import Event
from offload.mm.address_space import filemap_get_folio
from offload.mm.fault import lookup_page
from offload.mm.memmap import NO_PFN, PG_locked, page_folio, unpack
from offload.mm.node import folio_put_refs
from offload.mm.pagetable import PTE_DIRTY, PTE_MIGRATION, PTE_WRITE
from offload.units import MIGRATE_ASYNC, PAGE_SHIFT, PAGE_SIZE

__all__ = ("CpuFault", "GupFast", "GupSlow", "Fork", "Munmap", "Mprotect", "Mremap", "PageCacheLookup", "StaleTlbWrite")


class Action:
    """Something another task does once. ``outcome`` and ``error`` tell what came of it."""

    def __init__(self, process):
        self.process, self.machine = process, process.machine
        self.outcome = self.error = None

    def at(self, step, folio=None):
        """Events that let it happen the first time a call stands at ``step`` (of ``folio``, if given)."""
        return [Event(step, self._first, folio)]

    def _first(self, step, pfn):
        if self.outcome is None and self.error is None:
            self._attempt(self.act)

    def _attempt(self, act, *args):
        with self.machine.other_task():
            try:
                self.outcome = act(*args)
            except OffloadError as error:
                self.error = error

    def act(self):
        """Do it; the outcome. Runs as another task."""
        raise NotImplementedError


class Waiting(Action):
    """An action that faults: on a migration entry it waits, without a reference, until the source is unlocked, then tries
    again. At every later step it looks whether that is so; after the call :meth:`wake` does."""

    waits_for = NO_PFN                              # source whose lock it sleeps on
    waited = False

    def at(self, step, folio=None):
        return [*(Event(each, self._look) for each in STEPS), *super().at(step, folio)]

    def _look(self, step, pfn):
        if self.waits_for and not self.machine.mem.folios.page_flags[self.waits_for] & PG_locked:
            self._attempt(self.again)

    def wake(self):
        """After the call: go on if it waits still. Its outcome."""
        if self.waits_for:
            self.outcome = self.again()
        return self.outcome

    def again(self):
        self.waits_for = NO_PFN
        return self.act()

    def fault_in(self, address, write):
        """Whether the page is accessible now. If not it waits; BadAddress where the process would be killed."""
        pfn = migrating(self.machine.table, self.process.mm, address)
        if pfn:
            self.waits_for, self.waited = pfn, True
            return False
        self.process._populate(self.process._vma_at(address), address & -PAGE_SIZE, (address & -PAGE_SIZE) + PAGE_SIZE, write)
        return True


class CpuFault(Waiting):
    """A thread touches ``address``: reads a byte, or writes the bytes ``write``.

    Outcome "done" if nothing was in its way, "waited" if it had to wait and is through, "waiting" while it waits. Waiting
    takes no reference, so it never makes a move fail.
    """

    def __init__(self, process, address, write=None):
        super().__init__(process)
        self.address, self.write = address, write
        self.found = None                           # the byte that it has read

    def act(self):
        if not self.fault_in(self.address, self.write is not None):
            return "waiting"
        if self.write is not None:
            self.process.write(self.address, self.write)
        else:
            self.found = self.process.read(self.address, 1)
        return "waited" if self.waited else "done"


class GupSlow(Waiting):
    """get_user_pages() of one page: a reference, kept until :meth:`put`. Faults, and so waits, as a CPU does.

    ``write`` (FOLL_WRITE): the page is taken to be written to, so its entry must be writable; the holder may then
    :meth:`write` until it drops the reference. Outcome "taken" (``page`` is the pfn), or "waiting".
    """

    def __init__(self, process, address, write=False):
        super().__init__(process)
        self.address, self.page, self.to_write = address, NO_PFN, write
        self.written = False                        # whether the holder has written

    def act(self):
        if not self.fault_in(self.address, self.to_write):
            return "waiting"
        self.page = get_present_page(self.machine.table, self.process.mm, self.address)
        return "taken"

    def write(self, data):
        """Write bytes from ``address`` on into the page that is held, by the kernel's own mapping or a device: page tables
        play no part, nobody faults. InvalidInput if it holds none, or not for writing, or beyond the page's end."""
        start = self.address % PAGE_SIZE
        if not self.to_write:
            raise InvalidInput("this page was not taken to be written to; make the action with write=True")
        if not self.page:
            raise InvalidInput(f"no page is held (outcome {self.outcome!r}); write after it is taken and before put()")
        if len(data) > PAGE_SIZE - start:
            raise InvalidInput(f"{len(data)} bytes at {self.address:#x} do not lie in one page; a reference is to one page")
        self.machine.frames.write(self.page, data, start)
        self.written = True

    def write_at(self, step, data, folio=None):
        """Events that let the holder write the first time a call stands at ``step`` while it holds the page."""
        def write_once(step, pfn):
            if self.page and not self.written:
                self.write(data)
        return [Event(step, write_once, folio)]

    def put(self):
        """Drop the reference; allowed at any time."""
        if self.page:
            put_page(self.machine.table, self.page)
            self.page = NO_PFN

    def put_at(self, step, folio=None):
        """Events that drop it the first time a call stands at ``step`` after it was taken."""
        return [Event(step, lambda step, pfn: self.put(), folio)]


class GupFast(GupSlow):
    """The same, first without any lock: a present entry gives a reference, which is kept only if the entry is still the
    same when looked at again.

    Both looks fall together unless ``recheck_at`` places the second. Outcomes: "taken"; "dropped" (the entry changed
    between the looks, the reference is gone again and the slow way is taken) or "slow" (it was not present), then
    followed by what GupSlow did: "dropped, waiting", "slow, taken" ...
    """

    def __init__(self, process, address, recheck_at=None, write=False):
        super().__init__(process, address, write)
        self.recheck_at = recheck_at
        self.way = ""
        self.entry = None

    def at(self, step, folio=None):
        events = super().at(step, folio)
        return events + ([Event(self.recheck_at, self._recheck)] if self.recheck_at else [])

    def act(self):
        if self.way:
            return f"{self.way}, {super().act()}"
        entry = entry_at(self.machine.table, self.process.mm, self.address)
        if entry & PTE_WRITE or not self.to_write:
            self.page = get_present_page(self.machine.table, self.process.mm, self.address)
        if not self.page:
            self.way = "slow"
            return self.act()
        self.entry = entry_at(self.machine.table, self.process.mm, self.address)
        return "taken" if self.recheck_at is None else "to be looked at again"

    def _recheck(self, step, pfn):
        if self.outcome == "to be looked at again":
            self._attempt(self.look_again)

    def look_again(self):
        if entry_at(self.machine.table, self.process.mm, self.address) == self.entry:
            return "taken"
        self.put()
        self.way = "dropped"
        return self.act()


class Fork(Action):
    """The process forks; ``child``. A migration entry is copied: child RSS +1, no reference, no mapcount; of a private
    mapping it becomes plain readable in both."""

    child = None

    def act(self):
        self.child = self.process.fork()
        return "forked"


class Munmap(Action):
    """munmap() of a range. A migration entry is dropped, RSS -1. If all entries of an anonymous folio go, its destination ends
    with no mapping and is freed; the call counts it as succeeded."""

    def __init__(self, process, address, length):
        super().__init__(process)
        self.address, self.length = address, length

    def act(self):
        self.process.munmap(self.address, self.length)
        return "unmapped"


class Mprotect(Action):
    """mprotect() of a range. Without "w" a writable migration entry becomes readable-exclusive (anonymous) or readable."""

    def __init__(self, process, address, length, prot="r"):
        super().__init__(process)
        self.address, self.length, self.prot = address, length, prot

    def act(self):
        self.process.mprotect(self.address, self.length, self.prot)
        return "protected"


class Mremap(Action):
    """mremap(MREMAP_FIXED) of a range of one vma to ``new_address``. Migration entries move with it."""

    def __init__(self, process, address, length, new_address):
        super().__init__(process)
        self.address, self.length, self.new_address = address, length, new_address

    def act(self):
        self.process.mremap(self.address, self.length, self.new_address)
        return "moved"


class PageCacheLookup(Action):
    """filemap_get_folio() of page ``index`` of a file: a reference on whatever the cache holds, kept until :meth:`put`.

    Before the replacement that is the source, and the reference makes the move fail with -EAGAIN; after it the destination,
    locked until its migration is finished. Outcome "unlocked", "locked" (a reader would wait), or "absent".
    """

    def __init__(self, file, index):
        self.file, self.index, self.machine = file, index, file.machine
        self.outcome = self.error = None
        self.folio = NO_PFN

    def act(self):
        self.folio = lookup_and_get(self.machine.table, self.file.mapping, self.index)
        if not self.folio:
            return "absent"
        return "locked" if self.machine.mem.folios.page_flags[self.folio] & PG_locked else "unlocked"

    put = GupSlow.put
    put_at = GupSlow.put_at

    @property
    def page(self):
        return self.folio

    @page.setter
    def page(self, pfn):
        self.folio = pfn


class StaleTlbWrite(Action):
    """Another CPU writes ``data`` at ``address`` through the translation that it had before the unmap.

    It has that translation from the first "unmap" step on. Written at a step of an ASYNC batch from "unmapped" to "flush"
    the bytes reach the source, and the copy, which comes after the flush, takes them along: outcome "written". Only a
    translation that was writable and dirty serves: otherwise the CPU walks the page table, finds the entry gone and
    faults. After the flush, and in the modes that flush at each clear, there is no old translation: "faults" too.
    """

    def __init__(self, process, address, data):
        super().__init__(process)
        self.address, self.data = address, data
        self.entry, self.page = 0, NO_PFN
        if len(data) > PAGE_SIZE - address % PAGE_SIZE:
            raise InvalidInput(f"{len(data)} bytes at {address:#x} do not lie in one page; one translation covers no more")

    def at(self, step, folio=None):
        return [Event("unmap", self._translate), Event("flushed", self._flush), *super().at(step, folio)]

    def _translate(self, step, pfn):
        if self.entry == 0:
            self.entry = entry_at(self.machine.table, self.process.mm, self.address)
            self.page = page_at(self.machine.table, self.process.mm, self.address)

    def _flush(self, step, pfn):
        self.page = NO_PFN                          # try_to_unmap_flush(): on every CPU

    def act(self):
        now = entry_at(self.machine.table, self.process.mm, self.address)
        serves = self.page and self.entry & PTE_WRITE and self.entry & PTE_DIRTY
        if now != self.entry and self.machine.batch_mode != MIGRATE_ASYNC:
            serves = False                          # flushed when it was cleared
        if not serves:
            return "faults"
        start = self.address % PAGE_SIZE
        self.machine.frames.write(self.page, self.data, start)
        return "written"


# --- entries into compiled code -------------------------------------------------------------------------------

@jit_entry
def entry_at(mem_table, mm, address):
    """The page-table entry that covers ``address``."""
    entry, value, page = lookup_page(unpack(mem_table), mm, address)
    return value


@jit_entry
def page_at(mem_table, mm, address):
    """pfn of the page that a present entry maps at ``address``, or NO_PFN."""
    entry, value, page = lookup_page(unpack(mem_table), mm, address)
    return page


@jit_entry
def migrating(mem_table, mm, address):
    """Source folio of the migration entry at ``address``, or NO_PFN."""
    mem = unpack(mem_table)
    entry, value, page = lookup_page(mem, mm, address)
    return page_folio(mem, value >> PAGE_SHIFT) if value & PTE_MIGRATION else np.int64(NO_PFN)


@jit_entry
def get_present_page(mem_table, mm, address):
    """Take a reference on the page that a present entry maps: its pfn, or NO_PFN. Kernel: gup_fast_pte_range()."""
    mem = unpack(mem_table)
    entry, value, page = lookup_page(mem, mm, address)
    if page != NO_PFN:
        mem.folios[page_folio(mem, page)].refcount += 1
    return page


@jit_entry
def put_page(mem_table, page):
    mem = unpack(mem_table)
    folio_put_refs(mem, page_folio(mem, page), 1)


@jit_entry
def lookup_and_get(mem_table, mapping, index):
    """Head pfn of the folio at ``index`` of a page cache, with a reference for the caller; NO_PFN if there is none."""
    mem = unpack(mem_table)
    pfn = filemap_get_folio(mem, mapping, index)
    if pfn != NO_PFN:
        mem.folios[pfn].refcount += 1
    return pfn
