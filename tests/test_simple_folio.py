"""migrate/simple.py does what the functions it stands in for do: the same calls with it and without, all of the state compared.

An event, even one that never comes, keeps the path from noting where entries stand; then no folio is simple.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from offload import Event, Machine, McCopy
from offload.errors import WouldHang
from offload.jit import JIT_DISABLED
from offload.migrate import move, unmap
from offload.mm.memmap import PG_active, PG_locked, PG_referenced, PG_workingset, PG_writeback, PG_young, VM_LOCKED
from offload.units import PAGE_SIZE

NEVER = Event("undo", lambda step, pfn: None, folio=1)
PAGES = 64


def machine_with_folios(seed, protocol, migrator):
    """A machine whose pages are in every state that base pages can be in, the same for a seed, and the folios in random order."""
    machine = Machine(nodes=["8M", "8M"], protocol=protocol, poison=True)
    rng = np.random.default_rng(seed)
    process = machine.process()
    length = PAGES * PAGE_SIZE
    areas = [process.mmap(length), process.mmap(length, mlock=True), process.mmap(length, file=machine.file(length), shared=True),
             process.mmap(length), process.mmap(length)]
    for area in areas:
        for page in rng.choice(PAGES, PAGES // 2, replace=False):
            process.write(area + int(page) * PAGE_SIZE, rng.bytes(100))
    process.mprotect(areas[3], length // 2, "r")
    child = process.fork()
    child.write(areas[3] + length // 2, b"not shared any more")
    for area in (areas[0], areas[1], areas[4]):     # the others stay mapped twice
        child.munmap(area, length)
    child.munmap(areas[3], length // 4)
    process.munmap(areas[4], length // 2)
    for page in rng.choice(PAGES, 4, replace=False):
        process.get(areas[0] + int(page) * PAGE_SIZE)
        process.pin(areas[3] + int(page) * PAGE_SIZE)
    areas[4] += length // 2
    pfns = np.unique(np.concatenate([machine.folios_of(process, area, length // 2) for area in areas]))
    rng.shuffle(pfns)
    flags = np.array([0, 0, PG_referenced, PG_active, PG_workingset, PG_young, PG_locked, PG_writeback])
    machine.lru_add_drain()
    machine.mem.folios.page_flags[pfns] |= rng.choice(flags, len(pfns))
    machine.mem.folios.cpupid[pfns] = rng.integers(0, 1000, len(pfns))
    if seed % 2:                                    # mlock() that has not come to the pages yet
        machine.mem.vmas.vm_flags[machine.mem.vmas.start == areas[4]] |= VM_LOCKED
    if migrator:
        machine.register(migrator())
    return machine, pfns


def outcome(result):
    return {name: getattr(result, name) for name in ("rc", "stats", "targets", "tlb_flushes", "nr_batches", "copies", "copied_bytes",
                                                      "moved_bytes")} | {"left": result.left.tolist(), "blocked": len(result.blocked_ns)}


class LeavesSome(McCopy):
    """Copies all but every third folio of a batch."""

    def offload_copy(self, batch, done):
        super().offload_copy(batch, done)
        done[::3] = 0
        return -5


def state_of(machine):
    """All of a machine's state but the address of its frames: by name, and the bytes."""
    state = {name: array.copy() for name, array in machine.mem._asdict().items()}
    state["nodes"].frames = 0
    first = int(machine.mem.nodes.start_pfn[0])
    return state | {"bytes": machine.frames.read(first, int(machine.mem.nodes.nr_pages.sum()))}


@pytest.mark.parametrize("protocol", ["v6", "v5", "v4", "flags"])
@pytest.mark.parametrize("migrator", [McCopy, LeavesSome, None])
@pytest.mark.parametrize("mode, reason", [("MIGRATE_ASYNC", "demotion"), ("MIGRATE_SYNC", "compaction"),
                                          ("MIGRATE_SYNC_LIGHT", "memory_failure")])
def test_it_leaves_behind_what_the_general_path_leaves(protocol, migrator, mode, reason):
    for seed in range(3):
        outcomes, states = [], []
        for events in ((), (NEVER,)):
            machine, pfns = machine_with_folios(seed, protocol, migrator)
            try:
                result = machine.migrate_isolated(machine.isolate(pfns), 1, mode=mode, reason=reason, events=events)
            except WouldHang as hang:
                result = hang.result
            outcomes.append(outcome(result))
            states.append(state_of(machine))
        assert outcomes[0] == outcomes[1]
        for name in states[0]:
            assert np.array_equal(states[0][name], states[1][name]), name


def test_a_target_that_is_full_is_counted_once():
    targets = []
    for events in ((), (NEVER,)):
        machine = Machine(nodes=["8M", "4M"])
        process = machine.process()
        machine.register(McCopy())
        process.mmap(3 << 20, nid=1)
        result = machine.migrate_pages(machine.folios_of(process, process.mmap("2M"), 2 << 20), 1, events=events)
        targets.append((result.rc, result.targets, result.stats))
    assert targets[0] == targets[1] and targets[0][0] == -12


def count_simple(events):
    """How many folios the two functions took in one call of 64 base pages: (unmapped, moved). Only without the JIT."""
    counts = {}

    def counting(function):
        def count(*args):
            took = function(*args)
            counts[function.__name__] = counts.get(function.__name__, 0) + took
            return took
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unmap, "unmap_simple_folio", counting(unmap.unmap_simple_folio))
        patch.setattr(move, "move_simple_folio", counting(move.move_simple_folio))
        machine = Machine(nodes=["8M", "8M"])
        process = machine.process()
        va = process.mmap("256K")
        machine.register(McCopy())
        assert machine.migrate_pages(machine.folios_of(process, va, "256K"), 1, events=events).rc == 0
    return tuple(counts.values())


@pytest.mark.skipif(JIT_DISABLED, reason="it starts an interpreter of its own")
def test_common_folios_are_simple_and_with_events_none_is():
    run = "import test_simple_folio as t; print(t.count_simple(()), t.count_simple((t.NEVER,)))"
    done = subprocess.run([sys.executable, "-c", run], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
                          env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    assert done.stdout == "(64, 64) (0, 0)\n", done.stderr
