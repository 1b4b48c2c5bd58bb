"""Modules: groups of features that interact more with each other than with other features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.metrics.functional.leiden import leiden
from lib_lightning.model.precision import to_float64

EdgeWeights = Literal["strength", "amplitude", "binary"]


def find_modules(
    edges: Sequence[Tensor],
    weights: EdgeWeights = "strength",
    resolution: float = 1.0,
    seed: int = 0,
    rtol: float = 1e-3,
) -> list[Tensor]:
    """Find the modules of a layered graph: the partition of its features with the largest modularity.

    Each section is scaled to the same total weight. The strengths of different sections are effects on different node
    layers, in different units: without scaling, only the section with the largest numbers would matter.

    Args:
        edges: ``E`` of consecutive sections, each of shape ``(r_out, r_in)``, non-negative.
        weights: ``"strength"`` for the edges themselves; ``"amplitude"`` for their square roots, because ``E`` is a
            mean square; ``"binary"`` for 1 for strong edges and 0 for others.
        resolution: Larger than 1 for more and smaller modules, smaller for fewer and larger ones.
        seed: Seed of the search, which is deterministic.
        rtol: For ``"binary"``: edges above this fraction of the strongest edge of their section are strong.

    Returns:
        The module of each feature, for each node layer in order, shape ``(r,)``, int64. Modules are sorted by their
        number of features over all node layers, largest first; equally large ones by their first feature. Features
        without edges have -1.

    Raises:
        LIBError: If edges are negative or not finite, sections are not consecutive, or ``weights`` is unknown.

    Note:
        Source: Traag, Waltman and van Eck, arXiv 1810.08473, for the search; Newman (2004), arXiv
        cond-mat/0407503, for the modularity of weighted graphs.

    Example:
        >>> import torch
        >>> crossing = torch.tensor([[0.0, 9.0, 8.0], [5.0, 0.0, 0.0]])
        >>> find_modules([crossing, torch.eye(2)])
        [tensor([1, 0, 0]), tensor([0, 1]), tensor([0, 1])]
    """
    sizes, pairs, w = _layered_graph(edges, weights, rtol)
    parts = leiden(sum(sizes), pairs, w, resolution, seed)
    connected = torch.zeros(sum(sizes), dtype=torch.bool, device="cpu")
    connected[pairs.flatten()] = True
    labels = torch.where(connected, _by_size(parts, connected), -1)
    return [part.to(edges[0].device) for part in labels.split(sizes)]


def modularity(
    edges: Sequence[Tensor],
    modules: Sequence[Tensor] | None = None,
    weights: EdgeWeights = "strength",
    resolution: float = 1.0,
    seed: int = 0,
    rtol: float = 1e-3,
) -> Tensor:
    """Modularity of a partition: the fraction of the weight inside of modules, minus its expectation by chance.

    ``Q = sum_c (W_c / m - resolution (K_c / 2m)^2)`` with the weight ``W_c`` of the edges inside of module ``c``, the
    sum ``K_c`` of the degrees of its features, and the total weight ``m``. Sections are scaled as in `find_modules`.

    Args:
        edges: ``E`` of consecutive sections, each of shape ``(r_out, r_in)``, non-negative.
        modules: The module of each feature, for each node layer, shape ``(r,)``; -1 for a module of one feature. None
            for those of `find_modules`.
        weights: Weights of edges, as in `find_modules`.
        resolution: Factor of the expectation.
        seed: For `find_modules`.
        rtol: For ``weights="binary"``.

    Returns:
        A float64 scalar, at most 1; 0 if there are no edges.

    Raises:
        LIBError: If edges are negative or not finite, sections are not consecutive or do not fit the modules, or
            ``weights`` is unknown.

    Note:
        Source: Newman (2004), arXiv cond-mat/0407503, equation 5; resolution by Reichardt and Bornholdt (2006), arXiv
        cond-mat/0603718.

    Example:
        >>> import torch
        >>> modularity([torch.eye(2)]), modularity([torch.ones(2, 2)])
        (tensor(0.5000, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    sizes, weighed = _weighed(edges, weights, rtol)
    if modules is None:
        modules = find_modules(edges, weights, resolution, seed, rtol)
    if [len(part) for part in modules] != sizes:
        raise LIBError(
            f"Modules of {[len(part) for part in modules]} features do not fit node layers with {sizes} features."
        )
    labels = torch.cat([part.cpu() for part in modules])
    # Features without a module get modules of their own, with unused numbers.
    labels = torch.where(labels < 0, len(labels) + torch.arange(len(labels), device=labels.device), labels)
    labels = labels.unique(return_inverse=True)[1]
    K = torch.zeros(len(labels), dtype=torch.float64, device="cpu")
    parts = labels.split(sizes)
    inside = K.new_zeros(())
    for W, before, after in zip(weighed, parts, parts[1:], strict=False):
        K.index_add_(0, before, W.sum(0)).index_add_(0, after, W.sum(1))
        inside += W[after[:, None] == before].sum()
    m = K.sum() / 2
    if m <= 0:
        return inside
    expected: Tensor = (K / (2 * m)).square().sum()
    return inside / m - resolution * expected


def module_sizes(modules: Sequence[Tensor]) -> Tensor:
    """Number of features in each module, over all node layers.

    Args:
        modules: The module of each feature, for each node layer, shape ``(r,)``; -1 for none.

    Returns:
        The sizes, largest first, shape ``(number of modules,)``, int64.

    Example:
        >>> module_sizes([torch.tensor([1, 0, -1]), torch.tensor([0])])
        tensor([2, 1])
    """
    labels = torch.cat(list(modules)) if len(modules) else torch.zeros(0, dtype=torch.long, device="cpu")
    sizes: Tensor = labels[labels >= 0].unique(return_counts=True)[1]
    return sizes.sort(descending=True).values


def number_of_modules(modules: Sequence[Tensor]) -> Tensor:
    """Number of modules.

    Args:
        modules: The module of each feature, for each node layer, shape ``(r,)``; -1 for none.

    Returns:
        The number, a scalar of type int64.

    Example:
        >>> number_of_modules([torch.tensor([1, 0, -1]), torch.tensor([0])])
        tensor(2)
    """
    return torch.tensor(len(module_sizes(modules)), device="cpu")


def largest_module(modules: Sequence[Tensor]) -> Tensor:
    """Fraction of the features with a module that belong to the largest one.

    Args:
        modules: The module of each feature, for each node layer, shape ``(r,)``; -1 for none.

    Returns:
        A float64 scalar: 1 for a single module, 0 without modules.

    Example:
        >>> largest_module([torch.tensor([1, 0, -1]), torch.tensor([0, 0])])
        tensor(0.7500, dtype=torch.float64)
    """
    sizes = to_float64(module_sizes(modules))
    return sizes[0] / sizes.sum() if len(sizes) else sizes.new_zeros(())


def _weighed(edges: Sequence[Tensor], weights: str, rtol: float) -> tuple[list[int], list[Tensor]]:
    """Sizes of the node layers, and the weights of the edges, on the CPU, with a total of 1 for each section."""
    if weights not in get_args(EdgeWeights):
        raise LIBError(f"weights={weights!r} is unknown; choose one of {', '.join(get_args(EdgeWeights))}.")
    if not edges or any(before.shape[0] != after.shape[1] for before, after in itertools.pairwise(edges)):
        shapes = ", ".join(str(tuple(E.shape)) for E in edges)
        raise LIBError(f"Edges of shapes [{shapes}] are not consecutive sections (r_out, r_in) in forward order.")
    scaled = [_weigh(E.detach().cpu().double(), weights, rtol) for E in edges]
    return [edges[0].shape[1], *(E.shape[0] for E in edges)], [
        W / total if (total := W.sum()) > 0 else W for W in scaled
    ]


def _layered_graph(edges: Sequence[Tensor], weights: str, rtol: float) -> tuple[list[int], Tensor, Tensor]:
    """Sizes of the node layers, the two nodes of each edge, numbered over all layers, and its weight."""
    sizes, weighed = _weighed(edges, weights, rtol)
    pairs, all_w, first = [], [], 0
    for W, r_in in zip(weighed, sizes, strict=False):
        i, j = W.nonzero(as_tuple=True)
        pairs.append(torch.stack([first + j, first + r_in + i], dim=1))
        all_w.append(W[i, j])
        first += r_in
    return sizes, torch.cat(pairs), torch.cat(all_w)


def _weigh(E: Tensor, weights: str, rtol: float) -> Tensor:
    if not bool((E.isfinite() & (E >= 0)).all()):
        raise LIBError("Modules require edges that are finite and not negative.")
    if weights == "binary":
        return E.gt(rtol * E.amax()).double() if E.numel() else E
    # Scaled to a largest weight of 1, so that sums neither underflow nor overflow.
    E = E / E.amax() if E.numel() and E.amax() > 0 else E
    return E.sqrt() if weights == "amplitude" else E


def _by_size(parts: Tensor, connected: Tensor) -> Tensor:
    """Number parts by their number of connected nodes, largest first, then by their first node."""
    sizes: dict[int, int] = {}
    for part in parts[connected].tolist():
        sizes[part] = sizes.get(part, 0) + 1
    # Sorting is stable, and the dict is in order of first appearance.
    number = {part: k for k, part in enumerate(sorted(sizes, key=lambda part: -sizes[part]))}
    return torch.tensor([number.get(part, -1) for part in parts.tolist()], dtype=torch.long, device="cpu")
