"""A trace leaves model and process as they were, also after an error, wherever it occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import trace
from lib_lightning.errors import LIBError
from tests.integration.state_check import StateCheck

LAYERS = ["0:input", "4:input", "output"]
SETTINGS: dict[str, Callable[[], Any]] = {
    "gradients": torch.is_grad_enabled,
    "inference": torch.is_inference_mode_enabled,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "warning only": torch.is_deterministic_algorithms_warn_only_enabled,
    "anomalies": torch.is_anomaly_enabled,
    "dtype": torch.get_default_dtype,
    "threads": torch.get_num_threads,
    "precision": torch.get_float32_matmul_precision,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "cudnn": lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
}


class Failure(BaseException):
    """Not an Exception, as if the user had pressed Ctrl-C."""


def model_in_use() -> nn.Sequential:
    """Partly frozen, partly in evaluation mode, with gradients, hooks and a buffer that is in no checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(8, 2))
    model.train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    model[4].register_forward_hook(lambda module, args, output: None)
    model[1].register_forward_pre_hook(lambda module, args: None)
    model(torch.randn(9, 5)).sum().backward()
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (0, 10):
        weights = {
            name: torch.randn(t.shape) if t.is_floating_point() else t + 1
            for name, t in model_in_use().state_dict().items()
        }
        weights["1.running_var"].abs_()
        torch.save(weights, folder / f"step{step}.pt")
    return folder


def loader() -> DataLoader[Any]:
    """Draws a random number from torch's global state each time it is read."""
    return DataLoader(TensorDataset(torch.randn(48, 5, generator=torch.Generator().manual_seed(1))), 16, shuffle=True)


def broken_batches() -> Iterator[Tensor]:
    yield torch.randn(16, 5)
    raise Failure


def broken_load(checkpoint: Path) -> Any:
    if "10" in str(checkpoint):
        raise Failure
    torch.manual_seed(len(str(checkpoint)))
    return torch.load(checkpoint, weights_only=True)


def broken_labeller(*_: Any) -> Any:
    raise Failure


FAILURES: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "nothing": ({}, AssertionError),
    "batches": ({"batches": broken_batches()}, Failure),
    "load": ({"load": broken_load}, Failure),
    "node layers": ({"node_layers": ["0:input", "3.none"]}, LIBError),
    "labeller": ({"labeller": broken_labeller}, Failure),
}


@pytest.mark.parametrize(
    ("what", "mode"),
    [*((what, "plain") for what in FAILURES), ("nothing", "no_grad"), ("load", "no_grad"), ("load", "deterministic")],
)
def test_model_and_process_are_as_before(what: str, mode: str, checkpoints: Path, tmp_path: Path) -> None:
    options, error = FAILURES[what]
    model = model_in_use()
    given = {"batches": loader(), "node_layers": LAYERS, "folder": tmp_path, **options}
    if mode == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.set_grad_enabled(mode != "no_grad"):
            before, settings = StateCheck(model), {name: get() for name, get in SETTINGS.items()}
            if what == "nothing":
                assert trace(model, checkpoints, **given).steps == [0, 10]
            else:
                with pytest.raises(error):
                    trace(model, checkpoints, **given)
            before.assert_same()
            assert {name: get() for name, get in SETTINGS.items()} == settings
    finally:
        torch.use_deterministic_algorithms(False)
