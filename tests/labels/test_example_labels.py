"""Labels by examples: planted properties are found, chance gets no name, and scores are areas under ROC curves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.features import ImageRenderer, TableRenderer, TokenRenderer
from lib_lightning.labels import ExampleLabels, FeatureSamples, Labels, find_labels, label_features
from lib_lightning.labels.auroc import areas, midranks

WORDS = ["the", " cat", " Sat", "7", "↵", ",", "on", " mat"]


def tokens_of(n: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, len(WORDS), (n, T), generator=torch.Generator().manual_seed(seed))


def noisy(signal: Tensor, size: float = 0.3) -> Tensor:
    noise = torch.randn(signal.shape, generator=torch.Generator().manual_seed(1))
    return signal.float() - signal.float().mean() + size * noise


def test_planted_tokens_are_found_at_both_ends() -> None:
    tokens = tokens_of(200, 12)
    after = torch.cat([torch.full((200, 1), -1), tokens[:, :-1]], 1)
    before = torch.cat([tokens[:, 1:], torch.full((200, 1), -1)], 1)
    contains = (tokens == 6).any(1, keepdim=True).expand_as(tokens)
    place = torch.arange(12).expand_as(tokens)
    signals = [
        tokens == 0, (tokens == 0).float() - (tokens == 1).float(), after == 3, before == 5, contains, place == 0,
        (tokens == 2) | (tokens == 1) | (tokens == 7), torch.zeros_like(tokens), (place / 12).square() * 4,
    ]  # fmt: skip
    features = torch.stack([noisy(signal) for signal in signals], 2)
    found = ExampleLabels(tokenizer=WORDS).label(FeatureSamples.of(features, tokens))
    names, scores = found.names, found.scores
    assert scores is not None
    assert names[0].startswith("high: “the”")
    assert set(names[1].split("; ")) == {"high: “the”", "low: “ cat”"}
    assert names[2:4] == ["high: after “7”", "high: before “,”"]
    assert names[4].startswith("high: samples with “on”")
    assert names[5].startswith("high: position 0")
    assert names[6].startswith("high: start of a word")
    assert names[7] == ""
    assert names[8].startswith("high: late position")
    assert math.isnan(scores[7])
    assert scores[[0, 1, 2, 3, 5, 6]].min() > 0.8, scores
    assert ExampleLabels()(features, tokens)[2] == "high: after “3”", "without a tokenizer, its number"
    assert ExampleLabels(renderer=TokenRenderer(WORDS))(features, tokens) == names


def test_classes_targets_and_columns() -> None:
    n, generator = 600, torch.Generator().manual_seed(0)
    x, classes = torch.randn(n, 4, generator=generator), torch.randint(0, 6, (n,), generator=generator) - 1
    targets = torch.rand(n, generator=generator)
    signals = [(classes == 2) | (classes == -1), x[:, 1], -x[:, 3].exp(), 3 * targets, torch.zeros(n)]
    features = torch.stack([noisy(signal) for signal in signals], 1)[:, None]
    all_of = FeatureSamples.of(features, x)
    samples = FeatureSamples(features, all_of.positions, 1, x, None, classes, targets, {2: "ship"})
    labels = ExampleLabels(columns=["age", "height", "weight", "size"])
    names = labels.label(samples).names
    assert names[0].split("; ")[0] == "high: class -1, ship"
    assert names[1] in ("high: large height; low: small height", "low: small height; high: large height")
    assert names[2] in ("low: large size; high: small size", "low: large size")
    assert set(names[3].split("; ")) == {"high: large target", "low: small target"}
    assert names[4] == ""
    assert ExampleLabels(classes=["a", "b", "c"]).label(samples).names[0].split("; ")[0] == "high: class -1, c"
    assert "column 1" in ExampleLabels()(features, x)[1]
    assert "pixel (0, 1)" in ExampleLabels(renderer=ImageRenderer(shape=(2, 2)))(features, x)[1]
    assert ExampleLabels(renderer=TableRenderer(["a", "b", "c", "d"]))(features, x)[1].count(" b") == 2


def test_places_and_colours_of_images_and_channels_of_series() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(150, 3, 8, 8, generator=generator) * torch.rand(150, 1, 1, 1, generator=generator)
    coarse = nn.functional.avg_pool2d(x, 2)
    where = torch.arange(4.0).expand(150, 4, 4)
    signals = [coarse.mean(1), -coarse[:, 2], where.transpose(1, 2), where, x.mean((1, 2, 3))[:, None, None] * 3]
    features = torch.stack([noisy(s.expand(150, 4, 4), 0.02).flatten(1) for s in signals], 2)
    names = ExampleLabels()(features, x)
    expected = ["high: bright", "low: blue", "high: bottom", "high: right", "high: bright image"]
    assert all(want in name.split("; ") for want, name in zip(expected, names, strict=True)), names
    series = torch.randn(100, 2, 20, generator=generator)
    features = torch.stack([noisy(series[:, 0]), noisy(5 * series[:, 1].mean(1, True).expand(-1, 20))], 2)
    names = ExampleLabels()(features, series)
    assert "high: large channel 0" in names[0]
    assert "high: large mean of channel 1" in names[1]


@pytest.mark.parametrize("kind", ["tokens", "table"])
def test_chance_gets_no_names(kind: str) -> None:
    """Over seeds, features of other samples: independent, the same within a sample, heavy-tailed, or sparse."""
    num_named = num_seeds_named = 0
    seeds = 25
    for seed in range(seeds):
        torch.manual_seed(seed)
        n, S = (60, 16) if kind == "tokens" else (200, 1)
        inputs = tokens_of(n, S, seed) if kind == "tokens" else torch.randn(n, 6)
        classes = torch.randint(0, 5, (n,))
        parts = [
            torch.randn(n, S, 4), torch.randn(n, 1, 4).expand(n, S, 4) + 0.3 * torch.randn(n, S, 4),
            torch.randn(n, S, 4) ** 3, (torch.rand(n, S, 4) < 0.05).float(), torch.zeros(n, S, 1),
            tokens_of(n, S, seed + 99)[..., None].float(),
        ]  # fmt: skip
        features = torch.cat(parts, 2)
        all_of = FeatureSamples.of(features, inputs)
        samples = FeatureSamples(features, all_of.positions, S, inputs, None, classes)
        labels = ExampleLabels(tokenizer=WORDS if kind == "tokens" else None, level=0.05, min_score=0.5)
        found = labels.label(samples)
        num_named += sum(map(bool, found.names))
        num_seeds_named += any(found.names)
    # All discoveries are false here: at the level of 5%, in 5% of the seeds there are any.
    assert num_seeds_named <= 4, (num_seeds_named, num_named)
    assert num_named <= 0.05 * 18 * seeds


def brute_force_area(predictor: Tensor, active: Tensor) -> float:
    a, b = predictor[active], predictor[~active]
    return float(((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean())


@pytest.mark.parametrize("binary", [True, False])
def test_areas_are_probabilities_and_their_errors_those_over_samples(binary: bool) -> None:
    torch.manual_seed(0)
    n, P = 40, 5
    common = torch.randn(n, 1, 3)
    values = (common + torch.randn(n, P, 3)).mul(2).round()
    values = values.gt(1).float() if binary else values
    active = (0.7 * common + torch.randn(n, P, 3)) > 0.8
    valid = torch.rand(n, P) < 0.8
    c = values if binary else midranks(values.flatten(0, 1), valid.flatten()).unflatten(0, (n, P))
    found = areas(c, active, valid)
    for k in range(3):
        expected = brute_force_area(values[..., k][valid], active[..., k][valid])
        assert float(found.area[k]) == pytest.approx(expected, abs=1e-6)
    # The jackknife over samples estimates the same variance.
    again = []
    for keep in (torch.arange(n) != i for i in range(n)):
        some = values[keep]
        if not binary:
            some = midranks(some.flatten(0, 1), valid[keep].flatten()).unflatten(0, (n - 1, P))
        again.append(areas(some, active[keep], valid[keep]).area)
    deviations = torch.stack(again) - torch.stack(again).mean(0)
    jackknife = ((n - 1) / n * deviations.square().sum(0)).sqrt()
    torch.testing.assert_close(found.error, jackknife, rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("n", "P", "share", "rho"),
    [(12, 1, 0.3, 0), (100, 1, 0.1, 0), (100, 1, 0.9, 0), (30, 8, 0.1, 0.5), (30, 8, 0.9, 1)],
)
def test_p_values_are_not_too_small(n: int, P: int, share: float, rho: float) -> None:
    torch.manual_seed(0)

    def events(p: float) -> Tensor:
        x = math.sqrt(rho) * torch.randn(n, 1, 20_000) + math.sqrt(1 - rho) * torch.randn(n, P, 20_000)
        return x < math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1))

    p_values = areas(events(share).float(), events(0.1), None).p_value
    for level in (0.05, 0.01, 0.001):
        assert (p_values <= level).double().mean() <= 1.2 * level


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(len(WORDS), 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.embed(tokens)).tanh()


def test_a_model_is_labelled_with_scores_which_a_file_keeps(tmp_path: Any) -> None:
    model, tokens = Embedder(), tokens_of(120, 9)
    mask = torch.arange(9) < torch.randint(4, 10, (120, 1), generator=torch.Generator().manual_seed(0))
    # Padding of each batch to its own length, and classes as texts.
    batches = [
        {"tokens": t[:, :T], "attention_mask": m[:, :T], "label": ["spam", "ham"] * 30}
        for t, m, T in ((tokens[:60], mask[:60], 9), (tokens[60:], mask[60:] & (torch.arange(9) < 7), 7))
    ]
    graph = compute_interaction_graph(model, batches, ["embed", "output"], mask="attention_mask", final_basis="pca")
    labels = ExampleLabels(tokenizer=WORDS)
    found = find_labels(graph, model, batches, labels, mask="attention_mask")
    assert list(found) == ["embed", "output"]
    graph.labels = {layer: of_layer.names for layer, of_layer in found.items()}
    graph.label_scores = {layer: of_layer.scores for layer, of_layer in found.items() if of_layer.scores is not None}
    assert label_features(graph, model, batches, labels, mask="attention_mask") == graph.labels
    named = [name for names in graph.labels.values() for name in names if name]
    assert len(named) >= 6
    assert not any("⟨" in name or "spam" in name for name in named), "padding is no token"
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    assert all(torch.equal(loaded.label_scores[k], s) or s.isnan().any() for k, s in graph.label_scores.items())
    feature = loaded.feature(("embed", 0))
    assert feature.label_score == pytest.approx(float(graph.label_scores["embed"][0]))
    assert feature.label_score > 0.6
    assert "label_score=" in repr(feature)


def test_single_positions_and_many_positions() -> None:
    model, tokens = Embedder(), tokens_of(300, 6)
    graph = compute_interaction_graph(
        model, [tokens], [NodeLayer("embed", positions=-1), NodeLayer("output", positions=-1)]
    )
    seen: list[FeatureSamples] = []

    class Look(ExampleLabels):
        def label(self, samples: FeatureSamples) -> Labels:
            seen.append(samples)
            return super().label(samples)

    names = find_labels(graph, model, [tokens], Look(tokenizer=WORDS))["embed"].names
    assert all(
        name.startswith(("high: “", "low: “")) or "at position 5" in name or "word" in name for name in names if name
    )
    assert any(names)
    graph = compute_interaction_graph(model, [tokens], ["embed", "output"])
    find_labels(graph, model, tokens.split(50), Look(max_positions=600))
    find_labels(graph, model, tokens.split(50), Look(max_positions=100))
    assert [tuple(one.features.shape[:2]) for one in seen] == [(300, 1), (300, 2), (100, 1)]
    assert seen[0].positions.unique().tolist() == [5]
    for one in seen[1:]:
        expected = graph.bases["embed"].encode(model.embed(one.inputs.gather(1, one.positions)).detach())
        torch.testing.assert_close(one.features, expected.float())


def test_settings_are_checked() -> None:
    for options in ({"level": 0.0}, {"min_score": 0.4}, {"max_positions": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ExampleLabels(**options)
    with pytest.raises(ValueError, match="only one"):
        ExampleLabels(tokenizer=WORDS, renderer=TableRenderer())
    with pytest.raises(TypeError, match="tokenizer=3 cannot"):
        ExampleLabels(tokenizer=3)
    assert ExampleLabels()(torch.zeros(3, 1, 2), torch.zeros(3, 4)) == ["", ""], "three samples say nothing"
    with pytest.raises(LIBError, match="columns of the table are 4"):
        ExampleLabels(columns=["a"])(torch.randn(20, 1, 2), torch.randn(20, 4))


def test_scores_are_float32_whatever_the_default_type_is() -> None:
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(3, 2)
    graph = compute_interaction_graph(model, [x], ["input", "output"])
    torch.set_default_dtype(torch.bfloat16)  # as in a trainer with precision="bf16-true"
    try:
        found = find_labels(graph, model, [x], ExampleLabels())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {labels.scores.dtype for labels in found.values() if labels.scores is not None} == {torch.float32}
