"""Models, inputs and settings whose copies are easily got wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lib_lightning import compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.model.preserve import preserve_model
from lib_lightning.model.replica import Copier
from tests.integration.oracle import assert_same_graph, randomize
from tests.integration.state_check import StateCheck


def mlp(middle: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), middle or nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


LAYERS = ["input", "1", "output"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_that_install_hooks_in_their_first_call() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        output_hidden_states=True,
    )  # fmt: skip
    model, x = BertModel(config), torch.randint(0, 37, (8, 5))
    before = StateCheck(model)
    compute_interaction_graph(model, [x], ["encoder.layer.0", "output"])
    before.assert_same()
    assert len(model(x).hidden_states) == 3


def test_the_callers_cached_weights() -> None:
    model, x = randomize(mlp(parametrizations.weight_norm(nn.Linear(6, 5)))), torch.randn(20, 4).double()
    expected = compute_interaction_graph(model, [x], LAYERS)
    with parametrize.cached():
        cached = model[2].weight
        graph = compute_interaction_graph(model, [x], LAYERS, dtype=torch.float64)
        assert model[2].weight is cached
        assert len(parametrize._cache) == 1
    assert not parametrize._cache_enabled
    assert_same_graph(graph, expected)


@dataclass
class Batch:
    """Keeps what has been computed of it."""

    x: Tensor
    cache: dict[str, Tensor] = field(default_factory=dict)


class ObjectBatch:
    def __init__(self, x: Tensor) -> None:
        self.x, self.cache = x, {}


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, batch: Any) -> Tensor:
        if "first" not in batch.cache:
            batch.cache["first"] = batch.x.mul_(2)
        batch.cache["last"] = batch.x
        return self.body(batch.x)


def test_a_cache_inside_the_batch() -> None:
    model, x = randomize(Embedded()), torch.randn(20, 4).double()
    batch = Batch(x.clone(), {"old": x})
    graph = compute_interaction_graph(model, [batch], ["body.1", "output"])
    assert torch.equal(batch.x, x)
    assert batch.cache.keys() == {"old"}
    assert_same_graph(graph, compute_interaction_graph(model.body, [2 * x], ["1", "output"]))


def test_a_cache_inside_an_object() -> None:
    model, x = randomize(Embedded()), torch.randn(20, 4).double()
    batch = x.clone(), ObjectBatch(x.clone())
    graph = compute_interaction_graph(model, [batch], ["body.1", "output"], input_fn=lambda batch: (batch[1],))
    assert torch.equal(batch[1].x, x)
    assert not batch[1].cache
    assert_same_graph(graph, compute_interaction_graph(model.body, [2 * x], ["1", "output"]))


def test_a_generator_is_not_advanced() -> None:
    class Drawing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.values: Iterator[float] = (float(i) for i in range(100))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(self.values)

    model = Drawing()
    with pytest.raises(LIBError, match="takes its next value from a generator that the model holds"):
        compute_interaction_graph(model, [torch.randn(20, 4)], ["input", "output"])
    assert next(model.values) == 0.0


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = mlp(), torch.nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        # Random numbers, checkpointing and fused attention: all of them use settings of the process.
        x = self.body[1](self.body[0](x))
        x = torch.utils.checkpoint.checkpoint(self.body[2], x, use_reentrant=False)
        x = x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return self.body[4](x * (1 + 1e-3 * torch.rand(x.shape, dtype=x.dtype)))


def test_three_threads() -> None:
    models, x = [randomize(Dropped()) for _ in range(3)], torch.randn(30, 4).double()
    layers = ["body.1", "output"]
    expected = [compute_interaction_graph(model, x.split(10), layers) for model in models]
    found: list[Any] = [None] * 3
    before = StateCheck(nn.ModuleList(models))
    settings = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()

    def compute(index: int) -> None:
        found[index] = compute_interaction_graph(models[index], x.split(10), layers)

    threads = [threading.Thread(target=compute, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for graph, other in zip(found, expected, strict=True):
        assert_same_graph(graph, other)
    before.assert_same()
    assert settings == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


def test_another_thread_trains_with_checkpointing_meanwhile() -> None:
    model, x = Dropped(), torch.randn(3, 4)
    runs: list[int] = []
    model.body[2].register_forward_pre_hook(lambda *_: runs.append(1))

    def train() -> None:
        model(x).sum().backward()

    with preserve_model(nn.Linear(2, 2)):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert len(runs) == 2, "once in the forward pass and once in the backward pass"


def test_aliases_stay_aliases() -> None:
    whole = torch.zeros(6)
    model = nn.ParameterDict({"a": nn.Parameter(whole[:4]), "b": nn.Parameter(whole[2:])})
    model.same, model.view = model["a"], whole[:3]
    copy = Copier()(model)
    with torch.no_grad():
        copy["a"].add_(1)
    assert copy.same is copy["a"]
    assert copy["b"].tolist() == [1, 1, 0, 0]
    assert copy.view.tolist() == [1, 1, 1]
    assert not whole.any()


def test_recurrent_layers_share_their_flat_weights() -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    copy = Copier()(model)
    assert [t.data_ptr() for t in copy._flat_weights] == [p.data_ptr() for p in copy.parameters()]
    assert {t.data_ptr() for t in copy.parameters()}.isdisjoint(t.data_ptr() for t in model.parameters())
    assert all(ref() is p for ref, p in zip(copy._flat_weight_refs, copy.parameters(), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(mlp(), backend="eager"),
        lambda: torch.fx.symbolic_trace(mlp()),
        lambda: mlp(parametrizations.spectral_norm(nn.Linear(6, 5))),
        lambda: mlp(parametrizations.orthogonal(nn.Linear(6, 5))),
        lambda: torch.jit.trace(mlp(), torch.zeros(2, 4)),
        lambda: torch.optim.swa_utils.AveragedModel(mlp()),
    ],
    ids=["compiled", "fx", "spectral norm", "orthogonal", "traced", "averaged"],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_that_copy_themselves(make: Any) -> None:
    model, x = make(), torch.randn(20, 4)
    before = StateCheck(model) if not isinstance(model, torch.jit.ScriptModule) else None
    expected = model.eval()(x)
    with preserve_model(model) as module, torch.no_grad():
        assert module is not model
        assert torch.equal(module(x), expected)
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    model.train()
    if before is not None:
        before.assert_same()


def test_compiled_in_place() -> None:
    model, x = mlp().double(), torch.randn(20, 4).double()
    expected = compute_interaction_graph(model, [x], LAYERS)
    model.compile(backend="eager")
    model[2].compile(backend="eager")
    model(x)
    assert_same_graph(compute_interaction_graph(model, [x], LAYERS), expected)


def test_compiled_function_in_an_attribute() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp().double()
            self.call = torch.compile(lambda x: self.body(x), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    model, x = Compiled(), torch.randn(20, 4).double()
    model(x)
    graph = compute_interaction_graph(model, [x], ["body.1", "output"])
    assert_same_graph(graph, compute_interaction_graph(model.body, [x], ["1", "output"]))
