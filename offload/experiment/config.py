"""What a benchmark is asked to do: one frozen configuration, checked before any work. Imports nothing heavy.

Leaves out how it is done (bench.py).
"""

import contextlib
import dataclasses
import pathlib

from offload.engines import Engine, check_device, default_engines, parse_engine
from offload.errors import InvalidInput
from offload.units import (
    HPAGE_PMD_ORDER, MAX_PAGE_ORDER, NR_MAX_BATCHED_MIGRATION, PAGE_SIZE, PROTOCOLS, MigrateMode, check_nodes, format_size, parse_mode, parse_nodes,
    parse_protocol, parse_size,
)

__all__ = ("BenchConfig", "DEFAULTS", "MOST", "MOST_RUNS", "available_bytes", "check_counts", "format_exact", "parse_order", "split_list")

DEFAULTS = {"size": "256M", "orders": "0,2,4,6,8,9", "engines": None, "repeat": 5, "warmup": 1, "batch_pages": NR_MAX_BATCHED_MIGRATION,
            "mode": "MIGRATE_SYNC", "protocol": "v6", "nodes": "host,host", "seed": 0}
"""Texts and numbers of the command line. Engines None: those of default_engines()."""

MOST = 1 << 40
"""Of bytes, pages and folios: beyond use, and far from overflowing."""
MOST_RUNS = 10_000
"""Of one cell: each is kept, and takes milliseconds to seconds."""
BLOCK = PAGE_SIZE << MAX_PAGE_ORDER
RECORD_BYTES = 64
"""Of one page in the memmap, at most."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """A benchmark to run, checked when made: InvalidInput or EngineUnavailable says what cannot be.

    ``size``: bytes migrated in each run, a multiple of the largest folio. ``orders``: folio orders 0 to 9. ``repeat`` timed
    runs of each cell follow ``warmup`` untimed ones. ``nodes``: where the frames of each node lie, "host", "pinned" or "device";
    or both "nowhere" for metadata alone. ``notes``: what a reader must know of how it came about.
    """

    size: int
    orders: tuple[int, ...]
    engines: tuple[Engine, ...]
    repeat: int = DEFAULTS["repeat"]
    warmup: int = DEFAULTS["warmup"]
    batch_pages: int = DEFAULTS["batch_pages"]
    mode: MigrateMode = MigrateMode.MIGRATE_SYNC
    protocol: str = DEFAULTS["protocol"]
    nodes: tuple[str, str] = ("host", "host")
    seed: int = DEFAULTS["seed"]
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, **texts):
        """From the texts of the command line, by the names of DEFAULTS; what is not given is the default."""
        given = DEFAULTS | texts
        orders = tuple(parse_order(word) for word in split_list("orders", given["orders"]))
        nodes = parse_nodes(given["nodes"])
        if given["engines"] is None:
            names, left_out = default_engines(nodes)
        else:
            names, left_out = split_list("engines", given["engines"]), None
        others = tuple(parse_engine(name) for name in names if name != "auto")
        config = cls(size=parse_size(given["size"], multiple_of=PAGE_SIZE << max(orders)), orders=orders,
                     engines=others or (parse_engine("vanilla"),), repeat=given["repeat"], warmup=given["warmup"],
                     batch_pages=given["batch_pages"], mode=parse_mode(given["mode"]), protocol=PROTOCOLS[parse_protocol(given["protocol"])],
                     nodes=nodes, seed=given["seed"], notes=(left_out,) if left_out else ())
        if "auto" not in names:
            return config
        # Only now, when nothing is left to be refused: it may measure on the device.
        return dataclasses.replace(config, engines=tuple(parse_engine(name, nodes) for name in names))

    def __post_init__(self):
        parse_protocol(self.protocol)
        check_counts(self, repeat=(1, MOST_RUNS), warmup=(0, MOST_RUNS), batch_pages=(1, MOST), seed=(0, MOST))
        for name in ("orders", "engines"):
            values = getattr(self, name)
            if not values:
                raise InvalidInput(f"{name} is empty; name at least one")
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise InvalidInput(f"{name} names {getattr(twice[0], 'name', twice[0])} twice; name each once")
        for order in self.orders:
            parse_order(order)
        if self.size % (PAGE_SIZE << max(self.orders)) or self.size <= 0:
            raise InvalidInput(f"size {self.size} is not a positive multiple of the largest folio, "
                               f"{format_size(PAGE_SIZE << max(self.orders))}; round it to one")
        check_nodes(self.nodes)
        check_device(self.nodes, self.nodes.count("device") * (self.node_pages * PAGE_SIZE + BLOCK), f"size {format_size(self.size)}")
        for engine in self.engines:
            engine.check_nodes(self.nodes)
        need, available = needed_bytes(self), available_bytes()
        if need > available:
            raise InvalidInput(f"size {format_size(self.size)} needs about {need / 1e9:.1f} GB of memory and "
                               f"{available / 1e9:.1f} GB is available; use a smaller --size")

    @property
    def node_pages(self):
        """Base pages of each node: the folios, rounded up to blocks of the buddy allocator, and one block to spare."""
        return (-(-self.size // BLOCK) + 1) * BLOCK // PAGE_SIZE

    @property
    def runs(self):
        """How many migrations it takes: the rounds, and one for the phase times of each cell."""
        return len(self.orders) * len(self.engines) * (self.warmup + self.repeat + 1)

    def command_line(self):
        """The command that asks for exactly this, every option named."""
        return (f"offload bench --size {format_exact(self.size)} --orders {','.join(map(str, self.orders))} "
                f"--engines {','.join(engine.name for engine in self.engines)} --repeat {self.repeat} "
                f"--warmup {self.warmup} --batch-pages {self.batch_pages} --mode {self.mode.name} --protocol {self.protocol} "
                f"--nodes {','.join(self.nodes)} --seed {self.seed}")


EXAMPLES = {"orders": DEFAULTS["orders"], "engines": "vanilla,batch+stream"}


def check_counts(config, **bounds):
    """InvalidInput unless each of these fields is a whole number within its bounds (least, most)."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidInput(f"{name.replace('_', '-')} {value!r} cannot be; give a whole number from {least} to {most}")


