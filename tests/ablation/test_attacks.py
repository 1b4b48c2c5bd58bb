"""Attacks on edge ablations: against enumeration, on planted networks, and their derivatives."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.ablation import (
    AblationPlan,
    EdgeAttack,
    accuracy,
    attack_edges,
    edges_required,
    log_likelihood,
)
from lib_lightning.ablation.interventions import top_k_mask
from lib_lightning.ablation.scored_model import scored_model
from lib_lightning.errors import SettingError
from lib_lightning.model.instrumented import model_session
from tests.ablation.test_interventions import graph_of, instrumented_of, section_of
from tests.ablation.test_shared_section import some_masks
from tests.cases import Case

SECTION = ("input", "output")


def linear_network(seed: int, shape: tuple[int, int] = (3, 4)) -> tuple[nn.Module, list[Any], InteractionGraph]:
    """An affine section with 12 edges, samples with some wrong labels, and its graph."""
    torch.manual_seed(seed)
    model = nn.Linear(shape[1], shape[0]).double()
    x = torch.randn(60, shape[1]).double()
    labels = torch.where(torch.rand(60) < 0.1, torch.randint(0, shape[0], (60,)), model(2 * x).argmax(-1))
    batches = list(zip(x.split(25), labels.split(25), strict=True))
    return model, batches, compute_interaction_graph(model, [x], list(SECTION), basis="pca")


def by_enumeration(
    model: nn.Module, batches: list[Any], graph: InteractionGraph, score: Any, kept: Tensor
) -> tuple[float, Tensor]:
    """The lowest mean score over all subsets of the dropped edges that are put back, from the formulas alone."""
    (before, after), E = graph.bases.values(), graph.edges[SECTION]
    dropped = (~kept).nonzero()
    x, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    fhat = (x - before.mean) @ before.to_features
    J = after.to_features.T @ model.weight.detach() @ before.from_features.T
    assert J.shape == E.shape
    at_mean = (model(before.mean).detach() - after.mean) @ after.to_features
    lowest, worst = math.inf, kept.double()
    for chosen in itertools.product((0.0, 1.0), repeat=len(dropped)):
        mask = kept.double()
        mask[dropped[:, 0], dropped[:, 1]] = torch.tensor(chosen).double()
        logits = after.mean + (at_mean + fhat @ (mask * J).T) @ after.from_features
        mean = float(score(logits, (x, labels)).mean())
        if mean < lowest:
            lowest, worst = mean, mask
    return lowest, worst


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 4, 7])
def test_on_linear_sections_descent_finds_the_worst_subset(seed: int, k: int) -> None:
    # The log likelihood is concave in the factors, so that its minimum is at a corner: a subset of the edges.
    model, batches, graph = linear_network(seed)
    kept = top_k_mask(graph.edges[SECTION], k)
    lowest, worst = by_enumeration(model, batches, graph, log_likelihood, kept)
    found = attack_edges(model, batches, graph, log_likelihood, SECTION, kept, "pgd")
    assert found.score == pytest.approx(lowest, abs=1e-10)
    assert torch.equal(found.worst, worst)
    assert found.score <= found.dropped
    assert torch.equal(found.worst[kept], torch.ones(k).double())
    others = attack_edges(model, batches, graph, log_likelihood, SECTION, kept, "random")
    assert lowest - 1e-10 <= others.score <= others.dropped


@pytest.mark.parametrize("seed", range(8, 12))
def test_a_score_without_derivative_is_never_above_that_of_the_worst_subset(seed: int) -> None:
    model, batches, graph = linear_network(seed)
    kept = top_k_mask(graph.edges[SECTION], 4)
    lowest, _ = by_enumeration(model, batches, graph, accuracy, kept)
    found = attack_edges(model, batches, graph, accuracy, SECTION, kept, EdgeAttack("pgd", n_steps=1, n_starts=1))
    assert found.score <= lowest + 1e-12  # factors between 0 and 1 may be worse than any subset
    with scored_model(model, batches, graph, accuracy) as scored:
        assert scored.with_edges(*SECTION)(found.worst).mean == found.score


@pytest.mark.parametrize("seed", range(3))
def test_edges_required_under_attack_are_those_of_enumeration(seed: int) -> None:
    model, batches, graph = linear_network(seed)
    E = graph.edges[SECTION]
    tolerance = 0.05
    found = edges_required(model, batches, graph, log_likelihood, tolerance, attack="pgd")[SECTION]
    lowest = {k: by_enumeration(model, batches, graph, log_likelihood, top_k_mask(E, k))[0] for k in range(13)}
    sufficient = [k for k in range(13) if all(lowest[j] >= found.unablated - tolerance for j in range(k, 13))]
    assert found.count == min(sufficient)
    assert found.score == pytest.approx(lowest[found.count], abs=1e-10)
    greedy = edges_required(model, batches, graph, log_likelihood, tolerance)[SECTION]
    assert greedy.count <= found.count
    assert (greedy.attack, greedy.worst) == (None, None)
    assert found.attack == EdgeAttack("pgd")


class Cancelling(nn.Module):
    """Two inputs that are nearly equal, and that one output reads with opposite signs; a third one that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.read.weight.copy_(torch.tensor([[3.0, -3.0, 1.0], [0.0, 0.0, 0.0]]))
            self.head.weight.copy_(torch.tensor([[4.0, 0.0], [-4.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.read(x)))


def test_edges_that_cancel_are_caught_by_attacks_alone() -> None:
    torch.manual_seed(0)
    shared, needed = torch.randn(200, 1).double(), torch.randn(200, 1).double()
    x = torch.cat([shared, shared, needed], 1) + 1e-3 * torch.randn(200, 3).double()
    model = Cancelling().double()
    batches = [(x, model(x).argmax(-1))]
    graph = compute_interaction_graph(model, batches, ["input", "head:input", "output"], basis="neuron")
    section = ("input", "head:input")
    kept = torch.tensor([[False, False, True], [False, False, False]])
    result = {kind: attack_edges(model, batches, graph, accuracy, section, kept, kind) for kind in ("random", "pgd")}
    for found in result.values():
        assert found.dropped > 0.98
        assert found.score < 0.8
        assert found.error > 0
    assert result["pgd"].score <= result["random"].score + 0.05
    assert result["pgd"].worst[0].tolist() in ([1, 0, 1], [0, 1, 1])


def planted(seed: int = 0) -> tuple[nn.Module, list[Any], InteractionGraph, Tensor]:
    """A network of neurons of which each reads some inputs only, its graph, and which edges are there."""
    torch.manual_seed(seed)
    true = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(6):
        true[i, [i, (i + 1) % 6]] = True
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.where(true, torch.randn(6, 6).sign() * (1 + torch.rand(6, 6)), 0.0))
    x = torch.randn(200, 6).double()
    with torch.no_grad():
        batches = [(part, model(part).argmax(-1), model(part)) for part in x.split(100)]
    return model, batches, compute_interaction_graph(model, [x], ["input", "1", "output"], basis="neuron"), true


def same_logits(output: Tensor, batch: Any) -> Tensor:
    return -(output - batch[2]).square().sum(1)


@pytest.mark.parametrize("kind", ["random", "pgd"])
@pytest.mark.parametrize("score", [accuracy, same_logits])
def test_planted_edges_withstand_attacks_and_none_of_them_can_be_left_out(kind: Any, score: Any) -> None:
    model, batches, graph, true = planted()
    section = ("input", "1")
    found = attack_edges(model, batches, graph, score, section, true, kind)
    assert found.score == pytest.approx(found.unablated, abs=1e-12)
    required = edges_required(model, batches, graph, score, 1e-6, [section], "bisection", kind)[section]
    assert required.count <= true.sum()
    assert not (required.mask & ~true).any()
    for i, j in true.nonzero().tolist():
        kept = true.clone()
        kept[i, j] = False
        caught = attack_edges(model, batches, graph, score, section, kept, kind)
        assert caught.score < caught.unablated - 5e-3, (i, j)


def test_gradients_are_finite_differences(case: Case) -> None:
    graph = graph_of(case, "lib")
    instrumented = instrumented_of(case, graph)

    def loss(output: Any) -> Tensor:
        last = instrumented.layers[-1].read([output["logits"] if isinstance(output, dict) else output])
        return (last * torch.linspace(-1, 1, last.numel(), dtype=last.dtype).reshape(last.shape)).sum()

    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section, plain = section_of(case, instrumented, graph, l), section_of(case, instrumented, graph, l)
            plain.J = plain.shared = None
            mask = some_masks(E)[1]
            gradient = section.gradient(mask, loss)[1]
            assert torch.allclose(gradient, plain.gradient(mask, loss)[1], rtol=1e-8, atol=1e-8 * gradient.abs().max())
            direction = torch.randn(E.shape, generator=torch.Generator().manual_seed(1)).double()
            step = 1e-5
            up, down = (float(loss(section.output(mask + sign * step * direction))) for sign in (1, -1))
            expected = float((gradient * direction).sum())
            assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(gradient.abs().sum()))


