"""Scenario files that are wrong: one line that names field, value and remedy, whatever the file holds."""

import copy
import json
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import NotSupported
from offload.scenario import check_supported
from offload.scenario_format import Fault, check, load

SCENARIOS = pathlib.Path(__file__).parent / "scenarios"
FILES = sorted(SCENARIOS.glob("*/*.json"))


def folio_file(**changes):
    return {"format": 1, "name": "t/x", "folios": [{"name": "f"}], "calls": [{"op": "migrate_pages"}], **changes}


def process_file(**changes):
    return {"format": 1, "name": "t/x", "processes": [{"name": "p", "vmas": [{"name": "a", "pages": 4}]}],
            "calls": [{"op": "move_pages", "caller": "p", "pages": ["p:a+0..3"], "nodes": 1, "flags": ["MOVE"]}], **changes}


def with_folio(**fields):
    return folio_file(folios=[{"name": "f", **fields}])


WRONG = [
    ([], "file: [] is not an object; write {...}"),
    ({"format": 1, "name": "t/x"}, "file: has neither folios nor processes; add folios to call migrate_pages() on, or "
     "processes that make system calls"),
    ({"format": 1, "name": "t/x", "folio": []}, "folio: there is no such field here; did you mean folios?"),
    ({"format": 1, "name": "t/x", "callz": []}, "callz: there is no such field here; did you mean calls?"),
    (folio_file(format=2), "format: 2 is a format that this version does not read; it reads format 1"),
    (folio_file(name="x"), 'name: "x" is not the name of a scenario; write GROUP/WHAT or SUITE/GROUP/WHAT'),
    (folio_file(kernel="5.4"), 'kernel: "5.4" is not known; use one of: 7.3, mm-next, 6.12'),
    (with_folio(extra_ref=1), "folios[0].extra_ref: there is no such field here; did you mean extra_refs?"),
    (with_folio(locked="until_wat"),
     'folios[0].locked: "until_wat" is not known; did you mean until_wait? use one of: no, until_wait, forever'),
    (folio_file(folios={"name": "f"}), 'folios: {"name": "f"} is not a list; put it in [ ], also where it is only one'),
    (with_folio(order="9"), 'folios[0].order: "9" is not an integer; write a whole number'),
    (with_folio(order=-1), "folios[0].order: -1 is too small; write 0 or more"),
    (with_folio(order=10), "folios[0].order: 10: no folio of kind anon is larger than one PMD; use 0 to 9"),
    (with_folio(dirty=1), "folios[0].dirty: 1 is not a boolean; write true or false"),
    (with_folio(locked="maybe"), 'folios[0].locked: "maybe" is not known; use one of: no, until_wait, forever'),
    (with_folio(node=2), "folios[0].node: there is no node 2; define it or use one of: 0, 1"),
    (with_folio(count=5000), "folios[0]: node 0 of 4096 pages has no room for it; give the node more pages"),
    (with_folio(aops="filemap"), 'folios[0].aops: "filemap" is not for a folio of kind anon; remove it'),
    (with_folio(extra_refs_write=True), "folios[0].extra_refs_write: there are none; add extra_refs"),
    (with_folio(freed=True, maps=3), "folios[0].maps: 3: a freed folio is mapped nowhere; write 0"),
    (with_folio(freed=True, extra_refs=1),
     "folios[0].extra_refs: 1: a freed folio has no reference but the list's; remove it, or freed"),
    (with_folio(pinned=True, maps=2),
     "folios[0].pinned: true: a pinned exclusive page has one mapping, not 2; write maps 1"),
    (with_folio(maps=0, mlocked=True),
     "folios[0].mlocked: true: a folio that is mapped nowhere cannot be that; remove it, or map the folio"),
    (with_folio(order=1, partially_mapped=1),
     "folios[0].partially_mapped: 1: only folios of order 2 and more are queued for deferred split; use a larger order"),
    (with_folio(order=2, partially_mapped=4),
     "folios[0].partially_mapped: 4: of 4 base pages at least one must be mapped; lower it"),
    (folio_file(folios=[{"name": "f"}, {"name": "f"}]), "folios: f occurs twice; rename or remove one"),
    (folio_file(folios=[{}]), "folios[0].name: is missing; add it"),
    (with_folio(kind="hugetlb", mlocked=True), "folios[0].mlocked: true: hugetlb memory is never mlocked; remove it"),
    (folio_file(calls=[]), "calls: is an empty list; add at least 1"),
    (folio_file(calls=[{"op": "mbind"}]), 'calls[0].op: "mbind" is not known here; use one of: migrate_pages'),
    (folio_file(calls=[{"op": "migrate_pages", "target": 7}]),
     "calls[0].target: there is no node 7; define it or use one of: 0, 1"),
    (folio_file(expect=[]), "expect: has 0 entries for 1 calls; write one per call"),
    (folio_file(expect=[{"left": ["g"]}]), "expect[0].left: there is no folio g; define it or use one of: f"),
    (folio_file(expect=[{"left": ["f/0"]}]), "expect[0].left: f/0 is no piece of a large folio; correct it"),
    (folio_file(machine={"nodes": []}), "machine.nodes: is an empty list; add at least 1"),
    (folio_file(processes=[]), "processes: a file has folios or processes, not both; remove one, or make two files"),
    (process_file(calls=[{"op": "migrate_pages"}]), 'calls[0].op: "migrate_pages" is not known here; did you mean '
     'migrate_pages_syscall? use one of: move_pages, migrate_pages_syscall, mbind, read, write'),
    (process_file(before=[{"op": "fork", "process": "q", "child": "c"}]),
     "before[0].process: there is no process q; define it or use one of: p"),
    (process_file(calls=[{"op": "move_pages", "caller": "p", "pages": ["p:a+9"], "nodes": 1}]),
     "calls[0].pages[0]: p:a+9 ends outside the VMA; use null for such an address"),
    (process_file(calls=[{"op": "move_pages", "caller": "p", "pages": ["p:a+0"], "nodes": [1, 1]}]),
     "calls[0].nodes: has 2 entries for 1 pages; write one per page or one number for all"),
    (process_file(calls=[{"op": "move_pages", "caller": "p", "pages": ["a+0"], "nodes": 1}]),
     'calls[0].pages[0]: "a+0" is not a page address; write '
     'PROCESS:VMA+INDEX or PROCESS:VMA+FIRST..LAST (@BYTES may follow)'),
]

