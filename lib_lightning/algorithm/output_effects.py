"""Effects of features on the output of a model, in the way that a configuration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.output_changes import OUTPUT_EFFECTS, OutputEffects
from lib_lightning.algorithm.output_derivatives import differentiate_output
from lib_lightning.algorithm.output_steps import step_along_features
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import counted
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.output_distribution import OutputDistribution

_FEW_EFFECTS = (
    "Which outputs a feature raises and lowers is measured for the most important features, {} of {}, on {}, as more "
    "would take too long; lib_lightning.interventions.output_effects measures others."
)
_NO_EFFECTS = (
    "Which outputs a feature raises and lowers is not measured: moving each feature would take too long, and the "
    "output is no linear map of few numbers, or is in half precision. lib_lightning.interventions.output_effects "
    "measures some."
)


def effects_by(config: LIBConfig) -> str:
    """How effects on the output are measured: by ``"steps"`` of one standard deviation, or by ``"derivatives"``."""
    return "steps" if config.effect_directions is None else "derivatives"


def effect_notes(
    config: LIBConfig, bases: Sequence[Basis], effects: Mapping[str, OutputEffects], num_samples: int
) -> list[str]:
    """What to say where not all features have effects on the output.

    Args:
        config: How they were measured.
        bases: Basis of each node layer.
        effects: The effects by node layer.
        num_samples: Number of samples.

    Returns:
        A note, or nothing.
    """
    if not effects and config.effect_directions is not None:
        return [_NO_EFFECTS]
    count = config.effect_features or 0
    total = sum(basis.n_features for basis in bases if basis.name in effects)
    measured = sum(min(count, basis.n_features) for basis in bases if basis.name in effects)
    if measured == total:
        return []
    return [_FEW_EFFECTS.format(f"{measured:,}", f"{total:,}", counted(num_samples, "sample"))]


def find_output_effects(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    bases: Sequence[Basis],
    features: Sequence[Tensor],
    output: OutputDistribution,
    config: LIBConfig,
    stack_elements: int,
    process_group: ProcessGroup,
) -> tuple[dict[str, OutputEffects], int]:
    """Find which outputs features raise and lower most, the same on every process.

    Args:
        instrumented: The model and its node layers, after a first `capture`. Call this within `model_session`.
        batches: The batches of this process, none of them empty.
        bases: Basis of each node layer.
        features: Indices of the features of each node layer, which may be none.
        output: What the output stands for, and its width.
        config: How many samples to use, over all processes, and whether to differentiate or to move each feature.
        stack_elements: About how many numbers the largest tensor of several vectors may have.
        process_group: The processes.

    Returns:
        The effects by node layer, and the number of samples; none where derivatives are asked for and the output moves
        in more directions than the configuration allows.
    """
    wanted = list(zip(bases, features, strict=True))
    arguments = (instrumented, batches, wanted, output, config.effect_samples or 0)
    if config.effect_directions is None:
        found, n = step_along_features(*arguments, stack_elements, process_group)
    else:
        derivatives = differentiate_output(*arguments, config.effect_directions, stack_elements, process_group)
        found, n = ([], 0) if derivatives is None else derivatives
    phase_done(OUTPUT_EFFECTS)
    if not found:
        return {}, 0
    return {basis.name: one for basis, one, own in zip(bases, found, features, strict=True) if len(own)}, n
