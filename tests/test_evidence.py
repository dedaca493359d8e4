"""Evidence of what ran on a GPU: that every committed file is what it says and of these kernels, that a broken one is found, and
that none is made without a GPU. The pieces that are judged here are made over the stub of the driver; none of them is written
into docs/evidence.
"""

import copy
import json
import pathlib
import subprocess

import pytest
from cuda_stub import Stub, needs_compiler

from offload.cli import main
from offload.errors import InvalidInput
from offload.experiment import alone
from offload.experiment import evidence as evidence_module
from offload.experiment.alone import AloneConfig
from offload.experiment.evidence import check_evidence, kernel_hashes, make_evidence, read_report, run_gpu_tests, stale_kernels
from offload.kernels import cuda
from offload.kernels.cuda import Probe

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
COMMITTED = sorted((DOCS / "evidence").glob("*")) if (DOCS / "evidence").is_dir() else []


def wrong_with(path, page):
    """What is wrong with a committed file; ``page`` is the text of docs/gpu.md, which may call one stale."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        return [f"it is no JSON: {error}"]
    problems = check_evidence(found)
    if problems:
        return problems
    said = any(path.name in line and "stale" in line for line in page.splitlines())
    stale = stale_kernels(found)
    if stale and not said:
        return [f"it is of other kernel sources ({', '.join(stale)}); run offload evidence again, or call {path.name} stale in docs/gpu.md"]
    if said and not stale:
        return [f"docs/gpu.md calls {path.name} stale, and it is not"]
    return []


class TestCommitted:
    """Every file under docs/evidence is evidence, of these very kernels or called stale in docs/gpu.md."""

    def test_each(self):
        page = (DOCS / "gpu.md").read_text("utf-8")
        assert {path.name: wrong_with(path, page) for path in COMMITTED} == {path.name: [] for path in COMMITTED}

    def test_the_page_knows_them(self):
        """docs/gpu.md names each file, and says that there is none where there is none."""
        page = " ".join((DOCS / "gpu.md").read_text("utf-8").split())
        for path in COMMITTED:
            assert path.name in page, f"docs/gpu.md does not say what {path.name} is"
        assert ("there is no evidence file under `docs/evidence/`" in page) == (not COMMITTED)

    @pytest.mark.skipif(COMMITTED != [], reason="the line has been edited")
    def test_the_block_to_copy_edits_it(self, tmp_path):
        """The page's own command puts a sentence that names the file in the place of those words, and touches nothing else."""
        page = (DOCS / "gpu.md").read_text("utf-8")
        command, = (line for line in page.splitlines() if line.startswith("sed -i "))
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "gpu.md").write_text(page, "utf-8")
        subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
        before, after = page.splitlines(), (tmp_path / "docs" / "gpu.md").read_text("utf-8").splitlines()
        assert "there is no evidence file under `docs/evidence/`" not in " ".join(after) and "h100.json" in after[2]
        assert before[:2] == after[:2] and before[5:] == after[3:] and before[5] == ""


REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest"><testcase classname="tests.gpu.a" name="test_one"/>
<testcase classname="tests.gpu.a" name="test_two"><skipped message="cuda-batch: the driver has CUDA 12.4, and so on">where</skipped></testcase>
{more}</testsuite></testsuites>"""


def report_part(tmp_path, more=""):
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(more=more))
    cases = read_report(path)
    return {"command": "python -m pytest", **{outcome: sum(case["outcome"] == outcome for case in cases) for outcome in ("passed", "failed", "skipped")},
            "cases": cases}


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    stub.stand_in(monkeypatch, Probe(None, "14.2.0", 13000, "stub, not a GPU", (9, 0), 5, True, "13.5"))
    return stub


@pytest.fixture
def made(stub, tmp_path, monkeypatch):
    """Evidence as a GPU would give it, but of the stub."""
    monkeypatch.setattr(evidence_module, "git_commit", lambda: "0123456789" * 4)
    monkeypatch.setattr(evidence_module, "installed", lambda names: {"numpy": "2.4.6", "cupy-cuda13x": "14.2.0"})
    stub.state.ns_copy, stub.state.ns_launch, stub.state.ps_byte = 1000, 5000, 100
    config = AloneConfig.parse(folios=20, size="64K", orders="0", engines="cuda-loop:1,cuda-batch,cuda-kernel", repeat=3, warmup=0,
                               migration=False)
    return make_evidence(config, run_tests=lambda: report_part(tmp_path))


@pytest.fixture
def good(made):
    """The same with another device's name: what a committed file looks like."""
    return json.loads(json.dumps(made).replace("stub, not a GPU", "Some GPU"))


