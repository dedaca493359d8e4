"""offload bench-engine: one large batch copied by each engine alone, without any migration, beside what the device gives at most.

A migration's batches are over sooner than a GPU has begun, so what an engine can do shows here: one batch of many folios of one
size in random order at both ends. Stands for dmatest (drivers/dma/dmatest.c) rather than for the benchmarks of the series. The
result is one dict, :func:`run_alone`'s; tables (alone_tables.py), JSON and evidence are made of it. Leaves out sweeps over
batch sizes (calibration.py has one of its own) and other tenants of the device.

What one run of a cell (from, to, folio order, engine) does:

1. poison every frame of the destination; the sources hold random bytes;
2. copy the batch, timed: the whole copy() call with a clock around it; and for a GPU's engines once more with events on the
   stream, and cuda-kernel once more with its list already on the device;
3. compare every byte of the destination, brought to the host, after each of them.

The engines take turns, and the ceilings are measured in front of them. *End to end* of a migration, with the two batch limits
that matter, is what ``offload bench`` measures for the same folios; it stands beside each cell.
"""

import dataclasses
import mmap
import statistics
import time

import numpy as np

from offload.engines import GPU_DEFAULTS, Engine, available, check_device, left_out, parse_engine
from offload.errors import EngineUnavailable, InvalidInput, OffloadError
from offload.experiment.bench import no_garbage_collection, run_bench
from offload.experiment.config import MOST, MOST_RUNS, BenchConfig, available_bytes, check_counts, format_exact, parse_order, split_list
from offload.experiment.manifest import gpu_manifest, host_manifest, last_level_cache, what_ran
from offload.kernels import cuda
from offload.kernels.base import CACHE_LINE, CopyPlan
from offload.kernels.cuda import open_device
from offload.kernels.cuda_driver import CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, CudaError
from offload.kernels.cuda_engines import WAYS, CudaBackend
from offload.kernels.cuda_timing import CudaTimer, DeviceRows, PinnedRows, measure_ceilings
from offload.units import HPAGE_PUD_NR, NR_MAX_BATCHED_MIGRATION, PAGE_SIZE, format_bytes, format_size, parse_size

__all__ = ("AloneConfig", "run_alone", "LIMITS")

LIMITS = (NR_MAX_BATCHED_MIGRATION, HPAGE_PUD_NR)
"""Base pages at which a batch of the migration beside closes: mainline's limit, and that of the published tables."""
POISON = 0xAA
PIECE_FRAMES = 8192
"""Poisoned and compared at a time."""
PLACEMENTS = ("host", "pinned", "device")
GPU_PAIRS = (("device", "device"), ("pinned", "device"), ("device", "pinned"), ("pinned", "pinned"))
CPU_ENGINES = ("batch", "batch+stream")


# 1. What is asked for.

