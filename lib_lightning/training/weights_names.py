"""Loads the weights of a checkpoint into a model whose names have other prefixes: those of wrappers, or of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, did_you_mean, quoted

# Parts of names that wrappers add anywhere: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Where several prefixes fit, the first of these is meant.
_COMMON = ("", "module.", "model.", "model.module.", "net.", "network.", "transformer.", "backbone.")


class WrongWeightsError(LIBError, ValueError):
    """Weights of another model."""


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model, in place.

    Names may have prefixes that the model's lack, or lack some that the model's have: ``module.`` of data parallelism,
    ``_orig_mod.`` of `torch.compile`, ``model.`` of a LightningModule around the model.

    Args:
        model: The model.
        weights: Parameters and buffers by name.

    Raises:
        WrongWeightsError: If they are not those of the model; then it is left as it was.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> load_weights(model, {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)})
        >>> model(torch.ones(2)).item()
        2.0
        >>> load_weights(model, {"wieght": torch.ones(1, 2), "bias": torch.zeros(1)})
        Traceback (most recent call last):
        lib_lightning.training.weights_names.WrongWeightsError: The checkpoint lacks 'weight', 1 of 2 weights ...
    """
    expected = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    plain = {_without_wrappers(name): name for name in expected}
    given = {_without_wrappers(name): t for name, t in weights.items()}
    added, removed = _prefixes(list(plain), list(given))
    renamed = {f"{added}{name[len(removed) :]}": t for name, t in given.items() if name.startswith(removed)}
    found = {own: renamed[name] for name, own in plain.items() if name in renamed}
    _check_complete(expected, found, [name for name in renamed if name not in plain])
    for name, t in found.items():
        if t.shape != expected[name].shape:
            raise WrongWeightsError(
                f"'{name}' of the checkpoint has the shape {tuple(t.shape)}, in the model it is "
                f"{tuple(expected[name].shape)}: this is the checkpoint of another model, or of another configuration."
            )
    with torch.no_grad():
        model.load_state_dict(found, strict=False)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(own: Sequence[str], given: Sequence[str]) -> tuple[str, str]:
    """The prefix that names of a checkpoint lack, and the one that they have in addition; "" for none."""
    removed = _common_prefix(own, given)
    if removed is not None:
        return "", removed
    added = _common_prefix(given, own)
    if added is not None:
        return added, ""
    # Neither fits wholly: the one that most names fit, so that an error is about the others.
    choices = [("", prefix) for prefix in _COMMON] + [(prefix, "") for prefix in _COMMON[1:]]
    names = set(own)

    def fitting(choice: tuple[str, str]) -> int:
        return sum(f"{choice[0]}{name[len(choice[1]) :]}" in names for name in given if name.startswith(choice[1]))

    return max(choices, key=fitting)


def _common_prefix(names: Sequence[str], longer: Iterable[str]) -> str | None:
    """The prefix with which all of some names are among others; None if there is none."""
    all_longer = set(longer)
    if not names:
        return None
    rare = max(names, key=len)
    found = [name[: -len(rare)] for name in all_longer if name == rare or name.endswith(f".{rare}")]
    fitting = sorted(prefix for prefix in found if all(f"{prefix}{name}" in all_longer for name in names))
    if len(fitting) > 1:
        known = next((prefix for prefix in _COMMON if prefix in fitting), None)
        if known is None:
            raise WrongWeightsError(
                f"The checkpoint has the weights of several such models: {quoted(fitting, limit=4)}. Give trace() a "
                "function load= that returns those of one."
            )
        return known
    return fitting[0] if fitting else None


def _check_complete(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], others: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has weights of layers that the model does not have."""
    present = {_memory(expected[name]) for name in found}
    # Of weights that are tied, some formats keep one.
    missing = [name for name, t in expected.items() if name not in found and _memory(t) not in present]
    if missing:
        near = did_you_mean(missing[0], others).replace("Did you mean", "Is it its")
        raise WrongWeightsError(
            f"The checkpoint lacks {quoted(missing, limit=2)}, {len(missing):,} of {len(expected):,} weights and "
            f"buffers of the model.{near} If its names differ, give trace() a function load= that returns a state dict."
        )
    # Buffers come and go between versions; a weight means a layer.
    if weights := [name for name in others if "weight" in name.rpartition(".")[2]]:
        near = did_you_mean(weights[0], expected).replace("Did you mean", "Is it the model's")
        raise WrongWeightsError(
            f"The checkpoint has {quoted(weights, limit=2)}, which the model does not have.{near} This is the "
            "checkpoint of another model, or of another configuration."
        )


def _memory(t: Tensor) -> tuple[int, tuple[int, ...]]:
    return (t.data_ptr() if t.numel() else id(t)), tuple(t.shape)
