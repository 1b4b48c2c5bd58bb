"""How a plain module is called: with what its ``forward`` takes of a batch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from lib_lightning import compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.model.calls import Arguments, ModelCall
from lib_lightning.model.instrumented import InstrumentedModel

N, D = 6, 4


class OfX(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OfXAndScale(OfX):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(x) * scale[:, None]


class OfXAndMore(OfX):
    def forward(self, x: Tensor, scale: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        assert not options, "unknown entries"
        return self.net(x) if scale is None else self.net(x) * scale[:, None]


class OfBatch(OfX):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.net(batch["x"] if isinstance(batch, dict) else batch[0])


class OfPair(OfX):
    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        x, scale = inputs
        return self.net(x) * scale[:, None]


class OfList(OfX):
    def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.net(torch.stack(images))


X, S, Y = torch.randn(N, D), torch.rand(N) + 1, torch.zeros(N, dtype=torch.long)
Named = namedtuple("Named", ["x", "scale"])
CALLS: list[tuple[type[OfX], Any, str]] = [
    (OfX, X, "forward(batch)"),
    (OfX, (X, Y), "forward(batch[0])"),
    (OfX, [X, Y], "forward(batch[0])"),
    (OfX, [X], "forward(batch[0])"),
    (OfX, {"x": X, "y": Y, "names": ["a"] * N}, "forward(x=batch['x'])"),
    (OfX, ({"x": X, "other": S}, Y), "forward(x=batch[0]['x'])"),
    (OfX, ((X,), Y), "forward(batch[0][0])"),
    (OfX, Named(X, S), "forward(batch[0])"),
    (OfXAndScale, (X, S), "forward(batch[0], batch[1])"),
    (OfXAndScale, (X, S, Y), "forward(batch[0], batch[1])"),
    (OfXAndScale, ((X, S), Y), "forward(batch[0][0], batch[0][1])"),
    (OfXAndScale, [[X, S], Y], "forward(batch[0][0], batch[0][1])"),
    (OfXAndScale, {"scale": S, "y": Y, "x": X}, "forward(scale=batch['scale'], x=batch['x'])"),
    (OfXAndScale, Named(X, S), "forward(batch[0], batch[1])"),
    (OfXAndMore, (X, S), "forward(batch[0])"),
    (OfXAndMore, {"x": X, "id": Y}, "forward(x=batch['x'])"),
    (OfBatch, (X, Y), "forward(batch)"),
    (OfBatch, {"x": X, "y": Y}, "forward(batch)"),
    (OfPair, (X, S), "forward(batch)"),
    (OfPair, [(X, S), Y], "forward(batch[0])"),
    (OfList, list(X), "forward(batch)"),
    (OfList, (list(X), Y), "forward(batch[0])"),
]


@pytest.mark.parametrize(("model", "batch", "call"), CALLS)
def test_the_signature_says_how(model: type[OfX], batch: Any, call: str) -> None:
    graph = compute_interaction_graph(model(), [batch], ["net.0:input", "net.1", "output"])
    assert graph.info["settings"]["call"] == call
    assert graph.info["n_samples"] == N
    found = ModelCall.from_plain(graph.model_call)
    assert str(found) == call
    expected = compute_interaction_graph(OfX(), [X], ["net.0:input", "net.1", "net.2"])
    assert torch.allclose(graph.bases["net.0:input"].mean, expected.bases["net.0:input"].mean, atol=1e-6)


def test_where_nothing_works_two_lines_can_be_pasted() -> None:
    class Three(OfX):
        def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return self.net(x) * a * b

    with pytest.raises(LIBError, match=r"cannot be run on a batch \(\(Tensor \(6, 4\), Tensor \(6,\)\)\)") as error:
        compute_interaction_graph(Three(), [(X, Y)], ["net.0", "output"])
    lines = str(error.value).splitlines()
    assert len(lines) <= 5
    assert lines[-1].strip() == "input_fn=lambda batch: batch[0]"


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.just("t"), lambda inner: st.one_of(st.tuples(inner, inner), st.dictionaries(
    st.sampled_from(["a", "b"]), inner, min_size=1)), max_leaves=5))  # fmt: skip
def test_arguments_are_where_they_were_found(structure: Any) -> None:
    def build(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(build, part))
        return {key: build(item) for key, item in part.items()} if isinstance(part, dict) else torch.randn(1)

    def leaves(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = enumerate(part) if isinstance(part, tuple) else part.items() if isinstance(part, dict) else ()
        return [path, *(found for key, item in items for found in leaves(item, (*path, key)))]

    batch = build(structure)
    for path in leaves(batch):
        arguments = Arguments((path,), {"x": path, "flag": True})
        (found,), named = arguments.of(batch)
        expected = batch
        for key in path:
            expected = expected[key]
        assert found is expected
        assert named == {"x": expected, "flag": True} or named["x"] is expected
        call = ModelCall(arguments=arguments)
        assert ModelCall.from_plain(call.plain) == call


# What models return.


class Returns(OfX):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = self.net(x)
        return {
            "dict": lambda: {"loss": h.sum().reshape(1), "logits": h},
            "tuple": lambda: (h.mean(), h),
            "tuple of one": lambda: (h.mean().reshape(1), h),
            "normal": lambda: Normal(h, h.exp()),
            "categorical": lambda: Categorical(logits=h),
            "bernoulli": lambda: Bernoulli(logits=h),
            "independent": lambda: Independent(Normal(h, 1.0), 1),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["dict", "tuple", "tuple of one", "normal", "categorical", "bernoulli", "independent"])
def test_outputs_are_read_at_the_logits(kind: str) -> None:
    graph = compute_interaction_graph(Returns(kind), [X], ["net.0:input", "net.1", "output"])
    expected = compute_interaction_graph(OfX(), [X], ["net.0:input", "net.1", "output"])
    mean = expected.bases["output"].mean
    if kind == "categorical":  # normalised
        mean = mean.mean() + torch.log_softmax(OfX()(X), 1).mean(0).double() - mean.mean()
    assert torch.allclose(graph.bases["output"].mean, mean, atol=1e-5)


def test_the_call_is_decided_once() -> None:
    calls = 0

    class Counted(OfX):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(x)

    instrumented = InstrumentedModel(Counted(), [])
    for _ in range(3):
        assert instrumented.num_samples(X) == N
    assert calls == 0, "a single tensor needs no run"
    with pytest.raises(TypeError):
        instrumented.spec.call(X)  # type: ignore[misc]
