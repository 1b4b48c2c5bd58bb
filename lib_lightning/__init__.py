"""Watch a network's features form while it trains, with the Local Interaction Basis (arXiv 2405.10928)."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lib_lightning._deprecated import MovedModules

if TYPE_CHECKING:
    from lib_lightning.algorithm.basis import Basis
    from lib_lightning.alignment.alignment import align_events
    from lib_lightning.api import compute_interaction_graph, estimate_cost, list_node_layers
    from lib_lightning.comparison.comparison import compare
    from lib_lightning.comparison.universal import universal_features
    from lib_lightning.controls import measure_controls
    from lib_lightning.graph import InteractionGraph
    from lib_lightning.model.node_layer import NodeLayer
    from lib_lightning.model.reinitialize import reinitialized
    from lib_lightning.training.callback import LIBCallback
    from lib_lightning.training.sae_trainer import SAETrainer
    from lib_lightning.training.trace import trace

__version__ = "0.2.0"

__all__ = [
    "Basis",
    "InteractionGraph",
    "LIBCallback",
    "NodeLayer",
    "SAETrainer",
    "__version__",
    "align_events",
    "compare",
    "compute_interaction_graph",
    "estimate_cost",
    "list_node_layers",
    "measure_controls",
    "reinitialized",
    "trace",
    "universal_features",
]

# Imported when first used, because torch and Lightning take seconds: computing a graph needs no Lightning, and the tab
# in TensorBoard, which only reads files, needs neither.
_WHERE = {
    "Basis": "algorithm.basis",
    "InteractionGraph": "graph",
    "LIBCallback": "training.callback",
    "NodeLayer": "model.node_layer",
    "SAETrainer": "training.sae_trainer",
    "align_events": "alignment.alignment",
    "compare": "comparison.comparison",
    "compute_interaction_graph": "api",
    "estimate_cost": "api",
    "list_node_layers": "api",
    "measure_controls": "controls",
    "reinitialized": "model.reinitialize",
    "trace": "training.trace",
    "universal_features": "comparison.universal",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lib_lightning.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
    sys.meta_path.append(MovedModules())
