"""``offload run --protocol`` and ``--trace``: where v4 loses a write and v6 does not can be read off."""

import contextlib
import io
import json
import pathlib
import re
import shlex

import pytest

from offload.cli import main
from offload.scenario import run_scenario
from offload.units import PROTOCOLS
from test_protocols import LATE, ROWS, b

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "protocols.md").read_text()
RULES = pathlib.Path(__file__).parent / "scenarios" / "rules"
ONE_RETRY = str(RULES / "offload-early-ref-writes-one-retry-v4.json")
NO_RETRY = str(RULES / "offload-early-ref-writes-no-retry-v4.json")
KEPT_OUT = "KEPT OUT of the batch copy: a reference is unexplained"


def traced(protocol, folios, mode="MIGRATE_ASYNC", **offload):
    """(lines of the trace, result) of one call."""
    scenario = {"format": 1, "name": "t/x", "folios": folios, "calls": [{"op": "migrate_pages", "mode": mode}]}
    if protocol != "off":
        scenario["offload"] = {"protocol": protocol, "migrator": "mc_copy"} | offload
    lines = []
    result, = run_scenario(scenario, lines)
    return lines, result


def of(lines, name):
    """What the trace tells of one folio."""
    return [line.split(": ", 1)[1] for line in lines if line.startswith(f"  {name}: ")]


def in_order(parts, lines):
    """Whether lines with these parts come in this order."""
    rest = iter(lines)
    return all(any(part in line for line in rest) for part in parts)


