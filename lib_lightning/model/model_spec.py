"""How to call a model on a batch: its inputs, the mask of valid positions, and the computation dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError, SettingTypeError, brief, shortened
from lib_lightning.model.calls import InputFn as InputFn
from lib_lightning.model.calls import ModelCall
from lib_lightning.model.skip_positions import SkipPositions, plain_skip

MaskFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """How to call a model on a batch.

    Args:
        input_fn: Converts a batch to the model's input: a mapping becomes keyword arguments, a tuple becomes positional
            arguments, and anything else is the only argument. By default the model is called as
            `lib_lightning.model.steps.find_call` finds it to be on the first batch.
        mask: Marks the valid positions of a batch, for example those that are not padding: the name or index of the
            batch's entry that holds the mask, such as ``"attention_mask"``, or a function from a batch to a tensor of
            shape ``(n, S)``. By default all positions are valid.
        dtype: Floating-point type to compute in. By default the model's own.
        skip_positions: Positions to leave out of all node layers that do not say themselves: a number of first ones, or
            of last ones if negative, a list of indices, or a slice. By default none.

    Raises:
        SettingError: If ``skip_positions`` is neither a number, nor indices, nor a slice.
        SettingTypeError: If ``dtype`` is not a floating-point type, ``input_fn`` no function, or ``mask`` neither the
            name or index of an entry nor a function.

    Example:
        >>> spec = ModelSpec(mask="attention_mask")
        >>> spec.mask_of({"attention_mask": torch.ones(1, 2)})
        tensor([[1., 1.]])
    """

    input_fn: InputFn | ModelCall | None = None
    mask: str | int | MaskFn | None = None
    dtype: torch.dtype | None = None
    skip_positions: SkipPositions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_positions", plain_skip(self.skip_positions))
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise SettingTypeError(
                f"dtype is a floating-point type such as torch.float64, or None; got {self.dtype!r}."
            )
        if not (self.input_fn is None or callable(self.input_fn)):
            raise SettingTypeError(
                "input_fn is a function from a batch to the model's input, such as lambda batch: batch['x']; got "
                f"{shortened(repr(self.input_fn), 80)}."
            )
        is_entry = isinstance(self.mask, (str, int)) and not isinstance(self.mask, bool)
        if not (self.mask is None or is_entry or callable(self.mask)):
            raise SettingTypeError(
                "mask is the name or index of the batch's entry that holds the mask, such as 'attention_mask', or a "
                f"function from a batch to a tensor (n, S); got {shortened(repr(self.mask), 80)}."
            )

    @property
    def call(self) -> ModelCall | None:
        """How the model is called; None before the first batch."""
        return self.input_fn if isinstance(self.input_fn, ModelCall) else None

    def called_as(self, call: Mapping[str, Any] | None) -> ModelSpec:
        """The same, with a call that was found earlier, unless ``input_fn`` is given.

        Args:
            call: `ModelCall.plain`; None if it is not known.

        Returns:
            The specification.
        """
        return self if self.input_fn is not None else replace(self, input_fn=ModelCall.from_plain(call))

    def mask_of(self, batch: Any) -> Tensor | None:
        """The mask of a batch's valid positions.

        Args:
            batch: One batch, as the data loader gives it.

        Returns:
            Nonzero at valid positions, shape ``(n, S)``; None if all positions are valid.

        Raises:
            LIBError: If the batch has no such entry, or the result is not a tensor.
        """
        if self.mask is None:
            return None
        try:
            found = self.mask(batch) if callable(self.mask) else batch[self.mask]
        except (KeyError, IndexError, TypeError) as error:
            raise LIBError(
                f"mask={self.mask!r} gives no mask for a batch of type {type(batch).__name__}: "
                f"{brief(error)}. It is the name or index of an entry of the batch, or a function "
                "from a batch to a tensor."
            ) from error
        if not isinstance(found, Tensor):
            raise LIBError(f"mask={self.mask!r} gives {type(found).__name__} instead of a tensor of shape (n, S).")
        return found
