"""When and how a model is ablated during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lib_lightning.ablation.attacks import AttackKind, EdgeAttack
from lib_lightning.ablation.scored_model import Score
from lib_lightning.ablation.scores import accuracy, log_likelihood
from lib_lightning.ablation.search import check_tolerance
from lib_lightning.errors import SettingError, check_number

NamedScore = Literal["accuracy", "log_likelihood"]
_SCORES: dict[str, Score] = {"accuracy": accuracy, "log_likelihood": log_likelihood}


@dataclass(frozen=True)
class AblationPlan:
    """Count the edges that the model needs at some snapshots of a training. This costs more than a snapshot.

    Args:
        score: The score that the model must keep: accuracy, log_likelihood (of labels that are a batch's second entry,
            or the entry named labels), or a function from the model's output and a batch to one score for each sample,
            higher is better.
        tolerance: Accepted loss of mean score.
        every_n_snapshots: Interval between ablations. The first and the last snapshot are always ablated.
        val_dataloader: Index of the validation data loader to score on. None (null) for the next samples of the one
            that the basis is computed on; if there are no more, the samples of the basis are used.
        attack: What the score has to withstand: random for random subsets of the dropped edges, put back or scaled; pgd
            for the worst factors that projected gradient descent finds for them. None (null) for an ablation alone,
            which takes a tenth to a hundredth of the time.

    Raises:
        SettingError: If a setting is outside its range.
    """

    score: NamedScore | Callable[[Any, Any], Tensor] = "accuracy"
    tolerance: float = 1e-3
    every_n_snapshots: int = 10
    val_dataloader: int | None = None
    attack: AttackKind | None = None

    def __post_init__(self) -> None:
        if isinstance(self.score, str) and self.score not in _SCORES:
            raise SettingError(
                f"score must be one of {', '.join(get_args(NamedScore))}, or a function; got {self.score!r}."
            )
        EdgeAttack.of(self.attack)
        check_tolerance(self.tolerance)
        check_number("every_n_snapshots", self.every_n_snapshots, lambda n: n >= 1, "must be at least 1", integer=True)

    @property
    def score_fn(self) -> Score:
        """The score as a function."""
        return _SCORES[self.score] if isinstance(self.score, str) else self.score
