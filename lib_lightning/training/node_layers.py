"""The node layers of a run: given, or proposed from the first batch seen; held to account before training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.api import check_node_layers, propose_node_layers
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.distributed.torch_group import broadcast_text
from lib_lightning.errors import LIBError, is_out_of_memory
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.module_paths import check_taps
from lib_lightning.model.node_layer import NodeLayer, as_node_layers
from lib_lightning.model.validate import is_model_error, wrap_forward_errors
from lib_lightning.training.trainer import isolated_forward

log = logging.getLogger(__name__)


class NodeLayerResolver:
    """Node layers of one run.

    Args:
        given: As a user gives them; None for a proposal.
        name: What to call the callback in messages.
        spec: How to call the model on a batch.
        chosen: Called with their names whenever they become known or change.

    Attributes:
        layers: The node layers; None as long as they are not known.

    Raises:
        LIBError: If they are a list of less than two.
    """

    def __init__(
        self,
        given: Sequence[str | NodeLayer] | None,
        name: str,
        spec: ModelSpec,
        chosen: Callable[[list[str]], None],
    ) -> None:
        self._given = None if given is None else as_node_layers(given)
        self._name, self._spec, self._chosen = name, spec, chosen
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._checked = False
        self._choose(self._given)

    @property
    def names(self) -> list[str]:
        """Names of the node layers; none as long as they are not known."""
        return [layer.name for layer in self.layers or []]

    def _choose(self, layers: list[NodeLayer] | None) -> None:
        self.layers = layers
        self._chosen(self.names)

    def check_names(self, pl_module: pl.LightningModule) -> None:
        """Refuse names that the model does not have."""
        check_taps(pl_module, self.layers or [])

    def check(self, pl_module: pl.LightningModule, batch: Any, strict: bool = True) -> None:
        """Hold the node layers to account on a first batch, or propose some.

        Args:
            pl_module: The model.
            batch: A batch.
            strict: Whether it is one of those that snapshots are computed on; any other may look different.

        Raises:
            LIBError: If they do not cut the model.
        """
        if self._checked or is_empty(batch):
            return
        try:
            with (
                isolated_forward(pl_module.trainer, pl_module, self._spec.dtype),
                wrap_forward_errors(pl_module, self._spec),
            ):
                spec = self._spec
                layers = self.layers or as_node_layers(propose_node_layers(pl_module, batch, spec.input_fn, spec.mask))
                check_node_layers(pl_module, batch, layers, spec.dtype, spec.input_fn, spec.mask)
        except LIBError as error:
            if is_out_of_memory(error.__cause__ or error):
                log.warning("'%s' has too little memory to look at its node layers: %s", self._name, error)
            # A training batch may look different; the first validation will tell.
            elif strict or is_model_error(error, batch):
                raise
            return
        self._checked = True
        if self.layers is None:
            self._choose(layers)
            rank_zero_info(f"{self._name}: no node_layers given; took {self.names}")

    def instrument(self, pl_module: pl.LightningModule, process_group: ProcessGroup) -> InstrumentedModel:
        """The model, cut at the node layers that all processes agree on.

        Raises:
            LIBError: If there are none, and no process has seen a batch that they could be proposed from.
        """
        if self._given is None:
            # A process that has seen no batch has no proposal of its own.
            own = json.dumps(self.names) if self.layers else ""
            if not (agreed := broadcast_text(process_group, own)):
                raise LIBError("No batch has been seen that node layers could be proposed from.")
            if own != agreed:
                self._choose(as_node_layers(json.loads(agreed)))
        return InstrumentedModel(pl_module, self.layers or [], self._spec)

    def state_dict(self) -> list[str] | None:
        """Names of node layers that were proposed, for a resumed run."""
        return self.names if self._given is None and self.layers is not None else None

    def load_state_dict(self, proposed: list[str] | None) -> None:
        """Go on with those of the interrupted run."""
        if self._given is None and proposed:
            self._choose(as_node_layers(proposed))
