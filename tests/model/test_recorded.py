"""Recorded functions repeat on other values what the function itself gives, or are refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning.model.recorded import Operation, record

W = torch.linspace(-1, 1, 12).double().reshape(4, 3)
X = torch.linspace(-2, 3, 20).double().reshape(5, 4)


def in_place(x: Tensor) -> Tensor:
    h = x @ W
    h.relu_()
    h += 1
    return h * 2


def in_place_with_view(x: Tensor) -> Tensor:
    h = x @ W
    column = h[:, 0]
    column.mul_(3)
    return h.sin()


def into_constant(x: Tensor) -> Tensor:
    out = torch.ones(5, 8).double()
    row = out[1]
    out[:, :4] = x
    out[:, 4:] += x.exp()
    return out * row


def out_argument(x: Tensor) -> Tensor:
    out = torch.zeros(5, 3).double()
    torch.mm(x, W, out=out)
    return out.tanh()


def swapped_objects(x: Tensor) -> Tensor:
    a, b = x + 1, x * 2
    c = a.sin()
    torch.utils.swap_tensors(a, b)
    return a + 3 * b + c


def other_data(x: Tensor) -> Tensor:
    h = torch.zeros(5, 4).double()
    h.data = torch.empty_like(x)
    h.copy_(x)
    return h.sigmoid()


def attention(x: Tensor) -> Tensor:
    q = x.reshape(1, 1, 5, 4)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0]


def random_constants(x: Tensor) -> Tensor:
    return x + torch.rand(5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def scattered(x: Tensor) -> Tensor:
    return torch.zeros(5, 4).double().index_put((torch.tensor([0, 3]),), x[:2]).where(X > 0, x)


def parts(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, F.layer_norm(a, [2])], 1).transpose(0, 1).contiguous().view(2, 10)


GIVEN = [
    in_place, in_place_with_view, into_constant, out_argument, swapped_objects, other_data, attention,
    random_constants, scattered, parts,
]  # fmt: skip


@pytest.mark.parametrize("function", GIVEN)
def test_repeated_on_other_values(function: Callable[[Tensor], Tensor]) -> None:
    expected = function(X.clone())
    result, recorded = record(function, X.clone())
    assert torch.equal(result, expected)
    assert recorded is not None
    for x in (X.flip(0), X * -3, X):
        assert torch.allclose(recorded(x.clone()), function(x.clone()), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("function", [in_place, parts, attention, scattered, other_data])
def test_several_values_at_once_and_their_derivatives(function: Callable[[Tensor], Tensor]) -> None:
    recorded = record(function, X.clone())[1]
    many = torch.stack([X.flip(0), X * -3]).requires_grad_()
    together = torch.vmap(recorded)(many)
    assert torch.allclose(together, torch.stack([function(x) for x in many]), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(together.square().sum(), many)
    if function is in_place:  # autograd refuses the function itself

        def function(x: Tensor) -> Tensor:
            return 2 * ((x @ W).relu() + 1)

    other = many.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(function(x).square().sum() for x in other), other)
    assert torch.allclose(grad, expected, rtol=1e-12, atol=1e-12)


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Route(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(2):
            chosen = (x[:, 0] > 0) == bool(expert)
            out[chosen] = x[chosen] * (expert + 1)
        return out


REFUSED = {
    "branch": branch,
    "number": lambda x: x * x.sum().item(),
    "rows": lambda x: x[x[:, 0] > 0].sum(0),
    "positions": lambda x: x.nonzero().double().sum(0),
    "routed": Route(),
    "dropout": lambda x: F.dropout(x, 0.5),
    "noise": lambda x: x + torch.randn_like(x),
    "no tensor": lambda x: x.tolist(),
    "constant": lambda x: torch.ones(3),
    "resized": lambda x: (x * 2).resize_(2, 10),
    "sparse": lambda x: torch.sparse.mm(x.to_sparse(), W),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_values_is_refused(name: str) -> None:
    torch.manual_seed(0)
    expected = REFUSED[name](X.clone())
    torch.manual_seed(0)
    result, recorded = record(REFUSED[name], X.clone())
    assert recorded is None
    if isinstance(result, Tensor):
        assert torch.equal(result, expected)


def test_constants_that_change_are_noticed() -> None:
    weight = W.clone()
    recorded = record(lambda x: x @ weight, X)[1]
    assert recorded.is_intact
    weight.mul_(2)
    assert not recorded.is_intact

    def changes_while_it_runs(x: Tensor) -> Tensor:
        scale = torch.ones(4).double()
        y = x * scale
        scale.mul_(2)
        return y

    assert record(changes_while_it_runs, X)[1] is None


def test_tensors_are_freed_as_soon_as_nothing_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x.sin() + 1
        return x

    def fails(x: Tensor) -> Tensor:
        raise ValueError(str(alive.append(weakref.ref(x.sin()))))

    alive: list[Any] = []
    gc.disable()
    try:
        result, recorded = record(steps, X)
        assert recorded is not None
        alive += [weakref.ref(t) for t in recorded.values[1:-1]]
        recorded.values.clear()
        with pytest.raises(ValueError, match="None"):
            record(fails, X)
        assert [ref() for ref in alive] == [None] * 40
    finally:
        gc.enable()
    most, repeat = [0], Operation.repeat

    def counting(self: Operation, values: dict[int, Tensor]) -> None:
        repeat(self, values)
        most[0] = max(most[0], len(values))

    monkeypatch.setattr(Operation, "repeat", counting)
    for _ in range(2):
        assert torch.equal(recorded(X), result)
    assert most == [2]


def test_only_needed_operations_are_repeated() -> None:
    recorded = record(lambda x: (x.sin(), x.cos() + 1)[1], X)[1]
    assert [operation.name for operation in recorded.operations] == ["aten::sin", "aten::cos", "aten::add.Tensor"]
    names = [operation.name for operation in recorded.needed([recorded.output])]
    assert names == ["aten::cos", "aten::add.Tensor"]
    cosine = recorded.operations[1].outputs[0]
    assert [operation.name for operation in recorded.needed([recorded.output], [cosine])] == ["aten::add.Tensor"]
