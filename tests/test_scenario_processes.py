"""Process level of scenarios: what files can say, what results tell, and that contents are judged from outside.

The recordings under tests/scenarios/kernel-7.3 are run by test_scenarios.py.
"""

import json

import pytest

from offload.cli import main
from offload.errors import InvalidInput
from offload.machine import Machine
from offload.scenario import run_scenario
from offload.scenario_format import check

MOVE = {"op": "move_pages", "caller": "p", "pages": ["p:a+0..3"], "nodes": 1, "flags": ["MOVE"]}
QUERY = {"op": "move_pages", "caller": "p", "pages": ["p:a+0..3"], "nodes": None, "flags": []}


def scenario(vma=None, before=(), calls=(MOVE,), **fields):
    one = {"format": 1, "name": "t/x", "processes": [{"name": "p", "vmas": [{"name": "a", "pages": 4, **(vma or {})}]}],
           "before": list(before), "calls": list(calls), **fields}
    check(one)
    return one


def run(*args, **fields):
    return run_scenario(scenario(*args, **fields))


class TestResults:
    """Every result has the fields of the format."""

    def test_move(self):
        (result,) = run()
        assert result == {
            "ret": 0, "errno": None, "status": [1] * 4, "node_of": [1] * 4, "data_ok": True,
            "vmstat": {"pgmigrate_success": 4, "pgmigrate_fail": 0, "thp_migration_success": 0, "thp_migration_fail": 0,
                       "thp_migration_split": 0},
            "trace": ["mm_migrate_pages_start: mode=MIGRATE_SYNC reason=syscall_or_cpuset",
                      "mm_migrate_pages: nr_succeeded=4 nr_failed=0 nr_thp_succeeded=0 nr_thp_failed=0 nr_thp_split=0 "
                      "nr_split=0 mode=MIGRATE_SYNC reason=syscall_or_cpuset"]}

    def test_what_is_not_written_is_null(self):
        (result,) = run(before=[{"op": "pin", "at": "p:a+0"}])
        assert (result["ret"], result["status"], result["node_of"]) == (1, [None] * 4, [0, 1, 1, 1])

    def test_nothing_and_the_zero_page_have_no_node(self):
        (result,) = run({"populate": "none"}, [{"op": "read", "at": "p:a+0"}, {"op": "write", "at": "p:a+1"}], [QUERY])
        assert (result["status"], result["node_of"]) == ([-14, 0, -2, -2], [None, 0, None, None])

    def test_a_failing_call_has_its_errno_by_name(self):
        result, again = run(calls=[{**MOVE, "nodes": 7}, {**MOVE, "flags": ["NO_SUCH_FLAG"]}])
        assert (result["ret"], result["errno"]) == (-1, "ENODEV")
        assert (again["ret"], again["errno"], again["status"]) == (-1, "EINVAL", [None] * 4)

    def test_addresses(self):
        (result,) = run(calls=[{**QUERY, "pages": ["p:a+1@4095", None, "p:a+0..1@17"]}])
        assert result["status"] == [0, -14, 0, 0]

    def test_other_calls(self):
        migrate, mbind, read, write = run(calls=[
            {"op": "migrate_pages_syscall", "caller": "p", "old": [0], "new": [1]},
            {"op": "mbind", "caller": "p", "at": "p:a+0..3", "policy": "bind", "nodes": [0], "flags": ["MOVE"]},
            {"op": "read", "at": "p:a+0..3"}, {"op": "write", "at": "p:a+0", "data": "hello"}])
        assert migrate["ret"] == mbind["ret"] == 0 and "status" not in mbind
        assert (migrate["node_of"], mbind["node_of"]) == ([], [0] * 4)
        assert read == write == {"data_ok": True}

    def test_allocations_that_fail(self):
        (result,) = run(calls=[{**MOVE, "alloc_fail": {"nth": 3, "times": 1}}])
        assert (result["ret"], result["errno"], result["node_of"]) == (-1, "ENOMEM", [1, 1, 0, 0])


