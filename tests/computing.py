"""Computing graphs of small models in different ways, and comparing them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.shortcuts import FAST, PLAIN, Shortcuts
from lib_lightning.jacobian.closed_form_detect import NoClosedForms
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.cases import Case
from tests.reference import activations

IO = ["input", "output"]
WITHOUT_CLOSED_FORMS = replace(FAST, closed_forms=NoClosedForms)
KEEP_ALL = MemoryPlan(keep_graphs=True, product_bytes=2**20)


def built(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Sequence[str | NodeLayer],
    spec: ModelSpec | None = None,
    plan: MemoryPlan = KEEP_ALL,
    shortcuts: Shortcuts = FAST,
    plain: bool = False,
    output: OutputDistribution | None = None,
    **options: Any,
) -> BuildResult:
    """Bases and edges of a model; options are those of `LIBConfig`."""
    instrumented = InstrumentedModel(model, as_node_layers(layers), spec or ModelSpec())
    config = LIBConfig(**{"rtol": 1e-11, **options})
    with model_session(instrumented):
        return build_graph(instrumented, batches, config, plan, shortcuts=PLAIN if plain else shortcuts, output=output)


def built_of(case: Case, sizes: tuple[int, ...] = (7, 2, 11), **options: Any) -> BuildResult:
    """Bases and edges of a case, with its data in batches of some sizes."""
    spec = ModelSpec(case.input_fn, case.mask)
    return built(case.model, case.batches(*sizes), case.node_layers, spec, **options)


@functools.cache
def activations_of(case: Case) -> list[Tensor]:
    """Activations ``(n, S, d)`` of every node layer of a case."""
    with torch.no_grad():
        return activations(case.first(case.data), case.sections)


def assert_equal(one: BuildResult, other: BuildResult, rtol: float = 1e-8) -> None:
    """Compare everything in two results, except for signs and rotations of features."""

    def numbers(result: BuildResult) -> list[Tensor]:
        importances = [b.importance for b in result.bases]
        importances += [b.output_importance for b in result.bases if b.output_importance is not None]
        found = [*importances, *result.edges, *result.attributions]
        return [*found, *result.importance_replicates, *result.edge_replicates, *result.attribution_replicates]

    # A replicate may be only rounding error (the variance of one sample): relative to the numbers that it replicates.
    replicated = [*(b.importance for b in other.bases), *other.edges, *other.attributions]
    scales = [*numbers(other)[: -len(replicated)], *replicated]
    for a, b, scale in zip(numbers(one), numbers(other), scales, strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= rtol * max(b.abs().max(), scale.abs().max())
    for x, y in zip(one.bases, other.bases, strict=True):
        for a, b in (
            (x.to_features @ x.to_features.T, y.to_features @ y.to_features.T),
            (x.to_features @ x.from_features, y.to_features @ y.from_features),
        ):
            assert (a - b).norm() <= rtol * b.norm().clamp(min=1e-12)


def assert_same_without_closed_forms(
    model: nn.Module, batches: Sequence[Any], layers: Sequence[str | NodeLayer], **options: Any
) -> None:
    """Compare with automatic differentiation, with all batches run again for each phase."""
    general = built(model, batches, layers, plan=MemoryPlan(), shortcuts=WITHOUT_CLOSED_FORMS, **options)
    assert_equal(built(model, batches, layers, **options), general)
