"""A part of a model at one batch, from a node layer on, that runs without what is before it.

An ablation runs the same part of the model again and again: a section, or all that is after it. If its operations can
be recorded (`lib_lightning.model.recorded`), what is before it runs only once more, and several activations may go
through it at once. Its derivatives are those of the operations: what the model detaches has some as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError, is_out_of_memory
from lib_lightning.jacobian.section import STACK_ELEMENTS
from lib_lightning.model.agreement import agree
from lib_lightning.model.batch import tensors_in
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.recorded import RecordedFunction, record
from lib_lightning.model.safe_points import safe_point
from lib_lightning.model.torch_internals import has_memory, storage_key

# Relative deviation by rounding, as a power of eps: 4e-11 in float64, 2e-5 in float32.
ROUNDING = 2 / 3


class ModelPart:
    """A function of the activations of a node layer, such as a section or the rest of the model, at one batch.

    Args:
        instrumented: The model.
        run: The function, by a forward pass of the model.
        at: Activations ``(n, S, d)`` at which the operations are recorded.
        known: Other activations, and what the function returns for each, which the recorded operations have to give.
        max_bytes: Memory for all intermediate results in the recording.

    Attributes:
        nbytes: Memory of what is kept.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        run: Callable[[Tensor], Any],
        at: Tensor,
        known: Sequence[tuple[Tensor, Any]],
        max_bytes: int,
    ) -> None:
        self._run, self.nbytes = run, 0
        self._recorded: RecordedFunction | None = None
        # Several at once are compared with one at a time, once.
        self._largest, self._most_at_once, self._is_compared = 0, STACK_ELEMENTS, False
        if is_recordable(instrumented, at):
            with suppress(Exception):  # one of the model's is raised again when it runs
                output, recorded = record(run, at, max_bytes)
                if recorded is not None and all(_agree(recorded(a), expected) for a, expected in known):
                    self._largest = recorded.largest
                    recorded.values.clear()
                    kept = [constant.alias for constant in recorded.constants.values()]
                    self.nbytes = nbytes_without(instrumented, [*kept, *tensors_in(output)])
                    self._recorded = recorded

    @property
    def is_recorded(self) -> bool:
        """Whether it runs without what is before it; until an operation fails. If not, it has no derivatives."""
        return self._recorded is not None and self._recorded.is_intact

    def stop_repeating(self) -> None:
        """Run the model itself from now on."""
        self._recorded, self.nbytes = None, 0

    def check_score(self, score: Callable[[Any], Tensor], known: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Run the model itself if a score is another one without it: one that reads more than tensors of the output.

        Args:
            score: From an output to scores.
            known: Activations and the scores of the model itself there; it has run at others since.
        """
        for a, expected in known:
            if self.is_recorded and not same_scores(score(self(a)), expected, torch.finfo(a.dtype).eps):
                self.stop_repeating()

    def __call__(self, a: Tensor) -> Any:
        """What the function returns for other activations ``(n, S, d)``."""
        if self._recorded is not None and self._recorded.is_intact:
            safe_point()
            with suppress(Exception):
                return self._recorded(a)
        self._recorded = None
        return self._run(a)

    def at_once(self, own: int = 0) -> int:
        """For how many activations it runs at once: one, unless their tensors are small.

        Args:
            own: Number of entries of the largest other tensor of the caller, for one of them.

        Returns:
            The number.
        """
        return max(1, min(self._most_at_once, STACK_ELEMENTS // max(1, own, self._largest))) if self.is_recorded else 1

    def each(self, a: Tensor) -> Tensor:
        """What the function, if that is a tensor, returns for each of several activations.

        Args:
            a: Activations, shape ``(k, n, S, d)``.

        Returns:
            The results, shape ``(k, ...)``; differentiable if it `is_recorded`.
        """
        found: list[Tensor] = []
        while len(found) < len(a):
            safe_point()
            some = a[len(found) : len(found) + self._most_at_once]
            recorded = self._recorded
            if len(some) > 1 and recorded is not None and recorded.is_intact:
                try:
                    found += self._at_once(recorded, some)
                except Exception as error:
                    # Some operation cannot be repeated for several at once, or the tensors are too large.
                    self._most_at_once = len(some) // 2 if is_out_of_memory(error) else 1
            else:
                found += [self(x) for x in some]
        return torch.stack(found)

    def _at_once(self, recorded: RecordedFunction, a: Tensor) -> Tensor:
        """The results for several activations, in one call of every operation."""
        # A warning says that an operation is repeated for one after another, which is faster without `vmap`.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results: Tensor = torch.vmap(recorded)(a)
        if not self._is_compared:
            # In an autocast of the model's own, several at once are rounded in another way.
            if not _agree(results[-1].detach(), recorded(a[-1].detach())):
                raise LIBError("Several at once give other numbers.")
            self._is_compared = True
        return results


def is_recordable(instrumented: InstrumentedModel, a: Tensor) -> bool:
    """Whether operations on some activations may be repeated without the model around them.

    In lower precision, products in another order would be other numbers.
    """
    return a.dtype in (torch.float32, torch.float64) and instrumented.is_repeatable


def _agree(found: Any, expected: Any) -> bool:
    pairs = list(zip(tensors_in(found), tensors_in(expected), strict=True))
    return all(
        agree(a, b, torch.finfo(b.dtype).eps ** ROUNDING) if b.is_floating_point() else torch.equal(a, b)
        for a, b in pairs
    )


def same_scores(found: Tensor, expected: Tensor, eps: float) -> bool:
    """Whether the scores of some samples are equal up to rounding, relative to the largest.

    Args:
        found: Scores, shape ``(n,)``.
        expected: Other scores.
        eps: Of the type that they were computed in.
    """
    if found.shape != expected.shape or not len(expected):
        return found.shape == expected.shape
    return bool((found - expected).abs().max() <= eps**ROUNDING * expected.abs().max())


def nbytes_of(*tensors: Tensor) -> int:
    """Memory of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def nbytes_without(instrumented: InstrumentedModel, tensors: Iterable[Tensor]) -> int:
    """Memory of some tensors, without parameters and buffers of the model."""
    own = {storage_key(t) for t in instrumented.fixed_tensors() if has_memory(t)}
    strided = [t for t in tensors if t.layout == torch.strided]
    sizes = {storage_key(t): t.untyped_storage().nbytes() for t in strided}
    return sum(size for key, size in sizes.items() if key not in own)
