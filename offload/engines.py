"""Engines: one name per way of copying, the same in the command line, results and documents.

``vanilla``, ``batch``, ``mt:N`` and ``dma:N``, each also with ``+stream``; who stands at the hatch and which copy kernel moves
the bytes follow from the name. The GPU's are ``cuda-loop:N``, ``cuda-batch`` and ``cuda-kernel``; where they are not
available, parse_engine() raises with the reason. ``auto`` takes for each batch what calibration.py has measured to be the
fastest, on the CPU where there is no GPU or where it does not reach; it alone may fall back, and says so. Where no engine is
named, default_engines() are those that copy between the nodes at hand and are here; it tells which it leaves out.
"""

import dataclasses
import re

from offload.errors import EngineUnavailable, InvalidInput
from offload.units import format_bytes

__all__ = ("Engine", "parse_engine", "default_engines", "default_engine", "list_engines", "available", "left_out",
           "check_device", "GPU_DEFAULTS", "MAX_THREADS",
           "MAX_CHANNELS")

MAX_THREADS = 64
MAX_CHANNELS = 16
"""As many as dcbm takes for one batch."""

NUMBERED = {"mt": ("cpu_mt", "threads", MAX_THREADS), "dma": ("dcbm", "channels", MAX_CHANNELS),
            "cuda-loop": ("dcbm", "channels", MAX_CHANNELS)}
"""Engines whose name carries a number: (migrator, what it counts, the largest)."""
CUDA_ENGINES = ("cuda-loop", "cuda-batch", "cuda-kernel")
AUTO = "batch+stream"
"""What ``auto`` takes on the CPU."""
CPU_DEFAULTS = ("vanilla", "vanilla+stream", "batch", "batch+stream", "mt:2", "mt:2+stream")
GPU_DEFAULTS = ("cuda-loop:1", "cuda-batch", "cuda-kernel", "auto")
"""What a benchmark takes where no engine is named; the GPU's where it reaches the nodes."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way of copying. ``migrator`` is None for vanilla; ``threads`` are those that copy (dcbm's channels among them).

    ``copy_kernel`` is "plain", "stream", the kind of a GPU engine, or "auto" for one of them by batch. ``note`` is what a reader of its results must know.
    """

    name: str
    migrator: str | None
    copy_kernel: str
    threads: int
    note: str | None = None

    @property
    def on_gpu(self):
        return self.copy_kernel in (*CUDA_ENGINES, "auto")

    @property
    def path_kernel(self):
        """With what the migration path copies what the migrator left: the CPU kernel of that name."""
        return "plain" if self.on_gpu else self.copy_kernel

    @property
    def settled(self):
        """The name of the engine that this one is, whoever asked for ``auto``; that of an ``auto`` which chooses for each batch is auto."""
        if self.name != "auto" or self.copy_kernel == "auto":
            return self.name
        return f"{self.copy_kernel}:{self.threads}" if self.on_gpu else AUTO

    def out_of_reach(self, nodes):
        """What keeps it from copying between frames of these placements, in words; None where it can."""
        if self.on_gpu:
            # A copy call stages host memory that is not pinned; the others would have to reach it.
            if "host" in nodes and self.copy_kernel != "cuda-loop":
                return "host memory that is not pinned is out of its reach"
            if "host" in nodes and "device" not in nodes:
                return "neither end is on the device, so its copy calls would be the CPU's own copy of host memory that is not pinned"
        elif "device" in nodes and not (self.copy_kernel == "plain" and self.migrator in (None, "mc_copy")):
            return "the CPU does not reach device memory"
        return None

    def check_nodes(self, nodes):
        """InvalidInput unless it can copy between frames of these placements."""
        nodes = tuple(nodes)
        reason = self.out_of_reach(nodes)
        if reason is None:
            return
        if "device" in nodes:
            others = "cuda-loop:N" if "host" in nodes else "cuda-loop:N, cuda-batch, cuda-kernel"
            remedy = f"use {others}, or vanilla and batch, which copy there folio by folio"
        else:
            remedy = f"use --nodes pinned,pinned (or device), or a CPU engine such as {AUTO}"
        raise InvalidInput(f"engine {self.name!r} does not copy with nodes {','.join(nodes)}: {reason}; {remedy}")

    def make_backend(self):
        """The copy alone, without migration: a CopyBackend to close. EngineUnavailable if the GPU is no longer there."""
        if self.copy_kernel == "auto":
            from offload.calibration import AutoBackend, open_calibration
            return AutoBackend(open_calibration())
        if self.on_gpu:
            from offload.kernels.cuda import open_device
            from offload.kernels.cuda_engines import CudaBackend
            return CudaBackend(open_device(), self.copy_kernel, self.threads)
        from offload.kernels.cpu import CpuBackend
        return CpuBackend(self.copy_kernel, self.threads)

    def make_migrator(self):
        """The migrator to register, or None: a new one each time; close() it when done."""
        if self.migrator is None:
            return None
        if self.migrator == "mc_copy":
            from offload.migrators.mc_copy import McCopy
            return McCopy(self.copy_kernel)
        if self.migrator == "auto":
            from offload.calibration import open_calibration
            from offload.migrators.auto import Auto
            calibration = open_calibration()
            return Auto(calibration.pick_for, {name: parse_engine(name).make_migrator() for name in calibration.makers})
        if self.migrator == "dcbm":
            from offload.migrators.dcbm import Dcbm
            if self.on_gpu:
                from offload.dmaengine import DmaDevice
                from offload.kernels.cuda import open_device
                from offload.kernels.cuda_engines import CudaProvider
                return Dcbm(DmaDevice(CudaProvider(open_device(), self.copy_kernel, self.threads)), self.threads)
            return Dcbm.on_cpu(self.threads, self.copy_kernel)
        from offload.migrators.cpu_mt import CpuMt
        return CpuMt(self.threads, self.copy_kernel)

    @property
    def limit_key(self):
        """Which limit it is held against: ``plain:1``, ``stream:2`` (copy kernel and threads)."""
        return f"{self.copy_kernel}:{self.threads}"


