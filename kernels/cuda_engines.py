"""The copies of a GPU: streams as channels, three ways to queue a batch on one, and the backends made of them.

``loop`` queues one cuMemcpyAsync for each merged run, ``batch`` one cuMemcpyBatchAsync for up to 4,096 runs, ``kernel``
one launch of copy_folios() for all. Stands for the driver of a DMA engine (drivers/dma/, v7.3): a :class:`CudaProvider`
keeps the contract of DmaProvider, a :class:`CudaBackend` that of CopyBackend over all channels of one. What is queued
goes through cuda_driver; how a device is found is cuda's business.

Nothing of this has been run on a GPU yet. What tests without one prove: docs/gpu.md.

*Completion* is known per unit: a run, a chunk, a launch. Its entries are done when the event behind it is over. A unit
that cannot be queued fails alone; the units behind it are queued all the same.

*An error takes the engine out of service*: what was under way is waited out, the failed units' entries are not done,
one line says so, and every later batch is refused. The migration path then copies by itself, as with any migrator that
fails.
"""

import collections
import contextlib
import ctypes
import sys
import time

import numpy as np

from offload.errors import EngineUnavailable, InvalidInput
from offload.kernels.base import (
    DMA_IN_PROGRESS, DMA_TRANS_ABORTED, DMA_TRANS_NOERROR, DMA_TRANS_WRITE_FAILED, CopyPlan, refuse_overlap,
)
from offload.kernels.cuda_driver import (
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, MOST_DESCRIPTORS, CudaError, KernelArguments,
)
from offload.kernels.cuda_plan import TooFarApart, lay_out, merge_runs, split_chunks, split_evenly
from offload.kernels.ranges import named_range
from offload.units import EIO, ENODEV

__all__ = ("Device", "PinnedMemory", "CudaProvider", "CudaBackend", "WAYS", "MAX_CHANNELS", "BLOCK_THREADS")

MAX_CHANNELS = 16
"""As dcbm's nr_dma_chan."""
BLOCK_THREADS = 256
BLOCKS_PER_SM = 4
"""Of the persistent grid: 32 warps an SM, which have 128 KiB under way. Not tuned: no device has seen it."""
SLOTS = 4
"""Staging buffers of a channel of cuda-kernel: lists are written while others are read. Two would keep it busy; a client
may prepare more batches than that before it waits."""

_SPIN_NS = 5_000_000
"""So long the end of a batch is asked for without a pause: a nap of 20 us takes four times that and more."""
_NAP_S = 20e-6
_FOR_EVER_NS = 1 << 62


class Device:
    """A GPU that is open: its driver, primary context, and the compiled kernel. ``fault`` is why it is out of service.

    ``compile_kernel(capability, name)`` gives the image of copy_folios.cu or checksum_pages.cu for a (major, minor). CudaError if
    the driver refuses. ``say`` gets the one line about a fault.
    """

    def __init__(self, driver, number, compile_kernel, say=lambda line: print(line, file=sys.stderr, flush=True)):
        self.driver, self.fault = driver, None
        self._compile, self._say = compile_kernel, say
        handle = driver.device(number)
        self._context = driver.retain_context(handle)
        self._functions = {}
        self.enter()
        self.name = driver.device_name(handle)
        self.nr_sms = driver.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle)
        self.capability = tuple(driver.attribute(part, handle) for part in (CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                                                            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))

    def enter(self):
        """Make its context current in this thread, as every call needs it."""
        self.driver("cuCtxSetCurrent", self._context)

    def enter_quietly(self):
        self.quietly("cuCtxSetCurrent", self._context)

    def quietly(self, name, *arguments):
        """A call whose failure changes nothing: what is given back on a lost device is lost with it."""
        with contextlib.suppress(CudaError):
            self.driver(name, *arguments)

    def kernel(self, name):
        """The kernel of that name, compiled and loaded at first use. EngineUnavailable where the compiler or the driver refuses."""
        if name not in self._functions:
            image = self._compile(self.capability, name)
            self.enter()
            try:
                self._functions[name] = self.driver.load_function(image, name)
            except CudaError as error:
                raise EngineUnavailable(f"the driver does not load the kernel {name}: {error}") from None
        return self._functions[name]

    def fail(self, engine, error, then="the path copies folio by folio from here on"):
        """Take the device out of service; the first time it is said, and what comes of it."""
        if self.fault is None:
            self.fault = str(error)
            self._say(f"offload: {engine} on {self.name} is out of service: {error}; {then}")


