"""When and how the features that matter are counted during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_lightning.errors import SettingError, SettingTypeError, check_number, shortened

# False discovery rate of the features that are counted.
LEVEL = 0.05


@dataclass(frozen=True)
class CausalPlan:
    """Count the features that demonstrably matter, those whose removal changes a score, at some snapshots.

    Args:
        every: Interval between snapshots with this count, which the first and the last one have in any case; 0 for
            never; None for the last one alone, with as many features and samples as take about as many operations as
            the rest of a snapshot, or as all snapshots leave of their share of the training.
        score: A function from the model's output and a batch to one score for each sample, higher is better; None for
            the log-likelihood of the batch's labels, if they are known.

    Raises:
        SettingError: If a setting is outside its range.
        SettingTypeError: If the score is no function.
    """

    every: int | None = None
    score: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.every is True:
            raise SettingError("causal_every is a number of snapshots, 0 for never, None for the last; got True.")
        if self.every is not None:
            check_number("causal_every", self.every, lambda n: n >= 0, "must be at least 0, or None", integer=True)
        if self.score is not None and not callable(self.score):
            raise SettingTypeError(
                "causal_score must be a function from output and batch to one score for each sample; got "
                f"{shortened(repr(self.score), 80)}."
            )

    def is_due(self, n_snapshots: int) -> bool:
        """Whether the snapshot after so many others has the count, even if it is not the last one.

        Example:
            >>> CausalPlan().is_due(0), CausalPlan(4).is_due(8), CausalPlan(0).is_due(0)
            (False, True, False)
        """
        return bool(self.every) and n_snapshots % (self.every or 1) == 0

    @property
    def is_wanted(self) -> bool:
        """Whether any snapshot has the count, the last one among them."""
        return self.every != 0

    @property
    def score_name(self) -> str:
        """Name of the score, for files."""
        return "log_likelihood" if self.score is None else getattr(self.score, "__name__", type(self.score).__name__)


NEVER = CausalPlan(0)
