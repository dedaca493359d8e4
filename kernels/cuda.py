"""The GPU: whether there is one that copies, and why not. The only file that imports CuPy, inside functions.

Importing this opens no device. :func:`probe` looks once and keeps its answer; :func:`open_device` gives the device or
raises with the reason. CuPy finds the driver and brings NVRTC; copies are queued by cuda_engines through cuda_driver.

No CUDA before a fork: a process that has probed must not fork workers that use the device ("spawn" them).
"""

import contextlib
import functools
import importlib.util
import pathlib
import re
from typing import NamedTuple

import numpy as np

from offload.errors import EngineUnavailable
from offload.kernels.cuda_driver import BATCH_VERSION, CudaError, Driver
from offload.kernels.cuda_engines import WAYS, Device, PinnedMemory

__all__ = ("Probe", "probe", "open_device", "why_not", "compile_kernel", "self_test", "nvidia_driver", "SOURCE")

SOURCE = pathlib.Path(__file__).with_name("copy_folios.cu")
CUDA_ERROR_NO_DEVICE = 100
LEAST_CAPABILITY = (7, 0)
"""Below it the loads of copy_folios.cu do not assemble."""
INSTALL = "pip install -e '.[cuda13]' in the checkout (or [cuda12], as the driver allows)"


class Probe(NamedTuple):
    """What is there. ``reason`` says in one line why no GPU engine is available, or is None; the rest is None if unknown."""

    reason: str | None
    cupy: str | None = None
    driver: int | None = None
    """CUDA version of the driver: 13000 is 13.0."""
    device: str | None = None
    capability: tuple | None = None
    nr_sms: int | None = None
    batch_call: bool = False
    """Whether the driver has cuMemcpyBatchAsync."""
    nvrtc: str | None = None
    """Version of the compiler, or None where it is not there."""
    no_kernel: str | None = None
    """Why cuda-kernel is not available where the other engines are: copy_folios.cu does not compile, or the driver does not load it."""


@functools.cache
def probe():
    """Look for CuPy, a driver, a device, copy 4 KiB with it and load the kernel: the Probe. Looks once in a process, never raises."""
    if importlib.util.find_spec("cupy") is None:
        return Probe(f"CuPy is not installed: {INSTALL}")
    try:
        import cupy
        from cupy.cuda import runtime
    except ImportError as error:
        return Probe(f"CuPy does not import ({one_line(error)}): {INSTALL}")
    found = Probe(None, cupy=cupy.__version__, driver=runtime.driverGetVersion(), nvrtc=nvrtc_version())
    if not found.driver:
        return found._replace(driver=None, reason="there is no CUDA driver (libcuda.so.1): install NVIDIA's, or start the "
                                                  "container with the GPU")
    try:
        nr_devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status != CUDA_ERROR_NO_DEVICE:
            return found._replace(reason=f"the driver, of CUDA {version_text(found.driver)}, does not start: {one_line(error)}; CuPy is for "
                                         f"CUDA {version_text(runtime.runtimeGetVersion())}")
        nr_devices = 0
    if not nr_devices:
        return found._replace(reason="the driver finds no device: see nvidia-smi and CUDA_VISIBLE_DEVICES")
    try:
        device = _device()
        found = found._replace(device=device.name, capability=device.capability, nr_sms=device.nr_sms,
                               batch_call=device.driver.memcpy_batch)
        wrong = self_test(device)
    except (CudaError, OSError) as error:
        wrong = one_line(error)
    return found._replace(no_kernel=why_no_kernel(device)) if wrong is None else found._replace(reason=f"the self-test failed: {wrong}")


def why_no_kernel(device):
    """None if ``device`` has copy_folios(), compiled and loaded, else why not, in one line."""
    if device.capability < LEAST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}: use cuda-loop:N".format(*device.capability, *LEAST_CAPABILITY)
    try:
        device.kernel("copy_folios")
    except EngineUnavailable as error:
        return one_line(error)
    return None


