"""The hash of a model's weights: any change is seen, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.model.batch import hash_tensors
from lib_lightning.model.weights_hash import weights_hash


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
    small=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_change_of_any_entry_is_seen(shapes: list[list[int]], dtype: torch.dtype, small: bool, data: Any) -> None:
    module = nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False) for shape in shapes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_lightning.model.weights_hash._SMALL", 1 << 20 if small else 0)
        patch.setattr("lib_lightning.model.weights_hash._WIDTH", 3)
        before = weights_hash(module)
        assert weights_hash(copy.deepcopy(module)) == before
        filled = [p for p in module if p.numel()]
        if filled:
            parameter = data.draw(st.sampled_from(range(len(filled))))
            entries = filled[parameter].data.view(-1)
            i, j = (data.draw(st.integers(0, len(entries) - 1)) for _ in range(2))
            swapped = entries.clone()
            swapped[[i, j]] = entries[[j, i]]
            is_same = torch.equal(swapped, entries)
            filled[parameter].data.copy_(swapped.view(filled[parameter].shape))
            assert (weights_hash(module) == before) == is_same
            entries[i] += 1
            assert weights_hash(module) != before


def test_hash_does_not_depend_on_the_layout() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    with torch.no_grad():
        b.weight.data = a.weight.t().contiguous().t()
        b.bias.data = torch.cat([torch.zeros(1), a.bias])[1:]  # not aligned to eight bytes
    assert weights_hash(a) == weights_hash(b)
    assert weights_hash(a) != weights_hash(nn.Linear(6, 6))
    assert len({weights_hash(nn.BatchNorm1d(3)), weights_hash(nn.Identity())}) == 2


def test_tensors_of_one_element_have_any_stride() -> None:
    layer = nn.Linear(1, 1)
    before = weights_hash(layer)
    layer.weight.data = torch.stack([layer.weight.data.flatten(), torch.zeros(1)])[:1].as_strided((1, 1), (7, 5))
    assert weights_hash(layer) == before
    graph = compute_interaction_graph(layer, [torch.randn(9, 2)[:, ::2]], ["input", "output"])
    assert graph.bases["input"].n_features == 1


SPARSE = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]


def unusual(layout: Any, x: torch.Tensor) -> torch.Tensor:
    if layout in SPARSE:
        return x.to_sparse(layout=layout, **({"blocksize": (2, 2)} if layout in SPARSE[-2:] else {}))
    if layout == "quantized":
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    if layout == "mkldnn":
        return x.to_mkldnn()
    return torch.nested.nested_tensor([x, x[:2]], layout=layout)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", [*SPARSE, torch.strided, torch.jagged, "quantized", "mkldnn"], ids=str)
def test_tensors_of_any_layout_have_a_hash(layout: Any) -> None:
    x = torch.eye(4).repeat(1, 2)
    tensors = [unusual(layout, value) for value in (x, x.clone(), 2 * x)]
    hashes = [hash_tensors([("", t)]) for t in tensors]
    assert hashes[0] == hashes[1] != hashes[2]
    modules = [nn.Module() for _ in tensors]
    for module, t in zip(modules, tensors, strict=True):
        module.register_buffer("buffer", t)
    of_modules = [weights_hash(module) for module in modules]
    assert of_modules[0] == of_modules[1]
    # Only floating-point buffers count: integers are numbers of steps and the like.
    assert (of_modules[0] == of_modules[2]) == (not tensors[0].is_floating_point())
