"""Labels of synthetic features, of features of a model, and of the models published with the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.labels.fourier import FeatureLabel, FourierLabels
from lib_lightning.labels.labeller import label_features
from lib_lightning.metrics import fourier_variance
from recipes.modular_addition import AllPairs, ModularAdditionTransformer
from tests.test_published import MODULUS, load_transformer


def wave(m: Tensor, k: int, modulus: int) -> Tensor:
    return torch.cos(2 * math.pi * k * m / modulus + 0.5)


@pytest.mark.parametrize("modulus", [2, 3, 12, 59])
def test_kinds(modulus: int) -> None:
    tokens = AllPairs(modulus).tokens
    a, b, k = tokens[:, 0], tokens[:, 1], modulus // 2
    waves = [wave(m, k, modulus) for m in (a + b, a, b)]
    mixed = 5 * wave(a, k, modulus) + 4 * wave(b, k, modulus)
    uneven = 9 * wave(a, k, modulus) + wave(b, k, modulus)
    features = torch.stack([*waves, mixed, uneven, torch.ones_like(waves[0])], -1)[:, None]
    labels = FourierLabels(modulus)
    assert labels(features, tokens) == [
        f"k={k} a+b 100%", f"k={k} a 100%", f"k={k} b 100%", f"k={k} a,b 100%", f"k={k} a 99%", "",
    ]  # fmt: skip
    swapped = FourierLabels(modulus, first=-2, second=-3)
    assert [x.kind for x in swapped.of(features, tokens)[:5]] == ["a+b", "b", "a", "a,b", "b"]


def test_threshold_and_explained_variance() -> None:
    tokens = AllPairs(11).tokens
    feature = wave(tokens[:, :2].sum(1), 3, 11) * 2 + wave(tokens[:, 0], 5, 11)
    labels = FourierLabels(11, threshold=0.81)
    assert labels(feature[:, None, None], tokens) == [""]
    (found,) = labels.of(feature[:, None, None], tokens)
    assert (found.frequency, found.kind) == (3, "a+b")
    assert found.explained == pytest.approx(0.8)
    assert str(FeatureLabel(17, "a+b", 0.931)) == "k=17 a+b 93%"
    for options in ({"modulus": 1}, {"modulus": 5, "threshold": 1.5}):
        with pytest.raises(ValueError, match=r"modulus|threshold"):
            FourierLabels(**options)
    for inputs in (tokens[:, :1], torch.zeros(len(tokens)), tokens[:, None]):
        with pytest.raises(LIBError, match="modular addition"):
            labels(feature[:, None, None], inputs)


def transformer_graph(**options: Any) -> tuple[ModularAdditionTransformer, list[Any], InteractionGraph]:
    model, data = ModularAdditionTransformer(7, 8, 2, 16), AllPairs(7)
    batches = list(zip(data.tokens.split(20), data.answers.split(20), strict=True))
    layers = ["embed", NodeLayer("embed", "last", positions=-1), "mlp:input", "output"]
    layers = [layers[0], *layers[2:]] if options.pop("whole", True) else layers[1:]
    return model, batches, compute_interaction_graph(model, batches, layers, **options)


def test_labels_of_a_model_survive_a_file(tmp_path: Path) -> None:
    model, batches, graph = transformer_graph()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph.labels = label_features(graph, model, batches, FourierLabels(7, threshold=0.2))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(graph.labels) == ["embed", "mlp:input"]
    assert [len(names) for names in graph.labels.values()] == [graph.bases[n].n_features for n in graph.labels]
    assert any(graph.labels["embed"])
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    assert loaded.labels == graph.labels
    assert label_features(loaded, model, batches, FourierLabels(7, threshold=0.2)) == graph.labels


def test_labellers_get_features_and_inputs_of_all_samples() -> None:
    model, batches, graph = transformer_graph(final_basis="pca", dtype=torch.float64)
    seen: list[Tensor] = []

    def look(features: Tensor, inputs: Tensor) -> list[str]:
        assert torch.equal(inputs, AllPairs(7).tokens)
        seen.append(features)
        return [""] * features.shape[2]

    label_features(graph, model, [*batches, (batches[0][0][:0],)], look, dtype=torch.float64)
    assert len(seen) == 3
    for features, basis in zip(seen, graph.bases.values(), strict=True):
        torch.testing.assert_close(features.flatten(0, 1).var(0, correction=0), basis.importance)
    (first, _), *_ = batches
    expected = graph.bases["embed"].encode(model.double().embed(first).detach())
    torch.testing.assert_close(seen[0][: len(first)], expected)


def test_masked_positions_are_at_the_mean_and_inputs_may_have_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.embed(tokens))

    mask = torch.rand(30, 3) < 0.7
    batch = {"tokens": torch.randint(0, 5, (30, 3)), "attention_mask": mask}
    model = Named()
    graph = compute_interaction_graph(model, [batch], ["embed", "output"], mask="attention_mask")

    def look(features: Tensor, inputs: Tensor) -> list[str]:
        assert torch.equal(inputs, batch["tokens"])
        assert ((features != 0).any(-1) == mask).all()
        return ["x"] * features.shape[2]

    assert label_features(graph, model, [batch], look, mask="attention_mask")["embed"] == ["x"] * 2


def test_invalid_labels_are_refused() -> None:
    model, batches, graph = transformer_graph()
    labels = FourierLabels(7)
    with pytest.raises(LIBError, match="no samples"):
        label_features(graph, model, [], labels)
    with pytest.raises(LIBError, match="returned 1 labels"):
        label_features(graph, model, batches, lambda features, inputs: ["one"])
    with pytest.raises(LIBError, match="no 'node_layers'"):
        label_features(InteractionGraph(graph.bases, graph.edges), model, batches, labels)


def test_batches_of_several_lengths() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    batches = [torch.randint(0, 7, (20, 3)), torch.randint(0, 7, (20, 2))]
    graph = compute_interaction_graph(model, batches, ["0", "output"])
    with pytest.raises(LIBError, match="differ in the length"):
        label_features(graph, model, batches, FourierLabels(7))


@pytest.mark.parametrize("seed", [0, 1])
def test_published_models_add_by_a_handful_of_frequencies(seed: int, reference_dir: Path) -> None:
    # The most important feature of the raw logits shifts all of them equally, which changes no answer: see below.
    transformer = load_transformer(reference_dir / f"modular_addition_seed{seed}_weights.safetensors")
    model = nn.Sequential(transformer, Centred())
    batches = AllPairs(MODULUS, train_fraction=0.3).tokens[:3830].split(1000)
    labels, purity = FourierLabels(MODULUS), {}
    for kind in ("lib", "neuron"):
        graph = compute_interaction_graph(model, batches, ["0.unembed:input", "output"], basis=kind)
        weight = graph.bases["0.unembed:input"].importance / graph.bases["0.unembed:input"].importance.sum()
        found: list[FeatureLabel] = []
        by_frequency = torch.zeros(MODULUS // 2)

        def look(
            features: Tensor, inputs: Tensor, weight: Tensor = weight, found: list[Any] = found, total=by_frequency
        ) -> list[str]:
            found += labels.of(features, inputs)
            total += (fourier_variance(features, inputs[:, 0], inputs[:, 1], MODULUS)[0] * weight).sum(1)
            return labels(features, inputs)

        graph.labels = label_features(graph, model, batches, look)
        purity[kind] = sum(x.explained * float(w) for x, w in zip(found, weight, strict=True))
        if kind == "lib":
            assert by_frequency.topk(5).values.sum() > 0.92  # 0.96 and 0.93 of all importance
            assert {x.kind for x in found[:8]} == {"a+b"}
            assert len({x.frequency for x in found[:8]}) <= 5
            # Equally important waves of two frequencies may rotate into each other.
            assert sum(map(bool, graph.labels["0.unembed:input"][:8])) >= 5
    assert purity["lib"] > purity["neuron"] + 0.2  # 0.75 and 0.80 against 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_first_published_feature_shifts_all_logits_equally(seed: int, reference_dir: Path) -> None:
    model = load_transformer(reference_dir / f"modular_addition_seed{seed}_weights.safetensors")
    batches = AllPairs(MODULUS, train_fraction=0.3).tokens[:3830].split(1000)
    graph = compute_interaction_graph(model, batches, ["unembed:input", "output"])
    logits = graph.bases["unembed:input"].from_features @ model.unembed.weight.detach().T
    common = logits.mean(1).square() / logits.square().mean(1)
    assert common[0] > 0.95
    assert common[1:8].max() < 0.05


class Centred(nn.Module):
    """Logits minus their mean over the classes, which gives the same probabilities."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(-1, keepdim=True)
