"""The manifest of a result: what it ran on, as far as this host tells. What it cannot tell is None."""

import contextlib
import hashlib
import os
import pathlib
import platform
import subprocess

import numba
import numpy as np

import offload.units
from offload.jit import JIT_DISABLED
from offload.kernels import cuda
from offload.kernels.cuda import SOURCE, nvidia_driver, version_text
from offload.kernels.cuda_driver import MOST_DESCRIPTORS
from offload.kernels.cuda_engines import BLOCK_THREADS, BLOCKS_PER_SM
from offload.units import parse_size

__all__ = ("host_manifest", "gpu_manifest", "last_level_cache", "what_ran", "NOT_VERIFIED")


def host_manifest():
    """Versions, kernel, processor and the settings that decide how fast memory is copied."""
    return {
        "package": package_version(), "git_commit": git_commit(), "python": platform.python_version(),
        "numpy": np.__version__, "numba": numba.__version__, "jit": not JIT_DISABLED, "kernel": platform.release(),
        "machine": platform.machine(), "cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)),
        "thp": chosen(read_line("/sys/kernel/mm/transparent_hugepage/enabled")),
        "governor": read_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "last_level_cache": last_level_cache(), "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
    }


def gpu_manifest():
    """The device that CUDA engines use, its software and our kernel; or why there is none, in ``reason``, and None for the rest."""
    found = cuda.probe()
    return {"reason": found.reason, "device": found.device, "capability": found.capability and list(found.capability), "sms": found.nr_sms,
            "cuda": found.driver and version_text(found.driver), "driver": nvidia_driver(), "cupy": found.cupy, "nvrtc": found.nvrtc,
            "batch_call": found.batch_call, "kernel": SOURCE.name, "kernel_sha256": hashlib.sha256(SOURCE.read_bytes()).hexdigest()}


NOT_VERIFIED = "not verified"
"""Which unit of a GPU moved the bytes: only CUPTI tells, and it is not asked (docs/gpu.md)."""

CALLS = {"cuda-loop": ("cuMemcpyAsync for each run", ""),
         "cuda-batch": (f"cuMemcpyBatchAsync for up to {MOST_DESCRIPTORS} runs", "SRC_ACCESS_ORDER_STREAM"),
         "cuda-kernel": ("one launch of copy_folios", f"{BLOCKS_PER_SM} blocks of {BLOCK_THREADS} threads an SM at most"),
         "auto": ("that of the engine chosen for each batch", "")}


def what_ran(engine, nodes, *, picked=None, overlap=False):
    """The keys of a row that say what moved its bytes: call, flags, hardware, and where a GPU did, device, cuda and driver.

    ``nodes``: the placements it copied from and to. ``picked``: the engine that auto took, where that is known. ``overlap``:
    cuda-batch's flag.
    """
    way = picked.partition(":")[0] if picked else engine.copy_kernel
    gpu = {}
    if "nowhere" in nodes:
        call, flags, hardware = "none, there are no bytes", "", "none"
    elif way in CALLS:
        call, flags = CALLS[way]
        hardware, gpu = NOT_VERIFIED, gpu_manifest()
    elif "device" in nodes:
        call, flags, hardware = "cuMemcpyAsync for each folio, waited for", "", NOT_VERIFIED
        gpu = gpu_manifest()
    else:
        kernel = engine.copy_kernel if engine.copy_kernel != "auto" else "stream"
        call, flags, hardware = f"CPU, {kernel}, {engine.threads} thread{'s' if engine.threads > 1 else ''}", "", "CPU"
    return {"call": call, "flags": flags + ", PREFER_OVERLAP_WITH_COMPUTE" * overlap, "hardware": hardware,
            **{name: gpu.get(name) for name in ("device", "cuda", "driver")}}


def read_line(path):
    """The first line of a file, or None if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as lines:
        return lines.readline().strip()
    return None


def chosen(line):
    """The word in brackets of ``always [madvise] never``."""
    return line and line.partition("[")[2].partition("]")[0]


def last_level_cache():
    """Bytes of the largest cache of CPU 0, or None."""
    sizes = [read_line(path) for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((parse_size(size, multiple_of=1) for size in sizes if size), default=None)


def cpu_model():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "CPU part"):
                return value.strip()
    return platform.processor() or None


def package_version():
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("migrate-offload")
    except PackageNotFoundError:
        return None


def git_commit():
    """The commit of the checkout that the package runs from, ``-dirty`` added if files differ; None outside of one."""
    folder = pathlib.Path(offload.units.__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(folder.parent), "describe", "--always", "--abbrev=40", "--dirty",
                               "--exclude=*"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
