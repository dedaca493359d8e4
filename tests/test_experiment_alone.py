"""offload bench-engine, judged from outside: on the CPU, and over the stub of the driver in a device's place. No timing is asserted
but that of the stub, which a test sets.
"""

import contextlib
import gc
import io
import json

import numpy as np
import pytest
from cuda_stub import Stub, needs_compiler

from offload import calibration
from offload.calibration import Calibration
from offload.cli import main
from offload.errors import EngineUnavailable, InvalidInput, OutOfMemory
from offload.experiment import alone
from offload.experiment import alone_tables as alone_tables_module
from offload.experiment.alone import AloneConfig, run_alone
from offload.experiment.alone_tables import alone_tables, unverified_cells
from offload.experiment.manifest import NOT_VERIFIED
from offload.kernels import cuda
from offload.kernels.cuda import Probe
from offload.kernels.cuda_engines import CudaBackend
from offload.report import console, show

HERE = Probe(None, "14.2.0", 13000, "stub, not a GPU", (9, 0), 5, True, "13.5")
KEYS = ["engine", "from", "to", "order", "folios", "bytes", "picked", "call", "flags", "hardware", "device", "cuda", "driver", "plan_ns",
        "submit_ns", "device_ns", "end_to_end_ns", "gbps", "device_gbps", "resident", "verified", "share_of_ceiling",
        "device_share_of_ceiling"]