class PinnedMemory:
    """Page-locked host memory, which host and device reach at one ``address``. CudaError if there is none left."""

    def __init__(self, device, nbytes):
        device.enter()
        self._device = device
        self.nbytes, self.address = nbytes, device.driver.host_alloc(nbytes)

    def view(self):
        """Its bytes as a writable uint8 array, good until close()."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))

    def close(self):
        """Give it back; nothing may be copying. Twice is once."""
        address, self.address = self.address, None
        if address:
            self._device.enter_quietly()
            self._device.quietly("cuMemFreeHost", address)


class Batch:
    """What is prepared on a channel. ``unit_of[i]`` is the unit that entry i belongs to (None: there is but one), ``status[u]`` how
    unit u ended.

    ``segments`` are (event, start, stop): when the event is over, those of units start .. stop - 1 that were queued have
    ended. ``work`` is what the way of copying needs, and what must stay alive meanwhile.
    """

    def __init__(self, plan, result, interrupt, work, unit_of, nr_units):
        self.plan, self.result, self.interrupt = plan, result, interrupt
        self.work, self.unit_of = work, unit_of
        self.status = np.full(nr_units, DMA_IN_PROGRESS, np.uint8)
        self.segments = collections.deque()
        self._published = False

    def end(self, start, stop, status):
        """Units that are still in progress end like this."""
        units = self.status[start:stop]
        units[units == DMA_IN_PROGRESS] = status
        self._published = False

    def publish(self):
        """Give each entry the result of its unit."""
        if self._published:
            return
        if self.unit_of is None:
            self.result[:] = self.status
        else:
            np.take(self.status, self.unit_of, out=self.result, mode="clip")
        self._published = True

    @property
    def ended(self):
        """Whether the descriptors that signal have a result."""
        if self.interrupt == "last" and len(self.result):
            return self.status[0 if self.unit_of is None else self.unit_of[-1]] != DMA_IN_PROGRESS
        return not (self.status == DMA_IN_PROGRESS).any()


# 1. Ways of copying. prepare() gives (work, unit_of, number of units), or None if there is no room; queue() queues the
#    units of a batch on the channel's stream and has each marked by an event.

class Loop:
    """One cuMemcpyAsync for each merged run, which is a unit. One event for all: one each would double the cost."""

    def __init__(self, channel):
        self.channel, self.options = channel, channel.provider

    def prepare(self, plan):
        runs = merge_runs(plan, check=self.options.check)
        return runs, runs.run_of, len(runs)

    def queue(self, batch):
        channel, runs = self.channel, batch.work
        memcpy, stream = channel.driver.functions["cuMemcpyAsync"], channel.stream
        for unit, (dst, src, nbytes) in enumerate(zip(runs.dst.tolist(), runs.src.tolist(), runs.nbytes.tolist())):
            code = memcpy(dst, src, nbytes, stream)
            if code:
                channel.failed(batch, unit, unit + 1, channel.driver.error("cuMemcpyAsync", code))
        channel.mark(batch, 0, len(runs))

    def release(self, batch):
        """Nothing reads or writes ``batch.work`` any more."""

    def close(self):
        pass


class Chunks(Loop):
    """One cuMemcpyBatchAsync for each chunk of merged runs; a chunk is a unit."""

    def prepare(self, plan):
        runs = merge_runs(plan, check=self.options.check)
        chunks = split_chunks(len(runs), self.options.most)
        return (runs, chunks), runs.run_of // self.options.most, len(chunks)

    def queue(self, batch):
        channel, (runs, chunks) = self.channel, batch.work
        for unit, (start, stop) in enumerate(chunks):
            dst, src, nbytes = (array[start:stop] for array in runs[:3])
            try:
                channel.driver.memcpy_batch_async(dst, src, nbytes, channel.stream, overlap=self.options.overlap)
            except CudaError as error:
                channel.failed(batch, unit, unit + 1, error)
            else:
                channel.mark(batch, unit, unit + 1)


class Kernel:
    """One launch for the whole batch, which is the unit. Its list of pairs goes up in front of it, on the same stream."""

    def __init__(self, channel):
        self.channel, self.options = channel, channel.provider
        self.function = channel.device.kernel("copy_folios")
        self.slots = [Slot(channel.device) for _ in range(SLOTS)]

    def prepare(self, plan):
        slot = next((slot for slot in self.slots if not slot.used), None)
        if slot is None:
            return None
        try:
            launch = lay_out(plan, check=self.options.check, room=slot.room)
        except TooFarApart:                         # several memories on one side of a batch: the other ways can
            return None
        slot.used = True
        arguments = launch.nr_items and KernelArguments(np.uint64(launch.dst_base), np.uint64(launch.src_base), np.uint64(slot.address),
                                                        launch.batch)
        return (launch, slot, arguments), None, int(launch.nr_items > 0)

    def queue(self, batch):
        channel, (launch, slot, arguments) = self.channel, batch.work
        if not launch.nr_items:
            return
        most = self.options.blocks or channel.device.nr_sms * BLOCKS_PER_SM
        blocks = min(most, -(-launch.nr_items * 32 // BLOCK_THREADS))
        try:
            if not slot.uploaded:
                self.upload(batch)
            channel.driver.launch(self.function, blocks, BLOCK_THREADS, channel.stream, arguments)
        except CudaError as error:
            channel.failed(batch, 0, 1, error)
        else:
            channel.mark(batch, 0, 1)

    def upload(self, batch):
        """Copy the list of a batch up, on the channel's stream. queue() does, unless a benchmark has done it before."""
        launch, slot, _ = batch.work
        with named_range("upload"):
            self.channel.driver("cuMemcpyAsync", slot.address, slot.pinned.address, launch.pairs.nbytes, self.channel.stream)
        slot.uploaded = True

    def release(self, batch):
        batch.work[1].used = False

    def close(self):
        for slot in self.slots:
            slot.close()


