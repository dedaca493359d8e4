"""mc_copy: the batch copy on the calling thread, one folio after the other.

Stands for migrate_folios_mc_copy(), the CPU routine of RFC v6 4/5 (not merged): the default target of the hatch and
the reference for all other migrators. As there, where it is a static call, the path reaches it without leaving compiled
code: going through Python costs 10 us a batch, a tenth of a batch of one 2 MiB folio. Where the nodes' frames lie apart that
has to be; device memory is copied folio by folio, as in a move (mm/far_frames.py).
"""

from offload.kernels.cpu import KERNELS, CpuBackend

__all__ = ("McCopy",)


class McCopy:
    """Copies with ``kernel`` ("plain" or "stream") on the calling thread; every folio copied is done."""

    name = "mc_copy"
    owner = "mc_copy"

    def __init__(self, kernel="plain"):
        self.backend = CpuBackend(kernel)
        if type(self) is McCopy:                    # a subclass may copy otherwise
            self.cpu_kernel = 1 + KERNELS.index(kernel)

    def offload_copy(self, batch, done):
        if isinstance(batch.frames, int):
            return self.backend.copy(batch.plan(), done)
        return batch.frames.mc_copy(KERNELS.index(self.backend.kernel), batch.dst, batch.src, batch.order, done)

    @property
    def reaches_devices(self):
        """Non-temporal stores are the CPU's."""
        return self.backend.kernel == "plain"

    def close(self):
        self.backend.close()
