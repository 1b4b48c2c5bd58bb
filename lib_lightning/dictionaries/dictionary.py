"""What a dictionary is: anything with an encoder and a decoder."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Dictionary(Protocol):
    """An object that expresses activations as latents, and latents as activations: a sparse autoencoder, for example.

    Objects of SAELens and of EleutherAI's sparsify are such objects, and so are many plain modules, and a `Basis`.

    Note:
        `lib_lightning.dictionaries.AdaptedDictionary` says which forms of the two methods are understood.

    Example:
        >>> from lib_lightning.algorithm.basis import Basis
        >>> issubclass(Basis, Dictionary), isinstance("not one", Dictionary)
        (True, False)
    """

    def encode(self, a: Any) -> Any:
        """Latents ``(..., r)`` of activations ``(..., d)``; an inactive latent is 0."""
        ...

    def decode(self, f: Any) -> Any:
        """Activations ``(..., d)`` from latents ``(..., r)``."""
        ...
