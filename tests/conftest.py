"""What most tests of the core start from: a small poisoned machine whose bytes are known."""

import contextlib

import numpy as np
import pytest

from offload.machine import Machine, MachineConfig, NodeConfig
from offload.mm.memmap import PG_dirty, PG_locked, PG_writeback
from offload.mm.node import GUP_PIN_COUNTING_BIAS
from offload.units import PAGE_SIZE


def make_machine(*pages, **fields):
    """A machine of nodes with so many pages each (two of 2048 if none are given), fresh frames poisoned."""
    return Machine(MachineConfig(nodes=tuple(NodeConfig(nr) for nr in pages or (2048, 2048)), poison=True, **fields))


def random_bytes(nbytes, seed=0):
    """Bytes without a zero, so that no page can be taken for an unused one."""
    return np.random.default_rng(seed).integers(1, 256, nbytes, np.uint8).tobytes()


class World:
    """A machine with one process, and the bytes that each of its mappings must hold."""

    def __init__(self, *pages, **fields):
        self.machine = make_machine(*pages, **fields)
        self.process = self.machine.process()
        self.expected = []          # (process, address, bytes)
        self.held = []

    @property
    def folios(self):
        return self.machine.mem.folios

    def map(self, nr=1, order=0, **options):
        """Map ``nr`` folios of random bytes: (address, head pfns)."""
        return self.map_in(self.process, nr, order, **options)

    def map_in(self, process, nr=1, order=0, **options):
        nbytes = nr * PAGE_SIZE << order
        address = process.mmap(nbytes, order=order, **options)
        content = random_bytes(nbytes, len(self.expected))
        process.write(address, content)
        self.expected.append((process, address, content))
        return address, self.machine.folios_of(process, address, nbytes)

    def pfns(self, nr=1, order=0, **options):
        return self.map(nr, order, **options)[1].tolist()

    def surround(self, pfn, **fields):
        """Have others do something to a folio: fields of a row of Memory.others."""
        row = int(self.folios.others[pfn]) or self.machine.new_row("others")
        others = self.machine.mem.others[row]
        if not self.folios.others[pfn]:
            others.refs_gone_after = -1
        for field, value in fields.items():
            others[field] = value
        self.folios.others[pfn] = row
        if fields.get("refs") and not fields.get("refs_from_batch_copy"):
            others.refs_held = others.refs
            self.folios.refcount[pfn] += others.refs
        if fields.get("lock"):
            self.folios.page_flags[pfn] |= PG_locked
        if fields.get("writeback"):
            self.folios.page_flags[pfn] |= PG_writeback

    def pin(self, pfn):
        self.folios.pincount[pfn] += 1
        self.folios.refcount[pfn] += 1 if self.folios.order[pfn] else GUP_PIN_COUNTING_BIAS

    def dirty(self, pfn):
        self.folios.page_flags[pfn] |= PG_dirty

    def migrate(self, pfns, nid=1, **options):
        return self.machine.migrate_pages(pfns, nid, **options)

    def nodes_of(self, pfns):
        return self.folios.nid[pfns].tolist()

    def where(self, address, nr=1, order=0, process=None):
        """The node of each folio mapped from ``address`` on."""
        process = process or self.process
        return [self.machine.node_of(process, address + i * (PAGE_SIZE << order)) for i in range(nr)]

    def check(self, context=""):
        """Every byte is where it was, the books add up, and nothing is isolated."""
        self.machine.validate()
        for process, address, content in self.expected:
            found = process.read(address, len(content))
            if found != content:
                wrong = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(content, np.uint8))
                raise AssertionError(f"{len(wrong)} bytes wrong from {address + wrong[0]:#x} on; {context}")
        nodes = self.machine.mem.nodes
        assert not (nodes.nr_isolated_anon.any() or nodes.nr_isolated_file.any()), context
        self.machine.validate()


@pytest.fixture
def machine():
    return make_machine()


@pytest.fixture
def world():
    return World()


@contextlib.contextmanager
def on_duty(machine, migrator, reasons="all"):
    """A migrator registered, closed afterwards."""
    try:
        with machine.migrator(migrator, reasons):
            yield migrator
    finally:
        getattr(migrator, "close", lambda: None)()
