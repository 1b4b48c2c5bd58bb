"""Examples and histograms equal a ranking by brute force, for any division into batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.algorithm.basis import neuron_basis
from lib_lightning.algorithm.examples import (
    FeatureExamples,
    Positions,
    example_collectors,
    merge_examples,
)
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.features import feature_values
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from tests.algorithm.two_threads import in_two

Batch = tuple[Tensor, Tensor | None]


def collected(
    batches: Sequence[Batch], variance: Tensor, process_group: ProcessGroup = SINGLE_PROCESS
) -> FeatureExamples:
    """The examples of features with these values ``(n, S, r)`` and masks ``(n, S)``."""
    r = len(variance)
    basis = neuron_basis("fc", torch.zeros(r).double(), torch.diag(variance.double()))
    positions = [Positions((f.shape[1],) if f.shape[1] > 1 else (), None) for f, _ in batches]
    n = sum(len(f) for f, _ in batches)
    (collector,) = found = example_collectors([basis], [[p] for p in positions], n, process_group)
    for (f, mask), at in zip(batches, positions, strict=True):
        collector.update(f, mask, at)
    merge_examples(found, process_group)
    return collector.result()


def ranked(values: dict[tuple[int, int], float], count: int, largest: bool) -> list[float]:
    """The most extreme values by sample and position, one of each sample, in order."""
    choose = max if largest else min
    of_samples: dict[int, float] = {}
    for (sample, _), value in values.items():
        of_samples[sample] = choose(of_samples.get(sample, value), value)
    found = sorted(of_samples.values(), reverse=largest)[:count]
    return [*found, *[math.nan] * (count - len(found))]


def assert_equal_to_brute_force(examples: FeatureExamples, fhat: Tensor, mask: Tensor | None) -> None:
    """Compare with values ``(n, S, r)`` of all samples."""
    n, S, r = fhat.shape
    valid = torch.ones(n, S, dtype=torch.bool) if mask is None else mask
    n_largest, n_smallest, n_spread = examples.counts
    for j in range(r):
        values = {(i, t): float(fhat[i, t, j]) for i, t in valid.nonzero().tolist()}
        found = [
            (int(i), int(t), float(v))
            for i, t, v in zip(examples.samples[j], examples.positions[j], examples.values[j], strict=True)
        ]
        expected = [*ranked(values, n_largest, True), *ranked(values, n_smallest, False)]
        actual = torch.tensor([value for _, _, value in found], dtype=torch.float64)
        torch.testing.assert_close(
            actual[: n_largest + n_smallest], torch.tensor(expected).double(), rtol=1e-6, atol=0, equal_nan=True
        )
        for k, (i, t, value) in enumerate(found):
            if math.isnan(value):
                assert (i, t) == (-1, -1)
                continue
            assert value == pytest.approx(values[i, t], rel=1e-6)
            for w, around in enumerate(examples.context[j, k].tolist()):
                at = (i, t + w - examples.before)
                assert around == pytest.approx(values[at], rel=1e-3, abs=1e-6) if at in values else math.isnan(around)
        spread = actual[n_largest + n_smallest :]
        spread = spread[~spread.isnan()]
        assert torch.equal(spread, spread.sort(descending=True).values)
        assert len({(i, t) for i, t, v in found[-n_spread:] if not math.isnan(v)}) == len(spread)
        assert len(spread) > 0 or not values
        width, half = float(examples.bin_width[j]), len(examples.histogram[j]) // 2
        bins = [min(max(math.floor(v / width), -half), half - 1) + half for v in values.values()]
        # On the border of two bins, rounding decides.
        difference = torch.bincount(torch.tensor(bins, dtype=torch.int64), minlength=2 * half) - examples.histogram[j]
        assert difference.sum() == 0
        assert difference.abs().sum() <= 2
        assert all(abs(v) <= half * width for v in values.values())


@st.composite
def data(draw: st.DrawFn) -> tuple[list[Batch], Tensor]:
    """Batches of samples of one or more positions, perhaps masked, some features far from normal."""
    S, r = draw(st.sampled_from([1, 2, 3, 40])), draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    heavy = draw(st.booleans())
    is_masked = draw(st.booleans())
    batches: list[Batch] = []
    for n in sizes:
        f = torch.randn(n, S, r, generator=generator, dtype=torch.float64)
        mask = torch.rand(n, S, generator=generator) < 0.6 if is_masked else None
        f = f**5 if heavy else f
        batches.append((f if mask is None else f * mask[..., None], mask))
    return batches, 10.0 ** torch.arange(r) * draw(st.sampled_from([0.0, 1.0]))


def joined(batches: Sequence[Batch]) -> Batch:
    masks = [mask for _, mask in batches if mask is not None]
    return torch.cat([f for f, _ in batches]), torch.cat(masks) if masks else None


@settings(max_examples=40, deadline=None)
@given(data(), st.sampled_from([1, 2**18]))
def test_any_batches_give_the_ranking_by_brute_force(drawn: tuple[list[Batch], Tensor], gathered: int) -> None:
    batches, variance = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_lightning.algorithm.examples._GATHERED", gathered)
        examples = collected(batches, variance)
        at_once = collected([joined(batches)], variance)
    assert_equal_to_brute_force(examples, *joined(batches))
    for name, tensor in vars(at_once).items():
        assert same(tensor, getattr(examples, name)), name


@settings(max_examples=15, deadline=None)
@given(data(), st.integers(0, 4))
def test_two_processes_find_the_same_as_one(drawn: tuple[list[Batch], Tensor], first: int) -> None:
    batches, variance = drawn
    parts = [batches[:first], batches[first:]]
    of_both = in_two(lambda group: collected(parts[group.rank], variance, group))
    for examples in of_both:
        for name, tensor in vars(collected(batches, variance)).items():
            assert same(tensor, getattr(examples, name)), name


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    return a == b


class Language(nn.Module):
    """Embedding, a layer that joins positions, and one answer at each position, or at some."""

    def __init__(self, positions: slice | list[int] = slice(None)) -> None:
        super().__init__()
        self.positions = positions
        self.embedding, self.mix = nn.Embedding(7, 5), nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(ids))[0][:, self.positions])


def test_graphs_have_the_examples_of_their_own_features() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (30, 25))
    valid = torch.arange(25) < torch.randint(8, 26, (30, 1))
    batches = [{"ids": ids[:13], "valid": valid[:13]}, {"ids": ids[13:], "valid": valid[13:]}]
    last = NodeLayer("mix", positions=[3, -1], name="last")
    for middle in ("mix", last):
        options: dict[str, Any] = {"mask": "valid", "skip_positions": 1} if middle == "mix" else {}
        model, used = Language(slice(None) if middle == "mix" else [3, -1]).double(), ["embedding", middle, "output"]
        graph = compute_interaction_graph(model, batches, used, input_fn=lambda batch: {"ids": batch["ids"]}, **options)
        spec = ModelSpec(lambda batch: {"ids": batch["ids"]}, options.get("mask"), None, options.get("skip_positions"))
        values = list(feature_values(InstrumentedModel(model, graph.node_layer_specs(), spec), graph, batches))
        for layer, examples in graph.examples.items():
            masks = [of_batch.masks[layer] for of_batch in values]
            fhat = torch.cat([of_batch.features[layer] for of_batch in values])
            mask = None
            if any(m is not None for m in masks):
                ones = [torch.ones(f.features[layer].shape[:2], dtype=torch.bool) for f in values]
                mask = torch.cat([one if m is None else m for m, one in zip(masks, ones, strict=True)])
            if layer == "last":  # positions 3 and 24 of 25
                assert examples.shape == (25,)
                assert set(examples.positions.flatten().tolist()) <= {3, 24, -1}
                wide = torch.zeros(30, 25, fhat.shape[2], dtype=fhat.dtype)
                wide[:, [3, 24]] = fhat
                mask = torch.zeros(30, 25, dtype=torch.bool)
                mask[:, [3, 24]] = True
                fhat = wide
            assert_equal_to_brute_force(examples, fhat, mask)
            assert (examples.context.shape[2] > 0) == (layer != "last")


def test_images_and_sequences_of_other_lengths() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    graph = compute_interaction_graph(conv, [torch.randn(9, 2, 9, 8)], ["input", "1", "output"])
    assert {layer: e.shape for layer, e in graph.examples.items()} == {"input": (9, 8), "1": (7, 6), "output": (5, 4)}
    assert all(e.context.shape[2] == 0 for e in graph.examples.values())
    batches = [torch.randint(7, (9, 30)), torch.randint(7, (4, 12))]
    graph = compute_interaction_graph(Language(), batches, ["embedding", "mix", "output"])
    assert {layer: e.shape for layer, e in graph.examples.items()} == {
        "embedding": (30,),
        "mix": (30,),
        "output": (30,),
    }
    assert graph.examples["embedding"].histogram.sum(1).tolist() == [9 * 30 + 4 * 12] * 5