class TestProcesses:
    """Who is there, who may, and what fork and exit leave."""

    def test_zombies_and_the_dead(self):
        calls = [{"op": "move_pages", "caller": "p", "target": "c", "pages": ["c:a+0"], "nodes": 1, "flags": ["MOVE"]}]
        fork = {"op": "fork", "process": "p", "child": "c"}
        for reaped, name in ((True, "ESRCH"), (False, "EINVAL")):
            (result,) = run(before=[fork, {"op": "exit", "process": "c", "reaped": reaped}], calls=calls)
            assert (result["errno"], result["node_of"], result["data_ok"]) == (name, [None], True)

    def test_rights(self):
        processes = [{"name": "p", "uid": 1000}, {"name": "q", "uid": 1001, "vmas": [{"name": "a", "pages": 1}]},
                     {"name": "r", "uid": 1000, "caps": ["CAP_SYS_PTRACE"]}]
        calls = [{"op": "move_pages", "caller": who, "target": "q", "pages": ["q:a+0"], "nodes": None, "flags": []}
                 for who in ("p", "r")]
        refused, granted = run(processes=processes, calls=calls)
        assert (refused["errno"], granted["status"]) == ("EPERM", [0])

    def test_cpuset(self):
        (result,) = run(processes=[{"name": "p", "mems_allowed": [0], "vmas": [{"name": "a", "pages": 4}]}])
        assert result["errno"] == "EACCES"

    def test_what_a_child_writes_is_its_own(self):
        before = [{"op": "fork", "process": "p", "child": "c"}, {"op": "write", "at": "c:a+0..1", "data": "child"}]
        calls = [MOVE, {"op": "read", "at": "c:a+0", "data": "child"}, {"op": "read", "at": "p:a+0"}]
        move, child, parent = run(before=before, calls=calls)
        assert move["status"] == [1, 1, -13, -13] and child["data_ok"] and parent["data_ok"]

    def test_dontfork(self):
        before = [{"op": "madvise", "at": "p:a+1..2", "advice": "dontfork"}, {"op": "fork", "process": "p", "child": "c"}]
        (result,) = run(before=before, calls=[{**QUERY, "target": "c", "pages": ["c:a+0..3"]}])
        assert result["status"] == [0, -14, -14, 0] and result["data_ok"]


class TestMemory:
    """Fields of vmas and files, and operations on pages."""

    def test_a_node_for_each_folio(self):
        (result,) = run({"pages": 8, "order": 2, "node": [1, 0]}, calls=[{**QUERY, "pages": ["p:a+0..7"]}])
        assert result["status"] == [1] * 4 + [0] * 4

    def test_later_faults_keep_to_it(self):
        before = [{"op": "dontneed", "at": "p:a+0..3"}, {"op": "write", "at": "p:a+0..3"}]
        (result,) = run({"node": [1, 0, 1, 0]}, before, [QUERY])
        assert result["status"] == [1, 0, 1, 0] and result["data_ok"]

    def test_populate_some(self):
        (result,) = run({"populate": [1, 3]}, calls=[QUERY])
        assert result["status"] == [-2, 0, -2, 0]

    @pytest.mark.parametrize("vma, file", [
        ({"kind": "shmem", "shared": True}, None), ({"kind": "shmem"}, None), ({"kind": "file", "file": "f", "shared": True}, "file"),
        ({"kind": "file", "file": "f"}, "file"), ({"kind": "shmem", "file": "f", "shared": True}, "shmem")])
    def test_files(self, vma, file):
        files = [{"name": "f", "kind": file, "pages": 6}] if file else []
        move, read = run(vma, files=files, calls=[MOVE, {"op": "read", "at": "p:a+0..3"}])
        assert move["status"] == [1] * 4 and move["data_ok"] and read["data_ok"]

    def test_a_dirty_file_without_a_callback_stays(self):
        files = [{"name": "f", "aops": "none", "dirty": True, "pages": 4}]
        (result,) = run({"kind": "file", "file": "f", "shared": True, "populate": "read"}, files=files)
        assert (result["ret"], result["node_of"], result["data_ok"]) == (4, [0] * 4, True)

    def test_two_mappings_of_a_file_see_the_same(self):
        processes = [{"name": name, "vmas": [{"name": "a", "pages": 2, "kind": "file", "file": "f", "shared": True}]}
                     for name in "pq"]
        files = [{"name": "f", "pages": 2}]
        results = run(processes=processes, files=files, calls=[
            {"op": "write", "at": "p:a+0", "data": "word"}, {"op": "read", "at": "q:a+0", "data": "word"},
            {"op": "read", "at": "q:a+0", "data": "other"}])
        assert [result["data_ok"] for result in results] == [True, True, False]

    def test_swapped_contents_are_judged_too(self):
        before = [{"op": "swapout", "at": "p:a+0..3"}, {"op": "fork", "process": "p", "child": "c"}]
        query, read, move = run(before=before, calls=[QUERY, {"op": "read", "at": "p:a+0..1"}, MOVE])
        assert query["status"] == [-2] * 4 and query["data_ok"] and read["data_ok"]
        assert move["node_of"] == [1, 1, None, None] and move["data_ok"]

    def test_ksm(self):
        (result,) = run(before=[{"op": "ksm_merge", "pages": ["p:a+0..3"]}])
        assert result["status"] == [-13] * 4 and result["data_ok"]

    def test_operations_that_leave_contents(self):
        before = [{"op": "madvise", "at": "p:a+0..3", "advice": "cold"}, {"op": "madvise", "at": "p:a+0..3", "advice": "free"},
                  {"op": "mprotect", "at": "p:a+1", "prot": "r"}, {"op": "uffd_wp", "at": "p:a+2"}, {"op": "get", "at": "p:a+3"},
                  {"op": "put", "at": "p:a+3"}]
        (result,) = run(before=before)
        assert result["status"] == [1] * 4 and result["data_ok"]