def split_list(name, text):
    words = [word.strip() for word in str(text).split(",")]
    if not all(words):
        raise InvalidInput(f"{name} {text!r} is no list; write them with commas between, such as {EXAMPLES[name]}")
    return words


def parse_order(text):
    """A folio order that page tables can map, 0 to 9, from a number or its text."""
    word = str(text)
    if isinstance(text, bool) or not (word.isascii() and word.isdigit()) or not 0 <= int(word) <= HPAGE_PMD_ORDER:
        raise InvalidInput(f"order {text!r} is out of range; orders are 0 (4K) to {HPAGE_PMD_ORDER} (2M)")
    return int(word)


def format_exact(nbytes):
    """As format_size() where that is exact, else the number: what is read back is the same."""
    text = format_size(nbytes)
    return str(nbytes) if "." in text else text


def needed_bytes(config):
    """About how many bytes of host memory the benchmark takes at most."""
    nr_folios = config.size // (PAGE_SIZE << min(config.orders))
    metadata = 2 * config.node_pages * (RECORD_BYTES + 16)
    lists = nr_folios * (200 + 8 * config.repeat * len(config.engines))
    here = sum(placement in ("host", "pinned") for placement in config.nodes)
    frames = here * config.node_pages * PAGE_SIZE + config.size if "nowhere" not in config.nodes else 0
    return metadata + lists + frames + (128 << 20)


def available_bytes():
    """Bytes of memory that can be had without swapping: the least of what the kernel and a control group tell."""
    available = [1 << 62]
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as lines:
        available += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):          # "max" is no number
        limit, used = (int(pathlib.Path("/sys/fs/cgroup", name).read_text("ascii"))
                       for name in ("memory.max", "memory.current"))
        available.append(max(limit - used, 0))
    return min(available)