def run_main(*args):
    """(exit status, standard output, standard error) of ``offload bench-engine ARGS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["bench-engine", *map(str, args)])
    return status, out.getvalue(), err.getvalue()


def small(**given):
    return AloneConfig.parse(**{"folios": 40, "size": "2M", "orders": "0,4", "repeat": 2, "migration": False} | given)


def printed(result):
    out = io.StringIO()
    to = console(out)
    for part in alone_tables(result):
        to.print(part, soft_wrap=isinstance(part, str))
    return out.getvalue()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "probe", lambda: Probe("there is a reason"))


@pytest.fixture
def stub(monkeypatch):
    """The stub in the place of a device, with an auto that takes the kernel for many folios and the loop for few."""
    stub = Stub()
    device = stub.stand_in(monkeypatch, HERE)
    cells = [{"order": 0, "folios": nr, "ns": {"cuda-loop:1": nr, "cuda-kernel": 30}} for nr in (1, 64)]
    makers = {"cuda-loop:1": lambda: CudaBackend(device, "cuda-loop", check=False),
              "cuda-kernel": lambda: CudaBackend(device, "cuda-kernel", check=False)}
    kept = Calibration(device, makers, "/nonexistent/auto.json", {}, say=lambda line: None)
    kept._directions = dict.fromkeys(("device,device", "pinned,device", "device,pinned", "pinned,pinned"), cells)
    monkeypatch.setattr(calibration, "open_calibration", lambda: kept)
    return stub


class TestOnTheCpu:
    """Without a GPU the CPU's engines are measured, from the command line on."""

    def test_the_command(self, no_gpu, tmp_path):
        path = tmp_path / "result.json"
        status, out, err = run_main("--folios", 40, "--size", "2M", "--orders", "0,4", "--repeat", 2, "--json", path)
        assert status == 0 and not [line for line in err.splitlines() if not line.startswith("offload: compiling ")]
        result = json.loads(path.read_text())
        assert list(result) == ["format", "kind", "manifest", "ceilings", "rows", "migrations"]
        assert [(row["engine"], row["order"], row["folios"], row["bytes"]) for row in result["rows"]] == [
            ("batch", 0, 40, 40 << 12), ("batch+stream", 0, 40, 40 << 12), ("batch", 4, 32, 2 << 20), ("batch+stream", 4, 32, 2 << 20)]
        for row in result["rows"]:
            assert list(row) == KEYS and row["verified"] is True and row["hardware"] == "CPU"
            assert len(row["end_to_end_ns"]["samples"]) == 2 and row["device_ns"] is row["submit_ns"] is row["resident"] is None
            assert row["gbps"] == row["bytes"] / row["end_to_end_ns"]["median"]
        assert result["ceilings"] is None and result["manifest"]["gpu"]["reason"] == "there is a reason"
        assert {(one["engine"], one["order"], one["batch_pages"]) for one in result["migrations"]} == {
            (engine, order, limit) for engine in ("batch", "batch+stream") for order in (0, 4) for limit in (512, 262144)}
        for one in result["migrations"]:
            assert one["bytes"] == one["folios"] << 12 << one["order"] and len(one["end_to_end_ns"]["samples"]) == 2
            assert one["gbps"]["samples"] == pytest.approx([one["bytes"] / ns for ns in one["end_to_end_ns"]["samples"]])
        assert all(one["verified"] and one["gbps"]["mean"] > 0 for one in result["migrations"])
        assert "no GPU: there is a reason" in out and "verified: every byte" in out

    def test_any_number_of_folios_is_migrated_as_well(self, no_gpu):
        """Sizes that no number with one decimal tells exactly, such as 264K and a page."""
        result = run_alone(small(folios=265, size=str(265 << 12), orders="0", engines="batch", migration=True, repeat=1, warmup=0))
        assert [(one["why_not"], one["verified"], one["bytes"]) for one in result["migrations"]] == [(None, True, 265 << 12)] * 2
        assert f"--size {265 << 12} " in result["manifest"]["command"]

    def test_to_standard_output(self, no_gpu):
        status, out, _ = run_main("--folios", 3, "--orders", 0, "--engines", "batch", "--no-migration", "--json", "-")
        assert status == 0 and json.loads(out)["rows"][0]["folios"] == 3

    def test_auto_on_the_cpu_says_whom_it_took(self, no_gpu):
        result = run_alone(small(folios=1, orders="0", engines="auto,batch"))
        assert [(row["picked"], row["hardware"]) for row in result["rows"]] == [("batch+stream", "CPU"), (None, "CPU")]
        assert "auto (batch+stream)" in printed(result) and "one batch of 1 folio, " in printed(result)

    def test_a_byte_that_does_not_arrive(self, no_gpu, monkeypatch):
        """One bit in one page of one engine: that cell alone is not verified, and the status says so."""
        class Wrong:
            def __init__(self, backend):
                self.backend = backend

            def __getattr__(self, name):
                return getattr(self.backend, name)

            def copy(self, plan, done):
                error = self.backend.copy(plan, done)
                import ctypes
                ctypes.c_uint8.from_address(plan.dst_base + (int(plan.dst[5]) << 12) + 77).value ^= 4
                return error
        make = alone.Engine.make_backend
        monkeypatch.setattr(alone.Engine, "make_backend", lambda engine: Wrong(make(engine)) if engine.name == "batch+stream" else make(engine))
        result = run_alone(small(orders="0"))
        assert unverified_cells(result) == [("host,host", "4K", "batch+stream")]
        assert "NOT VERIFIED, do not use: host,host 4K batch+stream" in printed(result)
        assert run_main("--folios", 40, "--orders", 0, "--no-migration")[0] == 1

    def test_folios_left_out_are_seen(self, no_gpu, monkeypatch):
        """The destination is poisoned, so a copy that does nothing does not pass for one."""
        class Lazy:
            def copy(self, plan, done):
                done[:] = 1
                return 0

            def close(self):
                pass
        monkeypatch.setattr(alone.Engine, "make_backend", lambda engine: Lazy())
        assert len(unverified_cells(run_alone(small()))) == 4

    @pytest.mark.parametrize("args, expected", [
        (("--folios", 0), "folios 0 cannot be"), (("--size", "4K", "--orders", "9"), "holds no folio of 2M"), (("--nodes", "host"), "not two placements"),
        (("--nodes", "host,moon"), "not two placements"), (("--nodes", "nowhere,nowhere"), "not two placements"),
        (("--engines", "batch,batch"), "engines names batch twice"), (("--nodes", "host,host", "--nodes", "host,host"), "nodes names host,host twice"),
        (("--json", ""), "names no file"), (("--repeat", 10_001), "from 1 to 10000"), (("--engines", "warp"), "is not known"), (("--orders", "10"), "out of range"),
        (("--nodes", "pinned,pinned"), "there is a reason"), (("--engines", "cuda-kernel"), "there is a reason"),
        (("--folios", 1 << 30, "--size", "1024G"), "is available; use a smaller"), (("--repeat", 0), "repeat 0 cannot be"),
        (("--json", "/nonexistent/x"), "cannot be written"),
    ])
    def test_what_cannot_be(self, no_gpu, args, expected):
        status, out, err = run_main(*args)
        assert (status, out) == (2, "") and err.startswith("offload: ") and err.count("\n") == 1 and expected in err


