"""Engines: one name per way of copying, the same in the command line, results and documents.

``vanilla``, ``batch`` and ``mt:N``, each also with ``+stream``; who stands at the hatch and which copy kernel moves
the bytes follow from the name. The GPU's engines are listed with the reason why they are not there.
"""

import dataclasses
import re

from offload.errors import EngineUnavailable, InvalidInput

__all__ = ("Engine", "parse_engine", "list_engines", "MAX_THREADS")

MAX_THREADS = 64

GPU_REASON = "this version has no GPU engines yet; on the CPU use batch+stream or mt:N+stream"
CUDA_ENGINES = ("cuda-loop", "cuda-batch", "cuda-kernel")


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way of copying. ``migrator`` is None for vanilla; ``threads`` counts the calling one."""

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
    if kind in CUDA_ENGINES or kind == "dma" or kind == "auto":
        reason = GPU_REASON if kind in CUDA_ENGINES else "it comes with the DMA engine"
        raise EngineUnavailable(f"engine {text!r} is not available: {reason}")
    if kind not in ("vanilla", "batch", "mt") or plus and suffix != "stream" or colon and kind != "mt":
        raise InvalidInput(f"engine {text!r} is not known; use vanilla, batch or mt:N (N threads), each also with "
                           f"+stream, such as batch+stream")
    kernel = "stream" if plus else "plain"
    if kind != "mt":
        return Engine(str(text).strip(), None if kind == "vanilla" else "mc_copy", kernel, 1)
    if not re.fullmatch(r"[0-9]+", number) or not 1 <= int(number) <= MAX_THREADS:
        raise InvalidInput(f"engine {text!r}: {number!r} is not a number of threads; write mt:1 to mt:{MAX_THREADS}")
    return Engine(f"mt:{int(number)}{plus}{suffix}", "cpu_mt", kernel, int(number))


def list_engines():
    """(name, migrator, what it does, reason why it is not available or None) of every engine there is a name for."""
    return (
        ("vanilla[+stream]", "none", "each folio in its move, on the calling thread", None),
        ("batch[+stream]", "mc_copy", "the whole batch before the moves, on the calling thread", None),
        ("mt:N[+stream]", "cpu_mt", f"the whole batch before the moves, on N threads (1 to {MAX_THREADS})", None),
        ("dma:N[+stream]", "dcbm", "the whole batch, on N channels", "it comes with the DMA engine"),
        *((name + (":N" if name == "cuda-loop" else ""), "dcbm", "the whole batch, by the GPU", GPU_REASON)
          for name in CUDA_ENGINES),
    )