class Slot:
    """A list of pairs in pinned memory, and room for it on the device. ``used`` by a batch, from prepare to release;
    ``uploaded``: its copy up is queued."""

    def __init__(self, device):
        self.device, self.used, self.uploaded = device, False, False
        self.pinned, self.address, self._pairs = None, None, None

    def room(self, nr):
        """A (nr, 2) uint32 array in its pinned memory, larger memory if need be. CudaError if there is none; then it has nothing."""
        if self.pinned is None or self.pinned.nbytes < 8 * nr:
            self.close()
            pinned = PinnedMemory(self.device, 1 << max(8 * nr - 1, 4095).bit_length())
            try:
                self.address = self.device.driver.alloc(pinned.nbytes)
            except CudaError:
                pinned.close()
                raise
            self.pinned, self._pairs = pinned, pinned.view().view(np.uint32).reshape(-1, 2)
        self.uploaded = False
        return self._pairs[:nr]

    def close(self):
        if self.pinned:
            self.pinned.close()
            self.device.quietly("cuMemFree_v2", self.address)
        self.pinned, self.address, self._pairs = None, None, None


WAYS = {"cuda-loop": Loop, "cuda-batch": Chunks, "cuda-kernel": Kernel}


# 2. Channels.

class CudaChannel:
    """A stream: keeps the contract of DmaProviderChan. Nothing can be aborted: terminate_sync() waits it out."""

    def __init__(self, provider):
        self.provider, self.device, self.driver = provider, provider.device, provider.device.driver
        self.stream = self.driver.stream()
        self._spare_events = []
        self._prepared, self._submitted, self._issued = [], [], []
        self.way = WAYS[provider.way](self)

    def prep_dma_memcpy(self, plan: CopyPlan, result, interrupt="each"):
        """None where the device is out of service, out of memory, or a batch too many is under way."""
        if self.device.fault:
            return None
        try:
            self.device.enter()
            with named_range("plan"):
                prepared = self.way.prepare(plan)
        except CudaError as error:
            self.device.fail(self.provider.name, error)
            return None
        if prepared is None:
            return None
        batch = Batch(plan, result, interrupt, *prepared)
        self._prepared.append(batch)
        return batch

    def submit(self, prepared):
        if self.device.fault:
            return -ENODEV
        self._prepared.remove(prepared)
        self._submitted.append(prepared)
        return 0

    def issue_pending(self):
        if self._submitted:
            self.device.enter_quietly()             # if it fails, so do the calls that need it
        while self._submitted:
            batch = self._submitted.pop(0)
            self._issued.append(batch)
            if self.device.fault:
                batch.end(0, None, DMA_TRANS_ABORTED)
            else:
                with named_range("submit"):
                    self.way.queue(batch)

    def wait(self, prepared, timeout_ns):
        with named_range("wait"):
            self._wait(prepared, timeout_ns)
        if self.device.fault:
            self._settle()
        prepared.publish()
        return bool(prepared.ended)

    def terminate_sync(self):
        for batch in self._submitted:
            batch.end(0, None, DMA_TRANS_ABORTED)
        self._issued += self._submitted
        self._submitted = []
        self._settle()

    def free_chan_resources(self):
        self.terminate_sync()
        for batch in self._prepared:
            self.way.release(batch)
        self._prepared = []

    def close(self):
        """Give the stream and its memory back."""
        self.free_chan_resources()
        self.device.enter_quietly()
        self.way.close()
        for event in self._spare_events:
            self.device.quietly("cuEventDestroy_v2", event)
        self.device.quietly("cuStreamDestroy_v2", self.stream)

    # For the ways.

    def mark(self, batch, start, stop):
        """Have an event end the units that were queued last."""
        if start == stop:
            return
        try:
            event = self._spare_events.pop() if self._spare_events else self.driver.event()
            self.driver("cuEventRecord", event, self.stream)
        except CudaError as error:
            self.failed(batch, start, stop, error)
        else:
            batch.segments.append((event, start, stop))

    def failed(self, batch, start, stop, error):
        batch.end(start, stop, DMA_TRANS_WRITE_FAILED)
        self.device.fail(self.provider.name, error)

    # Completion.

    def _wait(self, batch, timeout_ns):
        started = time.perf_counter_ns()
        while not batch.ended:
            self._look()
            waited = time.perf_counter_ns() - started
            if batch.ended or waited >= timeout_ns:
                break
            if waited > _SPIN_NS:
                time.sleep(min(_NAP_S, (timeout_ns - waited) / 1e9))

    def _look(self):
        # Take what is over, in stream order, as far as it goes.
        self.device.enter_quietly()
        for batch in list(self._issued):
            while batch.segments:
                event, start, stop = batch.segments[0]
                try:
                    if not self.driver.event_is_over(event):
                        return
                except CudaError as error:
                    self._lose(error)
                    return
                batch.end(start, stop, DMA_TRANS_NOERROR)
                self._spare_events.append(event)
                batch.segments.popleft()
            if (batch.status == DMA_IN_PROGRESS).any():
                return                              # Ctrl-C while they were queued: _settle() ends these
            self._retire(batch)

    def _settle(self):
        # Nothing is under way on the stream any more: either it has ended, or the device is lost and writes no more.
        if not self._issued and not self.device.fault:
            return                                  # every batch was seen to end
        self.device.enter_quietly()
        try:
            self.driver("cuStreamSynchronize", self.stream)
        except CudaError as error:
            self._lose(error)
        for batch in list(self._issued):
            for event, start, stop in batch.segments:
                batch.end(start, stop, DMA_TRANS_NOERROR)
                self._spare_events.append(event)
            batch.segments.clear()
            batch.end(0, None, DMA_TRANS_ABORTED)   # Ctrl-C while they were queued: no event is behind these
            self._retire(batch)

    def _retire(self, batch):
        batch.publish()
        self.way.release(batch)
        self._issued.remove(batch)

    def _lose(self, error):
        # What is not known to have arrived has failed.
        self.device.fail(self.provider.name, error)
        for batch in self._issued:
            batch.end(0, None, DMA_TRANS_WRITE_FAILED)


