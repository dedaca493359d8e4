"""Which engine copies a batch the fastest on this machine's GPU: measured at first use, kept on disk, looked up for each batch.

What ``auto`` goes by. Nothing in the kernel does this; it stands for the person who would try every migrator first. Leaves
out what else runs on the device: the times are those of an idle one.

*What is measured*: a CopyBackend's whole copy() call, planning and waiting included, but not the check for overlaps, which is
alike for all of a GPU's; for batches of folios of one size, in
random order, over memory of the two placements. For each cell (folio order, number of folios) the median of five, the
engines taking turns. A direction is measured when it is first asked for.

*What is kept*: the times, in a file named after the device beside the compiled code, with what they hold for: device, driver,
kernel source, our sources, and the engines that there were. Where any of that differs, or the file is damaged, it is measured
anew, and one line says so.
"""

import functools
import hashlib
import json
import math
import pathlib
import re
import statistics
import sys
import time

import numpy as np

from offload.errors import EngineUnavailable, OffloadError
from offload.jit import cache_root, source_hash
from offload.kernels import cuda
from offload.kernels.base import FRAME_SHIFT, CopyPlan
from offload.kernels.cpu import CpuBackend
from offload.kernels.cuda import SOURCE, nvidia_driver, open_device, version_text, why_not
from offload.kernels.cuda_driver import CudaError
from offload.kernels.cuda_engines import WAYS, CudaBackend
from offload.kernels.cuda_timing import DeviceRows, PinnedRows
from offload.outfile import read_own, write_own
from offload.units import ENODEV, PAGE_SIZE, format_size

__all__ = ("Calibration", "AutoBackend", "open_calibration", "direction_of", "CPU", "ORDERS", "COUNTS")

FORMAT = 1
ORDERS = (0, 2, 4, 6, 9)
COUNTS = (1, 8, 64, 512, 4096, 32768)
REGION_FRAMES = 32768
"""At each end: 128 MiB, more than the caches of a device. Batches are no larger, so large folios are fewer."""
REPEAT = 5
CPU = "batch+stream"
"""The CPU's candidate where both ends are host memory: its copy on the calling thread."""


def say_on_stderr(line):
    print(line, file=sys.stderr, flush=True)


@functools.cache
def open_calibration():
    """The Calibration of this machine's device. EngineUnavailable with the reason if there is none."""
    device = open_device()
    makers = {"cuda-loop:1" if way == "cuda-loop" else way: functools.partial(CudaBackend, device, way, check=False)
              for way in WAYS if why_not(way) is None}
    makers[CPU] = functools.partial(CpuBackend, "stream")
    name = re.sub("[^A-Za-z0-9]+", "-", device.name).strip("-")
    return Calibration(device, makers, cache_root() / f"auto-{name}.json", holds_for(device))


def holds_for(device):
    """What times hold for, as the file has it."""
    return {"device": device.name, "cuda": version_text(cuda.probe().driver), "driver": nvidia_driver(),
            "kernel": hashlib.sha256(SOURCE.read_bytes()).hexdigest(), "sources": source_hash()}


