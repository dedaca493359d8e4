"""Which engines are taken where none is named, and what is said of those left out: the stub of the driver in a device's place."""

import json

import pytest
from cuda_stub import HERE, Stub, needs_compiler

from offload import calibration
from offload.calibration import Calibration
from offload.cli import main
from offload.engines import CPU_DEFAULTS, GPU_DEFAULTS, check_device, default_engine, default_engines, parse_engine
from offload.errors import EngineUnavailable, InvalidInput
from offload.experiment import bench
from offload.experiment.alone import AloneConfig
from offload.experiment.bench import run_bench
from offload.experiment.config import BenchConfig
from offload.experiment.manifest import what_ran
from offload.experiment.tables import bench_tables
from offload.kernels import cuda
from offload.kernels.cuda import Probe
from offload.kernels.cuda_engines import CudaBackend

pytestmark = needs_compiler

FOLIO_BY_FOLIO = ("vanilla", "batch")
NOT_TO_THE_DEVICE = "vanilla+stream, batch+stream, mt:2, mt:2+stream (the CPU does not reach device memory)"
PAIRS = [(a, b) for a in ("host", "pinned", "device") for b in ("host", "pinned", "device")]


@pytest.fixture
def stub(monkeypatch):
    """The stub in the place of a device, and times for ``auto`` that nobody has measured."""
    stub = Stub()
    device = stub.stand_in(monkeypatch)
    stub.calibration = Calibration(device, {name: lambda way=name.partition(":")[0]: CudaBackend(device, way, check=False)
                                            for name in GPU_DEFAULTS[:-1]}, "/nonexistent/auto.json", {}, say=stub.lines.append)
    cells = [{"order": 0, "folios": 1, "ns": {"cuda-loop:1": 2, "cuda-batch": 3, "cuda-kernel": 1}}]
    stub.calibration._directions = {",".join(pair): cells for pair in PAIRS if "host" not in pair}
    monkeypatch.setattr(calibration, "open_calibration", lambda: stub.calibration)
    return stub


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "probe", lambda: Probe("there is a reason"))


class TestTheList:
    """Of a benchmark: those that copy between the nodes and are here, and a line about the others."""

    @pytest.mark.parametrize("nodes, names, line", [
        ("host,host", CPU_DEFAULTS, None), ("host,pinned", CPU_DEFAULTS, None), ("nowhere,nowhere", CPU_DEFAULTS, None),
        ("pinned,pinned", CPU_DEFAULTS + GPU_DEFAULTS, None),
        ("pinned,device", FOLIO_BY_FOLIO + GPU_DEFAULTS, f"left out: {NOT_TO_THE_DEVICE}"),
        ("device,device", FOLIO_BY_FOLIO + GPU_DEFAULTS, f"left out: {NOT_TO_THE_DEVICE}"),
        ("device,host", (*FOLIO_BY_FOLIO, "cuda-loop:1"),
         f"left out: {NOT_TO_THE_DEVICE}; cuda-batch, cuda-kernel (host memory that is not pinned is out of its reach)")])
    def test_with_a_gpu(self, stub, nodes, names, line):
        assert default_engines(tuple(nodes.split(","))) == (names, line)

    def test_what_this_driver_has_not(self, stub, monkeypatch):
        monkeypatch.setattr(cuda, "probe", lambda: HERE._replace(batch_call=False, driver=12020))
        names, line = default_engines(("pinned", "pinned"))
        assert names == CPU_DEFAULTS + ("cuda-loop:1", "cuda-kernel", "auto")
        assert line.startswith("left out: cuda-batch (the driver has CUDA 12.2")

    @pytest.mark.parametrize("nodes", ["host,host", "nowhere,nowhere"])
    def test_without_a_gpu(self, no_gpu, nodes):
        assert default_engines(tuple(nodes.split(","))) == (CPU_DEFAULTS, None)

    @pytest.mark.parametrize("nodes", [pair for pair in PAIRS], ids=",".join)
    def test_each_of_them_serves(self, stub, nodes):
        for name in default_engines(nodes)[0]:
            parse_engine(name, nodes).check_nodes(nodes)


