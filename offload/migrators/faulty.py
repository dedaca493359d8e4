"""A migrator that fails on purpose, around one that works: what a driver may do to the path.

Stands for the refusals and partial failures of real drivers (spec of the series: declining with -EOPNOTSUPP, SDXI's
finished chunks, dcbm's all or nothing).
"""

from offload.copy_offload import WRITTEN_UNMARKED, FolioBatch
from offload.errors import InvalidInput
from offload.units import EIO, EOPNOTSUPP

__all__ = ("FaultyMigrator",)


class FaultyMigrator:
    """Passes batches on to ``migrator``, with faults.

    ``declines``: refuses every batch before copying (-EOPNOTSUPP). ``fails_after`` n: copies n folios of each batch,
    then fails with -EIO. ``marks``: whether it then reports those as done ("finished") or nothing ("none", as dcbm does).
    """

    def __init__(self, migrator, *, declines=False, fails_after=None, marks="finished"):
        if marks not in ("finished", "none"):
            raise InvalidInput(f"marks {marks!r} is not known; use 'finished' or 'none'")
        if fails_after is not None and fails_after < 0:
            raise InvalidInput(f"fails_after {fails_after!r} is negative; give the number of folios copied before")
        self.migrator, self.declines, self.fails_after, self.marks = migrator, declines, fails_after, marks

    @property
    def name(self):
        return self.migrator.name

    @property
    def owner(self):
        return getattr(self.migrator, "owner", None)

    @property
    def meets_poison(self):
        return getattr(self.migrator, "meets_poison", True)

    @property
    def reaches_devices(self):
        return getattr(self.migrator, "reaches_devices", True)

    @property
    def needs_pinned(self):
        return getattr(self.migrator, "needs_pinned", False)

    def offload_copy(self, batch, done):
        if self.declines:
            return -EOPNOTSUPP
        if self.fails_after is None or self.fails_after >= len(batch.src) + batch.nr_cut:
            return self.migrator.offload_copy(batch, done)
        nr = min(self.fails_after, len(batch.src))
        self.migrator.offload_copy(FolioBatch(batch.dst[:nr], batch.src[:nr], batch.order[:nr], batch.frames), done[:nr])
        if self.marks == "none":
            done[:nr] *= WRITTEN_UNMARKED
        return -EIO
