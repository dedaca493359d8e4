"""POSIX semaphores for compiled code: how standing threads are woken and waited for without the GIL.

They stand for the completions of the kernel (wait_for_completion_timeout, complete). A thread hand-off through Python's
own queues needs the GIL on both sides, which costs several switches of a thread for each; sem_post() is one futex call,
and none if nobody sleeps. Posting orders what was written before it ahead of what the woken thread reads.

With the JIT disabled ctypes calls the same functions, and releases the GIL while it does.
"""

import ctypes
import time

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.jit import JIT_DISABLED

__all__ = ("SEM_WORDS", "sem_init", "sem_post", "sem_wait", "sem_trywait", "sem_timedwait")

SEM_WORDS = 4
"""int64 words of a sem_t, which has 32 bytes in glibc and musl on 64-bit machines."""

_CLOCK_REALTIME = 0
_libc = ctypes.CDLL(None)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64)]


def sem_init(address):
    """Make a semaphore of value 0 at ``address``, a multiple of 8; for the threads of this process. From Python only."""
    _libc.sem_init(ctypes.c_void_p(address), 0, 0)


if JIT_DISABLED:
    def sem_post(address):
        return _libc.sem_post(ctypes.c_void_p(int(address)))

    def sem_wait(address):
        return _libc.sem_wait(ctypes.c_void_p(int(address)))

    def sem_trywait(address):
        return _libc.sem_trywait(ctypes.c_void_p(int(address)))

    def sem_timedwait(address, timeout_ns):
        until = _Timespec(*divmod(time.time_ns() + int(timeout_ns), 1_000_000_000))
        return _libc.sem_timedwait(ctypes.c_void_p(int(address)), ctypes.byref(until))
else:
    def _call(name):
        @intrinsic
        def call(typingctx, address):
            def codegen(context, builder, signature, args):
                word, half = ir.IntType(64), ir.IntType(32)
                function = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(half, [cgutils.voidptr_t]), name)
                return builder.sext(builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t)]), word)
            return types.int64(types.int64), codegen
        return call

    sem_post = _call("sem_post")
    """Add one and wake a sleeper. 0."""
    sem_wait = _call("sem_wait")
    """Take one, asleep until there is one: 0; or -1 if a signal came first."""
    sem_trywait = _call("sem_trywait")
    """Take one if there is one: 0, else -1."""

    @intrinsic
    def sem_timedwait(typingctx, address, timeout_ns):
        """Take one, asleep for at most ``timeout_ns``: 0; or -1 if that is over or a signal came first.

        It sleeps by the clock of the day (CLOCK_REALTIME): whoever cares looks at another clock when it returns.
        """
        def codegen(context, builder, signature, args):
            word, half, second = ir.IntType(64), ir.IntType(32), ir.IntType(64)(1_000_000_000)
            timespec = ir.ArrayType(word, 2)
            until = cgutils.alloca_once(builder, timespec)
            clock_gettime = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(half, [half, until.type]), "clock_gettime")
            wait = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(half, [cgutils.voidptr_t, until.type]), "sem_timedwait")
            builder.call(clock_gettime, [half(_CLOCK_REALTIME), until])
            tv_sec, tv_nsec = (cgutils.gep_inbounds(builder, until, 0, i) for i in range(2))
            ns = builder.add(builder.load(tv_nsec), args[1])
            builder.store(builder.add(builder.load(tv_sec), builder.sdiv(ns, second)), tv_sec)
            builder.store(builder.srem(ns, second), tv_nsec)
            return builder.sext(builder.call(wait, [builder.inttoptr(args[0], cgutils.voidptr_t), until]), word)
        return types.int64(types.int64, types.int64), codegen
