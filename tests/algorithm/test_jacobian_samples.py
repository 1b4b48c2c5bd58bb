"""Metric and edges on fewer samples than means, covariances and features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning.algorithm.build import build_graph, phases
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import EffortPlan, choose_effort, measure_cost
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.output_changes import chosen_samples
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.algorithm.progress_bar import displayed_in
from lib_lightning.api import ProgressDisplay, estimate_cost, graph_of
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.algorithm.test_cost import CNN
from tests.algorithm.test_progress_bar import Bar, bars, places_of_the_only_bar
from tests.algorithm.two_threads import in_two
from tests.cases import Case
from tests.computing import assert_equal, built, built_of
from tests.operations_clock import OperationsClock
from tests.reference import nonzero_eigh

OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_probes": 3, "n_pushed": 2},
    {"final_metric": "fisher"},
    {"basis": "pca", "final_basis": "pca"},
    {"integration_steps": 2},
    {"metric": "output"},
    {"basis": "random"},
    {"plain": True},
    {"plan": MemoryPlan()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "lib")
def test_all_samples_in_both_ways(case: Case, options: dict[str, Any]) -> None:
    options = {"output": OutputDistribution("categorical"), **options}
    n = sum(len(batch) if isinstance(batch, Tensor) else 1 for batch in case.batches(1))
    assert_equal(built_of(case, jacobian_samples=n, **options), built_of(case, **options))


@pytest.mark.parametrize("n", [100, 700])  # fewer samples than dimensions, and more
def test_all_samples_of_a_wide_layer(n: int) -> None:
    model = nn.Sequential(nn.Linear(530, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    batches = list(torch.randn(n, 530).double().split(250))
    found = built(model, batches, ["input", "2", "output"], jacobian_samples=n)
    assert_equal(found, built(model, batches, ["input", "2", "output"]))


def test_agrees_with_the_formulas() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).double()
    x = torch.randn(400, 6).double() @ torch.randn(6, 6).double()
    batches = list(x.split(50))
    found = built(model, batches, ["input", "output"], jacobian_samples=24)
    chosen = [(k, n) for k, n in chosen_samples([50] * 8, 24, SINGLE_PROCESS, batches=8)]
    assert chosen == [(k, 3) for k in range(8)], "from everywhere"
    few = torch.cat([batches[k][torch.arange(n) * 50 // n] for k, n in chosen])

    J = torch.func.vmap(torch.func.jacrev(model))(few)  # to the logits, which are the features of the output
    M = torch.einsum("nij,nik->jk", J, J) / len(few)
    mean = x.mean(0)
    Sigma = (x - mean).T @ (x - mean) / len(x)
    D, U = nonzero_eigh(Sigma, 1e-11)
    Lambda, V = nonzero_eigh((D.sqrt()[:, None] * U.T) @ M @ (U * D.sqrt()), 1e-11)
    C = U / D.sqrt() @ V * Lambda.sqrt()
    C_pinv = (V / Lambda.sqrt()).T @ (D.sqrt()[:, None] * U.T)

    basis = found.bases[0]
    assert torch.allclose(basis.importance, Lambda, rtol=1e-9)
    assert torch.allclose(basis.to_features @ basis.from_features, C @ C_pinv, atol=1e-9)
    y = torch.einsum("nij,jk,nk->nik", J, C_pinv.T, (few - mean) @ C)
    signs = torch.sign((basis.to_features * C).sum(0))
    assert torch.allclose(basis.to_features, C * signs, atol=1e-9)
    assert torch.allclose(found.edges[0], y.square().mean(0), atol=1e-10)
    fhat_next = model(few) - model(x).mean(0)
    assert torch.allclose(found.attributions[0], (y * fhat_next[..., None]).mean(0), atol=1e-10)
    assert found.n_samples == 400
    # Examples are of all samples: the largest value is that of all.
    f = basis.encode(x[:, None])[:, 0]
    assert torch.allclose(found.examples[0].values[:, 0].double().abs().max(), f.abs().max(), rtol=1e-2)
    assert basis.importance_error is not None
    assert len(found.importance_replicates[0]) == 8


def test_fewer_samples_than_groups_still_have_errors() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).double()
    found = built(model, [torch.randn(100, 6).double()], ["input", "output"], jacobian_samples=3)
    error = found.bases[0].importance_error
    assert error is not None
    assert torch.isfinite(error).all()


def test_two_processes_and_one_without_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    layers, x = as_node_layers(["input", "2", "output"]), torch.randn(160, 5).double()

    def build(batches: list[Tensor], group: ProcessGroup = SINGLE_PROCESS) -> Any:
        own = InstrumentedModel(copy.deepcopy(model), layers)
        return build_graph(own, batches, LIBConfig(rtol=1e-9, jacobian_samples=40), process_group=group)

    whole = build(list(x.split(20)))
    for parts in ([list(x[:80].split(20)), list(x[80:].split(20))], [[], list(x.split(20))]):
        for found in in_two(lambda group, parts=parts: build(parts[group.rank], group)):
            assert found.n_samples == 160
            for basis, expected in zip(found.bases, whole.bases, strict=True):
                assert torch.allclose(basis.importance, expected.importance, rtol=1e-8)
            for E, expected in zip(found.edges, whole.edges, strict=True):
                assert torch.allclose(E, expected, atol=1e-10)


def test_phases_are_those_that_are_reported() -> None:
    seen: list[str] = []
    instrumented = InstrumentedModel(CNN, as_node_layers(["1", "3", "output"]))
    config = LIBConfig(jacobian_samples=8, n_probes=4, n_pushed=4, output_distribution="none")
    batches = list(torch.randn(64, 3, 16, 16).split(4))
    with model_session(instrumented), on_phase(seen.append):
        build_graph(instrumented, batches, config)
    expected = phases(config, instrumented, len(batches), n_differentiated=8)
    assert {phase: seen.count(phase) for phase in expected} == expected


class Wide(nn.Sequential):
    """A small CNN whose last node layer but one is wide and has one position, so that it needs many samples."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(400, 10),
        )  # fmt: skip


