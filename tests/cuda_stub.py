"""The stub of the CUDA driver (tests/cuda_host/stub_driver.cpp), compiled and loaded. It is no GPU."""

import ctypes
import functools
import gc
import glob
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
from kernel_conformance import HostArena

import offload.kernels.cuda_driver
from offload.kernels import cuda
from offload.kernels.cuda_driver import Driver
from offload.kernels.cuda_engines import Device

HOST = pathlib.Path(__file__).parent / "cuda_host"
KERNELS = pathlib.Path(offload.kernels.cuda_driver.__file__).parent

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the stub driver with")


class StubState(ctypes.Structure):
    """``struct stub_state``."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "cap", "fail_copy", "fail_launch", "fail_alloc", "lose_at", "no_batch", "version", "corrupt", "ns_copy", "ns_launch", "ps_byte", "device_bytes",
        "batch_calls", "most_descriptors", "copies", "executed", "launches", "allocs", "frees", "streams", "events", "flags",
        "blocks", "threads", "lost", "device_ns", "bytes", "async_calls")]


def cuda_include():
    """The folder of cuda.h, or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    return next((home + "/include" for home in homes if home and os.path.exists(home + "/include/cuda.h")), None)


def compile_cpp(source, program, *options):
    """Compile, with cuda.h where there is one, so that it compares the signatures."""
    include = cuda_include()
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", HOST, "-I", KERNELS,
         *(["-DHAVE_CUDA_H", "-I", include] if include else []), *options, source, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HERE = cuda.Probe(None, "0", 13000, "stub, not a GPU", (9, 0), 5, True, "13.0")
"""What a look for a GPU finds where the stub is in its place."""


@functools.cache
def _stub_library():
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name, "libstub_cuda.so")
    compile_cpp(HOST / "stub_driver.cpp", path, "-shared", "-fPIC", "-fvisibility=hidden")
    return folder, path


class PinnedArena(HostArena):
    """A HostArena that the stub takes for pinned memory: without that its kernels and its batch call do not reach it."""

    def __init__(self, nr_frames):
        super().__init__(nr_frames)
        self._pin = ctypes.CDLL(str(_stub_library()[1])).stub_pin
        self._pin.argtypes = ctypes.c_uint64, ctypes.c_uint64
        self._address = self._bytes.ctypes.data
        self._pin(self._address, self._bytes.nbytes)

    def __del__(self):
        self._pin(self._address, 0)


class Stub:
    """A Driver over the stub, its ``state``, and what a Device said, in ``lines``."""

    def __init__(self):
        path = _stub_library()[1]
        self.path = path
        self.state = StubState.in_dll(ctypes.CDLL(str(path)), "stub")
        self.reset()
        self.driver = Driver(path)
        self.lines = []

    def reset(self):
        for name, _ in StubState._fields_:
            if name not in ("streams", "events"):   # what earlier tests hold
                setattr(self.state, name, 0)
        self.state.cap, self.state.version, self.state.device_bytes = 1 << 20, 12080, 1 << 40
        for name in ("fail_copy", "fail_launch", "fail_alloc", "lose_at"):
            setattr(self.state, name, -1)

    def have_bytes(self, nbytes):
        """Let the stub's device have so many bytes, all of them free: what earlier tests' machines still hold is given back."""
        gc.collect()
        self.state.device_bytes = nbytes

    def device(self):
        return Device(self.driver, 0, lambda capability, name: b"stub image", self.lines.append)

    def stand_in(self, monkeypatch, found=HERE):
        """Put a Device over the stub, and the Probe ``found``, in the place of this machine's; the Device."""
        device = self.device()
        monkeypatch.setattr(cuda, "probe", lambda: found)
        monkeypatch.setattr(cuda, "_device", lambda: device)
        return device
