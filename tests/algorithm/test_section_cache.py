"""Kept graphs: a single forward pass if memory allows, the same numbers, nothing stale, no leaks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.build import build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.memory_plan import MemoryPlan, Workload, plan_memory
from lib_lightning.algorithm.shortcuts import FAST
from lib_lightning.jacobian.section import Section
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers
from tests.cases import Case
from tests.computing import IO, WITHOUT_CLOSED_FORMS, assert_equal, built, built_of

LAYERS = ["input", "norm", "output"]


class Counting(nn.Module):
    """A model that counts its samples; the first of its two sections has no closed form."""

    def __init__(self, scale: Callable[[nn.Module, Tensor], Tensor | float] = lambda model, x: 1.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.scale = scale
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        record.batch_sizes.append(len(x))
        return self.last(torch.tanh(self.norm(self.first(x) * self.scale(self, x))))


# What a forward pass writes to objects that its code refers to is undone after a session; modules are no such objects.
record: Any = ModuleType("record")
calls: list[int] = []
record.batch_sizes = calls


def batches(*sizes: int) -> list[Tensor]:
    # Each batch has larger values than the one before, so that state that depends on the values changes.
    return [3**k * torch.randn(n, 5).double() for k, n in enumerate(sizes)]


def test_kept_graphs_give_the_same_numbers(case: Case) -> None:
    rerun = built_of(case, plan=MemoryPlan(), shortcuts=WITHOUT_CLOSED_FORMS)
    for plan in (MemoryPlan(keep_graphs=True), MemoryPlan(keep_graphs=True, product_bytes=2**24)):
        assert_equal(built_of(case, plan=plan, shortcuts=WITHOUT_CLOSED_FORMS), rerun)


@pytest.mark.parametrize(
    ("closed_forms", "keep", "expected"),
    [
        (False, True, [4, 4, 2]),
        (True, True, [4, 4, 4, 2]),  # a few samples of the first batch for closed forms
        (False, False, [4, 4, 2] * 4),  # moments, two bases, edges
    ],
)
def test_one_forward_pass_where_memory_allows(closed_forms: bool, keep: bool, expected: list[int]) -> None:
    model, x = Counting(), batches(4, 4, 2)
    calls.clear()
    shortcuts = FAST if closed_forms else WITHOUT_CLOSED_FORMS
    built(model, x, LAYERS, plan=MemoryPlan(keep_graphs=keep), shortcuts=shortcuts)
    assert calls == expected


def test_integrated_gradients_keep_no_graphs() -> None:
    model, x = Counting(), batches(4, 4)
    kept = built(model, x, LAYERS, integration_steps=2)
    assert_equal(kept, built(model, x, LAYERS, plan=MemoryPlan(), plain=True, integration_steps=2))


def test_gradients_are_kept_for_the_edges_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[Tensor] = []
    plain = Section.vjp

    def noted(self: Section, cotangents: Tensor) -> Tensor:
        products.append(cotangents)
        return plain(self, cotangents)

    monkeypatch.setattr(Section, "vjp", noted)
    model, x = Counting(), batches(10)
    r = built(model, x, LAYERS).bases[1].n_features
    # Bytes of the gradients of all features on 10 samples, in float64.
    needed = 8 * 10 * 3 * 6, 8 * 10 * r * 5
    count = {}
    for jacobians in (0, needed[0], sum(needed)):
        products.clear()
        plan = MemoryPlan(keep_graphs=True, product_bytes=jacobians, stack_elements=1)
        built(model, x, LAYERS, plan=plan, shortcuts=WITHOUT_CLOSED_FORMS)
        count[jacobians] = len(products)
    # The last section comes first; the rest of the budget is then too small for the other one.
    assert count[0] > count[needed[0]] > count[sum(needed)] == 3 + r


def test_memory_limit_decides_what_is_kept() -> None:
    model, x = Counting(), torch.randn(2000, 5).double()
    instrumented = InstrumentedModel(model, as_node_layers(LAYERS))
    plans = [plan_memory(instrumented, x, limit, Workload(len(x), lib=True)) for limit in (10**5, 10**7, 10**9)]
    assert [plan.keep_graphs for plan in plans] == [False, True, True]
    assert plans[0].product_bytes == 0 < plans[1].product_bytes < plans[2].product_bytes
    assert not plan_memory(instrumented, x, 10**9).keep_graphs, "the number of samples is unknown"
    seen = {}
    for limit in (0.1, 1e-4):
        calls.clear()
        compute_interaction_graph(model, [x], LAYERS, memory_limit=limit)
        seen[limit] = sum(calls)
    # Planning runs the batch a few times in both cases; then come moments, two bases and edges.
    assert seen[1e-4] >= seen[0.1] + 3 * len(x)


def state_of(model: nn.Module) -> Tensor:
    state = model.holder[0]["state"] if hasattr(model, "holder") else model.state
    assert isinstance(state, Tensor)
    return state


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return state_of(model).fill_(float(x.abs().mean()))


def without_version_counter(model: nn.Module, x: Tensor) -> Tensor:
    state_of(model).data.fill_(float(x.detach().abs().mean()))
    return state_of(model)


def in_a_growing_cache(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        if not hasattr(model, "cache") or len(model.cache) < len(x):
            model.cache = torch.zeros(len(x), 1).double()
        cache = model.cache[: len(x)]
        assert isinstance(cache, Tensor)
        return cache.fill_(float(x.abs().mean()))


@pytest.mark.parametrize("location", ["attribute", "buffer", "inside"])
@pytest.mark.parametrize("write", [in_place, without_version_counter, in_a_growing_cache])
def test_overwritten_graphs_are_not_used(write: Callable[[nn.Module, Tensor], Tensor], location: str) -> None:
    model, x, state = Counting(write), batches(4, 8, 8), torch.ones(1, 1).double()
    if location == "buffer":
        model.register_buffer("state", state)
    elif location == "inside":
        model.holder = [{"state": state}]
    else:
        model.state = state
    assert_equal(built(model, x, LAYERS), built(model, x, LAYERS, plain=True))


def test_attributes_set_in_the_forward_pass_do_not_prevent_keeping() -> None:
    def note(model: nn.Module, x: Tensor) -> float:
        model.latest = x.detach().mean()
        model.count = model.count + 1 if hasattr(model, "count") else torch.zeros(())
        return 1.0

    calls.clear()
    built(Counting(note), batches(4, 4), LAYERS)
    assert calls == [4, 4, 4]


@pytest.mark.parametrize("value", ["sparse", "nan", "empty", "bool"])
def test_buffers_of_any_kind_do_not_prevent_keeping(value: str) -> None:
    buffer = {
        "sparse": torch.eye(3).to_sparse(), "nan": torch.full((2,), torch.nan), "empty": torch.zeros(0),
        "bool": torch.tensor([True, False]),
    }[value]  # fmt: skip
    model, x = Counting(), batches(4, 4)
    model.register_buffer("buffer", buffer)
    calls.clear()
    built(model, x, LAYERS)
    assert calls == [4, 4, 4]


def test_no_graph_outlives_the_computation() -> None:
    record.references = made = []

    class Witness:
        """Lives as long as the operation that it is attached to."""

        def __call__(self, gradients: object) -> None:
            return None

    class Noting(Counting):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if y.grad_fn is not None:
                witness = Witness()
                y.grad_fn.register_prehook(witness)
                record.references.append(weakref.ref(witness))
            return y

    model, x = Noting(), batches(40, 40)
    gc.collect()
    gc.disable()
    try:
        compute_interaction_graph(model, x, LAYERS)
        assert made
        assert all(reference() is None for reference in made), "freed without the garbage collector"
    finally:
        gc.enable()


def test_random_state_is_restored_and_does_not_matter() -> None:
    model, x = Counting(), batches(40, 40)
    before = torch.get_rng_state()
    compute_interaction_graph(model, x, LAYERS)
    assert torch.equal(torch.get_rng_state(), before)
    instrumented = InstrumentedModel(model, as_node_layers(IO))
    plain = built(model, x, IO, n_probes=2)
    torch.manual_seed(5)
    assert_equal(build_graph(instrumented, x, LIBConfig(rtol=1e-11, n_probes=2)), plain)