def _wide() -> InstrumentedModel:
    return InstrumentedModel(Wide().eval(), as_node_layers(["input", "1", "5", "output"]))


def test_a_short_training_of_a_cnn_takes_few_samples_for_jacobians_and_all_for_moments() -> None:
    instrumented, x = _wide(), torch.randn(1000, 3, 32, 32)
    with model_session(instrumented):
        cost = measure_cost(instrumented, x)
    plan = choose_effort(cost, LIBConfig(), 1000, 1e10, all_samples=False, in_run=True)
    assert plan.num_samples == 1000
    assert plan.jacobian_samples == cost.min_jacobians == 64
    assert "1,000 samples (64 of them for metric and edges), 4 probes" in plan.text
    all_of_them = EffortPlan.of(cost, LIBConfig(n_probes=4, n_pushed=8), 1000, 1e10, in_run=True)
    assert plan.operations < 0.4 * all_of_them.operations
    assert EffortPlan.from_numbers(plan.numbers) == plan
    given = choose_effort(cost, LIBConfig(), 1000, 1e10, all_samples=True)
    assert given.jacobian_samples is None, "samples that are asked for are used for everything"


def test_predicted_operations_and_estimates_are_those_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    instrumented, x = _wide(), torch.randn(256, 3, 32, 32)
    with model_session(instrumented):
        cost = measure_cost(instrumented, x)
    config = LIBConfig(n_probes=4, n_pushed=8, jacobian_samples=32)
    config = EffortPlan.of(cost, config, len(x), 1e10).applied_to(config)
    clock = OperationsClock()
    for module in ("api", "algorithm.cost"):
        monkeypatch.setattr(f"lib_lightning.{module}.time", clock)
    with clock.running():
        estimate = estimate_cost(instrumented.model, x, instrumented.layers, effort="exact", **vars(config))
        started = clock.perf_counter()
        graph_of(instrumented, [x], config)
        operations = clock.perf_counter() - started
    assert operations / 2.5 < cost.of_graph(config, len(x)) < 2.5 * operations
    assert operations / 2 < estimate.seconds < 2 * operations


def test_the_bar_reaches_its_end_with_the_right_speed() -> None:
    torch.manual_seed(0)
    instrumented, x = _wide(), torch.randn(128, 3, 32, 32)
    config = LIBConfig(n_probes=4, n_pushed=8, jacobian_samples=32)
    bars.clear()
    with Bar.clock.running(), displayed_in(ProgressDisplay(Bar)):
        graph_of(instrumented, list(x.split(16)), config)
    places = places_of_the_only_bar()
    start, end = places[0][1], places[-1][1]
    for share, now in places[:-1]:
        assert abs(share - (now - start) / (end - start)) < 0.2
