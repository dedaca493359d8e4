"""The command as a process: its streams, its status, its lines, whoever is at the other end."""

import contextlib
import io
import json
import logging
import os
import pty
import stat
import subprocess
import sys

import pytest

from offload import jit
from offload.cli import main
from offload.report import plus_minus, show, table

SCENARIO = {"format": 1, "name": "t/x", "folios": [{"name": "f", "locked": "until_wait"}], "calls": [{"op": "migrate_pages"}]}


def command(words, shell="{}", **options):
    """Run ``offload WORDS`` as a shell line ``shell`` has it: its status, and all output, text."""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "COLUMNS": "80"} | options.pop("env", {})
    return subprocess.run(["bash", "-o", "pipefail", "-c", shell.format(f"{sys.executable} -m offload {words}")], capture_output=True,
                          text=True, env=environment, timeout=100, **options)


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SCENARIO))
    return path


class TestStreams:
    """A stream that is closed, full or unread is told in one line or by the status, never by a traceback."""

    @pytest.mark.parametrize("words", ["engines", "run SCENARIO"])
    def test_a_closed_standard_output(self, scenario, words):
        done = command(words.replace("SCENARIO", str(scenario)), "{} >&-")
        assert (done.returncode, done.stderr) == (2, "offload: standard output is closed; direct it to a file, or to /dev/null\n")

    def test_a_closed_standard_error(self):
        done = command("engines --nonsense", "{} 2>&-")
        assert (done.returncode, done.stdout) == (2, "")

    @pytest.mark.parametrize("words", ["engines", "--help", "run --help", "run SCENARIO SCENARIO", "run --json - SCENARIO"])
    def test_a_pipe_that_nobody_reads(self, scenario, words):
        done = command(words.replace("SCENARIO", str(scenario)), "{} | true" if "json" not in words else "{} | head -c 1")
        assert done.returncode in (141, 0) and "Traceback" not in done.stderr and "Exception" not in done.stderr

    @pytest.mark.parametrize("error", [BrokenPipeError, None])
    def test_its_status(self, monkeypatch, capfd, error):
        """Also where Rich or Typer has made a SystemExit of it."""
        def list_engines():
            try:
                raise BrokenPipeError
            except BrokenPipeError:
                if error:
                    raise
                raise SystemExit(1)
        monkeypatch.setattr("offload.engines.list_engines", list_engines)
        monkeypatch.setattr("offload.cli.drop_stdout", lambda: None)
        assert main(["engines"]) == 141

    def test_a_full_disk(self):
        done = command("engines", "{} > /dev/full")
        assert done.returncode == 2
        assert done.stderr == "offload: standard output cannot be written: No space left on device; make room, or direct it elsewhere\n"

    def test_characters_that_cannot_be_shown(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert plus_minus() == "+-"
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        assert plus_minus() == "±"

    def test_a_name_that_cannot_be_shown(self, tmp_path):
        path = tmp_path / "é.json"
        path.write_text(json.dumps(SCENARIO))
        done = command(f"run {path}", env={"PYTHONIOENCODING": "ascii"})
        assert (done.returncode, done.stderr) == (0, "") and "\\xe9.json: ran" in done.stdout


class TestInterrupted:
    def test_while_it_is_imported(self):
        code = ("import sys\n"
                "class Interrupted:\n"
                "    def find_spec(self, name, path, target=None):\n"
                "        if name == 'typer':\n"
                "            raise KeyboardInterrupt\n"
                "sys.meta_path.insert(0, Interrupted())\n"
                "import runpy\n"
                "runpy.run_module('offload', run_name='__main__')\n")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")

    def test_while_it_compiles(self):
        code = ("import os, signal, time\n"
                "from offload.jit import exit_on_interrupt\n"
                "with exit_on_interrupt():\n"
                "    os.kill(os.getpid(), signal.SIGINT)\n"
                "    time.sleep(10)\n")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "offload: interrupted\n")


