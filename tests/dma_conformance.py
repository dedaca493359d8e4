"""What every DMA provider must do, whoever moves its bytes. A provider's test class subclasses DmaConformance.

It drives the provider through offload/dmaengine.py, as a client does. The judge of the bytes is kernel_conformance.py.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_conformance import NOT_COPIED, HostArena, rows, scattered_plan, verdicts

from offload.dmaengine import DmaChan, DmaDevice, dma_request_chan
from offload.errors import InvalidInput
from offload.kernels.base import DMA_IN_PROGRESS, DMA_TRANS_ABORTED, DMA_TRANS_NOERROR, checked_plan
from offload.units import ENODEV

SECOND = 1_000_000_000
LONG = 60 * SECOND


class DmaConformance:
    """Batches are carried out whole, each descriptor has its result, and nothing is written after terminate_sync()."""

    max_folios = 24
    max_order = 4

    @staticmethod
    def make():
        """A fresh provider of at least two channels."""
        raise NotImplementedError

    @staticmethod
    def arena(nr_frames):
        """Memory that the provider can reach, with HostArena's members."""
        return HostArena(nr_frames)

    @pytest.fixture(scope="class")
    @classmethod
    def device(cls):
        device = DmaDevice(cls.make())
        yield device
        device.close()

    @pytest.fixture
    def chan(self, device):
        chan = dma_request_chan(device)
        assert isinstance(chan, DmaChan)
        yield chan
        chan.release()

    def plan(self, seed=0, orders=(0, 3, 0, 1), spare=3):
        """(plan, dst arena, src arena) with random bytes. They live as long as this object."""
        rng = np.random.default_rng(seed)
        nr_frames = int((1 << np.asarray(orders, np.int64)).sum()) + spare
        dst, src = self.arena(nr_frames), self.arena(nr_frames)
        for arena in (dst, src):
            frames = arena.read()
            arena.write(rng.integers(0, 256, frames.size, np.uint8).reshape(frames.shape))
        self.__dict__.setdefault("arenas", []).append((dst, src))
        return scattered_plan(rng, nr_frames, np.asarray(orders, np.int64), dst.base, src.base), dst, src

    @staticmethod
    def results(plan):
        return np.zeros(len(plan.order), np.uint8)

    @staticmethod
    def start(chan, plan, interrupt="each"):
        tx = chan.prep_dma_memcpy(plan, np.zeros(len(plan.order), np.uint8), interrupt)
        assert chan.submit(tx) > 0
        chan.issue_pending()
        return tx

    @settings(max_examples=25, deadline=None,
              suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
    @given(data=st.data())
    def test_copies_what_the_plan_says(self, device, data):
        orders = data.draw(st.lists(st.integers(0, self.max_order), min_size=1, max_size=self.max_folios), "orders")
        plan, dst, src = self.plan(data.draw(st.integers(0, 2**32 - 1), "seed"), orders)
        before = dst.read(), src.read()
        chan = dma_request_chan(device)
        try:
            interrupt = data.draw(st.sampled_from(("each", "last")), "interrupt")
            tx = self.start(chan, plan, interrupt)
            assert chan.wait(tx, LONG)
            if not tx.result.all():                 # the last one signalled, and the engine was through with it first
                assert interrupt == "last" and tx.result[-1]
                return
            assert (tx.result == DMA_TRANS_NOERROR).all()
            assert verdicts(plan, before, (dst.read(), src.read())) == []
        finally:
            chan.release()

    def test_a_client_keeps_several_batches_in_flight(self, device):
        made = [self.plan(seed) for seed in range(6)]
        before = [(dst.read(), src.read()) for _, dst, src in made]
        chans = [dma_request_chan(device), dma_request_chan(device)]
        txs = []
        for i, (plan, _, _) in enumerate(made):
            tx = chans[i % 2].prep_dma_memcpy(plan, self.results(plan))
            assert chans[i % 2].submit(tx) == 1 + i // 2
            txs.append(tx)
        for chan in chans:
            chan.issue_pending()
        for i in (5, 0, 1, 2, 3, 4):                # in another order than they end
            assert chans[i % 2].wait(txs[i], LONG)
        for (plan, dst, src), was, tx in zip(made, before, txs):
            assert (tx.result == DMA_TRANS_NOERROR).all()
            assert verdicts(plan, was, (dst.read(), src.read())) == []
        for chan in chans:
            chan.release()

    def test_batches_of_a_channel_run_in_order(self, chan):
        """What the second one reads, the first has written."""
        arena = self.arena(3)
        frames = arena.read()
        frames[rows(0, 0)] = 7
        arena.write(frames)
        txs = []
        for dst, src in ((1, 0), (2, 1)):
            plan = checked_plan(arena.base, arena.base, [dst], [src], [0])
            txs.append(chan.prep_dma_memcpy(plan, self.results(plan)))
            chan.submit(txs[-1])
        chan.issue_pending()
        assert chan.wait(txs[1], LONG) and txs[0].result.tolist() == [DMA_TRANS_NOERROR]
        assert (arena.read()[rows(2, 0)] == 7).all()

    def test_nothing_moves_before_it_is_issued(self, chan):
        plan, dst, src = self.plan()
        before = dst.read(), src.read()
        tx = chan.prep_dma_memcpy(plan, self.results(plan))
        chan.issue_pending()                        # nothing is submitted
        chan.submit(tx)
        chan.terminate_sync()
        assert (tx.result == DMA_TRANS_ABORTED).all() and tx.state == "ended"
        undone = [(NOT_COPIED, i) for i in range(plan.nr_folios)]
        assert verdicts(plan, before, (dst.read(), src.read())) == undone

    def test_terminate_leaves_only_whole_descriptors(self, chan):
        plan, dst, src = self.plan(1, [self.max_order] * 200)
        before = dst.read(), src.read()
        tx = self.start(chan, plan)
        chan.terminate_sync()
        assert set(tx.result.tolist()) <= {DMA_TRANS_NOERROR, DMA_TRANS_ABORTED}
        after = dst.read(), src.read()
        # The bytes of what did not end are undefined, everything else is as it should be.
        wrong = {entry for _, entry in verdicts(plan, before, after)}
        assert wrong <= set(np.flatnonzero(tx.result != DMA_TRANS_NOERROR).tolist())
        kept, ends = tx.result.copy(), dst.read()
        again = self.start(chan, self.plan(2)[0])
        assert chan.wait(again, LONG)
        assert np.array_equal(kept, tx.result) and np.array_equal(ends, dst.read()), "written after terminate_sync()"

    def test_a_terminated_channel_goes_on(self, chan):
        self.start(chan, self.plan()[0])
        chan.terminate_sync()
        chan.terminate_sync()
        plan, dst, src = self.plan(3)
        before = dst.read(), src.read()
        tx = self.start(chan, plan)
        assert chan.wait(tx, LONG) and (tx.result == DMA_TRANS_NOERROR).all()
        assert verdicts(plan, before, (dst.read(), src.read())) == []

    def test_channels_run_out_and_come_back(self, device):
        chans = [dma_request_chan(device) for _ in range(device.provider.nr_chans)]
        assert [chan.number for chan in chans] == list(range(device.provider.nr_chans))
        assert device.nr_free_chans == 0 and dma_request_chan(device) == -ENODEV
        chans[1].release()
        again = dma_request_chan(device)
        assert again.number == 1
        for chan in (chans[0], again, *chans[2:]):
            chan.release()
        assert device.nr_free_chans == device.provider.nr_chans

    def test_a_refused_batch_leaves_the_channel_good(self, chan):
        """The ring fills up, if there is one; nothing is lost, and it empties again."""
        made = []
        for seed in range(200):
            plan, dst, src = self.plan(seed, [0])
            tx = chan.prep_dma_memcpy(plan, self.results(plan))
            if tx is None:
                break
            made.append((plan, dst, src, (dst.read(), src.read()), tx))
            assert chan.submit(tx) > 0
        chan.issue_pending()
        for plan, dst, src, before, tx in made:
            assert chan.wait(tx, LONG) and tx.result.tolist() == [DMA_TRANS_NOERROR]
            assert verdicts(plan, before, (dst.read(), src.read())) == []
        assert chan.wait(self.start(chan, self.plan()[0]), LONG)

    def test_misuse_is_refused(self, device):
        chan, other = dma_request_chan(device), dma_request_chan(device)
        plan = self.plan()[0]
        tx = chan.prep_dma_memcpy(plan, self.results(plan))
        for wrong in (lambda: other.submit(tx), lambda: chan.wait(tx, LONG)):
            with pytest.raises(InvalidInput, match="prepare, submit and issue it there first"):
                wrong()
        chan.submit(tx)
        with pytest.raises(InvalidInput, match="is not prepared"):
            chan.submit(tx)
        assert tx.result.tolist() == [DMA_IN_PROGRESS] * plan.nr_folios
        chan.release()
        other.release()
        assert (tx.result == DMA_TRANS_ABORTED).all()
        with pytest.raises(InvalidInput, match="has been released"):
            chan.issue_pending()

    def test_close_twice(self):
        device = DmaDevice(self.make())
        dma_request_chan(device).release()
        device.close()
        device.close()
