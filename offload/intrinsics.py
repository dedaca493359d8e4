"""The few machine instructions Python has no word for, usable in compiled code.

Each has a stand-in for ``NUMBA_DISABLE_JIT=1`` that does the same, slowly. Copy instructions are elsewhere, in
``kernels/cpu.py``.
"""

import ctypes
import platform
import time

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.jit import JIT_DISABLED, jit, jit_entry

__all__ = ("clock_ns", "ticks", "read_clocks", "TICKS", "count_trailing_zeros", "fill_bytes", "bytes_are_zero", "prefetch_record")

CLOCK_MONOTONIC = 1


def _tick_source():
    """What ticks() reads: the time-stamp counter where it runs at one rate whatever the CPU does, else the clock."""
    if JIT_DISABLED or platform.machine() != "x86_64":
        return "clock_gettime"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
            flags = next((line for line in cpuinfo if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    return "tsc" if {"constant_tsc", "nonstop_tsc"} <= set(flags) else "clock_gettime"


TICKS = _tick_source()

if JIT_DISABLED:
    def clock_ns():
        return time.perf_counter_ns()

    ticks = clock_ns

    def count_trailing_zeros(word):
        return (int(word) & -int(word)).bit_length() - 1

    def fill_bytes(address, value, nbytes):
        ctypes.memset(int(address), int(value), int(nbytes))
        return 0

    def bytes_are_zero(address, nbytes):
        return not any(ctypes.string_at(int(address), int(nbytes)))

    def prefetch_record(column, i):
        return 0
else:
    @intrinsic
    def clock_ns(typingctx):
        """The clock of time.perf_counter_ns(), 25 to 35 ns a reading."""
        def codegen(context, builder, signature, args):
            word, half = ir.IntType(64), ir.IntType(32)
            now = cgutils.alloca_once(builder, ir.ArrayType(word, 2))
            clock_gettime = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(half, [half, now.type]), "clock_gettime")
            builder.call(clock_gettime, [half(CLOCK_MONOTONIC), now])
            seconds = builder.load(cgutils.gep_inbounds(builder, now, 0, 0))
            rest = builder.load(cgutils.gep_inbounds(builder, now, 0, 1))
            return builder.add(builder.mul(seconds, word(1_000_000_000)), rest)
        return types.int64(), codegen

    @intrinsic
    def _time_stamp_counter(typingctx):
        def codegen(context, builder, signature, args):
            read = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.IntType(64), []), "llvm.readcyclecounter")
            return builder.call(read, [])
        return types.int64(), codegen

    ticks = _time_stamp_counter if TICKS == "tsc" else clock_ns
    """A cheap clock of unknown rate, for two readings a folio; read_clocks() before and after gives the rate."""

    @intrinsic
    def count_trailing_zeros(typingctx, word):
        """Number of the lowest set bit of a non-zero word."""
        def codegen(context, builder, signature, args):
            return builder.cttz(args[0], ir.IntType(1)(1))
        return types.int64(types.int64), codegen

    @intrinsic
    def fill_bytes(typingctx, address, value, nbytes):
        """memset(address, value, nbytes); returns 0."""
        def codegen(context, builder, signature, args):
            address, value, nbytes = args
            pointer = builder.inttoptr(address, cgutils.voidptr_t)
            memset = builder.module.declare_intrinsic("llvm.memset", [cgutils.voidptr_t, ir.IntType(64)])
            builder.call(memset, [pointer, builder.trunc(value, ir.IntType(8)), nbytes, ir.IntType(1)(0)])
            return ir.IntType(64)(0)
        return types.int64(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def load_word(typingctx, address):
        """The 8 bytes at ``address``."""
        def codegen(context, builder, signature, args):
            return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return types.int64(types.int64), codegen

    @jit
    def bytes_are_zero(address, nbytes):
        """Whether ``nbytes`` (a multiple of 8) from ``address`` are all 0; stops at the first that is not."""
        for at in range(address, address + nbytes, 8):
            if load_word(at) != 0:
                return False
        return True

    @intrinsic
    def prefetch_record(typingctx, column, i):
        """Ask for the cache line where ``column[i]`` of a table begins, to be read and written soon; returns 0."""
        def codegen(context, builder, signature, args):
            pointer = builder.bitcast(builder.gep(args[0], [args[1]]), cgutils.voidptr_t)
            half = ir.IntType(32)
            prefetch = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, half, half, half]),
                "llvm.prefetch.p0")
            builder.call(prefetch, [pointer, half(1), half(3), half(1)])
            return ir.IntType(64)(0)
        return types.int64(column, types.int64), codegen


@jit_entry
def read_clocks(out):
    """Write (ns, ticks) of this moment to ``out[0]``, ``out[1]``."""
    out[0] = clock_ns()
    out[1] = ticks()
