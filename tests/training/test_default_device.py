"""Training where `torch.set_default_device` names another device than the model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lib_lightning import LIBCallback, compute_interaction_graph, list_node_layers
from lib_lightning.ablation import AblationPlan, edge_ablation_curve, node_ablation_curve
from lib_lightning.ablation.scores import accuracy
from lib_lightning.api import check_node_layers
from lib_lightning.lineage import FeatureTracker, reference_features
from lib_lightning.training.trainer import batches_before_training
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of

HOOKS = [
    "setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end",
    "on_validation_start", "on_validation_batch_start", "on_validation_epoch_end", "on_train_end", "state_dict",
]  # fmt: skip


class OnMeta(LIBCallback):
    """The callback with a default device that no number can be read from: the loaders of torch would fail with it."""


def on_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with that default device."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return function(*args, **kwargs)

    return run


for hook in HOOKS:
    setattr(OnMeta, hook, on_meta(getattr(LIBCallback, hook)))


class Logging(Classifier):
    """Lightning's own tensors are on the CPU: it moves what is logged from the default device to the model's."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            super().log_dict(*args, **kwargs)


def label(features: Tensor, inputs: Tensor) -> list[str]:
    return [str(j) for j in range(features.shape[-1])]


def fitted(kind: type[LIBCallback], folder: Path, **options: Any) -> tuple[LIBCallback, Classifier]:
    pl.seed_everything(3, verbose=False)
    plan = AblationPlan(accuracy, tolerance=0.1)
    callback = kind(NODE_LAYERS, every_n_steps=3, baselines=["pca"], labeller=label, ablation=plan, **options)
    model = Logging()
    trainer_of(folder, callback).fit(model)
    return callback, model


@pytest.fixture(autouse=True)
def _loaders_have_the_default_device_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a real training, where it is not changed for the hooks of the callback alone."""

    def read(*args: Any) -> list[Any]:
        with torch.device("cpu"):
            return list(batches_before_training(*args))

    monkeypatch.setattr("lib_lightning.training.samples.batches_before_training", read)


@pytest.mark.parametrize("options", [{}, {"n_probes": 2, "integration_steps": 2}, {"final_metric": "fisher"}])
def test_training_is_the_same_with_another_default_device(options: dict[str, Any], tmp_path: Path) -> None:
    expected, model = fitted(LIBCallback, tmp_path / "cpu", **options)
    callback, same = fitted(OnMeta, tmp_path / "meta", **options)
    assert callback.snapshots == expected.snapshots > 2
    clock = ("seconds", "overhead")
    for (key, value), (other, reference) in zip(
        callback.state.scalars.items(), expected.state.scalars.items(), strict=True
    ):
        assert key == other
        assert key.endswith(clock) or value == reference or (value != value and reference != reference)
    assert callback.state.events == expected.state.events
    assert callback.graph is not None
    assert callback.graph.labels
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert len(list((tmp_path / "meta").rglob("*.safetensors"))) == len(list((tmp_path / "cpu").rglob("*.safetensors")))


def test_functions_without_a_trainer() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(60, 4)
    batches = [(x, torch.zeros(60, dtype=torch.int64))]
    layers = ["input", "1", "output"]
    expected = compute_interaction_graph(model, batches, layers)
    with torch.device("meta"):
        check_node_layers(model, x, layers)
        assert [cut.tap for cut in list_node_layers(model, x)] == ["input", "0", "1", "output"]
        graph = compute_interaction_graph(model, batches, layers)
        for pair, edges in expected.edges.items():
            assert torch.equal(graph.edges[pair], edges)
        tracker = FeatureTracker()
        for step in range(2):
            graph.reference_features = reference_features(graph, model, batches)
            tracker.update(graph, step)
        assert graph.measure() == expected.measure()
        graph.plot()
        graph.to_networkx()
        assert node_ablation_curve(model, batches, graph, accuracy, "1")
        assert edge_ablation_curve(model, batches, graph, accuracy, ("1", "output"))