@dataclasses.dataclass(frozen=True)
class AloneConfig:
    """What to measure, checked when made: InvalidInput, or EngineUnavailable with the reason.

    ``folios`` in a batch, fewer where ``size`` bytes hold fewer. ``pairs`` of placements, from and to. ``engines`` are names; one
    that does not reach a pair is left out there. ``migration``: also measure the migrations beside. ``notes``: what a reader must
    know of how it came about.
    """

    folios: int
    size: int
    orders: tuple[int, ...]
    engines: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    repeat: int = 5
    warmup: int = 1
    seed: int = 0
    migration: bool = True
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, *, folios=100_000, size="1G", orders="0,4,9", engines=None, nodes=(), repeat=5, warmup=1, seed=0, migration=True):
        """From the texts of the command line. Without engines and nodes: all that this machine has."""
        on_gpu = cuda.probe().reason is None
        pairs = tuple(parse_pair(text) for text in nodes) or (GPU_PAIRS if on_gpu else (("host", "host"),))
        if engines is None:
            names, not_here = available(CPU_ENGINES + (GPU_DEFAULTS if on_gpu else ()))
        else:
            names, not_here = split_list("engines", engines), {}
        return cls(folios, parse_size(size), tuple(parse_order(word) for word in split_list("orders", orders)), tuple(names), pairs,
                   repeat, warmup, seed, migration, (left_out(not_here),) if not_here else ())

    def __post_init__(self):
        check_counts(self, folios=(1, MOST), size=(PAGE_SIZE, MOST), repeat=(1, MOST_RUNS), warmup=(0, MOST_RUNS), seed=(0, MOST))
        for name, values in (("orders", self.orders), ("engines", self.engines), ("nodes", tuple(map(",".join, self.pairs)))):
            twice = [value for value in values if values.count(value) > 1]
            if twice or not values:
                raise InvalidInput(f"{name} names {f'{twice[0]} twice' if twice else 'none'}; name each once")
        for order in self.orders:
            if self.size < PAGE_SIZE << order:
                raise InvalidInput(f"size {format_size(self.size)} holds no folio of {format_size(PAGE_SIZE << order)}; use a larger "
                                   f"--size or smaller --orders")
        for name in self.engines:
            parse_engine(name)
        check_device(sorted(self.kinds), 2 * self.nr_frames * PAGE_SIZE * ("device" in self.kinds),     # its reason first
                     f"two batches of {format_size(self.nr_frames * PAGE_SIZE)}")
        for pair in self.pairs:
            if not any(name == "auto" or serves(parse_engine(name), pair) for name in self.engines):
                raise InvalidInput(f"nodes {','.join(pair)} are served by none of the engines {','.join(self.engines)}; GPU engines reach "
                                   f"pinned and device (cuda-loop:N also host and device), CPU engines host and pinned")
        need, available = self.needed_bytes(), available_bytes()
        if need > available:
            raise InvalidInput(f"a batch of {format_size(self.nr_frames * PAGE_SIZE)} needs about {need / 1e9:.1f} GB of memory and "
                               f"{available / 1e9:.1f} GB is available; use a smaller --size or --folios")

    def count(self, order):
        """How many folios of ``order`` are in a batch."""
        return min(self.folios, self.size // (PAGE_SIZE << order))

    @property
    def nr_frames(self):
        """Of the largest batch."""
        return max(self.count(order) << order for order in self.orders)

    @property
    def kinds(self):
        """Of memory that is needed: those of the pairs, and with device memory pinned memory, for the ceilings up and down."""
        kinds = {placement for pair in self.pairs for placement in pair}
        return kinds | ({"pinned"} if "device" in kinds else set())

    def needed_bytes(self):
        """About how much host memory it takes: the bytes, what is expected, and two pieces of each kind that lies there."""
        here = 2 + 2 * len(self.kinds & {"host", "pinned"})
        return here * self.nr_frames * PAGE_SIZE + (256 << 20)

    @property
    def steps(self):
        """How many cells there are, those of the migrations among them: an upper limit."""
        cells = len(self.pairs) * len(self.orders)
        return cells * len(self.engines) + cells * len(LIMITS) * self.migration

    def command_line(self):
        nodes = " ".join(f"--nodes {','.join(pair)}" for pair in self.pairs)
        return (f"offload bench-engine --folios {self.folios} --size {format_exact(self.size)} --orders {','.join(map(str, self.orders))} "
                f"--engines {','.join(self.engines)} {nodes} --repeat {self.repeat} --warmup {self.warmup} --seed {self.seed}"
                f"{'' if self.migration else ' --no-migration'}")


def parse_pair(text):
    pair = tuple(word.strip() for word in str(text).split(","))
    if len(pair) != 2 or not set(pair) <= set(PLACEMENTS):
        raise InvalidInput(f"nodes {text!r} are not two placements; write from and to as two of host, pinned and device with a comma "
                           f"between")
    return pair


def serves(engine, pair):
    """Whether an Engine copies batches between these placements. (Folio by folio, in a migration, more of them do.)"""
    return engine.out_of_reach(pair) is None and (engine.on_gpu or "device" not in pair)


# 2. Memory: frames of each kind, two pieces of them. A batch goes from the first of one kind to the second of another.

class HostRows:
    """Frames in ordinary memory: the members of PinnedRows and DeviceRows."""

    def __init__(self, nr_frames):
        self._map = mmap.mmap(-1, nr_frames * PAGE_SIZE)
        self._rows = np.frombuffer(self._map, np.uint8).reshape(-1, PAGE_SIZE)
        self.base = self._rows.ctypes.data
        assert self.base % CACHE_LINE == 0

    def put(self, frame, rows):
        self._rows[frame:frame + len(rows)] = rows

    def get(self, frame, nr):
        return self._rows[frame:frame + nr]

    def close(self):
        self._rows = None                           # the mapping goes with the last view


class Memory:
    """The pieces of each kind, and the random bytes. Use in a ``with`` block."""

    def __init__(self, config):
        self.config, self.pieces = config, {}
        rng = np.random.default_rng(config.seed)
        self.content = rng.integers(0, 1 << 64, (config.nr_frames, PAGE_SIZE // 8), np.uint64).view(np.uint8)
        self.poison = np.full((min(config.nr_frames, PIECE_FRAMES), PAGE_SIZE), POISON, np.uint8)

    def __enter__(self):
        try:
            for kind in PLACEMENTS:
                if kind in self.config.kinds:
                    pieces = self.pieces[kind] = []
                    for _ in range(2):
                        pieces.append(self._piece(kind))
                    pieces[0].put(0, self.content)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _piece(self, kind):
        if kind == "host":
            return HostRows(self.config.nr_frames)
        rows = PinnedRows if kind == "pinned" else DeviceRows
        return rows(open_device(), self.config.nr_frames)

    def __exit__(self, *exception):
        for pieces in self.pieces.values():
            for piece in pieces:
                piece.close()

    def poison_all(self, piece, nr_frames):
        for at in range(0, nr_frames, len(self.poison)):
            piece.put(at, self.poison[:nr_frames - at])


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of one cell: its plan, and what the destination must hold afterwards (rows of 4096 bytes)."""

    plan: CopyPlan
    dst: object
    expected: np.ndarray


def make_batch(config, memory, pair, order):
    """A Batch of folios of ``order``, all of them in random order at both ends."""
    nr, rng = config.count(order), np.random.default_rng((config.seed, order))
    src, dst = (rng.permutation(nr).astype(np.int64) for _ in range(2))
    src_rows, dst_rows = memory.pieces[pair[0]][0], memory.pieces[pair[1]][1]
    expected = np.empty((nr << order, PAGE_SIZE), np.uint8)
    expected.reshape(nr, -1)[dst] = memory.content[:nr << order].reshape(nr, -1)[src]
    return Batch(CopyPlan(dst_rows.base, src_rows.base, dst << order, src << order, np.full(nr, order, np.uint8)), dst_rows, expected)


# 3. Engines, as they are measured.

class Measured:
    """An engine in a cell: its backend, and the samples of its runs. ``overlap``: cuda-batch's flag. close() when done."""

    def __init__(self, engine: Engine, overlap=False):
        self.engine, self.overlap = engine, overlap
        if engine.copy_kernel in WAYS:
            self.backend = CudaBackend(open_device(), engine.copy_kernel, engine.threads, check=False, overlap=overlap)
            self.timer = CudaTimer(self.backend.provider)
        else:
            self.backend, self.timer = engine.make_backend(), None
        self.whole, self.times, self.resident = [], [], []
        self.verified = True

    def close(self):
        if self.timer:
            self.timer.close()
        self.backend.close()

    def run(self, memory, batch, *, timed):
        """Copy the batch in each way that this engine is measured in; keep the times if ``timed``."""
        whole = self._checked(memory, batch, self._copy_whole)
        times = self._checked(memory, batch, self._copy_with_events) if self.timer else None
        resident = self._checked(memory, batch, self._copy_resident) if self.engine.copy_kernel == "cuda-kernel" else None
        if timed:
            for kept, sample in ((self.whole, whole), (self.times, times), (self.resident, resident)):
                if sample is not None:
                    kept.append(sample)

    def _copy_whole(self, plan, done):
        with no_garbage_collection():
            started = time.perf_counter_ns()
            self.backend.copy(plan, done)
            return time.perf_counter_ns() - started

    def _copy_with_events(self, plan, done):
        with no_garbage_collection():
            return self.timer.run(plan, done)

    def _copy_resident(self, plan, done):
        with no_garbage_collection():
            return self.timer.run(plan, done, resident=True)

    def _checked(self, memory, batch, copy):
        plan, nr_frames = batch.plan, len(batch.expected)
        memory.poison_all(batch.dst, nr_frames)
        done = np.zeros(plan.nr_folios, np.uint8)
        sample = copy(plan, done)
        self.verified &= bool(done.all()) and all(
            np.array_equal(batch.dst.get(at, min(PIECE_FRAMES, nr_frames - at)), batch.expected[at:at + PIECE_FRAMES])
            for at in range(0, nr_frames, PIECE_FRAMES))
        return sample


def measured_engines(config, pair):
    """A Measured for each engine that serves a pair; cuda-batch twice, without and with its overlap flag."""
    out = []
    for name in config.engines:
        engine = parse_engine(name, pair)
        if not serves(engine, pair):
            continue
        out.append(Measured(engine))
        if engine.copy_kernel == "cuda-batch":
            out.append(Measured(engine, overlap=True))
    return out


# 4. All cells.

def run_alone(config, *, step=None):
    """Measure everything and return the result. ``step(what)`` is called after each of at most ``config.steps`` cells.

    EngineUnavailable if the device goes out of service meanwhile, OutOfMemory if it has not so much. A cell whose bytes did not
    all arrive is a row with ``verified`` False.
    """
    step = step or (lambda what: None)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    notes = dict.fromkeys((*config.notes, *cache_notes(config)))
    try:
        ceilings, rows = run_cells(config, notes, step)
    except CudaError as error:
        raise EngineUnavailable(f"{open_device().name} went out of service: {error}; nothing was measured") from None
    for row in rows:
        add_shares(row, ceilings)
    migrations = [one for pair in config.pairs for order in config.orders for one in run_migrations(config, pair, order, step)
                  ] if config.migration else []
    return {"format": 1, "kind": "engine alone", "manifest": make_manifest(config, date, list(notes)), "ceilings": ceilings,
            "rows": rows, "migrations": migrations}


def cache_notes(config):
    """A line for each cache that batches are too small for: both ends of one less than four times as large, so that it may be what is
    measured."""
    caches = {"the last-level cache of the CPU": last_level_cache() if any("device" not in pair for pair in config.pairs) else None,
              "the device's L2 cache": l2_cache() if ("device", "device") in config.pairs else None}
    for name, cache in caches.items():
        small = [format_size(PAGE_SIZE << order) for order in config.orders if 2 * (config.count(order) * PAGE_SIZE << order) < 4 * (cache or 0)]
        if small:
            yield (f"batches of {', '.join(small)} folios take less than four times {name} ({format_bytes(cache)}): they may show the cache, not "
                   f"the memory; use more --folios and a larger --size")


def l2_cache():
    """Bytes of the device's L2 cache, or 0 where it does not tell."""
    driver = open_device().driver
    return driver.attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, driver.device(0))        # the one that is taken


def run_cells(config, notes, step):
    """(ceilings or None, rows) of all pairs and orders. ``notes`` gets those of the engines, as keys."""
    rows, ceilings = [], None
    if "auto" in config.engines:
        for pair in config.pairs:                   # what it measures needs memory of its own
            parse_engine("auto", pair)
    with Memory(config) as memory:
        if "device" in config.kinds:
            both = {kind: [piece.base for piece in memory.pieces[kind]] for kind in ("pinned", "device")}
            ceilings = measure_ceilings(open_device(), both, config.nr_frames * PAGE_SIZE, config.repeat)
        for pair in config.pairs:
            for order in config.orders:
                rows += run_cell(config, memory, pair, order, notes, step)
    return ceilings, rows


def run_cell(config, memory, pair, order, notes, step):
    """The rows of one pair and order: every engine that serves them, in turns."""
    batch, engines = make_batch(config, memory, pair, order), measured_engines(config, pair)
    try:
        for round_nr in range(config.warmup + config.repeat):
            for turn in range(len(engines)):
                engines[(turn + round_nr) % len(engines)].run(memory, batch, timed=round_nr >= config.warmup)
        rows = [make_row(one, pair, order, batch) for one in engines]
        notes.update(dict.fromkeys(one.engine.note for one in engines if one.engine.note))
    finally:
        for one in engines:
            one.close()
        for name in dict.fromkeys(one.engine.name for one in engines):
            step(f"{','.join(pair)} {format_size(PAGE_SIZE << order)} {name}")
    return rows


def make_row(one, pair, order, batch):
    """The row of a cell from its samples. ns; GB/s are payload over the median."""
    engine, plan, nbytes = one.engine, batch.plan, batch.plan.nbytes
    picked = (one.backend.backend_for(plan)[0] if engine.copy_kernel == "auto" else engine.settled) if engine.name == "auto" else None
    row = {"engine": engine.name, "from": pair[0], "to": pair[1], "order": order, "folios": plan.nr_folios, "bytes": nbytes,
           "picked": picked, **what_ran(engine, pair, picked=picked, overlap=one.overlap),
           "plan_ns": None, "submit_ns": None, "device_ns": None, "end_to_end_ns": spread_ns(one.whole),
           "gbps": gbps(nbytes, one.whole), "device_gbps": None, "resident": None, "verified": one.verified}
    if one.times:
        for name in ("plan_ns", "submit_ns", "device_ns"):
            row[name] = spread_ns([getattr(times, name) for times in one.times])
        row["device_gbps"] = gbps(nbytes, [times.device_ns for times in one.times])
    if one.resident:
        row["resident"] = {"submit_ns": spread_ns([times.submit_ns for times in one.resident]),
                           "device_ns": spread_ns([times.device_ns for times in one.resident]),
                           "end_to_end_ns": spread_ns([times.whole_ns for times in one.resident]),
                           "device_gbps": gbps(nbytes, [times.device_ns for times in one.resident])}
    return row


def spread_ns(samples):
    return {"median": statistics.median(samples), "samples": samples}


def gbps(nbytes, samples):
    median = statistics.median(samples)
    return nbytes / median if median else None


def add_shares(row, ceilings):
    """What part of the pair's ceiling a row reaches, by device time and end to end; None where there is no ceiling."""
    ceiling = (ceilings or {}).get(f"{row['from']},{row['to']}")
    for share, speed in (("share_of_ceiling", row["gbps"]), ("device_share_of_ceiling", row["device_gbps"])):
        row[share] = speed / ceiling["gbps"] if ceiling and ceiling["gbps"] and speed else None


def run_migrations(config, pair, order, step):
    """Migrations of the same folios between nodes of these placements, once for each of LIMITS; or why there are none."""
    nr, nbytes = config.count(order), config.count(order) * PAGE_SIZE << order
    names = [name for name in config.engines if parse_engine(name, pair).out_of_reach(pair) is None]
    out = []
    for batch_pages in LIMITS:
        head = {"from": pair[0], "to": pair[1], "order": order, "folios": nr, "bytes": nbytes, "batch_pages": batch_pages}
        try:
            result = run_bench(BenchConfig.parse(size=str(nbytes), orders=str(order), engines=",".join(names), nodes=",".join(pair),
                                                 repeat=config.repeat, warmup=config.warmup, batch_pages=batch_pages, seed=config.seed))
        except OffloadError as error:
            if isinstance(error, EngineUnavailable):
                raise
            out.append(head | {"engine": None, "end_to_end_ns": None, "gbps": None, "verified": None, "why_not": str(error)})
        else:
            out += [head | {"engine": row["engine"], "end_to_end_ns": spread_ns(row["wall_ns"]), "gbps": row["gbps"],
                            "verified": row["verified"], "why_not": None} for row in result["rows"]]
        step(f"{','.join(pair)} {format_size(PAGE_SIZE << order)} migration, batch limit {batch_pages}")
    return out


def make_manifest(config, date, notes):
    """Everything needed to repeat the run and to read its numbers."""
    return host_manifest() | {
        "gpu": gpu_manifest(), "date": date, "command": config.command_line(), "folios": config.folios, "size": config.size,
        "orders": list(config.orders), "engines": list(config.engines), "nodes": [list(pair) for pair in config.pairs],
        "repeat": config.repeat, "warmup": config.warmup, "seed": config.seed, "notes": notes,
        "units": {"gbps": "10^9 bytes of payload a second: each byte copied counts once", "ns": "of one batch",
                  "end_to_end_ns": "the whole copy() call: planning, queueing, the copy, waiting; not the overlap check",
                  "plan_ns": "merging or sorting, and the list into pinned memory", "submit_ns": "queueing, two event records a channel among it",
                  "device_ns": "by events on the stream, the list's upload among it",
                  "resident": "the same with the list on the device before the clock starts",
                  "ceilings": "one large cuMemcpyAsync by events; both directions together for both ways"},
        "hardware": "which unit moved the bytes is known for the CPU's engines alone; CUPTI is not asked",
        "verified": "every byte of the destination after every run, poisoned before it",
    }
