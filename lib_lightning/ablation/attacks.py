"""Attacks on edge ablations: which of the dropped edges, put back in whole or in part, lower the score most?

That a model keeps its score without some edges says that it does not need them together. It does not say that they do
not matter: two of them may cancel, and an ablation drops both. If the kept edges are all that matters, the score stays
whatever the dropped ones do. An attack therefore looks for factors between 0 (dropped) and 1 (put back) of the dropped
edges with the worst score, while the kept edges stay. The factors are the same for all samples.

*random*: random subsets of the dropped edges, in whole or scaled by random numbers; the worst of several draws.

*pgd*: projected gradient descent. From several starting points, each factor takes steps of the same size against the
sign of the score's derivative, and is put back into the interval. Decompositions of a network's parameters are tested
in the same two ways, with random and with adversarial masks of the parts that are said not to matter (stochastic
parameter decomposition, arXiv 2506.20790, and its successors).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lib_lightning.ablation.scored_model import MeanScore, ScoredSection
from lib_lightning.algorithm.config import check_choice
from lib_lightning.errors import check_number

AttackKind = Literal["random", "pgd"]
# With so few dropped edges, descent starts from at least so many points, and edges are changed one by one after it. Of
# so few edges in all, every subset is tried.
_FEW, _STARTS_OF_FEW = 12, 8


@dataclass(frozen=True)
class EdgeAttack:
    """How the worst factors of dropped edges are looked for.

    Args:
        kind: ``"random"`` or ``"pgd"``.
        n_draws: Number of draws of a random attack.
        n_steps: Steps from each starting point of projected gradient descent.
        n_starts: Number of starting points: all dropped edges at 0, at one half, at 1, and then at random. With at most
            12 dropped edges there are at least eight; of at most 12 edges, all subsets of those dropped are tried.
        step_size: Size of a step.
        seed: Of the random numbers.

    Raises:
        SettingError: If a setting is outside its range.

    Example:
        >>> EdgeAttack("pgd", n_steps=5).n_starts
        2
    """

    kind: AttackKind
    n_draws: int = 16
    n_steps: int = 10
    n_starts: int = 2
    step_size: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("attack", self.kind, get_args(AttackKind))
        for name in ("n_draws", "n_steps", "n_starts"):
            check_number(name, getattr(self, name), lambda n: n >= 1, "must be at least 1", integer=True)
        check_number("step_size", self.step_size, lambda x: 0 < x <= 1, "must be above 0 and at most 1")
        check_number("seed", self.seed, lambda n: n >= 0, "must be at least 0", integer=True)

    @classmethod
    def of(cls, attack: str | EdgeAttack | None) -> EdgeAttack | None:
        """An attack by its name, with the default settings."""
        return attack if attack is None or isinstance(attack, EdgeAttack) else cls(attack)  # type: ignore[arg-type]


class Attacked(NamedTuple):
    """The worst that an attack has found.

    Attributes:
        score: The score.
        mask: Factor of each edge, 1 for those that are kept, shape ``(r_out, r_in)``, float64.
    """

    score: MeanScore
    mask: Tensor


def worst(
    section: ScoredSection,
    kept: Tensor,
    attack: EdgeAttack,
    enough: float = float("-inf"),
    dropped: MeanScore | None = None,
) -> Attacked:
    """Find factors of the dropped edges with a low score.

    Args:
        section: The score as a function of all factors.
        kept: True for the edges that stay, shape ``(r_out, r_in)``.
        attack: How to look for them.
        enough: End as soon as the score is below this number by more than its standard error.
        dropped: The score with all dropped edges at 0, if it is known.

    Returns:
        The lowest score that was found, and its factors. It is never above that with all dropped edges at 0.
    """
    found = Attacked(section(kept) if dropped is None else dropped, kept.double())
    generator = torch.Generator().manual_seed(attack.seed)
    tries = _draws(kept, attack, generator) if attack.kind == "random" else _descents(section, kept, attack, generator)
    if bool(kept.all()):
        return found
    for mask, known in tries:
        if _is_below(found.score, enough):
            return found
        found = min(found, Attacked(section(mask) if known is None else known, mask), key=lambda one: one.score.mean)
    if attack.kind == "random" or int((~kept).sum()) > _FEW:
        return found
    return (_with_any_subset if kept.numel() <= _FEW else _with_single_changes)(section, kept, found, enough)


def _is_below(score: MeanScore, enough: float) -> bool:
    """Whether a score is below a number by more than its standard error."""
    return score.mean + (0.0 if math.isnan(score.error) else score.error) < enough


def _with_any_subset(section: ScoredSection, kept: Tensor, found: Attacked, enough: float) -> Attacked:
    """Put back each subset of the dropped edges."""
    places = (~kept).nonzero().unbind(1)
    for subset in itertools.product((0.0, 1.0), repeat=len(places[0])):
        if _is_below(found.score, enough):
            break
        mask = kept.double()
        mask[places] = mask.new_tensor(subset)
        found = min(found, Attacked(section(mask), mask), key=lambda one: one.score.mean)
    return found


def _with_single_changes(section: ScoredSection, kept: Tensor, found: Attacked, enough: float) -> Attacked:
    """Put back or drop one edge after another, as long as that lowers the score."""
    is_better = True
    while is_better and not _is_below(found.score, enough):
        masks = [found.mask.clone() for _ in range(int((~kept).sum()))]
        for mask, (i, j) in zip(masks, (~kept).nonzero().tolist(), strict=True):
            mask[i, j] = 1 - mask[i, j].round()
        best = min((Attacked(section(mask), mask) for mask in masks), key=lambda one: one.score.mean)
        is_better = best.score.mean < found.score.mean
        found = best if is_better else found
    return found


_Tries = Iterator[tuple[Tensor, MeanScore | None]]


def _draws(kept: Tensor, attack: EdgeAttack, generator: torch.Generator) -> _Tries:
    """Random subsets of random size, in turn in whole and scaled."""
    for draw in range(attack.n_draws):
        share = torch.rand((), generator=generator, device="cpu")
        factors = (torch.rand(kept.shape, generator=generator, device="cpu") < share).double()
        if draw % 2:
            factors *= torch.rand(kept.shape, generator=generator, device="cpu", dtype=torch.float64)
        yield torch.where(kept, 1.0, factors), None


def _descents(section: ScoredSection, kept: Tensor, attack: EdgeAttack, generator: torch.Generator) -> _Tries:
    for start in range(max(attack.n_starts, _STARTS_OF_FEW if int((~kept).sum()) <= _FEW else 0)):
        level = (0.0, 0.5, 1.0)[start] if start < 3 else 0.0
        factors = torch.full(kept.shape, level, dtype=torch.float64, device="cpu")
        if start >= 3:
            factors = torch.rand(kept.shape, generator=generator, device="cpu", dtype=torch.float64)
        mask = torch.where(kept, 1.0, factors)
        for _ in range(attack.n_steps):
            score, gradient = section.gradient(mask)
            yield mask, score
            moved = (mask - attack.step_size * gradient.sign()).clamp(0, 1)
            mask, before = torch.where(kept, 1.0, moved), mask
            if torch.equal(mask, before):
                break
        yield mask, None
        # The worst of what is convex in the factors is at a corner.
        corner = torch.where(kept, 1.0, mask.round())
        if not torch.equal(corner, mask):
            yield corner, None
