"""The signs of features: whichever an eigensolver returns, a lineage keeps its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lib_lightning import Basis, InteractionGraph, LIBCallback, compute_interaction_graph
from lib_lightning.algorithm import wide_layers
from lib_lightning.lineage import FeatureTracker
from lib_lightning.lineage.reference import reference_features
from lib_lightning.lineage.signs import reverse_features
from lib_lightning.viewer import Run
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of


def with_random_signs(solve: Callable[..., Basis], num_unchanged: int) -> Callable[..., Basis]:
    """An eigensolver that returns features with other signs, from some call on."""
    g, calls = torch.Generator().manual_seed(0), 0

    def solved(*args: Any) -> Basis:
        nonlocal calls
        calls += 1
        basis = solve(*args)
        sign = 2.0 * torch.randint(0, 2, (basis.n_features,), generator=g) - 1
        if calls <= num_unchanged:
            return basis
        return Basis(
            basis.name, basis.kind, basis.mean, basis.to_features * sign, basis.from_features * sign[:, None],
            basis.importance,
        )  # fmt: skip

    return solved


def largest_at(features: Tensor, inputs: Tensor) -> list[str]:
    """A name that depends on the sign."""
    return [f"largest at {i}" for i in features[:, 0].argmax(0).tolist()]


def snapshots_of(folder: Path) -> dict[int, InteractionGraph]:
    callback = LIBCallback(
        node_layers=NODE_LAYERS,
        every_n_steps=6,
        dtype="float64",
        labeller=largest_at,
        causal_every=0,
        max_overhead=math.inf,
    )
    pl.seed_everything(0, verbose=False)
    trainer_of(folder, callback, num_sanity_val_steps=0).fit(Classifier())
    run = Run(folder)
    return {step: run.graph(step) for step in run.steps}


def test_a_run_is_the_same_whichever_signs_the_eigensolver_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = snapshots_of(tmp_path / "one")
    # Those of the first snapshot are free: one basis of each node layer but the last one.
    monkeypatch.setattr(wide_layers, "lib_basis", with_random_signs(wide_layers.lib_basis, 2))
    found = snapshots_of(tmp_path / "other")
    assert list(found) == list(expected) == [0, 6, 12]
    for step, graph in found.items():
        assert graph.labels == expected[step].labels != {}
        for layer, basis in graph.bases.items():
            for name in ("bases", "examples", "output_effects", "lineages"):
                if layer not in getattr(graph, name):  # the output has no effects on itself
                    continue
                one, other = getattr(graph, name)[layer], getattr(expected[step], name)[layer]
                for field in fields(one):
                    if isinstance(value := getattr(one, field.name), Tensor) and not field.name.startswith("histogram"):
                        torch.testing.assert_close(
                            value, getattr(other, field.name), rtol=1e-4, atol=1e-6, equal_nan=True
                        )
            if basis.kind == "lib" and step:
                before, now = found[step - 6], graph
                values = [g.reference_features[layer].double() for g in (before, now)]
                ids = [g.lineages[layer].ids.tolist() for g in (before, now)]
                for lineage in set(ids[0]) & set(ids[1]):
                    a, b = (x[:, own.index(lineage)] for x, own in zip(values, ids, strict=True))
                    assert a @ b > 0
        for section, A in graph.attributions.items():
            torch.testing.assert_close(A, expected[step].attributions[section], rtol=1e-6, atol=1e-9)


def test_a_reversed_feature_is_reversed_everywhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4))
    x = torch.randn(40, 2, 12, dtype=torch.float64)
    graph, expected = (
        compute_interaction_graph(model.double(), [x, x[:3]], ["0", "output"], final_basis="neuron") for _ in range(2)
    )
    graph.reference_features = reference_features(graph, model, [x])
    before = graph.reference_features["0"]
    which = torch.arange(graph.bases["0"].n_features) % 2 == 1
    reverse_features(graph, "0", which)
    sign = torch.where(which, -1.0, 1.0).double()
    a = model[0](x).transpose(1, 2)
    fhat = graph.bases["0"].encode(a)
    assert torch.equal(fhat, expected.bases["0"].encode(a) * sign)
    torch.testing.assert_close(graph.bases["0"].decode(fhat), expected.bases["0"].decode(fhat * sign))
    assert torch.equal(graph.reference_features["0"], before * sign.half())
    examples = graph.examples["0"]
    rows = torch.cat([fhat, fhat[:3]])
    for j in range(len(which)):
        samples, positions = examples.samples[j].long(), examples.positions[j].long()
        assert torch.equal(examples.values[j], rows[samples, positions, j].float())
        largest, smallest, spread = examples.values[j].split(list(examples.counts))
        assert torch.equal(largest.double(), rows[..., j].amax(1).sort(descending=True).values[:6].float().double())
        assert torch.equal(smallest.double(), rows[..., j].amin(1).sort().values[:6].float().double())
        assert torch.equal(spread, spread.sort(descending=True).values)
        around = examples.context[j][:, examples.before]
        torch.testing.assert_close(around.float(), examples.values[j], rtol=1e-3, atol=1e-3)
        counts = torch.histc(rows[..., j] / examples.bin_width[j], 64, -32, 32)
        assert torch.equal(examples.histogram[j], counts.long())
    effects, others = graph.output_effects["0"], expected.output_effects["0"]
    k = effects.outputs.shape[1] // 2
    for j in which.nonzero().flatten().tolist():
        assert torch.equal(effects.outputs[j, :k], others.outputs[j, k:])
        torch.testing.assert_close(effects.changes[j, :k], -others.changes[j, k:], equal_nan=True)
        torch.testing.assert_close(effects.errors[j, k:], others.errors[j, :k], equal_nan=True)
    for part in ("outputs", "changes", "errors"):
        torch.testing.assert_close(getattr(effects, part)[~which], getattr(others, part)[~which], equal_nan=True)


def test_neurons_keep_the_sign_of_activations() -> None:
    model, tracker = nn.Linear(3, 2), FeatureTracker()
    x = torch.randn(60, 3)
    for step, weight in enumerate((model.weight.detach().clone(), -model.weight.detach())):
        model.weight.data = weight
        graph = compute_interaction_graph(model, [x], ["input", "output"], basis="neuron")
        graph.reference_features = reference_features(graph, model, [x])
        tracker.update(graph, step)
        assert torch.equal(graph.bases["output"].to_features, torch.eye(2, dtype=torch.float64))
