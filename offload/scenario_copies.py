"""Whose copy was whose: per folio of one call, whether it joined the batch copy, and what became of its copies.

Made of the events of a call and the counters of its record (migrate/call.py). Stands for no kernel file; --trace and the
results of a scenario's folios are told from it.
"""

import dataclasses

import numpy as np

from offload.mm.memmap import PG_hugetlb

__all__ = ("Copies", "Folio")


@dataclasses.dataclass
class Folio:
    """What one call did with the bytes of one folio, over all its batches."""

    joined: bool = False            # it was on a batch list, that of the batch copy
    batched: int = 0                # completed copies of it by the batch copy
    made: int = 0                   # completed copies of it made in the move
    at_dst: bool = False            # the destination that it has now holds a completed copy
    used: int = 0                   # copies with which it moved: 1, or 0

    def as_result(self):
        """The fields that a result has of it."""
        total = self.batched + self.made
        return {"joined": self.joined, "copies": {"folios": total, "batched": self.batched, "discarded": total - self.used}}


class Copies:
    """Follows one call. ``started``: list that gets its Call when it begins; ``name_of(pfn)`` names a folio."""

    def __init__(self, machine, started, name_of):
        self.machine, self.started, self.name_of = machine, started, name_of
        self.folios = {}                            # name -> Folio
        self.moving = 0                             # source of the move attempt in hand
        self.copied_before = 0                      # copies completed before it
        self.made = False                           # whether it has copied

    def call(self, field):
        """A field of the call's record."""
        return int(self.started[0].state.view(np.ndarray)[field][0])

    def of(self, pfn):
        return self.folios.setdefault(self.name_of(pfn), Folio())

    def batch_list(self):
        """(source, destination, completion) of each folio of the current batch list; a source that has been moved is 0."""
        call, nr = self.started[0], self.call("nr_batch")
        return list(zip(call.pair_src[:nr].tolist(), call.pair_dst[:nr].tolist(), call.pair_done[:nr].tolist()))

    def on_batch_list(self, pfn):
        return any(pfn == src for src, _, _ in self.batch_list())

    def tell(self, step, pfn):
        """One event of the call. "moved" comes when names already follow the folio to its destination ``pfn``."""
        if step == "unmapped":
            folio = self.of(pfn)
            folio.at_dst = False
            hugetlb = self.machine.mem.folios.page_flags[pfn] & PG_hugetlb
            if not hugetlb and self.call("nr_batch") and self.started[0].pair_src[self.call("nr_batch") - 1] == pfn:
                folio.joined = True
        elif step == "batch_copied":
            for src, _, done in self.batch_list():
                folio = self.of(src)
                folio.at_dst = done != 0
                folio.batched += folio.at_dst
        elif step == "move":
            self.moving, self.copied_before, self.made = pfn, self.call("copied_folios"), False
        elif step == "copied":
            self.made = self.call("copied_folios") > self.copied_before
            folio = self.of(pfn)
            folio.made += self.made
            folio.at_dst |= self.made
        elif step == "moved":
            folio = self.of(pfn)
            folio.used += folio.at_dst
