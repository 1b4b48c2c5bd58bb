"""Scores per sample for classifiers and language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.precision import for_sums


def accuracy(output: Any, batch: Any) -> Tensor:
    """Accuracy of each sample: 1 if the largest logit is that of the label, else 0.

    Args:
        output: The model's output. Its first tensor holds the logits, shape ``(n, classes)``, or ``(n, S, classes)``
            for a mean over positions.
        batch: A batch. Its second entry, or the one named ``"labels"``, holds the class indices, shape ``(n,)`` or
            ``(n, S)``, for the logits of the same position; negative ones are ignored. Labels that are the batch's own
            ``"input_ids"`` are those of a causal language model of Hugging Face, which shifts them itself: there the
            logits of each position belong to the next label. (A model that copies its input needs a score of its own.)

    Returns:
        Shape ``(n,)``, float64.

    Example:
        >>> import torch
        >>> accuracy(torch.eye(2), (None, torch.tensor([0, 0])))
        tensor([1., 0.], dtype=torch.float64)
    """
    logits, labels = _logits_and_labels(output, batch)
    return _mean_over_positions((logits.argmax(-1) == labels).double(), labels)


def log_likelihood(output: Any, batch: Any) -> Tensor:
    """Log likelihood of each sample's label, in nats.

    Args:
        output: As for `accuracy`.
        batch: As for `accuracy`.

    Returns:
        Shape ``(n,)``, float64.

    Example:
        >>> import torch
        >>> log_likelihood(torch.zeros(1, 2), (None, torch.tensor([1])))
        tensor([-0.6931], dtype=torch.float64)
    """
    logits, labels = _logits_and_labels(output, batch)
    chosen = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return _mean_over_positions(chosen, labels)


def _logits_and_labels(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits = first_tensor(output)
    try:
        labels = batch["labels"] if _is_mapping(batch) else batch[1]
    except (KeyError, IndexError, TypeError) as error:
        raise LIBError(
            f"A batch of type {type(batch).__name__} has no labels: neither a second entry nor one named 'labels'. "
            "Pass your own score function: (output, batch) -> one number for each sample."
        ) from error
    if logits is None or not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (logits, labels)]
        raise LIBError(
            f"Logits {shapes[0]} and labels {shapes[1]} do not fit: there must be one label for each row of logits. "
            "Pass your own score function: (output, batch) -> one number for each sample."
        )
    if _are_inputs(labels, batch) and not _predicts_same_position(output):
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = for_sums(logits)
    return logits, labels.to(logits.device)


def _is_mapping(batch: Any) -> bool:
    return isinstance(batch, dict) or hasattr(batch, "keys")


def _are_inputs(labels: Tensor, batch: Any) -> bool:
    """Whether the labels are the input of the same positions, which causal language models do not predict there."""
    inputs = batch["input_ids"] if _is_mapping(batch) and "input_ids" in batch.keys() else None  # noqa: SIM118
    if not isinstance(inputs, Tensor) or inputs.shape != labels.shape or labels.ndim != 2 or labels.shape[1] < 2:
        return False
    has_label = labels >= 0
    return bool(has_label.any()) and torch.equal(labels[has_label], inputs.to(labels)[has_label])


def _predicts_same_position(output: Any) -> bool:
    """Whether an output is that of a masked language model, or of a decoder that is given labels one position later."""
    has_encoder = getattr(output, "encoder_last_hidden_state", None) is not None
    return has_encoder or type(output).__name__.startswith("MaskedLM")


def _mean_over_positions(values: Tensor, labels: Tensor) -> Tensor:
    valid = labels.reshape(len(labels), -1) >= 0
    return (values.reshape(len(labels), -1) * valid).sum(1) / valid.sum(1).clamp(min=1)
