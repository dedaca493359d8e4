"""offload bench: folio order x engine over real migrations, each beside the limit measured in the same run.

Stands for the benchmark behind the tables of the series (move_pages(2) over a range, throughput of the whole call); its
output is one dict, ``run_bench()``'s, from which the tables (tables.py) and the JSON file are both made. Leaves out
sweeps over batch sizes, comparison of two runs, and what the application pays afterwards.

What one run of a cell (engine, order) does:

1. fault in ``size`` bytes of fresh folios on node 0 and write random bytes, other ones each time;
2. put the folios in random order and poison every frame of node 1;
3. **timed:** ``Machine.migrate_pages()`` as Python calls it: isolation, all batches, putback;
4. compare every byte through the page table (with a node in device memory: a checksum of every page, made where it lies), and
   check that each folio lies on node 1;
5. poison node 1 again and copy the same frames to the same frames without migration: the limit;
6. unmap.

The machine of the experiment drifts (clocks, neighbours), so the engines take turns: each round runs every engine
once, in rotating sequence and with the same random bytes and order, and every limit beside the engine it is for.
"""

import contextlib
import dataclasses
import gc
import time

import numpy as np

from offload.engines import parse_engine
from offload.errors import BrokenInvariant
from offload.experiment.limits import Limits
from offload.experiment.manifest import gpu_manifest, host_manifest, last_level_cache, what_ran
from offload.jit import exit_on_interrupt
from offload.kernels.checksum import checksum_pages
from offload.kernels.cpu import KERNELS
from offload.machine import Machine, NodeConfig
from offload.mm.frames import POISON
from offload.units import HPAGE_PMD_ORDER, PAGE_SIZE, format_bytes, format_size

__all__ = ("run_bench", "Session", "Bench", "Run", "PHASES")


PHASES = ("unmap", "flush", "copy", "move")
REASON = "syscall_or_cpuset"

CHUNK = 1 << 20
"""Bytes compared at a time: they stay in the cache."""


# 1. One run.

@dataclasses.dataclass(frozen=True)
class Run:
    """One migration of all folios. ``result`` is its MigrateResult; times are ns over the whole call."""

    result: object
    wall_ns: int
    cpu_ns: int
    verified: bool


