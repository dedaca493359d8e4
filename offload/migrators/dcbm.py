"""dcbm: the reference driver of the series, which has a DMA engine copy the batch.

Stands for drivers/migrate_offload/dcbm/dcbm.c of RFC v6 4/5 (2026-06-30, not merged; v5 is the same but for the reason
mask). What one batch does:

1. Channels: c = min(nr_dma_chan, folios, 16) are requested, up to the first refusal; none is -ENODEV.
2. Whole folios are split over them by count, in list order; a 2 MiB folio never uses two channels.
3. Source and destination of each channel are mapped; an IOMMU that merges one side more than the other is -EINVAL.
4. Descriptors are prepared and submitted, one for each folio (or merged run); a refusal is -EIO. Then all are issued.
5. The channels are waited for one after the other, 10 s each; -ETIMEDOUT.
6. Completions: see below.
7. Always: terminate, release.

*Completions.* The driver sees the callback of a channel's last descriptor and no result: all folios are taken as copied,
or after any error none. That is ``completion="last"``, with its faults: an engine that ends out of order, or fails in
silence, leaves folios that count as copied and are not. The default, ``completion="descriptor"``, is ours: every
descriptor signals and has a result, and whatever was wholly copied is kept when others fail or the time is over.

Poison in a source is not detected: what an engine does there is its own affair, and the engines here read on.

Leaves out: sg tables and the memory they need (-ENOMEM), the DMA mappings themselves.
"""

import numpy as np

from offload.copy_offload import WRITTEN_UNMARKED, format_reason_mask, parse_reason_mask
from offload.dmaengine import DmaDevice, dma_request_chan
from offload.errors import InvalidInput
from offload.kernels.base import DMA_TRANS_NOERROR
from offload.kernels.cpu_channels import CpuProvider
from offload.units import EINVAL, EIO, ENODEV, ETIMEDOUT, parse_unsigned

__all__ = ("Dcbm", "DcbmParameters", "split_by_count", "merged_runs", "MAX_DMA_CHAN", "TIMEOUT_NS", "COMPLETIONS")

MAX_DMA_CHAN = 16
TIMEOUT_NS = 10_000_000_000
COMPLETIONS = ("descriptor", "last")


