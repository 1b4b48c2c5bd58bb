"""Latents of a dictionary as the features of a node layer, and what the dictionary leaves out as one more.

A latent is a feature if it is active anywhere in the samples of the graph. All that these do not say of the activations
is the *error*, ``e = a - decode(f)``, so that ``a = decode(f) + e`` exactly. It is the last feature of its node layer:
its value is the length of ``e``, and what has to be known of its direction is in `DictionaryBasis.coordinates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import LATENTS
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import LIBError

# Numbers of latents that are in memory at once.
_NUMBERS = 2**22
# Latents are decoded one by one if fewer than this share of them is active.
_SPARSE = 1 / 8
# Name of the last feature.
ERROR = "error"


@dataclass(frozen=True)
class DictionaryBasis(Basis):
    """Latents of a dictionary and its error as the features of one node layer.

    Attributes:
        name: Node layer.
        kind: ``"latents"``.
        mean: ``decode(0)``, the activations of which all features are 0, shape ``(d,)``, float64.
        to_features: Gradients of latents where they are active, as columns, shape ``(d, r)``, float64; for those whose
            gradient is not the same everywhere, where they are largest. Zero for the error. Empty if the dictionary is
            not there.
        from_features: ``d decode / d f_j`` as rows, likewise, shape ``(r, d)``, float64.
        importance: Mean square of each feature, shape ``(r,)``, float64: like a variance, but about the value of an
            inactive latent, 0.
        latents: Numbers of the latents in the dictionary, ascending, shape ``(r - 1,)``, int64.
        dictionary: The dictionary; None for a graph from a file, to which it was not given.
        reference: Class, hash of the weights, and number of latents of the dictionary.
        weights: The weights of the dictionary by name, of a graph from a file that has them; else None.

    Example:
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> of = neuron_basis("fc", torch.zeros(2), torch.eye(2))
        >>> dictionary = AdaptedDictionary(of, torch.ones(1, 2), "fc")
        >>> basis = DictionaryBasis.of(dictionary, torch.tensor([1]), torch.ones(2).double())
        >>> basis.encode(torch.tensor([3.0, 4.0])), basis.n_features
        (tensor([4., 3.]), 2)
    """

    latents: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"))
    dictionary: AdaptedDictionary | None = field(default=None, repr=False, compare=False)
    reference: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, dictionary: AdaptedDictionary, latents: Tensor, importance: Tensor, to_features: Tensor | None = None
    ) -> DictionaryBasis:
        """The basis of some latents.

        Args:
            dictionary: The dictionary.
            latents: Numbers of the latents, ascending, shape ``(r - 1,)``, int64.
            importance: Mean squares of these and of the error, shape ``(r,)``, float64.
            to_features: Their gradients, shape ``(d, r - 1)``; None for zeros.

        Returns:
            The basis, on the device of ``importance``.
        """
        device = importance.device
        none = importance.new_zeros(1, dictionary.d)
        directions = (
            dictionary.decoder_weights(latents).to(device, importance.dtype)
            if dictionary.is_affine
            else importance.new_zeros(len(latents), dictionary.d)
        )
        gradients = importance.new_zeros(len(latents), dictionary.d) if to_features is None else to_features.T
        return cls(
            dictionary.name,
            LATENTS,
            dictionary.reference_offset.to(device, importance.dtype),
            torch.cat([gradients.to(none), none]).T.contiguous(),
            torch.cat([directions, none]),
            importance,
            latents=latents.to(device),
            dictionary=dictionary,
            reference=dictionary.reference,
        )

    def with_dictionary(self, dictionary: AdaptedDictionary) -> DictionaryBasis:
        """The basis of a graph from a file, with its dictionary.

        Args:
            dictionary: The dictionary.

        Returns:
            The basis; its `to_features` are zero if they are neither in the file nor rows of the weights.
        """
        if self.to_features.shape[1]:
            return replace(self, dictionary=dictionary)
        weights = dictionary.encoder_matrix()
        of_latents = None if weights is None else weights[self.latents.to(weights.device)].T
        full = DictionaryBasis.of(dictionary, self.latents, self.importance, of_latents)
        return replace(self, dictionary=dictionary, to_features=full.to_features, from_features=full.from_features)

    @property
    def error(self) -> int:
        """Index of the error among the features: the last one."""
        return len(self.latents)

    @property
    def numbers(self) -> Tensor:
        """Number of each feature in its id: that of the latent, and the number of latents for the error."""
        return torch.cat([self.latents, self.latents.new_tensor([self.reference["n_latents"]])])

    @property
    def known(self) -> AdaptedDictionary:
        """The dictionary.

        Raises:
            LIBError: If it is not there, or has other weights by now.
        """
        if self.dictionary is None:
            raise LIBError(
                f"Features of '{self.name}' are latents of a dictionary ({self.reference.get('class', 'unknown')}, "
                f"weights {self.reference.get('hash', 'unknown')}) that is not in the file. Pass it: "
                f"InteractionGraph.load(path, dictionaries={{'{self.name}': dictionary}})."
            )
        if not self.dictionary.is_current:
            raise LIBError(
                f"The dictionary of '{self.name}' has other weights by now than this graph was computed with. Compute "
                "a new graph, or keep a copy of the dictionary as it was."
            )
        return self.dictionary

    def broadcast(self, process_group: ProcessGroup) -> DictionaryBasis:
        """The same: it was chosen by sums over all processes."""
        return self

    def encode(self, a: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Latents of activations, and the length of the error.

        Args:
            a: Activations, shape ``(..., d)``.
            dtype: Type to return features in; that of ``a`` by default.

        Returns:
            Features, shape ``(..., r)``, on the device of ``a``.

        Raises:
            ActivationError: If there are not as many activations as the node layer has.
        """
        self.check_width(a)
        f, e = self.latents_and_error(a)
        return torch.cat([f, torch.linalg.vector_norm(e, dim=-1, keepdim=True)], -1).to(dtype or a.dtype)

    def decode(self, features: Tensor) -> Tensor:
        """Activations from latents, without any error.

        Args:
            features: Shape ``(..., r)``; the last one is not used.

        Returns:
            Activations, shape ``(..., d)``.

        Raises:
            LIBError: If decoding needs the activations themselves, as those are normalised: see `from_coordinates`.
        """
        if self.known.is_stateful:
            raise LIBError(
                f"The dictionary of '{self.name}' normalises activations, and decodes latents only with these: "
                "from_coordinates(x, a) takes both."
            )
        return self.decoded(features[..., :-1], features.new_zeros(*features.shape[:-1], self.known.d))

    def latents_and_error(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the latents that are features, and the error.

        Args:
            a: Activations, shape ``(..., d)``.

        Returns:
            Shapes ``(..., r - 1)`` and ``(..., d)``, in the type of ``a``; differentiable.
        """
        f = self.latents_of(a)
        return f, self.error_of(f, a)

    def latents_of(self, a: Tensor) -> Tensor:
        """Values of the latents that are features, shape ``(..., r - 1)``, of activations ``(..., d)``."""
        dictionary, latents = self.known, self.latents.to(a.device)
        rows = a.reshape(-1, a.shape[-1])
        parts = [dictionary.encode(part)[:, latents] for part in rows.split(max(1, _NUMBERS // dictionary.n_latents))]
        return torch.cat([rows.new_zeros(0, len(latents)), *parts]).reshape(*a.shape[:-1], len(latents))

    def error_of(self, f: Tensor, a: Tensor) -> Tensor:
        """What latents leave out of activations.

        Args:
            f: Values of the latents that are features, shape ``(..., r - 1)``.
            a: The activations, shape ``(..., d)``.

        Returns:
            ``a - decode(f)``, shape ``(..., d)``.
        """
        if self.known.is_affine and not torch.is_grad_enabled():
            is_active = f != 0
            K = int(is_active.sum(-1).max()) if f.numel() else 0
            if _SPARSE * f.shape[-1] > K:
                return a - self._decoded_sparse(f, a, is_active.to(torch.float32).topk(K, dim=-1).indices)
        of = a.reshape(-1, a.shape[-1])
        rows = f.reshape(len(of), f.shape[-1])
        size = max(1, _NUMBERS // self.known.n_latents)
        parts = [x - self.decoded(y, x) for x, y in zip(of.split(size), rows.split(size), strict=True)]
        return torch.cat([of[:0], *parts]).reshape(a.shape)

    def _decoded_sparse(self, f: Tensor, a: Tensor, index: Tensor) -> Tensor:
        """What an affine decoder makes of few active latents, with indices ``(..., K)``."""
        offset, scale = self.known.offset(a), self.known.scale(a)
        latents, total = self.latents.to(index.device), torch.zeros_like(a)
        for k in range(index.shape[-1]):
            one = index[..., k]
            values = f.gather(-1, one[..., None])
            total += values * self.known.decoder_weights(latents[one]).to(a)
        return offset + (total if scale is None else total * scale[..., None])

    def decoded(self, f: Tensor, a: Tensor) -> Tensor:
        """What the dictionary makes of latents, ``(..., r - 1)``, of activations ``(..., d)``; differentiable."""
        index = self.latents.to(f.device).expand(f.shape)
        every = f.new_zeros(*f.shape[:-1], self.known.n_latents).scatter(-1, index, f)
        return self.known.decode(every, a)

    def values(self, a: Tensor, indices: Tensor) -> Tensor:
        """See `Basis`."""
        return self.encode(a)[..., indices.to(a.device)]

    def change(self, a: Tensor, indices: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """See `Basis`: the difference of what is decoded; the error becomes longer or shorter in its direction."""
        f, e = self.latents_and_error(a)
        indices = indices.to(a.device)
        is_latent = indices < self.error
        columns = indices[is_latent].expand(*a.shape[:-1], -1)
        change = self.decoded(f.scatter(-1, columns, new[..., is_latent].to(f)), a) - self.decoded(f, a)
        if not bool(is_latent.all()):
            before, after = old[..., ~is_latent], new[..., ~is_latent]
            change = change + e * torch.where(before > 0, after / before.clamp(min=torch.finfo(e.dtype).tiny), 1.0).sub(
                1
            ).to(e)
        return change

    def without(self, a: Tensor, indices: Tensor) -> Tensor:
        """See `Basis`: the difference of what is decoded, or the error."""
        f, e = self.latents_and_error(a)
        decoded = self.decoded(f, a)
        changes = []
        for j in indices.tolist():
            if j == self.error:
                changes.append(-e)
            else:
                changes.append(self.decoded(f.index_fill(-1, torch.tensor([j], device=f.device), 0.0), a) - decoded)
        return torch.stack(changes)

    def parts(self, a: Tensor) -> Tensor:
        """See `Basis`: latents times the scale of the decoder, and the error."""
        f, e = self.latents_and_error(a)
        scale = self.known.scale(a)
        return torch.cat([f if scale is None else f * scale[..., None], e], -1)

    def effects(self, g: Tensor, parts: Tensor) -> Tensor:
        """See `Basis`: with the directions of an affine decoder, and with those of the error."""
        of_latents = (g @ self.from_features[:-1].to(g).T).mul_(parts[..., : self.error])
        return torch.cat([of_latents, (g * parts[..., self.error :]).sum(-1, keepdim=True)], -1)

    def coordinates(self, a: Tensor) -> Tensor:
        """Latents, and the ``d`` entries of the error, of activations ``(..., d)``: shape ``(..., r - 1 + d)``."""
        return torch.cat(self.latents_and_error(a), -1)

    @property
    def n_encoded(self) -> int:
        """See `Basis`: those of all latents, whichever are features."""
        return self.known.n_latents + self.known.d

    def coordinates_of(self, a: Tensor, features: Tensor) -> Tensor:
        """See `Basis`: without decoding them, if the error is not among them."""
        if bool((features == self.error).any()):
            return super().coordinates_of(a, features)
        return self.latents_of(a)[..., features]

    def from_coordinates(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Basis`: ``decode(f) + e``."""
        return self.decoded(x[..., : self.error], a) + x[..., self.error :]

    def columns(self, features: Tensor) -> Tensor:
        """See `Basis`: the error has ``d`` coordinates."""
        of_error = torch.arange(self.error, self.error + len(self.mean), device=features.device)
        has_error = bool((features == self.error).any())
        return torch.cat([features[features < self.error], of_error if has_error else of_error[:0]])

    def per_coordinate(self, of_features: Tensor) -> Tensor:
        """See `Basis`."""
        of_error = of_features[..., self.error :].expand(*of_features.shape[:-1], len(self.mean))
        return torch.cat([of_features[..., : self.error], of_error], -1)
