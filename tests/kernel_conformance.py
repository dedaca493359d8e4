"""What every copy backend must do, whoever moves its bytes. A backend's test class subclasses KernelConformance.

The answer comes from NumPy; the judge is that of the kernel's dmatest, with its four verdicts.
"""

import mmap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import InvalidInput
from offload.kernels.base import FRAME_SIZE, CopyBackend, checked_plan

NOT_COPIED = "not copied"
OUTSIDE = "copied outside the range"
SOURCE_OVERWRITTEN = "source overwritten"
MISMATCH = "mismatch"

GUARD_FRAMES = 2
"""Before and after the frames that a plan may name, so that a stray write lands where it is seen."""


class HostArena:
    """``nr_frames`` frames of anonymous memory between guards. ``base`` is the address of frame 0.

    A backend for other memory gives a class of its own with the same three members.
    """

    def __init__(self, nr_frames):
        self._map = mmap.mmap(-1, (nr_frames + 2 * GUARD_FRAMES) * FRAME_SIZE)
        self._bytes = np.frombuffer(self._map, np.uint8).reshape(-1, FRAME_SIZE)
        self.base = self._bytes.ctypes.data + GUARD_FRAMES * FRAME_SIZE

    def read(self):
        """All bytes, guards included: uint8, one row a frame; row GUARD_FRAMES is frame 0."""
        return self._bytes.copy()

    def write(self, frames):
        self._bytes[:] = frames


def rows(frame, order):
    """The rows of a folio in what an arena reads."""
    return slice(GUARD_FRAMES + frame, GUARD_FRAMES + frame + (1 << order))


def verdicts(plan, before, after):
    """What is wrong with a copy of all of ``plan``: (verdict, entry or None), none if it is right.

    ``before`` and ``after`` are (dst, src) arenas as read. Where dst and src hold equal bytes from the start nothing
    can be told apart, so fill them differently.
    """
    (dst_before, src_before), (dst_after, src_after) = before, after
    found = []
    if not np.array_equal(src_before, src_after):
        found.append((SOURCE_OVERWRITTEN, None))
    outside = np.ones(len(dst_after), bool)
    for entry, (dst, src, order) in enumerate(zip(plan.dst, plan.src, plan.order)):
        dst, src = rows(int(dst), int(order)), rows(int(src), int(order))
        outside[dst] = False
        if np.array_equal(dst_after[dst], src_before[src]):
            continue
        found.append((NOT_COPIED if np.array_equal(dst_after[dst], dst_before[dst]) else MISMATCH, entry))
    if not np.array_equal(dst_before[outside], dst_after[outside]):
        found.append((OUTSIDE, None))
    return found


def scattered_plan(rng, nr_frames, orders, dst_base, src_base):
    """A checked plan of these orders at random frames, without overlap, filling up to all of both arenas."""
    def frames():
        # Random gaps between the folios in random sequence: no natural alignment.
        sequence = rng.permutation(len(orders))
        sizes = 1 << orders[sequence]
        spare = nr_frames - int(sizes.sum())
        gaps = np.diff(np.sort(rng.integers(0, spare + 1, len(orders))), prepend=0)
        start = np.empty(len(orders), np.int64)
        start[sequence] = np.cumsum(gaps) + np.cumsum(sizes) - sizes
        return start

    orders = np.asarray(orders, np.int64)
    return checked_plan(dst_base, src_base, frames(), frames(), orders, dst_frames=nr_frames, src_frames=nr_frames)