class TestBench:
    @pytest.mark.parametrize("nodes", ["device,device", "pinned,pinned", "host,device"])
    def test_it_runs(self, stub, capsys, tmp_path, nodes):
        path = tmp_path / "result.json"
        assert main(["bench", "--size", "64K", "--orders", "0", "--repeat", "1", "--warmup", "0", "--nodes", nodes, "--json", str(path)]) == 0
        out, result = capsys.readouterr().out, json.loads(path.read_text())
        names, line = default_engines(tuple(nodes.split(",")))
        assert [row["engine"] for row in result["rows"]] == list(names) and all(row["verified"] for row in result["rows"])
        assert (line in result["manifest"]["notes"] and f"\n{line}\n" in out) if line else "left out" not in out
        assert f"--engines {','.join(names)} " in result["manifest"]["command"]

    def test_an_engine_that_is_named_is_still_refused(self, stub, capsys):
        assert main(["bench", "--size", "64K", "--orders", "0", "--nodes", "pinned,device", "--engines", "batch+stream"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "engine 'batch+stream' does not copy with nodes pinned,device" in err

    @pytest.mark.parametrize("wrong", [{"size": "1T"}, {"repeat": 0}, {"protocol": "v9"}, {"size": "5M"}, {"nodes": "moon,device"}])
    @pytest.mark.parametrize("engines", [None, "auto"])
    def test_auto_measures_nothing_for_what_is_refused(self, stub, engines, wrong):
        stub.calibration._directions.clear()
        with pytest.raises(InvalidInput):
            BenchConfig.parse(**{"engines": engines, "nodes": "device,device", "size": "2M", "orders": "9"} | wrong)
        assert (stub.state.bytes, stub.state.allocs, stub.lines) == (0, 0, [])


class TestMigrate:
    """Of a single migration: batch+stream, and where it does not reach, auto, which says so."""

    @pytest.mark.parametrize("nodes", [pair for pair in PAIRS if "device" not in pair], ids=",".join)
    def test_on_the_cpu(self, stub, nodes):
        assert default_engine(nodes) == parse_engine("batch+stream")

    @pytest.mark.parametrize("nodes", [pair for pair in PAIRS if "device" in pair], ids=",".join)
    def test_with_device_memory(self, stub, nodes):
        engine = default_engine(nodes)
        engine.check_nodes(nodes)
        assert engine.name == "auto" and engine.on_gpu
        assert engine.note.startswith("no engine was named, and batch+stream is left out (the CPU does not reach device memory); auto is ")

    @pytest.mark.parametrize("nodes", ["device,device", "host,device"])
    def test_the_command(self, stub, capsys, tmp_path, nodes):
        from test_device_frames import snapshot_of

        from offload.workload import snapshot as snap
        snap.save(snapshot_of(16), tmp_path / "x")
        assert main(["migrate", str(tmp_path / "x"), "--nodes", nodes]) == 0
        out = capsys.readouterr().out
        assert "\nengine auto: migrator " in out and "\nno engine was named, and batch+stream is left out (" in out and "verified  checksums" in out

    def test_an_engine_that_is_named_is_still_refused(self, stub, capsys):
        assert main(["migrate", "--pid", "self", "--nodes", "device,device", "--engine", "batch+stream"]) == 2
        assert "engine 'batch+stream' does not copy with nodes device,device" in capsys.readouterr().err


class TestAutoBetweenHostAndDevice:
    """One engine of the GPU copies whole batches there; nothing is measured."""

    @pytest.mark.parametrize("nodes", [("host", "device"), ("device", "host")], ids=",".join)
    def test_it(self, stub, nodes):
        stub.calibration._directions.clear()
        engine = parse_engine("auto", nodes)
        engine.check_nodes(nodes)
        assert (engine.name, engine.migrator, engine.copy_kernel, engine.threads) == ("auto", "dcbm", "cuda-loop", 1)
        assert engine.note == f"auto is cuda-loop:1; no other engine copies a whole batch with nodes {','.join(nodes)}"
        assert stub.state.bytes == 0 and stub.lines == []

    def test_alone(self, stub):
        assert AloneConfig.parse(folios=4, orders="0", engines="auto", nodes=("host,device",)).engines == ("auto",)

    def test_what_the_refusal_advises_would_work(self, stub):
        """To take cuda-loop:N, not an engine of the CPU that would be refused as well."""
        with pytest.raises(InvalidInput, match="use cuda-loop:N, or vanilla and batch, which copy there"):
            parse_engine("cuda-kernel").check_nodes(("host", "device"))


class TestAlone:
    def test_what_is_not_here_is_said(self, stub, monkeypatch):
        monkeypatch.setattr(cuda, "probe", lambda: HERE._replace(no_kernel="NVRTC is not there"))
        config = AloneConfig.parse(folios=4, orders="0")
        assert config.engines == ("batch", "batch+stream", "cuda-loop:1", "cuda-batch", "auto")
        assert config.notes[0].startswith("left out: cuda-kernel (NVRTC is not there)")


class TestWhatIsRefused:
    """With the reason that is true of this engine."""

    @pytest.mark.parametrize("name, why", [("cuda-loop:2", "the CPU's own copy of host memory"), ("cuda-kernel", "is out of its reach")])
    def test_without_the_device(self, stub, name, why):
        with pytest.raises(InvalidInput, match=why):
            BenchConfig.parse(engines=name, nodes="host,pinned", size="2M", orders="0")


class TestCheckDevice:
    """Nodes that a GPU has to have are looked for before anything else, and the message names them."""

    def test_without_a_gpu(self, no_gpu):
        check_device(("host", "nowhere"), 1 << 60, "x")
        with pytest.raises(EngineUnavailable, match="nodes pinned,device cannot be had: .*there is a reason; or use --nodes host,host"):
            check_device(("pinned", "device"), 0, "a node")

    @pytest.mark.parametrize("call", [lambda: BenchConfig.parse(nodes="device,device", size="64M", engines="vanilla"),
                                      lambda: AloneConfig.parse(folios=10_000, orders="9", size="64M", nodes=("device,device",), engines="cuda-loop:1")])
    def test_more_than_there_is(self, stub, call):
        stub.have_bytes(32 << 20)
        with pytest.raises(InvalidInput, match="64M: that takes .* of the memory of stub, not a GPU, and 32 MiB is free; use a smaller --size, or"):
            call()
        assert stub.state.allocs == 0

    def test_a_lost_device(self, stub):
        stub.state.lost = 1
        with pytest.raises(EngineUnavailable, match="nodes device,device cannot be had: "):
            check_device(("device", "device"), 0, "a node")


class TestWhatRan:
    """A row names a call and a device only where they took part."""

    def test_auto_that_took_the_cpu(self, stub):
        engine = parse_engine("auto", ("pinned", "pinned"))
        ran = what_ran(engine, ("pinned", "pinned"), picked="batch+stream")
        assert ran == {"call": "CPU, stream, 1 thread", "flags": "", "hardware": "CPU", "device": None, "cuda": None, "driver": None}
        assert what_ran(engine, ("pinned", "pinned"), picked="cuda-kernel")["device"] == "stub, not a GPU"

    @pytest.mark.parametrize("name", ["vanilla", "mt:2", "cuda-loop:1", "cuda-kernel"])
    def test_without_bytes(self, stub, name):
        ran = what_ran(parse_engine(name), ("nowhere", "nowhere"))
        assert (ran["call"], ran["hardware"], ran["device"]) == ("none, there are no bytes", "none", None)

    def test_the_tables_claim_what_was_verified(self, stub):
        """With device memory checksums, and no np.copyto."""
        for nodes, claim, copied in (("device,device", "verified: a checksum of 64 bits of every page", "copy"),
                                     ("pinned,pinned", "verified: every byte through the page table", "np.copyto")):
            result = run_bench(BenchConfig.parse(size="64K", orders="0", engines="vanilla", repeat=1, warmup=0, nodes=nodes))
            lines = [part for part in bench_tables(result) if isinstance(part, str)]
            assert lines[-1].startswith(f"\n{claim}") and [line for line in lines if line.startswith(f"{copied} of one contiguous block: ")]
            assert "stub, not a GPU, CUDA 13.0, driver" in lines[2]

    def test_what_is_compiled_is_what_runs(self, stub, monkeypatch):
        """The nodes of the tiny runs in front are those of the benchmark, also for engines of the CPU."""
        seen = []
        monkeypatch.setattr(bench, "Session", lambda config: seen.append(config.nodes) or 1 / 0)
        for nodes in ("device,device", "host,host"):
            with pytest.raises(ZeroDivisionError):
                bench.compile_once(BenchConfig.parse(size="2M", orders="0", engines="vanilla", nodes=nodes))
        assert seen == [("device", "device"), ("host", "host")]