LEFT_OUT = [
    (with_folio(kind="hugetlb", order=10), "folios[0].order: 10 is not supported yet; of hugetlb folios only those of order 9 are built"),
]

WRONG_OPTIONS = [
    ({"migrator": "magic"}, 'offload.migrator: "magic" is not a registered name; use one of: mc_copy, cpu_mt, dcbm'),
    ({"migrator": "dcbm", "channels": 17}, "offload: nr_dma_chan 17 cannot be; give a number from 1 to 16; correct the migrator's options"),
    ({"migrator": "dcbm", "completion": "first"}, "offload: completion 'first' is not known; use one of: descriptor, last; "
     "correct the migrator's options"),
    ({"migrator": "mc_copy", "threads": 2}, "offload.threads: 2 is for no option of mc_copy; use one of: protocol, "
     "migrator, reasons, declines, fails_after, marks, kernel"),
]


class TestWrongFiles:
    """A wrong file is refused with one line that names the field, shows the value and says what to do."""

    @pytest.mark.parametrize("scenario, message", WRONG)
    def test_message(self, scenario, message):
        with pytest.raises(Fault) as caught:
            check(scenario)
        assert "\n" not in str(caught.value)
        if message is not None:
            assert str(caught.value) == message

    @pytest.mark.parametrize("scenario, message", LEFT_OUT)
    def test_left_out(self, scenario, message):
        check(scenario)
        with pytest.raises(NotSupported) as caught:
            check_supported(scenario)
        assert str(caught.value) == message

    @pytest.mark.parametrize("offload, message", WRONG_OPTIONS)
    def test_options_of_migrators(self, offload, message):
        check(folio_file(offload=offload))
        with pytest.raises(Fault) as caught:
            check_supported(folio_file(offload=offload))
        assert str(caught.value) == message

    @pytest.mark.parametrize("text, start", [
        ("", "file: is not JSON ("), ("{", "file: is not JSON ("), ('{"format": 1, "format": 1}', "file: format occurs twice"),
        ("[" * 100_000, "file: is not JSON"), ("\x00", "file: is not JSON ("), ("1" * 6000, "file: "),
        ('{"folios": [], "\\ud800\\n": 1}', "")])
    def test_text(self, tmp_path, text, start):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(Fault) as caught:
            load(path)
        assert str(caught.value).startswith(start)
        assert str(caught.value).isprintable()

    def test_bytes_that_are_no_text(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_bytes(b"\xff\xfe{}")
        with pytest.raises(Fault, match="is not JSON"):
            load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(Fault, match="file: cannot be read .No such file or directory.; check the path"):
            load(tmp_path / "x.json")


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


JUNK = st.sampled_from([None, True, -1, 0, 3, 10**30, 1.5, "", "f", "EAGAIN", "p:a+0", "\ud800\n", [], [1], {}, {"op": 1},
                        [[]], {"name": "f"}])


class TestNearMiss:
    """A field that nothing resembles is answered with all fields there are, none cut off."""

    def test_all_are_listed(self):
        with pytest.raises(Fault) as caught:
            check(with_folio(colour="red"))
        start, _, fields = str(caught.value).partition("the fields here are: ")
        assert start == "folios[0].colour: there is no such field here; "
        assert fields.split(", ")[:2] == ["name", "count"] and fields.endswith("orphan_subpool")


class TestMutations:
    """A file that somebody has broken at random is either still right or refused; nothing else is raised."""

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def test_never_a_traceback(self, data):
        scenario = json.loads(data.draw(st.sampled_from(FILES)).read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(list(places(scenario))))
            if not path:
                continue
            at = scenario
            for key in path[:-1]:
                at = at[key]
            change = data.draw(st.sampled_from(["set", "delete", "add"]))
            if change == "delete":
                del at[path[-1]]
            elif change == "set" or not isinstance(at, dict):
                at[path[-1]] = copy.deepcopy(data.draw(JUNK))
            else:
                at[data.draw(st.sampled_from(["order", "maps", "extra", "freed", "pinned"]))] = copy.deepcopy(data.draw(JUNK))
        try:
            check(scenario)
            check_supported(scenario)
        except (Fault, NotSupported) as error:
            assert str(error).isprintable()
