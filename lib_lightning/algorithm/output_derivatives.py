"""Which outputs each feature raises and lowers, to first order: a few backward passes for all features at once.

``D_jo = 1/n sum_x mean_t sum_s sigma_j C^+_j . d z_to / d a_s``, the derivative of what
`lib_lightning.algorithm.output_steps` measures with forward passes for each feature. A language model has a hundred
times more of these than directions in which its output can move: logits ``z = W h + b`` of many tokens are a linear map
of a few numbers. With orthonormal directions ``U`` that span all changes of the output,
``d z = U U^T d z``, so one backward pass for each column of ``U`` shows the derivatives of all outputs; for
log-probabilities, another one shows those of the normalizing constant, ``sum_o p_to d z_to``.

``U`` is found from outputs, so nothing has to be known of the model's last layers. A backward pass for a random vector
at a right angle to ``U`` makes sure that nothing is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.output_changes import (
    OutputEffects,
    OutputPositions,
    chosen_samples,
    most_changed,
    some_samples,
    steps_of,
)
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.jacobian.integrated_gradients import sections_between
from lib_lightning.model.agreement import half_of_the_digits
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.loops import parts_of
from lib_lightning.model.output_distribution import OutputDistribution
from lib_lightning.model.precision import full_precision, product_dtype, to_float64
from lib_lightning.model.vjp import apply_mask

# Outputs from which directions are found, for each direction that is expected, and more.
_ROWS_PER_DIRECTION, _MORE_ROWS = 1.25, 16
# Singular values that are none, relative to the largest, at least, and in units of rounding; and the largest rounding
# error of outputs, relative to them.
_SMALL, _ROUNDING, _FINEST = 1e-5, 30, 1e-6
# Derivatives of all outputs that are in memory at once.
_NUMBERS = 2**23


def differentiate_output(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    wanted: Sequence[tuple[Basis, Tensor]],
    output: OutputDistribution,
    num_samples: int,
    max_directions: int,
    stack_elements: int,
    process_group: ProcessGroup,
) -> tuple[list[OutputEffects], int] | None:
    """Find what features do to the outputs, to first order, the same on every process.

    Args:
        instrumented: The model and its node layers, after a first `capture`. Call this within `model_session`.
        batches: The batches of this process, none of them empty.
        wanted: Basis of each node layer, and indices of its features to measure, which may be none.
        output: What the output stands for, and its width.
        num_samples: Number of samples, over all processes.
        max_directions: Number of directions in which the output may move, at most.
        stack_elements: About how many numbers a batch of vectors may have.
        process_group: The processes.

    Returns:
        The effects of each node layer, and the number of samples; None if the output moves in more directions.
    """
    bases, features = zip(*wanted, strict=True)
    chosen = chosen_samples(list(map(instrumented.num_samples, batches)), num_samples, process_group)
    restore = full_precision()
    try:
        few = [(i, some_samples(instrumented, batches[i], n)) for i, n in chosen]
        like = torch.zeros(0, output.width, dtype=product_dtype(bases[0].mean.dtype), device="cpu")
        directions = _directions(instrumented, few, like, max_directions, process_group)
        if directions is None:
            return None
        found = _Derivatives(instrumented, directions, output.kind == "categorical", stack_elements)
        for index, batch in few:
            instrumented.manual_seed(index)
            # In a trial there may be fewer samples than were planned.
            planned = num_samples / (instrumented.num_samples(batch) * len(chosen))
            found.add(batch, bases, features, planned)
        every = process_group.gather(torch.tensor([found.is_complete], device="cpu"))
        (is_complete,) = process_group.broadcast([torch.cat(every).all()])
        if not is_complete:
            return None
        result = found.result([basis.n_features for basis in bases], features, process_group)
    finally:
        restore()
    return result


def _directions(
    instrumented: InstrumentedModel,
    batches: Sequence[tuple[int, Any]],
    like: Tensor,
    most: int,
    process_group: ProcessGroup,
) -> Tensor | None:
    """Orthonormal directions that span all changes of the output, ``(D, q)``; None if there are more than ``most``.

    Args:
        instrumented: The model.
        batches: Some batches, and their numbers.
        like: An empty tensor ``(0, D)`` of their type.
        most: Number of directions, at most.
        process_group: The processes, which have seen other samples.
    """
    if like.shape[1] <= most:
        return torch.eye(like.shape[1], dtype=like.dtype, device="cpu")
    counts = process_group.gather(torch.tensor([len(batches)], device="cpu"))
    count = math.ceil((_ROWS_PER_DIRECTION * most + _MORE_ROWS) / max(1, sum(int(n) for n in counts)))
    rows, eps = [like], torch.finfo(like.dtype).eps
    with torch.no_grad():
        for index, batch in batches:
            instrumented.manual_seed(index)
            # Other noise for each batch, of which some may be equal.
            z = _differences(instrumented, batch, count, seed=index * process_group.size + process_group.rank)
            eps = max(eps, torch.finfo(z.dtype).eps)
            rows.append(z.to(like))
    Z = torch.cat(process_group.gather(torch.cat(rows)))
    # Half precision cannot tell a direction from a rounding error.
    U = like.T if process_group.rank or eps > _FINEST else _span(Z, max(_SMALL, _ROUNDING * eps))
    (U,) = process_group.broadcast([U])
    return U if 0 < U.shape[1] <= most else None


def _differences(instrumented: InstrumentedModel, batch: Any, count: int, seed: int) -> Tensor:
    """Differences between a number of outputs, ``(count, D)``, with noise in the node layer before the output.

    Without, there would be too few where there are few samples, and none in directions that do not vary by themselves,
    such as the mean of what a layer norm returns.
    """
    captured = instrumented.capture_to_output(batch)
    before, last = captured[-2], captured[-1]
    generator = torch.Generator().manual_seed(seed)
    if last.mask is not None and not last.mask.any():
        return last.a.new_zeros(0, last.a.shape[-1])
    outputs: list[Tensor] = []
    while sum(map(len, outputs)) < count + 1:
        noise = torch.randn(before.a.shape, generator=generator, device="cpu").to(before.a) * before.a.std()
        t = first_tensor(instrumented.output(batch, {len(captured) - 2: before.a + apply_mask(noise, before.mask)}))
        assert t is not None
        z = last.layer.read([t])
        outputs.append(z.flatten(0, 1) if last.mask is None else z[last.mask])
    z = torch.cat(outputs)
    z = z[torch.arange(count + 1, device=z.device) * len(z) // (count + 1)]
    # Differences, because some models set logits of classes that do not exist to the lowest number that there is.
    return z[1:] - z[:1]


def _span(rows: Tensor, tolerance: float) -> Tensor:
    """Orthonormal directions that span rows ``(m, D)``, as columns ``(D, q)``."""
    Z = to_float64(rows)
    squares, V = torch.linalg.eigh(Z @ Z.T)
    lengths = squares.clamp(min=0).sqrt()
    is_large = lengths > tolerance * lengths.max() if len(lengths) else lengths > 0
    found: Tensor = (Z.T @ V[:, is_large]) / lengths[is_large]
    return found.to(rows)


class _Derivatives:
    """Derivatives of mean outputs along features, sample by sample.

    Args:
        instrumented: The model.
        directions: Orthonormal directions of the output, shape ``(D, q)``.
        is_categorical: Whether outputs are the logits of log-probabilities.
        stack_elements: About how many numbers a batch of vectors may have.

    Attributes:
        is_complete: Whether the output moves in no other direction.
    """

    def __init__(
        self, instrumented: InstrumentedModel, directions: Tensor, is_categorical: bool, stack_elements: int
    ) -> None:
        self._instrumented, self._U, self._is_categorical = instrumented, directions, is_categorical
        self._stack_elements = stack_elements
        # For each batch and node layer: shape (q + 1, n, m).
        self._found: list[list[Tensor]] = []
        self._scale = torch.zeros(2, dtype=torch.float64, device="cpu")
        self._eps = 0.0
        self.is_complete = True

    def add(self, batch: Any, bases: Sequence[Basis], features: Sequence[Tensor], planned: float) -> None:
        """Add the samples of a batch.

        Args:
            batch: The batch.
            bases: Basis of each node layer.
            features: Indices of the features of each node layer.
            planned: Number of samples that there are in truth, as a multiple of those of the batch; for trials.
        """
        captured = self._instrumented.capture_to_output(batch)
        sections = sections_between(captured, self._stack_elements)
        positions = OutputPositions(captured[-1])
        self._eps = max(self._eps, positions.eps)
        self._scale += positions.scale().cpu()
        steps = [
            steps_of(basis, own, layer.a) for basis, own, layer in zip(bases, features, captured, strict=False)
        ]  # fmt: skip
        size = max(1, self._stack_elements // max(layer.a.numel() for layer in captured))
        U = self._U.to(captured[-1].a.device, product_dtype(captured[-1].a.dtype))
        count = U.shape[1] + self._is_categorical
        found = [self._U.new_zeros(count, positions.n, len(step)) for step in steps]
        starts = range(0, count, size)
        for start in parts_of(starts, round(len(starts) * planned)):
            some = slice(start, start + size)
            vectors = _cotangents(captured[-1], positions, U[:, some])
            if self._is_categorical and start + size >= count:
                vectors = torch.cat([vectors, _normalizing(captured[-1], positions)])
            for index, g in _backward(sections, captured, vectors, len(steps)):
                found[index][some] = (g.sum(2).to(steps[index]) @ steps[index].T).to(self._U)
        if U.shape[1] < len(U) and not self._found:
            self._check(captured, sections, positions, U)
        self._found.append(found)

    def _check(
        self, captured: Sequence[CapturedLayer], sections: Sequence[Any], positions: OutputPositions, U: Tensor
    ) -> None:
        """Compare derivatives along a random vector with those along its part at a right angle to all directions."""
        v = torch.randn(len(U), generator=torch.Generator().manual_seed(0), device="cpu").to(U)
        outside = v - U @ (U.T @ v)
        both = torch.stack([v, outside * (v.norm() / outside.norm())], 1)
        vectors = _cotangents(captured[-1], positions, both)
        for _, g in _backward(sections, captured, vectors, 0):  # not of the output itself
            inside, left = to_float64(g).flatten(1).norm(dim=1).tolist()
            self.is_complete &= left <= max(half_of_the_digits(U.dtype), 1e-3) * inside

    def result(
        self, numbers: Sequence[int], features: Sequence[Tensor], process_group: ProcessGroup
    ) -> tuple[list[OutputEffects], int]:
        """The outputs that are raised and lowered most, over all processes, and the number of samples.

        Args:
            numbers: Number of all features of each node layer.
            features: Indices of those that were measured.
            process_group: The processes.
        """
        count = self._U.shape[1] + self._is_categorical
        own = [
            torch.cat([one[i] for one in self._found], 1) if self._found else self._U.new_zeros(count, 0, len(indices))
            for i, indices in enumerate(features)
        ]
        *sums, scale = process_group.sum([*(to_float64(G).sum(1) for G in own), self._scale])
        n, size = int(scale[0]), float(scale[1])
        eps = max(float(t) for t in process_group.gather(torch.tensor([self._eps], dtype=torch.float64, device="cpu")))
        tops = [self._most_changed(G / max(1, n), eps * size / max(1, n)) for G in sums]
        squares = process_group.sum([self._squares(G, outputs) for G, (outputs, _) in zip(own, tops, strict=True)])
        return [
            OutputEffects.of(r, indices, outputs, changes, square.cpu(), n)
            for r, indices, (outputs, changes), square in zip(numbers, features, tops, squares, strict=True)
        ], n

    def _most_changed(self, G: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
        """The outputs that change most, from mean derivatives along directions, ``(q + 1, m)``."""
        parts = G.split(max(1, _NUMBERS // len(self._U)), 1)
        found = [most_changed(self._outputs(part), rounding) for part in parts]
        return torch.cat([outputs for outputs, _ in found]), torch.cat([changes for _, changes in found])

    def _outputs(self, G: Tensor) -> Tensor:
        """Derivatives of all outputs, ``(m, D)``, from those along directions ``(q + 1, m)``."""
        q = self._U.shape[1]
        z = G[:q].T.to(self._U) @ self._U.T
        return z - G[q][:, None].to(z) if self._is_categorical else z

    def _squares(self, G: Tensor, outputs: Tensor) -> Tensor:
        """Sums over samples of the squared derivatives of some outputs ``(m, k)``, in float64."""
        q = self._U.shape[1]
        z = torch.einsum("qnm,mkq->nmk", G[:q], self._U[outputs])
        z = z - G[q][:, :, None] if self._is_categorical else z
        return to_float64(z).square().sum(0)


def _cotangents(last: CapturedLayer, positions: OutputPositions, U: Tensor) -> Tensor:
    """Vectors at the output whose products are the means over positions along some directions: ``(k, n, T, D)``."""
    return (positions.weights.to(U)[..., None] * U.T[:, None, None]).to(last.a.dtype)


def _normalizing(last: CapturedLayer, positions: OutputPositions) -> Tensor:
    """The vector whose product is the mean over positions of the logarithm of the normalizing constant."""
    p = last.a.detach().to(positions.weights).softmax(-1)
    return (positions.weights[..., None] * p)[None].to(last.a.dtype)


def _backward(
    sections: Sequence[Any], captured: Sequence[CapturedLayer], vectors: Tensor, layers: int
) -> Iterator[tuple[int, Tensor]]:
    """Gradients with respect to each of the node layers, from the last to the first: ``(k, n, S, d)``."""
    g = apply_mask(vectors, captured[-1].mask)
    if len(sections) < layers:
        yield layers - 1, g
    for index in reversed(range(len(sections))):
        g = sections[index].vjp(g)
        yield index, g
