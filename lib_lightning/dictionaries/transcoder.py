"""Dictionaries that read one part of a node layer and write another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.dictionaries.adapted import check_dictionary, takes, tensors_of
from lib_lightning.errors import SettingError


class Transcoder(nn.Module):
    """A transcoder as a dictionary of a node layer that joins the place which it reads and the one which it writes.

    The node layer has both as taps, ``NodeLayer(taps=["blocks.3.ln_2", "blocks.3.mlp"])`` for a transcoder of an MLP,
    and further ones where these two do not cut the computation, such as the residual stream that passes by. Activations
    that it does not write are left to the error node.

    Args:
        transcoder: An object with ``encode`` and ``decode``.
        read: Which of the activations of the node layer it reads.
        write: Which of them it writes.
        before: What is done with the activations that it reads, such as the normalisation between them and what it was
            trained on; None for nothing.
        width: Number of activations of the node layer; None if the last of them is read or written.

    Raises:
        SettingTypeError: If the object has no ``encode`` or ``decode``.
        SettingError: If a slice has steps other than 1, or open ends that would depend on the width.

    Example:
        >>> class Halves(nn.Module):
        ...     def encode(self, x): return torch.relu(x)
        ...     def decode(self, f): return 2 * f
        >>> transcoder = Transcoder(Halves(), read=slice(0, 2), write=slice(2, 4))
        >>> f = transcoder.encode(torch.tensor([[1.0, -1.0, 5.0, 6.0]]))
        >>> f, transcoder.decode(f)
        (tensor([[1., 0.]]), tensor([[0., 0., 2., 0.]]))
    """

    def __init__(
        self,
        transcoder: Any,
        read: slice,
        write: slice,
        before: Callable[[Tensor], Tensor] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        check_dictionary(transcoder, "A transcoder")
        for name, part in (("read", read), ("write", write)):
            if not isinstance(part, slice) or part.start is None or part.stop is None or part.step not in (None, 1):
                raise SettingError(f"{name} must be a slice of the activations such as slice(0, 768); got {part!r}.")
        self.transcoder, self.before, self.read, self.write = transcoder, before, read, write
        # Anything but a module has weights that this one would not have.
        self._tensors = {} if isinstance(transcoder, nn.Module) else tensors_of(transcoder)
        for name, t in self._tensors.items():
            self.register_buffer(name, t, persistent=True)
        self.width = width or max(read.stop, write.stop)

    def encode(self, a: Tensor) -> Any:
        """What the transcoder returns for the activations that it reads.

        Args:
            a: Activations of the node layer, shape ``(m, d)``.

        Returns:
            Its latents, in its own form.
        """
        x = a[..., self.read]
        return self.transcoder.encode(x if self.before is None else self.before(x))

    def decode(self, f: Any, *more: Any) -> Tensor:
        """The activations that it writes, and 0 everywhere else.

        Args:
            f: Its latents, in its own form.
            more: What its decoder takes beside them.

        Returns:
            Activations of the node layer, shape ``(m, d)``.
        """
        decode = self.transcoder.decode
        written = decode(f, *more) if takes(decode, 1 + len(more)) else decode(f)
        before = written.new_zeros(*written.shape[:-1], self.write.start)
        after = written.new_zeros(*written.shape[:-1], self.width - self.write.stop)
        return torch.cat([before, written, after], -1)
