"""Kinds of bases; importable without torch."""

from __future__ import annotations

from collections.abc import Sequence

# Kinds whose features are identified by their index, such as a neuron or a class.
FIXED_ORDER = ("neuron", "centered")
# Kinds that are the LIB with its whitened activations rotated differently; see `lib_lightning.algorithm.rotations`.
ROTATED = ("random", "ica", "dictionary", "varimax")
# Kinds that depend on a seed, of which there may be several draws.
DRAWN = ("random", "ica", "dictionary")
# Kinds whose node layers are measured by a metric.
WITH_METRIC = ("lib", *ROTATED)
# Kinds whose directions are those of distinct importances, so that equal ones leave them undetermined.
BY_IMPORTANCE = ("lib", "pca")
# All kinds that a graph may be computed in.
ALL = ("lib", "pca", "neuron", *ROTATED)
# The graph of the same architecture with re-initialised weights.
REINIT = "reinit"
# Latents of a dictionary with an encoder and a decoder of its own.
LATENTS = "latents"


def numbered(kinds: Sequence[str]) -> list[str]:
    """Names of bases, of which several may be draws of the same kind.

    Args:
        kinds: Their kinds.

    Returns:
        The kind for the first one of each, and with a number for the others.

    Example:
        >>> numbered(["random", "pca", "random"])
        ['random', 'pca', 'random_2']
    """
    counts = [kinds[: k + 1].count(kind) for k, kind in enumerate(kinds)]
    return [kind if count == 1 else f"{kind}_{count}" for kind, count in zip(kinds, counts, strict=True)]


def kind_and_number(name: str) -> tuple[str, int]:
    """The kind of a basis that `numbered` has named, and the number of the draw, from 1 on.

    Args:
        name: The name; that of anything else is its kind.

    Example:
        >>> kind_and_number("random_2"), kind_and_number("pca"), kind_and_number("mine_2")
        (('random', 2), ('pca', 1), ('mine_2', 1))
    """
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if kind in DRAWN and number.isdecimal() else (name, 1)
