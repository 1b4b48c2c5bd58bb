"""Published ablations of the paper's authors, matched on their own trained models: about 7 minutes of CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.ablation import accuracy, edges_required, node_ablation_curve
from recipes.modular_addition import ModularAdditionTransformer
from tests.test_published import NODE_LAYERS, graph_of, published_model

# The authors' names of the node layers.
THEIRS = dict(zip(NODE_LAYERS, ["resid_pre", "resid_mid", "resid_post"], strict=False))
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=[(seed, basis) for seed in (0, 1) for basis in ("lib", "pca")], ids=str)
def run(
    request: pytest.FixtureRequest, reference_dir: Path
) -> tuple[ModularAdditionTransformer, Batches, InteractionGraph, dict[str, Any]]:
    """A model, the test split, our graph and the published numbers; in float32, which gives the same scores."""
    seed, basis = request.param
    model, data = published_model(reference_dir, seed)
    published = json.loads((reference_dir / "modular_addition_published.json").read_text())[str(seed)][basis]
    batches = list(zip(data.tokens[data.n_train :].split(1000), data.answers[data.n_train :].split(1000), strict=True))
    return model, batches, graph_of(reference_dir, seed, basis), published


@pytest.mark.combinations
@pytest.mark.parametrize("node_layer", THEIRS)
def test_node_ablations(node_layer: str, run: tuple[Any, ...]) -> None:
    model, batches, graph, published = run
    r = graph.bases[node_layer].n_features
    # Their number of features includes the constant direction. The order of the last features, which are noise, is
    # arbitrary.
    theirs = {int(m) - 1: score for m, score in published["node_ablation_accuracy"][THEIRS[node_layer]].items()}
    wanted = {min(m, r): score for m, score in theirs.items() if m >= 10}
    ours = node_ablation_curve(model, batches, graph, accuracy, node_layer, list(wanted), dtype=torch.float32)
    assert ours[r] == pytest.approx(published["unablated_accuracy"], abs=1e-9)
    assert ours == pytest.approx(wanted, abs=2e-3)


@pytest.mark.combinations
@pytest.mark.parametrize("node_layer", THEIRS)
def test_edges_required(node_layer: str, run: tuple[Any, ...]) -> None:
    model, batches, graph, published = run
    section = node_layer, NODE_LAYERS[NODE_LAYERS.index(node_layer) + 1]
    found = edges_required(model, batches, graph, accuracy, 1e-3, [section], search="bisection", dtype=torch.float32)[
        section
    ]
    assert found.unablated == pytest.approx(published["unablated_accuracy"], abs=1e-9)
    assert found.mask.sum() == found.count
    # The first section includes directions of numerical noise, which depend on the implementation.
    tolerance = 0.05 if node_layer == "embed" else 0
    assert found.count == pytest.approx(published["edges_required"][THEIRS[node_layer]], rel=tolerance, abs=0)
