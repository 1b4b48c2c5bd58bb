"""A dictionary of any package behind one interface: latents, and derivatives of encoder and decoder at active latents.

What dictionaries do differently, and what is done about it:

- *Results.* ``encode`` returns latents ``(m, r)``, or a tuple with the values and the indices of the active ones
  (EleutherAI's sparsify), or a tuple with latents and what ``decode`` needs beside them.
- *Normalisation that is kept from ``encode`` to ``decode``* (SAELens' ``run_time_activation_norm_fn_in``): every
  ``decode`` follows an ``encode`` of the same activations, and nothing of it stays in the object.
- *Shapes.* Activations are given as rows ``(m, d)``, to objects that join attention heads (SAELens' ``hook_z``) with an
  axis for these, and what comes back is flattened again.
- *Types and devices.* Activations are converted to those of the weights, and what is computed of them back again.
- *Places.* Objects that write to another place than they read from are recognised, and refused with a way out:
  `lib_lightning.dictionaries.Transcoder`.

Derivatives are only ever those of active latents, ``d f_i / d a`` and ``d decode / d f_j``. They are rows of the
weights wherever these are found to be so, by a comparison with automatic differentiation on every batch, and otherwise
computed by automatic differentiation, latent by latent.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import (
    LIBError,
    NotFiniteError,
    SettingError,
    SettingTypeError,
    brief,
    counted,
    shortened,
)
from lib_lightning.model.agreement import agree, half_of_the_digits, other_order
from lib_lightning.model.batch import hash_tensors
from lib_lightning.model.weights_hash import weights_hash

# Numbers of latents that are in memory at once.
_NUMBERS = 2**22
# Rows with which an object is tried.
_TRIED = 8
# Rows of each batch at which gradients are compared with the weights.
_VERIFIED = 8
# About so many latents are active in the probe of a decoder.
_PROBED = 64
# Attributes in which objects say how many latents they have.
_COUNTS = ("num_latents", "n_latents", "d_sae", "dict_size", "d_hidden")


class AdaptedDictionary:
    """A dictionary of any package, as functions of rows of activations.

    Args:
        dictionary: An object with ``encode`` and ``decode``.
        a: Some activations of the node layer, shape ``(m, d)``, with which the object is tried.
        name: Name of the node layer, for errors.

    Attributes:
        dictionary: The object.
        name: Name of the node layer.
        d: Width of the node layer.
        n_latents: Number of latents ``r``, active or not.
        is_stateful: Whether ``decode`` depends on the activations that were encoded last.
        is_differentiable: Whether the encoder has a derivative. Without one, nothing acts on its latents.
        is_affine: Whether ``decode(f)`` is ``decode(0) + s f W``, with a scale ``s`` that depends on the activations.

    Raises:
        SettingTypeError: If the object has no ``encode`` or ``decode``.
        SettingError: If it does not take these activations, or does not return activations of the same width.
        NotFiniteError: If it returns NaN or infinite numbers for finite activations.

    Example:
        >>> dictionary = nn.Module()
        >>> dictionary.encode, dictionary.decode = torch.relu, torch.neg
        >>> adapted = AdaptedDictionary(dictionary, torch.randn(5, 2), "fc")
        >>> adapted.n_latents, adapted.is_stateful, adapted.is_affine
        (2, False, True)
        >>> adapted.encode(torch.tensor([3.0, -1.0]))
        tensor([3., 0.])
    """

    def __init__(self, dictionary: Any, a: Tensor, name: str) -> None:
        check_dictionary(dictionary, f"The dictionary of '{name}'")
        _refuse_other_places(dictionary, name)
        self.dictionary, self.name, self.d = dictionary, name, a.shape[-1]
        # An axis of one head is joined by objects that join heads, whatever the number of these.
        joins_heads = getattr(dictionary, "hook_z_reshaping_mode", False) is True
        own_shape = getattr(dictionary, "input_shape", None)
        self._shape = (1, self.d) if joins_heads else tuple(own_shape) if own_shape else (self.d,)
        if not tensors_of(dictionary) and isinstance(dictionary, nn.Module):
            with torch.no_grad():  # some make their weights when they see the width of the activations
                self.dictionary.encode(a.detach()[:1].reshape(1, *self._shape))
        self._like = next((t for t in tensors_of(dictionary).values() if t.is_floating_point()), None)
        self._has_pairs, self._passes_state = False, False
        self.n_latents, self.is_stateful, self.is_affine = 0, False, False
        self._decoder: Tensor | None = None
        with self._unchanged(), torch.no_grad():
            self._try(a.detach()[:_TRIED])
        self._versions = _versions(dictionary)
        # Some objects learn a shape when they encode for the first time.
        self.is_stateful = self.is_stateful or not self._decodes_alone()

    @classmethod
    def without_data(cls, dictionary: Any, mean: Tensor, name: str) -> AdaptedDictionary:
        """A dictionary that is tried with random activations.

        Args:
            dictionary: As for the class.
            mean: About the mean of the activations, shape ``(d,)``.
            name: As for the class.

        Returns:
            The adapted dictionary.
        """
        noise = torch.randn(_TRIED, len(mean), generator=torch.Generator().manual_seed(0), device="cpu").to(mean)
        return cls(dictionary, mean + (1 + mean.abs().mean()) * noise, name)

    @property
    def hash(self) -> str:
        """Hash of the weights: 16 hexadecimal digits, equal for equal weights on any device."""
        if isinstance(self.dictionary, nn.Module):
            # Compiled or not, it is the same.
            return weights_hash(getattr(self.dictionary, "_orig_mod", self.dictionary))
        return hash_tensors(sorted(tensors_of(self.dictionary).items(), key=lambda item: item[0])).hex()[:16]

    @property
    def is_current(self) -> bool:
        """Whether the object has the weights that it was tried with, as far as torch counts changes of them."""
        return _versions(self.dictionary) == self._versions

    @property
    def reference(self) -> dict[str, Any]:
        """What a file says of the dictionary: class, hash of the weights, and number of latents."""
        kind = type(getattr(self.dictionary, "_orig_mod", self.dictionary))  # of a compiled module, the module
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "hash": self.hash, "n_latents": self.n_latents}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, by name."""
        if isinstance(self.dictionary, nn.Module):
            return {name: t for name, t in self.dictionary.state_dict().items() if isinstance(t, Tensor)}
        return tensors_of(self.dictionary)

    def encode(self, a: Tensor) -> Tensor:
        """Latents of activations.

        Args:
            a: Activations, shape ``(..., d)``.

        Returns:
            Latents, shape ``(..., r)``, in the type and on the device of ``a``; differentiable.
        """
        with self._unchanged():
            parts = [self._encode(rows)[0].to(a) for rows in self._parts(a)]
        return torch.cat(parts).reshape(*a.shape[:-1], self.n_latents)

    def decode(self, f: Tensor, a: Tensor) -> Tensor:
        """Activations from latents.

        Args:
            f: Latents, shape ``(..., r)``.
            a: The activations that these are latents of, shape ``(..., d)``, for objects that normalise them.

        Returns:
            Activations, shape ``(..., d)``, in the type and on the device of ``f``; differentiable with respect to
            ``f``. What a normalisation keeps of ``a`` is a constant.
        """
        with self._unchanged():
            pairs = zip(self._parts(f), self._parts(a.expand(*f.shape[:-1], self.d)), strict=True)
            parts = [self._decode(rows, of).to(f) for rows, of in pairs]
        return torch.cat(parts).reshape(*f.shape[:-1], self.d)

    @property
    def reference_offset(self) -> Tensor:
        """``decode(0)``, shape ``(d,)``; of a dictionary with a scale, where this is 1."""
        return self._offset

    def offset(self, a: Tensor) -> Tensor:
        """What is decoded where no latent is active, at activations ``(..., d)``, of the same shape."""
        if not self.is_stateful:
            return self._offset.to(a).expand_as(a)
        with torch.no_grad():
            return self.decode(a.new_zeros(*a.shape[:-1], self.n_latents), a)

    def decoder_weights(self, latents: Tensor) -> Tensor:
        """The directions ``W_j = d decode / d f_j`` of an affine decoder, at the scale 1.

        Args:
            latents: Numbers of latents, any shape.

        Returns:
            Shape ``(*latents.shape, d)``, in the type and on the device of the dictionary's weights.
        """
        if self._decoder is None:
            with self._unchanged(), torch.no_grad():
                self._decoder = self._all_directions()
        return self._decoder[latents.to(self._decoder.device)]

    def scale(self, a: Tensor) -> Tensor | None:
        """The scale of an affine decoder at activations.

        Args:
            a: Activations, shape ``(..., d)``.

        Returns:
            ``s``, shape ``(...)``, in the type of ``a``; None if it is 1 everywhere.
        """
        if not self.is_stateful:
            return None
        with torch.no_grad():
            probe = self._probe.to(a).expand(*a.shape[:-1], -1)
            direction = self._probe_direction.to(a)
            return (self.decode(probe, a) - self.offset(a)) @ direction / direction.square().sum()

    def decoder_gradients(self, a: Tensor, f: Tensor, latents: Tensor) -> Tensor:
        """The directions ``d decode / d f_j`` of some latents of each row.

        Args:
            a: Activations, shape ``(m, d)``.
            f: Their latents, shape ``(m, r)``.
            latents: Numbers of the latents of each row, shape ``(m, K)``.

        Returns:
            Shape ``(m, K, d)``, in the type and on the device of ``a``.
        """
        if self.is_affine:
            directions, scale = self.decoder_weights(latents).to(a), self.scale(a)
            return directions if scale is None else directions * scale[:, None, None]
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            decoded = self.decode(leaf, a)
            columns = [
                torch.autograd.grad(decoded[:, k].sum(), leaf, retain_graph=True)[0].gather(1, latents)
                for k in range(self.d)
            ]
        return torch.stack(columns, -1)

    def encoder_gradients(self, a: Tensor, latents: Tensor, active: Tensor) -> Tensor:
        """The gradients ``d f_i / d a`` of some latents of each row.

        Args:
            a: Activations, shape ``(m, d)``.
            latents: Numbers of the latents of each row, shape ``(m, K)``.
            active: True where a latent is active, shape ``(m, K)``; the gradients of the others are 0.

        Returns:
            Shape ``(m, K, d)``, in the type and on the device of ``a``.
        """
        if (weights := self.encoder_weights(a, latents, active)) is not None:
            return weights[latents.to(weights.device)].to(a) * active[..., None]
        found: list[Tensor] = [a.new_zeros(0, latents.shape[1], self.d)]
        size = max(1, _NUMBERS // self.n_latents)
        for rows, of, is_active in zip(a.split(size), latents.split(size), active.split(size), strict=True):
            leaf, f = self._latents_of_leaf(rows)
            gradients = a.new_zeros(*of.shape, self.d)
            for k in range(of.shape[1] if self.is_differentiable else 0):
                if (gradient := _gradient(f.gather(1, of[:, k : k + 1]), leaf)) is not None:
                    gradients[:, k] = gradient
            found.append(gradients * is_active[..., None])
        return torch.cat(found)

    def encoder_weights(self, a: Tensor, latents: Tensor, active: Tensor) -> Tensor | None:
        """The matrix ``(r, d)`` whose rows are the gradients of active latents, if the encoder has one.

        Args:
            a: Activations, shape ``(m, d)``, at some of which this is verified.
            latents: Numbers of some latents of each row, shape ``(m, K)``.
            active: True where these are active, shape ``(m, K)``.

        Returns:
            The matrix, in the type of the dictionary's weights; None if it has none, or not at these activations.
        """
        if not self._encoders or not self.is_differentiable:
            return None
        step = -(-len(a) // _VERIFIED) or 1
        a, latents, active = a[::step], latents[::step], active[::step]
        # The gradient of a random combination of active latents is that combination of rows: one backward pass.
        z = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(a) * active
        size, combined, gradients = max(1, _NUMBERS // self.n_latents), [], []
        for rows, of, values in zip(a.split(size), latents.split(size), z.split(size), strict=True):
            leaf, f = self._latents_of_leaf(rows)
            cotangents = torch.zeros_like(f).scatter_add_(1, of, values)
            gradients.append(torch.autograd.grad(f, leaf, cotangents)[0])
            combined.append([(cotangents.to(weights) @ weights).to(a) for weights in self._encoders])
        for weights, parts in zip(self._encoders, zip(*combined, strict=True), strict=True):
            if agree(torch.cat(parts), torch.cat(gradients), other_order(weights.dtype)):
                return weights
        return None

    def encoder_matrix(self) -> Tensor | None:
        """The matrix ``(r, d)`` of `encoder_weights` at the activations that the dictionary was tried with, if any."""
        with torch.no_grad():
            f = self.encode(self._tried)
        active = f != 0
        count = max(1, int(active.sum(1).max()))
        latents = active.to(torch.float32).topk(count, dim=1).indices
        return self.encoder_weights(self._tried, latents, active.gather(1, latents))

    def _latents_of_leaf(self, a: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            return leaf, self.encode(leaf)

    def _parts(self, t: Tensor) -> Sequence[Tensor]:
        """Rows ``(m, ...)`` of a tensor, some at a time."""
        parts: Sequence[Tensor] = t.reshape(-1, t.shape[-1]).split(max(1, _NUMBERS // max(1, self.n_latents)))
        return parts

    def _to_object(self, rows: Tensor) -> Tensor:
        return rows if self._like is None else rows.to(self._like.device, self._like.dtype)

    def _encode(self, rows: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Latents ``(m, r)`` of rows, and what the decoder needs beside them."""
        found = self.dictionary.encode(self._to_object(rows).reshape(len(rows), *self._shape))
        first, *rest = self._result(found, "encode")
        if not first.is_floating_point():  # such as the number of a cluster, one-hot
            first = first.to(rows.dtype if self._like is None else self._like.dtype)
        if not self._is_pair(first, rest):
            return self._dense(first), tuple(rest)
        self._has_pairs = True
        n = self.n_latents or self._count_latents(rest)
        return first.new_zeros(len(rows), n).scatter_add(1, rest[0].reshape(len(rows), -1), first.flatten(1)), ()

    @staticmethod
    def _is_pair(values: Tensor, rest: Sequence[Any]) -> bool:
        indices = rest[0] if rest else None
        return isinstance(indices, Tensor) and not indices.is_floating_point() and indices.shape == values.shape

    @staticmethod
    def _dense(f: Tensor) -> Tensor:
        f = f.to_dense() if f.layout != torch.strided else f
        return f.reshape(-1, f.shape[-1])

    def _count_latents(self, rest: Sequence[Any]) -> int:
        """Number of latents of an object that returns values and indices of active ones."""
        if len(rest) > 1 and isinstance(rest[1], Tensor) and rest[1].ndim == rest[0].ndim:
            return int(rest[1].shape[-1])  # all of them, before some are chosen
        for name in _COUNTS:
            if isinstance(count := getattr(self.dictionary, name, None), int):
                return count
        raise SettingError(
            f"The dictionary of '{self.name}' returns values and indices of active latents, and does not say how many "
            f"latents it has: give it an attribute {_COUNTS[0]}."
        )

    def _decode(self, f: Tensor, a: Tensor) -> Tensor:
        """Activations ``(m, d)`` from rows of latents, in the state that encoding rows of activations leaves."""
        f = self._to_object(f)
        if self._has_pairs:
            is_active = f != 0
            # A latent that is 0 has a derivative, too.
            needs_all = f.requires_grad and torch.is_grad_enabled()
            k = self.n_latents if needs_all else max(1, int(is_active.sum(1).max()))
            indices = is_active.to(torch.float32).topk(k, dim=1).indices
            return self._flat(self.dictionary.decode(f.gather(1, indices), indices))
        state: tuple[Any, ...] = ()
        if self.is_stateful:
            with torch.no_grad():
                state = self._encode(a)[1]
        return self._flat(self._call_decode(f, state))

    def _call_decode(self, f: Tensor, state: tuple[Any, ...]) -> Tensor:
        found = self.dictionary.decode(f, *state) if self._passes_state else self.dictionary.decode(f)
        decoded: Tensor = self._result(found, "decode")[0]
        return decoded.to(f)

    def _result(self, found: Any, method: str) -> tuple[Any, ...]:
        """What a method returns, as a tuple that begins with a tensor."""
        every = (found,) if isinstance(found, Tensor) else tuple(found) if isinstance(found, (tuple, list)) else ()
        if not every or not isinstance(every[0], Tensor):
            raise SettingError(
                f"{method} of the dictionary of '{self.name}' must return a tensor, or a tuple that begins with one; "
                f"got {shortened(repr(found), 80)}."
            )
        return every

    @staticmethod
    def _flat(a: Tensor) -> Tensor:
        return a.reshape(len(a), -1)

    def _try(self, a: Tensor) -> None:
        """Find out what the object returns and keeps."""
        try:
            f, state = self._encode(a)
        except LIBError:
            raise
        except Exception as error:
            raise SettingError(
                f"The dictionary of '{self.name}' does not take activations of shape {(len(a), *self._shape)}: "
                f"{brief(error)}. An attribute input_shape, such as (heads, d_head), gives it another one."
            ) from error
        if len(f) != len(a):
            raise SettingError(
                f"The encoder of '{self.name}' returns {counted(len(f), 'row')} of {f.shape[-1]:,} latents for "
                f"{len(a)} rows of activations: encode(a) -> (..., r) needs one for each."
            )
        self.n_latents = f.shape[-1]
        self._passes_state = bool(state) and takes(self.dictionary.decode, 1 + len(state))
        try:
            decoded = self._flat(self._call_decode(f, state)) if self._passes_state else self._decode(f, a)
        except LIBError:
            raise
        except Exception as error:
            raise SettingError(
                f"The decoder of '{self.name}' does not take its {self.n_latents:,} latents: {brief(error)}."
            ) from error
        if len(decoded) != len(a):
            raise SettingError(
                f"The decoder of '{self.name}' returns {counted(len(decoded), 'row')} of {decoded.shape[-1]:,} for "
                f"{len(a)} rows of latents: decode(f) -> (..., {self.d}) needs one for each."
            )
        if decoded.shape != a.shape:
            raise SettingError(
                f"The dictionary of '{self.name}' reads {self.d} activations, and writes {decoded.shape[-1]}: one that "
                "writes to another place needs lib_lightning.dictionaries.Transcoder."
            )
        for part, t in (("encoder", f), ("decoder", decoded)):
            if bool(torch.isfinite(a).all()) and not bool(torch.isfinite(t).all()):
                raise NotFiniteError(
                    f"The {part} of the dictionary of '{self.name}' returns numbers that are NaN or infinite, for "
                    "activations that are finite. Look for them in its weights."
                )
        self._check_rows(f, a)
        generator = torch.Generator().manual_seed(0)
        few = torch.rand(self.n_latents, generator=generator, device="cpu") * self.n_latents < _PROBED
        sizes = 0.5 + torch.rand(self.n_latents, generator=generator, device="cpu")
        self._probe = (few * sizes).to(f) * (f.abs().amax() if f.any() else 1.0)
        self._probe_direction = f.new_zeros(self.d)
        self.is_stateful = self._passes_state or self._depends_on_last(a)
        self._tried = a
        self._offset = self._decode(f.new_zeros(1, self.n_latents), a[:1])[0]
        self.is_affine = self._find_affine(f, a)
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            latents = self._encode(leaf)[0]
            self.is_differentiable = _gradient(latents, leaf) is not None
        # Directions of decoders of values and indices are decoded, and take no derivative.
        if not self._has_pairs and not torch.is_inference_mode_enabled() and not self._is_decoder_differentiable(f, a):
            raise SettingError(
                f"The decoder of '{self.name}' has no derivative with respect to its latents, which edges are made of: "
                "it detaches its result, or runs under torch.no_grad."
            )
        self._encoders = [
            matrix.detach()
            for t in tensors_of(self.dictionary).values()
            if t.is_floating_point() and t.ndim == 2
            for matrix in (t, t.T)
            if matrix.shape == (self.n_latents, self.d)
        ]

    def _is_decoder_differentiable(self, f: Tensor, a: Tensor) -> bool:
        with torch.enable_grad():
            return self._decode(f[:1].detach().requires_grad_(), a[:1]).requires_grad

    def _check_rows(self, f: Tensor, a: Tensor) -> None:
        """Raise an error if latents depend on anything but their own row of activations.

        Args:
            f: The latents of ``a``.
            a: Activations, shape ``(m, d)``.
        """
        others = {
            "more than the activations, such as noise: encoding them again gives others": self._encode(a)[0],
            "the other activations in a batch: choose active latents in each row alone": torch.cat(
                [f[:0], *(self._encode(row)[0] for row in a.split(1))]
            ),
        }
        for what, other in others.items():
            # Rounding may exchange two latents that are as good as equal.
            same = sum(agree(x, y, half_of_the_digits(f.dtype)) for x, y in zip(other, f, strict=True))
            if 2 * same < len(f):
                raise SettingError(f"Latents of the dictionary of '{self.name}' depend on {what}.")

    def _depends_on_last(self, a: Tensor) -> bool:
        """Whether the same latents are decoded differently after other activations were encoded."""
        if self._has_pairs:
            return False
        probe = self._to_object(self._probe.expand(len(a), -1))
        try:
            self._encode(a)
            decoded = self._flat(self._call_decode(probe, ()))
            self._encode(a.flip(0) * 1.5 + 0.25 * a.abs().amax())
            again = [self._flat(self._call_decode(probe, ())) for _ in range(2)]
        except Exception:  # what it keeps was deleted by the first call
            return True
        tolerance = other_order(decoded.dtype)
        return not all(agree(x, decoded, tolerance) for x in again)

    def _decodes_alone(self) -> bool:
        """Whether latents can be decoded before anything was encoded."""
        if self._has_pairs:
            return True
        try:
            with self._unchanged(), torch.no_grad():
                return self._flat(self._call_decode(self._to_object(self._probe[None]), ())).shape[1] == self.d
        except Exception:
            return False

    def _find_affine(self, f: Tensor, a: Tensor) -> bool:
        decoded = self._decode(f, a)
        tolerance = half_of_the_digits(f.dtype)
        zero = self._decode(torch.zeros_like(f), a)
        probe = self._probe.expand_as(f)
        of_probe, both = self._decode(probe, a) - zero, self._decode(f + probe, a) - zero
        if not agree(both, decoded - zero + of_probe, tolerance):
            return False
        direction = self._probe_direction = of_probe[0]
        if not self.is_stateful:
            return True
        # The scale is 1 in the state of the first row.
        scale = (of_probe @ direction / direction.square().sum().clamp(min=torch.finfo(f.dtype).tiny))[:, None]
        own = self._decode(f, a[:1].expand_as(a)) - zero[:1]
        return agree(of_probe, scale * direction, tolerance) and agree(decoded - zero, scale * own, tolerance)

    def _all_directions(self) -> Tensor:
        """All directions of an affine decoder, ``(r, d)``, at the scale 1."""
        like = self._offset
        if self._has_pairs:
            every = torch.arange(self.n_latents, device=like.device)
            ones = [
                self._flat(self.dictionary.decode(like.new_ones(len(j), 1), j[:, None]))
                for j in every.split(max(1, _NUMBERS // self.d))
            ]
            return torch.cat(ones) - like
        # One backward pass for some entries of the activations at a time: no more than encoding as many rows.
        columns = []
        for k in torch.arange(self.d, device=like.device).split(max(1, _NUMBERS // self.n_latents)):
            with torch.enable_grad():
                f = like.new_zeros(len(k), self.n_latents).requires_grad_()
                decoded = self._decode(f, self._tried[:1].expand(len(k), -1))
                (gradient,) = torch.autograd.grad(decoded.gather(1, k[:, None]).sum(), f)
            columns.append(gradient.T)
        return torch.cat(columns, 1)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """A block after which the object, and the modules in it, have the attributes that they had before."""
        root = self.dictionary
        objects = list(root.modules()) if isinstance(root, nn.Module) else [root] if hasattr(root, "__dict__") else []
        saved = [(x, dict(vars(x))) for x in objects]
        for x in objects:
            if isinstance(x, nn.Module):
                x.training = False  # noise, and counts of how often latents are active
        try:
            yield
        finally:
            for x, attributes in saved:
                vars(x).clear()
                vars(x).update(attributes)


def tensors_of(dictionary: Any) -> dict[str, Tensor]:
    """The weights of a dictionary: parameters and buffers of a module, or the attributes of any other object.

    Args:
        dictionary: The object.

    Returns:
        Tensors by name.

    Example:
        >>> list(tensors_of(nn.Linear(1, 2)))
        ['weight', 'bias']
    """
    if isinstance(dictionary, nn.Module):
        return {**dict(dictionary.named_parameters()), **dict(dictionary.named_buffers())}
    attributes: Mapping[str, Any] = getattr(dictionary, "__dict__", {})
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


def _gradient(f: Tensor, leaf: Tensor) -> Tensor | None:
    """Gradient of the sum of latents; None if they do not depend on a leaf by anything that has a derivative."""
    if not f.requires_grad:
        return None
    return torch.autograd.grad(f.sum(), leaf, retain_graph=True, allow_unused=True)[0]


def _versions(dictionary: Any) -> list[tuple[int, int]]:
    """Identity of each of the weights, and how often it was changed."""
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors_of(dictionary).values()]


def takes(function: Any, count: int) -> bool:
    """Whether a function takes so many positional arguments.

    Args:
        function: The function.
        count: How many.

    Returns:
        The answer; False for functions without a signature.

    Example:
        >>> takes(torch.nn.Identity().forward, 1), takes(torch.nn.Identity().forward, 2)
        (True, False)
    """
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def check_dictionary(dictionary: Any, what: str) -> None:
    """Check that something has the methods of a dictionary.

    Args:
        dictionary: What the user gives.
        what: What it is for, with which the error begins.

    Raises:
        SettingTypeError: If it has not, or is a class.

    Example:
        >>> dictionary = nn.Module()
        >>> dictionary.encode, dictionary.decode = torch.relu, torch.neg
        >>> check_dictionary(dictionary, "A transcoder")
    """
    has_methods = all(callable(getattr(dictionary, method, None)) for method in ("encode", "decode"))
    if isinstance(dictionary, type) or not has_methods:
        kind = "be an object with" if isinstance(dictionary, type) else "have"
        raise SettingTypeError(
            f"{what} must {kind} methods encode(a) -> (..., r) and decode(f) -> (..., d); got "
            f"{shortened(repr(dictionary), 80)}."
        )


def _refuse_other_places(dictionary: Any, name: str) -> None:
    """Raise an error for an object that says that it writes to another place than it reads from."""
    config = getattr(dictionary, "cfg", None)
    architecture = getattr(config, "architecture", None)
    kind = architecture() if callable(architecture) else architecture
    other = getattr(config, "transcode", False) is True or (isinstance(kind, str) and "transcoder" in kind)
    if other or getattr(dictionary, "W_skip", None) is not None:
        raise SettingError(
            f"The dictionary of '{name}' is a transcoder: it reads one place and writes to another, so that no node "
            "layer has both. Join them in a NodeLayer with two taps, and write lib_lightning.dictionaries.Transcoder("
            "transcoder, read=..., write=...)."
        )