class KernelConformance:
    """Subclass with a static ``make``, which gives a fresh backend (closed by ``with``), and ``arena`` for other memory."""

    arena = HostArena

    @staticmethod
    def make() -> CopyBackend:
        raise NotImplementedError

    @pytest.fixture
    def backend(self):
        with self.make() as backend:
            yield backend

    def arenas(self, rng, nr_frames):
        """(dst, src), filled with different random bytes."""
        arenas = self.arena(nr_frames), self.arena(nr_frames)
        for arena in arenas:
            arena.write(rng.integers(0, 256, (nr_frames + 2 * GUARD_FRAMES, FRAME_SIZE), np.uint8))
        return arenas

    def judge(self, backend, rng, orders, nr_frames=None):
        """Copy folios of these orders between random frames: all bytes right, all others untouched, all done."""
        orders = np.asarray(orders, np.int64)
        nr_frames = nr_frames or int((1 << orders).sum() * 5 // 4 + 8)
        dst, src = self.arenas(rng, nr_frames)
        plan = scattered_plan(rng, nr_frames, orders, dst.base, src.base)
        before = dst.read(), src.read()
        done = np.zeros(len(orders), np.uint8)
        assert backend.copy(plan, done) == 0
        assert verdicts(plan, before, (dst.read(), src.read())) == []
        assert done.tolist() == [1] * len(orders)

    def test_keeps_the_protocol(self, backend):
        assert isinstance(backend, CopyBackend)
        assert backend.threads >= 1
        assert isinstance(backend.name, str) and backend.name

    @pytest.mark.parametrize("order", range(11))
    def test_copies_folios_of_every_order(self, backend, order):
        rng = np.random.default_rng(order)
        for nr_folios in (1, 2, 3, max(4, 64 >> order)):
            self.judge(backend, rng, [order] * nr_folios)

    def test_copies_a_random_permutation_of_all_frames(self, backend):
        self.judge(backend, np.random.default_rng(11), [0] * 1024, nr_frames=1024)

    def test_copies_mixed_orders(self, backend):
        rng = np.random.default_rng(12)
        self.judge(backend, rng, rng.integers(0, 8, 60))

    # Hypothesis warns that a test which several classes inherit may not replay from its database; there is none here.
    @settings(deadline=None, max_examples=25, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.differing_executors])
    @given(orders=st.lists(st.integers(0, 6), max_size=12), seed=st.integers(0, 2**32 - 1))
    def test_copies_any_plan(self, orders, seed):
        with self.make() as backend:
            self.judge(backend, np.random.default_rng(seed), orders)

    def test_an_empty_plan_is_done_and_touches_nothing(self, backend):
        self.judge(backend, np.random.default_rng(13), [])

    def test_sources_may_overlap(self, backend):
        rng = np.random.default_rng(14)
        dst, src = self.arenas(rng, 64)
        plan = checked_plan(dst.base, src.base, [0, 16, 32], [5, 5, 9], [3, 3, 4])
        before, done = (dst.read(), src.read()), np.zeros(3, np.uint8)
        assert backend.copy(plan, done) == 0
        assert verdicts(plan, before, (dst.read(), src.read())) == []

    def test_copies_within_one_arena(self, backend):
        rng = np.random.default_rng(15)
        arena, _ = self.arenas(rng, 64)
        plan = checked_plan(arena.base, arena.base, [0, 8, 63], [16, 24, 62], [3, 2, 0])
        before, done = arena.read(), np.zeros(3, np.uint8)
        assert backend.copy(plan, done) == 0
        expected = before.copy()
        for dst, src, order in zip(plan.dst, plan.src, plan.order):
            expected[rows(dst, order)] = before[rows(src, order)]
        assert np.array_equal(arena.read(), expected)

    @pytest.mark.parametrize("dst, src, order", [
        ([5, 5], [20, 30], [0, 0]),
        ([0, 5], [20, 30], [3, 0]),
        ([0, 40], [20, 7], [3, 0]),
        ([9], [9], [2]),
    ], ids=["one dst twice", "dst inside a dst", "src inside a dst", "onto itself"])
    def test_overlaps_never_reach_it(self, dst, src, order):
        arena, _ = self.arenas(np.random.default_rng(16), 64)
        with pytest.raises(InvalidInput, match=r"dst of entry \d overlaps (dst|src) of entry \d"):
            checked_plan(arena.base, arena.base, dst, src, order)

    def test_copies_batch_after_batch(self, backend):
        rng = np.random.default_rng(17)
        for orders in ([4], [0] * 9, [], [2, 1, 0], [5]):
            self.judge(backend, rng, orders)
