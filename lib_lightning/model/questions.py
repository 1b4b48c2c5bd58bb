"""Questions to a model before anything is computed: can it be run, where can it be cut, does this cut it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.model.batch import first_tensor, map_tensors
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.preserve import preserve_model


def _refuse_without_tensors(batch: Any) -> None:
    if first_tensor(batch) is None:
        raise LIBError(
            f"There is no tensor in a batch of type {type(batch).__name__}: batches are tensors, or tuples, lists, "
            "dicts and dataclasses of them."
        )


@contextmanager
def wrap_forward_errors(model: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """A block that calls a model on a batch for the first time; what goes wrong is said in a sentence.

    Args:
        model: The model.
        spec: How it is called.

    Raises:
        LIBError: If the model cannot be called, with the reason.
    """
    try:
        yield
    except LIBError:
        raise
    except Exception as error:
        advice = (
            " By default it is called with the first entry of a tuple or list, and with a dict's entries by name; "
            "input_fn= says otherwise."
            if spec.input_fn is None
            else " input_fn gives what it is called with: a tuple becomes positional arguments, a dict keyword "
            "arguments, and anything else, a list too, is the only argument."
        )
        raise LIBError(
            f"{type(model).__name__} cannot be run on a validation batch: {type(error).__name__}: {error}.{advice}"
        ) from error


def is_model_error(error: Exception, batch: Any) -> bool:
    """Whether an error would come with any other batch, too: a wrong node layer, or NaN from numbers that are none.

    Args:
        error: What went wrong with the batch.
        batch: The batch.

    Returns:
        True if so.
    """
    finite = True

    def look(t: Tensor) -> Tensor:
        nonlocal finite
        finite = finite and bool(torch.isfinite(t).all())
        return t

    map_tensors(batch, look)
    return isinstance(error, NodeLayerError) or (isinstance(error, NotFiniteError) and finite)


@contextmanager
def model_session(instrumented: InstrumentedModel) -> Iterator[None]:
    """Run the live model at will, and leave nothing of it behind."""
    with preserve_model(instrumented.model):
        try:
            yield
        finally:
            instrumented.release()
