"""Every name on the page about the architecture exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*\.[A-Za-z_]+(?:\.[a-z_]+)?)`", PAGE)) - {"torch.nn.Module"})


def resolve(name: str) -> Any:
    """The object of a dotted name inside the package."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(["lib_lightning", *parts[:k]]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("lib_lightning")])
def test_names_exist(name: str) -> None:
    assert resolve(name) is not None


def test_paths_exist() -> None:
    for path in re.findall(r"`(viewer/[a-z/_.]+)`", PAGE):
        assert (ROOT / "lib_lightning" / path).exists()
    for path in re.findall(r"`(tests/[a-z/_.]+)`", PAGE):
        assert (ROOT / path).exists()


def test_all_ways_are_there() -> None:
    assert len(NAMES) > 25
    assert PAGE.count("\n## From ") == 7
