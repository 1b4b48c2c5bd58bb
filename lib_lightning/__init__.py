"""Watch a network's features form while it trains: the Local Interaction Basis (arXiv 2405.10928) of a live model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lib_lightning.version import __version__

if TYPE_CHECKING:
    from lib_lightning.algorithm.basis import Basis
    from lib_lightning.api import compute_interaction_graph, list_node_layers
    from lib_lightning.graph import InteractionGraph
    from lib_lightning.model.node_layer import NodeLayer
    from lib_lightning.training.callback import LIBCallback

__all__ = [
    "Basis",
    "InteractionGraph",
    "LIBCallback",
    "NodeLayer",
    "__version__",
    "compute_interaction_graph",
    "list_node_layers",
]

# Torch and Lightning take seconds to import: who only computes a graph need not wait for Lightning, and TensorBoard,
# which only reads files, for neither.
_WHERE = {
    "Basis": "algorithm.basis",
    "InteractionGraph": "graph",
    "LIBCallback": "training.callback",
    "NodeLayer": "model.node_layer",
    "compute_interaction_graph": "api",
    "list_node_layers": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lib_lightning.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
