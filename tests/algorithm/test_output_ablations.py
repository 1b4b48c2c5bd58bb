"""Importance for the output against real ablations, on models trained on real data."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution

# Features and positions that are really set to their mean, one at a time.
_FEATURES, _PLACES = 24, 6


def trained(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for i in range(steps):
        optimizer.zero_grad()
        loss(model, i).backward()
        optimizer.step()
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data).float() / 16, torch.tensor(found.target)


def loss_on_digits(model: nn.Module, i: int) -> Tensor:
    x, y = digits()
    batch = torch.arange(64 * i, 64 * (i + 1)) % 1400
    return F.cross_entropy(model(x[batch]), y[batch])


def perceptron() -> tuple[nn.Module, Any, list[str]]:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    return trained(model, loss_on_digits, 100, 3e-3), digits()[0][1400:1500], ["1", "3", "output"]


def convolutions() -> tuple[nn.Module, Any, list[str]]:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    return trained(model, loss_on_digits, 100, 3e-3), digits()[0][1400:1500], ["2", "4", "output"]


def tokens(seed: int, n: int) -> Tensor:
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode())) % 128
    starts = torch.randint(0, len(text) - 24, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + 24] for start in starts.tolist()])


def language_model() -> tuple[nn.Module, Any, list[str]]:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=24, n_embd=32, n_layer=3, n_head=4, **options))

    def loss(model: nn.Module, i: int) -> Tensor:
        batch = tokens(i, 16)
        return F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    layers = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    return trained(model, loss, 80, 3e-3), {"input_ids": tokens(10**6, 24)}, layers


def ablated(model: nn.Module, batch: Any, graph: InteractionGraph, layer: int) -> Tensor:
    """Divergence of the predictions when a feature is at its mean at one position, for each feature, in nats."""
    instrumented = InstrumentedModel(model, as_node_layers(graph.node_layers))
    basis = graph.bases[graph.node_layers[layer]]
    distribution = OutputDistribution("categorical")
    found = []

    def predicted(replaced: dict[int, Tensor]) -> Tensor:
        output = instrumented.output(batch, replaced)
        return output if isinstance(output, Tensor) else output.logits

    with model_session(instrumented), torch.no_grad():
        a = instrumented.activations(batch)[layer]
        before, features = predicted({}), basis.encode(a.double())
        places = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(0))[:_PLACES].tolist()
        for j in range(min(basis.n_features, _FEATURES)):
            total = 0.0
            for s in places:
                moved = a.clone()
                moved[:, s] -= (features[:, s, j, None] * basis.from_features[j]).to(a)
                total += float(distribution.divergence(before, predicted({layer: moved})).sum())
            found.append(total / (len(places) * len(a)))
    return torch.tensor(found)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


@pytest.mark.parametrize("make", [perceptron, convolutions, language_model])
def test_order_of_features_is_that_of_ablations(make: Callable[[], tuple[nn.Module, Any, list[str]]]) -> None:
    model, batch, layers = make()
    graph = compute_interaction_graph(model, [batch], layers, n_probes=8, n_pushed=4)
    for layer in (0, 1):
        found = ablated(model, batch, graph, layer)
        importance = graph.bases[layers[layer]].output_importance
        assert importance is not None
        importance = importance[: len(found)]
        assert torch.corrcoef(torch.stack([ranks(found), ranks(importance)]))[0, 1] > 0.9
        # Second order: close for typical features; for the largest, the whole way is too far.
        assert 0.5 < (found / importance).median() < 2
