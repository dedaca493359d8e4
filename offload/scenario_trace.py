"""``offload run --trace``: what happened to each folio, step by step, in the words of mm/migrate.c.

A trace is made of the events of a call. What has no event of its own (why an attempt to unmap failed) is told from the
folio's record at the next step. Stands for no kernel file; the two lines of events/migrate.h frame each call.
"""

from offload.copy_offload import WRITTEN_UNMARKED
from offload.migrate.state import FOLIO_CONTENT_COPIED
from offload.mm.memmap import (
    PG_active, PG_deferred_list, PG_dirty, PG_hugetlb, PG_hugetlb_subpool, PG_hwpoison, PG_ksm, PG_locked, PG_mlocked,
    PG_movable_ops, PG_partially_mapped, PG_private, PG_referenced, PG_swapbacked, PG_swapcache, PG_uptodate, PG_writeback,
)
from offload.units import ENOMEM

__all__ = ("Steps",)

FLAG_NAMES = {
    PG_locked: "locked", PG_writeback: "writeback", PG_referenced: "referenced", PG_uptodate: "uptodate",
    PG_dirty: "dirty", PG_active: "active", PG_swapbacked: "swapbacked", PG_mlocked: "mlocked", PG_private: "private",
    PG_swapcache: "swapcache", PG_ksm: "ksm", PG_movable_ops: "movable_ops", PG_hwpoison: "hwpoison",
    PG_deferred_list: "deferred_split", PG_partially_mapped: "partially_mapped", PG_hugetlb: "hugetlb"}


MARKS = {"v4": "bit 2 of dst->private", "flags": "a bit of migrate_flags", "v5": "bit 2 of dst->migrate_info",
         "v6": "bit 2 of dst->migrate_info"}
"""Where the mark of a copy lives."""
BATCH = "move_to_new_folio() says so of the whole batch list"
WHY_SKIPPED = {"v4": BATCH, "flags": "the core says so of the whole batch list", "v5": BATCH,
               "v6": "the batch copy has marked this dst"}


def counted(nr, what):
    return f"{nr} {what}" if nr == 1 else f"{nr} {what}s"


