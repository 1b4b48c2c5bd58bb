"""Names of version 0.1 keep working, with a DeprecationWarning that gives the new one."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lib_lightning
from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning._deprecated import MODULES, NAMES
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.lineage import match_features
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.training.cli import main

DEPRECATED = "{} is deprecated and will be removed in the next version: use {}."
# All that `__all__` and the README of version 0.1 named.
PUBLIC = {
    "lib_lightning": "Basis InteractionGraph LIBCallback NodeLayer __version__ compute_interaction_graph "
    "list_node_layers",
    "lib_lightning.ablation": "AblationPlan EdgesRequired accuracy edge_ablation_curve edges_required log_likelihood "
    "node_ablation_curve",
    "lib_lightning.labels": "FourierLabels label_features",
    "lib_lightning.lineage": "EmergenceDetector Event FeatureTracker Match Retraced match_features retrace",
    "lib_lightning.metrics": "EdgesRequired EffectiveEdges EffectiveFeatures Gini GraphAverage Hoyer LargestModule "
    "Modularity NumberOfEdges NumberOfFeatures NumberOfModules ParticipationRatio ShareOfEdges check_metrics "
    "default_metrics edges_required effective_edges effective_features find_modules fourier_variance gini "
    "graph_scalars hoyer largest_module modularity module_sizes number_of_edges number_of_features number_of_modules "
    "participation_ratio perplexity share_of_edges standard_error",
    "lib_lightning.metrics.functional": "edges_required effective_edges effective_features find_modules "
    "fourier_variance gini hoyer largest_module modularity module_sizes number_of_edges number_of_features "
    "number_of_modules participation_ratio perplexity share_of_edges standard_error",
    "lib_lightning.profiling": "profile_snapshot",
    "lib_lightning.view": "Run",
    # Not in the README, but in its recipes or likely to be used beside it.
    "lib_lightning.ablation.scores": "accuracy",
    "lib_lightning.callback": "LIBCallback",
    "lib_lightning.compute": "compute_interaction_graph",
    "lib_lightning.core.basis": "Basis",
    "lib_lightning.core.errors": "LIBError NodeLayerError",
    "lib_lightning.core.layers": "NodeLayer",
    "lib_lightning.display.curves": "draw_ablation_curves",
    "lib_lightning.display.film": "Film",
    "lib_lightning.display.graph": "draw_graph",
    "lib_lightning.display.image": "render_png",
    "lib_lightning.display.over_time": "Curve Panel draw_over_time",
    "lib_lightning.display.spectrum": "draw_spectrum",
    "lib_lightning.display.timeline": "draw_timeline",
    "lib_lightning.processes": "Processes",
    "lib_lightning.questions": "list_node_layers",
    "lib_lightning.schedule": "Schedule",
    "lib_lightning.values": "feature_values probe_features",
    "lib_lightning.version": "__version__",
}


@contextlib.contextmanager
def deprecations() -> Iterator[list[warnings.WarningMessage]]:
    """Record the deprecations of a block, of which there has to be at least one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert any(issubclass(warning.category, DeprecationWarning) for warning in caught)


def said(caught: list[warnings.WarningMessage]) -> set[str]:
    return {str(warning.message) for warning in caught}


@pytest.fixture(autouse=True)
def forget_moved_modules() -> None:
    """Let every test import the old modules again: only the first import warns."""
    for module in MODULES:
        sys.modules.pop(f"lib_lightning.{module}", None)


@pytest.mark.filterwarnings("ignore:lib_lightning:DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in PUBLIC.items() for name in names.split()])
def test_every_old_name_is_found(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("module", [module for module, new in MODULES.items() if new])
def test_old_modules_name_the_new_ones(module: str) -> None:
    new = importlib.import_module(f"lib_lightning.{MODULES[module]}")
    with deprecations() as caught:
        old = importlib.import_module(f"lib_lightning.{module}")
    assert DEPRECATED.format(f"lib_lightning.{module}", new.__name__) in said(caught)
    for name in (name for name, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__):
        assert getattr(old, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


@pytest.mark.parametrize("name", NAMES)
def test_old_names_name_the_new_ones(name: str) -> None:
    module, _, attribute = f"lib_lightning.{name}".rpartition(".")
    new_module, _, new = f"lib_lightning.{NAMES[name]}".rpartition(".")
    with deprecations() as caught:
        value = getattr(importlib.import_module(module), attribute)
    assert DEPRECATED.format(f"lib_lightning.{name}", f"{new_module}.{new}") in said(caught)
    assert value is getattr(importlib.import_module(new_module), new)


def test_warnings_point_at_the_import() -> None:
    for statement in ("from lib_lightning.view import Run", "from lib_lightning.lineage import Retraced"):
        with deprecations() as caught:
            exec(compile(statement, "user.py", "exec"), {})
        assert {warning.filename for warning in caught} == {"user.py"}


def test_unknown_modules_are_not_found() -> None:
    for module in ("lib_lightning.vieww", "lib_lightning.core.nothing", "lib_lightning.labels.nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}'"):
            importlib.import_module(module)


def test_a_saved_config_with_an_old_path_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    callback = "{class_path: lib_lightning.callback.LIBCallback, init_args: {num_samples: 77}}"
    options = ["--model", "tests.tiny_training.Classifier", "--trainer.callbacks", callback]
    with deprecations() as caught, pytest.raises(SystemExit):
        main(["fit", *options, "--print_config"])
    assert DEPRECATED.format("lib_lightning.callback", "lib_lightning.training.callback") in said(caught)
    assert "num_samples: 77" in capsys.readouterr().out


def test_arguments_keep_their_old_names() -> None:
    model, batches, layers = nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"]
    graph = compute_interaction_graph(model, batches, layers)
    cases: list[tuple[str, str, Any]] = [
        (
            "together",
            "process_group",
            lambda: compute_interaction_graph(model, batches, layers, together=SINGLE_PROCESS),
        ),
        ("film", "layout", lambda: graph.plot(film=AnimatedLayout())),
        (
            "like",
            "modules_from",
            lambda: lib_lightning.metrics.graph_scalars([*graph.bases.values()], [*graph.edges.values()], like=None),
        ),
    ]
    for old, new, call in cases:
        with deprecations() as caught:
            assert call() is not None
        (message,) = said(caught)
        assert f"({old}=...) is deprecated" in message
        assert f"({new}=...)" in message


def test_fields_keep_their_old_names() -> None:
    graph = compute_interaction_graph(nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
    basis, values = graph.bases["input"], {"input": torch.zeros(9, 3)}
    match = match_features(torch.randn(20, 3), torch.randn(20, 2))
    with deprecations() as caught:
        assert basis.unsure is basis.degenerate
        assert match.heirs is match.merged_into
        assert replace(basis, unsure=basis.degenerate).degenerate is basis.degenerate
        assert InteractionGraph(graph.bases, graph.edges, probes=values).reference_features is values
        graph.probes = values
        assert graph.probes is values is graph.reference_features
    assert {warning.filename for warning in caught if "Basis(" not in str(warning.message)} == {__file__}
    names = [
        "Basis.unsure",
        "Basis(unsure=...)",
        "Match.heirs",
        "InteractionGraph(probes=...)",
        "InteractionGraph.probes",
    ]
    for name in names:
        assert any(message.startswith(f"{name} is deprecated") for message in said(caught))


def test_nothing_is_imported_for_old_names() -> None:
    code = "import sys, lib_lightning; print(*{'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
