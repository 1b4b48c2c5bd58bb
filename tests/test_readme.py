"""The examples of the README run."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from lib_lightning.training.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run_python_blocks() -> None:
    """Run the examples, each in the names of those before it."""
    names = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 5
    run_python_blocks()
    assert (tmp_path / "graph.safetensors").exists()


def test_quick_start_is_two_lines_which_continuous_integration_runs() -> None:
    first, second = blocks("bash")[0].splitlines()
    assert first.endswith("lib-lightning fit --config recipes/modular_addition.yaml")
    assert second.endswith("tox")
    assert "quick_start" in (ROOT / ".ci" / "run").read_text()


def split_at(separator: str, words: list[str]) -> list[list[str]]:
    """Commands that are written in one line."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def test_other_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks()
    commands = [shlex.split(line, comments=True) for block in blocks("bash")[1:] for line in block.splitlines()]
    commands = [part for command in commands for part in split_at("&&", command)]
    assert commands
    for program, *args in commands:
        if program == "python":
            # Run by tests of its own; here, that it can be.
            option, module = args[:2]
            assert option == "-m"
            path = ROOT / module.replace(".", "/")
            program_file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert 'if __name__ == "__main__":' in program_file.read_text()
            if args[2:]:
                with pytest.raises(SystemExit) as stopped:
                    importlib.import_module(f"{module}.__main__" if path.is_dir() else module).main([*args[2:], "-h"])
                assert stopped.value.code == 0
            continue
        if program == "pip":
            extras = re.findall(r"\[(\w+)\]", " ".join(args))
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
            continue
        assert program == "lib-lightning"
        if args[0] in ("fit", "validate"):
            # Recipes are run by tests of their own; here, that the options exist.
            monkeypatch.chdir(ROOT)
            with pytest.raises(SystemExit) as stopped:
                main([*args, "--print_config"])
            assert stopped.value.code == 0
            monkeypatch.chdir(tmp_path)
        elif args[0] in ("nodes", "profile", "estimate"):
            monkeypatch.chdir(ROOT)
            main(args)
            monkeypatch.chdir(tmp_path)
        else:
            main(args)


def test_files_and_pictures_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_what_it_works_with_is_shown_by_tests_that_exist() -> None:
    section = README.split("## What it works with")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows]
    files = [re.findall(r"`(tests/[\w/]+\.py)`", row.rsplit("|", 2)[1]) for row in rows]
    headings = ("| models |", "| trainers |")
    for row, functions, modules in zip(rows, tests, files, strict=True):
        assert functions or modules or row.startswith(headings), row
        assert all(f"def {function}(" in source for function in functions), row
        assert all((ROOT / module).exists() for module in modules), row
