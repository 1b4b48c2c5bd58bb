"""The same architecture with new initial weights: a control that has learned nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, brief, check_number
from lib_lightning.model.module_paths import unwrapped
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.model.process_state import PROCESS_LOCK, seed_all
from lib_lightning.model.replica import CannotCopyError, copy_model

# Marks of Hugging Face on what has its initial values already, which their initialisation leaves alone.
_MARK = "_is_hf_initialized"


def reinitialized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy a model and give the copy new initial weights.

    Modules are initialised in the order of ``nn.Module.apply``, children first: each by its ``reset_parameters()``,
    which also resets buffers such as those of batch norm. Then each module with a function ``_init_weights(module)``,
    as in Hugging Face models and others, applies it to itself and all modules within. The values of parameters that
    none of these has changed are permuted at random within each tensor, which keeps their distribution; `reinitialize`
    says which. Tied weights stay tied.

    Args:
        model: Any module; neither it nor any random state is changed.
        seed: Seed of the new weights.

    Returns:
        The copy, on the same devices, in the same mode.

    Raises:
        LIBError: If the model cannot be copied, as with weights that are sharded over processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> control = reinitialized(model, seed=1)
        >>> torch.equal(control[0].weight, model[0].weight)
        False
        >>> torch.equal(control[0].weight, reinitialized(model, seed=1)[0].weight)
        True
    """
    return reinitialize(model, seed)[0]


def reinitialize(model: nn.Module, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """As `reinitialized`, and which parameters were permuted.

    Args:
        model: Any module.
        seed: Seed of the new weights.

    Returns:
        The copy, and the names of parameters without an initialisation of their own, whose values were permuted.

    Raises:
        LIBError: If the model cannot be copied, or the initialisation of a part of it fails.
    """
    check_number("seed", seed, lambda k: 0 <= k < 2**32, "must be at least 0 and less than 2**32", integer=True)
    model = unwrapped(model)
    with PROCESS_LOCK, preserve_rng(), torch.inference_mode(False), torch.no_grad():
        try:
            copy, _, _ = copy_model(model, sys.maxsize)
        except CannotCopyError as error:
            raise LIBError(
                f"{type(model).__name__} cannot be copied to give the copy new weights, because of {error}."
            ) from error
        before = {name: p.detach().clone() for name, p in copy.named_parameters()}
        seed_all(seed)
        for initialise in _initialisations(copy):
            try:
                initialise()
            except Exception as error:
                raise LIBError(f"{type(model).__name__} cannot be given new weights: {brief(error)}") from error
        permuted = []
        generator = torch.Generator().manual_seed(seed)
        for name, p in copy.named_parameters():
            if torch.equal(p, before[name]) and _varies(p):
                order = torch.randperm(p.numel(), generator=generator, device="cpu").to(p.device)
                p.copy_(p.flatten()[order].view_as(p))
                permuted.append(name)
    trained = dict(model.named_parameters())
    for name, p in copy.named_parameters():
        p.requires_grad_(trained[name].requires_grad)
    return copy, permuted


def _initialisations(model: nn.Module) -> Iterator[Callable[[], object]]:
    """What gives a model its initial values, in order."""
    modules = list(_children_first(model))
    for module in modules:
        for name in ("reset_parameters", "_reset_parameters"):  # that of attention and of nn.Transformer
            reset = getattr(module, name, None)
            if callable(reset) and _takes(reset, 0):
                yield reset
                break
    for x in [*modules, *model.parameters(), *model.buffers()]:
        vars(x).pop(_MARK, None)
    for module in modules:
        initialise = getattr(module, "_init_weights", None)
        if callable(initialise) and _takes(initialise, 1):
            for part in _children_first(module):
                yield lambda initialise=initialise, part=part: initialise(part)  # type: ignore[misc]


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in the order of ``nn.Module.apply``, each of them once."""
    seen: set[int] = set()

    def visit(one: nn.Module) -> Iterator[nn.Module]:
        if id(one) not in seen:
            seen.add(id(one))
            for child in one.children():
                yield from visit(child)
            yield one

    return visit(module)


def _takes(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _varies(values: Tensor) -> bool:
    return values.numel() > 1 and bool((values != values.flatten()[0]).any())
