"""A DMA provider whose faults and order of completion are scripted: what a driver must be ready for. It is no model of
any engine, knows no time, and copies when it is waited for.
"""

import ctypes

import numpy as np

from offload.kernels.base import DMA_TRANS_ABORTED, DMA_TRANS_NOERROR, FRAME_SHIFT, FRAME_SIZE

__all__ = ("ScriptedProvider",)


class ScriptedProvider:
    """Channels are named by number, descriptors by (channel, index in their batch).

    ``refuses_chan`` {number: errno}, ``refuses_prep`` and ``refuses_submit`` (sets of numbers), ``errors`` {(number, index):
    DMA_TRANS_*}, ``stuck`` {number: descriptors it ends before it does nothing more}, ``reverse``: descriptors end last first;
    ``raises`` {number: exception} in wait(). ``log`` has what was called, in order: (call, channel, ...).
    """

    name = "scripted"

    def __init__(self, nr_chans=4, *, refuses_chan=None, refuses_prep=(), refuses_submit=(), errors=None, stuck=None,
                 reverse=False, raises=None):
        self.nr_chans = nr_chans
        self.refuses_chan, self.refuses_prep, self.refuses_submit = refuses_chan or {}, refuses_prep, refuses_submit
        self.errors, self.stuck, self.reverse, self.raises = errors or {}, stuck or {}, reverse, raises or {}
        self.log = []

    def alloc_chan_resources(self, number):
        self.log.append(("request", number))
        return self.refuses_chan.get(number) or _Chan(self, number)

    def close(self):
        self.log.append(("close", None))


class _Batch:
    def __init__(self, plan, result, interrupt, reverse):
        self.plan, self.result, self.interrupt = plan, result, interrupt
        order = range(len(plan.order))
        self.left = list(reversed(order) if reverse else order)

    @property
    def signalled(self):
        return not self.left if self.interrupt == "each" else len(self.plan.order) - 1 not in self.left


class _Chan:
    def __init__(self, provider, number):
        self.provider, self.number = provider, number
        self.submitted, self.issued = [], []

    def prep_dma_memcpy(self, plan, result, interrupt):
        self.provider.log.append(("prep", self.number, len(plan.order), interrupt))
        assert not result.any() and len(result) == len(plan.order)
        return None if self.number in self.provider.refuses_prep else _Batch(plan, result, interrupt, self.provider.reverse)

    def submit(self, batch):
        self.provider.log.append(("submit", self.number))
        if self.number in self.provider.refuses_submit:
            return -5
        self.submitted.append(batch)
        return 0

    def issue_pending(self):
        self.provider.log.append(("issue", self.number))
        self.issued += self.submitted
        self.submitted = []

    def wait(self, batch, timeout_ns):
        self.provider.log.append(("wait", self.number, timeout_ns))
        if self.number in self.provider.raises:
            raise self.provider.raises[self.number]
        for earlier in self.issued:
            if not batch.signalled:
                self.run(earlier, batch)
        return batch.signalled

    def run(self, batch, until):
        moves = len(batch.left)
        if self.number in self.provider.stuck:
            moves = self.provider.stuck[self.number] - (len(batch.plan.order) - len(batch.left))
        while moves > 0 and batch.left and not (batch is until and batch.signalled):
            moves -= 1
            i = batch.left.pop(0)
            error = self.provider.errors.get((self.number, i))
            if error is None:
                plan = batch.plan
                ctypes.memmove(plan.dst_base + (int(plan.dst[i]) << FRAME_SHIFT),
                               plan.src_base + (int(plan.src[i]) << FRAME_SHIFT), FRAME_SIZE << int(plan.order[i]))
            batch.result[i] = DMA_TRANS_NOERROR if error is None else error

    def terminate_sync(self):
        self.provider.log.append(("terminate", self.number))
        for batch in self.submitted + self.issued:
            batch.result[np.asarray(batch.left, int)] = DMA_TRANS_ABORTED
            batch.left = []
        self.submitted, self.issued = [], []

    def free_chan_resources(self):
        self.provider.log.append(("free", self.number))
