"""Every scenario file under tests/scenarios is one case, by name; and ``offload run`` as a command.

A file that needs what this version leaves out is expected to raise NotSupported. Which ones these are, and why, is
computed from the files when they are collected; nothing is listed here, so when a feature comes its files are judged like
all others.
"""

import json
import pathlib

import pytest

from offload.cli import main
from offload.errors import NotSupported
from offload.scenario import check_supported, run_file, run_scenario
from offload.scenario_format import load

SCENARIOS = pathlib.Path(__file__).parent / "scenarios"
FILES = sorted(SCENARIOS.glob("*/*.json"))


def left_out(path):
    """The feature that a file needs and this version lacks, or None."""
    try:
        check_supported(load(path))
    except NotSupported as error:
        return str(error).split(":", 2)[0] + ":" + str(error).split(":", 2)[1].split(" is not supported")[0]
    return None


def cases():
    for path in FILES:
        reason = left_out(path)
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, raises=NotSupported, reason=reason)]
        yield pytest.param(path, id=load(path)["name"], marks=marks)


class TestScenarios:
    """Every file gives what it expects."""

    @pytest.mark.parametrize("path", list(cases()))
    def test_file(self, path):
        scenario = load(path)
        check_supported(scenario)
        outcome = run_file(str(path))
        assert outcome.status == "passed", "\n".join(outcome.lines())

    def test_names_are_unique(self):
        names = [load(path)["name"] for path in FILES]
        assert len(names) == len(set(names))

    def test_own_files_expect_something(self):
        for path in SCENARIOS.glob("own/*.json"):
            assert all(load(path)["expect"]), path.name


def write(path, **changes):
    path.write_text(json.dumps({"format": 1, "name": "t/x", "folios": [{"name": "f"}],
                                "calls": [{"op": "migrate_pages"}], **changes}))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "passed": write(tmp_path / "passed.json", expect=[{"rc": 0, "left": []}]),
        "ran": write(tmp_path / "ran.json"),
        "differs": write(tmp_path / "differs.json", expect=[{"rc": 1, "left": ["f"], "folios": {"f": {"node": 0}}}]),
        "not supported": write(tmp_path / "hugetlb.json", folios=[{"name": "f", "kind": "hugetlb", "order": 10}]),
        "wrong": write(tmp_path / "wrong.json", folios=[{"name": "f", "ordre": 3}]),
        "hangs": write(tmp_path / "hangs.json", folios=[{"name": "f", "locked": "forever"}],
                       calls=[{"op": "migrate_pages", "mode": "MIGRATE_SYNC"}]),
    }


