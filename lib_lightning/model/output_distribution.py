"""The distribution that a model's output stands for, and how far a change of the output moves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lib_lightning.distributed.process_group import ProcessGroup, first_given
from lib_lightning.model.batch import first_tensor, tensors_in
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.losses import losses_in_step
from lib_lightning.model.node_layer import OUTPUT, NodeLayer
from lib_lightning.model.precision import to_float64
from lib_lightning.model.saved_value import has_address

OutputKind = Literal["categorical", "bernoulli", "gaussian"]
OutputSetting = Literal["auto", "categorical", "bernoulli", "gaussian", "none"]

# More logits than these are no node layer, but measure the one before them.
MANY_LOGITS = 512
_GUESS = "by its size, which is a guess"
# What a loss function of `torch.nn.functional` takes the output for.
KIND_OF_LOSS: dict[str, OutputKind] = {
    **dict.fromkeys(("cross_entropy", "nll_loss", "linear_cross_entropy"), "categorical"),
    **dict.fromkeys(("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"), "bernoulli"),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss"), "gaussian"),
}  # fmt: skip


@dataclass(frozen=True)
class OutputDistribution:
    """What a model predicts at each output position.

    To second order, a step ``v`` in the output changes the prediction by ``v^T F v / 2`` nats of Kullback-Leibler
    divergence, with the Fisher information ``F`` of the distribution in its natural parameters.

    Attributes:
        kind: ``"categorical"`` for logits of classes or tokens, ``F = diag(p) - p p^T`` with ``p = softmax(a)``;
            ``"bernoulli"`` for logits of independent yes-or-no answers, ``F = diag(p (1 - p))`` with
            ``p = sigmoid(a)``; ``"gaussian"`` for the mean of a normal distribution of variance 1, ``F = 1``: nats are
            half of squared distances.
        reason: Why the output is taken for that, to end a sentence with.
        width: Number of entries at each output position; 0 if unknown.
        positions: Number of output positions of the samples that it was found with; 0 if unknown.

    Note:
        Source: Amari (1998), https://doi.org/10.1162/089976698300017746.
    """

    kind: OutputKind
    reason: str = ""
    width: int = 0
    positions: int = 0

    def factor(self, a: Tensor) -> Callable[[Tensor], Tensor]:
        """A factor ``R`` of the Fisher information, ``R R^T = F``, as a function that multiplies with it.

        With random signs ``z``, ``E[(R z)(R z)^T] = F``: the same as of gradients of the log-likelihood of labels that
        are drawn from the distribution, with less variance where one class is nearly certain.

        Args:
            a: Output, shape ``(..., d)``.

        Returns:
            The function ``z -> R z``, of vectors with any more axes in front, in the type of ``a``.

        Example:
            >>> OutputDistribution("categorical").factor(torch.zeros(2))(torch.tensor([1.0, -1.0]))
            tensor([ 0.7071, -0.7071])
        """
        if self.kind == "gaussian":
            return lambda z: z.to(a)
        if self.kind == "bernoulli":
            root = ((-a).sigmoid() * a.sigmoid()).sqrt()
            return lambda z: root * z
        p = a.softmax(-1)
        root = p.sqrt()

        def product(z: Tensor) -> Tensor:
            w = root * z
            return w.addcmul_(p, w.sum(-1, keepdim=True), value=-1)

        return product

    def fisher_sum(self, rows: Tensor) -> Tensor:
        """Sum of the Fisher information over outputs.

        Args:
            rows: Outputs, one a row: ``(m, d)``.

        Returns:
            Shape ``(d, d)``, float64.
        """
        rows = to_float64(rows.detach())
        if self.kind == "gaussian":
            return len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        if self.kind == "bernoulli":
            return torch.diag((rows.sigmoid() * (-rows).sigmoid()).sum(0))
        p = rows.softmax(-1)
        return torch.diag(p.sum(0)) - p.T @ p

    def log_likelihood(self, z: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood of labels, or half of negative squared distances from numbers.

        Args:
            z: Outputs, shape ``(..., d)``.
            labels: Class indices, shape ``(...)``; otherwise answers or numbers, shape ``(..., d)``.

        Returns:
            Nats, shape ``(...)``.

        Example:
            >>> OutputDistribution("categorical").log_likelihood(torch.zeros(1, 2), torch.tensor([1]))
            tensor([-0.6931])
        """
        if self.kind == "categorical":
            return z.gather(-1, labels[..., None])[..., 0] - z.logsumexp(-1)
        if self.kind == "gaussian":
            return -(z - labels).square().sum(-1) / 2
        log = torch.nn.functional.logsigmoid
        return (labels * log(z) + (1 - labels) * log(-z)).sum(-1)

    def divergence(self, a: Tensor, b: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the prediction of one output to that of another.

        Args:
            a: Output, shape ``(..., d)``.
            b: Another output, of the same shape.

        Returns:
            Nats, shape ``(...)``, float64.

        Example:
            >>> OutputDistribution("gaussian").divergence(torch.zeros(1), torch.tensor([2.0]))
            tensor(2., dtype=torch.float64)
        """
        a, b = to_float64(a), to_float64(b)
        if self.kind == "gaussian":
            return (a - b).square().sum(-1) / 2
        if self.kind == "bernoulli":
            log = torch.nn.functional.logsigmoid
            return (a.sigmoid() * (log(a) - log(b)) + (-a).sigmoid() * (log(-a) - log(-b))).sum(-1)
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    @property
    def is_guess(self) -> bool:
        """Whether nothing but the size of the output says so."""
        return self.reason == _GUESS

    @property
    def has_many_logits(self) -> bool:
        """Whether these are logits of so many classes or tokens that the node layer before them is the last to take.

        Not if that they are logits at all is a guess.
        """
        return self.kind == "categorical" and not self.is_guess and self.width > MANY_LOGITS

    @property
    def plain(self) -> dict[str, str]:
        """Kind and reason in a dict, for files."""
        return {"kind": self.kind, "reason": self.reason}


def find_output_distribution(
    instrumented: InstrumentedModel, batch: Any, setting: OutputSetting = "auto"
) -> OutputDistribution | None:
    """Find out what a model's output stands for.

    In this order: the setting; the loss that the step of a LightningModule computes from it; the configuration of a
    Hugging Face model; the labels in the batch; tokens as input, with an output for each; and for want of all of these,
    one number is a mean, and several are the logits of classes.

    Args:
        instrumented: The model. Call this within `model_session`.
        batch: One batch.
        setting: As for `lib_lightning.compute_interaction_graph`.

    Returns:
        The distribution; None if the setting says so, or the output is no tensor of floating-point numbers.

    Example:
        >>> from torch import nn
        >>> model = InstrumentedModel(nn.Linear(4, 3), [])
        >>> find_output_distribution(model, (torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)))
        OutputDistribution(kind='categorical', reason='as the batch has labels that are integers', width=3, positions=1)
    """
    if setting == "none":
        return None
    with torch.no_grad():
        value = instrumented.run(batch)
    output = first_tensor(value)
    if output is None or not output.is_floating_point() or output.ndim == 0:
        return None
    _, positions, width = NodeLayer(OUTPUT).read([output]).shape
    return replace(_found(instrumented, batch, value, output, setting), width=width, positions=positions)


def _found(
    instrumented: InstrumentedModel, batch: Any, value: Any, output: Tensor, setting: OutputSetting
) -> OutputDistribution:
    if setting in get_args(OutputKind):
        return OutputDistribution(cast("OutputKind", setting), "as output_distribution says")
    for loss in losses_in_step(instrumented.model, batch, set(KIND_OF_LOSS)):
        # A loss may leave out positions, as that of the next token does, or the axis of a single number.
        same_features = loss.shape[-1:] == output.shape[-1:] or loss.shape[1:2] == output.shape[1:2]
        if same_features or loss.shape == output.shape[:-1]:
            return OutputDistribution(KIND_OF_LOSS[loss.function], f"as the loss is {loss.function}")
    others = tensors_beside_inputs(instrumented, batch)
    return _from_config(instrumented, value) or _from_labels(others, output) or _guess(output, batch)


def agree(found: OutputDistribution | None, process_group: ProcessGroup) -> OutputDistribution | None:
    """The distribution that the first process with samples has found, on all processes.

    Args:
        found: What this process has found; None if it has no samples.
        process_group: The processes.

    Returns:
        The distribution; None if no process has found one.
    """
    kinds = get_args(OutputKind)
    own = [] if found is None else [kinds.index(found.kind), found.width, found.positions, int(found.is_guess)]
    first = [int(number) for number in first_given(own, process_group)]
    if not first or first == own:
        return found
    kind, width, positions, is_guess = first
    return OutputDistribution(kinds[kind], _GUESS if is_guess else "as another process found", width, positions)


def _from_config(instrumented: InstrumentedModel, value: Any) -> OutputDistribution | None:
    """What a Hugging Face model says of its logits."""
    if not (isinstance(value, Mapping) and "logits" in value):
        return None
    config = getattr(instrumented.entry, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return OutputDistribution("bernoulli", f"as problem_type is {problem}")
    if problem == "regression" or value["logits"].shape[-1] == 1:
        return OutputDistribution("gaussian", "as the model's task is regression")
    return OutputDistribution("categorical", "as the output is named logits")


def tensors_beside_inputs(instrumented: InstrumentedModel, batch: Any) -> list[Tensor]:
    """Tensors of a batch that the model does not take."""
    call = instrumented.find_call(batch)
    if call.step is not None:  # which of them it takes is known to the step alone
        return []
    inputs = {_place(t) for t in tensors_in(call.arguments_of(batch))}
    return [t for t in tensors_in(batch) if _place(t) not in inputs]


def _place(t: Tensor) -> int:
    """Where the values of a tensor are, so that views of the same values are recognised."""
    return t.data_ptr() if has_address(t) else id(t)


def _from_labels(others: Sequence[Tensor], output: Tensor) -> OutputDistribution | None:
    """What tensors with the shape of labels say."""
    for t in others:
        if not t.is_floating_point() and t.dtype != torch.bool and t.shape in (output.shape[:-1], _without(output, 1)):
            return OutputDistribution("categorical", "as the batch has labels that are integers")
    for t in others:
        if t.shape == output.shape or (output.shape[-1] == 1 and t.shape == output.shape[:-1]):
            if t.dtype == torch.bool or bool(((t == 0) | (t == 1)).all()):
                return OutputDistribution("bernoulli", "as the batch has labels that are zeros and ones")
            return OutputDistribution("gaussian", "as the batch has targets that are numbers")
    return None


def _without(t: Tensor, axis: int) -> tuple[int, ...]:
    return (*t.shape[:axis], *t.shape[axis + 1 :])


def _guess(output: Tensor, batch: Any) -> OutputDistribution:
    inputs = tensors_in(batch)
    if output.ndim == 3 and inputs and not inputs[0].is_floating_point() and inputs[0].shape == output.shape[:2]:
        return OutputDistribution("categorical", "as there is an output for each token")
    if output.shape[-1] == 1 or output.ndim == 1:
        return OutputDistribution("gaussian", _GUESS)
    return OutputDistribution("categorical", _GUESS)
