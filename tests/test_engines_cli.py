"""Engine names, and what the command line says before any work is done."""

import re
import subprocess
import sys

import pytest

import offload
from conftest import World, on_duty
from offload.cli import main
from offload.engines import MAX_CHANNELS, MAX_THREADS, list_engines, parse_engine
from offload.errors import EngineUnavailable, InvalidInput
from offload.kernels.cuda import Probe


class TestParseEngine:
    """An engine's name says who stands at the hatch, which kernel copies and with how many threads."""

    @pytest.mark.parametrize("text, migrator, kernel, threads, limit", [
        ("vanilla", None, "plain", 1, "plain:1"), ("vanilla+stream", None, "stream", 1, "stream:1"),
        ("batch", "mc_copy", "plain", 1, "plain:1"), ("batch+stream", "mc_copy", "stream", 1, "stream:1"),
        ("mt:1", "cpu_mt", "plain", 1, "plain:1"), ("mt:64+stream", "cpu_mt", "stream", 64, "stream:64"),
        ("dma:2", "dcbm", "plain", 2, "plain:2"), ("dma:16+stream", "dcbm", "stream", 16, "stream:16"),
    ])
    def test_known(self, text, migrator, kernel, threads, limit):
        engine = parse_engine(text)
        assert (engine.name, engine.migrator, engine.copy_kernel, engine.threads) == (text, migrator, kernel, threads)
        assert engine.limit_key == limit

    def test_name_is_canonical(self):
        assert parse_engine(" mt:04+stream ").name == "mt:4+stream"
        assert parse_engine("dma:02").name == "dma:2"
        assert parse_engine(" batch ").name == "batch"

    @pytest.mark.parametrize("text", ["", "mc_copy", "mt", "mt:", "mt:0", f"mt:{MAX_THREADS + 1}", "mt:-1", "mt:x", "mt:1.5",
                                      "dma", "dma:0", f"dma:{MAX_CHANNELS + 1}", "dma:2+fast",
                                      "mt:²", "batch:2", "batch+", "batch+fast", "vanilla:1", "+stream", "batch+stream+stream",
                                      None, 7])
    def test_unknown(self, text):
        with pytest.raises(InvalidInput) as refused:
            parse_engine(text)
        assert ("dma:" if str(text).startswith("dma") else "mt:") in str(refused.value) and "\n" not in str(refused.value)

    @pytest.mark.parametrize("text", ["cuda-loop:4", "cuda-batch", "cuda-kernel"])
    def test_not_here(self, no_gpu, text):
        with pytest.raises(EngineUnavailable, match="not available: there is a reason; on the CPU use") as refused:
            parse_engine(text)
        assert repr(text) in str(refused.value) and refused.value.errno == 19

    @pytest.mark.parametrize("text", ["cuda-loop", "cuda-loop:0", "cuda-loop:17", "cuda-kernel+stream", "cuda-batch:2", "auto:2",
                                      "auto+stream", "cuda-tma"])
    def test_no_name_of_a_gpu_engine(self, text):
        with pytest.raises(InvalidInput, match="cuda-loop:") as refused:
            parse_engine(text)
        assert "\n" not in str(refused.value)

    def test_auto_falls_back_and_says_so(self, no_gpu):
        engine = parse_engine("auto")
        assert (engine.name, engine.migrator, engine.copy_kernel) == ("auto", "mc_copy", "stream")
        assert engine.note == "auto is batch+stream, on the CPU; no GPU engine is available: there is a reason"

    def test_placements(self):
        for name in ("vanilla", "batch+stream", "mt:2", "dma:2"):
            for placement in ("host", "pinned", "nowhere"):
                parse_engine(name).check_nodes((placement, placement))


class TestMakeMigrator:
    """An engine makes its migrator afresh, and it moves memory."""

    def test_vanilla_has_none(self):
        assert parse_engine("vanilla").make_migrator() is None

    @pytest.mark.parametrize("name", ["batch", "batch+stream", "mt:2", "mt:2+stream", "dma:2", "dma:2+stream"])
    def test_copies(self, name):
        engine = parse_engine(name)
        assert engine.make_migrator() is not engine.make_migrator()
        world = World(copy_kernel=engine.copy_kernel)
        pfns = world.pfns(8, 2)
        with on_duty(world.machine, engine.make_migrator()) as migrator:
            result = world.migrate(pfns)
        assert migrator.name == engine.migrator
        assert (result.rc, result.copies["batched"]) == (0, 8)
        world.check()


class TestListEngines:
    """Every name there is is listed, and what is not available has its reason."""

    def test_reasons(self, no_gpu):
        listed = {name: reason for name, _, _, reason in list_engines()}
        assert [name for name, reason in listed.items() if reason is None] == ["vanilla[+stream]", "batch[+stream]",
                                                                            "mt:N[+stream]", "dma:N[+stream]", "auto"]
        for name, reason in listed.items():
            concrete = re.sub(r"\[.*?\]", "", name).replace("N", "2")
            if reason is None:
                parse_engine(concrete)
            else:
                with pytest.raises(EngineUnavailable, match=re.escape(reason)):
                    parse_engine(concrete)


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr("offload.kernels.cuda.probe", lambda: Probe("there is a reason"))


