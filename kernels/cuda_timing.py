"""How long the engines of a GPU take for one batch, and what the device gives at most: events, clocks and nothing else.

Three times, as a copy has three prices: what the CPU pays to queue it, how long the device is at it, and how long the
caller waits in all. Ceilings are single large copies, measured as the device sees them. What a batch is made of, and
whether its bytes arrived, is the caller's business (offload/experiment/alone.py).

GB/s everywhere are payload: each byte copied counts once, where figures of memory bandwidth often count it twice.
"""

import contextlib
import statistics
import time
from typing import NamedTuple

import numpy as np

from offload.errors import EngineUnavailable, OutOfMemory
from offload.kernels.base import DMA_TRANS_NOERROR, FRAME_SIZE, CopyPlan
from offload.kernels.cuda_driver import CudaError
from offload.kernels.cuda_engines import PinnedMemory
from offload.kernels.cuda_memory import DeviceMemory, Mover
from offload.kernels.cuda_plan import split_evenly
from offload.units import format_size

__all__ = ("BatchTimes", "CudaTimer", "PinnedRows", "DeviceRows", "measure_ceilings", "CEILINGS")

_FOR_EVER_NS = 1 << 62
WARM_UPS = 4
"""Of each ceiling, as in nvbandwidth: the first copies after a pause may be slower, and a ceiling is what nothing is above."""


class BatchTimes(NamedTuple):
    """Of one batch, ns. ``plan_ns``: merging or sorting, and the list into its pinned buffer; None where the list was there
    already. ``submit_ns``: queueing, two events a channel among it. ``device_ns``: by events, from the first channel's start
    to the last one's end. ``whole_ns``: from the plan, or else from the first call, to the last completion."""

    plan_ns: int | None
    submit_ns: int
    device_ns: int
    whole_ns: int


class CudaTimer:
    """Times batches on the channels of a CudaProvider, split over them as CudaBackend does. close() when done.

    ``clock`` gives ns. The provider stays its owner's.
    """

    def __init__(self, provider, clock=time.perf_counter_ns):
        self.provider, self.clock = provider, clock
        self._events = []

    def close(self):
        for event in self._events:
            self.provider.device.quietly("cuEventDestroy_v2", event)
        self._events = []

    def run(self, plan, done, *, resident=False):
        """Carry out ``plan`` once: its BatchTimes. ``done`` as for CopyBackend.copy().

        ``resident``: cuda-kernel's list is made and on the device before the clock starts. EngineUnavailable if the device
        is out of service or refuses.
        """
        device = self.provider.device
        channels = [self.provider.alloc_chan_resources(number) for number in range(self.provider.nr_chans)]
        if any(isinstance(channel, int) for channel in channels):
            raise EngineUnavailable(f"{self.provider.name} cannot be timed: {device.fault}")
        result = np.zeros(plan.nr_folios, np.uint8)
        shares = split_evenly(plan.nr_folios, len(channels))
        starts, stops = self._two_events_each(len(channels))
        try:
            started = self.clock()
            batches = [self._prepare(channel, plan, result, share) for channel, share in zip(channels, shares)]
            planned = self.clock()
            if resident:
                self._upload(channels, batches)
                started = planned = self.clock()
            for channel, batch, start, stop in zip(channels, batches, starts, stops):
                if channel.submit(batch):
                    raise EngineUnavailable(f"{self.provider.name} refuses the batch: {device.fault}")
                device.driver("cuEventRecord", start, channel.stream)
                channel.issue_pending()
                device.driver("cuEventRecord", stop, channel.stream)
            submitted = self.clock()
            for channel, batch in zip(channels, batches):
                channel.wait(batch, _FOR_EVER_NS)
            ended = self.clock()
            for channel in channels:
                device.driver("cuStreamSynchronize", channel.stream)
            device_ns = max(device.driver.elapsed_ns(starts[0], stop) for stop in stops)
        except CudaError as error:
            device.fail(self.provider.name, error)
            raise EngineUnavailable(f"{self.provider.name} cannot be timed: {error}") from None
        finally:
            for channel in channels:
                channel.free_chan_resources()
        done[:] = result == DMA_TRANS_NOERROR
        return BatchTimes(None if resident else planned - started, submitted - planned, device_ns, ended - started)

    def _prepare(self, channel, plan, result, share):
        part = CopyPlan(plan.dst_base, plan.src_base, *(array[slice(*share)] for array in plan[2:]))
        batch = channel.prep_dma_memcpy(part, result[slice(*share)], "each")
        if batch is None:
            raise EngineUnavailable(f"{self.provider.name} refuses the batch: {self.provider.device.fault}")
        return batch

    def _upload(self, channels, batches):
        for channel, batch in zip(channels, batches):
            channel.way.upload(batch)
            channel.driver("cuStreamSynchronize", channel.stream)

    def _two_events_each(self, nr_channels):
        device = self.provider.device
        device.enter()
        while len(self._events) < 2 * nr_channels:
            self._events.append(device.driver.event(timing=True))
        return self._events[0:2 * nr_channels:2], self._events[1:2 * nr_channels:2]


