"""Questions to a model before anything is computed: can it be run, where can it be cut, does this cut it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.core.check import check
from lib_lightning.core.cutpoint import CutPoint
from lib_lightning.core.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.core.guard import undisturbed
from lib_lightning.core.layers import NodeLayer, as_node_layers
from lib_lightning.core.live import InputFn, LiveModel, MaskFn
from lib_lightning.core.nested import first_tensor, map_tensors
from lib_lightning.core.propose import find_cuts, find_proposed, propose


def check_node_layers(
    model: nn.Module,
    batch: Any,
    node_layers: Sequence[str | NodeLayer],
    dtype: torch.dtype | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
) -> None:
    """Find mistakes in a choice of node layers by running one batch, without computing anything else.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        node_layers: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.

    Raises:
        NodeLayerError: If a node layer is unknown, never run, out of order, or does not cut the computation.
        ActivationError: If activations are integers, NaN or infinite.

    Example:
        >>> check_node_layers(nn.Linear(2, 2), torch.ones(1, 2), ["input", "output"])
    """
    live = LiveModel(model, as_node_layers(node_layers), input_fn, dtype, as_mask_fn(mask))
    _refuse_without_tensors(batch)
    with session(live):
        check(live, batch)


def list_node_layers(model: nn.Module, batch: Any, input_fn: InputFn | None = None) -> list[CutPoint]:
    """List every place where a model can be cut with a single tensor, and which of them are proposed as node layers.

    Of several inputs that each go their own way to the output (images and time steps), only the largest count: the
    others are context. Node layers then begin before the two meet.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        input_fn: As for `compute_interaction_graph`.

    Returns:
        The places, in forward order; ``tap`` is what to write as a node layer.

    Raises:
        NodeLayerError: If there are fewer than two.
        ActivationError: If there would be more, but for activations that are NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for cut in list_node_layers(model, torch.randn(3, 4)):
        ...     print(cut.tap, cut.positions, cut.features, cut.module, cut.proposed)
        input 1 4 Sequential True
        0 1 8 Linear False
        1 1 8 ReLU True
        output 1 2 Sequential True
    """
    with runnable(model, input_fn), undisturbed(model):
        cuts = find_cuts(model, batch, input_fn)
    taps = propose(cuts)
    return [replace(cut, proposed=cut.tap in taps) for cut in cuts]


def _refuse_without_tensors(batch: Any) -> None:
    if first_tensor(batch) is None:
        raise LIBError(
            f"There is no tensor in a batch of type {type(batch).__name__}: batches are tensors, or tuples, lists, "
            "dicts and dataclasses of them."
        )


@contextmanager
def runnable(model: nn.Module, input_fn: InputFn | None) -> Iterator[None]:
    """A block that calls a model on a batch for the first time; what goes wrong is said in a sentence.

    Args:
        model: The model.
        input_fn: As for `compute_interaction_graph`.

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
            if input_fn is None
            else " input_fn gives what it is called with: a tuple becomes positional arguments, a dict keyword "
            "arguments, and anything else, a list too, is the only argument."
        )
        raise LIBError(
            f"{type(model).__name__} cannot be run on a validation batch: {type(error).__name__}: {error}.{advice}"
        ) from error


def propose_node_layers(
    model: nn.Module, batch: Any, input_fn: InputFn | None = None, mask: str | int | MaskFn | None = None
) -> list[str]:
    """Choose node layers for a model: those that `list_node_layers` proposes, in less time.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.

    Returns:
        Two to six node layers, in forward order.

    Raises:
        NodeLayerError: If the model cannot be cut at two places.
        ActivationError: If it could be, but for activations that are NaN or infinite.

    Example:
        >>> propose_node_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
        ['input', '1', 'output']
    """
    _refuse_without_tensors(batch)
    with undisturbed(model):
        return find_proposed(model, batch, input_fn, as_mask_fn(mask))


def blames_the_model(error: Exception, batch: Any) -> bool:
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


def as_mask_fn(mask: str | int | MaskFn | None) -> MaskFn | None:
    """Make a function of what a user gives as a mask.

    Args:
        mask: A function, or the name or index of the batch's entry that is the mask.

    Returns:
        A function from a batch to its mask; None for None.

    Example:
        >>> as_mask_fn("attention_mask")({"attention_mask": torch.ones(1, 2)})
        tensor([[1., 1.]])
    """
    if mask is None:
        return None

    def from_batch(batch: Any) -> Tensor:
        try:
            found = mask(batch) if callable(mask) else batch[mask]
        except (KeyError, IndexError, TypeError) as error:
            raise LIBError(
                f"mask={mask!r} gives no mask for a batch of type {type(batch).__name__}: {type(error).__name__}: "
                f"{error}. It is the name or index of an entry of the batch, or a function from a batch to a tensor."
            ) from error
        if not isinstance(found, Tensor):
            raise LIBError(f"mask={mask!r} gives {type(found).__name__} instead of a tensor of shape (n, S).")
        return found

    return from_batch


@contextmanager
def session(live: LiveModel) -> Iterator[None]:
    """Run the live model at will, and leave nothing of it behind."""
    with undisturbed(live.model):
        try:
            yield
        finally:
            live.release()
