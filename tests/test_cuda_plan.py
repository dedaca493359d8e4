"""Plans for the GPU: merging, sorting, splitting, against the CPU copy as the oracle. No device is needed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_conformance import HostArena, scattered_plan

from offload.errors import InvalidInput
from offload.kernels.base import FRAME_SIZE, CopyPlan, checked_plan
from offload.kernels.cpu import CpuBackend
from offload.kernels.cuda_plan import FOLIO_BATCH_DTYPE, lay_out, merge_runs, split_chunks, split_evenly

BASE, ELSEWHERE = 1 << 40, 1 << 44


def by_cpu(plan, dst):
    """What ``dst`` (an arena) reads after the CPU backend has carried the plan out."""
    done = np.zeros(plan.nr_folios, np.uint8)
    assert CpuBackend("plain").copy(plan, done) == 0 and done.all()
    return dst.read()


def copy_bytes_of(arenas, dst, src, nbytes):
    """Copy a run given by addresses between HostArenas, found by address."""
    def bytes_at(address):
        for arena in arenas:
            offset = int(address) - arena._bytes.ctypes.data
            if 0 <= offset and offset + int(nbytes) <= arena._bytes.nbytes:
                return arena._bytes.reshape(-1)[offset:offset + int(nbytes)]
        raise AssertionError(f"{int(address):#x} is outside the arenas")
    bytes_at(dst)[:] = bytes_at(src)


@st.composite
def random_plans(draw):
    """(plan, dst arena, src arena): folios of mixed orders at random frames, many of them neighbours at both ends."""
    orders = draw(st.lists(st.integers(0, 4), min_size=0, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nr_frames = max(int((1 << np.array(orders, np.int64)).sum()) * draw(st.sampled_from([1, 1, 2])), 1)
    dst, src = HostArena(nr_frames), HostArena(nr_frames)
    for arena in (dst, src):
        arena.write(rng.integers(0, 256, arena.read().shape, np.uint8))
    plan = scattered_plan(rng, nr_frames, orders, dst.base, src.base)
    if orders and draw(st.booleans()):              # the same sequence at both ends: neighbours merge
        plan = checked_plan(dst.base, src.base, plan.dst, plan.dst, plan.order)
    return plan, dst, src


class TestMergeRuns:
    """Copying the runs copies exactly the folios, and no two runs could have been one."""

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(random_plans(), st.randoms(use_true_random=False))
    def test_the_same_bytes(self, given, random):
        plan, dst, src = given
        before = dst.read()
        expected = by_cpu(plan, dst)
        dst.write(before)
        runs = merge_runs(plan)
        for r in random.sample(range(len(runs)), len(runs)):        # in any order
            copy_bytes_of((dst, src), runs.dst[r], runs.src[r], runs.nbytes[r])
        assert np.array_equal(dst.read(), expected)

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(random_plans())
    def test_each_folio_lies_in_its_run_and_no_run_is_too_many(self, given):
        plan, _, _ = given
        runs = merge_runs(plan)
        assert int(runs.nbytes.sum()) == plan.nbytes and runs.nbytes.dtype == np.uint64
        for dst, src, order, run in zip(plan.dst, plan.src, plan.order, runs.run_of):
            offset = plan.dst_base + int(dst) * FRAME_SIZE - int(runs.dst[run])
            assert offset == plan.src_base + int(src) * FRAME_SIZE - int(runs.src[run])
            assert 0 <= offset and offset + (FRAME_SIZE << int(order)) <= int(runs.nbytes[run])
        ends = {(int(dst + nbytes), int(src + nbytes)) for dst, src, nbytes in zip(*runs[:3])}
        assert not ends & set(zip(runs.dst.tolist(), runs.src.tolist()))

    def test_neighbours(self):
        runs = merge_runs(checked_plan(BASE, ELSEWHERE, [9, 0, 8, 1, 20], [29, 8, 28, 9, 21], [0, 0, 0, 2, 0]))
        assert runs.dst.tolist() == [BASE, BASE + 8 * FRAME_SIZE, BASE + 20 * FRAME_SIZE]
        assert runs.src.tolist() == [ELSEWHERE + frame * FRAME_SIZE for frame in (8, 28, 21)]
        assert runs.nbytes.tolist() == [5 * FRAME_SIZE, 2 * FRAME_SIZE, FRAME_SIZE]
        assert runs.run_of.tolist() == [1, 0, 1, 0, 2]

    def test_a_run_beyond_32_bits(self):
        frames = np.arange(8) << 18
        runs = merge_runs(checked_plan(BASE, ELSEWHERE, frames, frames, [18] * 8))
        assert runs.nbytes.tolist() == [8 << 30] and len(runs) == 1

    def test_nothing(self):
        runs = merge_runs(checked_plan(BASE, ELSEWHERE, [], [], []))
        assert len(runs) == len(runs.run_of) == 0

    def test_a_base_below_zero(self):
        """A base stands for frame 0, which nobody copies: it may be no address."""
        runs = merge_runs(CopyPlan(-FRAME_SIZE, 0, np.array([3]), np.array([9]), np.array([0], np.uint8)))
        assert runs.dst.tolist() == [2 * FRAME_SIZE]


class TestLayOut:
    """The kernel's list names every page of every folio once."""

    @staticmethod
    def pages(launch):
        """(dst, src) addresses of all pages, found as copy_folios() finds them."""
        first_item, first_pair = launch.batch["first_item"].tolist(), launch.batch["first_pair"].tolist()
        for item in range(launch.nr_items):
            order = max(order for order in range(19) if first_item[order] <= item)
            page = item - first_item[order]
            dst, src = launch.pairs[first_pair[order] + (page >> order)].tolist()
            offset = page & (1 << order) - 1
            yield launch.dst_base + (dst + offset) * FRAME_SIZE, launch.src_base + (src + offset) * FRAME_SIZE

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(random_plans())
    def test_every_page_once(self, given):
        plan, _, _ = given
        expected = [(plan.dst_base + (int(dst) + i) * FRAME_SIZE, plan.src_base + (int(src) + i) * FRAME_SIZE)
                    for dst, src, order in zip(plan.dst, plan.src, plan.order) for i in range(1 << int(order))]
        assert sorted(self.pages(lay_out(plan))) == sorted(expected)

    def test_sizes(self):
        assert FOLIO_BATCH_DTYPE.itemsize == 240 and FOLIO_BATCH_DTYPE.fields["first_pair"][1] == 160

    def test_counts_beyond_32_bits(self):
        nr = 1 << 14
        frames = np.arange(nr) << 18
        plan = CopyPlan(BASE, ELSEWHERE, frames, frames, np.full(nr, 18, np.uint8))
        with pytest.raises(InvalidInput, match="16 TiB or more apart"):
            lay_out(CopyPlan(BASE, ELSEWHERE, np.append(frames, 1 << 32), np.append(frames, 0),
                             np.append(plan.order, np.uint8(0))), check=False)
        assert lay_out(plan, check=False).nr_items == 1 << 32

    def test_frames_count_from_the_lowest(self):
        launch = lay_out(checked_plan(BASE, ELSEWHERE, [1 << 33, (1 << 33) + 5], [7, 3], [0, 1]))
        assert launch.dst_base == BASE + (1 << 45) and launch.src_base == ELSEWHERE + 3 * FRAME_SIZE
        assert launch.pairs.tolist() == [[0, 4], [5, 0]] and launch.pairs.dtype == np.uint32

    def test_nothing(self):
        launch = lay_out(checked_plan(BASE, ELSEWHERE, [], [], []))
        assert launch.nr_items == 0 and launch.pairs.shape == (0, 2)


