"""The likelihood of labels as a score, wherever the labels are; and effects that are kept in a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.interventions import MEAN, edit_features, feature_effects, keep_effects


class Step(pl.LightningModule):
    """A network with a validation step of one's own."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self, batch)


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).cumsum(1)
        out: Tensor = self.head(torch.tanh(self.mix(h)))
        return out


def next_token(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch)
    return F.cross_entropy(logits[:, :-1].reshape(-1, 7), batch[:, 1:].reshape(-1))


def log_p(z: Tensor, labels: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


x, classes = torch.linspace(-2, 2, 48).sin().reshape(12, 4), torch.arange(12) % 3
tokens = (torch.arange(60).reshape(12, 5) ** 2) % 7
ignored = torch.where(torch.arange(60).reshape(12, 5) % 4 == 0, 0, tokens)
answers, numbers = (torch.arange(24).reshape(12, 2) % 2).float(), torch.arange(12.0)[:, None]
# Model, batch, node layers, and scores by hand from the output.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[str], Callable[[Tensor], Tensor]]] = {
    "labels in the batch": (lambda: network(3), (x, classes), ["1", "output"], lambda z: log_p(z, classes)),
    "a step": (
        lambda: Step(network(3), lambda model, batch: nn.CrossEntropyLoss()(model(batch["x"]), batch["y"])),
        {"x": x, "y": classes}, ["network.1", "output"], lambda z: log_p(z, classes),
    ),
    "log-probabilities": (
        lambda: Step(network(3), lambda m, batch: F.nll_loss(F.log_softmax(m(batch[0]), 1), batch[1])),
        (x, classes), ["network.1", "output"], lambda z: log_p(z, classes),
    ),
    "the next token": (
        lambda: Step(Tokens(), next_token), tokens, ["network.embed", "network.mix", "output"],
        lambda z: log_p(z[:, :-1], tokens[:, 1:]).mean(1),
    ),
    "padding": (
        lambda: Step(Tokens(), lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1], ignore_index=0)),
        (tokens, ignored), ["network.embed", "network.mix", "output"],
        lambda z: (log_p(z, ignored) * (ignored != 0)).sum(1) / (ignored != 0).sum(1),
    ),
    "answers": (
        lambda: Step(network(2), lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1])),
        (x, answers), ["network.1", "output"],
        lambda z: -F.binary_cross_entropy_with_logits(z, answers.to(z), reduction="none").sum(1),
    ),
    "numbers": (
        lambda: Step(network(1), lambda m, b: F.mse_loss(m(b[0]).squeeze(1), b[1].squeeze(1))),
        (x, numbers), ["network.1", "output"], lambda z: -(z - numbers)[:, 0].square() / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equal_to_scores_by_hand(name: str) -> None:
    make, batch, layers, by_hand = CASES[name]
    model = make().double().eval()
    batch = (
        {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        if isinstance(batch, dict)
        else (tuple(t.double() if t.is_floating_point() else t for t in batch) if isinstance(batch, tuple) else batch)
    )
    graph = compute_interaction_graph(model, [batch], layers, effort="exact")
    found = feature_effects(model, [batch], graph)
    inputs = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
    with torch.no_grad():
        before = by_hand(model(inputs))
        for feature, effect in found.items():
            with edit_features(model, graph, {feature: MEAN}):
                d = by_hand(model(inputs)) - before
            assert effect.change == pytest.approx(float(d.mean()), abs=1e-10)
            assert effect.error == pytest.approx(float(d.std() / len(d) ** 0.5), abs=1e-9)


def test_a_language_model_that_computes_its_own_loss() -> None:
    config = GPT2Config(vocab_size=7, n_positions=5, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    batch = {"input_ids": tokens, "labels": tokens}
    graph = compute_interaction_graph(model, [batch], ["transformer.wte", "transformer.h.0", "lm_head:input"])
    found = feature_effects(model, [batch], graph, features=["lm_head:input/0"])["lm_head:input/0"]
    with torch.no_grad():
        before = log_p(model(tokens).logits[:, :-1], tokens[:, 1:]).mean(1)
        with edit_features(model, graph, {"lm_head:input/0": MEAN}):
            d = log_p(model(tokens).logits[:, :-1], tokens[:, 1:]).mean(1) - before
    assert found.change == pytest.approx(float(d.mean()), abs=1e-10)


def test_no_labels() -> None:
    model = network(3)
    graph = compute_interaction_graph(model, [x], ["1", "output"])
    with pytest.raises(LIBError, match="labels of the batch are not known"):
        feature_effects(model, [x], graph)


def test_effects_are_kept_in_the_file_of_a_graph(tmp_path: Path) -> None:
    model = network(3)
    graph = compute_interaction_graph(model, [(x, classes)], ["1", "output"])
    effects = feature_effects(model, [(x, classes)], graph, features=["1/0", "1/2"])
    keep_effects(graph, effects, score="log_likelihood", samples=12)
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    assert list(loaded.effects) == ["1"]
    of_layer = loaded.effects["1"]
    assert float(of_layer.changes[0]) == effects["1/0"].change
    assert float(of_layer.errors[2]) == effects["1/2"].error
    assert of_layer.changes.isnan().tolist() == [False, True, False, *[True] * (len(of_layer.changes) - 3)]
    assert not of_layer.significant[1]
    assert loaded.info["causal"] == {"score": "log_likelihood", "samples": 12, "features": 2}
