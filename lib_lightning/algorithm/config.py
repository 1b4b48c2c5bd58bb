"""Configuration of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lib_lightning.model.node_layer import OUTPUT

BasisKind = Literal["lib", "pca", "neuron"]
FinalBasisKind = Literal["auto", "neuron", "pca", "centered"]
FinalMetric = Literal["fisher"]


@dataclass(frozen=True)
class LIBConfig:
    """What to compute; the fields are arguments of `lib_lightning.compute_interaction_graph`, and explained there.

    Raises:
        ValueError: If a value is outside its range.
    """

    basis: BasisKind = "lib"
    final_basis: FinalBasisKind = "auto"
    rtol: float = 1e-6
    n_probes: int | None = None
    integration_steps: int = 0
    final_metric: FinalMetric | None = None
    n_pushed: int | None = None

    def __post_init__(self) -> None:
        _choice("basis", self.basis, get_args(BasisKind))
        _choice("final_basis", self.final_basis, get_args(FinalBasisKind))
        if self.final_metric is not None:
            _choice("final_metric", self.final_metric, get_args(FinalMetric))
            if self.final_basis != "auto":
                raise ValueError(
                    f"final_metric={self.final_metric!r} determines the basis of the last node layer. Remove "
                    f"final_basis={self.final_basis!r}."
                )
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must be at least 0 and less than 1; got {self.rtol}.")
        if self.n_probes is not None and self.n_probes < 1:
            raise ValueError(f"n_probes must be at least 1, or None for the exact metric; got {self.n_probes}.")
        if self.n_pushed is not None and self.n_pushed < 1:
            raise ValueError(f"n_pushed must be at least 1, or None for exact edges; got {self.n_pushed}.")
        if self.integration_steps < 0:
            raise ValueError(f"integration_steps must not be negative; got {self.integration_steps}.")


def final_kind(config: LIBConfig, taps: Sequence[str]) -> str:
    """The kind of basis of the last node layer, which has no next layer and therefore no Jacobian metric.

    Args:
        config: The configuration.
        taps: Taps of the last node layer.

    Returns:
        The configured ``final_basis``; if that is ``"auto"``, ``"neuron"`` for the model's output, whose entries have a
        meaning (such as classes), and ``"pca"`` for any other node layer.

    Example:
        >>> final_kind(LIBConfig(), ["output"]), final_kind(LIBConfig(), ["blocks.3"])
        ('neuron', 'pca')
    """
    if config.final_basis != "auto":
        return config.final_basis
    return "neuron" if tuple(taps) == (OUTPUT,) else "pca"


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