@needs_compiler
class TestForm:
    """A good piece passes; each kind of damage is found."""

    def test_good(self, good, tmp_path):
        assert check_evidence(good) == [] and stale_kernels(good) == [] and good["verified"] is True
        path = tmp_path / "some.json"
        path.write_text(json.dumps(good))
        assert wrong_with(path, "") == []
        assert good["kernels"] == kernel_hashes() and "copy_folios.cu" in good["kernels"]
        assert (good["commit"], good["tree_clean"]) == ("0123456789" * 4, True)
        assert (good["tests"]["passed"], good["tests"]["failed"], good["tests"]["skipped"]) == (1, 0, 1)

    def test_of_the_stub_it_is_none(self, made):
        assert check_evidence(made) == ["device 'stub, not a GPU' is no GPU"]

    BREAKS = {
        "no format": lambda e: e.pop("format"), "another kind": lambda e: e.update(kind="x"), "no tests": lambda e: e.pop("tests"),
        "a date": lambda e: e.update(date="yesterday"), "a commit": lambda e: e.update(commit="abc"), "no commit": lambda e: e.update(commit=None),
        "a tree": lambda e: e.update(tree_clean=None), "a device": lambda e: e["device"].update(device=""),
        "no GPU": lambda e: e["device"].update(reason="there is none"), "a CUDA version": lambda e: e["device"].update(cuda=None),
        "no CuPy": lambda e: e["packages"].pop("cupy-cuda13x"), "no kernel": lambda e: e["kernels"].pop("copy_folios.cu"),
        "a hash": lambda e: e["kernels"].update({"copy_folios.cu": "0"}), "counts": lambda e: e["tests"].update(passed=2),
        "a failure without a reason": lambda e: e["tests"]["cases"][0].update(outcome="failed"),
        "a skip without a reason": lambda e: e["tests"]["cases"][1].update(reason=None),
        "no row": lambda e: e["bench"].update(rows=[]), "a row without a device": lambda e: [row.update(device=None) for row in e["bench"]["rows"]],
        "a row of another device": lambda e: e["bench"]["rows"][0].update(device="Other GPU"),
        "hardware left out": lambda e: e["bench"]["rows"][0].update(hardware=None),
        "a speed that is not the time's": lambda e: e["bench"]["rows"][0].update(gbps=e["bench"]["rows"][0]["gbps"] * 2),
        "a median that is not its samples'": lambda e: [e["bench"]["rows"][0]["end_to_end_ns"].update(median=1),
                                                       e["bench"]["rows"][0].update(gbps=float(e["bench"]["rows"][0]["bytes"]))],
        "a time of the device": lambda e: e["bench"]["rows"][0]["device_ns"].update(median=1),
        "a speed of the device": lambda e: e["bench"]["rows"][0].update(device_gbps=1e9),
        "a resident speed": lambda e: [row["resident"].update(device_gbps=1e9) for row in e["bench"]["rows"] if row["resident"]],
        "a ceiling": lambda e: e["bench"]["ceilings"]["device,device"].update(gbps=1e-3),
        "a share": lambda e: e["bench"]["rows"][0].update(device_share_of_ceiling=0.99),
        "a benchmark of another kernel": lambda e: e["bench"]["manifest"]["gpu"].update(kernel_sha256="0" * 64),
        "a migration": lambda e: e["bench"]["migrations"].append({"from": "device", "to": "device", "order": 0, "engine": "cuda-kernel", "verified": True,
                                                                  "gbps": {"mean": 2.0, "samples": [1.0]}}),
        "a time of nothing": lambda e: e["bench"]["rows"][0].update(end_to_end_ns={"median": 0, "samples": [0]}),
        "bytes": lambda e: e["bench"]["rows"][0].update(bytes=1), "no samples": lambda e: e["bench"]["rows"][0].pop("end_to_end_ns"),
        "a reason that is none": lambda e: e.update(why_not_verified=["x"]),
        "verified against its rows": lambda e: e["bench"]["rows"][0].update(verified=False), "not verified for nothing": lambda e: e.update(verified=False),
    }

    @pytest.mark.parametrize("name", list(BREAKS))
    def test_broken(self, good, tmp_path, name):
        broken = copy.deepcopy(good)
        self.BREAKS[name](broken)
        assert check_evidence(broken) and all("\n" not in line for line in check_evidence(broken))
        path = tmp_path / "broken.json"
        path.write_text(json.dumps(broken))
        assert wrong_with(path, "broken.json is stale") != []

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
    def test_no_evidence_at_all(self, tmp_path, text):
        path = tmp_path / "x.json"
        path.write_text(text)
        assert wrong_with(path, "")

    def test_stale(self, good, tmp_path):
        """Of another kernel source: refused, unless docs/gpu.md calls it stale; and only then."""
        path = tmp_path / "old.json"
        path.write_text(json.dumps(good))
        assert wrong_with(path, "| old.json | stale |") == ["docs/gpu.md calls old.json stale, and it is not"]
        good["kernels"]["copy_folios.cu"] = good["bench"]["manifest"]["gpu"]["kernel_sha256"] = "0" * 64
        path.write_text(json.dumps(good))
        assert stale_kernels(good) == ["copy_folios.cu"] and "of other kernel sources (copy_folios.cu)" in wrong_with(path, "")[0]
        assert wrong_with(path, "old.json is stale: the kernel has changed since") == []

    def test_a_kernel_that_has_come(self, good):
        del good["kernels"]["copy_folios.cu"]
        good["kernels"]["gone.cu"] = "0" * 64
        assert {"copy_folios.cu", "gone.cu"} <= set(stale_kernels(good))