def test_scores_without_derivative_follow_the_output() -> None:
    model, batches, graph, true = planted()

    def agreement(output: Tensor, batch: Any) -> Tensor:
        return (output.argmax(-1) == batch[1]).double()

    kept = true.clone()
    kept[0, 0] = False
    with scored_model(model, batches, graph, agreement) as scored:
        section = scored.with_edges("input", "1")
        score, gradient = section.gradient(kept.double())
        assert gradient[0, 0] > 0, "the output comes closer to its own when the edge is put back"
        assert score == section(kept)
    found = attack_edges(model, batches, graph, agreement, ("input", "1"), kept, "pgd")
    assert found.score <= found.dropped


@pytest.mark.parametrize("attack", [None, "pgd"])
def test_standard_errors_and_bounds(attack: Any) -> None:
    model, batches, graph = linear_network(1)
    found = edges_required(model, batches, graph, log_likelihood, 0.05, attack=attack)[SECTION]
    x, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    before, after = graph.bases.values()
    fhat = (x - before.mean) @ before.to_features
    J = after.to_features.T @ model.weight.detach() @ before.from_features.T
    at_mean = (model(before.mean).detach() - after.mean) @ after.to_features
    errors, means = {}, {}
    for k in found.curve:
        mask = top_k_mask(graph.edges[SECTION], k).double()
        if attack is not None:
            mask = by_enumeration(model, batches, graph, log_likelihood, mask.bool())[1]
        logits = after.mean + (at_mean + fhat @ (mask * J).T) @ after.from_features
        own = log_likelihood(model(x).detach(), (x, labels))
        change = log_likelihood(logits, (x, labels)) - own
        errors[k], means[k] = float(change.std() / math.sqrt(len(x))), float((own + change).mean())
        # An attack ends as soon as a score is below the tolerance by more than its standard error.
        if attack is None or k >= found.bounds[0]:
            assert found.curve[k] == pytest.approx(means[k], abs=1e-10)
        else:
            assert means[k] - 1e-10 <= found.curve[k] < found.unablated - 0.05
    assert found.error == pytest.approx(errors[found.count], rel=1e-9)
    assert found.tolerance_in_errors == pytest.approx(0.05 / errors[found.count], rel=1e-9)
    for bound, sign in zip(found.bounds, (1, -1), strict=True):
        enough = [k for k in means if means[k] + sign * errors[k] >= found.unablated - 0.05]
        assert bound == min(k for k in means if all(j in enough for j in means if j >= k))
    assert found.bounds[0] <= found.count <= found.bounds[1]


