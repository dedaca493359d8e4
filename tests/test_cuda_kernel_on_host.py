"""copy_folios.cu and checksum_pages.cu on the CPU: the very sources, compiled by g++ with a small shim, under address and
undefined-behaviour sanitizers, byte for byte against NumPy. And compiled for real devices, by nvcc and by NVRTC, without one.

Proves indices, bounds, widths and that it compiles without spills; not races, coalescing, the assembly or any speed.
"""

import pathlib
import re
import shutil
import subprocess
import weakref

import numpy as np
import pytest
from kernel_conformance import GUARD_FRAMES, HostArena, KernelConformance

import offload.kernels.cuda_plan
from offload.errors import EngineUnavailable
from offload.kernels.base import FRAME_SIZE, MAX_ORDER, CopyPlan
from offload.kernels.checksum import checksum_pages
from offload.kernels.cuda import compile_kernel
from offload.kernels.cuda_plan import lay_out

SOURCE = pathlib.Path(offload.kernels.cuda_plan.__file__).with_name("copy_folios.cu")
KERNELS = ("copy_folios", "checksum_pages")
HOST = pathlib.Path(__file__).parent / "cuda_host"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MOST_REGISTERS = 64
"""A block of 256 threads then leaves room for four on every SM."""

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile copy_folios.cu with")