class TestTrace:
    """The lines of --trace tell the cause, and none is false."""

    EARLY = b(extra_refs=1, extra_refs_gone_after=1, extra_refs_write=True)

    def test_v4_skips_a_stale_copy_again(self):
        lines, _ = traced("v4", self.EARLY)
        assert in_order(["joins the batch copy: v4 does not look at the refcount", "its holder WRITES into the source, pfn",
                         "move, pass 1: refcount 2, expected 1",
                         "move: -EAGAIN, refcount 2, expected 1; stays unmapped; another pass is told again that the batch is "
                         "copied, and SKIPS the copy", "its holder DROPS 1 reference: refcount 1, expected 1",
                         "move, pass 2: refcount 1, expected 1",
                         "copy SKIPPED: move_to_new_folio() says so of the whole batch list (bit 2 of dst->private)",
                         "moved: entries point to", "WRITE LOST: its bytes are not the last written"], of(lines, "b"))
        assert not any("MADE" in line for line in lines)

    def test_v6_keeps_it_out_of_the_batch(self):
        lines, _ = traced("v6", self.EARLY)
        assert in_order([KEPT_OUT, "its holder WRITES", "-EAGAIN, refcount 2, expected 1", "DROPS 1 reference", "copy MADE now",
                         "moved"], of(lines, "b"))
        assert any("copy SKIPPED: the batch copy has marked this dst (bit 2 of dst->migrate_info)" in line
                   for line in of(lines, "a"))
        assert not any("LOST" in line or "SKIP" in line for line in of(lines, "b"))

    def test_v6_copies_afresh_after_a_late_reference(self):
        lines, _ = traced("v6", b(extra_refs_gone_after=1, extra_refs_write=True, **LATE))
        assert in_order(["joins the batch copy", "its holder TAKES 1 reference: refcount 2", "WRITES",
                         "its mark is gone, another pass COPIES AFRESH", "DROPS", "copy MADE now"], of(lines, "b"))

    def test_a_reference_dropped_before_the_first_move_is_told_before_it(self):
        lines, _ = traced("v4", b(extra_refs=1, extra_refs_gone_after=0, extra_refs_write=True))
        assert in_order(["its holder DROPS 1 reference: refcount 1, expected 1", "move, pass 1: refcount 1, expected 1",
                         "SKIPPED", "WRITE LOST"], of(lines, "b"))

    @pytest.mark.parametrize("protocol, mark", [("v4", "bit 2 of dst->private"), ("flags", "a bit of migrate_flags"),
                                                ("v5", "bit 2 of dst->migrate_info"), ("v6", "bit 2 of dst->migrate_info")])
    def test_where_the_mark_lives(self, protocol, mark):
        lines, _ = traced(protocol, b())
        assert all(any("copy SKIPPED" in line and f"({mark})" in line for line in of(lines, name)) for name in "abcd")

    @pytest.mark.parametrize("protocol", ["off", *PROTOCOLS])
    @pytest.mark.parametrize("row", ROWS)
    def test_counters_and_bytes_are_those_of_the_result(self, protocol, row):
        """Copies told add up to the copies counted, and WRITE LOST is told of the folios of which the result says it."""
        folios, options, *_ = ROWS[row]
        lines, result = traced(protocol, folios, **options)
        made = sum("copy MADE now" in line for line in lines)
        batched = sum(int(re.search(r"(\d+) of \d+ folios? copied", line)[1]) for line in lines if " copied" in line and "batch copy by" in line)
        assert (made, batched) == (result["copies"]["folios"] - result["copies"]["batched"], result["copies"]["batched"])
        assert sum(": moved: " in line for line in lines) == result["stats"]["nr_succeeded"]
        wrong = [name for name, facts in result["folios"].items() if not facts["data_ok"]]
        assert [name for name in "abcd" if any("WRITE LOST" in line for line in of(lines, name))] == wrong
        assert (wrong == []) == result["data_ok"]
        for name, facts in result["folios"].items():
            assert any("; joins the batch copy" in line for line in of(lines, name)) == facts["joined"]
        for key, total in result["copies"].items():
            assert sum(facts["copies"][key] for facts in result["folios"].values()) == total

    def test_no_offload(self):
        lines, _ = traced("off", b())
        assert "  batch: no batch copy: no migrator is registered" in lines
        assert not any("joins" in line or "SKIPPED" in line for line in lines)

    def test_a_reason_that_is_not_offloaded(self):
        lines, _ = traced("v6", b(), reasons=["demotion"])
        assert "  batch: no batch copy: not for this reason" in lines

    def test_a_source_that_cannot_be_read(self):
        lines, _ = traced("v6", b(copy_error=True))
        assert of(lines, "b")[-1] == "move: reading the source meets an uncorrectable memory error: -EHWPOISON; back to the " \
                                     "source, the destination is freed"

    def test_a_callback_that_refuses(self):
        folios = [{"name": "f", "kind": "file", "callback": ["EAGAIN", "EBUSY"]}, {"name": "m", "kind": "movable_ops"}]
        lines, _ = traced("v6", folios)
        assert in_order(["move: -EAGAIN, said by the mapping's callback; stays unmapped"], of(lines, "f"))
        assert of(lines, "f")[-1].startswith("move: not to be tried again")
        assert any("kept out of the batch copy: a movable_ops page" in line for line in of(lines, "m"))

    @pytest.mark.parametrize("mode", ["MIGRATE_ASYNC", "MIGRATE_SYNC"])
    def test_no_destination(self, mode):
        lines, result = traced("v6", b(alloc="fail"), mode=mode)
        assert of(lines, "b")[-1] == "not unmapped: -ENOMEM, no destination" and result["rc"] == -12

    def test_unmapped_folios_have_no_entries(self):
        lines, _ = traced("off", [{"name": "f", "kind": "file", "maps": 0}])
        assert not any("migration entries" in line or "entries point" in line for line in of(lines, "f"))


