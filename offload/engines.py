"""Engines: one name per way of copying, the same in the command line, results and documents.

``vanilla``, ``batch``, ``mt:N`` and ``dma:N``, each also with ``+stream``; who stands at the hatch and which copy kernel moves
the bytes follow from the name. The GPU's engines are listed with the reason why they are not there.
"""

import dataclasses
import re

from offload.errors import EngineUnavailable, InvalidInput

__all__ = ("Engine", "parse_engine", "list_engines", "MAX_THREADS", "MAX_CHANNELS")

MAX_THREADS = 64
MAX_CHANNELS = 16
"""As many as dcbm takes for one batch."""

GPU_REASON = "this version has no GPU engines yet; on the CPU use batch+stream or mt:N+stream"
NUMBERED = {"mt": ("cpu_mt", "threads", MAX_THREADS), "dma": ("dcbm", "channels", MAX_CHANNELS)}
"""Engines whose name carries a number: (migrator, what it counts, the largest)."""
CUDA_ENGINES = ("cuda-loop", "cuda-batch", "cuda-kernel")


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way of copying. ``migrator`` is None for vanilla; ``threads`` are those that copy (dcbm's channels among them)."""

    name: str
    migrator: str | None
    copy_kernel: str
    threads: int

    def make_migrator(self):
        """The migrator to register, or None: a new one each time; close() it when done."""
        if self.migrator is None:
            return None
        if self.migrator == "mc_copy":
            from offload.migrators.mc_copy import McCopy
            return McCopy(self.copy_kernel)
        if self.migrator == "dcbm":
            from offload.migrators.dcbm import Dcbm
            return Dcbm.on_cpu(self.threads, self.copy_kernel)
        from offload.migrators.cpu_mt import CpuMt
        return CpuMt(self.threads, self.copy_kernel)

    @property
    def limit_key(self):
        """Which limit it is held against: ``plain:1``, ``stream:2`` (copy kernel and threads)."""
        return f"{self.copy_kernel}:{self.threads}"


def parse_engine(text):
    """The Engine of a name. InvalidInput for a name that is none, EngineUnavailable for one that is not here."""
    base, plus, suffix = str(text).strip().partition("+")
    kind, colon, number = base.partition(":")
    if kind in CUDA_ENGINES or kind == "auto":
        reason = GPU_REASON if kind in CUDA_ENGINES else "there is nothing to choose from without a GPU engine"
        raise EngineUnavailable(f"engine {text!r} is not available: {reason}")
    if kind not in ("vanilla", "batch", *NUMBERED) or plus and suffix != "stream" or colon and kind not in NUMBERED:
        raise InvalidInput(f"engine {text!r} is not known; use vanilla, batch, mt:N (N threads) or dma:N (N channels), each "
                           f"also with +stream, such as batch+stream")
    kernel = "stream" if plus else "plain"
    if kind not in NUMBERED:
        return Engine(str(text).strip(), None if kind == "vanilla" else "mc_copy", kernel, 1)
    migrator, what, most = NUMBERED[kind]
    if not re.fullmatch(r"[0-9]+", number) or not 1 <= int(number) <= most:
        raise InvalidInput(f"engine {text!r}: {number!r} is not a number of {what}; write {kind}:1 to {kind}:{most}")
    return Engine(f"{kind}:{int(number)}{plus}{suffix}", migrator, kernel, int(number))


def list_engines():
    """(name, migrator, what it does, reason why it is not available or None) of every engine there is a name for."""
    return (
        ("vanilla[+stream]", "none", "each folio in its move, on the calling thread", None),
        ("batch[+stream]", "mc_copy", "the whole batch before the moves, on the calling thread", None),
        ("mt:N[+stream]", "cpu_mt", f"the whole batch before the moves, on N threads (1 to {MAX_THREADS})", None),
        ("dma:N[+stream]", "dcbm", f"the whole batch before the moves, by a DMA engine of N threads (1 to {MAX_CHANNELS})", None),
        *((name + (":N" if name == "cuda-loop" else ""), "dcbm", "the whole batch, by the GPU", GPU_REASON)
          for name in CUDA_ENGINES),
    )
