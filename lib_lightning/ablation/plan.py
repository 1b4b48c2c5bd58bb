"""When and how a model in training is ablated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lib_lightning.ablation.scored_model import Score
from lib_lightning.ablation.scores import accuracy, log_likelihood

NamedScore = Literal["accuracy", "log_likelihood"]
_SCORES: dict[str, Score] = {"accuracy": accuracy, "log_likelihood": log_likelihood}


@dataclass(frozen=True)
class AblationPlan:
    """Count the edges that a model in training needs, now and then: it costs more than a snapshot.

    Args:
        score: What the model is to keep: accuracy, log_likelihood (of labels that are a batch's second entry, or the
            one named labels), or a function from the model's output and a batch to one score for each sample, the
            higher the better.
        tolerance: Loss of mean score that is accepted.
        every_n_snapshots: At the first snapshot, at every so many after it, and at the last one.
        val_dataloader: Which of several validation data loaders to score on. None (null) for samples of the one that
            the basis comes from, those that follow; where there are no more, the same samples serve for both.

    Raises:
        ValueError: If a setting is outside its range.
    """

    score: NamedScore | Callable[[Any, Any], Tensor] = "accuracy"
    tolerance: float = 1e-3
    every_n_snapshots: int = 10
    val_dataloader: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.score, str) and self.score not in _SCORES:
            raise ValueError(f"score is one of {', '.join(get_args(NamedScore))}, or a function; got {self.score!r}.")
        if self.tolerance < 0:
            raise ValueError(f"tolerance is a loss of score from 0 on; got {self.tolerance}.")
        if self.every_n_snapshots < 1:
            raise ValueError(f"every_n_snapshots is a number from 1 on; got {self.every_n_snapshots}.")

    @property
    def score_fn(self) -> Score:
        """The score as a function."""
        return _SCORES[self.score] if isinstance(self.score, str) else self.score
