"""Fixtures that every test may use."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.cases import Case, all_cases
from tests.combinations import left_out
from tests.viewer.browser import browser, opened, watched

# One browser for all tests that need one.
__all__ = ["browser", "opened", "watched"]

# Tiny tensors: threads would only wait for each other, and for the other test processes.
torch.set_num_threads(1)

# A program of its own, which imports what is installed in `tox -e deepspeed` only.
collect_ignore = [] if find_spec("deepspeed") else ["deepspeed_training.py"]

# Shells start programs in the background with Ctrl-C ignored; tests of it would wait for what never comes.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """With this option, tests marked ``combinations`` are run with all of them."""
    parser.addoption("--all-combinations", action="store_true", help="all combinations of parameters, which takes long")


@pytest.hookimpl(trylast=True)  # among what was asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out combinations of values that occur in others, see `tests.combinations`, and begin with what takes long.

    Else the last file that a process is given may be one of few tests that each train a network, while the other waits.
    """
    if not config.getoption("--all-combinations"):
        without = left_out(items)
        config.hook.pytest_deselected(items=sorted(without, key=items.index))
        items[:] = [item for item in items if item not in without]
    folders = ["training", "tests"]
    items.sort(key=lambda item: [*folders, item.path.parent.name].index(item.path.parent.name))


CASES = {case.name: case for case in all_cases()}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each tiny model in turn."""
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    """A generator that is left, or left in another order, within `torch.no_grad` would switch them off for the user."""
    yield
    is_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert is_on


@pytest.fixture(autouse=True)
def _all_snapshots_are_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiny runs the overhead varies with the machine; tests of the budget undo this."""
    monkeypatch.setattr("lib_lightning.training.budget.GRACE", math.inf)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder with published results to match."""
    folder = os.environ.get("LIB_REFERENCE_DIR")
    if not folder:
        pytest.skip("LIB_REFERENCE_DIR is not set: no published results at hand to compare with")
    return Path(folder)