class SanitizedKernel:
    """copy_folios() in a process of its own. A backend like the others; ``blocks`` and ``threads`` are its grid."""

    name, threads = "copy_folios on the host", 1

    def __init__(self, program, blocks=3, block_threads=64):
        self.grid = blocks, block_threads
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _, errors = self.process.communicate()
        assert self.process.returncode == 0 and errors == b"", errors.decode()

    def message(self, launch, dst, src, *, first_block=0, pages=(0, 0)):
        """Bytes ``dst`` and ``src`` are the pages from ``pages`` on, counted from the launch's bases."""
        words = [*self.grid, first_block, len(launch.pairs), dst.nbytes, src.nbytes, *pages]
        return b"".join(part.tobytes() for part in (np.array(words, np.uint64), launch.batch, launch.pairs, dst, src))

    def request(self, launch, dst, src, **where):
        """(dst, src) as they are after the launch."""
        self.process.stdin.write(self.message(launch, dst, src, **where))
        self.process.stdin.flush()
        return tuple(np.frombuffer(self.process.stdout.read(part.nbytes), np.uint8).reshape(part.shape) for part in (dst, src))

    def copy(self, plan, done):
        """As the contract says, between two Arenas. Their guards stay at home, so that a stray access meets the sanitizer."""
        launch = lay_out(plan)
        arenas = Arena.at[plan.dst_base], Arena.at[plan.src_base]
        pages = [-((here - base) // FRAME_SIZE) % 2**64 for here, base in zip(launch[:2], plan[:2])]
        for arena, frames in reversed(list(zip(arenas, self.request(launch, *(arena.inside() for arena in arenas), pages=pages)))):
            arena.inside()[:] = frames
        done[:] = 1
        return 0


class Arena(HostArena):
    """A HostArena that is found by its base."""

    at = weakref.WeakValueDictionary()

    def __init__(self, nr_frames):
        super().__init__(nr_frames)
        self.at[self.base] = self

    def inside(self):
        return self._bytes[GUARD_FRAMES:-GUARD_FRAMES]


def compile_for_here(name, program):
    compiled = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", *SANITIZERS, "-Wall", "-Wextra", "-Werror", "-include", HOST / "shim.h",
         "-I", SOURCE.parent, HOST / f"run_{name}.cpp", "-o", program], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return program


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The kernel compiled for this machine, with sanitizers."""
    return compile_for_here("copy_folios", tmp_path_factory.mktemp("copy_folios") / "run")


@pytest.fixture(scope="session")
def checksum_program(tmp_path_factory):
    """The same of checksum_pages.cu."""
    return compile_for_here("checksum_pages", tmp_path_factory.mktemp("checksum_pages") / "run")


@needs_compiler
class TestOnTheHost(KernelConformance):
    """The kernel keeps the contract of every backend."""

    arena = Arena

    @pytest.fixture(autouse=True)
    def compiled(self, program):
        type(self).program = program

    def make(self):
        return SanitizedKernel(self.program)


def random_pages(rng, nr):
    return rng.integers(0, 256, (nr, FRAME_SIZE), np.uint8)


@needs_compiler
class TestGrids:
    """Whatever the grid, each page is copied, and only those."""

    @pytest.mark.parametrize("blocks, threads", [(1, 32), (1, 256), (2, 96), (7, 32), (3, 224), (64, 32), (133, 128)])
    def test_any_grid(self, program, blocks, threads):
        rng = np.random.default_rng(blocks)
        with SanitizedKernel(program, blocks, threads) as backend:
            conformance = KernelConformance()
            conformance.arena = Arena
            for orders in ([0], [5, 0, 3, 3, 1], [6], [0] * 37):
                conformance.judge(backend, rng, orders)

    @pytest.mark.parametrize("order", [11, 12, 13])
    def test_orders_beyond_the_conformance_class(self, program, order):
        rng = np.random.default_rng(order)
        conformance = KernelConformance()
        conformance.arena = Arena
        with SanitizedKernel(program, 5, 256) as backend:
            conformance.judge(backend, rng, [order, 0, 1])


@needs_compiler
class TestWidths:
    """Counts and addresses beyond 32 bits: only the last pages of a batch of 32 TiB, in an address space that is not there."""

    def test_the_last_item_of_two_to_the_33(self, program):
        blocks, threads = 1 << 26, 256              # 2**29 warps
        nr_folios, in_folio = 1 << 15, (1 << MAX_ORDER) - 8
        pairs = np.zeros((2, nr_folios), np.int64)
        launch = lay_out(CopyPlan(0, 0, *pairs, np.full(nr_folios, MAX_ORDER, np.uint8)), check=False)
        assert launch.nr_items == 1 << 33
        # The last block has the eight items before every multiple of 2**29: the last eight pages of sixteen folios.
        touched = np.arange(1, 17) * (1 << 29 - MAX_ORDER) - 1
        launch.pairs[touched, 0] = 2**32 - 2**MAX_ORDER - 8 * np.arange(16)
        launch.pairs[touched, 1] = 2**31 + 24 * np.arange(16)
        first = launch.pairs[touched].astype(np.int64) + in_folio
        lowest = first.min(axis=0)
        rng = np.random.default_rng(1)
        dst, src = random_pages(rng, 16 * 8), random_pages(rng, 16 * 24)
        expected = dst.copy()
        for to, at in first - lowest:
            expected[to:to + 8] = src[at:at + 8]
        with SanitizedKernel(program, blocks, threads) as backend:
            after, source = backend.request(launch, dst, src, first_block=blocks - 1, pages=lowest)
        assert np.array_equal(after, expected) and np.array_equal(source, src)


@needs_compiler
class TestTheSanitizer:
    """What it is there to catch is caught."""

    @pytest.mark.parametrize("dst_pages, src_pages", [(3, 4), (4, 3)])
    def test_a_page_beyond_an_arena(self, program, dst_pages, src_pages):
        rng = np.random.default_rng(2)
        launch = lay_out(CopyPlan(0, 0, np.array([0, 3]), np.array([0, 3]), np.array([0, 0], np.uint8)), check=False)
        process = SanitizedKernel(program)
        _, errors = process.process.communicate(process.message(launch, random_pages(rng, dst_pages), random_pages(rng, src_pages)))
        assert process.process.returncode and b"heap-buffer-overflow" in errors


@needs_compiler
class TestChecksum:
    """checksum_pages() gives the number of its NumPy twin, whatever the grid, for each page of the list and no others."""

    @staticmethod
    def run(program, grid, pages, frames, first_page=0):
        words = np.array([*grid, len(pages), frames.nbytes, first_page], np.uint64)
        message = b"".join(part.tobytes() for part in (words, np.asarray(pages, np.uint32), frames))
        return subprocess.run([program], input=message, capture_output=True)

    @pytest.mark.parametrize("grid", [(1, 32), (1, 256), (7, 96), (64, 32)])
    @pytest.mark.parametrize("first_page", [0, 2**32 - 40])
    def test_twins(self, checksum_program, grid, first_page):
        rng = np.random.default_rng(grid[0])
        frames = random_pages(rng, 40)
        frames[3], frames[4] = 0, 255
        rows = rng.permutation(40)[:29]
        done = self.run(checksum_program, grid, rows + first_page, frames, first_page)
        assert (done.returncode, done.stderr) == (0, b"")
        assert np.array_equal(np.frombuffer(done.stdout, np.uint64), checksum_pages(frames, rows))

    def test_no_pages(self, checksum_program):
        done = self.run(checksum_program, (1, 32), [], random_pages(np.random.default_rng(1), 1))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def test_a_page_beyond(self, checksum_program):
        done = self.run(checksum_program, (1, 32), [0, 2], random_pages(np.random.default_rng(1), 2))
        assert done.returncode and b"heap-buffer-overflow" in done.stderr

    def test_known(self):
        """The number may not change unnoticed: the definition, word for word, in Python's integers."""
        page = random_pages(np.random.default_rng(3), 1)
        total, most = 0, 2**64 - 1
        for place, word in enumerate(page.view("<u8")[0].tolist()):
            x = word + (place + 1) * 0x9E3779B97F4A7C15 & most
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & most
            x = (x ^ x >> 27) * 0x94D049BB133111EB & most
            total = total + (x ^ x >> 31) & most
        assert checksum_pages(page).tolist() == [total]


@pytest.mark.parametrize("name", KERNELS)
class TestForDevices:
    """They compile for the devices of a data centre, without spilling registers. Nothing is run there."""

    @pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_nvcc(self, architecture, tmp_path, name):
        done = subprocess.run(["nvcc", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin", "-o",
                               tmp_path / "kernel.cubin", SOURCE.with_name(f"{name}.cu")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
        assert int(re.search(r"Used (\d+) registers", done.stderr)[1]) <= MOST_REGISTERS

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_nvrtc(self, architecture, name):
        try:
            cubin, log = compile_kernel(architecture, "--ptxas-options=-v", name=name)
        except EngineUnavailable as error:
            pytest.skip(str(error))
        assert cubin.startswith(b"\x7fELF") and name.encode() in cubin
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, log
        assert int(re.search(r"Used (\d+) registers", log)[1]) <= MOST_REGISTERS


class TestTheCompilers:
    """What comes out of the copy kernel, and what NVRTC says that it cannot."""

    @pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
    def test_the_payload_goes_past_the_read_only_path(self, tmp_path):
        done = subprocess.run(["nvcc", "-arch=sm_90", "-ptx", "-o", tmp_path / "copy_folios.ptx", SOURCE],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ptx = tmp_path.joinpath("copy_folios.ptx").read_text()
        loads = re.findall(r"ld\.global\S*", ptx)
        assert loads.count("ld.global.L1::no_allocate.v4.u32") == 8 and ptx.count("st.global.cs.v4.u32") == 8
        assert [load for load in loads if ".nc" in load] == ["ld.global.nc.v2.u32"]         # the list of pairs
        assert ptx.rindex("ld.global.L1") < ptx.index("st.global") and "bar.sync" not in ptx and ".shared" not in ptx

    def test_nvrtc_says_what_it_cannot(self):
        with pytest.raises(EngineUnavailable) as refused:
            compile_kernel("sm_1")
        assert "NVRTC" in str(refused.value) and "\n" not in str(refused.value)