class Bench:
    """One machine and the random bytes, for all runs: every engine finds the same memory. Each run has a new process."""

    def __init__(self, config):
        self.config = config
        nodes = [NodeConfig(config.node_pages, placement=placement) for placement in config.nodes]
        self.machine = Machine(nodes=nodes, batch_pages=config.batch_pages, protocol=config.protocol)
        self.has_bytes = "nowhere" not in config.nodes
        self.nr_pages = config.size // PAGE_SIZE
        if self.has_bytes:
            words = np.random.default_rng(config.seed).integers(0, 1 << 64, config.size // 8, np.uint64)
            self.random_bytes = words.view(np.uint8)
            self.page_sums = checksum_pages(self.random_bytes.reshape(-1, PAGE_SIZE)) if "device" in config.nodes else None

    def run(self, engine, migrator, order, round_nr, *, time_copies=False, limits=None):
        """Migrate all of ``config.size`` in folios of ``order`` once; the Run. Takes the limit too if ``limits`` is given.

        Runs with the same order and ``round_nr`` move the same bytes and list of virtual addresses.
        """
        machine, size = self.machine, self.config.size
        rng = np.random.default_rng((self.config.seed, order, round_nr))
        process = machine.process("bench")
        try:
            address = process.mmap(size, order=order, nid=0)
            first_page = int(rng.integers(self.nr_pages))
            self.write(process, address, first_page)
            folios = machine.folios_of(process, address, size)
            self.check_fresh(folios, order)
            sequence = rng.permutation(len(folios))
            listed = folios[sequence]
            self.poison_node(1)

            use_copy_kernel(machine, engine.path_kernel)
            with machine.migrator(migrator) if migrator else contextlib.nullcontext(), no_garbage_collection():
                cpu, wall = time.process_time_ns(), time.perf_counter_ns()
                result = machine.migrate_pages(listed, 1, mode=self.config.mode, reason=REASON, time_copies=time_copies)
                wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu

            verified = self.verify(process, address, first_page, order, result)
            if limits and verified:
                arrived = machine.folios_of(process, address, size)[sequence]
                self.poison_node(1)
                limits.measure_scattered(engine, machine.frames, arrived, listed, order)
            return Run(result, wall, cpu, verified)
        finally:
            process.exit()
            machine.lru_add_drain()     # it may hold the last folios

    def check_fresh(self, folios, order):
        """BrokenInvariant unless the folios just faulted in are all of ``order`` on node 0."""
        records = self.machine.mem.folios
        if len(folios) != self.nr_pages >> order or (records.order[folios] != order).any() or records.nid[folios].any():
            raise BrokenInvariant(f"{format_size(self.config.size)} did not fault in as folios of order {order} on node 0; "
                                  f"please report it")

    def poison_node(self, nid):
        """Fill the frames of a node on which nothing is, so that a copy that is left out shows."""
        if self.has_bytes:
            node = self.machine.mem.nodes[nid]
            self.machine.frames.fill(int(node.start_pfn), int(node.nr_pages), POISON)

    # The page at address + 4096 * i holds page (first_page + i) mod nr_pages of the random bytes.

    def pieces(self, first_page):
        """(offset from the address, bytes that belong there), in two parts."""
        turn = first_page * PAGE_SIZE
        yield 0, self.random_bytes[turn:]
        yield self.config.size - turn, self.random_bytes[:turn]

    def write(self, process, address, first_page):
        if self.has_bytes:
            for offset, piece in self.pieces(first_page):
                if len(piece):
                    process.write(address + offset, piece)

    def verify(self, process, address, first_page, order, result):
        """Whether all arrived: each folio whole on node 1, and every byte right as the process reads it."""
        folios = self.machine.folios_of(process, address, self.config.size)
        records = self.machine.mem.folios
        return (result.rc == 0 and result.moved_bytes == self.config.size and len(folios) == self.nr_pages >> order
                and bool((records.nid[folios] == 1).all()) and bool((records.order[folios] == order).all())
                and (not self.has_bytes or (self.bytes_are_right(process, address, first_page) if self.page_sums is None else
                                            self.checksums_are_right(folios, order, first_page))))

    def checksums_are_right(self, folios, order, first_page):
        """Whether the frames of ``folios``, which the process maps from ``address`` on, have the checksums of what belongs there."""
        pages = (folios[:, None] + np.arange(1 << order)).reshape(-1)
        return np.array_equal(self.machine.frames.checksums(pages), np.roll(self.page_sums, -first_page))

    def bytes_are_right(self, process, address, first_page):
        for offset, piece in self.pieces(first_page):
            for at in range(0, len(piece), CHUNK):
                expected = piece[at:at + CHUNK].view(np.uint64)
                found = np.frombuffer(process.read(address + offset + at, expected.nbytes), np.uint64)
                if not np.array_equal(found, expected):
                    return False
        return True


def use_copy_kernel(machine, kernel):
    """Have the move phase of ``machine`` copy with this kernel.

    One machine serves all engines because a second one would lie in other memory, and where huge pages happen to be
    had decides more than the engine does.
    """
    machine.mem.sys.copy_kernel[0] = KERNELS.index(kernel)


@contextlib.contextmanager
def no_garbage_collection():
    """Keep Python from looking for garbage inside the block (as timeit does)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# 2. All runs.

def run_bench(config, *, step=None):
    """Run the whole benchmark and return its result, the dict that tables and JSON are made of.

    ``step(what)`` is called after each of ``config.runs`` migrations. Compiles first (:func:`compile_once`). Raises
    OutOfMemory if this host cannot hold it. A cell that does not verify is a row with ``verified`` False.
    """
    compile_once(config)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = []
    with Session(config, step) as session:
        for order in config.orders:
            cells = session.run_order(order)
            rows += [make_row(config, engine, order, *cell, handed) for engine, cell, handed in zip(config.engines, cells, session.handed())]
        limits = session.limits.medians()
    for row in rows:
        by_order = limits["scattered_copy_gbps"].get(f"{row['copy_kernel']}:{row['threads']}", {})
        row["limit_gbps"] = by_order.get(str(row["order"]))
    return {"format": 1, "manifest": make_manifest(config, date), "limits": limits, "rows": rows}


class Session:
    """A Bench with a migrator for each engine, and the limits. Use in a ``with`` block, which ends all threads."""

    def __init__(self, config, step=None):
        self.config, self.step = config, step
        self.bench = Bench(config)
        self.limits = Limits(config.engines)
        self.migrators = [engine.make_migrator() for engine in config.engines]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for one in (self.limits, *filter(None, self.migrators)):
            one.close()

    def handed(self):
        """For each engine how many batches ``auto`` gave to whom since the last call, by name; None for the others."""
        out = [dict(migrator.handed) if hasattr(migrator, "handed") else None for migrator in self.migrators]
        for migrator in self.migrators:
            if hasattr(migrator, "handed"):
                migrator.handed.clear()
        return out

    def run_order(self, order):
        """All rounds of one order: for each engine its timed Runs, and the others, the last with its copies timed."""
        config, engines = self.config, self.config.engines
        cells = [([], []) for _ in engines]
        for round_nr in range(config.warmup + config.repeat + 1):
            extra = round_nr == config.warmup + config.repeat
            timed = round_nr >= config.warmup and not extra
            limits = self.limits if timed and self.bench.has_bytes else None
            for turn in range(len(engines)):
                which = (turn + round_nr) % len(engines)
                run = self.bench.run(engines[which], self.migrators[which], order, round_nr, time_copies=extra, limits=limits)
                cells[which][0 if timed else 1].append(run)
                if self.step:
                    self.step(f"{engines[which].name} {format_size(PAGE_SIZE << order)}")
            if limits:
                self.bench.poison_node(1)
                first = self.bench.machine.mem.nodes.start_pfn.tolist()
                limits.measure_contiguous(self.bench.machine.frames, first[1], first[0], config.size // PAGE_SIZE)
        return cells


def make_row(config, engine, order, timed, others, handed=None):
    """The row of a cell, all but its limit, from its timed Runs and the others, the last of which timed its copies; ``handed``
    as :meth:`Session.handed` has it."""
    blocked = np.concatenate([run.result.blocked_ns for run in timed])
    row = {"engine": engine.name, "copy_kernel": engine.copy_kernel, "threads": engine.threads,
           "batch_pages": config.batch_pages, "order": order, "folios": config.size // (PAGE_SIZE << order),
           "limit_gbps": None, "gbps": None, "wall_ns": [run.wall_ns for run in timed],
           "phases_ns": {phase: others[-1].result.phases_ns[phase] for phase in PHASES},
           "blocked_ns": {"first": int(np.median([run.result.blocked_ns[0] for run in timed])),
                          "p50": int(np.percentile(blocked, 50)), "p99": int(np.percentile(blocked, 99)),
                          "max": int(blocked.max())},
           "cpu_s": float(np.mean([run.cpu_ns for run in timed])) / 1e9,
           "moved_bytes": min(run.result.moved_bytes for run in timed),
           "verified": all(run.verified for run in timed + others), "handed": handed, **what_ran(engine, config.nodes)}
    if "nowhere" not in config.nodes:
        row["gbps"] = spread([run.result.moved_bytes / run.wall_ns for run in timed])
    else:
        row["ns_per_folio"] = spread([run.wall_ns / row["folios"] for run in timed])
    return row


def spread(samples):
    """Mean, standard deviation of the sample (None of a single one) and the values, in the order they were measured."""
    return {"mean": float(np.mean(samples)), "sd": float(np.std(samples, ddof=1)) if len(samples) > 1 else None,
            "samples": [float(value) for value in samples]}


def make_manifest(config, date):
    """Everything needed to repeat the run and to read its numbers."""
    on_gpu = bool({"pinned", "device"} & set(config.nodes))
    return host_manifest() | ({"gpu": gpu_manifest()} if on_gpu else {}) | {
        "date": date, "command": config.command_line(), "seed": config.seed, "size": config.size,
        "orders": list(config.orders), "engines": [engine.name for engine in config.engines], "repeat": config.repeat,
        "warmup": config.warmup, "batch_pages": config.batch_pages, "mode": config.mode.name, "protocol": config.protocol, "reason": REASON,
        "nodes": list(config.nodes), "notes": make_notes(config),
        "units": {"gbps": "10^9 bytes of payload that arrived per second: each byte copied counts once", "cpu_s": "seconds of all threads, mean of the timed runs",
                  "phases_ns": "ns per run", "blocked_ns": "ns per folio", "ns_per_folio": "ns of wall clock",
                  "wall_ns": "ns of the whole call in each timed run",
                  "moved_bytes": "bytes per run, the least of the timed runs",
                  "handed": "batches of all runs of a cell, those not timed among them, by the engine that auto gave them to"},
        "timed": "one migrate_pages() call from Python: isolation, all batches, putback; not faulting in, filling, "
                 "poisoning, verifying",
        "phases": "one extra run of each cell that is not timed, with two more clock readings a copy in the move phase",
        "verified": "each folio whole on node 1, in every run; there are no bytes" if "nowhere" in config.nodes else
                    "a checksum of 64 bits of every page, made where it lies, and each folio whole on node 1, in every run"
                    if "device" in config.nodes else "every byte through the page table, and each folio whole on node 1, in every run",
    }


def make_notes(config):
    """What a reader of the numbers must know: engines left out, the engines' notes, and a size that never leaves the cache."""
    notes = [*config.notes, *(engine.note for engine in config.engines if engine.note)]
    cache = last_level_cache()
    if not {"nowhere", "device"} & set(config.nodes) and cache and 2 * config.size <= cache:
        notes.append(f"sources and destinations ({format_bytes(2 * config.size)}) fit into the last-level cache ({format_bytes(cache)}): "
                     f"this measures the cache, not the memory; use a --size several times the cache")
    return notes


# 3. Compiling before anything is timed.

def compile_once(config):
    """Compile, or load from the cache, all that the benchmark runs, by tiny migrations."""
    nodes = config.nodes if {"pinned", "device"} & set(config.nodes) or any(engine.on_gpu for engine in config.engines) else ("host", "host")
    always = ("vanilla", "batch") if "device" in nodes else ("vanilla", "batch", "mt:2")
    engines = tuple(dict.fromkeys((*map(parse_engine, always), *config.engines)))
    tiny = dataclasses.replace(config, size=PAGE_SIZE << HPAGE_PMD_ORDER, orders=(0, HPAGE_PMD_ORDER), engines=engines,
                               repeat=1, warmup=0, nodes=nodes)
    with exit_on_interrupt(), Session(tiny) as session:
        for order in tiny.orders:
            session.run_order(order)
