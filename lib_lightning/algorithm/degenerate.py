"""What to say about node layers without features: constant activations, or activations without effect."""

from __future__ import annotations

from collections.abc import Sequence

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.covariance import RunningCovariance
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.errors import quoted


def is_constant(moments: Sequence[RunningCovariance]) -> bool:
    """Whether no node layer varies: the graph then has no features and no edges."""
    return not any(layer.varies for layer in moments)


def describe_empty_layers(
    bases: Sequence[Basis], moments: Sequence[RunningCovariance], skips_positions: bool = False
) -> list[str]:
    """Explain why node layers have no features, or only features without importance.

    Args:
        bases: The basis of each node layer.
        moments: The moments of each, combined over all processes.
        skips_positions: Whether positions are left out.

    Returns:
        One sentence for each reason; none for an ordinary graph.
    """
    layers = list(zip((basis.name for basis in bases), bases, moments, strict=True))
    constant = [name for name, _, m in layers if not m.varies]
    zero = [name for name, _, m in layers if not m.varies and not m.mean.any()]
    unused = [name for name, basis, m in layers if m.varies and not basis.n_features]
    n, count = moments[0].n, moments[0].count
    silent = [basis.name for basis in bases if isinstance(basis, DictionaryBasis) and not len(basis.latents)]
    sentences = []
    if constant and count == 1:
        sentences.append(
            f"There is one sample, so activations at {quoted(constant)} do not vary, and no feature there has any "
            "importance: give at least two samples, and better some hundreds."
        )
    elif constant:
        zeros = f" (zero at {quoted(zero)})" if zero else ""
        cause = (
            "Are the samples in the batches all the same?"
            if len(constant) == len(layers)
            else "Are units dead, or the weights before them zero?"
        )
        sentences.append(
            f"Activations at {quoted(constant)} are the same for all {n:,} samples{zeros}, so no feature there has any "
            f"importance. {cause}"
        )
    if silent:
        sentences.append(
            f"No latent of the dictionary of {quoted(silent)} is active in the samples: the activations there are all "
            "error, and a LIB in front of it has no features. Is it the dictionary of this node layer, and trained?"
        )
    elif unused:
        bypassed = ", or does all of the effect go through positions that skip_positions leaves out" * skips_positions
        sentences.append(
            f"{quoted(unused)}: activations vary, but the next node layer does not depend on them at these weights, so "
            f"there are no features. Are the weights after them zero, or units dead{bypassed}?"
        )
    return sentences
