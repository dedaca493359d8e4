"""The DMA engine: the client side, and the provider whose channels are CPU threads."""

import signal
import threading

import numpy as np
import pytest
from dma_conformance import LONG, DmaConformance

from offload.dmaengine import DmaDevice, dma_request_chan
from offload.errors import InvalidInput
from offload.kernels.base import DMA_TRANS_ABORTED, DMA_TRANS_NOERROR
from offload.kernels.cpu import JOB_RING
from offload.kernels.cpu_channels import CpuProvider
from offload.units import ENOMEM


class TestCpuPlain(DmaConformance):
    @staticmethod
    def make():
        return CpuProvider(2)


class TestCpuStream(DmaConformance):
    @staticmethod
    def make():
        return CpuProvider(3, "stream")


MADE = TestCpuPlain()


def copiers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("copy_")]


class TestCpuProvider:
    """Threads stand for channels: they come with the first request and go with close()."""

    @pytest.mark.parametrize("nr_chans", [0, -1, 65, True, "2", None, 1.0])
    def test_refuses_other_numbers(self, nr_chans):
        with pytest.raises(InvalidInput, match="from 1 to 64") as caught:
            CpuProvider(nr_chans)
        assert repr(nr_chans) in str(caught.value)

    def test_refuses_other_kernels(self):
        with pytest.raises(InvalidInput, match="'dma' is not known; use one of: plain, stream"):
            CpuProvider(2, "dma")

    def test_threads_stand_until_close(self):
        before = len(copiers())
        device = DmaDevice(CpuProvider(4))
        assert len(copiers()) == before
        for _ in range(3):
            chans = [dma_request_chan(device) for _ in range(2)]
            assert len(copiers()) == before + 2
            for chan in chans:
                chan.release()
        device.close()
        assert len(copiers()) == before
        dma_request_chan(device).release()
        assert len(copiers()) == before + 1
        device.close()
        assert len(copiers()) == before

    def test_close_waits_for_what_is_under_way(self):
        plan, dst, _ = MADE.plan(0, [4] * 50)
        device = DmaDevice(CpuProvider(2))
        tx = TestCpuPlain.start(dma_request_chan(device), plan)
        device.close()
        assert (tx.result == DMA_TRANS_NOERROR).all()

    def test_no_thread_is_enomem(self, monkeypatch):
        device = DmaDevice(CpuProvider(2))
        with monkeypatch.context() as patched:
            def start(thread):
                raise RuntimeError("can't start new thread")
            patched.setattr(threading.Thread, "start", start)
            assert dma_request_chan(device) == -ENOMEM
        assert device.nr_free_chans == 2
        dma_request_chan(device).release()
        device.close()

    def test_the_ring_has_room_for_so_many_batches(self):
        device = DmaDevice(CpuProvider(2))
        chan = dma_request_chan(device)
        plan = MADE.plan()[0]
        late = chan.prep_dma_memcpy(plan, np.zeros(4, np.uint8))
        for i in range(JOB_RING):
            tx = chan.prep_dma_memcpy(plan, np.zeros(4, np.uint8))
            assert chan.submit(tx) == i + 1
        assert chan.prep_dma_memcpy(plan, np.zeros(4, np.uint8)) is None
        assert chan.submit(late) < 0 and late.cookie == 0
        chan.issue_pending()
        assert chan.wait(tx, LONG)
        assert chan.submit(late) == JOB_RING + 1
        chan.release()
        assert (late.result == DMA_TRANS_ABORTED).all()
        device.close()

    def test_wait_ends_after_its_time(self):
        """A channel whose thread is busy with 1 GiB is not through after 0 ns."""
        device = DmaDevice(CpuProvider(2))
        chan = dma_request_chan(device)
        plan = MADE.plan(0, [4] * 100)[0]
        tx = TestCpuPlain.start(chan, plan)
        first = chan.wait(tx, 0)
        assert first is False or tx.result.all()
        assert chan.wait(tx, LONG) is True and chan.wait(tx, 0) is True
        chan.release()
        device.close()

    def test_ctrl_c_while_waiting(self):
        """The wait ends with KeyboardInterrupt; the channel can be terminated, after which nothing is written."""
        device = DmaDevice(CpuProvider(2))
        chan = dma_request_chan(device)
        plan, dst, _ = MADE.plan(0, [4] * 100)
        interrupt = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        txs = []
        with pytest.raises(KeyboardInterrupt):
            interrupt.start()
            while True:
                txs.append(TestCpuPlain.start(chan, plan))
                chan.wait(txs[-1], LONG)
        chan.terminate_sync()
        assert all(tx.result.all() for tx in txs)
        after = dst.read()
        device_alive = TestCpuPlain.start(chan, MADE.plan(1)[0])
        assert chan.wait(device_alive, LONG) and np.array_equal(after, dst.read())
        chan.release()
        device.close()
