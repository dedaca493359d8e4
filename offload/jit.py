"""The one place where functions are compiled: our ``jit`` decorator and its honest cache.

Everything compiled in this project goes through :func:`jit`, :func:`jit_inline` (small leaf functions that must not
cost a call) or :func:`jit_entry` (what Python calls). All release the GIL and are cached on disk.

*The cache must not lie.* Numba's own cache notices a change in the file of a function, not in the files of its
callees, and would serve a stale caller. Here the cache is a folder whose name is a hash of all our sources, the
Numba and llvmlite versions and the options that change generated code, so any edit starts a new folder. Folders
of older versions are removed, the newest few kept.

*No allocation inside.* Compiled code runs without Numba's reference counting (``_nrt=False``): counting
references to the arrays of ``Memory`` costs more than the work itself. So no compiled function creates an
array; what it needs is handed in.

*Compiling is told*, as Numba tells it: one message of level INFO of the logger ``offload.jit`` when something is not in the
cache. The command line prints it; for a program in Python, logging.basicConfig(level="INFO") does.

With ``NUMBA_DISABLE_JIT=1`` the decorators return the Python function, and intrinsics are replaced by their
Python stand-ins beside them (``JIT_DISABLED``).
"""

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import signal
import stat
import tempfile
import threading

import llvmlite
import numba
import numba.core.event

__all__ = ("JIT_DISABLED", "COMPILE_S", "jit", "jit_inline", "jit_once", "jit_entry", "cache_root", "cache_folder", "exit_on_interrupt")

_log = logging.getLogger(__name__)

JIT_DISABLED = bool(numba.config.DISABLE_JIT)

COMPILE_S = 40
"""About how long compiling takes with an empty cache, in seconds: announced, nothing else. The first migration in a fresh
cache took 37.6 and 37.7 s on a quiet virtual EPYC (Zen 3)."""

_KEEP_FOLDERS = 4

if "NUMBA_OPT" not in os.environ:
    # For the whole process, as Numba has no such option for a function. At level 1 compiling takes 30 s of CPU instead
    # of 39 (Zen 3, 2.4 GHz), a metadata-only move 4 % longer; copies are written with vectors of their own.
    numba.config.OPT = type(numba.config.OPT)(1)


def _source_folders():
    """The package itself and the kernels beside it: installed inside it, or at the repository's top level."""
    package = pathlib.Path(__file__).resolve().parent
    kernels = package / "kernels"
    return package, kernels if kernels.is_dir() else package.parent / "kernels"


def source_hash(folders=None):
    """Hex digest over names and contents of all our Python sources, the compiler's versions and its options."""
    digest = hashlib.sha256()
    for option in (numba.__version__, llvmlite.__version__, numba.config.BOUNDSCHECK, numba.config.OPT,
                   numba.config.DEBUGINFO_DEFAULT):
        digest.update(f"{option}\0".encode())
    for folder in folders or _source_folders():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


@functools.cache
def cache_root():
    """Where compiled code is kept, and what is measured once: NUMBA_CACHE_DIR if set, else the user's cache folder, else a
    temporary one.

    Numba runs what it finds there, so a folder that somebody else owns or may write to is not used, unless it is named by
    NUMBA_CACHE_DIR: one of this process alone takes its place, and goes with it.
    """
    if os.environ.get("NUMBA_CACHE_DIR"):
        return pathlib.Path(os.environ["NUMBA_CACHE_DIR"]) / "migrate-offload"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    temporary = pathlib.Path(tempfile.gettempdir(), f"migrate-offload-{os.getuid()}")
    refused = []
    for root in (pathlib.Path(base, "migrate-offload"), temporary):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(root):
                with tempfile.TemporaryFile(dir=root):
                    break
            refused.append(f"{root} (somebody else owns it or may write to it; remove it, or chmod go-w)")
        except OSError as error:
            refused.append(f"{root} ({error.strerror or error})")
    else:
        root = pathlib.Path(tempfile.mkdtemp(prefix="migrate-offload-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    if refused:
        _log.warning("compiled code is kept in %s, not in %s", root if len(refused) == 1 else f"{root} until this process ends", " or ".join(refused))
    return root


def is_private(folder):
    """Whether a folder is a real one of this user's, which nobody else may write to."""
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def cache_folder():
    """The folder for code compiled from exactly these sources. Created; older ones are pruned."""
    root = cache_root()
    folder = root / source_hash()
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    others = sorted((path for path in root.iterdir() if path.is_dir() and path != folder),
                    key=lambda path: path.stat().st_mtime, reverse=True)
    for stale in others[_KEEP_FOLDERS - 1:]:
        shutil.rmtree(stale, ignore_errors=True)
    return folder


@contextlib.contextmanager
def exit_on_interrupt():
    """While compiling: Ctrl-C ends the process at once with status 130.

    An exception raised inside LLVM's callbacks is lost, and leaves a half-made library behind in memory. Cache files are
    whole or absent.
    """
    def leave(signum, frame):
        os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + b"offload: interrupted\n")     # a bar has hidden the cursor
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Announcer(numba.core.event.Listener):
    """Says once a process that something is compiled, at the moment when Numba has not found it in the cache."""

    said = False

    def on_start(self, event):
        if not _Announcer.said:
            _Announcer.said = True
            _log.info("compiling what is not in the cache yet, once; all of it takes about %d s", COMPILE_S)

    def on_end(self, event):
        pass


numba.core.event.register("numba:compile", _Announcer())


def _compile(function, **options):
    if JIT_DISABLED:
        return function
    theirs = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())    # read by Numba while the function is decorated
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False, **options)(function)
    finally:
        numba.config.CACHE_DIR = theirs


def _compile_inside(function, **options):
    # There is no wrapper for Python, and what Numba would call in its place is no such function: so it gets none to call.
    if JIT_DISABLED:
        return function

    def refuse(*args, **given):
        raise TypeError(f"{function.__qualname__}() is compiled for compiled code alone; call a function that has jit_entry (offload/jit.py)")

    inside = _compile(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)
    inside._insert = lambda types, entry_point, objectmode: None
    inside._compile_for_args = refuse
    return inside


def jit(function):
    """Compile ``function`` for use by other compiled functions: nopython, GIL released, cached.

    Python cannot call it, and gets a TypeError if it tries (unless the JIT is disabled): the wrapper that would let it costs
    more to compile than most functions. Division by zero follows NumPy, nothing is raised.
    """
    return _compile_inside(function)


def jit_inline(function):
    """As :func:`jit`, and inlined into each caller: for small functions called once a folio."""
    return _compile_inside(function, forceinline=True)


def jit_once(function):
    """As :func:`jit`, for functions with one caller: made a part of it before compiling, not compiled on their own.

    Numba optimises a function again in each that calls it, so a chain of large functions is paid for at every link.
    """
    return _compile_inside(function, inline="always")


def jit_entry(function):
    """As :func:`jit`, for functions that Python calls: by convention those that take a ``mem_table``."""
    return _compile(function)
