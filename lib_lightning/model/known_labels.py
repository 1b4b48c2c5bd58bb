"""The labels that a model's output is compared with: from the loss that its step computes, or from the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.model.agreement import agree, half_of_the_digits
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.losses import Loss, losses_in_step, losses_observed
from lib_lightning.model.node_layer import OUTPUT, NodeLayer
from lib_lightning.model.output_distribution import KIND_OF_LOSS, OutputDistribution, tensors_beside_inputs
from lib_lightning.model.precision import product_dtype


@dataclass(frozen=True)
class KnownLabels:
    """The labels of a batch, at the output positions that have one.

    Attributes:
        output: What the output stands for.
        layer: How the output is read as ``(n, T, D)``.
        values: Class indices, shape ``(n, m)``, negative for none; otherwise answers or numbers, shape ``(n, m, D)``.
        start: First of the ``m`` output positions.
    """

    output: OutputDistribution
    layer: NodeLayer
    values: Tensor
    start: int = 0

    def log_likelihood(self, output: Any) -> Tensor:
        """Mean log-likelihood of the labels of each sample.

        Args:
            output: Output of the model, on the samples of the batch once or several times after each other.

        Returns:
            Nats, shape ``(n,)`` times that number; 0 for samples without labels.
        """
        t = first_tensor(output)
        assert t is not None
        m = self.values.shape[1]
        z = self.layer.read([t])[:, self.start : self.start + m]
        z = z.to(product_dtype(z.dtype))
        values = self.values.to(z.device).repeat(len(z) // len(self.values), *[1] * (self.values.ndim - 1))
        if self.output.kind != "categorical":
            return self.output.log_likelihood(z, values.to(z)).mean(1)
        valid = values >= 0
        each = torch.where(valid, self.output.log_likelihood(z, values.clamp(min=0)), 0.0)
        return each.sum(1) / valid.sum(1).clamp(min=1)


def labels_of_batch(instrumented: InstrumentedModel, batch: Any, output: OutputDistribution) -> KnownLabels | None:
    """Find the labels of a batch.

    In this order: those that the step of a LightningModule, or the model itself, passes to a loss function together
    with its output, or with the output at all positions but the first or the last; and a tensor of the batch with the
    shape of labels that the model does not take.

    Args:
        instrumented: The model. Call this within `model_session`.
        batch: One batch.
        output: What the output stands for.

    Returns:
        The labels; None if there are none.

    Example:
        >>> model = InstrumentedModel(torch.nn.Linear(2, 3), [])
        >>> batch = torch.ones(4, 2), torch.tensor([0, 2, 1, 1])
        >>> labels = labels_of_batch(model, batch, OutputDistribution("categorical"))
        >>> labels.values.T
        tensor([[0, 2, 1, 1]])
    """
    functions = {name for name, kind in KIND_OF_LOSS.items() if kind == output.kind}
    with torch.no_grad():
        losses = losses_in_step(instrumented.model, batch, functions)
        with losses_observed(functions) as in_model:
            value = instrumented.run(batch)
        layer = _output_layer(instrumented, batch)
    t = first_tensor(value)
    if t is None or not t.is_floating_point():
        return None
    for loss in (*losses, *in_model):
        for values, start in _aligned(loss, t, layer, output):
            return KnownLabels(output, layer, values, start)
    for other in tensors_beside_inputs(instrumented, batch):
        if (own := _of_batch(other, t, layer, output)) is not None:
            return KnownLabels(output, layer, own)
    return None


def _output_layer(instrumented: InstrumentedModel, batch: Any) -> NodeLayer:
    """How all positions of the output are read, with the axis of its features."""
    found = instrumented.capture_to_output(batch)[-1].layer if instrumented.layers else None
    return NodeLayer(OUTPUT, feature_dim=None if found is None else found.feature_dim)


def _aligned(loss: Loss, t: Tensor, layer: NodeLayer, output: OutputDistribution) -> Iterator[tuple[Tensor, int]]:
    """Targets of a loss in the order of the output, and the first output position that has one."""
    predictions, targets, z = loss.predictions, loss.targets, layer.read([t])
    if predictions is None or targets is None:
        return
    n, T, D = z.shape
    is_categorical = output.kind == "categorical"
    if is_categorical:
        predictions = predictions.movedim(1, -1) if predictions.ndim > 2 else predictions
        if targets.is_floating_point() or targets.numel() * D != predictions.numel():
            return
        targets = torch.where(targets == loss.ignored, -1, targets)
    elif targets.shape != predictions.shape:
        return
    elif targets.shape == t.shape:
        predictions, targets = layer.read([predictions]), layer.read([targets])
    m = predictions.numel() // (n * D)
    if m * n * D != predictions.numel() or not 0 < m <= T:
        return
    for start in dict.fromkeys((0, T - m)):
        own = z[:, start : start + m]
        for same in (own, own.log_softmax(-1)) if loss.function == "nll_loss" else (own,):
            if _are_equal(predictions.reshape(n, m, D), same):
                yield targets.reshape((n, m) if is_categorical else (n, m, D)), start


def _are_equal(a: Tensor, b: Tensor) -> bool:
    tolerance = max(half_of_the_digits(a.dtype), half_of_the_digits(b.dtype))
    return agree(a.to(b), b, tolerance)


def _of_batch(labels: Tensor, t: Tensor, layer: NodeLayer, output: OutputDistribution) -> Tensor | None:
    """A tensor of the batch as labels, if it has their shape."""
    n, T, D = layer.read([t]).shape
    if output.kind == "categorical":
        is_index = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
        if is_index and labels.shape[:1] == (n,) and 0 < labels.numel() == n * T and int(labels.max()) < D:
            return labels.reshape(n, T).long()
        return None
    if labels.shape == t.shape:
        return layer.read([labels])
    return labels.reshape(n, T, 1) if D == 1 and labels.shape == t.shape[:-1] else None
