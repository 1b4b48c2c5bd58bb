"""Watch a network's features form while it trains: the Local Interaction Basis (arXiv 2405.10928) of a live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib_lightning.compute import compute_interaction_graph
from lib_lightning.core.basis import Basis
from lib_lightning.core.layers import NodeLayer
from lib_lightning.graph import InteractionGraph
from lib_lightning.questions import list_node_layers
from lib_lightning.version import __version__

if TYPE_CHECKING:
    from lib_lightning.callback import LIBCallback

__all__ = [
    "Basis",
    "InteractionGraph",
    "LIBCallback",
    "NodeLayer",
    "__version__",
    "compute_interaction_graph",
    "list_node_layers",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; whoever only computes a graph need not wait for it.
    if name == "LIBCallback":
        from lib_lightning.callback import LIBCallback

        return LIBCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
