"""The Lightning side: when to look, what to log, where to write. Everything else is computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torchmetrics import MetricCollection

from lib_lightning.ablation import AblationPlan
from lib_lightning.algorithm.config import BasisKind, FinalBasisKind, FinalMetric, LIBConfig
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.graph import InteractionGraph
from lib_lightning.labels.labeller import Labeller
from lib_lightning.lineage.events import CHANGES
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.training.budget import SnapshotTrigger, timed_hook
from lib_lightning.training.node_layers import NodeLayerResolver
from lib_lightning.training.reporter import Hook, SnapshotReporter
from lib_lightning.training.samples import SampleStore
from lib_lightning.training.schedule import Schedule
from lib_lightning.training.snapshot import Snapshot, SnapshotComputer, SnapshotConfig
from lib_lightning.training.trainer import (
    check_strategy,
    has_validation,
    isolated_forward,
    process_group_of,
)

_DTYPES = {None: None, "float32": torch.float32, "float64": torch.float64}


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
            start at the LightningModule. None (null) takes a proposal and says which; see `list_node_layers`.
        num_samples: Number of validation samples to compute on, over all processes, and the same ones throughout: the
            first ones of the first whole validation. Snapshots before it use those of the sanity check.
        every_n_validations: A snapshot at the first validation and every so many after it. This is the default, with
            every validation, if no other schedule is given.
        every_n_steps: Instead, a snapshot before training and every so many optimizer steps.
        at_steps: Instead, a snapshot after each of these numbers of optimizer steps; 0 is before training.
        log_spaced: Instead, a snapshot before training and so many for each tenfold of the number of steps.
        basis: lib, or the baselines pca and neuron.
        final_basis: Basis of the last node layer: neuron, pca, centered for logits less their mean over the classes,
            or auto for neurons at the model's output and PCA anywhere else.
        rtol: Directions of metric and importance (PCA: variance) below this share of the largest are dropped; 0 drops
            only what rounding cannot tell from zero.
        n_probes: None (null) for the exact metric; a number for that many random-sign probes per sample.
        integration_steps: 0 takes gradients at the activations; a number averages them over that many points on the
            way from the mean.
        dtype: Floating-point type to compute in; None (null) for the model's own.
        input_fn: Turns a validation batch into what the model is called with: a dict becomes keyword arguments, a
            tuple positional ones. By default the first entry of a tuple or list, and any other batch as it is.
        mask: Marks the positions that count, where some are padding: the name or index of the batch's entry that does,
            such as attention_mask, or a function from a batch to a tensor ``(n, S)``.
        dataloader: Batches of the callback's own to compute on instead of validation batches. A trainer without
            validation needs it; there, the end of a training epoch counts as a validation.
        val_dataloader: Which of several validation data loaders to compute on.
        memory_limit: Memory that a snapshot may use beside model and samples, in GiB.
        name: Prefix of everything logged and name of the folder. Several LIBCallbacks of a trainer need several names.
        final_metric: fisher measures logits by the distribution that they stand for, so that importance means effect
            on what the model predicts.
        baselines: Other bases, such as pca and neuron, to compute on the same samples. Their numbers are logged as
            ``pca/...``, and what those of the basis are of them as ``lib_over_pca/...``.
        metrics: Numbers to log, each under its own name for every part of the graph and in total; None (null) for
            `lib_lightning.metrics.default_metrics`.
        labeller: Names features, such as `lib_lightning.labels.fourier.FourierLabels`.
        ablation: An AblationPlan: counts now and then how many edges the model needs for its score.
        follow: Whether features are followed from snapshot to snapshot, and what emerges is noticed.
        on_event: A function, or several, to call with each `lib_lightning.lineage.Event`, on every process.
        adaptive: Take snapshots four times as often for a while after a feature or a metric has changed.
        max_overhead: Share of the training time that all of this may cost: a snapshot that is due too early is left
            out, and where that would be most of them, all take fewer samples, or probes. The first and the last one are
            always taken. None (null) is 0.03 for the default schedule, none for any that is given; .inf is no limit.

    Raises:
        LIBError: If the node layers are a list of less than two.
        ValueError: If another setting is outside its range.

    Example:
        >>> callback = LIBCallback(node_layers=["fc1:input", "fc2:input", "output"], log_spaced=10)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        node_layers: Sequence[str | NodeLayer] | None = None,
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
        mask: str | int | MaskFn | None = None,
        dataloader: Iterable[Any] | None = None,
        val_dataloader: int = 0,
        memory_limit: float = MEMORY_LIMIT,
        name: str = "lib",
        final_metric: FinalMetric | None = None,
        baselines: Sequence[BasisKind] = (),
        metrics: MetricCollection | None = None,
        labeller: Labeller | None = None,
        ablation: AblationPlan | None = None,
        follow: bool = True,
        on_event: Hook | list[Hook] | None = None,
        adaptive: bool = False,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__()
        num_samples, val_dataloader = int(num_samples), int(val_dataloader)
        settings = LIBConfig(basis, final_basis, rtol, n_probes, integration_steps, final_metric)
        watched = SnapshotConfig(settings, tuple(baselines), metrics, labeller, ablation, memory_limit, follow)
        self.watcher = SnapshotComputer(watched, name)
        self.report = SnapshotReporter(self.watcher, [on_event] if callable(on_event) else on_event or [])
        if adaptive and not follow:
            raise ValueError("adaptive=True waits for events, and without follow=True there are none.")
        self.adaptive = adaptive
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is 'float32', 'float64' or None for the model's own; got {dtype!r}.")
        self.dtype = _DTYPES[dtype]
        self.input_fn, self.mask = input_fn, mask
        self.name = name
        self._layers = NodeLayerResolver(node_layers, name, ModelSpec(input_fn, mask, self.dtype), self.watcher.reset)
        self.schedule = Schedule(every_n_validations, every_n_steps, at_steps, log_spaced)
        self.budget = SnapshotTrigger(max_overhead, self.schedule, self.watcher, num_samples)
        scored = None if ablation is None else ablation.val_dataloader
        self.samples = SampleStore(num_samples, dataloader, val_dataloader, ablation is not None, scored)
        self._reset()

    def _reset(self) -> None:
        self.schedule.reset()
        self.samples.reset()
        self._layers.reset()
        self._graph_step: int | None = None
        self._tried_step: int | None = None
        self._looked_at_training = False
        self.report.reset()
        self.budget.reset()
        self._process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def node_layers(self) -> list[NodeLayer] | None:
        """The node layers; None as long as they are to be proposed."""
        return self._layers.layers

    @property
    def graph(self) -> InteractionGraph | None:
        """The newest graph; those of baselines are in ``watcher.graphs``."""
        return self.watcher.graphs.get(self.name)

    @property
    def snapshots(self) -> int:
        """Number of snapshots taken."""
        return self.watcher.snapshots

    @property
    def state_key(self) -> str:
        """Tells several callbacks apart in a checkpoint; the trainer refuses two of one name."""
        return self._generate_state_key(name=self.name)

    # before training: find mistakes while it is cheap

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh: the callback may have served another run. A checkpoint's state is loaded after this."""
        if stage in ("fit", "validate"):
            self._reset()

    @timed_hook
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check names, now that the model is all there (it may be built in its own setup or configure_model)."""
        check_strategy(trainer, self.dtype)
        self._layers.check_names(pl_module)
        self._start(trainer)

    def _start(self, trainer: pl.Trainer) -> None:
        # All processes have to ask together, so this is done in hooks that all of them run.
        self.report.start(trainer)
        self._process_group = process_group_of(trainer)
        self.samples.start(trainer, self._process_group, self.report.folder.main)

    @timed_hook
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there will be samples, and take the snapshot before training if one is due."""
        self.budget.begin(trainer.global_step)
        self.samples.prepare(trainer, partial(self._layers.check, pl_module))
        self._snapshot_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Without a sanity check, look for mistakes on the first training batch instead."""
        if not self._looked_at_training:
            self._looked_at_training = True
            with self.budget.overhead.own():  # not of every step: that would cost more than it counts
                self._layers.check(pl_module, batch, strict=False)

    # validation: collect, compute, log

    @timed_hook
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples kept from the sanity check may be few: collect them anew from the first whole validation."""
        if trainer.state.fn != "fit":
            self._graph_step = self._tried_step = None  # a checkpoint's state is that of training
            self._start(trainer)
            self.samples.collect(trainer, partial(self._layers.check, pl_module))
        self.samples.new_pass()

    @timed_hook
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a copy of the batch."""
        self.samples.see(trainer, batch, dataloader_idx, partial(self._layers.check, pl_module))

    @timed_hook
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot if one is due, and log the current numbers in any case."""
        self.samples.end_pass(trainer.sanity_checking)
        if not trainer.sanity_checking:
            self._at_validation(trainer, pl_module)

    @timed_hook
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where there is no validation, do here what is done at its end."""
        if not has_validation(trainer):
            self.samples.end_pass(sanity_check=False)
            self._at_validation(trainer, pl_module)

    def _at_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.schedule.due_at_validation(trainer.global_step) if trainer.state.fn == "fit" else True
        if due or self.schedule.due_at_step(trainer.global_step) or self._graph_step is None:
            self._snapshot(trainer, pl_module)
        numbers = self.report.news(self._numbers(trainer), self._graph_step)
        pl_module.log_dict(numbers, on_step=False, on_epoch=True, batch_size=1, sync_dist=self._process_group.size > 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due at this step."""
        self._snapshot_if_due(trainer, pl_module)

    @timed_hook
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last snapshot, write it as ``final.safetensors``, and say where everything is."""
        if self._snapshot(trainer, pl_module, last=True):
            self.report.log(trainer, self._numbers(trainer))
        self.report.finish(trainer, self._graph_step, self._layers.names)
        self.budget.finish()

    def _snapshot_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.samples.known and self.schedule.due_at_step(trainer.global_step):
            with self.budget.overhead.own():
                if self._snapshot(trainer, pl_module):
                    self.report.log(trainer, self._numbers(trainer))

    def _snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, last: bool = False) -> bool:
        """Take a snapshot, unless this step has had its try or it costs too much; tell whether there is a new one."""
        step, asks = trainer.global_step, trainer.state.fn == "fit" and not last
        if self._tried_step == step or (
            asks and not self.budget.allows(step, self.samples.buffer, self._process_group)
        ):
            return False
        self._tried_step = step
        with self.budget.snapshot(trainer, last):
            return self._try(trainer, pl_module, step, last)

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, last: bool) -> bool:
        try:
            with self._process_group.sync_errors():
                taken = self._take(trainer, pl_module, step, last)
                self.report.write(trainer, taken, step)
        except Exception as error:
            self.report.failed(step, error)
            return False
        draw = self.watcher.draws(last or trainer.state.fn != "fit")
        self.watcher.accept(taken)
        self._graph_step = step
        if self.adaptive:
            # For all processes to be due at the same steps.
            changed = torch.tensor(any(event.kind in CHANGES for event in taken.events))
            if self._process_group.broadcast([changed])[0]:
                self.schedule.densify(step)
        self.report.tell(trainer, taken.events, draw)
        return True

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, last: bool) -> Snapshot:
        instrumented = self._layers.instrument(pl_module, self._process_group)
        distance = self.schedule.distance(self._graph_step, step, self.budget.left_out)

        def take() -> Snapshot:
            when = {"step": step, "epoch": trainer.current_epoch, **self.budget.extent.chosen}
            samples = self.samples.for_snapshot(trainer, self.budget.extent.part)
            taken = self.watcher.take(instrumented, samples, self._process_group, when, last, distance)
            self.budget.extent.look(taken, instrumented, samples.batches, self._process_group)
            return taken

        with isolated_forward(trainer, pl_module, self.dtype):
            taken = self.budget.take(take, step, self.samples.buffer, self._process_group)
        self.report.notes(taken)
        return taken

    def _numbers(self, trainer: pl.Trainer) -> dict[str, float]:
        return self.report.numbers(trainer, self._graph_step) | self.budget.numbers(trainer, self._process_group)

    @timed_hook
    def state_dict(self) -> dict[str, Any]:
        """State that travels in Lightning's checkpoints: plain numbers and strings only."""
        return {
            "schedule": self.schedule.state_dict(),
            "watcher": self.watcher.state_dict(),
            "graph_step": self._graph_step,
            "samples": self.samples.state_dict(),
            "report": self.report.state_dict(),
            "proposed_layers": self._layers.state_dict(),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._layers.load_state_dict(state_dict["proposed_layers"])
        self.schedule.load_state_dict(state_dict["schedule"])
        self.samples.load_state_dict(state_dict["samples"])
        self.report.load_state_dict(state_dict["report"])
        if self.watcher.load_state_dict(state_dict["watcher"]):  # else it was of other node layers
            self._graph_step = self._tried_step = state_dict["graph_step"]
            self.budget.load_state_dict(state_dict["budget"])
