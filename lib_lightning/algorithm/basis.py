"""Bases of a node layer (LIB, PCA, neurons) as affine maps between activations and features."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning._deprecated import renamed_fields
from lib_lightning.algorithm.linalg import Cutoff, eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import ActivationError
from lib_lightning.model.precision import supports_float64

# Numbers to centre at a time.
_NUMBERS = 2**19


@renamed_fields(unsure="degenerate")
@dataclass(frozen=True)
class Basis:
    """Features of one node layer: ``fhat = (a - mu) C`` and back ``a ~ mu + fhat C^+``.

    Attributes:
        name: Node layer.
        kind: ``"lib"``, ``"pca"``, ``"neuron"``, ``"random"``, ``"ica"``, ``"dictionary"`` or ``"varimax"``; for a last
            node layer also ``"centered"``; ``"latents"`` for those of a dictionary with an encoder and a decoder of its
            own (`lib_lightning.algorithm.dictionary_basis.DictionaryBasis`).
        mean: ``mu``, shape ``(d,)``, float64.
        to_features: ``C``, shape ``(d, r)``, float64.
        from_features: ``C^+``, shape ``(r, d)``, float64.
        importance: ``Lambda``, shape ``(r,)``, float64: the variance of each feature, which in a LIB is its effect on
            the next node layer. In descending order; neurons, centered logits and latents keep their own order.
        importance_error: Standard error of each importance, shape ``(r,)``, float64; None if unknown. The features of
            other samples are slightly rotated, which to first order does not change importances.
        degenerate: True for a feature whose importance is so close to a neighbour's that the samples do not determine
            its direction, shape ``(r,)``, bool; None if unknown.
        output_importance: What setting a feature to its mean at one position does to what the model predicts, shape
            ``(r,)``, float64: the Kullback-Leibler divergence in nats, to second order. None where it was not computed.
        output_importance_error: Its standard error, shape ``(r,)``, float64; None if unknown.

    Example:
        >>> basis = neuron_basis("fc", torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> basis.encode(torch.tensor([3.0, 3.0]))
        tensor([2., 1.])
    """

    name: str
    kind: str
    mean: Tensor
    to_features: Tensor
    from_features: Tensor
    importance: Tensor
    importance_error: Tensor | None = None
    degenerate: Tensor | None = None
    output_importance: Tensor | None = None
    output_importance_error: Tensor | None = None

    @property
    def n_features(self) -> int:
        """Number of features ``r``."""
        return self.importance.shape[0]

    def to(self, device: torch.device | str) -> Basis:
        """The basis on a device; in float32 on a device without float64."""
        tensors = {field.name: t for field in fields(self) if isinstance(t := getattr(self, field.name), Tensor)}
        if not supports_float64(torch.device(device)):
            tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
        changes: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
        return replace(self, **changes)

    def broadcast(self, process_group: ProcessGroup) -> Basis:
        """The basis of process 0."""
        return Basis(
            self.name,
            self.kind,
            *process_group.broadcast([self.mean, self.to_features, self.from_features, self.importance]),
        )

    def check_width(self, a: Tensor) -> None:
        """Raise an error for activations of another width than the node layer's.

        Args:
            a: Activations, shape ``(..., d)``.

        Raises:
            ActivationError: If there are not as many as the node layer has.
        """
        if a.shape[-1:] != self.mean.shape:
            raise ActivationError(
                f"The basis of '{self.name}' takes {len(self.mean):,} activations in the last axis; got a tensor of "
                f"shape {tuple(a.shape)}."
            )

    def encode(self, a: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Express activations as features.

        Args:
            a: Activations, shape ``(..., d)``.
            dtype: Type to compute features in; that of ``a`` by default.

        Returns:
            Features ``fhat``, shape ``(..., r)``, on the device of ``a``.

        Raises:
            ActivationError: If there are not as many activations as the node layer has.
        """
        self.check_width(a)
        dtype = dtype or a.dtype
        if self.kind == "neuron":  # C is the identity
            return a.to(dtype) - self.mean.to(a.device, dtype)
        mean, C = (t.to(a.device, dtype) for t in (self.mean, self.to_features))
        # In blocks, so that centred activations are still in the processor's cache when they are multiplied.
        rows = a.reshape(-1, a.shape[-1]).split(max(1, _NUMBERS // max(1, a.shape[-1])))
        # With few features, C^T a^T is up to twice as fast as a C.
        C_T = C.T.contiguous()
        features = torch.cat([(C_T @ (block.to(dtype) - mean).T).T for block in rows])
        return features.reshape(*a.shape[:-1], C.shape[1])

    def decode(self, features: Tensor) -> Tensor:
        """Express features as activations. Directions outside the basis are at the mean.

        Args:
            features: ``fhat``, shape ``(..., r)``.

        Returns:
            Activations, shape ``(..., d)``, in the type and on the device of ``features``.
        """
        return self.mean.to(features) + features @ self.from_features.to(features)

    def values(self, a: Tensor, indices: Tensor) -> Tensor:
        """Values of some features.

        Args:
            a: Activations, shape ``(..., d)``.
            indices: Indices of the features, shape ``(k,)``.

        Returns:
            Their values, shape ``(..., k)``, in the type and on the device of ``a``; differentiable.
        """
        mean, C = (t.to(a) for t in (self.mean, self.to_features[:, indices]))
        return (a - mean) @ C

    def change(self, a: Tensor, indices: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """How activations change when some features take other values and everything else stays as it is.

        Args:
            a: Activations, shape ``(..., d)``.
            indices: Indices of the features, shape ``(k,)``.
            old: Their values, shape ``(..., k)``.
            new: Their new values, shape ``(..., k)``.

        Returns:
            The change ``(new - old) C^+``, shape ``(..., d)``; differentiable.
        """
        return (new - old) @ self.from_features[indices].to(a)

    def without(self, a: Tensor, indices: Tensor) -> Tensor:
        """How activations change when each of some features alone is set to 0.

        Args:
            a: Activations, shape ``(n, S, d)``.
            indices: Indices of the features, shape ``(k,)``.

        Returns:
            The changes ``-f_j C^+_j``, shape ``(k, n, S, d)``.
        """
        return -self.values(a, indices).movedim(-1, 0)[..., None] * self.from_features[indices].to(a)[:, None, None]

    def parts(self, a: Tensor) -> Tensor:
        """What `effects` takes of activations ``(..., d)``, shape ``(..., c)``: the features."""
        return self.encode(a)

    def effects(self, g: Tensor, parts: Tensor) -> Tensor:
        """What each feature contributes to something with a gradient: ``(g . C^+_j) fhat_j``.

        Args:
            g: The gradient with respect to activations, shape ``(k, ..., d)``.
            parts: `parts` of the activations, shape ``(..., c)``.

        Returns:
            Shape ``(k, ..., r)``.
        """
        return (g @ self.from_features.to(g).T).mul_(parts)

    # Coordinates determine activations: they are the features, where these do. A feature that stands for a vector has
    # several.

    def coordinates(self, a: Tensor) -> Tensor:
        """Coordinates of activations ``(..., d)``, shape ``(..., c)``: the features."""
        return self.encode(a)

    @property
    def n_encoded(self) -> int:
        """Largest number of values per position in what encodes and decodes it."""
        return max(self.to_features.shape)

    def coordinates_of(self, a: Tensor, features: Tensor) -> Tensor:
        """The coordinates of some features.

        Args:
            a: Activations, shape ``(..., d)``.
            features: Indices of the features, ascending, shape ``(k,)``.

        Returns:
            `coordinates` at their `columns`; differentiable.
        """
        return self.coordinates(a)[..., self.columns(features)]

    def from_coordinates(self, x: Tensor, a: Tensor) -> Tensor:
        """Activations from coordinates ``x``, shape ``(..., c)``.

        Args:
            x: Coordinates, some of which were changed.
            a: The activations that these were computed from, shape ``(..., d)``.

        Returns:
            Activations, shape ``(..., d)``. Directions outside the basis are at the mean.
        """
        return self.decode(x)

    def columns(self, features: Tensor) -> Tensor:
        """Indices of the coordinates of some features, shape ``(k,)``, int64."""
        return features

    def per_coordinate(self, of_features: Tensor) -> Tensor:
        """For each coordinate what there is for its feature: from shape ``(..., r)`` to ``(..., c)``."""
        return of_features


def lib_basis(name: str, mean: Tensor, covariance: Tensor, B: Tensor, cutoff: Cutoff) -> Basis:
    """Local Interaction Basis of one node layer.

    Features are uncorrelated on the data, their Jacobians towards the next layer's features are orthonormal, and they
    are in descending order of importance.

    Args:
        name: Node layer.
        mean: ``mu``, shape ``(d,)``, float64.
        covariance: ``Sigma``, shape ``(d, d)``, float64.
        B: Square-root factor of the Jacobian metric, ``B^T B = M``, shape ``(k, d)``, float64.
        cutoff: Directions with an importance up to its share of the largest are dropped. Directions of small variance
            are kept, as they may be important, unless the variance is only rounding error.

    Returns:
        The basis with kind ``"lib"``.

    Note:
        Source: arXiv 2405.10928, transformation into the LIB. With ``Sigma = U D U^T``, the eigenvalues ``Lambda`` and
        eigenvectors ``V`` of ``D^{1/2} U^T M U D^{1/2}`` are the squared singular values and right singular vectors of
        ``B U D^{1/2}``, which is computed instead: squaring would lose half the digits of the small ones.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> cutoff = Cutoff(1e-9, 2, torch.float64)
        >>> basis = lib_basis("fc", eye[0], torch.diag(torch.tensor([4.0, 1.0])).double(), eye, cutoff)
        >>> basis.importance
        tensor([4., 1.], dtype=torch.float64)
    """
    D, U = _principal_components(mean, covariance, cutoff.rounding)
    _, s, Vt = torch.linalg.svd(B @ (U * D.sqrt()), full_matrices=False)
    keep = s.square() > cutoff.metric * s.square().amax() if s.numel() else torch.zeros_like(s, dtype=torch.bool)
    s, V = s[keep], Vt[keep].T
    C = (U / D.sqrt()) @ (V * s)
    C_pinv = (V / s).T @ (U * D.sqrt()).T
    return Basis(name, "lib", mean, C, C_pinv, s.square())


def pca_basis(name: str, mean: Tensor, covariance: Tensor, cutoff: Cutoff) -> Basis:
    """Principal components of one node layer: the baseline.

    Args:
        name: Node layer.
        mean: ``mu``, shape ``(d,)``, float64.
        covariance: ``Sigma``, shape ``(d, d)``, float64.
        cutoff: Directions with a variance up to its share of the largest are dropped.

    Returns:
        The basis with kind ``"pca"``; its importances are variances.

    Example:
        >>> cutoff = Cutoff(1e-9, 2, torch.float32)
        >>> pca_basis("fc", torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])), cutoff).importance
        tensor([4., 1.])
    """
    D, U = _principal_components(mean, covariance, cutoff.variance)
    return Basis(name, "pca", mean, U, U.T, D)


def neuron_basis(name: str, mean: Tensor, covariance: Tensor) -> Basis:
    """Single activations, less their mean, as features: the trivial baseline.

    Args:
        name: Node layer.
        mean: ``mu``, shape ``(d,)``, float64.
        covariance: ``Sigma``, shape ``(d, d)``, float64.

    Returns:
        The basis with kind ``"neuron"``; its importances are variances.

    Example:
        >>> neuron_basis("fc", torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0]))).importance
        tensor([1., 4.])
    """
    eye = torch.eye(mean.shape[0], dtype=mean.dtype, device=mean.device)
    return Basis(name, "neuron", mean, eye, eye, covariance.diagonal().clone())


def centered_basis(name: str, mean: Tensor, covariance: Tensor) -> Basis:
    """Single logits, less the mean over all classes, as features: softmax does not depend on that mean.

    Args:
        name: Node layer.
        mean: ``mu``, shape ``(d,)``, float64.
        covariance: ``Sigma``, shape ``(d, d)``, float64.

    Returns:
        The basis with kind ``"centered"``; its importances are variances.

    Example:
        >>> basis = centered_basis("output", torch.zeros(2), torch.eye(2))
        >>> basis.encode(torch.tensor([3.0, 1.0])), basis.importance
        (tensor([ 1., -1.]), tensor([0.5000, 0.5000]))
    """
    d = mean.shape[0]
    P = torch.eye(d, dtype=mean.dtype, device=mean.device) - 1 / d
    return Basis(name, "centered", mean, P, P, (P @ covariance @ P).diagonal().clone())


def _principal_components(mean: Tensor, covariance: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    # Constant activations differ from their rounded mean: a variance of that size is rounding error.
    rounding = float((torch.finfo(mean.dtype).eps * mean).square().sum())
    return eigh_psd(covariance, cutoff, floor=rounding)
