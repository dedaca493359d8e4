"""Folio level of a scenario: isolated folios in every state, handed to migrate_pages() as a kernel caller would.

Stands for no kernel file. The folios are faulted in by processes made for the purpose, one group of processes for each
number of mappings; what the fault path cannot give (flags, references, other people) is then written into the records.

The contents of memory are judged from outside: random bytes are written into the frames and remembered here, and after
each call read back through the frames, and the page-table entries, that hold them now.
"""

import dataclasses

import numpy as np

from offload.errors import OutOfMemory, WouldHang
from offload.migrate.call import STEPS, TargetControl
from offload.migrate.pages import Event
from offload.mm.address_space import add_to_swap_cache, truncate_folio
from offload.mm.memmap import (
    ALLOC_FAIL, ALLOC_OK, OTHERS_FOREVER, OTHERS_NO, OTHERS_UNTIL_WAIT, PG_active, PG_deferred_list, PG_dirty, PG_hugetlb,
    PG_hugetlb_subpool, PG_hugetlb_unsupported, PG_hwpoison, PG_locked, PG_mlocked, PG_partially_mapped, PG_private, PG_referenced, PG_swapcache,
    PG_uptodate, PG_workingset, PG_writeback,
)
from offload.mm.movable_ops import free_movable_ops_page
from offload.mm.node import GUP_PIN_COUNTING_BIAS
from offload.mm.pagetable import PTE_DIRTY, PTE_HWPOISON, PTE_MIGRATION, PTE_SPECIAL, PTE_WRITE
from offload.scenario_copies import Copies, Folio
from offload.scenario_format import Fault, expand, folio_order, shown
from offload.scenario_machine import change_entries, make_machine, not_supported, page_entries, zap
from offload.scenario_trace import Steps
from offload.units import HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE, errno_value

__all__ = ("FolioLevel", "check_folio_level")

SEED = 0x6d6967                     # of the bytes in memory
OTHERS_WORDS = {"no": OTHERS_NO, "until_wait": OTHERS_UNTIL_WAIT, "forever": OTHERS_FOREVER}
ALLOC_WORDS = {"ok": ALLOC_OK, "fail": ALLOC_FAIL, "fail_all": ALLOC_FAIL}


def check_folio_level(scenario):
    """NotSupported for the first kind or feature of a checked scenario that this version leaves out."""
    for i, one in enumerate(scenario["folios"]):
        check_folio_supported(one, f"folios[{i}]")


def check_folio_supported(one, field):
    kind = one.get("kind", "anon")
    if kind == "hugetlb" and folio_order(one) != HPAGE_PMD_ORDER:
        not_supported(f"{field}.order", folio_order(one), f"of hugetlb folios only those of order {HPAGE_PMD_ORDER} are built")
    for key in ("callback", "split"):
        for i, outcome in enumerate(one.get(key, ())):
            if outcome != "ok" and errno_value(outcome) is None:
                raise Fault(f"{field}.{key}[{i}]", f"{outcome} is no errno of Linux", "correct it")
    if kind == "ksm" and folio_order(one):
        raise Fault(f"{field}.order", f"{shown(one['order'])}: KSM merges base pages only", "use order 0")
    aops = one.get("aops", "migrate_folio" if kind == "shmem" else "filemap")
    if one.get("private", "no") != "no" and aops == "migrate_folio" and not one.get("truncated"):
        raise Fault(f"{field}.private", f"{shown(one['private'])}: migrate_folio() has no way to take private data along",
                    "use aops filemap")


@dataclasses.dataclass
class Stretch:
    """The folios of one entry of ``folios``, neighbours in one vma; arrays have an element per base page."""

    given: dict
    names: list
    order: int
    first_page: int                 # number of its first base page among all of the scenario
    holder: np.ndarray              # int64: the frame that holds the page now, 0 if it has been freed
    mapped: np.ndarray              # bool: a page table maps it
    contents: np.ndarray            # uint8 (pages, PAGE_SIZE): what was last written to it
    mappings: list                  # (Process, address) of each mapping of it all


