"""The node layers of a run: given by the user, or proposed from the first batch; checked before training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lib_lightning.ablation.scored_model import Score, sample_scores
from lib_lightning.algorithm.dictionary_layers import check_dictionaries, try_dictionaries
from lib_lightning.api import notes_on, proposed_cuts
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.distributed.torch_group import broadcast_text
from lib_lightning.errors import LIBError, SettingError, SettingTypeError, brief, is_out_of_memory
from lib_lightning.model.batch import is_empty
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.exchange import first_samples
from lib_lightning.model.forward_errors import wrap_forward_errors
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.module_paths import check_taps
from lib_lightning.model.node_layer import NodeLayer, as_node_layers
from lib_lightning.model.propose import sizes
from lib_lightning.model.steps import can_be_called
from lib_lightning.model.validate import NOT_LOOKED, is_model_error
from lib_lightning.training.frameworks import rank_zero_info

log = logging.getLogger(__name__)

# Batches from which samples that differ are looked for before the first snapshot.
_MAX_BATCHES = 8


class NodeLayerResolver:
    """Finds the node layers of one run, and the model cut at them.

    Args:
        given: The node layers; None to propose some.
        proposed: Names of the ones proposed earlier, in a resumed run; empty for none.
        name: Name of the callback, for messages.
        spec: How to call the model on a batch.
        on_change: Called with the names of the node layers whenever they become known or change.
        on_call: Called with how the model is called, in plain values, when that becomes known.
        precision: Returns a block in which the model is run.

    Attributes:
        layers: The node layers; None as long as they are not known.
    """

    def __init__(
        self,
        given: Sequence[NodeLayer] | None,
        proposed: Sequence[str],
        name: str,
        spec: ModelSpec,
        on_change: Callable[[list[str]], None],
        on_call: Callable[[dict[str, Any]], None],
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._is_given, self._name, self._spec, self._on_change = given is not None, name, spec, on_change
        self._on_call, self.precision = on_call, precision
        self._is_checked = False
        self._notes: list[str] = []
        # First samples of the batches that the check could not look at, because they are all the same.
        self._batches: list[Any] = []
        self.layers: list[NodeLayer] | None = None
        if given is not None:
            self._set(list(given))
        elif proposed:
            self._set(as_node_layers(proposed))

    @property
    def names(self) -> list[str]:
        """Names of the node layers; none as long as they are not known."""
        return [layer.name for layer in self.layers or []]

    def _set(self, layers: list[NodeLayer]) -> None:
        self.layers = layers
        self._on_change(self.names)

    def check_names(self, model: nn.Module) -> None:
        """Refuse names that the model does not have."""
        check_taps(model, self.layers or [], can_be_called(model, self._spec.input_fn))

    def check(self, model: nn.Module, batch: Any, strict: bool = True) -> BatchLayout:
        """Find how the model is called on a first batch, and check the node layers, or propose some.

        Args:
            model: The model.
            batch: A batch.
            strict: Whether it is one of the batches that snapshots are computed on; others may be of another form.

        Returns:
            Which parts of the batch have one entry for each sample.

        Raises:
            LIBError: If the model cannot be called, or the node layers do not cut it.
        """
        try:
            if is_empty(batch) or not self._is_needed(batch):
                return self._layout
        except Exception:  # a batch of a strange class
            if strict:
                raise
            return self._layout
        instrumented = InstrumentedModel(model, [], replace(self._spec, dtype=None))
        batches = [*self._batches, batch]
        try:
            with (
                self.precision(),
                wrap_forward_errors(model, instrumented.spec),
            ):
                instrumented.layout(batch)
                spec = replace(instrumented.spec, dtype=self._spec.dtype)
                cuts = [] if self.layers else proposed_cuts(model, batches, replace(spec, dtype=None))
                layers = self.layers or as_node_layers([cut.tap for cut in cuts])
                if not self._is_checked:
                    self._notes = notes_on(model, batches, layers, spec)
        except LIBError as error:
            if is_out_of_memory(error.__cause__ or error):
                log.warning("'%s' has too little memory to check its node layers: %s", self._name, error)
            # A training batch may be of another form; the first validation decides.
            elif strict or is_model_error(error, batch):
                raise
            return self._layout
        if strict:
            self._set_call(spec)
            # Samples that are all the same say little: more of them are added, until some differ.
            could_look = NOT_LOOKED not in self._notes
            self._batches = [] if could_look else [*self._batches, first_samples(batch, self._layout, 1)]
            self._is_checked = could_look or len(self._batches) == _MAX_BATCHES
        if self.layers is None:
            self._set(layers)
            rank_zero_info(f"{self._name}: no node_layers given, using the proposed {self.names}, of {sizes(cuts)}")
        return self._layout

    def check_score(self, model: nn.Module, batch: Any, score: Score) -> None:
        """Try a score function on a first batch, after `check`.

        Args:
            model: The model.
            batch: A batch.
            score: The function.

        Raises:
            LIBError: If it fails, or does not return one number for each sample.
        """
        instrumented = InstrumentedModel(model, [], replace(self._spec, dtype=None))
        with (
            self.precision(),
            wrap_forward_errors(model, instrumented.spec),
            model_session(instrumented),
            torch.no_grad(),
        ):
            output, n = instrumented.run(batch), instrumented.num_samples(batch)
            try:
                sample_scores(score, output, batch, n)
            except LIBError:
                raise
            except Exception as error:
                raise LIBError(f"{self._name}: causal_score failed on the first batch: {brief(error)}") from error

    def check_dictionaries(
        self, model: nn.Module, batch: Any, dictionaries: Mapping[str, Dictionary], strict: bool = True
    ) -> None:
        """Try dictionaries on a first batch, after `check`.

        Args:
            model: The model.
            batch: A batch.
            dictionaries: The dictionaries, by node layer.
            strict: As for `check`.

        Raises:
            NodeLayerError: If there is no such node layer.
            SettingError: If a dictionary does not fit its node layer.
        """
        dictionaries = check_dictionaries(dictionaries, self.names)
        if not dictionaries or self.layers is None:
            return
        instrumented = InstrumentedModel(model, self.layers, self._spec)
        try:
            with self.precision(), wrap_forward_errors(model, instrumented.spec), model_session(instrumented):
                try_dictionaries(instrumented, [batch], dictionaries)
        except (SettingError, SettingTypeError):
            raise
        except Exception:  # a training batch may be of another form; the first validation decides
            if strict:
                raise

    def _is_needed(self, batch: Any) -> bool:
        """Whether something is not known yet; which entries have the samples is certain from several samples only."""
        return not (self._is_checked and (self._layout.is_certain or self._layout.num_samples(batch) < 2))

    @property
    def spec(self) -> ModelSpec:
        """How the model is called on a batch, as far as that is known."""
        return self._spec

    @property
    def _layout(self) -> BatchLayout:
        call = self._spec.call
        return BatchLayout() if call is None or call.layout is None else call.layout

    def _set_call(self, spec: ModelSpec) -> None:
        if spec.call != self._spec.call:
            assert spec.call is not None
            if self._spec.call is None:
                rank_zero_info(f"{self._name}: the model is called as {spec.call}")
            self._spec = spec
            self._on_call(spec.call.plain)

    def instrument(self, model: nn.Module, process_group: ProcessGroup) -> InstrumentedModel:
        """The model, ready to be cut at the node layers that all processes agree on.

        Args:
            model: The model.
            process_group: The processes of the run.

        Returns:
            The instrumented model.

        Raises:
            LIBError: If no process has seen a batch that node layers could be proposed from.
        """
        if not self._is_given:
            # A process that has seen no batch has no proposal.
            own = json.dumps(self.names) if self.layers else ""
            agreed = broadcast_text(process_group, own)
            if not agreed:
                raise LIBError("Node layers cannot be proposed, since no batch has been seen: give node_layers.")
            if own != agreed:
                self._set(as_node_layers(json.loads(agreed)))
        if process_group.size > 1:
            agreed = broadcast_text(process_group, json.dumps(self._spec.call.plain) if self._spec.call else "")
            self._spec = self._spec.called_as(json.loads(agreed) if agreed else None)
        instrumented = InstrumentedModel(model, self.layers or [], self._spec)
        instrumented.notes = list(self._notes)
        return instrumented