@needs_compiler
class TestOnTheStub:
    """Every pair, every engine: times by events, ceilings of the same run, and what each row is."""

    @pytest.fixture
    def result(self, stub):
        stub.state.ns_copy, stub.state.ns_launch, stub.state.ps_byte = 1000, 5000, 100
        return run_alone(small())

    def test_rows(self, result):
        cells = [(f"{row['from']},{row['to']}", row["order"], row["engine"], "OVERLAP" in row["flags"]) for row in result["rows"]]
        gpu = [("cuda-loop:1", False), ("cuda-batch", False), ("cuda-batch", True), ("cuda-kernel", False), ("auto", False)]
        cpu = [("batch", False), ("batch+stream", False)]
        assert cells == [(pair, order, *engine) for pair in ("device,device", "pinned,device", "device,pinned", "pinned,pinned")
                         for order in (0, 4) for engine in (cpu if pair == "pinned,pinned" else []) + gpu]
        assert unverified_cells(result) == []
        for row in result["rows"]:
            assert list(row) == KEYS
            on_gpu = row["engine"] not in ("batch", "batch+stream")
            assert (row["hardware"], row["device"], row["cuda"]) == ((NOT_VERIFIED, "stub, not a GPU", "13.0") if on_gpu else ("CPU", None, None))

    def test_device_times(self, result):
        """What the stub's clock says: a call a folio, or a launch behind the upload of its list."""
        for row in result["rows"]:
            payload, nr = row["bytes"] // 10, row["folios"]
            expected = {"cuda-loop:1": nr * 1000 + payload, "cuda-batch": nr * 1000 + payload,
                        "cuda-kernel": 1000 + nr * 8 // 10 + 5000 + payload}.get(row["engine"])
            if expected is None:
                assert row["device_ns"] is None
                continue
            # Folios that happen to be neighbours at both ends are one run.
            assert row["device_ns"]["median"] == pytest.approx(expected, rel=0.1)
            assert row["device_gbps"] == pytest.approx(row["bytes"] / row["device_ns"]["median"])
            assert row["submit_ns"]["median"] > 0 and row["plan_ns"]["median"] > 0
            if row["engine"] == "cuda-kernel":
                assert row["resident"]["device_ns"]["median"] == pytest.approx(5000 + payload, rel=1e-3)

    def test_ceilings(self, result):
        assert list(result["ceilings"]) == ["device,device", "pinned,device", "device,pinned", "both ways"]
        nbytes = 40 << 16                           # of the largest batch
        expected = nbytes / (1000 + nbytes // 10)
        for name, ceiling in result["ceilings"].items():
            assert ceiling["gbps"] == pytest.approx(expected, rel=1e-3), name
        for row in result["rows"]:
            if row["from"] == row["to"] == "pinned" or row["device_gbps"] is None:
                assert row["device_share_of_ceiling"] is None
            else:
                assert row["device_share_of_ceiling"] == pytest.approx(row["device_gbps"] / expected, rel=1e-3)

    def test_auto_says_whom_it_took(self, result):
        rows = [row for row in result["rows"] if row["engine"] == "auto"]
        assert {row["picked"] for row in rows} == {"cuda-kernel"} and {row["call"] for row in rows} == {"one launch of copy_folios"}
        assert any("auto is the fastest for each batch" in note for note in result["manifest"]["notes"])

    def test_the_tables(self, result):
        text = printed(result)
        assert "stub, not a GPU, CUDA 13.0, driver" in text and "auto (cuda-kernel)" in text and "cuda-batch+overlap" in text
        assert "not verified" in text and "both ways" in text
        assert max(len(line) for line in text.splitlines() if not line.startswith("ratios mean little")) <= 200

    @pytest.mark.parametrize("columns", [60, 80, 200])
    def test_no_column_is_lost_on_a_narrow_terminal(self, result, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "dumb")

        class Terminal(io.StringIO):
            def isatty(self):
                return True
        out = Terminal()
        show(alone_tables(result, columns), out)
        text = out.getvalue()
        first = text[text.index("\ndevice,device: "):text.index("\npinned,device: ")].splitlines()[2:]
        heads = [line for line in first if line.startswith("folio ")]
        for column in alone_tables_module.COLUMNS:
            assert any(f" {column} " in f" {line} " for line in heads), column
        assert len([line for line in first if line.split()[:1] == ["64K"]]) == 5 * len(heads) and max(map(len, map(str.rstrip, first))) <= columns

    def test_one_statistic(self, result):
        """Medians, also of the migrations, and how far the runs of each lie apart."""
        row = next(row for row in result["rows"] if row["engine"] == "cuda-loop:1")
        row["end_to_end_ns"] = {"median": 100.0, "samples": [80.0, 100.0, 140.0]}
        beside = {name: row[name] for name in ("from", "to", "order", "engine", "folios", "bytes")} | {
            "verified": True, "why_not": None, "end_to_end_ns": {"median": 3, "samples": [3, 3]}}
        result["migrations"] = [beside | {"batch_pages": limit, "gbps": {"mean": 4.0, "sd": 1.0, "samples": [1.0, speed, 9.0]}}
                                for limit, speed in ((512, 2.0), (262144, 3.0))]
        text = printed(result)
        line = next(line for line in text.splitlines() if line.split()[:2] == ["4K", "cuda-loop:1"]).split()
        assert dict(zip(alone_tables_module.COLUMNS, line))["spread"] == "60%" and line[-3:] == ["2.00", "3.00", "yes"]
        warning = next(line for line in text.splitlines() if line.startswith("ratios mean little"))
        assert "device,device 4K cuda-loop:1 (60%)" in warning and "migrated" not in warning

    def test_all_is_given_back(self, stub):
        before = stub.state.streams, stub.state.events
        run_alone(small(engines="cuda-loop:2,cuda-batch,cuda-kernel"))
        assert (stub.state.streams, stub.state.events) == before and stub.state.allocs == stub.state.frees

    def test_a_corrupting_device(self, stub):
        """What the copies break is found whoever made them. (The ceilings' copies are not looked at.)"""
        stub.state.corrupt = 1
        result = run_alone(small(engines="cuda-loop:1,cuda-kernel", nodes=("device,device",), orders="0"))
        assert len(unverified_cells(result)) == 2

    def test_migrations_beside(self, stub):
        """With device memory at an end the CPU's batch is no engine alone, but a migration: folio by folio."""
        result = run_alone(small(engines="batch,cuda-loop:1", nodes=("pinned,pinned", "pinned,device"), orders="0", migration=True, repeat=1))
        assert {(one["to"], one["engine"], one["batch_pages"]) for one in result["migrations"]} == {
            (to, engine, limit) for to in ("pinned", "device") for engine in ("batch", "cuda-loop:1") for limit in (512, 262144)}
        assert all(one["verified"] for one in result["migrations"])
        assert [row["engine"] for row in result["rows"]] == ["batch", "cuda-loop:1", "cuda-loop:1"]

    def test_where_there_is_no_migration_it_says_why(self, stub, monkeypatch):
        def refused(*args, **texts):
            raise InvalidInput("there is a reason")
        monkeypatch.setattr(alone.BenchConfig, "parse", refused)
        result = run_alone(small(engines="cuda-loop:1", nodes=("device,device",), orders="0", migration=True))
        assert {one["why_not"] for one in result["migrations"]} == {"there is a reason"}
        assert "not measured: the migration device,device of 4K with batch limit 512: there is a reason" in printed(result)

    @pytest.mark.parametrize("nodes, engines", [("host,device", "cuda-kernel"), ("host,host", "cuda-loop:1"), ("device,device", "batch"),
                                                ("host,pinned", "auto,cuda-batch")])
    def test_a_pair_that_nobody_serves(self, stub, nodes, engines):
        if engines.startswith("auto"):              # on host memory it is the CPU
            assert AloneConfig.parse(nodes=(nodes,), engines=engines, folios=4)
            return
        with pytest.raises(InvalidInput, match="served by none"):
            AloneConfig.parse(nodes=(nodes,), engines=engines, folios=4)

    @pytest.mark.parametrize("nodes", ["device,device", "pinned,device"])
    def test_more_than_the_device_has(self, stub, nodes):
        stub.have_bytes(5 << 20)
        assert small(engines="cuda-loop:1", nodes=(nodes,), size="2M", orders="9")
        with pytest.raises(InvalidInput, match="use a smaller --size") as refused:
            small(engines="cuda-loop:1", nodes=(nodes,), size="4M", orders="9")
        assert "\n" not in str(refused.value) and stub.state.allocs == 0

    def test_ceilings_with_one_pair_alone(self, stub):
        """A share of the ceiling is had by whoever asks for one pair: pinned memory is had for it."""
        stub.state.ps_byte = 100
        result = run_alone(small(engines="cuda-kernel", nodes=("device,device",), orders="0"))
        assert len(result["ceilings"]) == 4 and result["rows"][0]["device_share_of_ceiling"] is not None
        assert run_alone(small(engines="cuda-kernel", nodes=("pinned,pinned",), orders="0"))["ceilings"] is None

    def test_auto_that_was_settled_beforehand_says_whom_it_took(self, stub):
        result = run_alone(small(engines="auto", nodes=("host,device",), orders="0"))
        assert [(row["picked"], row["call"]) for row in result["rows"]] == [("cuda-loop:1", "cuMemcpyAsync for each run")]

    def test_pageable_memory(self, stub):
        """A copy call stages it; the others would have to reach it, and are left out."""
        result = run_alone(small(engines="cuda-loop:1,cuda-batch,batch", nodes=("host,device", "host,host"), orders="0"))
        assert [(row["to"], row["engine"]) for row in result["rows"]] == [("device", "cuda-loop:1"), ("host", "batch")]
        assert unverified_cells(result) == []

    def test_a_lost_device(self, stub):
        config = small(engines="cuda-loop:1", nodes=("device,device",), orders="0")
        stub.state.lose_at = 60
        with pytest.raises(EngineUnavailable) as refused:
            run_alone(config)
        assert "\n" not in str(refused.value)

    def test_a_device_lost_in_a_copy_of_ours(self, stub):
        """While the sources are being filled: one line as well."""
        config = small(engines="cuda-loop:1", nodes=("pinned,device",), orders="0")
        stub.state.lose_at = 0
        with pytest.raises(EngineUnavailable, match="stub, not a GPU went out of service: .*; nothing was measured"):
            run_alone(config)

    @pytest.mark.parametrize("nodes", ["device,device", "pinned,pinned"])
    @pytest.mark.parametrize("nr", range(7))
    def test_no_room(self, stub, nr, nodes):
        config = small(engines="cuda-loop:1", nodes=(nodes,), orders="0")
        gc.collect()                                # what earlier tests' exceptions hold is given back now
        stub.state.frees, stub.state.fail_alloc = 0, nr
        if nr >= (2 if nodes == "pinned,pinned" else 6):        # two pieces of each kind, and a scratch page of each on the device
            run_alone(config)
            return
        with pytest.raises(OutOfMemory, match="smaller --size"):
            run_alone(config)
        assert stub.state.frees == stub.state.allocs - 1


class TestCaches:
    """Batches that are too small for a cache are named above the table."""

    def test_of_the_cpu(self, no_gpu, monkeypatch):
        monkeypatch.setattr(alone, "last_level_cache", lambda: 1 << 20)
        assert list(alone.cache_notes(small(folios=512))) == []             # 2M at each end, and more of 64K
        monkeypatch.setattr(alone, "last_level_cache", lambda: (1 << 20) + 1)
        config = small(folios=512, size="4M")
        note, = alone.cache_notes(config)
        assert note.startswith("batches of 4K folios take less than four times the last-level cache of the CPU (1.0 MiB): they may show the cache")
        assert note in printed(run_alone(config))

    @needs_compiler
    def test_of_the_device(self, stub, monkeypatch):
        monkeypatch.setattr(alone, "last_level_cache", lambda: 1 << 40)
        assert list(alone.cache_notes(small(nodes=("device,device", "pinned,device")))) == []      # the stub does not tell
        monkeypatch.setattr(alone, "l2_cache", lambda: 50 << 20)
        note, = alone.cache_notes(small(nodes=("device,device", "pinned,device")))
        assert note.startswith("batches of 4K, 64K folios take less than four times the device's L2 cache (50 MiB)")


class TestTheBatch:
    """Both ends are in random order, and what is expected is what the plan says."""

    def test_it(self, no_gpu):
        config = small()
        with alone.Memory(config) as memory:
            batch = alone.make_batch(config, memory, ("host", "host"), 4)
            plan = batch.plan
            assert sorted(plan.dst.tolist()) == sorted(plan.src.tolist()) == list(range(0, 32 * 16, 16))
            assert plan.dst.tolist() != sorted(plan.dst) and plan.src.tolist() != sorted(plan.src)
            by_hand = np.zeros_like(batch.expected)
            for dst, src in zip(plan.dst.tolist(), plan.src.tolist()):
                by_hand[dst:dst + 16] = memory.content[src:src + 16]
            assert np.array_equal(by_hand, batch.expected)