def parse_engine(text, nodes=("host", "host")):
    """The Engine of a name. InvalidInput for a name that is none, EngineUnavailable for one that is not here.

    ``nodes``: the placements that it copies from and to. They decide what ``auto`` is, and nothing else.
    """
    base, plus, suffix = str(text).strip().partition("+")
    kind, colon, number = base.partition(":")
    if kind not in ("vanilla", "batch", "auto", *NUMBERED, *CUDA_ENGINES) or colon and kind not in NUMBERED or plus and (
            suffix != "stream" or kind in ("auto", *CUDA_ENGINES)):
        raise InvalidInput(f"engine {text!r} is not known; use vanilla, batch, mt:N (N threads) or dma:N (N channels), each "
                           f"also with +stream, such as batch+stream; cuda-loop:N, cuda-batch, cuda-kernel, or auto")
    if kind == "auto":
        return choose(nodes)
    kernel = "stream" if plus else "plain"
    if kind in CUDA_ENGINES and kind not in NUMBERED:
        return cuda_engine(kind, kind, 1)
    if kind not in NUMBERED:
        return Engine(str(text).strip(), None if kind == "vanilla" else "mc_copy", kernel, 1)
    migrator, what, most = NUMBERED[kind]
    if not re.fullmatch(r"[0-9]+", number) or not 1 <= int(number) <= most:
        raise InvalidInput(f"engine {text!r}: {number!r} is not a number of {what}; write {kind}:1 to {kind}:{most}")
    if kind in CUDA_ENGINES:
        return cuda_engine(f"{kind}:{int(number)}", kind, int(number))
    return Engine(f"{kind}:{int(number)}{plus}{suffix}", migrator, kernel, int(number))


def cuda_engine(name, kind, channels):
    """A GPU engine. EngineUnavailable where it cannot be used here: it was asked for, so nothing stands in for it."""
    from offload.kernels.cuda import why_not
    reason = why_not(kind)
    if reason:
        raise EngineUnavailable(f"engine {name!r} is not available: {reason}; on the CPU use {AUTO} or mt:N+stream")
    return Engine(name, "dcbm", kind, channels)


def choose(nodes):
    """The engine of ``auto`` between two placements, with a note of what it is and why.

    Measures on the device if this direction is not known yet (calibration.py). EngineUnavailable if that fails and the CPU
    does not reach both ends.
    """
    from offload.kernels.cuda import why_not
    reason = why_not("cuda-loop")
    if reason:
        return cpu_auto(f"no GPU engine is available: {reason}")
    direction = ",".join(nodes)
    if "host" in nodes and "device" in nodes:       # nothing to measure
        return dataclasses.replace(parse_engine("cuda-loop:1"), name="auto",
                                   note=f"auto is cuda-loop:1; no other engine copies a whole batch with nodes {direction}")
    if not set(nodes) <= {"pinned", "device"}:
        return cpu_auto(f"a GPU does not reach frames of placement {direction}")
    from offload.calibration import CPU, open_calibration
    try:
        calibration = open_calibration()
        winners, chosen = calibration.winners(direction), calibration.describe(direction)
    except EngineUnavailable as error:
        if "device" in nodes:
            raise
        return cpu_auto(str(error))
    measured = f"measured for {direction} on {calibration.device.name}: {chosen}"
    if winners == {CPU}:
        return cpu_auto(measured)
    return Engine("auto", "auto", "auto", 1, f"auto is the fastest for each batch, as {measured}")