class TestOverlap:
    """No batch whose copies could meet gets past the planner."""

    @pytest.mark.parametrize("plan", [merge_runs, lay_out])
    @pytest.mark.parametrize("dst, src, order", [
        ([5, 5], [20, 30], [0, 0]), ([0, 5], [20, 30], [3, 0]), ([0, 40], [20, 7], [3, 0]), ([9], [9], [2]),
    ], ids=["one dst twice", "dst inside a dst", "src inside a dst", "onto itself"])
    def test_refused(self, plan, dst, src, order):
        hostile = CopyPlan(BASE, BASE, np.array(dst), np.array(src), np.array(order, np.uint8))
        with pytest.raises(InvalidInput, match=r"dst of entry \d overlaps (dst|src) of entry \d"):
            plan(hostile)

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 2)), max_size=5))
    def test_refuses_exactly_the_overlaps(self, entries):
        dst, src, order = (np.array([entry[i] for entry in entries], np.int64) for i in range(3))
        plan = CopyPlan(BASE, BASE, dst, src, order.astype(np.uint8))
        writes = [page for frame, size in zip(dst, order) for page in range(frame, frame + (1 << size))]
        reads = {page for frame, size in zip(src, order) for page in range(frame, frame + (1 << size))}
        if len(set(writes)) < len(writes) or reads & set(writes):
            for planner in (merge_runs, lay_out):
                with pytest.raises(InvalidInput, match="overlaps"):
                    planner(plan)
        else:
            assert int(merge_runs(plan).nbytes.sum()) == plan.nbytes == lay_out(plan).nr_items * FRAME_SIZE


class TestSplitting:
    """Channels get entries by count, calls get chunks; none is lost."""

    @pytest.mark.parametrize("nr, parts, counts", [(7, 3, [2, 2, 3]), (2, 4, [0, 1, 0, 1]), (0, 2, [0, 0]), (512, 16, [32] * 16)])
    def test_evenly(self, nr, parts, counts):
        shares = split_evenly(nr, parts)
        assert [stop - start for start, stop in shares] == counts
        assert [i for start, stop in shares for i in range(start, stop)] == list(range(nr))

    @pytest.mark.parametrize("nr, most, counts", [(0, 4, []), (4, 4, [4]), (9, 4, [4, 4, 1]), (8193, 4096, [4096, 4096, 1])])
    def test_chunks(self, nr, most, counts):
        chunks = split_chunks(nr, most)
        assert [stop - start for start, stop in chunks] == counts
        assert [i for start, stop in chunks for i in range(start, stop)] == list(range(nr))