class TestSideBySide:
    """offload run --protocol v4,v6 FILE: a column each, and only the file's own protocol is judged."""

    def test_table(self, capsys):
        assert main(["run", "--protocol", "v4,v6", ONE_RETRY]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"{ONE_RETRY}: passed; b: WRITE LOST, as expected"
        assert out[1] == f"{ONE_RETRY}: ran under v6, not judged: what it expects is for v4"
        cells = [re.split(r"  +", line.strip()) for line in out[2:]]
        assert ["v4", "v6"] in cells and ["a c d", "moved", "moved"] in cells
        at = cells.index(["b", "moved", "moved"])
        assert cells[at + 1:at + 5] == [["copied in the batch", "not in the batch"],
                                        ["copy skipped in the move", "copied in the move"], ["WRITE LOST", "bytes kept"],
                                        ["rc", "0", "0"]]
        assert ["copies.batched", "4", "3"] in cells and ["data_ok", "FALSE", "true"] in cells
        assert out[-1] == "1 passed, 1 ran"

    def test_its_own_protocol_is_judged(self, tmp_path, capsys):
        scenario = json.loads(pathlib.Path(ONE_RETRY).read_text())
        scenario["expect"][0]["data_ok"] = True
        path = tmp_path / "x.json"
        path.write_text(json.dumps(scenario))
        assert main(["run", "--protocol", "v6", str(path)]) == 0
        assert main(["run", "--protocol", "v6,v4", str(path)]) == 1
        assert "  expect[0].data_ok: expected true, got false (b: WRITE LOST)" in capsys.readouterr().out.splitlines()
        assert main(["run", str(path)]) == 1

    def test_json_names_protocol_and_folio(self, capsys):
        assert main(["run", "--protocol", "v4,v6", ONE_RETRY, "--json", "-"]) == 0
        v4, v6 = json.loads(capsys.readouterr().out)
        assert [(one["protocol"], one["status"]) for one in (v4, v6)] == [("v4", "passed"), ("v6", "ran")]
        facts = [one["results"][0]["folios"]["b"] for one in (v4, v6)]
        assert [(one["data_ok"], one["written"], one["joined"]) for one in facts] == [(False, True, True), (True, True, False)]
        assert [one["copies"] for one in facts] == [{"folios": 1, "batched": 1, "discarded": 0},
                                                    {"folios": 1, "batched": 0, "discarded": 0}]

    def test_a_file_without_offload_runs_once_and_is_judged(self, capsys):
        assert main(["run", "--protocol", "v4,v6", str(RULES / "small-plain-async.json")]) == 0
        out = capsys.readouterr().out
        assert "small-plain-async.json: passed" in out and "no offload" in out

    def test_processes(self, tmp_path, capsys):
        path = tmp_path / "x.json"
        path.write_text(json.dumps({
            "format": 1, "name": "t/x", "offload": {}, "processes": [{"name": "p", "vmas": [{"name": "a", "pages": 2}]}],
            "calls": [{"op": "move_pages", "caller": "p", "pages": ["p:a+0..1"], "nodes": 1, "flags": ["MOVE"]}] * 2}))
        assert main(["run", "--protocol", "v5,v6", str(path)]) == 0
        out = capsys.readouterr().out
        assert re.search(r"status +1 1 +1 1", out) and "t/x, calls[1]" in out

    def test_wrong_protocol_and_wrong_file(self, capsys):
        assert main(["run", "--protocol", "v4,v7", ONE_RETRY]) == 2
        assert capsys.readouterr().err == "offload: protocol 'v7' is not known; use one of: v6, v5, flags, v4\n"
        assert main(["run", "--protocol", "v4,v6", "nowhere.json"]) == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("nowhere")]) == 1

    def test_folios_that_fared_alike_share_a_row(self, tmp_path, capsys):
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"format": 1, "name": "t/x", "offload": {}, "folios": [{"name": "f", "count": 40}],
                                    "calls": [{"op": "migrate_pages"}, {"op": "migrate_pages"}]}))
        assert main(["run", "--protocol", "v6", str(path)]) == 0
        out = capsys.readouterr().out
        assert "f[0] f[1] f[2] f[3] f[4] f[5] and 34 more" in out and out.count("moved") == 1


