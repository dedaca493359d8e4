"""``offload run --trace``: what happened to each folio, step by step, in the words of mm/migrate.c.

A trace is made of the events of a call. What has no event of its own (why an attempt to unmap failed) is told from the
folio's record at the next step. Stands for no kernel file; the two lines of events/migrate.h frame each call.
"""

from offload.mm.memmap import (
    PG_active, PG_deferred_list, PG_dirty, PG_hugetlb, PG_hugetlb_subpool, PG_hwpoison, PG_ksm, PG_locked, PG_mlocked,
    PG_movable_ops, PG_partially_mapped, PG_private, PG_referenced, PG_swapbacked, PG_swapcache, PG_uptodate, PG_writeback,
)

__all__ = ("Steps",)

FLAG_NAMES = {
    PG_locked: "locked", PG_writeback: "writeback", PG_referenced: "referenced", PG_uptodate: "uptodate",
    PG_dirty: "dirty", PG_active: "active", PG_swapbacked: "swapbacked", PG_mlocked: "mlocked", PG_private: "private",
    PG_swapcache: "swapcache", PG_ksm: "ksm", PG_movable_ops: "movable_ops", PG_hwpoison: "hwpoison",
    PG_deferred_list: "deferred_split", PG_partially_mapped: "partially_mapped", PG_hugetlb: "hugetlb"}


class Steps:
    """Tells one call: lines go to the list ``lines``. ``name_of(pfn)`` names a folio."""

    def __init__(self, machine, name_of, lines):
        self.machine, self.name_of, self.lines = machine, name_of, lines
        self.unmapping = None                       # (pfn, name, order) of an attempt whose end has not been told
        self.head = None                            # where the start line goes, once the result is there
        self.begin = len(lines)

    def say(self, pfn, text):
        self.lines.append(f"  {self.name_of(pfn)}: {text}" if pfn else f"  batch: {text}")

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

    def tell(self, step, pfn):
        """One event of the call."""
        unmapping, self.unmapping = self.unmapping, None
        if unmapping is not None and not (step == "unmapped" and unmapping[0] == pfn):
            self.tell_not_unmapped(*unmapping)
        folio = self.machine.mem.folios[pfn]
        if step == "unmap":
            self.say(pfn, f"unmap: {self.state(pfn)}")
            self.unmapping = pfn, self.name_of(pfn), int(folio.order)
        elif step == "unmapped":
            self.say(pfn, f"unmapped: migration entries in place, destination allocated and locked; refcount "
                          f"{folio.refcount}, expected {self.expected(pfn)}")
        elif step == "flush":
            self.say(0, "try_to_unmap_flush()")
        elif step == "flushed":
            self.say(0, "flushed")
        elif step == "batch_copied":
            migrator = self.machine.offload.migrator
            self.say(0, f"batch copy by {migrator.name} is through" if migrator else "no batch copy")
        elif step == "move":
            self.say(pfn, f"move: refcount {folio.refcount}, expected {self.expected(pfn)}")
        elif step == "copied":
            self.say(pfn, "references checked, contents are at the destination; replacing the mapping")
        elif step == "moved":
            self.say(pfn, f"moved: entries point to {self.state(pfn)}")
        elif step == "move_failed":
            self.say(pfn, f"move: -EAGAIN, refcount {folio.refcount}, expected {self.expected(pfn)}; stays unmapped")
        elif step == "undo":
            self.say(pfn, "undo: entries point to the source again, destination is freed")

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
        else:
            why = "not unmapped: -ENOMEM, no destination"
        self.lines.append(f"  {name}: {why}")

    def end(self, result, left):
        """The call is through: what has not been told, what is left, and the two lines of the kernel around it all."""
        if self.unmapping is not None:
            self.tell_not_unmapped(*self.unmapping)
        if left:
            self.lines.append(f"  left: {' '.join(left)}")
        self.lines.insert(self.begin, result.trace[0])
        self.lines.append(result.trace[1])
