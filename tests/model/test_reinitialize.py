"""Copies with new initial weights: the model and random states stay as they are, tied weights tied."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, SettingError
from lib_lightning.model.reinitialize import reinitialize, reinitialized


def trained(model: nn.Module) -> nn.Module:
    """A model whose parameters and buffers are not initial ones."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn_like(t) ** 2 + 0.5)
    return model


def test_each_module_is_reset_in_order_and_nothing_else_changes() -> None:
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Embedding(5, 4)))
    model[2].weight.requires_grad_(False)
    model.eval()
    before, python = copy.deepcopy(model.state_dict()), random.getstate()
    states = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    control, permuted = reinitialize(model, 5)
    assert permuted == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == python
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    torch.manual_seed(5)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Embedding(5, 4))
    torch.manual_seed(5)
    for module in fresh:
        module.reset_parameters()
    expected = fresh.state_dict()
    for name, value in control.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not control.training
    assert [p.requires_grad for p in control.parameters()] == [p.requires_grad for p in model.parameters()]


def test_seeds() -> None:
    model = nn.Linear(3, 3)
    one, same, other = (reinitialized(model, seed).weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(SettingError, match="seed"):
        reinitialized(model, -1)


class Own(nn.Module):
    """Parameters of its own, without a function that resets them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x @ self.table) * self.scale)


def test_parameters_without_an_initialisation_are_permuted() -> None:
    model = Own()
    control, permuted = reinitialize(model, 3)
    assert permuted == ["table"]
    assert control.table.sum(dim=()).item() == model.table.sum().item()
    assert control.table.flatten().sort().values.tolist() == list(range(12))
    assert not torch.equal(control.table, model.table)
    assert torch.equal(control.scale, model.scale)


def test_an_initialisation_that_fails_is_reported() -> None:
    class Broken(nn.Linear):
        is_made = False

        def reset_parameters(self) -> None:
            if self.is_made:
                raise RuntimeError("only once")
            super().reset_parameters()
            self.is_made = True

    with pytest.raises(LIBError, match="Sequential cannot be given new weights: RuntimeError: only once"):
        reinitialize(nn.Sequential(Broken(3, 4), nn.Linear(4, 2)), 3)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    control = reinitialized(trained(model))
    assert control[1].weight is control[0].weight
    assert control[1].weight is not model[1].weight


class Custom(nn.Module):
    """Initialises all modules within, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(200, 200)
        self.table = nn.Parameter(torch.randn(3))
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        if module is self:
            nn.init.constant_(self.table, 3.0)


def test_a_models_own_initialisation_comes_last() -> None:
    control, permuted = reinitialize(trained(Custom()))
    assert permuted == []
    assert control.inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not control.inner.bias.any()
    assert control.table.tolist() == [3.0] * 3


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_models_get_their_own_initial_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = trained(GPT2LMHeadModel(config))
    control, permuted = reinitialize(model)
    assert permuted == []
    assert control.lm_head.weight is control.transformer.wte.weight
    block: Any = control.transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ln_1.weight.eq(1).all()
    assert not block.mlp.c_fc.bias.any()


class Needy(nn.Linear):
    def reset_parameters(self, gain: float | None = None, *more: Any) -> None:
        super().reset_parameters()


class Impossible(nn.Linear):
    def __init__(self, n: int) -> None:
        super().__init__(n, n)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


def test_attention_resets_its_own_parameters() -> None:
    model = trained(nn.TransformerEncoderLayer(8, 2, 16))
    control, permuted = reinitialize(model)
    assert permuted == []
    assert not torch.equal(control.self_attn.in_proj_weight, model.self_attn.in_proj_weight)


def test_optional_arguments_and_models_that_cannot_be_copied() -> None:
    model = trained(Needy(3, 3))
    assert not torch.equal(reinitialized(model).weight, model.weight)
    with pytest.raises(LIBError, match=r"Impossible cannot be copied .*no copies"):
        reinitialized(Impossible(2))
