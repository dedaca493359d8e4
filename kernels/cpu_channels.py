"""CPU threads as the channels of a DMA engine: the provider ``cpu``.

Stands for a memcpy driver such as drivers/dma/ptdma, with standing threads (kernels/cpu.py) where that has engines. Each
channel carries out its batches, and the descriptors of a batch, in order; every descriptor has a result of its own. A
CPU copies or crashes, so the results are DMA_TRANS_NOERROR or, after terminate_sync(), DMA_TRANS_ABORTED.
"""

import collections
import time

from offload.errors import InvalidInput
from offload.kernels.cpu import (JOB_RING, MAX_THREADS, Workers, abort_jobs, issue_jobs, kernel_id, submit_job,
                                 wait_for_jobs)
from offload.units import EBUSY, ENOMEM

__all__ = ("CpuProvider",)


class CpuProvider:
    """``nr_chans`` threads as channels, copying with ``kernel`` ("plain" or "stream"); a :class:`DmaProvider`.

    A channel's thread is started when the channel is first requested (-ENOMEM if the system gives none) and sleeps until
    :meth:`close`, after which the next request starts it again. Up to 32 batches may be under way on a channel; one more
    is refused by prep_dma_memcpy().
    """

    name = "cpu"

    def __init__(self, nr_chans, kernel="plain"):
        self._kernel = kernel_id(kernel)
        if isinstance(nr_chans, bool) or not isinstance(nr_chans, int) or not 1 <= nr_chans <= MAX_THREADS:
            raise InvalidInput(f"channels {nr_chans!r} cannot be; give a number from 1 to {MAX_THREADS}")
        self.nr_chans, self.kernel = nr_chans, kernel
        self._workers = None

    def alloc_chan_resources(self, number):
        if self._workers is None:
            self._workers = Workers(self.nr_chans)
        return _CpuChan(self._workers.table, number, self._kernel) if self._workers.start(number) else -ENOMEM

    def close(self):
        workers, self._workers = self._workers, None
        if workers:
            workers.close()


class _Batch:
    def __init__(self, plan, result):
        self.plan, self.result = plan, result
        self.count = 0                              # how many jobs the worker had been given with this one


class _CpuChan:
    """See :class:`~offload.kernels.base.DmaProviderChan`. As its engine ends descriptors in order, who signals is all one."""

    def __init__(self, table, worker, kernel):
        self._table, self._worker, self._kernel = table, worker, kernel
        self._under_way = collections.deque()       # submitted, and not known to have ended; keeps the arrays alive

    def prep_dma_memcpy(self, plan, result, interrupt):
        return _Batch(plan, result) if len(self._under_way) < JOB_RING else None

    def submit(self, batch):
        if len(self._under_way) == JOB_RING:
            return -EBUSY
        batch.count = submit_job(self._table, self._worker, self._kernel, *batch.plan, batch.result)
        self._under_way.append(batch)
        return 0

    def issue_pending(self):
        issue_jobs(self._table, self._worker)

    def wait(self, batch, timeout_ns):
        until = time.monotonic_ns() + timeout_ns
        while wait_for_jobs(self._table, self._worker, batch.count, timeout_ns) != 0:
            # A signal, whose handler has run by now; or the time is over.
            timeout_ns = until - time.monotonic_ns()
            if timeout_ns <= 0:
                return False
        while self._under_way and self._under_way[0].count <= batch.count:
            self._under_way.popleft()
        return True

    def terminate_sync(self):
        if self._under_way:
            abort_jobs(self._table, self._worker)
            self._under_way.clear()

    def free_chan_resources(self):
        pass
