"""Other bases of the subspace of the LIB: its whitened activations, rotated at random or by another criterion.

The LIB whitens the activations of a node layer and turns them, with ``V``, to the eigenvectors of its metric. Here the
whitening, the subspace and the metric stay as they are and only the rotation is another one. With the whitened
activations ``z = fhat / sqrt(Lambda)``, whose covariance is 1, and an orthogonal ``R``:

    fhat' = z R S    with    S^2 = diag(R^T Lambda R)

so that ``E[fhat'^T fhat'] = S^2``: features are uncorrelated, the variance of each is its importance, and the squared
length of its direction in the metric is 1, as in the LIB. Their number and the sum of their importances are those of
the LIB. What differs is how the importance is divided among them, and how sparsely they interact: in the LIB their
directions are orthogonal in the metric, here they are not.

The metric is that of the LIB at every node layer, so it measures by the LIB features of the next one. Measuring by the
rotated features of the next layer instead would give the whitened directions that nothing reads as much weight as the
others, and more with every layer: subspaces and totals would no longer be those of the LIB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.jackknife import FeatureVariances, standard_error
from lib_lightning.algorithm.metric import Metric
from lib_lightning.distributed.process_group import ProcessGroup, all_reduce
from lib_lightning.model.precision import for_sums

# At most so many activations for each feature are used for a rotation that depends on all of them at once, and at least
# so many in all.
_ROWS_PER_FEATURE, _FEWEST_ROWS = 32, 4096
_ITERATIONS = 200
# Largest change of a direction at which FastICA ends, as 1 - |cosine|.
_ICA_TOLERANCE = 1e-8
# Relative change of the objective at which varimax and the alternating minimisation of a dictionary end.
_TOLERANCE = 1e-6
# As in scikit-learn's dictionary learning (alpha=1): coefficients within one standard deviation are set to zero.
_THRESHOLD = 1.0

_NOT_CONVERGED = "The {} of {{}} has not converged in {} iterations."
_FEWER_ROWS = "The {} of {{}} is computed from {:,} activations, evenly spaced, of more."
_NO_ERRORS = "Standard errors of {} are unknown, with so few samples, so that varimax leaves the LIB as it is there."


class Rotation(Protocol):
    """Finds a rotation ``R`` of the whitened activations ``z`` of one node layer.

    Attributes:
        needs_rows: Whether the activations are needed once more, through `update`.
    """

    needs_rows: bool

    def update(self, rows: Tensor, group: int) -> None:
        """Add activations of one jackknife group, one vector a row: ``(m, d)``."""
        ...

    def reduce(self, process_group: ProcessGroup) -> None:
        """Combine what all processes have added."""
        ...

    def solve(self) -> tuple[Tensor, list[str]]:
        """Find the rotation.

        Returns:
            ``R`` of shape ``(r, r)``, float64, orthogonal, its columns the new directions; and notes, in sentences with
            ``{}`` in place of the name of the node layer.
        """
        ...


def rotation_of(kind: str, lib: Basis, metric: Metric, num_rows: int, groups: int, seed: int) -> Rotation:
    """The rotation that makes a kind of basis of the LIB.

    Args:
        kind: One of `lib_lightning.algorithm.basis_kinds.ROTATED`.
        lib: The LIB of the node layer, the same on every process.
        metric: Its metric, of all processes.
        num_rows: Number of activations of all processes.
        groups: Number of jackknife groups.
        seed: Seed of what is random: the rotation itself, or where an iteration starts.

    Returns:
        The rotation.
    """
    if kind == "varimax":
        return VarimaxRotation(lib, metric, groups)
    R = random_rotation(lib, seed)
    if kind == "random":
        return FixedRotation(R)
    return (IndependentComponents if kind == "ica" else OrthogonalDictionary)(lib, R, num_rows)


def rotated(lib: Basis, kind: str, R: Tensor, features: Tensor | None = None) -> tuple[Basis, Tensor | None]:
    """The LIB with its whitened activations rotated.

    Args:
        lib: The LIB of a node layer.
        kind: Kind of the new basis.
        R: The rotation of the whitened activations, orthogonal, shape ``(r, r)``.
        features: Features of all activations in the LIB, shape ``(m, r)``, if they are known.

    Returns:
        The basis, its features by importance, and its features of all activations if ``features`` are given.

    Example:
        >>> lib = Basis("fc", "lib", torch.zeros(2), 2 * torch.eye(2), torch.eye(2) / 2, torch.tensor([3.0, 1.0]))
        >>> both = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
        >>> rotated(lib, "random", both)[0].importance.round(decimals=4)
        tensor([2., 2.])
    """
    variance = R.square().T @ lib.importance
    order = variance.argsort(descending=True, stable=True)
    R, s, root = R[:, order], variance[order].sqrt(), lib.importance.sqrt()
    forward = (R / root[:, None]) * s
    back = (R / s).T * root
    basis = Basis(lib.name, kind, lib.mean, lib.to_features @ forward, back @ lib.from_features, s.square())
    return basis, None if features is None else features @ forward


def random_rotation(lib: Basis, seed: int) -> Tensor:
    """A rotation drawn uniformly from all (by the Haar measure), the same for the same seed.

    It depends on the subspace and on the whitening, but not on the signs of the LIB features, nor on a rotation between
    those of equal importance; and a subspace with one more direction has nearly the same random directions. So random
    features of one seed change as slowly as the subspace over a training.

    Args:
        lib: The LIB of a node layer.
        seed: The seed. Global random states are neither read nor changed.

    Returns:
        ``R`` of shape ``(r, r)``, float64, orthogonal, on the device of the basis.

    Note:
        Source: Stewart (1980), https://doi.org/10.1137/0717034: the orthogonal factor of a matrix of independent normal
        numbers, with a positive diagonal in the triangular one. The numbers are projections of normal vectors in the
        space of the activations onto an orthonormal basis of the subspace.
    """
    r, d = lib.from_features.shape
    if r == 0:
        return lib.from_features.new_zeros(0, 0)
    generator = torch.Generator().manual_seed(seed)
    # One vector after the other, so that those of a smaller subspace are the first ones.
    normal = torch.stack(
        [torch.randn(d, dtype=torch.float64, generator=generator, device="cpu") for _ in range(r)], dim=1
    )
    whitening = lib.importance.sqrt()[:, None] * lib.from_features
    left, _, right = torch.linalg.svd(whitening, full_matrices=False)
    Q, T = torch.linalg.qr(left @ (right @ normal.to(whitening)))
    R: Tensor = Q * T.diagonal().sign()
    return R


class FixedRotation:
    """A rotation that is known; see `Rotation` for the methods.

    Args:
        R: The rotation, shape ``(r, r)``.
    """

    needs_rows = False

    def __init__(self, R: Tensor) -> None:
        self.R = R

    def update(self, rows: Tensor, group: int) -> None:
        """See `Rotation`."""

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Rotation`."""

    def solve(self) -> tuple[Tensor, list[str]]:
        """See `Rotation`."""
        return self.R, []


