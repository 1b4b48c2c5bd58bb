"""The reference has every public name."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import pytest

from lib_lightning import errors
from tests.pages import ROOT

REFERENCE = (ROOT / "docs" / "reference" / "index.md").read_text("utf-8")


def _documented() -> list[str]:
    return re.findall(r"^   ~(lib_lightning\.[\w.]+)$", REFERENCE, re.MULTILINE)


def _public_modules() -> list[str]:
    """Modules that say what is public in them."""
    found = []
    for path in sorted((ROOT / "lib_lightning").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def _object(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def test_public_modules_are_found() -> None:
    assert {"lib_lightning", "lib_lightning.metrics", "lib_lightning.viewer"} <= set(_public_modules())


@pytest.mark.parametrize("module", _public_modules())
def test_every_public_name_is_documented(module: str) -> None:
    documented = [_object(name) for name in _documented()]
    for name in import_module(module).__all__:
        value = getattr(import_module(module), name)
        assert name == "__version__" or any(value is other for other in documented), f"{module}.{name}"


def test_every_error_of_the_package_is_documented() -> None:
    mine = {x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, errors.LIBError)}
    assert mine <= {_object(name) for name in _documented() if name.startswith("lib_lightning.errors.")}


def test_nothing_is_documented_twice() -> None:
    names = _documented()
    assert len(names) == len(set(names)) == len({id(_object(name)) for name in names})


def test_what_is_documented_exists_and_says_what_it_is() -> None:
    for name in _documented():
        assert resolve_name(name.rpartition(".")[0])
        value = _object(name)
        assert (getattr(value, "__doc__", None) or "").strip(), name
