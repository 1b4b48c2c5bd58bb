"""Errors for people: every refusal is one of this package, and short; where nothing catches it, it is all one sees."""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import math
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lib_lightning
from lib_lightning import LIBCallback
from lib_lightning.ablation import AblationPlan
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.errors import LIBError, SettingError, on_screen, quoted
from tests.tiny_training import NODE_LAYERS

PACKAGE = Path(lib_lightning.__file__).parent
# Errors of Python that say something to Python or to a programmer, never to a user.
INTERNAL = {"AttributeError", "AssertionError", "NotImplementedError"}
# Caught by a function of the package, which says more: which file it read, or how it called a model.
CAUGHT = {"graph.py", "viewer/comparisons.py", "viewer/snapshot.py", "model/calls.py", "model/steps.py"}
# Characters of the fixed parts of a message: four lines of a hundred, with room for names.
LONGEST = 360


def raised(path: Path) -> list[tuple[str, int]]:
    """Names of the classes that a module raises, with the lengths of the fixed parts of their messages."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            texts = [x.value for x in ast.walk(node.exc) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            found.append((node.exc.func.id, sum(map(len, texts))))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_refusals_are_errors_of_this_package_and_short(path: Path) -> None:
    for name, length in raised(path):
        kind = getattr(builtins, name, None)
        of_python = isinstance(kind, type) and issubclass(kind, Exception) and name not in INTERNAL
        assert not of_python or str(path.relative_to(PACKAGE)) in CAUGHT, f"{name} in {path}"
        assert length <= LONGEST, f"a message of {length} characters in {path}"


@settings(max_examples=200)
@given(st.text(max_size=3000), st.integers(1, 400))
def test_an_error_takes_at_most_five_lines(text: str, names: int) -> None:
    for error in (LIBError(text), LIBError(f"no module {quoted(map(str, range(names)))}. {text}")):
        lines = on_screen(error)
        assert 1 <= len(lines) <= 5
        assert all(len(line) <= 200 and "\n" not in line for line in lines)
    assert len(quoted(map(str, range(names)))) < 100


SCRIPT = """
import sys
import torch
from torch import nn
from lib_lightning import compute_interaction_graph

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) + {}["the user's mistake"]

layers = {"layer": ["fx", "output"], "forward": ["fc", "output"]}[sys.argv[1]]
compute_interaction_graph(Net(), [torch.ones(8, 4)], layers)
"""


def run_script(folder: Path, *args: str, **environment: str) -> list[str]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    path = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "", **environment}
    done = subprocess.run([sys.executable, script, *args], env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_a_script_ends_with_the_sentence_and_the_line_of_the_user(tmp_path: Path) -> None:
    lines = run_script(tmp_path, "layer")
    assert len(lines) <= 5
    assert lines[0].startswith("NodeLayerError: Net has no module 'fx' (node layer 'fx'). Near matches: 'fc'")
    assert f"{tmp_path.name}/train.py, line 16: compute_interaction_graph(Net()" in lines[-1]


def test_tracebacks_on_request(tmp_path: Path) -> None:
    lines = run_script(tmp_path, "layer", LIB_LIGHTNING_TRACEBACK="1")
    assert lines[0] == "Traceback (most recent call last):"
    assert len(lines) > 5


def test_other_errors_and_other_hooks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def reporter(*args: Any) -> None:
        """A crash reporter."""

    monkeypatch.setattr(sys, "excepthook", reporter)
    LIBError("x")
    assert sys.excepthook is reporter
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    LIBError("x")
    assert sys.excepthook is not sys.__excepthook__
    shown: list[Any] = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *args: shown.append(args[1]))
    other = ValueError("not ours")
    sys.excepthook(ValueError, other, None)
    assert shown == [other]


def test_notebooks_show_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SettingError) as info:
        LIBCallback(NODE_LAYERS, rtol=7)
    lines = info.value._render_traceback_()
    assert lines[0] == "SettingError: rtol must be at least 0 and less than 1; got 7."
    assert "test_errors.py, line" in lines[-1]
    with caplog.at_level(logging.DEBUG, logger="lib_lightning"):
        assert info.value._render_traceback_() == traceback.format_exception(info.value)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 9), max_size=3),
)
CALLBACK_SETTINGS = sorted(set(inspect.signature(LIBCallback).parameters) - {"node_layers"})
# Without a limit is a limit that can be wanted.
MAY_BE_INFINITE = {"max_overhead", "memory_limit"}


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from(CALLBACK_SETTINGS), value=ANYTHING)
def test_any_value_of_a_setting_is_taken_or_refused_in_a_sentence(name: str, value: object) -> None:
    try:
        LIBCallback(**{"node_layers": NODE_LAYERS, name: value})  # type: ignore[arg-type]
    except LIBError as error:
        said = str(error)
    else:
        said = ""
    assert not said or 20 < len(said) < 400


@pytest.mark.parametrize("name", CALLBACK_SETTINGS)
def test_no_setting_takes_just_anything(name: str) -> None:
    for value in (math.inf, math.nan, object()):
        if not (value == math.inf and name in MAY_BE_INFINITE):
            with pytest.raises(LIBError, match=r"(?s)^.{20,400}$"):
                LIBCallback(**{"node_layers": NODE_LAYERS, name: value})  # type: ignore[arg-type]


@settings(deadline=None, max_examples=200)
@given(
    values=st.dictionaries(
        st.sampled_from(["rtol", "n_probes", "integration_steps", "basis", "final_metric"]), ANYTHING
    ),
    plan=st.dictionaries(st.sampled_from(["score", "tolerance", "every_n_snapshots"]), ANYTHING),
)
def test_settings_without_a_trainer(values: dict[str, Any], plan: dict[str, Any]) -> None:
    for make, options in ((LIBConfig, values), (AblationPlan, plan)):
        try:
            make(**options)
        except LIBError as error:
            said = str(error)
        else:
            said = "accepted"
        assert said
