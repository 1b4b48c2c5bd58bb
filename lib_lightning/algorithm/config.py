"""What to compute."""

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
    """What to compute; see `lib_lightning.compute_interaction_graph` for the meaning of each entry.

    Raises:
        ValueError: If a value is outside its range.
    """

    basis: BasisKind = "lib"
    final_basis: FinalBasisKind = "auto"
    rtol: float = 1e-6
    n_probes: int | None = None
    integration_steps: int = 0
    final_metric: FinalMetric | None = None

    def __post_init__(self) -> None:
        _choice("basis", self.basis, get_args(BasisKind))
        _choice("final_basis", self.final_basis, get_args(FinalBasisKind))
        if self.final_metric is not None:
            _choice("final_metric", self.final_metric, get_args(FinalMetric))
            if self.final_basis != "auto":
                raise ValueError(
                    f"final_metric={self.final_metric!r} decides on the basis of the last node layer; leave "
                    f"final_basis={self.final_basis!r} out."
                )
        if not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is a share of the largest eigenvalue, from 0 up to 1; got {self.rtol}.")
        if self.n_probes is not None and self.n_probes < 1:
            raise ValueError(f"n_probes is a number of probes from 1 on, or None for all of them; got {self.n_probes}.")
        if self.integration_steps < 0:
            raise ValueError(f"integration_steps is a number of points, or 0 for none; got {self.integration_steps}.")


def final_kind(settings: LIBConfig, taps: Sequence[str]) -> str:
    """Which basis the last node layer takes: it has no next layer to measure its features by.

    Args:
        settings: What to compute.
        taps: Taps of the last node layer.

    Returns:
        ``"neuron"`` for the model's own output unless asked otherwise (its entries have names, such as classes), and
        ``"pca"`` for anything else.

    Example:
        >>> final_kind(LIBConfig(), ["output"]), final_kind(LIBConfig(), ["blocks.3"])
        ('neuron', 'pca')
    """
    if settings.final_basis != "auto":
        return settings.final_basis
    return "neuron" if tuple(taps) == (OUTPUT,) else "pca"


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; got {value!r}.")