def test_attacks_are_repeatable() -> None:
    model, batches, graph, _ = planted()
    for attack in ("random", EdgeAttack("pgd", n_starts=5, n_steps=2)):
        first, again = (
            edges_required(model, batches[:1], graph, accuracy, 0.02, [("input", "1")], "bisection", attack)
            for _ in range(2)
        )
        for section, one in first.items():
            assert (one.count, one.curve, one.bounds) == (
                again[section].count, again[section].curve, again[section].bounds,
            )  # fmt: skip
            assert torch.equal(one.worst, again[section].worst)


def test_settings_are_checked() -> None:
    model, batches, graph, true = planted()
    with pytest.raises(SettingError, match="attack must be one of 'random', 'pgd'; got 'fgsm'"):
        edges_required(model, batches, graph, accuracy, attack="fgsm")
    with pytest.raises(SettingError, match="attack must be one of 'random', 'pgd'; got 'greedy'"):
        AblationPlan(attack="greedy")
    with pytest.raises(SettingError, match="n_steps must be at least 1"):
        EdgeAttack("pgd", n_steps=0)
    with pytest.raises(SettingError, match="step_size must be above 0 and at most 1"):
        EdgeAttack("pgd", step_size=2.0)
    for kept in (true[:2], true.double()):
        with pytest.raises(SettingError, match=r"kept is a boolean tensor of shape \(6, 6\)"):
            attack_edges(model, batches, graph, accuracy, ("input", "1"), kept)
