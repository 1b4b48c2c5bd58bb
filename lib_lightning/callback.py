"""The Lightning side: when to look, what to log, where to write. Everything else is computed elsewhere."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.compute import check_node_layers, compute_interaction_graph
from lib_lightning.core.build import BasisKind, FinalBasisKind, Settings
from lib_lightning.core.cut import InputFn
from lib_lightning.core.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.core.layers import NodeLayer, as_node_layers, check_taps
from lib_lightning.core.nested import batch_size
from lib_lightning.display.image import render_png
from lib_lightning.display.loggers import log_image
from lib_lightning.export.files import write_bytes
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import graph_scalars, scalar_keys
from lib_lightning.samples import SampleBuffer
from lib_lightning.schedule import Schedule

log = logging.getLogger(__name__)


class LIBCallback(pl.Callback):
    """Watches a network's features form: takes snapshots of the Local Interaction Basis of the model in training.

    A snapshot is computed on a fixed set of validation samples. It logs the number of features and edges as
    ``lib/...`` (there at every validation, so that other callbacks can monitor them), shows the interaction graph as
    ``lib/graph``, and writes a basis file and the figure to ``<log dir>/lib``. Training is left untouched to the last
    bit, and a snapshot that fails is reported and left out. (If the very first one fails, the scalars are NaN until the
    next: give an EarlyStopping on them ``check_finite=False``.)

    Args:
        node_layers: Where to cut the model, in forward order: ``module.path`` for a module's output,
            ``module.path:input`` for its input, ``input`` and ``output`` for the model's own, or a NodeLayer. Paths
            start at the LightningModule.
        num_samples: Number of validation samples to compute on, the same ones throughout: the first ones of the first
            whole validation. Snapshots before it use those of the sanity check.
        every_n_validations: A snapshot at the first validation and every so many after it. This is the default, with
            every validation, if no other schedule is given.
        every_n_steps: Instead, a snapshot before training and every so many optimizer steps.
        at_steps: Instead, a snapshot after each of these numbers of optimizer steps; 0 is before training.
        log_spaced: Instead, a snapshot before training and so many for each tenfold of the number of steps.
        basis: lib, or the baselines pca and neuron.
        final_basis: Basis of the last node layer: neuron, pca, or auto for neurons at the model's output and PCA
            anywhere else.
        rtol: Directions of covariance, metric and importance below this share of the largest are dropped; 0 drops only
            what rounding cannot tell from zero.
        n_probes: None (null) for the exact metric; a number for that many random-sign probes per sample.
        integration_steps: 0 takes gradients at the activations; a number averages them over that many points on the
            way from the mean.
        dtype: Floating-point type to compute in; None (null) for the model's own.
        input_fn: Turns a validation batch into what the model is called with: a dict becomes keyword arguments, a
            tuple positional ones. By default the first entry of a tuple or list, and any other batch as it is.
        name: Prefix of everything logged and name of the folder. Several LIBCallbacks of a trainer need several names.

    Raises:
        LIBError: If the node layers are no list of at least two.
        ValueError: If another setting is outside its range.

    Example:
        >>> callback = LIBCallback(node_layers=["fc1:input", "fc2:input", "output"], log_spaced=10)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        node_layers: Sequence[str | NodeLayer],
        num_samples: int = 2048,
        every_n_validations: int | None = None,
        every_n_steps: int | None = None,
        at_steps: Sequence[int] | None = None,
        log_spaced: int | None = None,
        basis: BasisKind = "lib",
        final_basis: FinalBasisKind = "auto",
        rtol: float = 1e-6,
        n_probes: int | None = None,
        integration_steps: int = 0,
        dtype: Literal["float32", "float64"] | None = None,
        input_fn: InputFn | None = None,
        name: str = "lib",
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"num_samples is a number from 2 on: a basis needs samples to vary; got {num_samples}.")
        self.node_layers = as_node_layers(node_layers)
        self.settings = Settings(basis, final_basis, rtol, n_probes, integration_steps)
        if dtype not in (None, "float32", "float64"):
            raise ValueError(f"dtype is 'float32', 'float64' or None for the model's own; got {dtype!r}.")
        self.dtype = None if dtype is None else {"float32": torch.float32, "float64": torch.float64}[dtype]
        self.input_fn = input_fn
        self.name = name
        self.schedule = Schedule(every_n_validations, every_n_steps, at_steps, log_spaced)
        self.samples = SampleBuffer(num_samples)
        self._reset()

    def _reset(self) -> None:
        self.schedule.reset()
        self.samples.clear()
        self.graph: InteractionGraph | None = None
        self.snapshots = 0
        keys = [*scalar_keys([layer.name for layer in self.node_layers]), "samples", "seconds"]
        self._scalars = dict.fromkeys(keys, math.nan)
        self._graph_step: int | None = None
        self._tried_step: int | None = None
        self._samples_complete = False
        self._checked = False
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """Tells several callbacks apart in a checkpoint; the trainer refuses two of one name."""
        return self._generate_state_key(name=self.name)

    # before training: find mistakes while it is cheap

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh: the callback may have served another run. A checkpoint's state is loaded after this."""
        if stage in ("fit", "validate"):
            self._reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check names, now that the model is all there (it may be built in its own setup or configure_model)."""
        check_taps(pl_module, self.node_layers)
        self._find_folder(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there will be samples, and take the snapshot before training if one is due."""
        empty = trainer.val_dataloaders is not None and sum(trainer.num_val_batches) == 0
        if empty or not trainer.enable_validation:
            raise LIBError(
                "LIBCallback computes on validation batches, and there are none: give the trainer a validation data "
                "loader with data in it, a validation_step, and limit_val_batches above 0."
            )
        self._snapshot_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Without a sanity check, look for mistakes on the first training batch instead."""
        if not self._checked:
            self._check(pl_module, batch, strict=False)

    def _check(self, pl_module: pl.LightningModule, batch: Any, strict: bool) -> None:
        self._checked = True
        try:
            check_node_layers(pl_module, batch, self.node_layers, self.dtype, self.input_fn)
        except (NodeLayerError, NotFiniteError):
            raise
        except Exception as error:
            if not strict:  # a training batch may look different; the first validation will tell
                self._checked = False
                return
            if isinstance(error, LIBError):
                raise
            raise LIBError(
                f"LIBCallback cannot run the model on a validation batch: {type(error).__name__}: {error}. By default "
                "the model is called with the first entry of a tuple or list and with a dict's entries by name; "
                "input_fn= says otherwise."
            ) from error

    # validation: collect, compute, log

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples kept from the sanity check may be few: collect them anew from the first whole validation."""
        if trainer.state.fn != "fit":
            self._find_folder(trainer)
        if not self._samples_complete:
            self.samples.clear()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a copy of the batch."""
        if not self._checked:
            if batch_size(batch) == 0:
                raise LIBError(
                    f"LIBCallback finds no tensor in a validation batch of type {type(batch).__name__}: batches are "
                    "tensors, or tuples, lists, dicts and dataclasses of them."
                )
            self._check(pl_module, batch, strict=True)
        if dataloader_idx == 0 and not self._samples_complete:
            self.samples.add(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot if one is due, and log the current numbers in any case."""
        if trainer.sanity_checking:
            return
        self._samples_complete = True
        due = self.schedule.due_at_validation() if trainer.state.fn == "fit" else True
        if due or self.schedule.due_at_step(trainer.global_step) or self._graph_step is None:
            self._snapshot(trainer, pl_module)
        pl_module.log_dict(self._current_scalars(trainer), on_step=False, on_epoch=True, batch_size=1)

    # training: compute

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due at this step."""
        self._snapshot_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last snapshot, write it as ``final.safetensors``, and say where everything is."""
        if self._snapshot(trainer, pl_module):
            self._log_directly(trainer)
        folder = self._folder
        if folder is None or not trainer.is_global_zero:
            return
        if self.graph is not None and self._is_current(trainer):
            try:
                self.graph.save(folder / "final.safetensors")
            except OSError as error:
                log.warning("The last snapshot of '%s' could not be written: %s", self.name, error)
        self._say_where(trainer, folder)

    def _snapshot_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.samples.batches and self.schedule.due_at_step(trainer.global_step)
        if due and self._snapshot(trainer, pl_module):
            self._log_directly(trainer)

    # one snapshot

    def _snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Take a snapshot, unless this step has had its try; tell whether there is a new one."""
        if self._tried_step == trainer.global_step:
            return False
        self._tried_step = trainer.global_step
        started, folder = time.perf_counter(), self._folder
        try:
            graph = compute_interaction_graph(
                pl_module, self.samples.batches, self.node_layers, dtype=self.dtype, input_fn=self.input_fn,
                **vars(self.settings),
            )  # fmt: skip
            graph.info |= {"step": trainer.global_step, "epoch": trainer.current_epoch}
            if folder is not None and trainer.is_global_zero:
                graph.save(folder / "snapshots" / f"step-{trainer.global_step:08d}.safetensors")
                png = render_png(graph.plot())
                write_bytes(folder / "figures" / f"step-{trainer.global_step:08d}.png", png.data)
                log_image(trainer.loggers, f"{self.name}/graph", png, _logging_step(trainer))
            scalars = graph_scalars(list(graph.bases.values()), list(graph.edges.values()))
        except Exception as error:
            log.warning(
                "The snapshot of '%s' after %d steps failed and is left out; training goes on. %s: %s",
                self.name, trainer.global_step, type(error).__name__, error,
            )  # fmt: skip
            return False
        self.graph, self._graph_step = graph, trainer.global_step
        self.snapshots += 1
        self._scalars = {**scalars, "samples": float(graph.info["n_samples"]), "seconds": time.perf_counter() - started}
        return True

    def _is_current(self, trainer: pl.Trainer) -> bool:
        return self._graph_step == trainer.global_step

    def _current_scalars(self, trainer: pl.Trainer) -> dict[str, float]:
        age = math.nan if self._graph_step is None else float(trainer.global_step - self._graph_step)
        return {f"{self.name}/{key}": value for key, value in {**self._scalars, "age": age}.items()}

    def _log_directly(self, trainer: pl.Trainer) -> None:
        # LightningModule.log accepts nothing between validations that would reach the loggers at this step.
        for logger in trainer.loggers:
            logger.log_metrics(self._current_scalars(trainer), _logging_step(trainer))

    def _find_folder(self, trainer: pl.Trainer) -> None:
        # All processes have to ask together, so this is done in hooks that all of them run, not where it is needed.
        trial = trainer.fast_dev_run or trainer.barebones  # type: ignore[attr-defined]
        # A logger that writes to a server has no folder; the trainer's own is there for that.
        log_dir = None if trial else trainer.log_dir or trainer.default_root_dir
        self._folder = None if log_dir is None else Path(log_dir) / self.name

    def _say_where(self, trainer: pl.Trainer, folder: Path) -> None:
        lines = [f"{self.name}: {self.snapshots} snapshots of {' -> '.join(layer.name for layer in self.node_layers)}"]
        places = {"basis files": "snapshots", "last one": "final.safetensors", "figures": "figures"}
        lines += [f"  {what:<13} {folder / place}" for what, place in places.items() if (folder / place).exists()]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines += [f"  event files   {logger.log_dir}"]
                lines += [
                    f"  watch         {_tensorboard()} --logdir {logger.log_dir} --samples_per_plugin images=1000"
                ]
        rank_zero_info("\n" + "\n".join(lines))

    # resuming

    def state_dict(self) -> dict[str, Any]:
        """State that travels in Lightning's checkpoints: plain numbers and strings only."""
        return {
            "schedule": self.schedule.state_dict(),
            "scalars": dict(self._scalars),
            "graph_step": self._graph_step,
            "snapshots": self.snapshots,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.schedule.load_state_dict(state_dict["schedule"])
        if set(state_dict["scalars"]) == set(self._scalars):  # else it was of other node layers
            self._scalars = state_dict["scalars"]
            self._graph_step = self._tried_step = state_dict["graph_step"]
            self.snapshots = state_dict["snapshots"]


def _logging_step(trainer: pl.Trainer) -> int:
    # The axis of LightningModule.log: batches that ended in an optimizer step, one behind global_step after a step.
    # Once training has ended it has moved on, but the last numbers belong beside those of the last validation.
    return min(trainer.fit_loop.epoch_loop._batches_that_stepped, max(trainer.global_step - 1, 0))


def _tensorboard() -> str:
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else str(beside)