# 3. Providers and backends.

class CudaProvider:
    """Streams of one device as the channels of a DMA engine; ``way`` is cuda-loop, cuda-batch or cuda-kernel.

    ``most``: descriptors in a batch call. ``overlap``: the flag PREFER_OVERLAP_WITH_COMPUTE on them. ``blocks``: of the
    kernel's grid, 0 for as many as fill the device. ``check``: look for overlaps in every batch. InvalidInput for values
    that cannot be, EngineUnavailable where cuda-kernel's kernel is not to be had: it is compiled and loaded here, so that no batch
    pays for it.
    """

    reaches_devices = True

    def __init__(self, device, way, nr_chans=1, *, most=MOST_DESCRIPTORS, overlap=False, blocks=0, check=True):
        if way not in WAYS:
            raise InvalidInput(f"engine {way!r} is not known; use one of: {', '.join(WAYS)}")
        for what, value, least, largest in (("channels", nr_chans, 1, MAX_CHANNELS), ("descriptors in a call", most, 1, MOST_DESCRIPTORS),
                                            ("blocks", blocks, 0, 1 << 30)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
                raise InvalidInput(f"{what} {value!r} cannot be; give a number from {least} to {largest}")
        if way == "cuda-kernel":
            device.kernel("copy_folios")
        self.device, self.way, self.nr_chans = device, way, nr_chans
        self.most, self.overlap, self.blocks, self.check = most, overlap, blocks, check
        self._channels = {}

    @property
    def name(self):
        return self.way

    @property
    def needs_pinned(self):
        """A kernel that touches other host memory ends the context and all that lies on the device; the batch call is not asked."""
        return self.way != "cuda-loop"

    def alloc_chan_resources(self, number):
        """Channel ``number``; -ENODEV where the device is out of service or gives no stream."""
        if self.device.fault:
            return -ENODEV
        if number not in self._channels:
            try:
                self.device.enter()
                self._channels[number] = CudaChannel(self)
            except CudaError as error:
                self.device.fail(self.name, error)
                return -ENODEV
        return self._channels[number]

    def close(self):
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()


class CudaBackend:
    """Copies with all channels of a CudaProvider and waits: keeps the promises of CopyBackend.

    Each channel gets an equal share of the folios. -EIO where some were not copied, -ENODEV once the device is out of
    service; then nothing is copied. InvalidInput for a plan that overlaps, unless ``check`` is False.
    """

    threads = 1

    def __init__(self, device, way, nr_chans=1, *, check=True, **options):
        self.provider = CudaProvider(device, way, nr_chans, check=False, **options)
        self.check = check

    @property
    def name(self):
        return f"{self.provider.name}:{self.provider.nr_chans}" if self.provider.nr_chans > 1 else self.provider.name

    def __repr__(self):
        return f"<CudaBackend {self.name} on {self.provider.device.name}>"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Give streams and staging memory back. A later copy takes new ones."""
        self.provider.close()

    def copy(self, plan: CopyPlan, done) -> int:
        """Carry out ``plan``; see :meth:`offload.kernels.base.CopyBackend.copy`."""
        if self.check:
            refuse_overlap(plan)
        channels = [self.provider.alloc_chan_resources(number) for number in range(self.provider.nr_chans)]
        if -ENODEV in channels:
            return -ENODEV
        result = np.zeros(plan.nr_folios, np.uint8)
        try:
            batches = []
            for channel, (start, stop) in zip(channels, split_evenly(plan.nr_folios, len(channels))):
                part = CopyPlan(plan.dst_base, plan.src_base, *(array[start:stop] for array in plan[2:]))
                batch = channel.prep_dma_memcpy(part, result[start:stop], "each")
                if batch is not None and channel.submit(batch) == 0:
                    batches.append((channel, batch))
            for channel in channels:
                channel.issue_pending()
            for channel, batch in batches:
                channel.wait(batch, _FOR_EVER_NS)
        finally:                                    # Ctrl-C too: nobody copies any more
            for channel in channels:
                channel.free_chan_resources()
        done[:] = result == DMA_TRANS_NOERROR
        return 0 if done.all() else -EIO
