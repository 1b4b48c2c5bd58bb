"""Whether models have the weights that their graphs were computed with."""

from __future__ import annotations

import logging

from torch import nn

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import WEIGHTS_HASH
from lib_lightning.model.module_paths import unwrapped
from lib_lightning.model.weights_hash import weights_hash

log = logging.getLogger(__name__)
_WHICH = ("first", "second")


def check_weights(graphs: tuple[InteractionGraph, InteractionGraph], models: tuple[nn.Module, nn.Module]) -> None:
    """Refuse models that are given in the wrong order, and warn of one that has other weights than its graph.

    Graphs say which weights they were computed with; those of earlier versions do not, and are not looked at.

    Args:
        graphs: The graphs of both networks.
        models: Their models.

    Raises:
        LIBError: If neither model has the weights of its own graph, and one has those of the other.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> models, batches = (nn.Linear(4, 2), nn.Linear(4, 2)), [torch.randn(99, 4)]
        >>> graphs = tuple(compute_interaction_graph(model, batches, ["input", "output"]) for model in models)
        >>> check_weights(graphs, models)
        >>> check_weights(graphs, models[::-1])
        Traceback (most recent call last):
        lib_lightning.errors.LIBError: The models are swapped: ...
    """
    wanted = [graph.info.get(WEIGHTS_HASH) for graph in graphs]
    if wanted == [None, None]:
        return
    found = [weights_hash(unwrapped(model)) for model in models]
    fits = [have == want for have, want in zip(found, wanted, strict=True)]
    of_other = [want is not None and have == want for have, want in zip(found, reversed(wanted), strict=True)]
    if any(of_other) and not any(fits):
        k = of_other.index(True)
        raise LIBError(
            f"The models are swapped: the {_WHICH[k]} model has the weights of the {_WHICH[1 - k]} graph. Give them in "
            "the order of the graphs: compare(graph_a, graph_b, model_a, model_b, batches)."
        )
    for which, want, fit in zip(_WHICH, wanted, fits, strict=True):
        if want is not None and not fit:
            log.warning(
                "The %s model has other weights than its graph was computed with: it has been trained on, has another "
                "dtype, or is another model. Its features are evaluated with the weights that it has now. To compare "
                "what the graph describes, load its weights, or compute the graph again.", which,
            )  # fmt: skip