class TestJson:
    """--json goes where it is told to, replaces no input, and what it cannot is said before the work."""

    def test_the_input(self, scenario, capsys):
        before = scenario.read_text()
        assert main(["run", str(scenario), "--json", str(scenario)]) == 2
        assert "is the input" in capsys.readouterr().err and scenario.read_text() == before

    def test_a_snapshot_that_is_read(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "snap").write_text("precious")
        monkeypatch.setattr("offload.workload.job.snap.load", lambda file: pytest.fail("work began"))
        assert main(["migrate", str(tmp_path / "snap"), "--json", str(tmp_path / "snap")]) == 2
        assert "is the input" in capsys.readouterr().err and (tmp_path / "snap").read_text() == "precious"

    def test_a_process_substitution(self, scenario, tmp_path):
        done = command(f"run {scenario}", "{} --json >(cat > " + str(tmp_path / "out") + "); wait $!")
        assert done.returncode == 0 and done.stdout.endswith("ran\n")
        assert json.loads((tmp_path / "out").read_text())["status"] == "ran"

    def test_standard_output_by_name(self, scenario, tmp_path):
        done = command(f"run {scenario} --json /dev/stdout", "{} > " + str(tmp_path / "out"))
        head, _, rest = (tmp_path / "out").read_text().partition("\n")
        assert done.returncode == 0 and head.endswith(": ran") and json.loads(rest)["status"] == "ran"

    @pytest.mark.parametrize("path", ["/proc/x.json", "/proc/self/x.json"])
    def test_before_the_work(self, monkeypatch, capsys, path):
        monkeypatch.setattr("offload.experiment.bench.run_bench", lambda *a, **k: pytest.fail("work began"))
        assert main(["bench", "--size", "64K", "--orders", "0", "--json", path]) == 2
        assert path in capsys.readouterr().err

    def test_it_comes_before_the_tables_and_they_come_nevertheless(self, tmp_path, monkeypatch, capsys):
        from offload.errors import OffloadError
        from offload.report import deliver
        deliver(str(tmp_path / "a"), {"x": 1}, lambda: print((tmp_path / "a").read_text().split()))
        assert capsys.readouterr().out == "['{', '\"x\":', '1', '}']\n"

        def full(fd):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OffloadError, match="No space left on device"):
            deliver(str(tmp_path / "a"), {"x": 2}, lambda: print("tables"))
        assert capsys.readouterr().out == "tables\n" and json.loads((tmp_path / "a").read_text()) == {"x": 1}

    def test_a_snapshot_is_not_for_a_pipe(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("offload.workload.job.read_process", lambda *a, **k: pytest.fail("work began"))
        (tmp_path / "link").symlink_to("x")
        for name in ("-", "link", "/dev/stdout"):
            assert main(["snapshot", "--pid", "self", "-o", name]) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1
        assert os.listdir(tmp_path) == ["link"]


class TestMessages:
    @pytest.mark.parametrize("args, line", [
        ("run --frob", "No such option: --frob. See offload run --help"),
        ("bench --json", "Option '--json' requires an argument. See offload bench --help"),
        ("bench --repeat x", "Invalid value for '--repeat': 'x' should be a valid integer. See offload bench --help"),
        ("run", "Missing argument 'FILE'. See offload run --help"),
        ("--frob", "No such option: --frob. See offload --help"),
        ("bench-engin", "No such command 'bench-engin'. Did you mean 'bench-engine', 'bench'? See offload --help"),
    ])
    def test_usage(self, capsys, args, line):
        assert main(args.split()) == 2
        assert capsys.readouterr().err == f"offload: {line}\n"

    def test_help(self, capsys):
        assert main(["-h"]) == 0
        texts = [capsys.readouterr().out]
        assert "..." not in texts[0].replace("[ARGS]...", "")
        for name in ("bench", "bench-engine", "migrate", "run", "snapshot", "engines", "evidence"):
            assert main([name, "-h"]) == 0
            texts.append(capsys.readouterr().out)
        assert not [text for text in texts if "bool" in text or "[[" in text or "...}" in text]

    def test_words_in_any_case(self, capsys):
        from offload.experiment.config import BenchConfig
        config = BenchConfig.parse(size="2M", orders="0", engines="vanilla", mode="sync_light", protocol="V5")
        assert (config.mode.name, config.protocol) == ("MIGRATE_SYNC_LIGHT", "v5")
        from offload.scenario import run_scenario
        from offload.scenario_format import check
        scenario = SCENARIO | {"offload": {"protocol": "V5"}, "calls": [{"op": "migrate_pages", "mode": "sync"}]}
        check(scenario)
        assert run_scenario(scenario)[0]["rc"] == 0

    def test_nodes_that_are_no_list(self):
        from offload import InvalidInput, Machine
        for nodes in ("64M", 512):
            with pytest.raises(InvalidInput, match="is one value, not a list; write nodes="):
                Machine(nodes=nodes)

    def test_a_node_by_its_size(self):
        from offload import InvalidInput, NodeConfig
        assert NodeConfig("16M").pages == 4096 and NodeConfig(7).pages == 7
        for pages, why in (("16X", "is not a size"), ("5000", "multiple of 4K"), (1.5, "or a size such as"), (-1, "write 0 or more")):
            with pytest.raises(InvalidInput, match=why):
                NodeConfig(pages)


class TestTables:
    """No number is cut and no column left out, however narrow the terminal."""

    @pytest.mark.parametrize("columns", ["20", "60", "80"])
    def test_on_a_terminal(self, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERM", "dumb")

        class Terminal(io.StringIO):
            def isatty(self):
                return True
        out = Terminal()
        cells = [f"{number}.25±0.50" for number in range(100, 110)]
        show([table(None, ("engine", *map(str, range(10))), [("vanilla+stream", *cells)], right=tuple(map(str, range(10))))], out)
        assert all(cell in out.getvalue() for cell in cells)

    def test_many_short_columns(self, monkeypatch):
        """More of them than there is room for a letter each."""
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("TERM", "dumb")

        class Terminal(io.StringIO):
            def isatty(self):
                return True
        out, names = Terminal(), [f"c{number}" for number in range(40)]
        show([table(None, names, [[f"v{number}" for number in range(40)]])], out)
        assert out.getvalue().split() == [*names, *(f"v{number}" for number in range(40))]

    def test_a_reason_can_be_copied(self, monkeypatch):
        """From a narrow terminal too: it breaks the line, we do not."""
        main_end, other = pty.openpty()
        running = subprocess.Popen([sys.executable, "-c", "from offload.kernels import cuda\n"
                                    "cuda.probe = lambda: cuda.Probe(\"pip install 'needs-this[cuda13]'\")\n"
                                    "from offload.cli import main\nmain(['engines'])"], stdout=other,
                                   env=os.environ | {"COLUMNS": "40", "TERM": "dumb"})
        os.close(other)
        shown = b""
        with contextlib.suppress(OSError):              # EIO: the other end is closed
            while piece := os.read(main_end, 65536):
                shown += piece
        os.close(main_end)
        assert running.wait() == 0 and shown.decode().count("pip install 'needs-this[cuda13]'") == 1
        assert b"each folio in its move" in shown       # and text is not wrapped to a column of letters

    def test_a_pipe_gets_no_blanks_at_line_ends(self):
        out = io.StringIO()
        show(["text", table("title", ("a", "b"), [("x" * 9, "y"), ("z", "long")])], out)
        assert [line for line in out.getvalue().splitlines() if line != line.rstrip()] == []


class TestCacheFolder:
    """Numba runs what it finds, so nobody else may have put it there."""

    @pytest.fixture
    def places(self, tmp_path, monkeypatch):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        monkeypatch.setattr(jit.tempfile, "tempdir", str(tmp_path))
        return tmp_path / f"migrate-offload-{os.getuid()}"

    def test_where_it_is_instead_is_said(self, places, caplog):
        assert jit.cache_root.__wrapped__() == places
        assert [record.getMessage() for record in caplog.records] == [
            f"compiled code is kept in {places}, not in /proc/nowhere/migrate-offload (No such file or directory)"]

    def test_a_fresh_one_is_private_and_used_again(self, places):
        assert jit.cache_root.__wrapped__() == places == jit.cache_root.__wrapped__()
        assert stat.S_IMODE(places.stat().st_mode) == 0o700

    @pytest.mark.parametrize("how", ["writable", "group", "link", "owner"])
    def test_a_foreign_one_is_not_used(self, places, monkeypatch, caplog, how):
        if how == "link":
            (places.parent / "theirs").mkdir()
            places.symlink_to("theirs")
        else:
            places.mkdir()
            places.chmod({"writable": 0o707, "group": 0o770}.get(how, 0o700))
        if how == "owner":
            monkeypatch.setattr(jit.os, "geteuid", lambda: 4_000_000)
        root = jit.cache_root.__wrapped__()
        assert root != places and root.parent == places.parent and stat.S_IMODE(root.stat().st_mode) == 0o700
        assert str(places) in caplog.text and len(caplog.records) == 1

    def test_in_the_home_folder_too(self, tmp_path, monkeypatch, places):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        theirs = tmp_path / "home" / "migrate-offload"
        theirs.mkdir(parents=True)
        theirs.chmod(0o777)
        assert jit.cache_root.__wrapped__() == places


class TestProgress:
    def test_a_bar_leaves_standard_output_alone(self, scenario, tmp_path):
        main_end, other = pty.openpty()
        with open(tmp_path / "out", "w") as out:
            done = subprocess.run([sys.executable, "-m", "offload", "run", *[str(scenario)] * 3], stdout=out, stderr=other,
                                  env=os.environ | {"NUMBA_DISABLE_JIT": "1", "TERM": "xterm"})
        os.close(other)
        shown = os.read(main_end, 65536).decode()
        os.close(main_end)
        assert done.returncode == 0 and "/3" in shown
        assert (tmp_path / "out").read_text() == f"{scenario}: ran\n" * 3 + "3 ran\n"


class TestLog:
    def test_messages_of_the_package_are_lines_and_only_meanwhile(self, monkeypatch, capsys):
        def list_engines():
            logging.getLogger("offload.jit").info("a thing of %d s", 3)
            return ()
        monkeypatch.setattr("offload.engines.list_engines", list_engines)
        assert main(["engines"]) == 0
        assert capsys.readouterr().err == "offload: a thing of 3 s\n"
        assert logging.getLogger("offload").handlers == [] and logging.getLogger("offload").level == logging.NOTSET
