"""Limits: what the memory gives without migration, measured between the runs that are held against it.

For each copy kernel and number of threads, the scattered copy of frames that a migration has just moved: the same
sources to the same destinations in the same sequence, as one plan. And one contiguous block. With a node in device memory the
limit of the engines that copy folio by folio is that, without migration.
"""

import statistics
import time

import numpy as np

from offload.errors import BrokenInvariant
from offload.mm.memmap import FRAMES_FAR
from offload.units import PAGE_SIZE

__all__ = ("Limits",)


class Limits:
    """Samples of each limit, in GB/s. ``close()`` ends the threads."""

    def __init__(self, engines):
        self._backends = {engine.limit_key: engine.make_backend() for engine in engines}
        self._scattered = {}            # (key, order) -> samples
        self._contiguous = []

    def close(self):
        for backend in self._backends.values():
            backend.close()

    def measure_scattered(self, engine, frames, dst, src, order):
        """Copy folios ``src`` to ``dst`` (int64 pfns of machine frames, no overlap) as ``engine`` copies: one sample."""
        orders, done = np.full(len(src), order, np.uint8), np.full(len(src), 2, np.uint8)
        done[:] = 0                     # resident before the clock starts
        plan, backend = frames.plan(dst, src, orders), self._backends[engine.limit_key]
        by_folio = frames.kind == FRAMES_FAR and not engine.on_gpu
        wall = time.perf_counter_ns()
        error = frames.mc_copy(0, dst, src, orders, done) if by_folio else backend.copy(plan, done)
        wall = time.perf_counter_ns() - wall
        if error or not done.all():
            raise BrokenInvariant(f"the copy kernel {backend.name} left {int((done == 0).sum())} of {len(done)} folios "
                                  f"uncopied (error {error}); please report it")
        self._scattered.setdefault((engine.limit_key, order), []).append((len(src) * PAGE_SIZE << order) / wall)

    def measure_contiguous(self, frames, dst, src, nr_pages):
        """Copy one block of frames, from pfn ``src`` to ``dst``: one sample."""
        wall = time.perf_counter_ns()
        frames.copy_block(dst, src, nr_pages)
        wall = time.perf_counter_ns() - wall
        self._contiguous.append(nr_pages * PAGE_SIZE / wall)

    def medians(self):
        """The ``limits`` of a result: medians in GB/s, None or left out where nothing was measured."""
        scattered = {}
        for key in self._backends:
            by_order = {str(order): statistics.median(samples) for (of, order), samples in sorted(self._scattered.items())
                        if of == key}
            if by_order:
                scattered[key] = by_order
        return {"contiguous_copy_gbps": statistics.median(self._contiguous) if self._contiguous else None,
                "scattered_copy_gbps": scattered}