class Done:
    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture
def run(capsys):
    """Run the command line in this process."""
    def run(*args):
        status = main(list(args))
        return Done(status, *capsys.readouterr())
    return run


def run_alone(*args):
    """Run it as the installed command does."""
    return subprocess.run([sys.executable, "-m", "offload", *args], capture_output=True,
                          text=True, timeout=60)


class TestCommandLine:
    """Help and lists go to standard output with status 0; what is wrong is one line on standard error, status 2."""

    def test_version(self, run):
        done = run("--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, offload.__version__ + "\n", "")

    @pytest.mark.parametrize("args", [("--help",), ("bench", "--help"), ("migrate", "--help"), ("run", "--help"),
                                      ("snapshot", "--help"), ("engines", "--help")])
    def test_help(self, run, args):
        done = run(*args)
        assert done.returncode == 0 and "Usage" in done.stdout and done.stderr == ""

    def test_no_command_is_help_and_an_error(self, run):
        done = run()
        assert done.returncode == 2 and "Usage" in done.stdout + done.stderr

    def test_engines(self, run, no_gpu):
        done = run("engines")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        for name, migrator, does, reason in list_engines():
            line, = [line for line in lines if line.startswith(name + " ")]
            assert migrator in line and does in line and ("yes" if reason is None else "no") in line.split()
        assert lines[-1] == "not available: cuda-loop:N, cuda-batch, cuda-kernel: there is a reason"
        assert done.stdout.count("there is a reason") == 1 and not [line for line in lines if line != line.rstrip()]

    @pytest.mark.parametrize("args", [("nonsense",), ("--nonsense",), ("bench", "--size"), ("bench", "--repeat", "x"),
                                      ("snapshot",), ("engines", "more"), ("run",)])
    def test_usage_errors(self, run, args):
        done = run(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"offload: [^\n]+\. See offload .*--help\n", done.stderr)
        assert args[0] not in ("bench", "engines", "run", "snapshot") or f"See offload {args[0]} --help" in done.stderr

    @pytest.mark.parametrize("args", [("bench", "--engines", "warp"), ("bench", "--size", "4097"),
                                      ("bench", "--engines", "dma:17"), ("bench", "--mode", "eager"),
                                      ("bench", "--orders", "11"), ("bench", "--json", "/nonexistent/out.json"),
                                      ("run", "--json", "/nonexistent/out.json", "x"), ("migrate", "--pid", "x")])
    def test_wrong_values(self, run, args):
        done = run(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"offload: [^\n]+\n", done.stderr)

    @pytest.mark.parametrize("args", [
        ("--engines", "cuda-loop:2"), ("--engines", "vanilla,cuda-kernel"), ("--nodes", "device,device"),
        ("--nodes", "pinned,device"), ("--nodes", "pinned,pinned"), ("--nodes", "pinned,host"), ("--nodes", "host"),
        ("--nodes", "moon,host"),
    ])
    def test_a_gpu_that_is_not_there(self, run, no_gpu, args):
        done = run("bench", "--size", "2M", *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"offload: [^\n]+\n", done.stderr)
        if args[1] not in ("host", "moon,host"):
            assert "there is a reason" in done.stderr

    def test_brackets_are_shown(self, run, monkeypatch):
        """As in pip's extras: rich would take them for its own words."""
        monkeypatch.setattr("offload.kernels.cuda.probe", lambda: Probe("pip install 'x[cuda13]'"))
        assert run("engines").stdout.count("pip install 'x[cuda13]'") == 1

    def test_auto_says_what_it_is(self, run, no_gpu):
        done = run("bench", "--size", "2M", "--orders", "9", "--repeat", "1", "--warmup", "0", "--engines", "auto")
        assert done.returncode == 0 and "\nauto is batch+stream, on the CPU; no GPU engine is available: there is a reason\n" in done.stdout

    def test_as_a_command(self):
        """The exit status reaches the shell, and nothing but the line is printed."""
        assert run_alone("--version").returncode == 0
        done = run_alone("bench", "--engines", "warp")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"offload: [^\n]+\n", done.stderr)

    def test_interrupted(self, run, monkeypatch):
        def list_engines():
            raise KeyboardInterrupt
        monkeypatch.setattr("offload.engines.list_engines", list_engines)
        done = run("engines")
        assert (done.returncode, done.stdout) == (130, "")
        assert re.fullmatch(r"offload: interrupted[^\n]*\n", done.stderr)

    def test_a_bug_keeps_its_traceback(self, run, monkeypatch):
        def list_engines():
            raise ZeroDivisionError
        monkeypatch.setattr("offload.engines.list_engines", list_engines)
        with pytest.raises(ZeroDivisionError):
            run("engines")
