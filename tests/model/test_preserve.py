"""What a block with a model leaves behind: nothing, whether a copy runs or the model itself."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError
from lib_lightning.model.preserve import is_running_copy, preserve_model
from tests.integration.state_check import StateCheck


class Stubborn(nn.Sequential):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: object) -> Stubborn:
        raise AssertionError("no copies")


def network(kind: type[nn.Sequential]) -> nn.Sequential:
    model = kind(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.Linear(3, 1)))
    model[3].eval()
    model[0].weight.grad = torch.ones(3, 2)
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [nn.Sequential, Stubborn])
def test_the_model_and_random_states_are_restored(kind: type[nn.Sequential], fails: bool) -> None:
    model = network(kind)
    before = StateCheck(model)

    def disturb() -> None:
        with preserve_model(model) as module:
            assert (module is model) == (kind is Stubborn)
            assert not any(m.training for m in module.modules())
            module.train()
            module(torch.randn(8, 2))
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            module[1].running_mean = torch.full((3,), 7.0)
            with torch.no_grad():
                module[0].weight.mul_(2)
            module.requires_grad_(True)
            module[0].weight.grad = torch.zeros(3, 2)
            module[0].register_forward_hook(print)
            module.append(nn.Identity())
            if fails:
                raise RuntimeError

    if fails:
        with pytest.raises(RuntimeError):
            disturb()
    else:
        disturb()
    before.assert_same()
    assert len(model) == 4


@pytest.mark.parametrize("kind", [nn.Sequential, Stubborn])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_enabled_inside_no_grad_and_inference_mode(mode: type, kind: type[nn.Sequential]) -> None:
    model = kind(nn.Linear(2, 2))
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with preserve_model(model) as module:
            x = torch.ones(1, 2, requires_grad=True)
            y = module(x)
            assert y.requires_grad
            assert not any(p.requires_grad for p in module.parameters())
            assert y.dtype == torch.float32
            assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16


def test_a_model_that_cannot_be_copied_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Stubborn(nn.Linear(2, 2)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with preserve_model(model) as module:
                assert module is model
    assert [record.getMessage() for record in caplog.records] == [
        "Sequential cannot be copied, because of Stubborn (AssertionError: no copies): snapshots run the model itself, "
        "and restore its state afterwards."
    ]


class Writing(nn.Linear):
    """Halves its weights in every forward pass, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__(3, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.way == "in place":
                self.weight.mul_(0.5)
            elif self.way == "data":
                self.weight.data.mul_(0.5)
            elif self.way == "a view":
                self.weight[0].copy_(self.weight[0] * 0.5)
            elif self.way == "out":
                torch.mul(self.weight, 0.5, out=self.weight)
            elif self.way == "foreach":
                torch._foreach_mul_([self.weight, self.bias], 0.5)
            elif self.way == "assigned data":
                self.weight.data = self.weight * 0.5
            else:
                self.weight = nn.Parameter(self.weight * 0.5)
        return super().forward(x)


WAYS = ["in place", "data", "a view", "out", "foreach", "assigned data", "assigned"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [nn.Sequential, Stubborn])
@pytest.mark.parametrize("max_bytes", [2**20, 0])
def test_weights_are_copied_or_not_written_to(way: str, kind: type[nn.Sequential], max_bytes: int) -> None:
    model, x = kind(Writing(way)), torch.randn(2, 3)
    before = StateCheck(model)
    # Assignments are no writes to the memory of the weights.
    refused = max_bytes == 0 and not way.startswith("assigned")
    message = "writes to its parameters in the forward pass, and they are too large to copy .*Raise memory_limit to"
    with (
        pytest.raises(LIBError, match=message) if refused else nullcontext(),
        preserve_model(model, max_bytes) as module,
    ):
        module(x)
    before.assert_same()


def test_large_weights_are_shared_with_the_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3, max_norm=1e-3))
    with preserve_model(model, 0) as module:
        assert module[0].weight is not model[0].weight
        assert module[0].weight.data_ptr() == model[0].weight.data_ptr()
        assert module[1].weight.data_ptr() != model[1].weight.data_ptr(), "a lookup shortens its vectors"
        module[1](torch.arange(4))
    assert model[1].weight.norm() > 0.1


def test_a_model_that_changes_itself_from_its_copy_is_found_out() -> None:
    class Hidden:
        """Finds the model on a way that is not known here."""

        def __deepcopy__(self, memo: object) -> Hidden:
            return self

    hidden: Any = Hidden()

    class Changing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.way.model.weight.data.mul_(1.0)
            self.way.model.calls += 1
            return super().forward(x)

    model = Changing(2, 2)
    model.way, model.calls, hidden.model = hidden, 0, model
    with (
        pytest.raises(LIBError, match="A copy of Changing has changed the model itself"),
        preserve_model(model) as module,
    ):
        module(torch.ones(1, 2))
    calls = model.calls
    with preserve_model(model) as module:
        assert module is model
        module(torch.ones(1, 2))
    assert model.calls == calls == 1


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


class Held:
    """An object that a model holds."""

    def __init__(self) -> None:
        self.calls, self.inside, self.tensor = 0, {"calls": 0}, torch.zeros(2)


WAYS = [
    "nothing", "attribute", "buffer", "weights", "hook", "list", "array", "set", "object", "tensor", "generator",
    "closure",
]  # fmt: skip


class Counting(nn.Module):
    """Counts its calls, in the way that it is told."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls, self.layer = way, 0, nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.held = {"numbers": [0], "array": np.zeros(1), "set": {0}, "object": Held(), "generator": torch.Generator()}
        self.function = self._closure()

    def _closure(self) -> Callable[[], None]:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1

        return count

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "attribute":
            self.calls += 1
        elif self.way == "list":
            self.held["numbers"][0] += 1
        elif self.way == "array":
            self.held["array"] += 1
        elif self.way == "set":
            self.held["set"].add(len(self.held["set"]))
        elif self.way == "object":
            self.held["object"].inside["calls"] = self.held["object"].calls = self.held["object"].calls + 1
        elif self.way == "tensor":
            self.held["object"].tensor.add_(1)
        elif self.way == "generator":
            torch.rand(1, generator=self.held["generator"])
        elif self.way == "closure":
            self.function()
        elif self.way == "buffer":
            self.count += 1
        elif self.way == "weights":
            with torch.no_grad():
                self.layer.weight.mul_(0.9)
        elif self.way == "hook":
            self.layer.register_forward_hook(lambda module, args, out: out * 0.9)
        return self.layer(x)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_within_a_block_run_its_copy_as_long_as_it_is_as_it_was_made(way: str) -> None:
    model, x = Counting(way), torch.randn(4, 3)
    expected = model.layer(x)
    with preserve_model(model) as outer:
        state = torch.get_rng_state()
        for number in range(3):
            with torch.no_grad(), preserve_model(outer) as inner:
                assert torch.is_grad_enabled()
                assert inner is not model
                assert (inner is outer) == (way == "nothing" or number == 0)
                assert is_running_copy(inner)
                found = inner(x)
                torch.rand(1)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(found, expected * (0.9 if way == "hook" else 1)) or way == "weights"
            assert is_running_copy(outer)
    assert model.calls == model.count == 0
    assert torch.equal(model.layer(x), expected)
    assert not is_running_copy(outer)


def test_a_thread_waits_for_the_block_of_another() -> None:
    model, order = nn.Linear(3, 2), []

    def run() -> None:
        with preserve_model(model):
            order.append("second")

    with preserve_model(model) as outer, preserve_model(outer):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
