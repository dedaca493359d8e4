"""auto: the migrator that hands each batch to the one that was measured to be the fastest for it.

Stands for no driver of the series, which has one migrator at a time; here several stand behind one name, and who copies is
decided batch by batch. How that is measured is in offload/calibration.py, which hands in the choice. Leaves out dividing a
batch among several.
"""

import collections

from offload.units import ENODEV

__all__ = ("Auto",)


class Auto:
    """``choose(plan)`` names one of ``migrators``, a dict, or None for none of them, which is -ENODEV; they are closed with this.
    ``handed`` counts batches by name."""

    name = "auto"
    owner = "auto"
    meets_poison = False

    reaches_devices = True
    """The CPU's is among them, but chosen only where it reaches both ends."""

    needs_pinned = True

    def __init__(self, choose, migrators):
        self.choose, self.migrators = choose, migrators
        self.handed = collections.Counter()

    def offload_copy(self, batch, done):
        name = self.choose(batch.plan())
        if name is None:
            return -ENODEV
        self.handed[name] += 1
        return self.migrators[name].offload_copy(batch, done)

    def close(self):
        for migrator in self.migrators.values():
            migrator.close()