class Calibration:
    """Times of the candidates by direction ("pinned,device": from, to), folio order and number of folios.

    ``makers`` give a fresh CopyBackend for each engine name, the CPU's among them, which is no candidate where an end is on the
    device. ``path`` is the file, ``holds_for`` what it must say. ``clock`` gives ns, ``say`` gets one line for each thing that was not as before.
    """

    def __init__(self, device, makers, path, holds_for, *, clock=time.perf_counter_ns, say=say_on_stderr):
        self.device, self.path, self.holds_for = device, pathlib.Path(path), holds_for
        self.makers, self.clock, self.say = makers, clock, say
        self._directions = self._load()             # {direction: [{order, folios, ns: {engine: ns}}]}
        self._picked, self._refused = {}, set()

    # 1. Asking.

    def cells(self, direction):
        """The cells of a direction, measured now if they are not known. EngineUnavailable if they cannot be."""
        found = self._directions.get(direction)
        candidates = self.candidates(direction)
        if found is not None and set(found[0]["ns"]) != set(candidates):
            self.say(f"offload: the calibration of auto in {self.path} is of {', '.join(found[0]['ns'])}, and there are "
                     f"{', '.join(candidates)}; measured anew")
            found = None
        if found is None:
            found = self._directions[direction] = self._measure(direction, candidates)
            self._save()
        return found

    def candidates(self, direction):
        """Names of the engines that serve a direction."""
        return [name for name in self.makers if name != CPU or "device" not in direction.split(",")]

    def pick(self, direction, nr_folios, nbytes):
        """The fastest engine for a batch of so many folios and bytes: that of the nearest cell, in powers of two."""
        key = direction, nr_folios.bit_length(), (nbytes // nr_folios).bit_length()
        if key not in self._picked:
            order, count = math.log2(nbytes / nr_folios / PAGE_SIZE), math.log2(nr_folios)
            nearest = min(self.cells(direction),
                          key=lambda cell: abs(cell["order"] - order) + abs(math.log2(cell["folios"]) - count))
            self._picked[key] = fastest(nearest)
        return self._picked[key]

    def pick_for(self, plan):
        """The same for a CopyPlan of at least one folio, wherever its frames lie. None where nobody can tell: the device is out of
        service, or this direction cannot be measured, which is said once."""
        if self.device.fault:
            return None
        try:
            direction = direction_of(self.device, plan)
        except CudaError as error:
            self.device.fail("auto", error)
            return None
        if direction in self._refused:
            return None
        try:
            return self.pick(direction, plan.nr_folios, plan.nbytes)
        except EngineUnavailable as error:
            self._refused.add(direction)
            self.say(f"offload: {error}")
            return None

    def winners(self, direction):
        return {fastest(cell) for cell in self.cells(direction)}

    def describe(self, direction):
        """What is chosen in a direction, in one line: for each folio size the engine, and from how many folios on."""
        by_order = {}
        for cell in self.cells(direction):
            steps = by_order.setdefault(cell["order"], [])
            if not steps or steps[-1][1] != fastest(cell):
                steps.append((cell["folios"], fastest(cell)))
        texts = {}                                  # what is chosen alike is said once
        for order, steps in by_order.items():
            text = ", ".join(name if nr == 1 else f"{name} from {nr} folios" for nr, name in steps)
            texts.setdefault(text, []).append(format_size(PAGE_SIZE << order))
        return "; ".join(f"{' '.join(sizes)} {text}" for text, sizes in texts.items())

    # 2. Measuring.

    def _measure(self, direction, candidates):
        self.say(f"offload: calibrating auto for {direction} on {self.device.name}, once for this driver")
        memory, backends = [], {name: self.makers[name]() for name in candidates}
        try:
            for placement in direction.split(","):
                memory.append(PinnedRows(self.device, REGION_FRAMES) if placement == "pinned" else
                              DeviceRows(self.device, REGION_FRAMES))
            payload = np.random.default_rng(0).integers(0, 256, (REGION_FRAMES, PAGE_SIZE), np.uint8)
            for piece in memory:                    # random at both ends, so that nothing is found compressible
                piece.put(0, payload)
            return measure_cells(backends, memory[1].base, memory[0].base, self.clock)
        except (CudaError, OffloadError) as error:
            raise EngineUnavailable(f"auto cannot be calibrated for {direction}: {error}; name an engine") from None
        finally:
            for one in (*backends.values(), *memory):
                one.close()

    # 3. The file.

    def _load(self):
        try:
            kept = json.loads(read_own(self.path).decode())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            return self._measured_anew(f"cannot be read ({' '.join(str(error).split())})")
        wrong = damage(kept)
        if wrong:
            return self._measured_anew(f"is damaged ({wrong})")
        for what, value in self.holds_for.items():
            if kept["holds_for"].get(what) != value:
                return self._measured_anew(f"holds for {what} {kept['holds_for'].get(what)}, and here is {value}")
        return kept["directions"]

    def _measured_anew(self, why):
        self.say(f"offload: the calibration of auto in {self.path} {why}; measured anew")
        return {}

    def _save(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"format": FORMAT, "holds_for": self.holds_for, "unit": "ns of a whole copy, median", "directions": self._directions}
            write_own(self.path, json.dumps(kept, indent=1).encode() + b"\n", "file")
        except (OSError, OffloadError) as error:
            self.say(f"offload: the calibration of auto cannot be kept in {self.path} ({error}); the next process measures anew")


def damage(kept):
    """What is wrong with the form of a file's contents, or None."""
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        return f"it is not of format {FORMAT}"
    if not isinstance(kept.get("holds_for"), dict) or not isinstance(kept.get("directions"), dict):
        return "parts of it are missing"
    for direction, cells in kept["directions"].items():
        if not isinstance(cells, list) or [(cell.get("order"), cell.get("folios")) for cell in cells if isinstance(cell, dict)] != grid():
            return f"its cells of {direction} are not those that are measured"
        for cell in cells:
            times = cell.get("ns")
            if not isinstance(times, dict) or not times or set(times) != set(cells[0]["ns"]) or not all(
                    isinstance(ns, (int, float)) and not isinstance(ns, bool) and 0 <= ns < math.inf for ns in times.values()):
                return f"its times of {direction} are none"
    return None


def grid():
    """(order, number of folios) of every cell."""
    return [(order, nr) for order in ORDERS for nr in COUNTS if nr << order <= REGION_FRAMES]


def fastest(cell):
    return min(cell["ns"], key=cell["ns"].get)


def measure_cells(backends, dst_base, src_base, clock):
    """The cells of a direction: each backend copies each cell's batch between REGION_FRAMES frames at both bases.

    EngineUnavailable if one does not copy all.
    """
    rng, cells = np.random.default_rng(0), []
    for order, nr in grid():
        dst, src = (rng.permutation(REGION_FRAMES >> order)[:nr].astype(np.int64) << order for _ in range(2))
        plan = CopyPlan(dst_base, src_base, dst, src, np.full(nr, order, np.uint8))
        samples = {name: [] for name in backends}
        for _ in range(1 + REPEAT):                 # the first of each is to warm up
            for name, backend in backends.items():
                done = np.zeros(nr, np.uint8)
                started = clock()
                error = backend.copy(plan, done)
                samples[name].append(clock() - started)
                if error:
                    raise EngineUnavailable(f"{name} copied {int(done.sum())} of {nr} folios (error {error})")
        cells.append({"order": order, "folios": nr, "ns": {name: statistics.median(of[1:]) for name, of in samples.items()}})
    return cells


def direction_of(device, plan):
    """From where to where a plan of at least one folio copies, as "pinned,device"; all host memory counts as pinned. CudaError
    from a device that does not answer."""
    device.enter()
    ends = (plan.src_base + (int(plan.src[0]) << FRAME_SHIFT), plan.dst_base + (int(plan.dst[0]) << FRAME_SHIFT))
    return ",".join("device" if device.driver.on_device(address) else "pinned" for address in ends)


class AutoBackend:
    """A CopyBackend that hands each plan to the engine that was measured to be the fastest for it."""

    name, threads = "auto", 1

    def __init__(self, calibration):
        self.calibration, self._backends = calibration, {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def backend_for(self, plan):
        """(engine name, its CopyBackend) for a plan of at least one folio; (None, None) where none can be chosen."""
        name = self.calibration.pick_for(plan)
        if name is None:
            return None, None
        if name not in self._backends:
            self._backends[name] = self.calibration.makers[name]()
        return name, self._backends[name]

    def copy(self, plan, done):
        if not plan.nr_folios:
            return 0
        backend = self.backend_for(plan)[1]
        return backend.copy(plan, done) if backend else -ENODEV

    def close(self):
        for backend in self._backends.values():
            backend.close()
        self._backends = {}
