"""Metrics of the modules of one section, or of a whole graph."""

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


class Partitions:
    """Modules of a graph and of each of its sections. Each search is run once, when it is first needed.

    Args:
        edges: ``E`` of consecutive sections, each of shape ``(r_out, r_in)``, non-negative.

    Example:
        >>> import torch
        >>> partitions = Partitions([torch.eye(2), torch.eye(2)])
        >>> partitions.find(), partitions.find(section=0)
        ([tensor([0, 1]), tensor([0, 1]), tensor([0, 1])], [tensor([0, 1]), tensor([0, 1])])
    """

    def __init__(self, edges: Sequence[Tensor]) -> None:
        self._edges = list(edges)
        self._found: dict[tuple[object, ...], list[Tensor]] = {}

    def find(
        self,
        section: int | None = None,
        weights: EdgeWeights = "strength",
        resolution: float = 1.0,
        seed: int = 0,
        rtol: float = 1e-3,
    ) -> list[Tensor]:
        """Modules of one section, or of the whole graph.

        Args:
            section: Index of the section; None for the whole graph.
            weights: As for `find_modules`.
            resolution: As for `find_modules`.
            seed: As for `find_modules`.
            rtol: As for `find_modules`.

        Returns:
            The module of each feature, for each node layer, as `find_modules` returns it.
        """
        key = section, weights, resolution, seed, rtol
        if key not in self._found:
            edges = self._edges if section is None else self._edges[section : section + 1]
            self._found[key] = find_modules(edges, weights, resolution, seed, rtol)
        return self._found[key]


class ModuleMetric(GraphAverage):
    """A metric of the modules that `find_modules` finds with the given settings."""

    aggregation = "joint"

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

    def partition(self, partitions: Partitions, section: int | None = None) -> list[Tensor]:
        """Modules of a section, or of the whole graph, with the settings of this metric."""
        return partitions.find(section, self.weights, self.resolution, self.seed, self.rtol)

    def update(self, edges: Tensor | Sequence[Tensor], modules: Sequence[Tensor] | None = None) -> None:
        """Add one section, or consecutive sections as one graph.

        Args:
            edges: ``E`` of the section, shape ``(r_out, r_in)``, or of each of several sections.
            modules: The module of each feature, for each node layer; None to search for them.
        """
        sections = [edges] if isinstance(edges, Tensor) else list(edges)
        modules = self.partition(Partitions(sections)) if modules is None else modules
        self._add(self._value(sections, modules))

    def _value(self, edges: Sequence[Tensor], modules: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class Modularity(ModuleMetric):
    """Modularity of the best partition found; see `modularity`.

    Args:
        weights: Weight of an edge: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: Larger than 1 for more and smaller modules, smaller for fewer and larger ones.
        seed: Seed of the search.
        rtol: For ``"binary"``: edges above this fraction of the strongest edge of their section have weight 1.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> Modularity()(torch.eye(4))
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def _value(self, edges: Sequence[Tensor], modules: Sequence[Tensor]) -> Tensor:
        return modularity(edges, modules, self.weights, self.resolution, rtol=self.rtol)


class NumberOfModules(ModuleMetric):
    """Number of modules; see `find_modules` and `number_of_modules`.

    Args:
        weights: Weight of an edge: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: Larger than 1 for more and smaller modules, smaller for fewer and larger ones.
        seed: Seed of the search.
        rtol: For ``"binary"``: edges above this fraction of the strongest edge of their section have weight 1.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> NumberOfModules()([torch.eye(4), torch.eye(4)])
        tensor(4., dtype=torch.float64)
    """

    higher_is_better = None

    def _value(self, edges: Sequence[Tensor], modules: Sequence[Tensor]) -> Tensor:
        return number_of_modules(modules)


class LargestModule(ModuleMetric):
    """Fraction of the features that belong to the largest module; see `find_modules` and `largest_module`.

    Args:
        weights: Weight of an edge: its ``"strength"``, its ``"amplitude"``, or ``"binary"``.
        resolution: Larger than 1 for more and smaller modules, smaller for fewer and larger ones.
        seed: Seed of the search.
        rtol: For ``"binary"``: edges above this fraction of the strongest edge of their section have weight 1.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> LargestModule()(torch.eye(4))
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def _value(self, edges: Sequence[Tensor], modules: Sequence[Tensor]) -> Tensor:
        return largest_module(modules)
