"""Bases as maps between activations and features, and their truncation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph


def test_basis_encodes_and_decodes() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(100, 3)
    basis = compute_interaction_graph(model, [x], ["0", "output"], rtol=1e-6).bases["0"]
    a = model[0](x)
    torch.testing.assert_close(basis.decode(basis.encode(a)), a, rtol=1e-4, atol=1e-4)
    assert basis.encode(a[0]).shape == (basis.n_features,)


def test_truncation_is_relative() -> None:
    scale = torch.tensor([1.0, 1e-2, 1e-4, 1e-6]).double()
    model, x = nn.Linear(4, 4, bias=False).double(), torch.randn(200, 4).double() * scale
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    counts = [
        compute_interaction_graph(model, [x], ["input", "output"], rtol=rtol).bases["input"].n_features
        for rtol in (0.0, 1e-9, 1e-6, 1e-3)
    ]
    assert counts == [4, 3, 2, 1]


def test_constant_layer_has_no_features() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.0 + 1.0

    model = nn.Sequential(nn.Linear(3, 3), Constant(), nn.Linear(3, 2))
    graph = compute_interaction_graph(model, [torch.randn(9, 3)], ["0", "1", "output"])
    assert [basis.n_features for basis in graph.bases.values()] == [0, 0, 2]
    assert [tuple(E.shape) for E in graph.edges.values()] == [(0, 0), (2, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leading_features_are_the_same_in_half_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))
    x = torch.randn(100, 4)
    exact = compute_interaction_graph(model, [x], ["1", "3", "output"])
    half = compute_interaction_graph(model.to(dtype), [x.to(dtype)], ["1", "3", "output"])
    for name in ("1", "3"):
        # The variance of the leading features is far above the rounding of activations, 0.4% in bfloat16.
        torch.testing.assert_close(half.bases[name].importance[:2], exact.bases[name].importance[:2], rtol=0.05, atol=0)


def test_old_name_of_degenerate_is_deprecated() -> None:
    graph = compute_interaction_graph(nn.Linear(3, 2), [torch.randn(20, 3)], ["input", "output"])
    basis = graph.bases["input"]
    with pytest.warns(DeprecationWarning, match="degenerate"):
        assert basis.unsure is basis.degenerate
    assert basis.degenerate is not None
