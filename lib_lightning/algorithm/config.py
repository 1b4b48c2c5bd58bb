"""Configuration of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lib_lightning.algorithm.basis_kinds import WITH_METRIC
from lib_lightning.errors import SettingError, check_number, did_you_mean
from lib_lightning.model.node_layer import OUTPUT
from lib_lightning.model.output_distribution import OutputSetting

BasisKind = Literal["lib", "pca", "neuron", "random", "ica", "dictionary", "varimax"]
FinalBasisKind = Literal["auto", "neuron", "pca", "centered"]
FinalMetric = Literal["fisher"]
MetricKind = Literal["next", "output"]


@dataclass(frozen=True)
class LIBConfig:
    """What to compute; the fields are arguments of `lib_lightning.compute_interaction_graph`, and explained there.

    Except for four: ``jacobian_samples`` is the number of samples for metric, edges and importances for the output, at
    even distances among those for means, covariances and features; None for all of them. ``effect_samples`` and
    ``effect_features`` are the number of samples, and the largest number of features of each node layer, with which
    effects on the output are measured. None is to be chosen, or none at all. ``effect_directions`` is the number of
    directions in which the output moves, at most, where effects are derivatives along these
    (`lib_lightning.algorithm.output_derivatives`); None if they are measured by moving each feature.

    Raises:
        SettingError: If a value is outside its range.
    """

    basis: BasisKind = "lib"
    final_basis: FinalBasisKind = "auto"
    rtol: float = 1e-6
    n_probes: int | None = None
    integration_steps: int = 0
    final_metric: FinalMetric | None = None
    n_pushed: int | None = None
    metric: MetricKind = "next"
    output_distribution: OutputSetting = "auto"
    jacobian_samples: int | None = None
    effect_samples: int | None = None
    effect_features: int | None = None
    effect_directions: int | None = None
    basis_seed: int = 0

    def __post_init__(self) -> None:
        check_choice("basis", self.basis, get_args(BasisKind))
        check_choice("final_basis", self.final_basis, get_args(FinalBasisKind))
        check_choice("metric", self.metric, get_args(MetricKind))
        check_choice("output_distribution", self.output_distribution, get_args(OutputSetting))
        if self.metric == "output" and self.basis not in WITH_METRIC:
            raise SettingError(f"metric='output' is the metric of basis='lib'; got basis={self.basis!r}.")
        if self.output_distribution == "none" and (self.metric == "output" or self.final_metric):
            asked = "metric='output'" if self.metric == "output" else f"final_metric={self.final_metric!r}"
            raise SettingError(f"{asked} measures by what the output predicts. Remove output_distribution='none'.")
        if self.final_metric is not None:
            check_choice("final_metric", self.final_metric, get_args(FinalMetric))
            if self.final_basis != "auto":
                raise SettingError(
                    f"final_metric={self.final_metric!r} determines the basis of the last node layer. Remove "
                    f"final_basis={self.final_basis!r}."
                )
        check_number("rtol", self.rtol, lambda x: 0 <= x < 1, "must be at least 0 and less than 1")
        for name, exact in (("n_probes", "the exact metric"), ("n_pushed", "exact edges")):
            if (count := getattr(self, name)) is not None:
                check_number(name, count, lambda k: k >= 1, f"must be at least 1, or None for {exact}", integer=True)
        check_number(
            "basis_seed",
            self.basis_seed,
            lambda k: 0 <= k < 2**32,
            "must be at least 0 and less than 2**32",
            integer=True,
        )
        check_number(
            "integration_steps", self.integration_steps, lambda k: k >= 0, "must not be negative", integer=True
        )


def final_kind(config: LIBConfig, taps: Sequence[str]) -> str:
    """The kind of basis of the last node layer, which has no next layer.

    Args:
        config: The configuration.
        taps: Taps of the last node layer.

    Returns:
        ``"lib"`` with a ``final_metric``, else the configured ``final_basis``. If that is ``"auto"``, ``"neuron"`` for
        the model's output, whose entries have a meaning (such as classes). For any other node layer ``"pca"``, or
        ``"lib"`` if all bases are measured by the output.

    Example:
        >>> final_kind(LIBConfig(), ["output"]), final_kind(LIBConfig(), ["blocks.3"])
        ('neuron', 'pca')
    """
    if config.final_metric is not None:
        return "lib"
    if config.final_basis != "auto":
        return config.final_basis
    if tuple(taps) == (OUTPUT,):
        return "neuron"
    return "lib" if config.metric == "output" else "pca"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise an error for a value that is not one of the choices.

    Args:
        name: Name of the setting.
        value: Its value.
        choices: The values allowed.

    Raises:
        SettingError: If it is none of them.
    """
    if value not in choices:
        meant = did_you_mean(value, choices)
        raise SettingError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{meant}")
