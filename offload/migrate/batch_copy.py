"""The copy of a whole batch through the hatch, between the flush and the first move.

Stands for the part of migrate_pages_batch() that RFC v6 4/5 adds, and migrate_folios_mc_copy()'s marking. The bytes
are moved by whoever is on duty (copy_offload.py); Python calls him between the two functions here, because a
migrator may wait for threads or a device. What comes back is a completion per folio.
"""

import numpy as np

from offload.copy_offload import WRITTEN_UNMARKED
from offload.jit import jit
from offload.migrate.state import folio_set_content_copied
from offload.mm.frames import frame_address
from offload.units import PAGE_SIZE

__all__ = ("batch_copy_needs_migrator", "mark_copied_folios")


@jit
def batch_copy_needs_migrator(mem, call):
    """Whether there are bytes to copy for the batch list. A machine without frames has its folios marked at once."""
    c = call.state[0]
    if c.nr_batch == 0:
        return False
    if frame_address(mem, call.pair_dst[0]):
        return True
    call.pair_done[:c.nr_batch] = 1
    return False


@jit
def mark_copied_folios(mem, call):
    """Mark each destination of the batch list whose completion says that it was wholly written.

    The return code of the batch copy plays no part (v6): marks say what is copied, the rest is copied in the move.
    """
    c = call.state[0]
    for i in range(c.nr_batch):
        if call.pair_done[i]:
            if call.pair_done[i] != WRITTEN_UNMARKED:
                folio_set_content_copied(mem, call.pair_dst[i])
            call.pair_done[i] = 0
            c.copied_folios += 1
            c.batched_folios += 1
            if frame_address(mem, call.pair_dst[i]):
                c.copied_bytes += np.int64(PAGE_SIZE) << np.int64(call.pair_order[i])