class _OfWhitened:
    """Keeps whitened activations, evenly spaced ones where there are many."""

    needs_rows = True
    name = ""

    def __init__(self, lib: Basis, start: Tensor, num_rows: int) -> None:
        self.lib, self.start, self.num_rows = lib, start, num_rows
        most = max(_FEWEST_ROWS, _ROWS_PER_FEATURE * lib.n_features)
        self._every, self._seen = -(-num_rows // most), 0
        self._rows = [lib.mean.new_zeros(0, lib.n_features)]

    def update(self, rows: Tensor, group: int) -> None:
        """See `Rotation`."""
        chosen = for_sums(rows[-self._seen % self._every :: self._every])
        self._seen += len(rows)
        self._rows.append(self.lib.encode(chosen, torch.float64) / self.lib.importance.sqrt())

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Rotation`."""
        self._rows = process_group.gather(torch.cat(self._rows))

    def solve(self) -> tuple[Tensor, list[str]]:
        """See `Rotation`."""
        z = torch.cat(self._rows)
        notes = []
        if len(z) < self.num_rows:
            notes.append(_FEWER_ROWS.format(self.name, len(z)))
        if min(z.shape) == 0:
            return self.start, notes
        R, has_converged = self._iterate(z)
        if not has_converged:
            notes.append(_NOT_CONVERGED.format(self.name, _ITERATIONS))
        return R, notes

    def _iterate(self, z: Tensor) -> tuple[Tensor, bool]:
        raise NotImplementedError


class IndependentComponents(_OfWhitened):
    """Independent component analysis (ICA) by FastICA; see `Rotation` for the methods.

    Args:
        lib: The LIB of the node layer.
        start: Where the iteration starts, an orthogonal matrix.
        num_rows: Number of activations of all processes.

    Note:
        Source: Hyvärinen (1999), https://doi.org/10.1109/72.761722: the symmetric fixed-point iteration with the
        contrast ``log cosh``, which are the defaults of ``sklearn.decomposition.FastICA``.
    """

    name = "ICA"

    def _iterate(self, z: Tensor) -> tuple[Tensor, bool]:
        R = self.start
        for _ in range(_ITERATIONS):
            g = torch.tanh(z @ R)
            new = _nearest_rotation(z.T @ g / len(z) - R * (1 - g.square()).mean(0))
            change = float((1 - (new * R).sum(0).abs()).abs().amax())
            R = new
            if change < _ICA_TOLERANCE:
                return R, True
        return R, False


class OrthogonalDictionary(_OfWhitened):
    """Sparse dictionary learning with as many atoms as dimensions, which are orthogonal; see `Rotation`.

    With more atoms than dimensions, coefficients are not a linear function of the activations, and this is no rotation.

    Args:
        lib: The LIB of the node layer.
        start: Where the iteration starts, an orthogonal matrix.
        num_rows: Number of activations of all processes.

    Note:
        Source: Bao, Cai and Ji (2013), https://doi.org/10.1109/ICCV.2013.420: minimise
        ``1/2 ||z - X R^T||^2 + ||X||_1`` over coefficients ``X`` and orthogonal ``R``, alternately and exactly; here
        with the penalty of ``sklearn.decomposition.DictionaryLearning``. In whitened data a complete dictionary is
        orthogonal up to sampling error (Sun, Qu and Wright 2015, arXiv 1504.06785).
    """

    name = "sparse dictionary"

    def _iterate(self, z: Tensor) -> tuple[Tensor, bool]:
        R, before = self.start, None
        for _ in range(_ITERATIONS):
            y = z @ R
            X = torch.nn.functional.softshrink(y, _THRESHOLD)
            objective = float((y - X).square().sum() / 2 + _THRESHOLD * X.abs().sum())
            if before is not None and before - objective < _TOLERANCE * before:
                return R, True
            before = objective
            R = _nearest_rotation(z.T @ X)
        return R, False


class VarimaxRotation:
    """The LIB, rotated by varimax between features of nearly equal importance only; see `Rotation` for the methods.

    Among features whose importances differ by less than two standard errors, the samples do not determine the LIB:
    there the rotation is free. This one makes directions in activation space, ``sqrt(Lambda) C^+``, have few large
    entries: each feature acts on few neurons, and each neuron has few features.

    Args:
        lib: The LIB of the node layer.
        metric: Its metric.
        groups: Number of jackknife groups.

    Note:
        Source: Kaiser (1958), https://doi.org/10.1007/BF02289233, without normalisation of the neurons.
    """

    needs_rows = True

    def __init__(self, lib: Basis, metric: Metric, groups: int) -> None:
        self.lib, self.metric = lib, metric
        self._variances = FeatureVariances(lib, groups)

    def update(self, rows: Tensor, group: int) -> None:
        """See `Rotation`."""
        fhat = self.lib.encode(for_sums(rows), torch.float64)
        self._variances.update(fhat[None], None, [(group, slice(None))])

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Rotation`."""
        all_reduce([self._variances], process_group)

    def solve(self) -> tuple[Tensor, list[str]]:
        """See `Rotation`."""
        R = torch.eye(self.lib.n_features, dtype=self.lib.mean.dtype, device=self.lib.mean.device)
        replicates = self._variances.replicates()
        if len(replicates) < 2:
            return R, [_NO_ERRORS]
        replicates = replicates * self.metric.replicates(self.lib.from_features)
        loadings = self.lib.importance.sqrt()[:, None] * self.lib.from_features
        has_converged = True
        for group in near_degenerate_groups(self.lib.importance, replicates):
            R[group, group], converged = varimax(loadings[group].T)
            has_converged &= converged
        return R, [] if has_converged else [_NOT_CONVERGED.format("varimax rotation", _ITERATIONS)]


def near_degenerate_groups(importance: Tensor, replicates: Tensor) -> Sequence[slice]:
    """Find groups of consecutive features whose importances the samples do not tell apart.

    Args:
        importance: ``Lambda``, descending, shape ``(r,)``.
        replicates: Jackknife replicates of it, shape ``(G, r)``, at least two.

    Returns:
        The groups of at least two features, each of which differs from the first of its group by less than two standard
        errors of their difference.

    Example:
        >>> near_degenerate_groups(torch.tensor([2.0, 1.1, 1.0]), torch.tensor([[2.1, 1.2, 1.0], [1.9, 1.0, 1.0]]))
        [slice(1, 3, None)]
    """
    groups, first, r = [], 0, len(importance)
    while first < r:
        errors = standard_error(replicates[:, first : first + 1] - replicates[:, first:])
        apart = (importance[first] - importance[first:] >= 2 * errors)[1:].nonzero()
        stop = first + 1 + int(apart[0]) if len(apart) else r
        if stop - first > 1:
            groups.append(slice(first, stop))
        first = stop
    return groups


def varimax(loadings: Tensor) -> tuple[Tensor, bool]:
    """The rotation of factors after which the variance of their squared loadings is largest.

    Args:
        loadings: ``L``, shape ``(d, k)``: of each variable on each factor. Float64.

    Returns:
        ``R`` of shape ``(k, k)``, orthogonal, and whether the iteration has converged.

    Note:
        Source: Kaiser (1958), https://doi.org/10.1007/BF02289233; the iteration with a singular value decomposition of
        Sherin (1966), Psychometrika 31.

    Example:
        >>> L = torch.tensor([[0.8, 0.6], [0.6, -0.8], [0.4, 0.3]], dtype=torch.float64)
        >>> 2 * (L @ varimax(L)[0]).abs().round(decimals=2).float()
        tensor([[2., 0.],
                [0., 2.],
                [1., 0.]])
    """
    k = loadings.shape[1]
    R, before = torch.eye(k, dtype=loadings.dtype, device=loadings.device), 0.0
    for _ in range(_ITERATIONS):
        rotated_loadings = loadings @ R
        squares = rotated_loadings.square()
        gradient = loadings.T @ (rotated_loadings * (squares - squares.mean(0)))
        left, s, right = torch.linalg.svd(gradient)
        total = float(s.sum())
        if total - before <= _TOLERANCE * total:
            return R, True
        R, before = left @ right, total
    return R, False


def _nearest_rotation(A: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square one: its polar factor."""
    left, _, right = torch.linalg.svd(A)
    R: Tensor = left @ right
    return R
