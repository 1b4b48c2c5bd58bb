"""The layout is the architecture: each room imports only from the rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lib_lightning

PACKAGE = Path(lib_lightning.__file__).parent
# From the top down. A room is a folder, or a file of the package itself.
ROOMS = [
    ("version", "core"),
    ("metrics", "export", "schedule", "processes", "overhead"),
    ("display",),
    ("graph", "questions"),
    ("lineage",),
    ("values", "compute"),
    ("labels", "samples", "folder", "history"),
    ("ablation", "view"),
    ("watcher", "trainers"),
    ("run_extent",),
    ("run_samples", "run_layers", "run_report", "run_budget", "profiling"),
    ("callback", "trainer_cli"),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def imports(path: Path) -> list[str]:
    """Names of all modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


def test_every_file_lies_in_a_room() -> None:
    assert {room_of(path) for path in files()} == set(FLOOR)


def test_rooms_import_only_from_above() -> None:
    for path in files():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "lib_lightning":
                other = parts[1] if len(parts) > 1 else "__init__"
                assert other == room_of(path) or FLOOR[other] < FLOOR[room_of(path)], f"{path} imports {name}"


def test_mathematics_needs_torch_alone() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        foreign = {name.split(".")[0] for name in imports(path)} - {"torch", "lib_lightning"} - sys.stdlib_module_names
        assert not foreign, f"{path} imports {foreign}"


def test_few_files_know_lightning() -> None:
    knowing = {
        path.relative_to(PACKAGE).as_posix()
        for path in files()
        if any("lightning" in n.split(".")[:1] for n in imports(path))
    }
    assert knowing == {
        "callback.py",
        "cli.py",
        "display/loggers.py",
        "run_budget.py",
        "run_extent.py",
        "run_layers.py",
        "run_report.py",
        "run_samples.py",
        "trainer_cli.py",
        "trainers.py",
    }


def test_public_names_are_all_there_though_none_is_imported_before_it_is_asked_for() -> None:
    assert {name: getattr(lib_lightning, name).__name__ for name in lib_lightning.__all__ if name != "__version__"} == {
        name: name for name in lib_lightning.__all__ if name != "__version__"
    }
    assert set(lib_lightning.__all__) <= set(dir(lib_lightning))
    with pytest.raises(AttributeError, match="module 'lib_lightning' has no attribute 'LIBCallbak'"):
        _ = lib_lightning.LIBCallbak
    code = "import sys, lib_lightning; print({'torch', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_files_stay_short() -> None:
    long = {path.name: n for path in files() if (n := len(path.read_text().splitlines())) > 350}
    assert not long
