"""Runs the examples of a page: its Python blocks in one namespace, in order; its commands as far as a test can."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lib_lightning.training.cli import main

ROOT = Path(__file__).parents[1]


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def run_python_blocks(page: Path, **names: Any) -> dict[str, Any]:
    """Run the examples of a page, each with the names of those before it."""
    namespace = {"__name__": "page", **names}
    for block in blocks(page, "python"):
        exec(compile(block, str(page.relative_to(ROOT)), "exec"), namespace)
    return namespace


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page, one after another, also where a line has several."""
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            for part in " ".join(shlex.quote(word) for word in shlex.split(line, comments=True)).split(" '&&' "):
                if part:
                    yield shlex.split(part)


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Go somewhere else for a while."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def exits(function: Any, args: list[str]) -> None:
    """The function ends the program, without an error."""
    with pytest.raises(SystemExit) as stopped:
        function(args)
    assert stopped.value.code in (0, None)


def check_command(program: str, *args: str) -> None:
    """Run a command, or, where that takes long or needs what is not there, see that its program and options exist."""
    if program == "python":
        # Run by tests of its own.
        option, module = args[:2]
        assert option == "-m"
        path = ROOT / module.replace(".", "/")
        program_file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__":' in program_file.read_text()
        if args[2:]:
            exits(importlib.import_module(f"{module}.__main__" if path.is_dir() else module).main, [*args[2:], "-h"])
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(args))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        for option, file in itertools.pairwise(args):
            assert option not in ("-c", "-r") or (ROOT / file).exists()
    else:
        assert program == "lib-lightning"
        if args[0] in ("fit", "validate"):
            # Recipes are run by tests of their own.
            with working_directory(ROOT):
                exits(main, [*args, "--print_config"])
        elif args[0] in ("nodes", "profile", "estimate"):
            with working_directory(ROOT):
                main(list(args))
        elif args[0] in ("trace", "align"):
            # The trainings are the reader's.
            exits(main, [*args, "-h"])
        else:
            main(list(args))
