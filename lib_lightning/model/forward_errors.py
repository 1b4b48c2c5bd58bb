"""What errors that a model or torch raises mean for somebody who wants a basis: one sentence instead of a traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lib_lightning.errors import LIBError, brief, is_out_of_memory, quoted
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.torch_internals import NAMES

# Parts of messages of torch about two types in one operation.
_TWO_TYPES = ("have the same dtype", "expected scalar type", "same data type", "Input type (")
_TWO_DEVICES = ("on the same device", "type (torch.cuda.")


class OutOfMemoryLIBError(LIBError, MemoryError):
    """Not enough memory for a model and a basis of it."""


@contextmanager
def wrap_forward_errors(model: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """Run a block that calls a model, and explain its errors.

    Args:
        model: The model.
        spec: How it is called.

    Raises:
        LIBError: If the model cannot be called, or torch cannot compute its derivatives, with the reason.
    """
    try:
        yield
    except LIBError:
        raise
    except Exception as error:
        kind = OutOfMemoryLIBError if is_out_of_memory(error) else LIBError
        raise kind(explain(model, spec, error)) from error


def explain(model: nn.Module, spec: ModelSpec, error: Exception) -> str:
    """Say what an error means that was raised while a model was called, or its derivatives were computed.

    Args:
        model: The model.
        spec: How it is called.
        error: The error.

    Returns:
        One to three sentences.
    """
    name, message = type(model).__name__, str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if is_out_of_memory(error):
        return (
            f"{name} ran out of memory: {brief(error)}. Lower num_samples or the size of batches, choose fewer or "
            "narrower node layers, or lower memory_limit if other processes use the same device."
        )
    if "nference tensor" in message:
        return (
            f"{name} computes under torch.inference_mode (a decorator of its forward?), where there are no gradients: "
            f"use torch.no_grad around calls in evaluation instead. {brief(error)}."
        )
    if isinstance(error, RuntimeError) and any(part in message for part in _TWO_DEVICES):
        devices = sorted({str(t.device) for t in model.parameters()})
        return (
            f"{name} is on {quoted(devices)}, and the batch or a tensor that it creates is not: {brief(error)}. Move "
            "the batches to the model's device."
        )
    if isinstance(error, RuntimeError) and any(part in message for part in _TWO_TYPES):
        types = sorted({str(t.dtype).removeprefix("torch.") for t in model.parameters() if t.is_floating_point()})
        return (
            f"{name} multiplies numbers of two types; its weights are {quoted(types)}: {brief(error, 120)}. Give "
            "batches of that type, or dtype=torch.float32 to convert weights and batches. A tensor inside an object of "
            "another class is not converted: register it as a buffer."
        )
    if any(frame.name == NAMES["backward engine"] for frame in frames):
        return (
            f"{name} can be run, but torch cannot compute its derivatives: {brief(error)}. Node layers around that "
            "operation, or ahead of it, may be possible."
        )
    if any(frame.name == "_call_impl" for frame in frames) or not frames or spec.input_fn is not None:
        call = "" if spec.call is None else f" It was called as {spec.call}."
        return (
            f"{name} cannot be run on a batch: {brief(error)}.{call} input_fn=lambda batch: ... returns the arguments: "
            "a tuple becomes positional arguments, a dict keyword arguments, and anything else is the only argument."
        )
    return (
        f"{brief(error)} was raised in {Path(frames[-1].filename).name} while {name} was analysed, which should not "
        "happen: please report it, with the traceback that LIB_LIGHTNING_TRACEBACK=1 shows."
    )
