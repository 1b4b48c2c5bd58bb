"""Attributes of torch that are not public, except those of autograd (see `lib_lightning.model.autograd_graph`).

Each is used by one function, which does without it where this version of torch has none.
"""

from __future__ import annotations

import torch
from torch import nn


def is_script_module(module: nn.Module) -> bool:
    """Whether a module is compiled TorchScript, which accepts no hooks."""
    return isinstance(module, torch.jit.ScriptModule)