@functools.cache
def _device(number=0):
    return Device(Driver(), number, lambda capability, name: compile_kernel("sm_{}{}".format(*capability), name=name)[0])


def open_device():
    """The Device, the same each time. EngineUnavailable with the reason if there is none, or no more."""
    reason = probe().reason or _device().fault
    if reason:
        raise EngineUnavailable(f"no GPU engine is available: {reason}")
    return _device()


def why_not(way, found=None):
    """Why the engine ``way`` (cuda-loop, cuda-batch, cuda-kernel) is not available here, in one line; None if it is."""
    found = found or probe()
    if way not in WAYS or found.reason:
        return found.reason
    if way == "cuda-batch" and not found.batch_call:
        return (f"the driver has CUDA {version_text(found.driver)}, and cuMemcpyBatchAsync came with "
                f"{version_text(BATCH_VERSION)}: update it, or use cuda-loop:N")
    return found.no_kernel if way == "cuda-kernel" else None


def nvidia_driver():
    """The version of NVIDIA's kernel module, such as "580.95.05", or None where this system does not tell."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.search(r"\b[0-9]{3,}\.[0-9]+(\.[0-9]+)?\b", pathlib.Path("/proc/driver/nvidia/version").read_text("ascii"))
        return found and found.group()
    return None


def self_test(device):
    """Copy 4 KiB up, across and down on a stream of its own. None, or what is wrong; CudaError for what the driver refuses."""
    nbytes = 4096
    device.enter()
    driver, stream, pinned, frames = device.driver, None, None, None
    content = np.random.default_rng(4096).integers(0, 256, nbytes, np.uint8)
    try:
        stream, frames = driver.stream(), driver.alloc(2 * nbytes)
        pinned = PinnedMemory(device, 2 * nbytes)
        view = pinned.view()
        view[:nbytes], view[nbytes:] = content, ~content
        for dst, src in ((frames, pinned.address), (frames + nbytes, frames), (pinned.address + nbytes, frames + nbytes)):
            driver("cuMemcpyAsync", dst, src, nbytes, stream)
        driver("cuStreamSynchronize", stream)
        wrong = int((view[nbytes:] != content).sum())
        return f"{wrong} of {nbytes} bytes came back changed from {device.name}" if wrong else None
    finally:
        if stream:
            device.quietly("cuStreamSynchronize", stream)
            device.quietly("cuStreamDestroy_v2", stream)
        if frames:
            device.quietly("cuMemFree_v2", frames)
        if pinned:
            pinned.close()


# The compiler. NVRTC needs no driver.

def nvrtc_version():
    """The version of NVRTC as text, or None where CuPy does not find it."""
    try:
        from cupy.cuda import nvrtc
        return "{}.{}".format(*nvrtc.getVersion())
    except (ImportError, OSError, RuntimeError):
        return None


def compile_kernel(architecture, *options, name="copy_folios"):
    """Compile the .cu of that name for an architecture such as "sm_90": (cubin, the compiler's log). Needs CuPy and NVRTC.

    EngineUnavailable where they are not there, or this NVRTC does not know the architecture.
    """
    if importlib.util.find_spec("cupy") is None or nvrtc_version() is None:
        raise EngineUnavailable(f"NVRTC is not there to compile the kernel: {INSTALL}")
    from cupy.cuda import nvrtc
    source = SOURCE.with_name(f"{name}.cu")
    program = nvrtc.createProgram(source.read_text("ascii"), source.name, (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}", "--std=c++17", *options))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = one_line(nvrtc.getProgramLog(program)) or one_line(error)
        raise EngineUnavailable(f"NVRTC {nvrtc_version()} does not compile the kernel for {architecture}: {log}") from None
    finally:
        nvrtc.destroyProgram(program)


def version_text(version):
    return f"{version // 1000}.{version % 1000 // 10}"


def one_line(error):
    return " ".join(str(error).split())[:200]
