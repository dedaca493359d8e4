"""The compile cache must not lie, and nothing is compiled or even imported before it is needed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import offload
from offload import jit
from test_layers import KERNELS, PACKAGE

CALLEE = '''
from offload.jit import jit

@jit
def rule(x):
    return x + {number}
'''
CALLER = '''
from offload.jit import cache_folder, jit_entry
from offload.probe_callee import rule

@jit_entry
def ask(x):
    return rule(x) * 10

def main():
    print(ask(1), cache_folder().name, sum(ask.stats.cache_hits.values()))
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of our sources with a module that calls another one."""
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(PACKAGE, tmp_path / "offload", ignore=ignore)
    shutil.copytree(KERNELS, tmp_path / "offload" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "offload" / "probe_caller.py").write_text(CALLER)
    return Copy(tmp_path)


class Copy:
    def __init__(self, folder):
        self.folder = folder
        self.cache = folder / "cache"

    def edit_callee(self, number):
        (self.folder / "offload" / "probe_callee.py").write_text(CALLEE.format(number=number))

    def ask(self, **env):
        """(result, name of the cache folder, cache hits) of a process of its own; ``told`` is what it logged."""
        done = python("-c", "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
                            "from offload.probe_caller import main; main()", cwd=self.folder, PYTHONPATH=str(self.folder), NUMBA_CACHE_DIR=str(self.cache),
                      NUMBA_DISABLE_JIT="0", **env)
        self.told = done.stderr
        result, folder, hits = done.stdout.split()
        return int(result), folder, int(hits)

    def folders(self):
        return {path.name for path in (self.cache / "migrate-offload").iterdir()}


def python(*args, cwd=None, **env):
    done = subprocess.run([sys.executable, *args], env=os.environ | env, cwd=cwd, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done


class TestCache:
    """What is compiled is found again, and an edit of any source, a callee's too, is seen at once."""

    def test_an_edited_callee_is_seen(self, copy):
        copy.edit_callee(1)
        first = copy.ask()
        again = copy.ask()
        copy.edit_callee(2)
        edited = copy.ask()
        copy.edit_callee(1)
        back = copy.ask()
        assert (first[0], again[0], edited[0], back[0]) == (20, 20, 30, 20)
        assert first[1] == again[1] == back[1] != edited[1]
        assert (first[2], again[2], edited[2], back[2]) == (0, 1, 0, 1)

    def test_compiling_is_told_once_and_only_where_something_is_compiled(self, copy):
        copy.edit_callee(1)
        copy.ask()
        assert copy.told == f"compiling what is not in the cache yet, once; all of it takes about {jit.COMPILE_S} s\n"
        copy.ask()
        assert copy.told == ""

    def test_bounds_checks_have_a_folder_of_their_own(self, copy):
        copy.edit_callee(1)
        plain, checked = copy.ask(NUMBA_BOUNDSCHECK="0"), copy.ask(NUMBA_BOUNDSCHECK="1")
        assert plain[0] == checked[0] == 20 and plain[1] != checked[1] and checked[2] == 0

    def test_old_folders_are_pruned(self, copy):
        root = copy.cache / "migrate-offload"
        for age in range(1, 7):
            (root / f"old{age}").mkdir(parents=True)
            (root / f"old{age}" / "something").touch()
            os.utime(root / f"old{age}", (1e9 - age, 1e9 - age))
        copy.edit_callee(1)
        result, folder, hits = copy.ask()
        assert (result, hits) == (20, 0)
        assert copy.folders() == {folder, "old1", "old2", "old3"}


class TestFromPython:
    """What is compiled for compiled code alone refuses Python instead of crashing it, compiled or from the cache."""

    def test_a_call(self, copy):
        copy.edit_callee(1)
        for _ in range(2):
            told = python("-c", "from offload.probe_caller import ask, rule\n"
                                "for x in (1, 2):\n"
                                "    try: print(rule(x))\n"
                                "    except TypeError as error: print(error)\n"
                                "    print(ask(x))\n",
                          cwd=copy.folder, PYTHONPATH=str(copy.folder), NUMBA_CACHE_DIR=str(copy.cache), NUMBA_DISABLE_JIT="0").stdout
            refused = "rule() is compiled for compiled code alone; call a function that has jit_entry (offload/jit.py)"
            assert told.splitlines() == [refused, "20", refused, "30"]


class TestSourceHash:
    """The hash covers names and contents of all files, and nothing else."""

    @pytest.fixture
    def folder(self, tmp_path):
        package = tmp_path / "one"
        (package / "sub").mkdir(parents=True)
        (package / "caller.py").write_text("import callee\n")
        (package / "sub" / "callee.py").write_text("x = 1\n")
        return package

    def test_same_sources_same_hash(self, folder, tmp_path):
        before = jit.source_hash([folder])
        (folder / "notes.txt").write_text("not a source")
        (folder / "caller.py").touch()
        shutil.copytree(folder, tmp_path / "other")
        assert jit.source_hash([folder]) == jit.source_hash([tmp_path / "other"]) == before

    @pytest.mark.parametrize("change", [
        lambda folder: (folder / "sub" / "callee.py").write_text("x = 2\n"),
        lambda folder: (folder / "sub" / "callee.py").rename(folder / "sub" / "other.py"),
        lambda folder: (folder / "sub" / "new.py").write_text(""),
        lambda folder: (folder / "caller.py").unlink(),
    ], ids=["edited", "renamed", "added", "removed"])
    def test_any_change_changes_it(self, folder, change):
        before = jit.source_hash([folder])
        change(folder)
        assert jit.source_hash([folder]) != before

    def test_it_covers_the_kernels(self):
        folders = [pathlib.Path(folder) for folder in jit._source_folders()]
        assert any((folder / "cpu.py").exists() for folder in folders)
        assert any((folder / "mm" / "memmap.py").exists() for folder in folders)
        assert len(jit.source_hash()) == 20


class TestImports:
    """The front door and the help load neither the compiler nor a device library."""

    CHECK = "import sys\nheavy = {'numba', 'llvmlite', 'cupy'} & set(sys.modules)\nassert not heavy, heavy"

    @pytest.mark.parametrize("code", [
        "import offload",
        "import offload; offload.InvalidInput; offload.MigrateMode; dir(offload)",
        "import offload.cli",
        "from offload.cli import main\nassert main(['--help']) == 0",
        "from offload.cli import main\nassert main(['bench', '--help']) == 0",
        "from offload.cli import main\nassert main(['engines']) == 0",
    ])
    def test_light(self, code):
        python("-c", code + "\n" + self.CHECK)

    def test_every_public_name_is_there(self):
        for name in offload.__all__:
            assert getattr(offload, name) is not None and name in dir(offload)
        with pytest.raises(AttributeError, match="'nonsense'"):
            offload.nonsense