class PinnedRows:
    """Frames in pinned memory: DeviceRows' members. OutOfMemory if there is no room."""

    def __init__(self, device, nr_frames):
        try:
            self._memory = PinnedMemory(device, nr_frames * FRAME_SIZE)
        except CudaError as error:
            raise OutOfMemory(f"no room for {format_size(nr_frames * FRAME_SIZE)} of pinned memory ({error}); use a smaller --size") from None
        self.nbytes, self.base = self._memory.nbytes, self._memory.address
        self._rows = self._memory.view().reshape(-1, FRAME_SIZE)

    def put(self, frame, rows):
        self._rows[frame:frame + len(rows)] = rows

    def get(self, frame, nr):
        return self._rows[frame:frame + nr]

    def close(self):
        self._rows = None
        self._memory.close()


class DeviceRows:
    """Frames in device memory, for Python to fill and look at. OutOfMemory if there is no room.

    ``base`` is the address of frame 0; ``put`` and ``get`` copy rows of 4096 bytes in and out, and wait for it.
    """

    def __init__(self, device, nr_frames):
        self.nbytes = nr_frames * FRAME_SIZE
        try:
            self._memory, self._mover = DeviceMemory(device, self.nbytes), Mover(device)
        except CudaError as error:
            raise OutOfMemory(f"no room for {format_size(self.nbytes)} in the memory of {device.name} ({error}); use a smaller --size") from None
        self.base = self._memory.address

    def put(self, frame, rows):
        """Write contiguous uint8 ``rows`` (n, 4096) to the frames from ``frame`` on."""
        self._mover.copy(self.base + frame * FRAME_SIZE, rows.ctypes.data, rows.nbytes)
        self._mover.sync()

    def get(self, frame, nr):
        """The bytes of ``nr`` frames, in an array of their own."""
        rows = np.empty((nr, FRAME_SIZE), np.uint8)
        self._mover.copy(rows.ctypes.data, self.base + frame * FRAME_SIZE, rows.nbytes)
        self._mover.sync()
        return rows

    def close(self):
        """Give it all back; nothing may be copying. Twice is once."""
        self._memory = self._mover = None


# Ceilings.

CEILINGS = {"device,device": (("device", "device"),), "pinned,device": (("pinned", "device"),),
            "device,pinned": (("device", "pinned"),), "both ways": (("pinned", "device"), ("device", "pinned"))}
"""The large copies behind each: (from, to), each on a stream of its own."""


def measure_ceilings(device, memory, nbytes, repeat):
    """What large cuMemcpyAsync calls give, as the device sees it: {name of CEILINGS: {bytes, device_ns, gbps}}.

    ``memory[kind]`` are the addresses of two pieces of ``nbytes``, "device" and "pinned" alike: a copy goes from the first
    of one to the second of the other. Each is made WARM_UPS times to warm up, then ``repeat`` times. ``gbps`` is the median, payload,
    of both directions together where there are two. CudaError for what the driver refuses.
    """
    device.enter()
    driver = device.driver
    with contextlib.ExitStack() as held:
        streams, events = [], []
        for _ in range(2):
            streams.append(driver.stream())
            held.callback(device.quietly, "cuStreamDestroy_v2", streams[-1])
        for _ in range(4):
            events.append(driver.event(timing=True))
            held.callback(device.quietly, "cuEventDestroy_v2", events[-1])
        out = {}
        for name, copies in CEILINGS.items():
            samples = []
            for _ in range(WARM_UPS + repeat):
                for (src, dst), stream, start, stop in zip(copies, streams, events[:2], events[2:]):
                    driver("cuEventRecord", start, stream)
                    driver("cuMemcpyAsync", memory[dst][1], memory[src][0], nbytes, stream)
                    driver("cuEventRecord", stop, stream)
                for stream in streams:
                    driver("cuStreamSynchronize", stream)
                samples.append(max(driver.elapsed_ns(events[0], stop) for _, stop in zip(copies, events[2:])))
            samples = samples[WARM_UPS:]
            median = statistics.median(samples)
            out[name] = {"bytes": nbytes * len(copies), "device_ns": samples,
                         "gbps": nbytes * len(copies) / median if median else None}
        return out
