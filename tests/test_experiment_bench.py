"""offload bench, judged from outside: the command line, its table, its JSON, its exit status. No timing is asserted."""

import contextlib
import ctypes
import io
import json

import numpy as np
import pytest

import offload.experiment.bench as bench_module
from offload.cli import main
from offload.engines import Engine, parse_engine
from offload.errors import InvalidInput
from offload.experiment.bench import Bench, Session, make_notes, make_row, run_bench, spread
from offload.experiment.config import BenchConfig
from offload.experiment.tables import bench_tables, share_of_copy, share_of_limit, speedup, unverified
from offload.migrators.mc_copy import McCopy
from offload.report import show
from offload.units import PAGE_SIZE

SIZE = 4 << 20
ENGINES = ("vanilla", "vanilla+stream", "batch", "batch+stream", "mt:2", "mt:2+stream")
ROW_KEYS = ["engine", "copy_kernel", "threads", "batch_pages", "order", "folios", "limit_gbps", "gbps", "wall_ns", "phases_ns",
            "blocked_ns", "cpu_s", "moved_bytes", "verified", "handed", "call", "flags", "hardware", "device", "cuda", "driver"]


def run_main(*args):
    """(exit status, standard output, standard error) of ``offload bench ARGS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["bench", *map(str, args)])
    return status, out.getvalue(), err.getvalue()


def small(**given):
    """A configuration that takes no time."""
    return BenchConfig.parse(**{"size": "2M", "orders": "0", "engines": "vanilla", "repeat": 1, "warmup": 0} | given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole bench through the command line: (exit status, printed, the JSON file's result)."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    status, printed, _ = run_main("--size", "4M", "--orders", "0,4,9", "--engines", ",".join(ENGINES), "--repeat", 2,
                                  "--batch-pages", 1024, "--seed", 7, "--json", path)
    return status, printed, json.loads(path.read_text())


class TestEveryByteArrivesWithEveryEngine:
    def test_exit_status(self, finished):
        assert finished[0] == 0

    def test_rows_are_verified_and_moved_all(self, finished):
        rows = finished[2]["rows"]
        assert [(row["order"], row["engine"]) for row in rows] == [(o, e) for o in (0, 4, 9) for e in ENGINES]
        for row in rows:
            assert row["verified"] is True
            assert row["moved_bytes"] == SIZE
            assert row["folios"] == SIZE // (PAGE_SIZE << row["order"])

    @pytest.mark.parametrize("mode", ["MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT"])
    def test_in_the_other_modes(self, mode):
        result = run_bench(small(mode=mode, engines="vanilla,batch+stream", orders="0,9"))
        assert unverified(result) == []
        assert result["manifest"]["mode"] == mode

    def test_when_the_whole_size_is_one_page(self):
        assert unverified(run_bench(small(size="4K", engines="vanilla,mt:2"))) == []


class TestTheJsonIsTheDocumentedOne:
    def test_top_level(self, finished):
        result = finished[2]
        assert list(result) == ["format", "manifest", "limits", "rows"]
        assert result["format"] == 1

    def test_rows(self, finished):
        for row in finished[2]["rows"]:
            assert list(row) == ROW_KEYS
            assert list(row["gbps"]) == ["mean", "sd", "samples"]
            assert list(row["phases_ns"]) == ["unmap", "flush", "copy", "move"]
            assert list(row["blocked_ns"]) == ["first", "p50", "p99", "max"]
            engine = parse_engine(row["engine"])
            assert row["call"] == f"CPU, {engine.copy_kernel}, {engine.threads} thread{'s' * (engine.threads > 1)}"
            assert (row["hardware"], row["device"], row["cuda"], row["driver"]) == ("CPU", None, None, None)
            assert (row["copy_kernel"], row["threads"], row["batch_pages"]) == (engine.copy_kernel, engine.threads, 1024)
            assert len(row["gbps"]["samples"]) == 2
            assert row["gbps"]["mean"] == pytest.approx(sum(row["gbps"]["samples"]) / 2)
            assert row["cpu_s"] > 0
            assert 0 < row["blocked_ns"]["p50"] <= row["blocked_ns"]["p99"] <= row["blocked_ns"]["max"]
            assert 0 < row["blocked_ns"]["first"] <= row["blocked_ns"]["max"]
            assert row["phases_ns"]["copy"] > 0 and row["phases_ns"]["unmap"] > 0 and row["phases_ns"]["move"] > 0

    def test_limits_are_those_of_the_kernels_and_threads_in_use(self, finished):
        limits, rows = finished[2]["limits"], finished[2]["rows"]
        assert list(limits) == ["contiguous_copy_gbps", "scattered_copy_gbps"]
        assert limits["contiguous_copy_gbps"] > 0
        assert list(limits["scattered_copy_gbps"]) == ["plain:1", "stream:1", "plain:2", "stream:2"]
        for by_order in limits["scattered_copy_gbps"].values():
            assert list(by_order) == ["0", "4", "9"]
        for row in rows:
            key = f"{row['copy_kernel']}:{row['threads']}"
            assert row["limit_gbps"] == limits["scattered_copy_gbps"][key][str(row["order"])] > 0

    def test_the_manifest_says_what_was_run_and_on_what(self, finished):
        manifest = finished[2]["manifest"]
        assert {"package", "git_commit", "python", "numpy", "numba", "kernel", "cpu", "cores", "thp", "governor",
                "glibc_tunables", "date", "command", "seed", "size", "repeat", "units", "timed"} <= set(manifest)
        assert (manifest["seed"], manifest["size"], manifest["repeat"], manifest["batch_pages"]) == (7, SIZE, 2, 1024)
        assert manifest["python"] and manifest["numpy"] and manifest["numba"] and manifest["cores"] >= 1

    def test_its_command_asks_for_the_same_again(self, finished):
        words = finished[2]["manifest"]["command"].split()
        assert words[:2] == ["offload", "bench"]
        options = dict(zip((word[2:].replace("-", "_") for word in words[2::2]), words[3::2]))
        numbers = {name: int(options[name]) for name in ("repeat", "warmup", "batch_pages", "seed")}
        config = BenchConfig.parse(**options | numbers)
        assert config.command_line() == finished[2]["manifest"]["command"]
        assert (config.size, config.orders, tuple(e.name for e in config.engines)) == (SIZE, (0, 4, 9), ENGINES)

    def test_on_standard_output_it_is_alone(self):
        status, printed, _ = run_main("--size", "64K", "--orders", "0", "--engines", "batch", "--repeat", 1, "--json", "-")
        assert status == 0
        assert json.loads(printed)["rows"][0]["engine"] == "batch"


class TestTheTable:
    def test_engines_are_rows_and_folio_sizes_are_columns(self, finished):
        lines = finished[1].splitlines()
        head = next(i for i, line in enumerate(lines) if line.split() == ["engine", "4K", "64K", "2M"])
        assert [line.split()[0] for line in lines[head + 1:head + 1 + len(ENGINES)]] == list(ENGINES)
        assert all(len(line.split()) == 4 and "±" in line for line in lines[head + 1:head + 1 + len(ENGINES)])

    def test_the_batch_limit_stands_in_its_head(self, finished):
        lines = finished[1].splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("engine"))
        assert "GB/s" in lines[head - 1] and "mean±SD" in lines[head - 1]
        assert "batch limit 1024 base pages" in lines[head - 1]

    def test_speed_up_and_share_of_the_limit_follow(self, finished):
        printed = finished[1]
        places = [printed.index(words) for words in ("GB/s of the whole call", "speed-up over vanilla with the same copy",
                                                     "share of the limit", "np.copyto of one contiguous block",
                                                     "phases", "blocked time")]
        assert places == sorted(places)
        for words in ("seed 7", "share of copy", "p50", "p99", "max", "CPU s", str(SIZE), "every byte"):
            assert words in printed

    def test_no_line_is_cut_or_wrapped_in_80_columns(self, finished):
        tables = [line for line in finished[1].splitlines() if line.startswith(ENGINES)]
        assert tables and max(map(len, tables)) <= 80


def row_of(engine, order, samples, **fields):
    parsed = parse_engine(engine)
    return {"engine": engine, "copy_kernel": parsed.copy_kernel, "threads": parsed.threads, "batch_pages": 512,
            "order": order, "folios": 10, "limit_gbps": 8.0,
            "gbps": {"mean": float(np.mean(samples)), "sd": 0.5, "samples": samples},
            "phases_ns": {"unmap": 100, "flush": 0, "copy": 300, "move": 100},
            "blocked_ns": {"first": 1500, "p50": 2000, "p99": 3000, "max": 4000},
            "cpu_s": 0.25, "moved_bytes": 123456, "verified": True} | fields


class TestDerivedNumbers:
    result = {"format": 1, "limits": {"contiguous_copy_gbps": 9.0, "scattered_copy_gbps": {"plain:1": {"0": 8.0}}},
              "manifest": {"verified": "in every run", "size": SIZE, "nodes": ["host", "host"], "mode": "MIGRATE_SYNC", "protocol": "v6", "batch_pages": 512, "repeat": 3,
                           "warmup": 1, "seed": 0, "cpu": "x", "cores": 2, "kernel": "7.3", "thp": "madvise",
                           "git_commit": None},
              "rows": [row_of("vanilla", 0, [4.0, 4.0, 1.0]), row_of("batch", 0, [6.0, 6.0, 6.0]),
                       row_of("vanilla+stream", 0, [2.0, 2.0, 2.0]), row_of("mt:2+stream", 0, [5.0, 5.0, 5.0]),
                       row_of("batch", 9, [7.0, 7.0, 7.0], limit_gbps=None)]}

    def test_speed_up_is_over_vanilla_with_the_same_copy_kernel_and_order(self):
        assert [speedup(self.result, row) for row in self.result["rows"]] == [1.0, 1.5, 1.0, 2.5, None]

    def test_what_a_gpu_engine_is_held_against_is_said(self):
        lines = [part for part in bench_tables(self.result) if isinstance(part, str)]
        assert "\nspeed-up over vanilla with the same copy kernel (medians)" in lines
        rows = [*self.result["rows"], row_of("vanilla", 0, [4.0]) | {"engine": "cuda-loop:1", "copy_kernel": "cuda-loop"}]
        lines = [part for part in bench_tables(self.result | {"rows": rows}) if isinstance(part, str)]
        assert "\nspeed-up over vanilla with the same copy kernel, that of GPU engines over vanilla between the same nodes (medians)" in lines

    def test_a_disturbed_run_does_not_move_a_ratio(self):
        assert share_of_limit(self.result["rows"][0]) == 0.5

    def test_share_of_the_limit_is_absent_without_one(self):
        assert share_of_limit(self.result["rows"][4]) is None

    def test_share_of_copy(self):
        assert share_of_copy(self.result["rows"][0]) == 0.6

    def test_cells_that_were_not_measured_are_dashes(self):
        out = io.StringIO()
        show(bench_tables(self.result), out)
        lines = [line.split() for line in out.getvalue().splitlines()]
        assert ["vanilla", "3.00±0.50", "--"] in lines
        assert ["batch", "6.00±0.50", "7.00±0.50"] in lines
        assert ["batch", "1.50x", "--"] in lines
        assert ["batch", "0.75", "--"] in lines
        assert ["plain:1", "8.00", "--"] in lines
        assert ["4K", "vanilla", "10", "0", "30", "10", "60.0%"] in lines
        assert ["4K", "vanilla", "1.5", "2.0", "3.0", "4.0", "0.2500", "123456", "yes"] in lines

    def shown(self, width=None, **changes):
        out = io.StringIO()
        show(bench_tables(self.result | changes, width), out)
        return out.getvalue()

    def test_what_has_no_speed_up_is_said_once(self):
        assert "no speed-up" not in self.shown()
        rows = [row_of(engine, order, [1.0, 2.0]) for engine in ("vanilla", "batch+stream", "mt:2+stream") for order in (0, 9)]
        lines = [line for line in self.shown(rows=rows).splitlines() if "no speed-up" in line]
        assert lines == ["no speed-up for batch+stream, mt:2+stream: vanilla+stream was not measured"]

    @pytest.mark.parametrize("width, blocks", [(None, 1), (80, 1), (79, 2), (60, 2), (40, 3), (10, 6)])
    def test_folio_sizes_that_do_not_fit_stand_below(self, width, blocks):
        rows = [row_of("vanilla+stream", order, [10.5, 20.25]) for order in (0, 2, 4, 6, 8, 9)]
        lines = self.shown(width, rows=rows).splitlines()
        begin, end = (next(i for i, line in enumerate(lines) if line.startswith(words)) for words in ("GB/s of", "speed-up"))
        heads = [line.split() for line in lines[begin:end] if line.startswith("engine")]
        assert len(heads) == blocks and [size for head in heads for size in head[1:]] == ["4K", "16K", "64K", "256K", "1M", "2M"]
        assert " ".join(lines[begin:end]).count("15.38±0.50") == 6
        assert width in (None, 10) or max(map(len, lines[begin + 1:end])) <= width

    def test_a_single_run_has_no_deviation(self):
        assert spread([2.0]) == {"mean": 2.0, "sd": None, "samples": [2.0]}
        row = row_of("vanilla", 0, [4.0]) | {"gbps": spread([4.0])}
        text = self.shown(rows=[row], manifest=self.result["manifest"] | {"repeat": 1, "warmup": 0})
        assert "±" not in text and ["vanilla", "4.00"] in [line.split() for line in text.splitlines()] and "; 1 run, seed 0" in text

    def test_what_the_host_does_not_tell_is_left_out(self):
        assert "None" not in self.shown(manifest=self.result["manifest"] | {"thp": None, "cpu": None})

    def test_a_size_that_fits_into_the_cache_is_noted(self, monkeypatch):
        monkeypatch.setattr(bench_module, "last_level_cache", lambda: 4 << 20)
        note, = make_notes(small(size="2M"))
        assert "(4 MiB) fit into the last-level cache (4 MiB)" in note
        assert make_notes(small(size="4M")) == make_notes(small(size="2M", nodes="nowhere,nowhere")) == []
        monkeypatch.setattr(bench_module, "last_level_cache", lambda: None)
        assert make_notes(small(size="2M")) == []

    def test_blocked_times_are_over_all_folios_of_all_timed_runs(self):
        def run(blocked_ns, verified=True):
            result = type("Result", (), {"blocked_ns": np.array(blocked_ns), "moved_bytes": SIZE,
                                         "phases_ns": dict.fromkeys(("unmap", "flush", "copy", "move"), 5)})
            return bench_module.Run(result, 1000, 2000, verified)

        config = small(size="4M")
        timed = [run(range(1, 101)), run(range(101, 201)), run([300, 1])]
        row = make_row(config, config.engines[0], 0, timed, [run([10 ** 9])])
        every = [*range(1, 201), 300, 1]
        assert row["blocked_ns"] == {"first": 101, "p50": int(np.percentile(every, 50)),
                                     "p99": int(np.percentile(every, 99)), "max": 300}
        assert row["gbps"] == {"mean": SIZE / 1000, "sd": 0.0, "samples": [SIZE / 1000] * 3}
        assert row["cpu_s"] == 2e-6
        assert make_row(config, config.engines[0], 0, timed, [run([1], False)])["verified"] is False


class Liar(McCopy):
    """Says that all is copied and copies nothing."""

    def offload_copy(self, batch, done):
        done[:] = 1
        return 0


class Corrupter(McCopy):
    """Copies, and turns one bit in the last byte of the last folio of a batch."""

    def offload_copy(self, batch, done):
        rc = super().offload_copy(batch, done)
        end = batch.frames + int(batch.dst[-1]) * PAGE_SIZE + (PAGE_SIZE << int(batch.order[-1]))
        byte = ctypes.c_uint8.from_address(end - 1)
        byte.value ^= 1
        return rc


class TestWhatIsWrongIsFound:
    @pytest.mark.parametrize("broken", [Liar, Corrupter])
    @pytest.mark.parametrize("order", [0, 9])
    def test_lost_bytes_fail_the_cell_and_the_command(self, monkeypatch, tmp_path, broken, order):
        honest = Engine.make_migrator
        monkeypatch.setattr(bench_module, "compile_once", lambda config: None)
        monkeypatch.setattr(Engine, "make_migrator",
                            lambda engine: broken() if engine.name == "batch" else honest(engine))
        path = tmp_path / "result.json"
        status, printed, _ = run_main("--size", "4M", "--orders", order, "--engines", "vanilla,batch", "--repeat", 1,
                                      "--json", path)
        assert status == 1
        assert "NOT VERIFIED" in printed and f"batch {'2M' if order else '4K'}" in printed
        assert "\nverified: " not in printed
        assert [row["verified"] for row in json.loads(path.read_text())["rows"]] == [True, False]

    def test_folios_that_stay_behind_fail_the_cell(self, monkeypatch):
        bench = Bench(small(size="4M"))
        migrate_pages = bench.machine.migrate_pages
        monkeypatch.setattr(bench.machine, "migrate_pages", lambda folios, *a, **k: migrate_pages(folios[1:], *a, **k))
        assert not bench.run(parse_engine("vanilla"), None, 0, 0).verified

    def test_poison_fills_the_whole_free_node(self):
        bench = Bench(small())
        bench.poison_node(1)
        node = bench.machine.mem.nodes[1]
        assert (bench.machine.frames.read(int(node.start_pfn), int(node.nr_pages)) == 0xAA).all()

    def test_every_run_leaves_the_machine_empty(self):
        with Session(small(engines="vanilla,batch,mt:2+stream", size="4M", orders="0,9", repeat=2)) as session:
            machine = session.bench.machine
            free = [machine.free_pages(nid) for nid in (0, 1)]
            for order in (0, 9):
                session.run_order(order)
                assert [machine.free_pages(nid) for nid in (0, 1)] == free
            machine.validate()
            assert machine.offload.migrator is None and not machine.processes

    def test_the_list_is_in_random_order_and_the_same_for_all_engines_of_a_round(self, monkeypatch):
        bench = Bench(small(size="4M"))
        lists, migrate_pages = [], bench.machine.migrate_pages
        monkeypatch.setattr(bench.machine, "migrate_pages",
                            lambda folios, *a, **k: (lists.append(np.argsort(np.argsort(folios))), migrate_pages(folios, *a, **k))[1])
        for round_nr in (0, 0, 1):
            assert bench.run(parse_engine("vanilla"), None, 4, round_nr).verified
        assert (lists[0] == lists[1]).all() and (lists[0] != lists[2]).any()
        assert (np.diff(lists[0]) != 1).mean() > 0.5


class TestMetadataAlone:
    def test_nowhere_nodes_give_ns_a_folio_and_no_throughput(self, tmp_path):
        path = tmp_path / "result.json"
        status, printed, _ = run_main("--nodes", "nowhere,nowhere", "--size", "64M", "--orders", "0,9", "--engines",
                                      "vanilla,batch", "--repeat", 2, "--json", path)
        result = json.loads(path.read_text())
        assert status == 0
        assert "ns per folio" in printed and "GB/s" not in printed and "metadata only" in printed
        assert result["limits"] == {"contiguous_copy_gbps": None, "scattered_copy_gbps": {}}
        last = [line.split() for line in printed.splitlines() if line.startswith("2M   ") or line.startswith("   2M ")][-1]
        assert last[-2:] == ["--", "places"], "no byte was copied, so none was verified"
        for row in result["rows"]:
            assert list(row) == [*ROW_KEYS, "ns_per_folio"]
            assert row["gbps"] is None and row["limit_gbps"] is None and row["verified"] is True
            assert row["ns_per_folio"]["mean"] > 0 and len(row["ns_per_folio"]["samples"]) == 2


BAD_INPUT = [
    "--size 5M", "--size 0", "--size x", "--size -1", "--size 1.5", "--size 900T", "--size " + "9" * 400 + "G",
    "--orders 0,10", "--orders -1", "--orders 2M", "--orders 0,,2", "--orders 0,0", "--orders ,",
    "--engines foo", "--engines mt:0", "--engines mt:65", "--engines cuda-batch", "--engines batch,batch", "--engines batch,",
    "--repeat 0", "--repeat x", "--warmup -1", "--batch-pages 0", "--batch-pages 99999999999999999999", "--mode patient",
    "--nodes host", "--nodes host,nowhere", "--nodes device,device", "--nodes host,host,host", "--seed -1",
    "--json /nonexistent/result.json", "--json /", "--unheard-of 1",
]


class TestBadInput:
    @pytest.mark.parametrize("options", BAD_INPUT, ids=lambda options: options[:40])
    def test_is_one_line_and_exit_status_2_before_any_work(self, monkeypatch, options):
        monkeypatch.setattr(bench_module, "run_bench", lambda *a, **k: pytest.fail("work began"))
        status, printed, complaint = run_main(*options.split())
        assert (status, printed) == (2, "")
        assert complaint.startswith("offload: ") and complaint.count("\n") == 1 and complaint.endswith("\n")

    def test_more_than_the_memory_that_is_available(self, monkeypatch):
        monkeypatch.setattr("offload.experiment.config.available_bytes", lambda: 100 << 20)
        with pytest.raises(InvalidInput, match=r"size 64M needs about .* GB is available; use a smaller --size"):
            BenchConfig.parse(size="64M", orders="0")

    @pytest.mark.parametrize("fields", [{"orders": ()}, {"engines": ()}, {"size": PAGE_SIZE + 1}, {"repeat": True},
                                        {"orders": (0, 9.0)}], ids=str)
    def test_from_python(self, fields):
        with pytest.raises(InvalidInput):
            BenchConfig(**{"size": SIZE, "orders": (0,), "engines": (parse_engine("batch"),)} | fields)


class TestInterrupted:
    def test_ctrl_c_is_130_and_writes_nothing(self, monkeypatch, tmp_path):
        runs, run = [], Bench.run

        def interrupted(*args, **options):
            runs.append(1)
            if len(runs) == 3:
                raise KeyboardInterrupt
            return run(*args, **options)

        monkeypatch.setattr(bench_module, "compile_once", lambda config: None)
        monkeypatch.setattr(Bench, "run", interrupted)
        status, printed, complaint = run_main("--size", "64K", "--orders", "0", "--engines", "vanilla,mt:2", "--json",
                                              tmp_path / "result.json")
        assert status == 130 and printed == "" and complaint.count("\n") == 1
        assert list(tmp_path.iterdir()) == [] and len(runs) == 3
