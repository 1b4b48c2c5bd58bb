"""Labels of features of models for modular addition: the frequency that each one responds to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.errors import LIBError, SettingError
from lib_lightning.metrics.functional.fourier import KINDS, fourier_variance

# Smallest fraction of the variance explained by a and b that the weaker of them must explain for a label with both.
_BOTH = 0.1


@dataclass(frozen=True)
class FeatureLabel:
    """The wave that explains most of the variance of a feature of a model for modular addition.

    Attributes:
        frequency: Its frequency ``k``.
        kind: Its argument: ``"a+b"``, ``"a"``, ``"b"``, or ``"a,b"`` for the sum of a wave in ``a`` and one in ``b``.
        explained: Fraction of the variance that it explains, between 0 and 1.

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
    """Labels features of a model for modular addition with the frequency that explains most of their variance.

    Args:
        modulus: ``p``, odd or even.
        first: Position of ``a`` in the model's input tokens ``(n, length)``.
        second: Position of ``b``.
        threshold: Smallest explained fraction of the variance for a label.

    Raises:
        SettingError: If the modulus or the threshold is outside its range.

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
            raise SettingError(f"modulus must be at least 2; got {self.modulus}.")
        if not 0 <= self.threshold <= 1:
            raise SettingError(f"threshold must be between 0 and 1; got {self.threshold}.")

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Label the features of one node layer, as a `Labeller`."""
        return [str(x) if x.explained > 0 and x.explained >= self.threshold else "" for x in self.of(features, inputs)]

    def of(self, features: Tensor, inputs: Tensor) -> list[FeatureLabel]:
        """Find the wave that explains most of the variance of each feature, without a threshold.

        Args:
            features: ``fhat``, shape ``(n, S, r)``.
            inputs: Tokens, shape ``(n, length)``.

        Returns:
            One for each feature.

        Raises:
            LIBError: If the inputs have no such tokens.

        Note:
            The kind ``"a,b"`` requires that the weaker of the two explains a tenth of what both explain: with twice as
            many parameters, the sum always explains a little more than a single wave.
        """
        length = inputs.shape[1] if inputs.ndim == 2 else 0
        if not all(-length <= place < length for place in (self.first, self.second)):
            raise LIBError(
                f"Inputs of shape {tuple(inputs.shape)} have no tokens {self.first} and {self.second}: for "
                "modular addition, inputs have shape (n, length); set first= and second= to the positions of a and b."
            )
        tokens = inputs.to(features.device)
        explained = fourier_variance(features, tokens[:, self.first], tokens[:, self.second], self.modulus)
        _, both, a, b = explained
        explained[KINDS.index("a,b")] = torch.where(torch.minimum(a, b) >= _BOTH * both, both, 0.0)
        share, index = explained.flatten(0, 1).max(0)
        kind, k = index // (self.modulus // 2), index % (self.modulus // 2) + 1
        found = zip(k.tolist(), kind.tolist(), share.tolist(), strict=True)
        return [FeatureLabel(k, KINDS[i], share) for k, i, share in found]
