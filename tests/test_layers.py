"""Imports point down only."""

import ast
import pathlib

import pytest

import offload

PACKAGE = pathlib.Path(offload.__file__).parent
KERNELS = PACKAGE / "kernels" if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"

FLOORS = (
    ("errors",), ("units",), ("jit",), ("table", "intrinsics"), ("kernels",), ("mm",), ("copy_offload",), ("migrate",),
    ("dmaengine",), ("migrators",), ("syscalls",), ("callers",), ("machine",), ("other_tasks",), ("outfile",), ("report",), ("calibration",), ("engines",), ("scenario", "workload", "experiment"), ("cli",), ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """The room of a module's dotted name below ``offload``: its first word; all scenario files are one."""
    word = module.split(".")[0]
    return "scenario" if word.startswith("scenario") else word


def sources():
    """(module below offload, path) of every file of ours."""
    for folder, prefix in ((PACKAGE, ()), (KERNELS, ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder == PACKAGE and parts[0] == "kernels":
                continue
            parts = (*prefix, *parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


SOURCES = tuple(sources())
INSIDE = tuple((module, path) for module, path in SOURCES if module)


def imports(path):
    """Dotted names of all modules that a file imports, wherever in it: (name, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield node.module, node.lineno
            for alias in node.names:
                if node.module == "offload":
                    yield f"offload.{alias.name}", node.lineno


class TestLayers:
    """A room knows only the rooms below it."""

    def test_all_found(self):
        rooms = {room_of(module) for module, _ in INSIDE}
        assert rooms <= set(FLOOR_OF), f"rooms without a floor: {rooms - set(FLOOR_OF)}"
        assert {"mm", "kernels", "migrate", "machine", "cli"} <= rooms

    @pytest.mark.parametrize("module, path", INSIDE, ids=[module for module, _ in INSIDE])
    def test_down_only(self, module, path):
        here = room_of(module)
        for name, line in imports(path):
            if not name.startswith("offload."):
                continue
            there = room_of(name.removeprefix("offload."))
            assert there == here or FLOOR_OF[there] < FLOOR_OF[here], f"{path}:{line}: {here} imports {name}"

    @pytest.mark.parametrize("module, path", INSIDE, ids=[module for module, _ in INSIDE])
    def test_nobody_uses_the_front_door(self, module, path):
        """``offload`` itself is for users; the command line alone asks it for its version."""
        for name, line in imports(path):
            assert name != "offload" or module == "cli", f"{path}:{line} imports the front door"

    def test_migrate_knows_no_copier(self):
        for module, path in INSIDE:
            if room_of(module) == "migrate":
                for name, line in imports(path):
                    assert not name.startswith(("offload.migrators", "offload.kernels")), f"{path}:{line}: {name}"

    def test_the_front_door_imports_nothing_of_ours(self):
        path = dict(SOURCES)[""]
        assert [name for name, _ in imports(path)] == ["importlib"]

    def test_cupy_in_one_file(self):
        for module, path in SOURCES:
            if module != "kernels.cuda":
                names = [name.split(".")[0] for name, _ in imports(path)]
                assert "cupy" not in names, path

    def test_kernels_know_no_folio(self):
        for module, path in INSIDE:
            if room_of(module) == "kernels":
                assert not [name for name, _ in imports(path) if name.startswith("offload.mm")], path