def cpu_auto(why):
    return dataclasses.replace(parse_engine(AUTO), name="auto", note=f"auto is {AUTO}, on the CPU; {why}")


def available(names):
    """Those of these engines that this machine has, and for each of the others its reason: (names, {name: reason})."""
    from offload.kernels.cuda import why_not
    reasons = {name: why_not(name.partition(":")[0]) for name in names if name in GPU_DEFAULTS}
    return [name for name in names if not reasons.get(name)], {name: reason for name, reason in reasons.items() if reason}


def default_engines(nodes):
    """Names of the engines of a benchmark between two placements where none is named, and a line on those left out, or None.

    The GPU's come in where it reaches both nodes. What is not here, or does not copy between them, is left out.
    """
    from offload.kernels.cuda import why_not
    wanted = CPU_DEFAULTS
    if why_not("cuda-loop") is None and ("device" in nodes or set(nodes) == {"pinned"}):
        wanted += GPU_DEFAULTS if "host" not in nodes else GPU_DEFAULTS[:-1]      # there auto is cuda-loop:1
    here, left = available(wanted)
    left |= {name: reason for name in here if name != "auto" and (reason := parse_engine(name).out_of_reach(nodes))}
    return tuple(name for name in here if name not in left), left_out(left)


def left_out(reasons):
    """One line about engines that were not taken, from {name: reason}; None of none."""
    by_reason = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "left out: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()) if reasons else None


def default_engine(nodes):
    """The Engine of a single migration between two placements where none is named: batch+stream, or auto where it does not reach."""
    reason = parse_engine(AUTO).out_of_reach(nodes)
    if reason is None:
        return parse_engine(AUTO)
    engine = parse_engine("auto", nodes)
    return dataclasses.replace(engine, note=f"no engine was named, and {AUTO} is left out ({reason}); {engine.note}")


def check_device(nodes, nbytes, what):
    """Before anything is allocated: that nodes of these placements can be had, ``nbytes`` of them in the device's memory.

    EngineUnavailable without a GPU where one is needed, InvalidInput if it has not so much free; ``what`` needs it, as the
    message says.
    """
    if not set(nodes) & {"pinned", "device"}:
        return
    from offload.kernels.cuda import open_device
    from offload.kernels.cuda_driver import CudaError
    try:
        device = open_device()
        device.enter()
        free = device.driver.free_bytes()
    except (EngineUnavailable, CudaError) as error:
        raise EngineUnavailable(f"nodes {','.join(nodes)} cannot be had: {error}; or use --nodes host,host") from None
    if nbytes > free:
        raise InvalidInput(f"{what}: that takes {format_bytes(nbytes)} of the memory of {device.name}, and {format_bytes(free)} is free; use a "
                           f"smaller --size, or --nodes pinned,pinned")


CUDA_DOES = {"cuda-loop": f"the whole batch, one copy call for each run, on N streams (1 to {MAX_CHANNELS})",
             "cuda-batch": "the whole batch, up to 4096 runs in one copy call", "cuda-kernel": "the whole batch in one kernel launch"}


def auto_does(reason):
    """(migrator, what it does) of ``auto``; asks the device nothing."""
    if reason:
        return "mc_copy", f"{AUTO}, on the CPU, as no GPU engine is available"
    return "auto", f"the engine measured to be the fastest for each batch; {AUTO} where a GPU does not reach"


def list_engines():
    """(name, migrator, what it does, reason why it is not available or None) of every engine there is a name for."""
    from offload.kernels.cuda import why_not
    return (
        ("vanilla[+stream]", "none", "each folio in its move, on the calling thread", None),
        ("batch[+stream]", "mc_copy", "the whole batch before the moves, on the calling thread", None),
        ("mt:N[+stream]", "cpu_mt", f"the whole batch before the moves, on N threads (1 to {MAX_THREADS})", None),
        ("dma:N[+stream]", "dcbm", f"the whole batch before the moves, by a DMA engine of N threads (1 to {MAX_CHANNELS})", None),
        *((name + (":N" if name in NUMBERED else ""), "dcbm", does, why_not(name)) for name, does in CUDA_DOES.items()),
        ("auto", *auto_does(why_not("cuda-loop")), None),
    )
