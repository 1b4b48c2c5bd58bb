"""Metrics of the modules of a graph: of one section, or of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.modules import (
    EdgeWeights,
    find_modules,
    largest_module,
    modularity,
    number_of_modules,
)


class _OfModules(GraphAverage):
    """A number of the modules that `find_modules` finds with these settings."""

    total_is = "whole"

    def __init__(
        self,
        weights: EdgeWeights = "strength",
        resolution: float = 1.0,
        seed: int = 0,
        rtol: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(weights, resolution, seed, rtol, **kwargs)
        self.weights: EdgeWeights = weights
        self.resolution, self.seed, self.rtol = resolution, seed, rtol

    def update(self, edges: Tensor | Sequence[Tensor], like: Tensor | Sequence[Tensor] | None = None) -> None:
        """Add the edges ``(r_out, r_in)`` of one section, or those of consecutive sections as one graph.

        With ``like``, other edges of the same shapes, the modules are those of these.
        """
        sections = [edges] if isinstance(edges, Tensor) else list(edges)
        searched = edges if like is None else like
        searched = [searched] if isinstance(searched, Tensor) else list(searched)
        modules = find_modules(searched, self.weights, self.resolution, self.seed, self.rtol)
        self._add(self._number(sections, modules))

    def _number(self, edges: list[Tensor], modules: list[Tensor]) -> Tensor:
        raise NotImplementedError


class Modularity(_OfModules):
    """Modularity of the graph's best partition; see `modularity`.

    Args:
        weights: What an edge weighs: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: More than 1 for more and smaller modules, less for fewer and larger ones.
        seed: Where the search for modules starts.
        rtol: For ``"binary"``: edges above this share of their section's strongest one count.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> Modularity()(torch.eye(4))
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def _number(self, edges: list[Tensor], modules: list[Tensor]) -> Tensor:
        return modularity(edges, modules, self.weights, self.resolution, rtol=self.rtol)


class NumberOfModules(_OfModules):
    """Number of modules of the graph; see `find_modules` and `number_of_modules`.

    Args:
        weights: What an edge weighs: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: More than 1 for more and smaller modules, less for fewer and larger ones.
        seed: Where the search for modules starts.
        rtol: For ``"binary"``: edges above this share of their section's strongest one count.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> NumberOfModules()([torch.eye(4), torch.eye(4)])
        tensor(4., dtype=torch.float64)
    """

    higher_is_better = None

    def _number(self, edges: list[Tensor], modules: list[Tensor]) -> Tensor:
        return number_of_modules(modules)


class LargestModule(_OfModules):
    """Share of the features that belong to the largest module; see `find_modules` and `largest_module`.

    Args:
        weights: What an edge weighs: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: More than 1 for more and smaller modules, less for fewer and larger ones.
        seed: Where the search for modules starts.
        rtol: For ``"binary"``: edges above this share of their section's strongest one count.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> LargestModule()(torch.eye(4))
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def _number(self, edges: list[Tensor], modules: list[Tensor]) -> Tensor:
        return largest_module(modules)