class TestWrongData:
    """Wrong bytes are told with their folio, whether anything was expected or not."""

    def test_garbage_is_not_called_a_lost_write(self, monkeypatch, tmp_path, capsys):
        from offload import scenario_machine
        from offload.migrators.mc_copy import McCopy

        class Liar(McCopy):
            def offload_copy(self, batch, done):
                done[:] = 1
                return 0
        monkeypatch.setitem(scenario_machine.MIGRATORS, "mc_copy", (Liar, ("kernel",)))
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"format": 1, "name": "t/x", "offload": {}, "folios": [{"name": "f", "count": 10}],
                                    "calls": [{"op": "migrate_pages"}]}))
        assert main(["run", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: ran; " + ", ".join(
            f"f[{i}]: WRONG BYTES" for i in range(8)) + " and 2 more folios\n"

    def test_a_piece_of_a_split_folio_is_named(self):
        from offload.scenario_folios import FolioLevel
        level = FolioLevel({"format": 1, "name": "t/x", "folios": [{"name": "f", "order": 2, "split": ["ok"], "alloc": "fail"}],
                            "calls": [{"op": "migrate_pages"}]})
        result, = level.run()
        assert result["data_ok"] and "f/2" in result["folios"]
        level.machine.frames.view(int(level.stretches[0].holder[2]), 1)[:] = 1
        assert level.wrong_folios() == ["f/2"]


class TestPage:
    """docs/protocols.md: what it says that one types gives what it shows, and every file that it names is there."""

    CONSOLE = re.findall(r"```console\n\$ offload (.*)\n([^`]*)```", PAGE)

    @pytest.mark.parametrize("command, shown", CONSOLE, ids=[command[:40] for command, _ in CONSOLE])
    def test_commands(self, monkeypatch, capsys, command, shown):
        monkeypatch.chdir(ROOT)
        command, _, filtered = command.partition(" | grep ")
        assert main(shlex.split(command)) == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        if filtered:
            lines = [line for line in lines if re.search(shlex.split(filtered)[0], line)]
        assert lines == shown.splitlines()

    def test_there_are_some(self):
        assert len(self.CONSOLE) == 3

    def test_python(self):
        """v4 loses the write of a GUP holder, v6 keeps it."""
        program, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL).groups()
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(program, {})                       # noqa: S102 it is ours
        assert out.getvalue() == shown
        v4, v6 = shown.splitlines()
        assert v4.endswith(r"b'\x00\x00\x00'") and v6.endswith("b'new'")

    ROW = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.partition("## Files")[2].partition("## Hazards")[0], re.MULTILINE)

    def test_every_row_has_its_files(self):
        assert [int(row) for row, _ in self.ROW] == list(range(1, 19))

    @pytest.mark.parametrize("row, names", ROW[:-1])
    def test_files(self, row, names):
        """Between them the files of a row are of all four protocols."""
        found = set()
        for folder, stem, ending in re.findall(r"`(rules|own)/([a-z0-9-]+?)(-\*|-v5|-v6|-off)?`", names):
            paths = list((ROOT / "tests" / "scenarios" / folder).glob(f"{stem}{ending.replace('*', '[vf]*') or ''}.json"))
            paths = [path for path in paths if re.fullmatch(f"{stem}-(v4|flags|v5|v6|off)", path.stem)]
            assert paths, (folder, stem, ending)
            found |= {path.stem.rpartition("-")[2] for path in paths}
        assert found - {"off"} == set(PROTOCOLS)
        if "`-off`" in names:
            stem = re.search(r"`rules/([a-z0-9-]+?)-(\*|v6)`", names)[1]
            assert (RULES / f"{stem}-off.json").exists()


class TestReadme:
    def test_python(self, capsys):
        """The blocks of "From Python" are one program, and print what their comments say."""
        text = (ROOT / "README.md").read_text().partition("## From Python")[2]
        program = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        exec(program, {})                           # noqa: S102 it is ours
        said = re.findall(r"print\(.*\)   # (.*)", program)
        printed = capsys.readouterr().out.splitlines()
        assert said and set(said) <= set(printed)

    def test_command(self, monkeypatch):
        text = (ROOT / "README.md").read_text()
        monkeypatch.chdir(ROOT)
        assert main(shlex.split(re.search(r"^\.venv/bin/offload (run --protocol .*)$", text, re.MULTILINE)[1])) == 0
