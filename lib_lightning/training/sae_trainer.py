"""A callback that trains sparse autoencoders on a model's activations while the model trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib_lightning.dictionaries.topk_sae import TopKSAE
from lib_lightning.dictionaries.topk_training import BATCH, Reconstruction, TopKSettings, TopKTraining
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.distributed.torch_group import TorchProcessGroup
from lib_lightning.errors import (
    ComputationStopped,
    LIBError,
    SettingError,
    SettingTypeError,
    brief,
    check_number,
    counted,
    is_out_of_memory,
    log_traceback,
    quoted,
    shortened,
)
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.run_layout import check_run_name
from lib_lightning.metrics.summary import layer_keys
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.node_layer import NodeLayer, as_node_layer
from lib_lightning.model.safe_points import signals_at_safe_points
from lib_lightning.model.skip_positions import SkipPositions
from lib_lightning.training.budget import TimeMeter, TimeSpent, max_overhead_of, other_meters, timed_hook
from lib_lightning.training.callback import LIBCallback
from lib_lightning.training.frameworks import Callback, callback_of_both_packages, is_instance, rank_zero_info
from lib_lightning.training.loggers import log_scalars
from lib_lightning.training.trainer import (
    has_received_sigterm,
    has_validation,
    logging_step,
    run_folder,
    synchronize,
    trainer_precision,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

# Samples of a batch that the model is run on at least, if there are as many; and activations that are enough.
_MIN_SAMPLES, _ENOUGH_ROWS = 32, 4096
# Failures in a row after which nothing more is tried.
_MAX_FAILURES = 3
_KIND = "batch"
# Scalars of each autoencoder, and of all of them.
_OF_EACH = ("unexplained_variance", "l0", "dead_latents")
_OF_ALL = ("activations", "steps", "overhead")


@callback_of_both_packages
class SAETrainer(Callback):
    """Trains a top-k sparse autoencoder on the activations of each of some node layers, beside the user's training.

    Now and then, a copy of the model is run in evaluation mode on the training batch that is about to be trained on,
    and each autoencoder takes a few steps on the activations. Training is bit-identical to a run without the callback,
    and whatever fails here is reported and skipped. How well activations are reconstructed is logged at every
    validation, measured on activations before they are trained on: ``sae/unexplained_variance/<layer>``, from 0 to 1
    and more; ``sae/l0/<layer>``, the mean number of active latents; ``sae/dead_latents/<layer>``, the share of the
    latents that are never active. The autoencoders are in the trainer's checkpoints, and in the end in
    ``<log dir>/sae/<layer>.safetensors``, which `lib_lightning.dictionaries.TopKSAE.load` reads.

    The loss, and how dead latents are revived, are those of Gao et al. (2024), arXiv 2406.04093; see
    `lib_lightning.dictionaries.topk_training`.

    Note:
        Not the activations that training computes anyway, by hooks: those are noisy where there is dropout, normalised
        by other statistics than in evaluation where there is batch norm, computed twice under activation checkpointing,
        and a hook in a compiled module changes what is compiled. All processes of a distributed training train on the
        activations of all.

    Args:
        node_layers: Where the activations are, as for `LIBCallback`: a name, a `NodeLayer`, or several of these in
            forward order. Channels of images are dimensions, and positions samples.
        n_latents: Number of latents of each autoencoder; None (null) for four times as many as dimensions.
        k: Number of latents that are active for an activation; None (null) for an eighth of the dimensions, from 1 to
            32.
        lr: Learning rate; None (null) for ``2e-4 sqrt(2^14 / n_latents)``.
        every_n_batches: Take activations from every n-th training batch. None (null) for as many as there is time for.
        max_overhead: Largest ratio of the time spent here to the training time. None (null) is 0.03, beside that of a
            LIBCallback; with every_n_batches, no limit.
        input_fn: Converts a training batch to the model's input, as for `LIBCallback`.
        mask: Marks valid positions, as for `LIBCallback`.
        skip_positions: Positions to leave out, as for `LIBCallback`, such as 1 for the first token.
        name: Prefix of everything logged, and name of the folder. Several SAETrainers of a trainer need different
            names.
        seed: Seed of initial weights and batches; the random numbers of the training are left alone.

    Raises:
        LIBError: If no node layer is given.
        SettingError: If another setting is outside its range.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = SAETrainer("fc2:input", n_latents=512, k=16)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
        >>> callback.dictionary("fc2:input").encode(torch.zeros(5, 128)).shape
        torch.Size([5, 512])
    """

    def __init__(  # noqa: PLR0913 (a public entry)
        self,
        node_layers: str | NodeLayer | Sequence[str | NodeLayer],
        n_latents: int | None = None,
        k: int | None = None,
        lr: float | None = None,
        every_n_batches: int | None = None,
        max_overhead: float | None = None,
        input_fn: InputFn | None = None,
        mask: str | int | MaskFn | None = None,
        skip_positions: SkipPositions | None = None,
        name: str = "sae",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.node_layers = _node_layers(node_layers)
        for setting, value in (("n_latents", n_latents), ("k", k), ("every_n_batches", every_n_batches)):
            if value is not None:
                check_number(setting, value, lambda n: n >= 1, "must be a whole number of at least 1", integer=True)
        if lr is not None:
            check_number("lr", lr, lambda x: 0 < x < math.inf, "must be above 0")
        check_number("seed", seed, lambda n: n >= 0, "must be at least 0", integer=True)
        check_run_name(name)
        self.name, self.every_n_batches = name, every_n_batches
        self.settings = TopKSettings(n_latents, k, lr, int(seed))
        if n_latents is not None:  # the width is still unknown, and does not matter
            self.settings.for_width(8 * (k or 1))
        self.max_overhead = max_overhead_of(max_overhead, every_n_batches is not None)
        self._given_spec = ModelSpec(input_fn, mask, None, skip_positions)
        self.clock = time.perf_counter
        self._dictionaries = {layer.name: NewestSAE(self.settings) for layer in self.node_layers}
        self._begin()

    def _begin(self) -> None:
        """A new run begins, or one is about to be resumed."""
        self._trainings: dict[str, TopKTraining] = {}
        self._saved: dict[str, Any] = {}
        self._measured: dict[str, Reconstruction] = {}
        self._scalars: dict[str, float] = {}
        self._spec = self._given_spec
        self._rows_per_sample = 0.0
        # Numbers of training batches so far, and of the one that activations are taken from next.
        self._n_batches = self._due = 0
        self._n_failures = 0
        self._process_group: ProcessGroup = SINGLE_PROCESS
        self.meter = TimeMeter(self.max_overhead, self.clock)
        for dictionary in self._dictionaries.values():
            dictionary.replace(None)

    @property
    def state_key(self) -> str:
        """Distinguishes several callbacks in a checkpoint, by their names."""
        return self._generate_state_key(name=self.name)

    def dictionary(self, node_layer: str | None = None) -> NewestSAE:
        """The autoencoder of a node layer, whose weights are always the newest; untrained before training.

        Args:
            node_layer: Name of the node layer; None if there is only one.

        Returns:
            An object with ``encode`` and ``decode``, for ``LIBCallback(basis={"fc1": callback.dictionary("fc1")})``.

        Raises:
            SettingError: If there is no such node layer.
        """
        if node_layer is None and len(self._dictionaries) == 1:
            return next(iter(self._dictionaries.values()))
        if node_layer not in self._dictionaries:
            raise SettingError(f"SAETrainer has the node layers {quoted(self._dictionaries)}; got {node_layer!r}.")
        return self._dictionaries[node_layer]

    @property
    def saes(self) -> dict[str, TopKSAE]:
        """The autoencoders that have begun to train, by node layer, as they are now."""
        return {layer: training.sae for layer, training in self._trainings.items() if training.is_ready}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a new run. The state of a checkpoint is loaded after this."""
        own: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [prefix for one in own if isinstance(one, LIBCallback) for prefix in one.computer.folders]
        if self.name in others:
            raise SettingError(f"SAETrainer and LIBCallback would both write to '{self.name}': give one another name=.")
        if stage == "fit":
            self._begin()

    @timed_hook
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check strategy and node layers."""
        for strategy, instead in (("DeepSpeedStrategy", "DDPStrategy"), ("FSDPStrategy", "ModelParallelStrategy")):
            if is_instance(trainer.strategy, f"strategies.{strategy}"):
                raise LIBError(
                    f"SAETrainer does not work with {strategy}, which gathers weights in training steps only. Use "
                    f"DDPStrategy or ModelParallelStrategy ({instead} is the nearest)."
                )
        if trainer.world_size > 1:
            self._process_group = TorchProcessGroup()
        InstrumentedModel(pl_module, self.node_layers, self._spec)  # refuses names that the model does not have

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure time."""
        self.meter.begin(other_meters(trainer, self))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train on the activations of this batch, if it is due and there is time for it."""
        self._n_batches += 1
        if self._n_batches <= self._due or self._n_failures >= _MAX_FAILURES:
            return
        with self.meter.timed():
            if self._can_afford():
                self._take(trainer, pl_module, batch)

    def _can_afford(self) -> bool:
        """Decide whether there is time now; if not, when to look again. Process 0 decides for all."""
        every, affordable = self.every_n_batches or 1, self.meter.can_afford(_KIND, 0.0)
        wait = float(every)
        if not affordable:
            spent = self.meter.spent
            missing = (spent.overhead + self.meter.expected_cost(_KIND)) / self.meter.limit - spent.training
            per_batch = spent.training / self._n_batches
            # Not far ahead, since batches may take longer later on.
            wait = min(max(missing / per_batch, 1.0), 1.0 + self._n_batches) if per_batch > 0 else 1.0
        decided = torch.tensor([float(affordable), float(-(-wait // every) * every)], dtype=torch.float64, device="cpu")
        (decided,) = self._process_group.broadcast([decided])
        self._due = self._n_batches - 1 + int(decided[1])
        return bool(decided[0])

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Train on a batch; or log why that failed."""
        with self.meter.excluded():
            synchronize(trainer)
        try:
            with (
                self.meter.snapshot(_KIND),
                self._process_group.sync_errors(),
                signals_at_safe_points(partial(has_received_sigterm, trainer)),
            ):
                self._train(pl_module, batch, trainer_precision(trainer, None))
                synchronize(trainer)
            self._n_failures = 0
        except ComputationStopped:  # Lightning ends the training
            return
        except Exception as error:
            is_mistake = isinstance(error, LIBError) and not is_out_of_memory(error.__cause__ or error)
            if is_mistake and trainer.global_step == 0 and not self._trainings:
                raise
            self._n_failures += 1
            self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        if self._n_failures == 1:
            log.warning("%s: a batch was left out, and training continues. %s", self.name, brief(error))
        elif self._n_failures == _MAX_FAILURES:
            log.warning(
                "%s: %d batches in a row have failed: no more of them are tried. %s",
                self.name, _MAX_FAILURES, brief(error),
            )  # fmt: skip
        log_traceback(error)

    def _train(self, pl_module: pl.LightningModule, batch: Any, precision: AbstractContextManager[None]) -> None:
        instrumented = InstrumentedModel(pl_module, self.node_layers, self._spec)
        with precision, model_session(instrumented):
            captured = self._activations(instrumented, batch)
            self._spec = instrumented.spec
            for layer, rows in zip(self.node_layers, captured, strict=True):
                rows = torch.cat([part.to(rows.device) for part in self._process_group.gather(rows.contiguous())])
                training = self._training_of(layer.name, rows)
                if training.is_ready and len(rows):
                    found = training.measure(rows)
                    self._measured[layer.name] = (
                        self._measured[layer.name] + found if layer.name in self._measured else found
                    )
                training.add(rows)
                training.train()
                if training.is_ready:
                    self._dictionaries[layer.name].replace(training.sae)

    def _activations(self, instrumented: InstrumentedModel, batch: Any) -> list[Tensor]:
        """Activations at valid positions of some samples of a batch, ``(m, d)``, for each node layer."""
        if batch is None or is_empty(batch):
            raise LIBError("This training batch is not known before its step, or is empty.")
        n = instrumented.num_samples(batch)
        enough = math.ceil(_ENOUGH_ROWS / self._rows_per_sample) if self._rows_per_sample else 1
        few = instrumented.select(batch, slice(0, max(_MIN_SAMPLES, enough))) if n > _MIN_SAMPLES else batch
        with torch.no_grad():
            rows = [layer.rows.float() for part in instrumented.parts([few]) for layer in instrumented.capture(part)]
        per_layer = [torch.cat(rows[i :: len(self.node_layers)]) for i in range(len(self.node_layers))]
        self._rows_per_sample = min(map(len, per_layer)) / min(n, max(_MIN_SAMPLES, enough))
        return per_layer

    def _training_of(self, layer: str, rows: Tensor) -> TopKTraining:
        """The training of an autoencoder, which begins with its first activations, or continues one of a checkpoint."""
        if layer not in self._trainings:
            training = TopKTraining(rows.shape[1], self.settings, rows.device)
            if layer in self._saved:
                training.load_state_dict(self._saved.pop(layer))
            self._trainings[layer] = training
        return self._trainings[layer]

    # Results.

    @timed_hook
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the latest scalars."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer, pl_module)

    @timed_hook
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without validation, the end of an epoch takes its place."""
        if not has_validation(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scalars = self._latest_scalars()
        pl_module.log_dict(
            scalars, on_step=False, on_epoch=True, batch_size=1, sync_dist=self._process_group.size > 1
        )  # fmt: skip

    def _latest_scalars(self) -> dict[str, float]:
        """All scalars by name: what has been measured since they were last asked for, else as before; NaN if unknown.

        Called by all processes at the same time, which also get the weights of process 0: rounding errors differ.
        """
        keys = layer_keys([layer.name for layer in self.node_layers])
        for key, layer in zip(keys, self.node_layers, strict=True):
            training = self._trainings.get(layer.name)
            if training is not None and self._process_group.size > 1:
                training.set_weights(self._process_group.broadcast(training.weights()))
            found = self._measured.get(layer.name)
            values = (math.nan,) * 3
            if found is not None and training is not None:
                values = (found.unexplained, found.l0, float(training.dead.double().mean()))
            for name, value in zip(_OF_EACH, values, strict=True):
                if math.isfinite(value) or f"{self.name}/{name}/{key}" not in self._scalars:
                    self._scalars[f"{self.name}/{name}/{key}"] = value
        self._measured = {}
        first = next(iter(self._trainings.values()), None)
        ratio = torch.tensor(self.meter.ratio, dtype=torch.float64, device="cpu")
        (ratio,) = self._process_group.broadcast([ratio])
        numbers = (first.n_seen if first else 0, first.n_steps if first else 0, float(ratio))
        self._scalars |= {f"{self.name}/{name}": float(x) for name, x in zip(_OF_ALL, numbers, strict=True)}
        return dict(self._scalars)

    @timed_hook
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the autoencoders, and log the last scalars and what all this has cost."""
        scalars, folder = self._latest_scalars(), run_folder(trainer)
        self.meter.end()
        if trainer.is_global_zero:
            log_scalars(trainer.loggers, scalars, logging_step(trainer))
            written = [] if folder is None else self._write(trainer, folder / self.name)
            rank_zero_info("\n  ".join([f"{self.name}: {self._summary(scalars)}", *written]))

    def _write(self, trainer: pl.Trainer, folder: Any) -> list[str]:
        written = []
        for key, layer in zip(layer_keys([one.name for one in self.node_layers]), self.node_layers, strict=True):
            training = self._trainings.get(layer.name)
            if training is None or not training.is_ready:
                continue
            path = folder / f"{key}.safetensors"
            header = {"node_layer": layer.name, "step": trainer.global_step, "trained": training.n_steps}
            sae = training.sae
            try:
                write_bytes(path, sae.to_bytes(header))
                written.append(str(path))
            except OSError as error:
                log.warning("%s: '%s' could not be written. %s", self.name, path, brief(error))
        return written

    def _summary(self, scalars: Mapping[str, float]) -> str:
        steps, seen = (int(scalars[f"{self.name}/{name}"]) for name in ("steps", "activations"))
        if not steps and seen:
            return (
                f"no autoencoder was trained: there were {counted(seen, 'activation')}, and a step takes {BATCH}. "
                "Lower every_n_batches, or train for longer."
            )
        return (
            f"{counted(len(self.saes), 'sparse autoencoder')} with {counted(steps, 'step')} on "
            f"{counted(seen, 'activation')} {self.meter.text}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, for Lightning's checkpoints: plain values and tensors only."""
        return {
            "layers": {
                **self._saved, **{layer: training.state_dict() for layer, training in self._trainings.items()},
            },
            "scalars": dict(self._scalars),
            "measured": {layer: dict(vars(one)) for layer, one in self._measured.items()},
            "n_batches": self._n_batches,
            "due": self._due,
            "rows_per_sample": self._rows_per_sample,
            "time": asdict(self.meter.spent),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        known = {layer.name for layer in self.node_layers}
        self._saved = {layer: state for layer, state in state_dict["layers"].items() if layer in known}
        self._scalars = dict(state_dict["scalars"])
        self._measured = {x: Reconstruction(**one) for x, one in state_dict["measured"].items() if x in known}
        self._n_batches, self._due = state_dict["n_batches"], state_dict["due"]
        self._rows_per_sample = state_dict["rows_per_sample"]
        self.meter = TimeMeter(self.max_overhead, self.clock, TimeSpent(**state_dict["time"]))
        for layer, state in self._saved.items():  # known before the first batch
            training = TopKTraining(state["weights"][3].shape[0], self.settings)
            training.load_state_dict(state)
            if training.is_ready:
                self._dictionaries[layer].replace(training.sae)


class NewestSAE(nn.Module):
    """The autoencoder of a node layer as it is now, while `SAETrainer` trains it.

    Args:
        settings: Its sizes.

    Attributes:
        sae: The autoencoder; None before there is any. What is encoded then is encoded by an untrained one.
        is_trained: Whether it has begun to train.
    """

    sae: TopKSAE | None

    def __init__(self, settings: TopKSettings) -> None:
        super().__init__()
        self._settings = settings
        self.sae, self.is_trained = None, False

    def replace(self, sae: TopKSAE | None) -> None:
        """The autoencoder has been trained further, or a new run begins."""
        self.sae, self.is_trained = sae, sae is not None

    def encode(self, a: Tensor) -> Tensor:
        """Latents ``(..., r)`` of activations ``(..., d)``; see `TopKSAE.encode`.

        Raises:
            LIBError: If it has been trained on activations of another width, as those of another node layer are.
        """
        width = None if self.sae is None else self.sae.W_enc.shape[0]
        if self.is_trained and width != a.shape[-1]:
            raise LIBError(
                f"This autoencoder is trained on activations with {width} dimensions; got {a.shape[-1]}. Give each "
                "node layer its own: SAETrainer.dictionary(node_layer)."
            )
        if self.sae is None or width != a.shape[-1]:
            self.sae = TopKTraining(a.shape[-1], self._settings).sae
        return self.sae.to(a.device).encode(a)

    def decode(self, f: Tensor) -> Tensor:
        """Activations ``(..., d)`` from latents ``(..., r)``; see `TopKSAE.decode`.

        Raises:
            LIBError: If nothing has been encoded yet.
        """
        if self.sae is None:
            raise LIBError("Nothing has been encoded yet, so that the width of the activations is unknown.")
        return self.sae.to(f.device).decode(f)


def _node_layers(given: str | NodeLayer | Sequence[str | NodeLayer]) -> list[NodeLayer]:
    """The node layers that a user means, with different names."""
    if not isinstance(given, (str, NodeLayer, list, tuple)):
        raise SettingTypeError(
            "node_layers is a name such as 'fc2:input', a NodeLayer, or a list of these; got "
            f"{shortened(repr(given), 80)}."
        )
    specs = [given] if isinstance(given, (str, NodeLayer)) else list(given)
    if not specs:
        raise LIBError("SAETrainer needs a node layer, such as 'fc2:input'.")
    layers = [spec if isinstance(spec, NodeLayer) else as_node_layer(spec) for spec in specs]
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise SettingError(f"Each node layer of SAETrainer is there once, under its own name; got {quoted(names)}.")
    return layers