class FolioLevel:
    """A folio-level scenario: its machine, what lies there, and who is where after each call."""

    def __init__(self, scenario, trace=None):
        self.scenario = scenario
        self.trace = trace
        self.machine = make_machine(scenario)
        self.stretches = []
        self.rng = np.random.default_rng(SEED)
        self.written = set()                        # names of folios into which a holder has written
        self.build()

    # --- building ---------------------------------------------------------------------------------------------

    def build(self):
        machine = self.machine
        entries = sum((1 << folio_order(one)) * one.get("count", 1) for one in self.scenario["folios"] if one.get("swapcache"))
        if entries:
            machine.swapon(entries * PAGE_SIZE)
        families = {}                               # number of mappings -> the processes that share them
        for i, given in enumerate(self.scenario["folios"]):
            families.setdefault(max(self.maps(given), 1), []).append(i)
        stretches = {}
        for maps, entries in sorted(families.items()):
            parent = machine.process(f"mapper of {maps}")
            places = [(i, *self.fault_in(parent, self.scenario["folios"][i], i)) for i in entries]
            processes = [parent] + [parent.fork() for _ in range(maps - 1)]
            for i, address, pfns in places:
                given = self.scenario["folios"][i]
                if given.get("kind") in ("file", "shmem"):      # whose page tables a fork does not copy
                    for child in processes[1:]:
                        child.populate(address, len(pfns) * PAGE_SIZE << folio_order(given))
                stretches[i] = given, pfns, [(process, address) for process in processes if address]
        first_page = 0
        pfns = []
        for i, (given, heads, mappings) in sorted(stretches.items()):
            self.stretches.append(self.furnish(given, heads, mappings, first_page))
            first_page += len(self.stretches[-1].holder)
            pfns.append(heads)
        # Which page of the scenario each frame holds, by its number; -1: none.
        self.page_in = np.full(len(machine.mem.folios), -1, np.int64)
        for one in self.stretches:
            self.page_in[one.holder] = one.first_page + np.arange(len(one.holder))
        self.starts = np.array([one.first_page for one in self.stretches], np.int64)
        self.list = machine.isolate(np.concatenate(pfns) if pfns else np.empty(0, np.int64))
        for stretch, heads in zip(self.stretches, pfns):
            self.bring_into_state(stretch, heads)
        self.writers = {}                           # pfn -> stretch: references whose holder will write
        for stretch, heads in zip(self.stretches, pfns):
            if stretch.given.get("extra_refs_write"):
                self.writers.update(dict.fromkeys(heads.tolist(), stretch))

    @staticmethod
    def maps(given):
        return given.get("maps", 0 if given.get("freed") or given.get("truncated") or given.get("kind") == "movable_ops" else 1)

    def fault_in(self, process, given, i):
        """Fault the folios of one entry in: (address, their head pfns). What is mapped nowhere by nature has address 0."""
        order, nid = folio_order(given), given.get("node", 0)
        nr = given.get("count", 1)
        length = nr * PAGE_SIZE << order
        if given.get("kind") == "movable_ops":
            try:
                return 0, self.machine.movable_ops_pages(nid, nr=nr, order=order)
            except OutOfMemory:
                raise Fault(f"folios[{i}]", f"node {nid} has no room for it", "give the node more pages") from None
        where = {"order": order, "nid": nid, "prot": "rw", "mlock": given.get("mlocked", False)}
        try:
            if given.get("kind", "anon") in ("anon", "ksm"):
                address = process.mmap(length, **where)
            elif given["kind"] == "hugetlb":
                address = process.mmap(length, hugetlb=True, **where)
            else:
                file = self.machine.file(length, kind=given["kind"], aops=given.get("aops"),
                                         inaccessible=given.get("inaccessible", False))
                # One page off, a file's largest folios are mapped by PTEs, as the format has it.
                address = process._free_range(length + PAGE_SIZE, PAGE_SIZE << order) + PAGE_SIZE
                process.mmap(length, file=file, shared=True, address=address, **where)
        except OutOfMemory:
            raise Fault(f"folios[{i}]", f"node {nid} has no room for it", "give the node more pages") from None
        pfns = self.machine.folios_of(process, address, length)
        folios = self.machine.mem.folios
        if len(pfns) != nr or (folios.order[pfns] != order).any() or (folios.nid[pfns] != nid).any():
            raise Fault(f"folios[{i}]", f"node {nid} has no room for it", "give the node more pages")
        return address, pfns

    def furnish(self, given, heads, mappings, first_page):
        """Page-table entries, contents, and what is not mapped any more; before isolation."""
        machine = self.machine
        order = folio_order(given)
        nr_pages = 1 << order
        gone = given.get("partially_mapped", 0)
        zeros = given.get("zero_filled", 0)
        total = len(heads) << order
        holder = (heads[:, None] + np.arange(nr_pages)).ravel()
        mapped = np.tile(np.arange(nr_pages) < nr_pages - gone, len(heads))
        contents = self.rng.integers(1, 256, (total, PAGE_SIZE), np.uint8)
        contents.reshape(len(heads), nr_pages, PAGE_SIZE)[:, :zeros] = 0
        for head, bytes_ in zip(heads.tolist(), contents.reshape(len(heads), nr_pages, PAGE_SIZE)):
            machine.frames.view(head, nr_pages)[:] = bytes_
        dirty = PTE_DIRTY | PTE_WRITE if given.get("pte_dirty") and len(mappings) == 1 else \
            PTE_DIRTY if given.get("pte_dirty") else 0
        for process, address in mappings:
            change_entries(machine, process.mm, address, total, PTE_DIRTY, dirty)
            if gone:
                for k in range(len(heads)):
                    zap(machine, process, address + (k + 1 << order) * PAGE_SIZE - gone * PAGE_SIZE, gone)
        if given.get("kind") == "ksm":
            process, address = mappings[0]
            for i, head in enumerate(heads.tolist()):
                machine.make_ksm(head, [(process._vma_at(address), address + i * PAGE_SIZE)])
        return Stretch(given, expand(given), order, first_page, holder, mapped, contents, mappings)

    def bring_into_state(self, stretch, heads):
        """Flags, references and other people of isolated folios."""
        machine, given = self.machine, stretch.given
        mem = machine.mem
        if self.maps(given) == 0:
            for process, address in stretch.mappings:
                zap(machine, process, address, len(stretch.holder))
            stretch.mapped[:] = False
            for head in heads.tolist():             # page by page on the way there; the kernel takes them off at once
                if mem.folios.page_flags[head] & PG_deferred_list:
                    mem.folios.page_flags[head] &= ~(PG_deferred_list | PG_partially_mapped)
                    mem.nodes.nr_deferred_split[mem.folios.nid[head]] -= 1
        for head in heads.tolist():
            folio = mem.folios[head]
            kind = given.get("kind", "anon")
            if given.get("freed") and kind == "movable_ops":
                free_movable_ops_page(machine.table, head)
            elif kind in ("file", "shmem") and (given.get("freed") or given.get("truncated")):
                truncate_folio(machine.table, head)
            if given.get("swapcache"):
                if kind == "shmem" and self.maps(given) == 0:       # swapped out or not yet in: not in its file's cache
                    truncate_folio(machine.table, head)
                add_to_swap_cache(machine.table, head, machine.alloc_swap_entries(1 << stretch.order))
            if given.get("hwpoison") == "before":
                folio.page_flags |= PG_hwpoison
            for key, bit in (("dirty", PG_dirty), ("referenced", PG_referenced), ("active", PG_active),
                             ("workingset", PG_workingset)):
                if given.get(key):
                    folio.page_flags |= bit
            if given.get("dirty") and kind == "file" and folio.mapping:
                mem.nodes[folio.nid].nr_file_dirty += 1 << stretch.order
            if not given.get("migratable", True):
                folio.page_flags |= PG_hugetlb_unsupported
            if given.get("orphan_subpool"):
                folio.page_flags |= PG_hugetlb_subpool
            folio.page_flags = folio.page_flags & ~PG_uptodate | PG_uptodate * given.get("uptodate", True)
            if given.get("locked", "no") != "no":
                folio.page_flags |= PG_locked
            if given.get("writeback", "no") != "no":
                folio.page_flags |= PG_writeback
            if given.get("private", "no") != "no" or given.get("truncated"):
                folio.page_flags |= PG_private
                folio.private = head
                folio.refcount += 1
            if given.get("pinned"):
                folio.pincount += 1
                folio.refcount += 1 if stretch.order else GUP_PIN_COUNTING_BIAS
            self.surround(head, given)

    def surround(self, head, given):
        """The folio's row of Memory.others, if others do anything to it."""
        fields = {
            "lock": OTHERS_WORDS[given.get("locked", "no")], "writeback": OTHERS_WORDS[given.get("writeback", "no")],
            "refs": given.get("extra_refs", 0), "alloc": ALLOC_WORDS[given.get("alloc", "ok")],
            "copy_error": given.get("copy_error", False), "unreleasable": given.get("private") == "unreleasable",
            "poisoned_after_unmap": given.get("hwpoison") == "after_unmap"}
        for key in ("callback", "split"):
            if key in given:
                fields[key] = self.machine.tell([0 if outcome == "ok" else -errno_value(outcome) for outcome in given[key]])
        if not any(fields.values()):
            return
        if folio_order(given) and ("callback" in given or given.get("alloc") == "fail_all"):
            fields["pieces"] = self.machine.new_row("others")
            pieces = self.machine.mem.others[fields["pieces"]]
            pieces.alloc = ALLOC_FAIL if given.get("alloc") == "fail_all" else ALLOC_OK
            pieces.callback = fields.get("callback", 0)         # of the same owner: one script for all of them
            pieces.refs_gone_after = -1
        row = self.machine.new_row("others")        # may replace the array: mem is looked up again below
        mem = self.machine.mem
        others = mem.others[row]
        for key, value in fields.items():
            others[key] = value
        others.refs_from_batch_copy = given.get("extra_refs_from") == "batch_copy"
        others.refs_gone_after = given.get("extra_refs_gone_after", -1)
        others.refs_write = given.get("extra_refs_write", False)
        mem.folios[head].others = row
        if not others.refs_from_batch_copy:
            others.refs_held = others.refs
            mem.folios[head].refcount += others.refs

    # --- running ----------------------------------------------------------------------------------------------

    def run(self):
        """The results of the calls, one dict each."""
        return [self.call(call) for call in self.scenario["calls"]]

    def call(self, call):
        machine = self.machine
        isolated = self.nr_isolated()
        vmstat = machine.vmstat
        self.unmapped = set()
        started = []
        copies = Copies(machine, started, self.name_of)
        self.steps = steps = None if self.trace is None else Steps(machine, copies, self.trace)
        events = [Event("moved", self.on_moved), Event("move", self.on_move)]
        # A step is told before our own books change, but for "moved", which is told with the new holder.
        told = [Event(step, copies.tell) for step in ("unmapped", "batch_copied", "move", "copied", "moved")]
        if steps is not None:
            told += [Event(step, steps.tell) for step in STEPS]
        if self.writers:
            events += [Event("unmapped", self.on_unmapped), Event("batch_copied", self.on_batch_copied),
                       Event("flush", self.on_flush)]
        events = [one for one in told if one.step != "moved"] + events + [one for one in told if one.step == "moved"]
        target = call.get("target", 1)
        if machine.mem.nodes.nr_pages[target] == 0:
            target = TargetControl(target)          # which may name a node without memory
        try:
            result = machine.migrate_isolated(
                self.list, target, mode=call.get("mode", "MIGRATE_ASYNC"),
                reason=call.get("reason", "compaction"), pf_memalloc=call.get("pf_memalloc", False), events=events,
                started=started, putback=False)
        except WouldHang:
            raise self.would_hang(call, copies.call("hang")) from None
        self.list = result.left
        left = [self.name_of(int(pfn)) for pfn in result.left]
        wrong = self.wrong_folios()
        if steps is not None:
            steps.end(result, left, [(name, "WRITE LOST" if name in self.written else "WRONG BYTES") for name in wrong])
        return {
            "rc": result.rc, "left": left, "stats": result.stats, "targets": result.targets,
            "nr_isolated": self.nr_isolated() - isolated, "tlb_flushes": result.tlb_flushes, "copies": result.copies,
            "vmstat": {key: value - vmstat[key] for key, value in machine.vmstat.items()}, "trace": list(result.trace),
            "folios": self.folio_facts(copies, wrong), "data_ok": not wrong}

    def would_hang(self, call, pfn):
        """The WouldHang for a call that waits for ever on folio ``pfn``, in the words of the file."""
        given = self.locate(self.page_in[pfn])[0].given
        key = "locked" if given.get("locked") == "forever" else "writeback"
        i = next(i for i, one in enumerate(self.scenario["folios"]) if one is given)
        return WouldHang(f'folios[{i}].{key}: "forever": {call.get("mode", "MIGRATE_ASYNC")} would sleep on folio {self.name_of(pfn)} '
                         f'for ever, as the kernel would; write "until_wait", or call with MIGRATE_ASYNC')

    def on_move(self, step, pfn):
        self.moving = pfn

    def on_moved(self, step, dst):
        src, nr_pages = self.moving, 1 << int(self.machine.mem.folios.order[dst])
        pages = self.page_in[src:src + nr_pages].copy()
        self.page_in[src:src + nr_pages] = -1
        for page in self.page_in[dst:dst + nr_pages]:
            if page >= 0:                           # freed during this call, and its frame used again
                stretch, i = self.locate(page)
                stretch.holder[i] = 0
        self.page_in[dst:dst + nr_pages] = pages
        stretch, i = self.locate(pages[0])
        stretch.holder[i:i + nr_pages] = dst + np.arange(nr_pages)

    def on_unmapped(self, step, pfn):
        if self.machine.mem.folios.page_flags[pfn] & PG_hugetlb:    # it is flushed at once, and moved on its own
            self.in_batch = {pfn}
            self.on_batch_copied(step, pfn)
        else:
            self.unmapped.add(pfn)

    def on_flush(self, step, pfn):
        """All that is unmapped now is in this batch."""
        self.in_batch, self.unmapped = self.unmapped, set()

    def on_batch_copied(self, step, pfn):
        """Holders of references write into their folios, once each: new bytes from first to last page."""
        mem = self.machine.mem
        for head in self.in_batch & self.writers.keys():
            if mem.others[mem.folios.others[head]].refs_held:
                stretch = self.writers.pop(head)
                nr_pages = 1 << stretch.order
                i = int(self.page_in[head]) - stretch.first_page
                stretch.contents[i:i + nr_pages] = self.rng.integers(1, 256, (nr_pages, PAGE_SIZE), np.uint8)
                self.machine.frames.view(head, nr_pages)[:] = stretch.contents[i:i + nr_pages]
                self.written.add(self.name_of(head))
                if self.steps is not None:
                    self.steps.wrote(head)

    # --- looking ----------------------------------------------------------------------------------------------

    def nr_isolated(self):
        nodes = self.machine.mem.nodes
        return int(nodes.nr_isolated_anon.sum() + nodes.nr_isolated_file.sum())

    def locate(self, page):
        """(stretch, index in it) of a base page of the scenario, by its number."""
        stretch = self.stretches[int(np.searchsorted(self.starts, page, "right")) - 1]
        return stretch, int(page) - stretch.first_page

    def name_of(self, pfn):
        """How results name the folio whose head is ``pfn``: as the file does, or ``name/INDEX`` for a piece."""
        stretch, i = self.locate(self.page_in[pfn])
        whole, index = i >> stretch.order, i & (1 << stretch.order) - 1
        if self.machine.mem.folios.order[pfn] == stretch.order:
            return stretch.names[whole]
        return f"{stretch.names[whole]}/{index}"

    def folio_facts(self, copies, wrong):
        """What results say of each folio that still holds what a named one held. ``wrong``: names, see wrong_folios()."""
        folios = self.machine.mem.folios
        facts = {}
        for stretch in self.stretches:
            migrating = np.zeros(len(stretch.holder), bool)
            for process, address in stretch.mappings:
                entries = page_entries(self.machine, process.mm, address, len(stretch.holder))
                migrating |= entries & (PTE_MIGRATION | PTE_HWPOISON) != 0
            i = 0
            while i < len(stretch.holder):
                pfn = int(stretch.holder[i])
                if pfn == 0 or folios.refcount[pfn] == 0:
                    i += 1                          # freed
                    continue
                folio = folios[pfn]
                nr_pages = 1 << int(folio.order)
                name = self.name_of(pfn)
                facts[name] = {
                    "node": int(folio.nid), "refcount": int(folio.refcount), "mapcount": int(folio.mapcount),
                    "dirty": bool(folio.page_flags & PG_dirty), "swapcache": bool(folio.page_flags & PG_swapcache),
                    "mlocked": bool(folio.page_flags & PG_mlocked), "present": not migrating[i:i + nr_pages].any(),
                    "data_ok": name not in wrong, "written": name in self.written,
                    **copies.folios.get(name, Folio()).as_result()}
                i += nr_pages
        return {name: {key: bool(value) if key == "present" else value for key, value in fact.items()}
                for name, fact in facts.items()}

    def wrong_folios(self):
        """Names of the folios of which not every byte is the last one written to it."""
        return list(dict.fromkeys(self.name_of_page(stretch, i) for stretch in self.stretches
                                  for i in np.flatnonzero(self.wrong_pages(stretch)).tolist()))

    def name_of_page(self, stretch, i):
        """Name of the folio that holds page ``i`` of a stretch; of the folio of the file if it has been freed."""
        pfn = int(stretch.holder[i])
        if pfn == 0 or not self.in_use(stretch.holder[i:i + 1])[0]:
            return stretch.names[i >> stretch.order]
        order = int(self.machine.mem.orders[pfn])
        return self.name_of(pfn >> order << order)

    def wrong_pages(self, stretch):
        """bool per base page: whether some byte is not the last written, in its frame or as the page tables show it."""
        machine = self.machine
        alive = stretch.holder != 0
        alive[alive] = self.in_use(stretch.holder[alive])
        wrong = np.zeros(len(alive), bool)
        for i in np.flatnonzero(alive):
            wrong[i] = not np.array_equal(machine.frames.view(int(stretch.holder[i]), 1)[0], stretch.contents[i])
        zeros = ~stretch.contents.any(axis=1)
        anon = stretch.given.get("kind", "anon") in ("anon", "ksm", "hugetlb")
        for process, address in stretch.mappings:
            entries = page_entries(machine, process.mm, address, len(stretch.holder))
            right = alive & (entries >> PAGE_SHIFT == stretch.holder) & (entries & PTE_SPECIAL == 0)
            right |= (entries & PTE_SPECIAL != 0) & zeros & (entries & PTE_HWPOISON == 0)
            right |= entries & PTE_HWPOISON != 0            # what stood there is gone, and whoever reads it is told so
            if not anon:
                right |= entries == 0               # pieces of a split file folio: faulted in again when used
            wrong |= stretch.mapped & ~right
        return wrong

    def in_use(self, pfns):
        """bool per frame: part of a folio that somebody holds."""
        mem = self.machine.mem
        orders = mem.orders[pfns].astype(np.int64)
        return mem.folios.refcount[pfns >> orders << orders] > 0