def split_by_count(nr_folios, nr_chans):
    """Where each channel's folios begin, and the end: channel i has floor(n(i+1)/c) - floor(n i/c) of them, in order."""
    return [nr_folios * i // nr_chans for i in range(nr_chans + 1)]


def merged_runs(frames, order):
    """Which entries begin a run of adjacent frames, as an IOMMU merges them in list order (bool array)."""
    begins = np.ones(len(frames), bool)
    begins[1:] = frames[1:] != frames[:-1] + (np.int64(1) << order[:-1].astype(np.int64))
    return begins


class Dcbm:
    """Copies batches with a DmaDevice, as the file says; one folio a descriptor.

    ``nr_dma_chan``: channels wanted, 1 to 16. ``completion``: "descriptor" or "last". ``iommu_merges``: adjacent folios
    are merged into one mapped entry, so that a descriptor, and its result, stands for all folios of a run; a batch whose
    two sides merge differently is -EINVAL. ``timeout_ns``: for each channel.

    Counters: ``folios_migrated`` and ``folios_failures``. In the driver's rule one of them grows by the whole batch; with
    completions per descriptor, by the folios that were copied and that were not. A batch without a channel counts in
    neither.
    """

    name = "dcbm"
    owner = "dcbm"
    meets_poison = False

    def __init__(self, device, nr_dma_chan=1, *, completion="descriptor", iommu_merges=False, timeout_ns=TIMEOUT_NS):
        if completion not in COMPLETIONS:
            raise InvalidInput(f"completion {completion!r} is not known; use one of: {', '.join(COMPLETIONS)}")
        if isinstance(timeout_ns, bool) or not isinstance(timeout_ns, int) or timeout_ns < 1:
            raise InvalidInput(f"timeout_ns {timeout_ns!r} cannot be; the driver's is {TIMEOUT_NS}")
        self.device = device
        self.nr_dma_chan = nr_dma_chan
        self.completion, self.iommu_merges, self.timeout_ns = completion, iommu_merges, timeout_ns
        self.folios_migrated = self.folios_failures = 0

    @classmethod
    def on_cpu(cls, channels=1, kernel="plain", **options):
        """One with ``channels`` CPU threads as the channels of its engine, all of them wanted."""
        check_nr_dma_chan(channels)
        return cls(DmaDevice(CpuProvider(channels, kernel)), channels, **options)

    @property
    def reaches_devices(self):
        """Whether its channels copy to and from device memory."""
        return getattr(self.device.provider, "reaches_devices", False)

    @property
    def needs_pinned(self):
        """Whether they reach host memory only where it is pinned."""
        return getattr(self.device.provider, "needs_pinned", False)

    @property
    def nr_dma_chan(self):
        return self._nr_dma_chan

    @nr_dma_chan.setter
    def nr_dma_chan(self, value):
        check_nr_dma_chan(value)
        self._nr_dma_chan = value

    def close(self):
        """Close the device."""
        self.device.close()

    def offload_copy(self, batch, done):
        """Copy a FolioBatch: 0, -ENODEV, -EINVAL, -EIO or -ETIMEDOUT; ``done`` says which folios count as copied."""
        result = np.zeros(len(batch.src), np.uint8)
        chans = []
        rc = -EIO                                   # of a lost device, whose exception passes through here
        try:
            self._request_chans(chans, min(self.nr_dma_chan, len(result), MAX_DMA_CHAN))
            rc = self._run(chans, batch, result) if chans else -ENODEV
        finally:
            for chan in chans:
                chan.release()                      # which ends what is under way first
            if chans:
                rc = self._complete(rc, len(chans), batch, result, done)
        return rc

    def _request_chans(self, chans, wanted):
        while len(chans) < wanted:
            chan = dma_request_chan(self.device)
            if isinstance(chan, int):
                break
            chans.append(chan)

    def _run(self, chans, batch, result):
        # Steps 2 to 5.
        first = split_by_count(len(result), len(chans))
        shares = [slice(start, stop) for start, stop in zip(first, first[1:])]
        if self.iommu_merges and any(self._mapping_differs(batch, share) for share in shares):
            return -EINVAL
        interrupt = "last" if self.completion == "last" else "each"
        txs = []
        for chan, share in zip(chans, shares):
            tx = chan.prep_dma_memcpy(batch.plan(share), result[share], interrupt)
            if tx is None or chan.submit(tx) < 0:
                return -EIO
            txs.append(tx)
        for chan in chans:
            chan.issue_pending()
        for chan, tx in zip(chans, txs):
            if not chan.wait(tx, self.timeout_ns):
                return -ETIMEDOUT
        return 0

    @staticmethod
    def _mapping_differs(batch, share):
        # The driver compares the counts only. Equal counts of unequal entries would copy wrongly; we refuse those too.
        order = batch.order[share]
        return not np.array_equal(merged_runs(batch.dst[share], order), merged_runs(batch.src[share], order))

    def _complete(self, rc, nr_chans, batch, result, done):
        # Step 6.
        copied = result == DMA_TRANS_NOERROR
        nr_folios = len(copied)
        if self.completion == "last":
            # No result was read: after an error those that were written do not say so.
            done[:] = 1 if rc == 0 else copied * np.uint8(WRITTEN_UNMARKED)
            nr_migrated = nr_folios if rc == 0 else 0
        else:
            if self.iommu_merges:
                copied = self._whole_runs(copied, nr_chans, batch)
            done[:] = copied
            nr_migrated = int(np.count_nonzero(copied))
            if rc == 0 and nr_migrated < nr_folios:
                rc = -EIO
        self.folios_migrated += nr_migrated
        self.folios_failures += nr_folios - nr_migrated
        return rc

    @staticmethod
    def _whole_runs(copied, nr_chans, batch):
        begins = merged_runs(batch.src, batch.order)
        begins[split_by_count(len(copied), nr_chans)[:-1]] = True
        begins = np.flatnonzero(begins)
        whole = np.logical_and.reduceat(copied, begins)
        return np.repeat(whole, np.diff(begins, append=len(copied)))


def check_nr_dma_chan(value):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DMA_CHAN:
        raise InvalidInput(f"nr_dma_chan {value!r} cannot be; give a number from 1 to {MAX_DMA_CHAN}")


class DcbmParameters:
    """The knobs of a Dcbm as text, as a shell finds them in /sys/module/dcbm/parameters/ (v6).

    ``offloading``: on registers the driver at the hatch, off takes it away; what it is already is no change, a refusal goes
    to the writer and it stays off. ``nr_dma_chan``: 1 to 16, from the next batch on. ``reason_mask``: kept while off,
    applied at once while on. ``folios_migrated``, ``folios_failures``: any write resets to 0. How ``offloading`` reads (Y or
    N, as the kernel's bool parameters) is our assumption.
    """

    names = ("offloading", "nr_dma_chan", "reason_mask", "folios_migrated", "folios_failures")

    def __init__(self, dcbm, copy_offload):
        self.dcbm, self.copy_offload = dcbm, copy_offload
        self._reason_mask = parse_reason_mask("all")

    @property
    def offloading(self):
        return self.copy_offload.migrator is self.dcbm

    def read(self, name):
        """The text of a knob, with its newline."""
        self._known(name)
        if name == "offloading":
            return "Y\n" if self.offloading else "N\n"
        if name == "reason_mask":
            return format_reason_mask(self._reason_mask) + "\n"
        return f"{getattr(self.dcbm, name)}\n"

    def write(self, name, text):
        """Set a knob. InvalidInput (-EINVAL) for a text it cannot take; what registration refuses with is passed on."""
        self._known(name)
        if name == "offloading":
            self._set_offloading(parse_bool(text))
        elif name == "nr_dma_chan":
            number = parse_unsigned(text)
            check_nr_dma_chan(text if number is None else number)
            self.dcbm.nr_dma_chan = number
        elif name == "reason_mask":
            mask = parse_reason_mask(text)
            if self.offloading:
                self.copy_offload.set_reason_mask(self.dcbm, mask)
            self._reason_mask = mask
        else:
            setattr(self.dcbm, name, 0)

    def _set_offloading(self, on):
        if on and not self.offloading:
            self.copy_offload.register(self.dcbm, self._reason_mask)
        elif not on and self.offloading:
            self.copy_offload.unregister(self.dcbm)

    def _known(self, name):
        if name not in self.names:
            raise InvalidInput(f"dcbm has no parameter {name!r}; it has {', '.join(self.names)}")


def parse_bool(text):
    """A boolean word as kstrtobool() (lib/kstrtox.c, v7.3) reads it: by its first character, after "o" its second."""
    word = str(text)[:2].lower()
    if word[:1] in tuple("yte1") or word == "on":
        return True
    if word[:1] in tuple("nfd0") or word == "of":
        return False
    raise InvalidInput(f"{text!r} is no boolean word; write y, n, 1, 0, on or off")
