"""cpu_mt: the batch copy by CPU threads.

Stands for drivers/migoffcopy/mtcopy of RFC v2 and v3 (dropped in v4): whole folios to threads, or each folio cut
in pieces when there are fewer folios than threads. Its default of 4 threads and limit of 64 are kept, its lost tail
(offload.kernels.cpu) and its choice of CPUs (cpuselect) are not.
"""

from offload.kernels.cpu import CpuBackend

__all__ = ("CpuMt",)


class CpuMt:
    """Copies with ``threads`` threads (1 to 64), the calling one among them; InvalidInput for other numbers."""

    name = "cpu_mt"
    owner = "cpu_mt"
    reaches_devices = False

    def __init__(self, threads=4, kernel="plain"):
        self.backend = CpuBackend(kernel, threads)

    def offload_copy(self, batch, done):
        return self.backend.copy(batch.plan(), done)

    def close(self):
        """End its threads; it starts new ones if it is used again."""
        self.backend.close()
