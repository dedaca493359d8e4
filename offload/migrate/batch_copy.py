"""The copy of a whole batch through the hatch, between the flush and the first move.

Stands for the part of migrate_pages_batch() that RFC v6 4/5 adds, and migrate_folios_mc_copy()'s marking. The bytes
are moved by whoever is on duty (copy_offload.py): the CPU routine here, anybody else by Python between the two
functions below, because a migrator may wait for threads or a device. What comes back is a completion per folio, and
whether the copy as a whole failed.
"""

import numpy as np

from offload.copy_offload import WRITTEN_UNMARKED
from offload.intrinsics import prefetch_record
from offload.jit import jit
from offload.migrate.state import batch_counts_as_copied, folio_set_content_copied
from offload.mm.frames import folios_mc_copy, frame_address
from offload.mm.memmap import FRAMES_TOGETHER
from offload.table import first_rows
from offload.units import PAGE_SIZE

__all__ = ("batch_copy_needs_migrator", "mark_copied_folios")


@jit
def batch_copy_needs_migrator(mem, call):
    """Whether Python must have the batch list copied.

    Not where the CPU routine is on duty, or nobody is any more (a migrator that left since the batch was chosen): it copies
    here, as migrate_folios_mc_copy() does, unless the nodes' frames lie apart. Nor without frames: all are done.
    """
    c = call.state[0]
    c.batch_copied = 0
    if c.nr_batch == 0:
        return False
    first_rows(call.pair_done, c.nr_batch)[:] = 0           # kept from the batch before
    if frame_address(mem, call.pair_dst[0]) == 0:
        first_rows(call.pair_done, c.nr_batch)[:] = 1
        c.batch_copy_failed = 0
        return False
    sys = mem.sys[0]
    cpu_kernel = sys.offload_cpu_kernel if sys.offload_active else 1 + sys.copy_kernel
    if cpu_kernel and sys.frames_kind == FRAMES_TOGETHER:
        c.cpu_batches += 1
        folios_mc_copy(mem, cpu_kernel - 1, first_rows(call.pair_dst, c.nr_batch), first_rows(call.pair_src, c.nr_batch),
                       first_rows(call.pair_order, c.nr_batch), first_rows(call.pair_done, c.nr_batch))
        c.batch_copy_failed = call.pair_done[c.nr_batch - 1] == 0       # it stops at the first error
        return False
    c.batch_copy_failed = 1                         # until Python says otherwise
    return True


@jit
def mark_copied_folios(mem, call):
    """Settle what the batch copy is worth: marks on destinations (v6), or one verdict for the batch list (the others).

    In v6 its return code plays no part: each destination whose completion says that it was wholly written is marked,
    the rest is copied in the move. In the other protocols completions are only counted: return code 0 makes the whole
    batch list count as copied, any other none of it.
    """
    c = call.state[0]
    c.batch_copied = c.nr_batch > 0 and batch_counts_as_copied(c.protocol, c.batch_copy_failed)
    for i in range(c.nr_batch):
        if i + 8 < c.nr_batch:                      # the copy has driven the records out of the near caches
            prefetch_record(mem.folios, call.pair_dst[i + 8])
        if call.pair_done[i]:
            if call.pair_done[i] != WRITTEN_UNMARKED:
                folio_set_content_copied(mem, c.protocol, call.pair_dst[i])
            c.copied_folios += 1
            c.batched_folios += 1
            if frame_address(mem, call.pair_dst[i]):
                c.copied_bytes += np.int64(PAGE_SIZE) << np.int64(call.pair_order[i])
