"""Inputs and weights that leave no features: a sentence says so, and training and tracking go on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph
from lib_lightning.ablation import AblationPlan
from lib_lightning.ablation.scores import accuracy
from lib_lightning.errors import ActivationError
from lib_lightning.io.basis_format import NOTES
from lib_lightning.viewer.run import Run, write_film
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of

LAYERS = ["input", "1", "output"]
INPUTS = {
    "ordinary": torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    "one sample": torch.ones(1, 4),
    "zero": torch.zeros(24, 4),
    "constant": torch.full((24, 4), 1e4 / 3),
}


def mlp(zero: list[int], dead: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for layer in zero:
        nn.init.zeros_(model[layer].weight)
    if dead:
        nn.init.constant_(model[0].bias, -1e6)
    return model


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.sampled_from(list(INPUTS)),
    zero=st.lists(st.sampled_from([0, 2]), unique=True),
    dead=st.booleans(),
    splits=st.sampled_from([1, 5, 24]),
    options=st.sampled_from(
        [
            {},
            {"basis": "pca"},
            {"basis": "neuron"},
            {"final_metric": "fisher", "output_distribution": "categorical"},
            {"n_probes": 2},
            {"dtype": torch.float64},
        ]
    ),
)
def test_a_graph_is_never_empty_without_a_word(
    inputs: str, zero: list[int], dead: bool, splits: int, options: dict[str, Any]
) -> None:
    batches, model = list(INPUTS[inputs].split(splits)), mlp(zero, dead)
    if inputs != "ordinary":
        sentence = "There is one sample" if inputs == "one sample" else "the same for all 24 samples"
        with pytest.raises(ActivationError, match=sentence) as error:
            compute_interaction_graph(model, batches, LAYERS, **options)
        assert ("zero at 'input'" in str(error.value)) == (inputs == "zero")
        return
    graph = compute_interaction_graph(model, batches, LAYERS, **options)
    empty = [name for name, basis in graph.bases.items() if not (basis.importance > 0).any()]
    notes = " ".join(graph.info[NOTES])
    assert all(f"'{name}'" in notes for name in empty)
    assert bool(zero or dead) == bool(notes)
    assert all(bool(torch.isfinite(E).all()) for E in graph.edges.values())
    assert not any(value != value for value in graph.measure().values())
    graph.plot(), graph.plot_spectrum(), graph.to_networkx(), graph.find_modules()


def test_wide_layers_without_a_covariance_matrix() -> None:
    model = nn.Sequential(nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 2))
    with pytest.raises(ActivationError, match="'1', 'output' are the same for all 24 samples"):
        compute_interaction_graph(model, [INPUTS["constant"]], LAYERS)
    nn.init.zeros_(model[2].weight)
    graph = compute_interaction_graph(model, [INPUTS["ordinary"]], LAYERS)
    assert any("'input', '1': activations vary" in note for note in graph.info[NOTES])


def test_one_sample_with_several_positions_varies() -> None:
    graph = compute_interaction_graph(mlp([], False), [torch.randn(1, 9, 4)], LAYERS)
    assert graph.bases["input"].n_features == 4
    last = [NodeLayer([tap], positions=-1) for tap in ("input", "output")]
    with pytest.raises(ActivationError, match="There is one sample"):
        compute_interaction_graph(nn.Linear(4, 2), [torch.randn(1, 9, 4)], last)


def label(features: Tensor, inputs: Tensor) -> list[str]:
    return [f"{j}" for j in range(features.shape[-1])]


class ZeroHead(Classifier):
    """A head of zeros, as models for regression and residual branches often have; it learns from the first step on."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.net[4].weight)


class Dead(Classifier):
    """A network that never becomes alive."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.net.parameters():
            nn.init.zeros_(parameter)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fitted(model: Classifier, folder: Path) -> LIBCallback:
    pl.seed_everything(0, verbose=False)
    plan = AblationPlan(accuracy)
    callback = LIBCallback(
        NODE_LAYERS, every_n_steps=4, baselines=["pca", "neuron"], labeller=label, ablation=plan, adaptive=True
    )
    trainer_of(folder, callback).fit(model)
    return callback


def test_a_head_of_zeros_is_followed_and_features_are_born(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lib_lightning"):
        callback = fitted(ZeroHead(), tmp_path)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lib_lightning")]
    assert len([m for m in messages if "activations vary, but the next node layer does not depend" in m]) == 1
    assert not any("failed" in m for m in messages)
    assert callback.snapshots == 4
    first, second, *_ = (InteractionGraph.load(file) for file in sorted((tmp_path / "lib/snapshots").iterdir()))
    assert first.bases["net.0:input"].n_features == first.bases["net.4:input"].n_features == 0
    born = {(event.layer, event.lineage) for event in callback.state.events if event.kind == "born" and event.step == 4}
    reported = {
        (name, int(i))
        for name in NODE_LAYERS[:2]
        for i, share in zip(
            second.lineages[name].ids, second.bases[name].importance / second.bases[name].importance.sum(), strict=True
        )
        if share >= 0.01
    }
    assert born == reported != set()
    assert (tmp_path / "lib" / "timeline.png").exists()
    assert write_film([Run(tmp_path)]).exists()


def test_a_dead_network_never_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lib_lightning"):
        callback = fitted(Dead(), tmp_path)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lib_lightning")]
    assert callback.snapshots == 4
    assert sum("'output' are the same for all" in m for m in messages) >= 1
    assert len(messages) == len(set(messages))
    assert callback.state.scalars["lib/features/total"] == 0
    assert write_film([Run(tmp_path)]).exists()
