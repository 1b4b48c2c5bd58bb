"""Checks that a computation has not changed a model, random states, or settings of torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Shared(dict[str, Any]):
    """A dict that copies of a model share with the model, in which hooks note what happens to the copies."""

    def __deepcopy__(self, memo: object) -> Shared:
        return self


class StateCheck:
    """The state of a model and of torch; `assert_same` compares it with the current state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._state()

    def assert_same(self) -> None:
        now = self._state()
        assert now.keys() == self.before.keys()
        for key, value in self.before.items():
            assert now[key] == value, f"{key} has changed"

    def _state(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is what training code uses)
        found: dict[str, Any] = {
            "random numbers": (torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest),
            "checkpointing": dict(vars(torch.utils.checkpoint)),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
        }
        for path, module in self.model.named_modules():
            found[f"{path}: training"] = module.training
            for kind in _HOOKS:
                found[f"{path}: {kind}"] = list(getattr(module, kind).items())
            for kind in ("_parameters", "_buffers"):
                for entry, t in getattr(module, kind).items():
                    found[f"{path}.{entry}"] = t if t is None else _tensor(t)
            for entry, value in module.__dict__.items():
                if entry not in nn.Module().__dict__:
                    found[f"{path}: {entry}"] = _tensor(value) if isinstance(value, Tensor) else (id(value), str(value))
        return found


def _tensor(t: Tensor) -> tuple[Any, ...]:
    """Identity, memory, values and gradient of a tensor."""
    grad = None if not t.is_leaf or t.grad is None else (id(t.grad), t.grad.tolist())
    return id(t), t.data_ptr(), t.tolist(), t.requires_grad, t.is_leaf, t.grad_fn, grad