@needs_compiler
class TestMaking:
    """What is written is what ran, and says if it was not right."""

    def test_a_failed_test(self, stub, tmp_path):
        failed = '<testcase classname="tests.gpu.a" name="test_three"><failure message="assert 0&#10;1 of 4096 bytes">trace</failure></testcase>'
        config = AloneConfig.parse(folios=4, size="64K", orders="0", engines="cuda-loop:1", repeat=1, warmup=0, migration=False)
        found = make_evidence(config, run_tests=lambda: report_part(tmp_path, failed))
        assert found["verified"] is False and found["tests"]["failed"] == 1
        assert found["tests"]["cases"][2] == {"name": "tests.gpu.a::test_three", "outcome": "failed", "reason": "assert 0 1 of 4096 bytes"}

    def test_a_byte_that_did_not_arrive(self, stub, tmp_path):
        config = AloneConfig.parse(folios=4, size="64K", orders="0", engines="cuda-loop:1", repeat=1, warmup=0, migration=False,
                                   nodes=("device,device",))
        stub.state.corrupt = 1
        assert make_evidence(config, run_tests=lambda: report_part(tmp_path))["verified"] is False

    def test_a_test_that_was_skipped(self, stub, tmp_path):
        """For another reason than those that are known: it proves less than it should, however many passed."""
        skipped = '<testcase classname="tests.gpu.a" name="test_three"><skipped message="cuda-kernel: no NVRTC">where</skipped></testcase>'
        config = AloneConfig.parse(folios=4, size="64K", orders="0", engines="cuda-loop:1", repeat=1, warmup=0, migration=False)
        found = make_evidence(config, run_tests=lambda: report_part(tmp_path, skipped))
        assert found["why_not_verified"] == ["skipped: tests.gpu.a::test_three: cuda-kernel: no NVRTC"] and found["verified"] is False

    def test_a_migration_that_was_not_measured(self, stub, tmp_path, monkeypatch):
        def refused(*args, **texts):
            raise InvalidInput("there is a reason")
        monkeypatch.setattr(alone.BenchConfig, "parse", refused)
        config = AloneConfig.parse(folios=4, size="64K", orders="0", engines="cuda-loop:1", repeat=1, warmup=0, nodes=("device,device",))
        found = make_evidence(config, run_tests=lambda: report_part(tmp_path))
        assert found["verified"] is False and found["why_not_verified"] == [
            f"not measured: the migration device,device of 4K with batch limit {limit}: there is a reason" for limit in (512, 262144)]

    def test_a_tree_that_is_not_clean(self, made, stub, tmp_path, monkeypatch):
        monkeypatch.setattr(evidence_module, "git_commit", lambda: "0123456789" * 4 + "-dirty")
        config = AloneConfig.parse(folios=4, size="64K", orders="0", engines="cuda-loop:1", repeat=1, warmup=0, migration=False)
        found = make_evidence(config, run_tests=lambda: report_part(tmp_path))
        assert (found["commit"], found["tree_clean"]) == ("0123456789" * 4, False)

    def test_the_command(self, stub, made, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(evidence_module, "make_evidence", lambda config, step: made)
        path = tmp_path / "x.json"
        assert main(["evidence", "-o", str(path), "--orders", "0"]) == 0
        assert json.loads(path.read_text()) == json.loads(json.dumps(made))
        assert capsys.readouterr().out == (f"{path}: stub, not a GPU, 1 tests passed, 0 failed, 1 skipped; verified\n"
                                           f"skipped, as may be: tests.gpu.a::test_two: cuda-batch: the driver has CUDA 12.4, and so on\n")
        made.update(verified=False, why_not_verified=["there is a reason"])
        assert main(["evidence", "-o", str(path)]) == 1
        assert capsys.readouterr().out.splitlines()[0].endswith("; NOT VERIFIED")
        assert main(["evidence", "-o", str(path)]) == 1 and "\nthere is a reason\n" in capsys.readouterr().out

    def test_in_its_place(self, stub, made, tmp_path, monkeypatch, capsys):
        """The folder is made, and what is left to do is said."""
        monkeypatch.setattr(evidence_module, "make_evidence", lambda config, step: made)
        monkeypatch.setattr(evidence_module, "ROOT", tmp_path)
        (tmp_path / "tests" / "gpu").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert main(["evidence", "-o", "docs/evidence/x.json", "--orders", "0"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("next: say in docs/gpu.md what x.json is") and "git commit" in last
        assert json.loads((tmp_path / "docs" / "evidence" / "x.json").read_text())["verified"] is True

    def test_without_pytest(self, stub, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(evidence_module.importlib.util, "find_spec", lambda name: None)
        assert main(["evidence", "-o", str(tmp_path / "x.json")]) == 2
        err = capsys.readouterr().err
        assert "pytest is not installed" in err and "pip install -e '.[test]'" in err and err.count("\n") == 1

    def test_nothing_is_written_by_halves(self, stub, tmp_path, monkeypatch):
        """An error in the middle leaves the folder, and an older file, as they were."""
        def fails(config, step):
            raise InvalidInput("in the middle")
        monkeypatch.setattr(evidence_module, "make_evidence", fails)
        path = tmp_path / "x.json"
        path.write_text("older")
        assert main(["evidence", "-o", str(path)]) == 2
        assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("output", ["-", "/nonexistent/x.json"])
    def test_a_place_that_is_none(self, stub, output, capsys):
        assert main(["evidence", "-o", output]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"offload: -o '{output}'") and err.count("\n") == 1

    def test_without_a_checkout(self, stub, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(evidence_module, "ROOT", tmp_path)
        assert main(["evidence", "-o", str(tmp_path / "x.json")]) == 2
        assert "run this from a checkout" in capsys.readouterr().err


class TestWithoutAGpu:
    """One line, status 2, and nothing is written or run."""

    def test_it(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(cuda, "probe", lambda: Probe("there is a reason"))
        monkeypatch.setattr(evidence_module, "run_gpu_tests", lambda: 1 / 0)
        assert main(["evidence", "-o", str(tmp_path / "x.json")]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", "offload: there is no evidence without a GPU: there is a reason\n") and not list(tmp_path.iterdir())


class TestTheTests:
    """The test list for a GPU is run as a process; here it skips, and says why."""

    def test_run(self, capsys):
        if cuda.probe().reason is None:
            pytest.skip("there is a GPU: this would run its tests")
        found = run_gpu_tests()
        assert found["passed"] == found["failed"] == 0 and found["skipped"] == len(found["cases"]) > 50
        assert all(case["reason"].startswith("needs a GPU: ") for case in found["cases"])

    def test_a_pytest_that_does_not_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(evidence_module, "ROOT", tmp_path)
        tmp_path.joinpath("pytest.py").write_text("raise SystemExit('not today')")
        with pytest.raises(InvalidInput, match="pytest did not run .not today"):
            run_gpu_tests()
