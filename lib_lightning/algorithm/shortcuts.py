"""What makes the algorithm fast, as a choice between implementations of one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lib_lightning.algorithm.gram import DenseGram, Gram
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.jacobian.closed_form_detect import ClosedForms, DetectedClosedForms, NoClosedForms


@dataclass(frozen=True)
class Shortcuts:
    """Shortcuts of the computation. Each has a plain twin that gives the same numbers.

    Attributes:
        gram: Makes the sums of the Jacobian metric: `LowRankGram`, or `DenseGram`.
        closed_forms: Finds sections in closed form: `DetectedClosedForms`, or `NoClosedForms`.
        keep_graphs: Whether the graphs of the first forward pass may be kept, or each phase runs all batches again.
        dual: Whether the eigenproblem of a wide node layer is solved in its dual form, or from its covariance.
        forward_mode: Whether edges use forward mode where it is cheaper, or only reverse mode.
    """

    gram: Callable[[int, int], Gram] = LowRankGram
    closed_forms: type[ClosedForms] = DetectedClosedForms
    keep_graphs: bool = True
    dual: bool = True
    forward_mode: bool = True


FAST = Shortcuts()
PLAIN = Shortcuts(DenseGram, NoClosedForms, keep_graphs=False, dual=False, forward_mode=False)