class TestData:
    """data_ok compares bytes with what was written, not records with records."""

    @pytest.mark.parametrize("before", [[], [{"op": "fork", "process": "p", "child": "c"}]])
    def test_a_lost_byte_is_found(self, monkeypatch, before):
        from offload import scenario_processes
        move = scenario_processes.sys_move_pages

        def losing(machine, caller, target, pages, *args, **options):
            result = move(machine, caller, target, pages, *args, **options)
            pfn = int(machine.folios_of(caller, int(pages[2]), 1)[0])
            machine.frames.view(pfn, 1)[0, 77] ^= 1
            return result
        monkeypatch.setattr(scenario_processes, "sys_move_pages", losing)
        assert run(before=before)[0]["data_ok"] is False

    def test_a_lost_page_is_found(self, monkeypatch):
        from offload import scenario_processes
        move = scenario_processes.sys_move_pages

        def dropping(machine, caller, *args, **options):
            result = move(machine, caller, *args, **options)
            caller.dontneed(int(args[1][1]), 4096)
            return result
        monkeypatch.setattr(scenario_processes, "sys_move_pages", dropping)
        assert run()[0]["data_ok"] is False

    def test_the_machine_is_validated(self, monkeypatch):
        seen = []
        monkeypatch.setattr(Machine, "validate", lambda machine: seen.append(machine))
        run()
        assert len(seen) == 1


class TestRefused:
    """What cannot be is one line with the field; nothing is approximated."""

    @pytest.mark.parametrize("vma, before, field", [
        ({"pages": 5000}, [], "processes[0].vmas[0]"), ({"order": 10}, [], "processes[0].vmas[0].order"),
        ({"kind": "vdso"}, [], "processes[0].vmas[0].pages"),
        ({"kind": "file", "file": "f"}, [], "processes[0].vmas[0].pages"),
        ({"prot": "r"}, [{"op": "write", "at": "p:a+0"}], "before[0].at: p:a+0 is not writable"),
        ({}, [{"op": "unpin", "at": "p:a+0"}], "before[0].at: p:a+0 is not pinned"),
        ({}, [{"op": "munmap", "at": "p:a+0"}, {"op": "read", "at": "p:a+0"}], "before[1].at: p:a+0 is in no vma"),
        ({}, [{"op": "uffd_wp", "at": "p:a+0"}, {"op": "write", "at": "p:a+0"}], "before[1].at: p:a+0 is write-protected"),
        ({}, [{"op": "exit", "process": "p"}, {"op": "read", "at": "p:a+0"}], "before[1]"),
        ({}, [{"op": "write", "at": "p:a+0", "data": "x" * 5000}], "before[0].data"),
        ({"populate": "none"}, [{"op": "ksm_merge", "pages": ["p:a+0"]}, {"op": "mprotect", "at": "p:a+0", "prot": "r"},
                                {"op": "ksm_merge", "pages": ["p:a+0"]}], "before[2].pages: p:a+0 is not writable")])
    def test_one_line(self, vma, before, field):
        files = [{"name": "f", "pages": 2}]
        machine = {"nodes": [{"pages": 1024}, {"pages": 1024}]}
        with pytest.raises(InvalidInput) as caught:
            run(vma, before, files=files, machine=machine)
        assert str(caught.value).startswith(field) and "\n" not in str(caught.value)


class TestTrace:
    """--trace tells the steps of each folio by the name that the file has for its page."""

    def test_names(self, tmp_path, capsys):
        path = tmp_path / "t.json"
        path.write_text(json.dumps(scenario(before=[{"op": "get", "at": "p:a+1"}])))
        assert main(["run", str(path), "--trace"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "mm_migrate_pages_start: mode=MIGRATE_SYNC reason=syscall_or_cpuset"
        assert any(line.startswith("  p:a+0: moved: entries point to pfn") for line in lines)
        assert any(line.startswith("  p:a+1: move: -EAGAIN, refcount 2, expected 1") for line in lines)
        assert lines[-2].startswith("mm_migrate_pages: nr_succeeded=3 nr_failed=1") and "  left: p:a+1" in lines

    def test_json(self, tmp_path, capsys):
        path = tmp_path / "t.json"
        path.write_text(json.dumps(scenario()))
        assert main(["run", str(path), "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["status"] == [1] * 4
