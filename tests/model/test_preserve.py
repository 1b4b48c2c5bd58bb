"""The model, random states and settings are restored after a block."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lib_lightning.model.preserve import preserve_model


def state(model: nn.Module) -> list[object]:
    """Everything that could change, as comparable values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is what training code uses)
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        (name, keys.tolist(), *rest),
        [m.training for m in model.modules()],
        {name: value.tolist() for name, value in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_random_states_are_restored(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Linear(3, 1)))
    model[3].eval()
    model[0].weight.grad = torch.ones(3, 2)
    model[0].bias.requires_grad_(False)
    buffer, before = model[1].running_mean, state(model)

    def disturb() -> None:
        with preserve_model(model):
            assert not any(m.training for m in model.modules())
            model.train().requires_grad_(True)
            model(torch.randn(8, 2)).sum().backward()
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            model[1].running_mean = torch.full((3,), 7.0)
            model.requires_grad_(True)
            if fails:
                raise RuntimeError

    if fails:
        with pytest.raises(RuntimeError):
            disturb()
    else:
        model[0].weight.grad = None
        before = state(model)
        disturb()
    assert model[1].running_mean is buffer
    if fails:  # backward(), which the package never calls, accumulated this .grad in place
        model[0].weight.grad = torch.ones(3, 2)
    assert state(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_enabled_inside_no_grad_and_inference_mode(mode: type) -> None:
    model = nn.Linear(2, 2)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with preserve_model(model):
            x = torch.ones(1, 2, requires_grad=True)
            y = model(x)
            assert y.requires_grad
            assert not any(p.requires_grad for p in model.parameters())
            assert y.dtype == torch.float32
            assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16


def test_plain_attributes_are_restored() -> None:
    class Keeps(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.calls, self.last, self.seen, self.table = 0, torch.zeros(2), [1], {"a": 1}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last += 1
            self.seen.append(2)
            self.table["b"] = 2
            self.new = x
            return super().forward(x)

    model = Keeps()
    last, seen = model.last, model.seen
    with preserve_model(model):
        model(torch.ones(1, 2))
    assert model.calls == 0
    assert model.last is last
    assert not last.any()
    assert model.seen is seen
    assert (model.seen, model.table) == ([1], {"a": 1})
    assert not hasattr(model, "new")


_PRECISIONS = """
import torch
from lib_lightning.model.preserve import preserve_model
{setting}
places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
places += [torch.backends.mkldnn.matmul]
state = lambda: [place.fp32_precision for place in places]
before = state()
with preserve_model(torch.nn.Linear(2, 2)):
    assert set(state()) <= {{"ieee", "none"}}, state()
assert state() == before, (state(), before)
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no such switches")
@pytest.mark.parametrize(
    "setting",
    [
        "",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",  # after which the older settings raise errors
    ],
)
def test_products_are_of_full_precision(setting: str) -> None:
    # In a separate process, because torch remembers which of its two kinds of settings was used.
    run = subprocess.run(
        [sys.executable, "-c", _PRECISIONS.format(setting=setting)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
