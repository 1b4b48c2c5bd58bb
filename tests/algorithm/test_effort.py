"""Choosing samples, probes and features pushed forward from counts of operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import (
    EffortPlan,
    ModelCost,
    Operations,
    SectionCost,
    agree,
    choose_effort,
    counted_operations,
    measure_cost,
)
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.api import graph_of, propose_node_layers
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.cases import Case
from tests.operations_clock import OperationsClock

CONFIG = LIBConfig()


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(
        512, 32
    )


def cnn() -> tuple[nn.Module, Tensor]:
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(*convolutions, *head), torch.randn(128, 3, 16, 16)


def gpt2() -> tuple[nn.Module, Tensor]:
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), torch.randint(64, (64, 16))


def llama() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config), torch.randint(64, (64, 16))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def lstm() -> tuple[nn.Module, Tensor]:
    return Lstm(), torch.randn(128, 12, 8)


@pytest.mark.combinations
@pytest.mark.parametrize("make", [mlp, cnn, gpt2, llama, lstm])
@pytest.mark.parametrize("allowed", [1e9, 1e13])
def test_predicted_operations_are_those_that_are_counted(
    make: Callable[[], tuple[nn.Module, Tensor]], allowed: float
) -> None:
    model, x = make()
    instrumented = InstrumentedModel(model.eval(), as_node_layers(propose_node_layers(model, x)))
    with model_session(instrumented):
        plan = choose_effort(measure_cost(instrumented, x), CONFIG, len(x), allowed, all_samples=False)
    counted = counted_operations(lambda: graph_of(instrumented, [x[: plan.num_samples]], plan.applied_to(CONFIG)), 1)
    assert counted.of(1) / 2.5 <= plan.operations <= 2.5 * counted.of(1)


def test_the_cost_is_the_same_whenever_it_is_counted(case: Case) -> None:
    spec = ModelSpec(case.input_fn, case.mask)
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), spec)
    with model_session(instrumented):
        first, second = (measure_cost(instrumented, case.data) for _ in range(2))
    assert first == second


operations = st.builds(Operations, st.floats(1e2, 1e8), st.floats(1, 500), st.floats(0, 20))
shapes = st.tuples(st.integers(1, 200), st.integers(1, 600))
costs = st.lists(
    st.builds(SectionCost, operations, st.none() | operations, shapes, shapes, st.none() | st.integers(0, 500)),
    min_size=1,
    max_size=4,
).map(lambda sections: ModelCost(Operations(1e5, 20), sections))


@settings(max_examples=60)
@given(
    costs, st.integers(2, 4096), st.floats(1e8, 1e14), st.booleans(), st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 9),
)  # fmt: skip
def test_the_most_accurate_plan_that_fits(
    cost: ModelCost, n: int, allowed: float, all_samples: bool, n_probes: int | None, n_pushed: int | None
) -> None:
    config = LIBConfig(n_probes=n_probes, n_pushed=n_pushed)
    plan = choose_effort(cost, config, n, allowed, all_samples)
    exact_plan = EffortPlan.of(cost, config, n, allowed)
    exact = exact_plan.operations
    assert plan.operations == cost.of_graph(plan.applied_to(config), plan.num_samples)
    assert plan.n_probes == n_probes or n_probes is None, "numbers that are given are kept"
    assert plan.n_pushed == n_pushed or n_pushed is None
    assert plan.operations <= max(allowed, exact)
    if exact <= allowed:
        assert plan == exact_plan
        assert (plan.num_samples, plan.n_probes, plan.n_pushed) == (n, n_probes, n_pushed)
    if all_samples:
        assert plan.num_samples == n
    assert min(n, cost.min_samples) <= plan.num_samples <= n
    with_jacobians = plan.jacobian_samples or plan.num_samples
    if all_samples:
        assert plan.jacobian_samples is None
    assert min(n, cost.min_jacobians) <= with_jacobians <= plan.num_samples
    if plan.num_samples > max(cost.min_samples, 8 * cost.min_jacobians):
        assert 8 * with_jacobians >= plan.num_samples // 2
    more = choose_effort(cost, config, n, 4 * allowed, all_samples)
    assert more.num_samples >= plan.num_samples
    assert (more.jacobian_samples or more.num_samples) >= with_jacobians
    assert (more.n_probes or 10**9) >= (plan.n_probes or 10**9) or more.num_samples > plan.num_samples


def test_a_graph_that_would_take_too_long_is_sampled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = gpt2()
    monkeypatch.setattr("lib_lightning.api.GRAPH_OPERATIONS", 1e8)
    graph = compute_interaction_graph(model, [tokens], ["transformer.h.0", "transformer.h.1"])
    (note,) = graph.info["notes"]
    assert "4 probes per sample for the metric, edges from 8 features per sample" in note
    assert (graph.info["settings"]["n_probes"], graph.info["settings"]["n_pushed"]) == (4, 8)
    exact = compute_interaction_graph(model, [tokens], ["transformer.h.0", "transformer.h.1"], effort="exact")
    assert not exact.info["notes"]
    assert exact.info["settings"]["n_probes"] is None


def test_processes_agree() -> None:
    plan = EffortPlan(100, 4, None, 1e9, 2e9)
    assert agree(plan, ProcessGroup()) == plan
    assert agree(None, ProcessGroup()) is None
    assert agree(replace(plan, n_probes=None, n_pushed=8), ProcessGroup()).n_pushed == 8  # type: ignore[union-attr]


@pytest.mark.parametrize(("channels", "factor"), [(3, (16 / 3) ** 2), (8, 4.0), (16, 1.0), (24, (32 / 24) ** 2)])
def test_few_channels_take_as_long_as_more(channels: int, factor: float) -> None:
    conv, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(2, channels, 9, 9, requires_grad=True)
    y = conv(x)
    products = 2 * 9 * channels**2 * 81  # for each sample
    numbers = 5 * channels * 81
    counted = counted_operations(lambda: torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True), 2)
    assert counted.per_sample == pytest.approx(factor * products + numbers, rel=0.01)
    counted = counted_operations(lambda: conv(x), 2)
    assert counted.per_sample == pytest.approx(factor**0.5 * products + numbers, rel=0.01)


def test_a_fused_recurrent_layer_has_the_operations_of_its_matrices() -> None:
    rnn, x = nn.LSTM(8, 16, batch_first=True), torch.randn(4, 12, 8)
    counted = counted_operations(lambda: rnn(x), 4)
    assert 2 * 12 * 64 * (8 + 16) <= counted.per_sample < 4 * 12 * 64 * (8 + 16)


@pytest.mark.parametrize("width", [16, 64])
def test_sums_in_closed_form_cost_what_they_compute(width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, width))
    x = torch.randn(4096, width)
    instrumented = InstrumentedModel(model, as_node_layers(["input", "output"]))
    with model_session(instrumented):
        cost = measure_cost(instrumented, x)
    assert cost.sections[0].hidden == 128
    steps = cost.steps(CONFIG, len(x))
    seen: dict[str, float] = defaultdict(float)
    clock = OperationsClock()
    last = 0.0

    def add(phase: str) -> None:
        nonlocal last
        now = clock.perf_counter()
        seen[phase] += now - last
        last = now

    with clock.running(), on_phase(add):
        graph_of(instrumented, [x], CONFIG)
    predicted = {"basis of input": steps.metrics[0] + steps.bases[0], "edges from input to output": steps.edges[0]}
    for phase, operations in predicted.items():
        assert seen[phase] / 2.5 < operations < 2.5 * seen[phase], phase