class Steps:
    """Tells one call: lines go to the list ``lines``. ``copies``: the call's Copies, told of each event before this is."""

    def __init__(self, machine, copies, lines):
        self.machine, self.copies, self.lines = machine, copies, lines
        self.name_of = copies.name_of
        self.unmapping = None                       # (pfn, name, order, mapcount) of an attempt whose end has not been told
        self.moving = None                          # (pfn, name) of a move attempt whose end has not been told
        self.replacing = False                      # whether that one had come to replace the mapping
        self.held = {}                              # pfn -> references that somebody else holds, as far as told
        self.begin = len(lines)

    def say(self, pfn, text):
        self.lines.append(f"  {self.name_of(pfn)}: {text}" if pfn else f"  batch: {text}")

    @property
    def protocol(self):
        return self.machine.config.protocol

    def refs(self, pfn):
        """What the check before a copy compares."""
        return f"refcount {self.machine.mem.folios.refcount[pfn]}, expected {self.expected(pfn)}"

    def state(self, pfn):
        folio = self.machine.mem.folios[pfn]
        flags = "|".join(name for bit, name in FLAG_NAMES.items() if folio.page_flags & bit)
        return f"pfn {pfn} node {folio.nid} order {folio.order} refcount {folio.refcount} mapcount {folio.mapcount} {flags}"

    def expected(self, pfn):
        """folio_expected_ref_count() + 1."""
        folio = self.machine.mem.folios[pfn]
        cached = (1 << int(folio.order)) * (int(folio.mapping > 0) + (folio.page_flags & PG_swapcache != 0))
        private = folio.mapping >= 0 and folio.page_flags & PG_private != 0
        return int(cached + private + folio.mapcount + 1)

    # --- events, in the order in which they come ------------------------------------------------------------------

    def tell(self, step, pfn):
        """One event of the call."""
        self.tell_ends(step, pfn)
        if step not in ("batch_copied", "move_failed"):
            self.tell_holders()
        getattr(self, step)(pfn)
        self.tell_holders()

    def unmap(self, pfn):
        folio = self.machine.mem.folios[pfn]
        self.held[pfn] = int(self.machine.mem.others.refs_held[folio.others])
        others = f"; {counted(self.held[pfn], 'reference')} of somebody else" if self.held[pfn] else ""
        self.say(pfn, f"unmap: {self.state(pfn)}{others}")
        self.unmapping = pfn, self.name_of(pfn), int(folio.order), int(folio.mapcount)

    def unmapped(self, pfn):
        entries = "migration entries in place, " if self.entries else ""
        self.say(pfn, f"unmapped: {entries}destination allocated and locked; {self.refs(pfn)}{self.list_of(pfn)}")

    def list_of(self, pfn):
        """What the choice between batch list and single list was, and why."""
        page_flags = self.machine.mem.folios.page_flags[pfn]
        if page_flags & PG_hugetlb or not self.copies.call("offload"):
            return ""
        if page_flags & PG_movable_ops:
            return "; kept out of the batch copy: a movable_ops page"
        if not self.copies.on_batch_list(pfn):
            return "; KEPT OUT of the batch copy: a reference is unexplained"
        if self.machine.mem.folios.refcount[pfn] == self.expected(pfn):
            return "; joins the batch copy"
        return f"; joins the batch copy: {self.protocol} does not look at the refcount"

    def flush(self, pfn):
        self.say(0, "try_to_unmap_flush()")

    def flushed(self, pfn):
        self.say(0, "flushed")

    def batch_copied(self, pfn):
        migrator, done = self.machine.offload.migrator, [done for _, _, done in self.copies.batch_list()]
        if not self.copies.call("offload"):
            self.say(0, "no batch copy: " + ("not for this reason" if migrator else "no migrator is registered"))
            return
        if not done:
            self.say(0, "no batch copy: the batch list is empty")
            return
        by = migrator.name if migrator else "the CPU routine"
        text = f"batch copy by {by}: {sum(each != 0 for each in done)} of {counted(len(done), 'folio')} copied"
        if self.protocol == "v6":
            marked = sum(each not in (0, WRITTEN_UNMARKED) for each in done)
            text += f", {marked} marked, each in its own dst ({MARKS['v6']})"
        elif self.copies.call("batch_copied"):
            text += ", it returned 0: all of the batch list counts as copied"
        else:
            text += ", it failed: none of the batch list counts as copied"
        self.say(0, text)

    def wrote(self, pfn):
        """The holder of a reference has written into a folio."""
        self.say(pfn, f"its holder WRITES into the source, pfn {pfn}")

    def move(self, pfn):
        self.say(pfn, f"move, pass {self.copies.call('pass_') + 1}: {self.refs(pfn)}")
        self.moving, self.replacing = (pfn, self.name_of(pfn)), False
        self.marked = self.counts_as_copied(pfn)

    def counts_as_copied(self, pfn):
        """Whether the move will find the mark on the folio's destination, or its like."""
        pair = next((pair for pair in self.copies.batch_list() if pair[0] == pfn), None)
        if pair is None or self.machine.mem.folios.page_flags[pfn] & PG_hugetlb:
            return False
        if self.protocol == "v6":
            return self.machine.mem.folios.migrate_info[pair[1]] & FOLIO_CONTENT_COPIED != 0
        return self.copies.call("batch_copied") != 0

    def copied(self, pfn):
        self.replacing = True
        copy = "copy MADE now" if self.copies.made else f"copy SKIPPED: {WHY_SKIPPED[self.protocol]} ({MARKS[self.protocol]})"
        self.say(pfn, f"references as expected; {copy}; replacing the mapping")

    def moved(self, pfn):
        self.held.pop(self.copies.moving, None)
        entries = "entries point to " if self.machine.mem.folios.mapcount[pfn] else ""
        self.say(pfn, f"moved: {entries}{self.state(pfn)}")

    def move_failed(self, pfn):
        folio = self.machine.mem.folios[pfn]
        dropped = self.held.get(pfn, 0) - int(self.machine.mem.others.refs_held[folio.others])
        refcount, expected = int(folio.refcount) + dropped, self.expected(pfn)
        if self.replacing:
            why = "a reference appeared before the mapping was replaced"
        elif refcount != expected and not folio.mapcount:
            why = f"refcount {refcount}, expected {expected}"
        else:
            why = "said by its owner" if folio.page_flags & PG_movable_ops else "said by the mapping's callback"
        retry = ""
        if self.marked:
            retry = "; its mark is gone, another pass COPIES AFRESH" if self.protocol == "v6" else \
                "; another pass is told again that the batch is copied, and SKIPS the copy"
        self.say(pfn, f"move: -EAGAIN, {why}; {'is mapped again' if folio.mapcount else 'stays unmapped'}{retry}")

    def undo(self, pfn):
        copy = ", and its copy thrown away" if self.copies.of(pfn).at_dst else ""
        self.say(pfn, f"undo: back to the source; the destination is freed{copy}")

    # --- what has no event of its own -----------------------------------------------------------------------------

    def tell_ends(self, step, pfn):
        """How the attempt before ended, where no event said so."""
        unmapping, self.unmapping = self.unmapping, None
        if unmapping is not None:
            self.entries = unmapping[3] > 0
            if not (step == "unmapped" and unmapping[0] == pfn):
                self.tell_not_unmapped(*unmapping[:3])
        if self.moving is None or step == "copied":
            return
        moving, self.moving = self.moving, None
        if step not in ("moved", "move_failed") and not (step == "undo" and pfn == moving[0]):
            others = self.machine.mem.others[self.machine.mem.folios.others[moving[0]]]
            why = "reading the source meets an uncorrectable memory error: -EHWPOISON" if others.copy_error else "not to be tried again"
            self.lines.append(f"  {moving[1]}: move: {why}; back to the source, the destination is freed")

    def tell_holders(self):
        """References that others have taken or dropped since last looked at."""
        mem = self.machine.mem
        for pfn, before in self.held.items():
            now = int(mem.others.refs_held[mem.folios.others[pfn]])
            if now != before and mem.folios.refcount[pfn]:
                self.held[pfn] = now
                did = "drops" if now < before else "takes"
                self.say(pfn, f"its holder {did.upper()} {counted(abs(now - before), 'reference')}: {self.refs(pfn)}")

    def tell_not_unmapped(self, pfn, name, order):
        folio = self.machine.mem.folios[pfn]
        if folio.refcount == 0:
            why = "only the list's reference was left: freed, counted as moved"
        elif folio.order < order:
            why = f"split into {1 << order} base pages"
        elif folio.page_flags & PG_locked:
            why = "not unmapped: -EAGAIN, locked by somebody else"
        elif folio.page_flags & PG_hugetlb_subpool and folio.mapping <= 0:
            why = "not unmapped: -EBUSY, a subpool and no mapping"
        elif folio.page_flags & PG_writeback:
            why = "not unmapped: under writeback"
        elif folio.pincount:
            why = "not unmapped: -EAGAIN, it may be pinned; restored"
        elif folio.page_flags & PG_hwpoison and self.machine.config.kernel == "mm-next":
            why = "not unmapped: -EHWPOISON"
        elif folio.mapping == 0 and folio.page_flags & (PG_movable_ops | PG_swapcache) == 0:
            why = "not unmapped: -EAGAIN, truncated; its buffers are freed if they can be"
        elif self.copies.call("saved") == -ENOMEM:
            why = "not unmapped: -ENOMEM, no destination"
        else:
            why = "not unmapped"
        self.lines.append(f"  {name}: {why}")

    def end(self, result, left, wrong=()):
        """The call is through: what has not been told, what is left, and the two lines of the kernel around it all.

        ``wrong``: (name, "WRITE LOST" or "WRONG BYTES") of folios whose bytes are not the last written.
        """
        self.tell_ends("end", 0)
        if left:
            self.lines.append(f"  left: {' '.join(left)}")
        for name, what in wrong:
            self.lines.append(f"  {name}: {what}: its bytes are not the last written to it")
        self.lines.insert(self.begin, result.trace[0])
        self.lines.append(result.trace[1])
