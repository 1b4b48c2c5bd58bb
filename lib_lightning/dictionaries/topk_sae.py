"""A top-k sparse autoencoder: activations as a few of many latents, with an encoder and a decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lib_lightning.errors import LIBError, MissingFileError, check_number

# Key of the description in the metadata of a file.
_HEADER = "lib_lightning_sae"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


class TopKSAE(nn.Module):
    """A sparse autoencoder that reconstructs activations from the ``k`` most active of its latents.

    ``f = TopK(ReLU((a - b_dec) W_enc + b_enc))`` and ``a_hat = f W_dec + b_dec``. It works on activations as they
    are: nothing is normalised in `encode` and undone in `decode`.

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, section 2.3.

    Args:
        W_enc: Encoder, shape ``(d, r)``.
        b_enc: Bias of the latents, shape ``(r,)``.
        W_dec: Decoder, whose rows are the directions of the latents, shape ``(r, d)``.
        b_dec: Reconstruction where no latent is active, shape ``(d,)``.
        k: Number of latents that are active at most, for each activation.

    Raises:
        LIBError: If the shapes do not fit together.
        SettingError: If ``k`` is not from 1 to ``r``.

    Example:
        >>> sae = TopKSAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), k=1)
        >>> f = sae.encode(torch.tensor([[3.0, -4.0, 2.0]]))
        >>> f, sae.decode(f)
        (tensor([[3., 0., 0.]]), tensor([[3., 0., 0.]]))
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__()
        d, r = W_enc.shape
        shapes = (tuple(b_enc.shape), tuple(W_dec.shape), tuple(b_dec.shape))
        if shapes != ((r,), (r, d), (d,)):
            raise LIBError(
                f"For W_enc of shape ({d}, {r}), b_enc, W_dec and b_dec have the shapes ({r},), ({r}, {d}) and "
                f"({d},); got {', '.join(map(str, shapes))}."
            )
        check_number("k", k, lambda k: 1 <= k <= r, f"is a number of latents from 1 to {r}", integer=True)
        self.k = int(k)
        # Constants for whoever uses it: what trains it has parameters of its own.
        for name, tensor in zip(_TENSORS, (W_enc, b_enc, W_dec, b_dec), strict=True):
            self.register_buffer(name, tensor.detach().clone())

    @property
    def n_latents(self) -> int:
        """Number of latents ``r``."""
        return len(self.b_enc)

    def encode(self, a: Tensor) -> Tensor:
        """Latents of activations.

        Args:
            a: Activations, shape ``(..., d)``.

        Returns:
            ``f``, shape ``(..., r)``, not negative and with at most ``k`` entries that are not zero. Differentiable,
            with the active latents held fixed.
        """
        W_enc, b_enc, b_dec = (t.to(self._dtype(a)) for t in (self.W_enc, self.b_enc, self.b_dec))
        return top_k((a.to(W_enc.dtype) - b_dec) @ W_enc + b_enc, self.k)

    def decode(self, f: Tensor) -> Tensor:
        """Activations that latents stand for.

        Args:
            f: Latents, shape ``(..., r)``.

        Returns:
            Their reconstruction, shape ``(..., d)``.
        """
        W_dec, b_dec = (t.to(self._dtype(f)) for t in (self.W_dec, self.b_dec))
        return f.to(W_dec.dtype) @ W_dec + b_dec

    def forward(self, a: Tensor) -> Tensor:
        """Reconstruct activations ``(..., d)``."""
        return self.decode(self.encode(a))

    def _dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, self.W_enc.dtype)

    def to_bytes(self, header: Mapping[str, Any] | None = None) -> bytes:
        """The content of a safetensors file that `load` reads.

        Args:
            header: Anything else to note, such as the node layer; values that JSON can represent.

        Returns:
            The bytes. The tensors have the names and shapes that SAELens gives them.
        """
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        return save(tensors, metadata={_HEADER: json.dumps({**(header or {}), "k": self.k})})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TopKSAE:
        """Read a file that `lib_lightning.SAETrainer` has written. No code in it is executed.

        Args:
            path: The file.

        Returns:
            The autoencoder, on the CPU.

        Raises:
            MissingFileError: If the file does not exist.
            LIBError: If it is damaged, or another kind of file.

        Example:
            >>> import tempfile
            >>> sae = TopKSAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), k=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Path(folder, "fc1.safetensors").write_bytes(sae.to_bytes())
            ...     TopKSAE.load(Path(folder, "fc1.safetensors")).k
            2
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"There is no file '{path}'.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                W_enc, b_enc, W_dec, b_dec = (file.get_tensor(name) for name in _TENSORS)
                return cls(W_enc, b_enc, W_dec, b_dec, header["k"])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise LIBError(f"'{path}' is not a sparse autoencoder that SAETrainer has written.") from error


def top_k(x: Tensor, k: int) -> Tensor:
    """The largest entries of each row, where they are positive, and zeros.

    Args:
        x: Any tensor ``(..., r)``.
        k: Number of entries to keep.

    Returns:
        The same shape; differentiable, with the kept entries held fixed.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, -2.0]), 2), top_k(torch.tensor([-1.0, 3.0, -2.0]), 2)
        (tensor([1., 3., 0.]), tensor([0., 3., 0.]))
    """
    values, index = x.topk(min(k, x.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(x).scatter(-1, index, values.relu())