class TestCommand:
    """offload run FILE...: a line per file, every difference, and the worst status."""

    @pytest.mark.parametrize("file, status", [("passed", 0), ("ran", 0), ("differs", 1), ("not supported", 2), ("wrong", 2),
                                              ("hangs", 2)])
    def test_exit_status(self, files, file, status, capsys):
        assert main(["run", files[file]]) == status
        captured = capsys.readouterr()
        assert files[file] in captured.out + captured.err

    @pytest.mark.parametrize("key, mode", [("locked", "MIGRATE_SYNC"), ("locked", "MIGRATE_SYNC_LIGHT"), ("writeback", "MIGRATE_SYNC")])
    def test_a_wait_without_end_is_told_in_the_words_of_the_file(self, tmp_path, capsys, key, mode):
        path = write(tmp_path / "x.json", folios=[{"name": "z"}, {"name": "a", "kind": "file", key: "forever"}],
                     calls=[{"op": "migrate_pages", "mode": mode}])
        assert main(["run", path]) == 2
        assert capsys.readouterr().err == (
            f'{path}: folios[1].{key}: "forever": {mode} would sleep on folio a for ever, as the kernel would; write '
            f'"until_wait", or call with MIGRATE_ASYNC\n')
        assert main(["run", write(tmp_path / "y.json", folios=[{"name": "a", "kind": "file", key: "forever"}])]) == 0

    def test_every_file_is_run_and_the_largest_status_wins(self, files, capsys):
        assert main(["run", files["wrong"], files["differs"], files["passed"]]) == 2
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [
            f"{files['differs']}: differs, 3 fields", "  expect[0].rc: expected 1, got 0",
            '  expect[0].left: expected ["f"], got []', "  expect[0].folios.f.node: expected 0, got 1",
            f"{files['passed']}: passed", "1 wrong, 1 differs, 1 passed"]
        assert captured.err == f"{files['wrong']}: folios[0].ordre: there is no such field here; did you mean order?\n"
        assert main(["run", files["differs"], files["passed"]]) == 1

    def test_json_of_one_is_an_object_and_of_several_an_array(self, files, capsys, tmp_path):
        assert main(["run", files["ran"], "--json", "-"]) == 0
        one = json.loads(capsys.readouterr().out)
        assert one["status"] == "ran" and one["results"][0]["rc"] == 0
        assert set(one["results"][0]) == {"rc", "left", "stats", "targets", "nr_isolated", "tlb_flushes", "copies", "vmstat",
                                          "trace", "folios", "data_ok"}
        assert main(["run", files["ran"], files["wrong"], "--json", str(tmp_path / "out.json")]) == 2
        assert [each["status"] for each in json.loads((tmp_path / "out.json").read_text())] == ["ran", "wrong"]

    def test_json_that_cannot_be_written(self, files, capsys):
        assert main(["run", files["ran"], "--json", "/nowhere/out.json"]) == 2
        assert "cannot be written" in capsys.readouterr().err

    def test_no_file_is_a_usage_error(self, capsys):
        assert main(["run"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_trace_tells_what_happened_to_each_folio(self, tmp_path, capsys):
        path = write(tmp_path / "t.json", folios=[{"name": "a"}, {"name": "b", "extra_refs": 1}, {"name": "c", "pinned": True}])
        assert main(["run", path, "--trace"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "mm_migrate_pages_start: mode=MIGRATE_ASYNC reason=compaction"
        assert any(line.startswith("  a: moved: entries point to pfn") for line in lines)
        assert "  b: move: -EAGAIN, refcount 2, expected 1; stays unmapped" in lines
        assert "  c: not unmapped: -EAGAIN, it may be pinned; restored" in lines
        assert "  left: b c" in lines      # b is undone in its batch; c never left the batch list, and follows
        assert lines[-2].startswith("mm_migrate_pages: nr_succeeded=1 nr_failed=2")


class TestData:
    """data_ok is judged by bytes, not by counters."""

    def test_a_migrator_that_lies_is_found_out(self, monkeypatch):
        from offload import scenario_machine
        from offload.migrators.mc_copy import McCopy

        class Liar(McCopy):
            def offload_copy(self, batch, done):
                done[:] = 1
                return 0
        scenario = {"format": 1, "name": "t/x", "offload": {"migrator": "mc_copy"}, "folios": [{"name": "f", "count": 3}],
                    "calls": [{"op": "migrate_pages"}]}
        assert run_scenario(scenario)[0]["data_ok"] is True
        monkeypatch.setitem(scenario_machine.MIGRATORS, "mc_copy", (Liar, ("kernel",)))
        assert run_scenario(scenario)[0]["data_ok"] is False

    def test_a_second_call_gets_what_the_first_left(self):
        first, second = run_scenario({
            "format": 1, "name": "t/x", "folios": [{"name": "a"}, {"name": "b", "locked": "until_wait"}],
            "calls": [{"op": "migrate_pages"}, {"op": "migrate_pages", "mode": "MIGRATE_SYNC"}]})
        assert (first["rc"], first["left"]) == (1, ["b"])
        assert (second["rc"], second["left"], second["stats"]["nr_succeeded"]) == (0, [], 1)


class TestMaps:
    """``maps`` of a folio are page-table mappings, whatever its kind."""

    def test_maps(self):
        (result,) = run_scenario({
            "format": 1, "name": "t/x", "calls": [{"op": "migrate_pages"}],
            "folios": [{"name": "a", "maps": 3}, {"name": "f", "kind": "file", "maps": 3},
                       {"name": "s", "kind": "shmem", "order": 2, "maps": 2}, {"name": "h", "kind": "hugetlb", "maps": 2}]})
        assert {name: facts["mapcount"] for name, facts in result["folios"].items()} == {"a": 3, "f": 3, "s": 8, "h": 2}
        assert result["data_ok"] and {facts["node"] for facts in result["folios"].values()} == {1}


class TestPage:
    """The worked examples of docs/scenarios.md come out as they say."""

    def test_examples(self, tmp_path):
        page = (pathlib.Path(__file__).parent.parent / "docs" / "scenarios.md").read_text()
        examples = [part.split("```")[0] for part in page.split("```json\n")[1:]]
        assert len(examples) == 3
        for example in examples:
            path = tmp_path / "example.json"
            path.write_text(example)
            outcome = run_file(str(path))
            assert outcome.status == "passed", "\n".join(outcome.lines())
