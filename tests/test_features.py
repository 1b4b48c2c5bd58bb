"""Values of features on reference samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.lineage import match_features
from lib_lightning.lineage.reference import reference_features
from lib_lightning.model.batch import hash_batches


class Sequences(nn.Module):
    """A model that maps each position separately and returns the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))[:, -1]


def graph_of(model: nn.Module, batches: list[Any], **options: Any) -> InteractionGraph:
    return compute_interaction_graph(model, batches, ["up", "output"], dtype=torch.float64, **options)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Sequences().double()


def test_reference_values_are_standardised_features(model: nn.Module) -> None:
    batches = [torch.randn(30, 4, 3).double(), torch.randn(20, 4, 3).double()]
    graph = graph_of(model, batches)
    found = reference_features(graph, model, batches, count=10**6)
    with torch.no_grad():
        values = torch.cat([graph.bases["up"].encode(model.up(x)).flatten(0, 1) for x in batches])
        logits = torch.cat([model(x) for x in batches])
    for name, expected in (("up", values), ("output", logits)):
        assert found[name].dtype == torch.float16
        assert found[name].shape == expected.shape
        scaled = (expected - expected.mean(0)) / expected.std(0, correction=0)
        torch.testing.assert_close(found[name], scaled.half(), rtol=2e-3, atol=1e-5)  # rounding of float16


def test_the_seed_determines_which_positions_are_sampled(model: nn.Module) -> None:
    batches = [torch.randn(30, 40, 3).double(), torch.randn(20, 7, 3).double()]
    graph = graph_of(model, batches)
    few = reference_features(graph, model, batches, seed=3, count=150)
    assert {name: tuple(x.shape) for name, x in few.items()} == {"up": (150, few["up"].shape[1]), "output": (50, 2)}
    again = reference_features(graph, model, batches, seed=3, count=150)
    other = reference_features(graph, model, batches, seed=4, count=150)
    assert all(torch.equal(few[name], again[name]) for name in few)
    assert not torch.equal(few["up"], other["up"])


def test_the_global_random_state_is_unchanged(model: nn.Module) -> None:
    batches = [torch.randn(30, 4, 3).double()]
    graph = graph_of(model, batches)
    before = torch.get_rng_state()
    reference_features(graph, model, batches)
    assert torch.equal(before, torch.get_rng_state())


def test_padding_is_excluded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(40, 6, 3).double()
    there = torch.arange(6) < torch.randint(1, 7, (40, 1))
    options: dict[str, Any] = {"mask": 1}
    graph = compute_interaction_graph(model, [(x, there)], ["input", "output"], **options)
    found = reference_features(graph, model, [(x.where(there[..., None], 99.0), there)], count=10**6, **options)
    assert len(found["input"]) == there.sum()
    plain = graph.bases["input"].encode(x[there])
    scaled = (plain - plain.mean(0)) / plain.std(0, correction=0)
    torch.testing.assert_close(found["input"], scaled.half(), rtol=2e-3, atol=1e-5)


def test_features_match_after_a_rotation_of_hidden_units(model: nn.Module) -> None:
    """A rotation of the hidden units changes the weights but not the features."""
    batches = [torch.randn(200, 4, 3).double()]
    linear = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()
    Q = torch.linalg.qr(torch.randn(5, 5).double()).Q
    turned = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()
    with torch.no_grad():
        turned[0].weight.copy_(Q @ linear[0].weight)
        turned[0].bias.copy_(Q @ linear[0].bias)
        turned[1].weight.copy_(linear[1].weight @ Q.T)
        turned[1].bias.copy_(linear[1].bias)
    values = []
    for network in (linear, turned):
        layers = [NodeLayer(["0"], name="hidden"), "output"]
        graph = compute_interaction_graph(network, batches, layers)
        values.append(reference_features(graph, network, batches)["hidden"])
    match = match_features(*values)
    assert match.before.tolist() == [0, 1]
    torch.testing.assert_close(match.similarity, torch.ones(2).double(), rtol=0, atol=1e-5)  # half precision


class Two(ProcessGroup):
    """Process 0 of two; process 1 has the same values with opposite signs."""

    size = 2

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, -tensor if tensor.is_floating_point() else tensor]


def test_values_of_all_processes(model: nn.Module) -> None:
    batches = [torch.randn(30, 4, 3).double()]
    graph = graph_of(model, batches)
    found = reference_features(graph, model, batches, count=120, process_group=Two())["up"]
    alone = graph.bases["up"].encode(model.up(batches[0]).detach())
    assert found.shape == (120, alone.shape[-1])  # two of four positions of 60 samples
    torch.testing.assert_close(found[:60], -found[60:])
    assert hash_batches(batches, Two()) != hash_batches(batches)


def test_no_samples(model: nn.Module) -> None:
    graph = graph_of(model, [torch.randn(30, 4, 3).double()])
    with pytest.raises(LIBError, match="no reference samples"):
        reference_features(graph, model, [])


def test_hashes_differ_between_samples() -> None:
    batch = {"x": torch.arange(6).reshape(2, 3), "mask": torch.tensor([True, False]), "half": torch.ones(2).bfloat16()}
    same = {key: t.clone() for key, t in batch.items()}
    assert hash_batches([batch]) == hash_batches([same])
    assert hash_batches([batch]) != hash_batches([batch | {"x": batch["x"].reshape(3, 2)}])
    assert hash_batches([batch]) != hash_batches([batch | {"mask": ~batch["mask"]}])
    assert hash_batches([batch]) != hash_batches([batch, batch])
