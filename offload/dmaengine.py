"""The DMA engine: channels that copy by themselves, prepared descriptors, and a result for each.

Stands for drivers/dma/dmaengine.c and the client side of include/linux/dmaengine.h (v7.3), as far as a memcpy client
needs them. What moves the bytes is a *provider* (:class:`offload.kernels.base.DmaProvider`, the contract to read before
writing one): CPU threads or CUDA streams stand for channels, later modelled engines with the habits of real ones.

Descriptors come in batches: ``prep_dma_memcpy`` takes a CopyPlan, one descriptor for each of its entries, where the
kernel's client calls once for each. A call per folio would cost more than copying 4 KiB.

    request -> prep -> submit -> issue_pending -> wait ... -> terminate_sync -> release

Leaves out: channel filters by name and device (a device is handed in), slave and cyclic transfers, mapping for an IOMMU
(dcbm.py), polling.
"""

from offload.errors import InvalidInput
from offload.units import ENODEV

__all__ = ("DmaDevice", "DmaChan", "DmaTx", "dma_request_chan")

PREPARED, SUBMITTED, ISSUED, ENDED = "prepared", "submitted", "issued", "ended"


class DmaTx:
    """A batch of prepared descriptors: struct dma_async_tx_descriptor, many at once.

    ``result[i]`` is DMA_IN_PROGRESS or the DMA_TRANS_* of descriptor i; to be read after wait() or terminate_sync().
    ``cookie`` numbers the submissions of the channel from 1; 0 before.
    """

    def __init__(self, chan, plan, result, prepared):
        self.chan, self.plan, self.result, self.prepared = chan, plan, result, prepared
        self.cookie = 0
        self.state = PREPARED

    def __repr__(self):
        return f"DmaTx({len(self.plan.order)} descriptors, {self.state})"


class DmaChan:
    """A channel that a client holds: struct dma_chan. Made by :func:`dma_request_chan`; release() when done.

    Calls out of turn (a batch submitted twice, a released channel) are InvalidInput. A failure of the provider leaves
    the channel good for terminate_sync() and release().
    """

    def __init__(self, device, number, provided):
        self.device, self.number = device, number
        self._provided = provided
        self._cookie = 0
        self._active = []                           # submitted, not ended

    def __repr__(self):
        return f"<channel {self.device.name}:{self.number}>"

    def prep_dma_memcpy(self, plan, result, interrupt="each"):
        """Prepare one descriptor for each entry of ``plan``: a DmaTx, or None if the provider refuses.

        ``result`` is a uint8 array of its length, zeroed. ``interrupt``: "each" descriptor signals its end, or the "last".
        """
        prepared = self._held().prep_dma_memcpy(plan, result, interrupt)
        return None if prepared is None else DmaTx(self, plan, result, prepared)

    def submit(self, tx):
        """Queue ``tx``: its cookie (> 0), or a negative errno and it will never run."""
        provided = self._held()
        self._expect(tx, PREPARED)
        error = provided.submit(tx.prepared)
        if error:
            return error
        self._cookie += 1
        tx.cookie, tx.state = self._cookie, SUBMITTED
        self._active.append(tx)
        return tx.cookie

    def issue_pending(self):
        """Start everything that is submitted; does not wait."""
        self._held().issue_pending()
        for tx in self._active:
            tx.state = ISSUED

    def wait(self, tx, timeout_ns):
        """Sleep until the descriptors of ``tx`` that signal have ended: True; or False after ``timeout_ns``."""
        provided = self._held()
        if tx.state is ENDED and tx.chan is self:
            return True
        self._expect(tx, ISSUED)
        return provided.wait(tx.prepared, timeout_ns)

    def terminate_sync(self):
        """End everything on the channel: what has no result yet has DMA_TRANS_ABORTED, and nothing is written any more."""
        self._held().terminate_sync()
        for tx in self._active:
            tx.state = ENDED
        self._active.clear()

    def release(self):
        """Give the channel back (dma_release_channel), after ending what is left on it."""
        self.terminate_sync()
        provided, self._provided = self._provided, None
        provided.free_chan_resources()
        self.device._free.append(self.number)
        self.device._free.sort(reverse=True)

    def _held(self):
        if self._provided is None:
            raise InvalidInput(f"{self!r} has been released; request one")
        return self._provided

    def _expect(self, tx, state):
        if tx.chan is not self or tx.state is not state:
            raise InvalidInput(f"{tx!r} of {tx.chan!r} is not {state} on {self!r}; prepare, submit and issue it there first")


class DmaDevice:
    """A provider with its channels: struct dma_device. ``close()`` ends the provider; all channels must be released."""

    def __init__(self, provider):
        self.provider = provider
        self._free = list(range(provider.nr_chans))[::-1]

    @property
    def name(self):
        return self.provider.name

    @property
    def nr_free_chans(self):
        return len(self._free)

    def close(self):
        self.provider.close()


def dma_request_chan(device):
    """A free channel of ``device``, the lowest first, or -ENODEV if there is none, or the provider's own errno."""
    if not device._free:
        return -ENODEV
    number = device._free[-1]
    provided = device.provider.alloc_chan_resources(number)
    if isinstance(provided, int):
        return provided
    device._free.pop()
    return DmaChan(device, number, provided)
