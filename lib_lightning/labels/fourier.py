"""Short names for features: what each one responds to, found from its values and the model's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.metrics.functional.fourier import KINDS, fourier_variance

# Of what a and b carry together, the least that the weaker one of them must carry for both to be named.
_BOTH = 0.1


@dataclass(frozen=True)
class FeatureLabel:
    """What a feature of a model for modular addition mainly responds to.

    Attributes:
        frequency: ``k`` of its wave.
        kind: What the wave runs over: ``"a+b"``, ``"a"``, ``"b"``, or ``"a,b"`` for waves of both, side by side.
        explained: Share of its variance that the wave explains, between 0 and 1.

    Example:
        >>> str(FeatureLabel(17, "a+b", 0.931))
        'k=17 a+b 93%'
    """

    frequency: int
    kind: str
    explained: float

    def __str__(self) -> str:
        return f"k={self.frequency} {self.kind} {self.explained:.0%}"


@dataclass(frozen=True)
class FourierLabels:
    """Names features of a model for modular addition by the frequency that explains most of their variance.

    Args:
        modulus: ``p``; even ones are fine.
        first: Where ``a`` stands in the model's input tokens ``(n, length)``.
        second: Where ``b`` stands.
        threshold: Least share of the variance for a name.

    Raises:
        ValueError: If the modulus or the threshold is outside its range.

    Example:
        >>> tokens = torch.cartesian_prod(torch.arange(7), torch.arange(7))
        >>> feature = torch.sin(2 * torch.pi * 3 * tokens.sum(1) / 7).reshape(49, 1, 1)
        >>> FourierLabels(modulus=7)(feature, tokens)
        ['k=3 a+b 100%']
    """

    modulus: int
    first: int = 0
    second: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"modulus is an integer from 2 on; got {self.modulus}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a share of the variance, from 0 to 1; got {self.threshold}.")

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Name the features of one node layer, as a `Labeller`."""
        return [str(x) if x.explained > 0 and x.explained >= self.threshold else "" for x in self.of(features, inputs)]

    def of(self, features: Tensor, inputs: Tensor) -> list[FeatureLabel]:
        """Find the main wave of each feature, whatever it explains.

        Args:
            features: ``fhat``, shape ``(n, S, r)``.
            inputs: Tokens, shape ``(n, length)``.

        Returns:
            One for each feature.

        Raises:
            LIBError: If there are no such tokens.

        Note:
            ``a`` and ``b`` are named together only where the weaker one carries a tenth of what both do: with more
            waves to fit, the two always explain a little more than one.
        """
        length = inputs.shape[1] if inputs.ndim == 2 else 0
        if not all(-length <= place < length for place in (self.first, self.second)):
            raise LIBError(
                f"Inputs of shape {tuple(inputs.shape)} have no tokens {self.first} and {self.second}: frequencies are "
                "those of modular addition, whose inputs are (n, length). first= and second= say where a and b stand."
            )
        tokens = inputs.to(features.device)
        explained = fourier_variance(features, tokens[:, self.first], tokens[:, self.second], self.modulus)
        _, both, a, b = explained
        together = KINDS.index("a,b")
        explained[together] = torch.where(torch.minimum(a, b) >= _BOTH * both, both, 0.0)
        share, index = explained.flatten(0, 1).max(0)
        kind, k = index // (self.modulus // 2), index % (self.modulus // 2) + 1
        found = zip(k.tolist(), kind.tolist(), share.tolist(), strict=True)
        return [FeatureLabel(k, KINDS[i], share) for k, i, share in found]
