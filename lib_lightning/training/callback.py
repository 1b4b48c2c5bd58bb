"""The callback: translates Lightning's events to the objects of a run, and computes nothing itself."""

from __future__ import annotations

import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lib_lightning.ablation import AblationPlan
from lib_lightning.algorithm.config import BasisKind, FinalBasisKind, FinalMetric, LIBConfig, MetricKind, check_choice
from lib_lightning.algorithm.effort import Effort
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.algorithm.progress_bar import displayed_in
from lib_lightning.api import basis_and_dictionaries, refuse_integration
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import ComputationStopped, SettingError, check_bool, check_list, check_number
from lib_lightning.features.renderers import Renderer
from lib_lightning.graph import InteractionGraph
from lib_lightning.interventions.plan import CausalPlan
from lib_lightning.io.basis_format import EPOCH, LOGGING_STEP, STEP, WEIGHTS, WEIGHTS_HASH
from lib_lightning.io.run_layout import check_run_name, overlapping_names
from lib_lightning.labels.example_labels import ExampleLabels
from lib_lightning.labels.labeller import Labeller, ScoringLabeller
from lib_lightning.lineage.events import CHANGES
from lib_lightning.lineage.reference import NUM_REFERENCE_VALUES
from lib_lightning.model.batch import is_empty
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.node_layer import NodeLayer, as_node_layers
from lib_lightning.model.output_distribution import OutputSetting
from lib_lightning.model.preserve import copied_bytes
from lib_lightning.model.safe_points import signals_at_safe_points
from lib_lightning.model.skip_positions import SkipPositions
from lib_lightning.model.weights_hash import weights_hash
from lib_lightning.training.budget import (
    Pace,
    SnapshotKind,
    SnapshotTrigger,
    TimeMeter,
    max_overhead_of,
    other_meters,
    timed_hook,
)
from lib_lightning.training.effort import (
    PlanResult,
    PlanSettings,
    RunPlan,
    RunPlanner,
    agree,
    training_steps,
    validation_samples,
)
from lib_lightning.training.frameworks import Callback, callback_of_both_packages, rank_zero_info
from lib_lightning.training.node_layers import NodeLayerResolver
from lib_lightning.training.recorder import SnapshotRecorder
from lib_lightning.training.renderings import RenderingConfig, RunRenderings
from lib_lightning.training.reporter import EventHook, RunDestination, SnapshotReporter
from lib_lightning.training.run_state import RunState
from lib_lightning.training.samples import AT_LEAST_TWO, NUM_REFERENCE_SAMPLES, SampleConfig, SampleStore
from lib_lightning.training.schedule import FEWEST, Schedule
from lib_lightning.training.snapshot import (
    Snapshot,
    SnapshotComputer,
    SnapshotConfig,
    SnapshotData,
    labelled_samples,
)
from lib_lightning.training.snapshot_bar import SnapshotBar
from lib_lightning.training.tensorboard_layout import add_layout
from lib_lightning.training.trainer import (
    call_again_last,
    check_strategy,
    has_received_sigterm,
    has_validation,
    logging_step,
    may_validate_next,
    on_training_device,
    process_group_of,
    remove_duplicates,
    sigterm_exception,
    synchronize,
    trainer_precision,
)
from lib_lightning.training.weights import TrainedWeights
from lib_lightning.training.writer import KeepSnapshots, check_keep

if TYPE_CHECKING:
    import lightning.pytorch as pl

# All callbacks, in the order of their creation.
_created: weakref.WeakSet[LIBCallback] = weakref.WeakSet()
_numbers = itertools.count(1)
log = logging.getLogger(__name__)

# Number of samples, unless the user or the choice of effort says otherwise.
_MAX_SAMPLES = 2048
_DTYPES: dict[object, torch.dtype | None] = {
    None: None,
    **dict.fromkeys(("float32", torch.float32), torch.float32),
    **dict.fromkeys(("float64", torch.float64), torch.float64),
}


@callback_of_both_packages
class LIBCallback(Callback):
    """Computes snapshots of the Local Interaction Basis of a model in training, to watch its features form.

    A snapshot is computed on a fixed set of validation samples. Its numbers of features and edges are logged as
    ``lib/...`` at every validation, so that other callbacks can monitor them; the interaction graph is shown as
    ``lib/graph``; a basis file and the figure are written to ``<log dir>/lib``. Training is bit-identical to a run
    without the callback, and a snapshot that fails is reported and skipped. (If the very first one fails, the scalars
    are NaN until the next: give an EarlyStopping on them ``check_finite=False``.)

    Args:
        node_layers: Where to cut the model, in forward order: ``module.path`` for a module's output,
            ``module.path:input`` for its input, ``input`` and ``output`` for the model's own, or a NodeLayer. Paths
            start at the LightningModule. None (null) uses proposed ones and logs which; see `list_node_layers`.
        num_samples: Number of validation samples to compute on, over all processes, the same throughout the run: the
            first ones of the validation data. They are read before the first step, which changes nothing in training;
            where that is impossible, snapshots before the first validation use those of the sanity check, and the log
            says so. None (null) for 2048 at most; see effort. A labeller that scores its labels looks at four times as
            many.
        every_n_validations: A snapshot at the first validation and at every n-th one after it. Without any schedule,
            there are up to 20 snapshots from step 0 to the end, log-spaced, and at least 5; in a training of unknown
            length one before training and one at every validation.
        every_n_steps: Instead, a snapshot before training and after every n optimizer steps.
        at_steps: Instead, a snapshot after each of these numbers of optimizer steps; 0 is before training.
        log_spaced: Instead, a snapshot before training and this many per tenfold increase of the step.
        basis: lib, or the baselines pca and neuron, or another rotation of the same whitened activations: random, ica,
            dictionary or varimax; see `lib_lightning.compute_interaction_graph`.
        final_basis: Basis of the last node layer: neuron, pca, centered for logits less their mean over the classes,
            or auto for neurons at the model's output and PCA anywhere else.
        rtol: Directions whose metric or importance (PCA: variance) is below this fraction of the largest are dropped; 0
            drops only directions that are zero up to rounding.
        n_probes: None (null) for the exact metric; a number for that many random-sign probes per sample.
        integration_steps: 0 takes gradients at the activations; a number averages them over that many points on the
            straight path from the mean.
        dtype: Floating-point type to compute in; None (null) for the model's own.
        input_fn: Converts a validation batch to the model's input: a dict becomes keyword arguments, a tuple
            positional ones. None (null) calls the model as its own validation_step does, or else training_step or
            predict_step; the log says how.
        mask: Marks the valid positions where some are padding: the name or index of the batch's entry that holds the
            mask, such as attention_mask, or a function from a batch to a tensor ``(n, S)``.
        dataloader: Batches to compute on instead of validation batches. A trainer without validation takes training
            batches otherwise; there, the end of a training epoch counts as a validation.
        val_dataloader: Index of the validation data loader to compute on, where there are several.
        memory_limit: Memory that a snapshot may use beside model and samples, in GiB.
        name: Prefix of everything logged and name of the folder, in the log directory. Several LIBCallbacks of a
            trainer need different names.
        final_metric: fisher measures the last node layer by what the model's output predicts, so that importance there
            means effect on the prediction.
        baselines: Other bases, such as pca, neuron and random, to compute on the same samples. Their scalars are logged
            as ``pca/...``, and the ratios of all totals as ``lib_over_pca/...``. Each further random, ica or dictionary
            is another draw: ``random_2/...``.
        metrics: Metrics to log, each under its own name for every part of the graph and in total; None (null) for
            `lib_lightning.metrics.default_metrics`.
        labeller: Names features: `lib_lightning.labels.ExampleLabels` by what the places have in common where they are
            most active, `lib_lightning.labels.FourierLabels` by frequencies, or a function. Where it, a metric or a
            score raises an error, the snapshot goes on without its result, and that is logged once.
        ablation: An AblationPlan: counts at some snapshots how many edges the model needs for its score.
        follow: Whether features are tracked from snapshot to snapshot, and changes are reported.
        on_event: A function, or several, to call with each `lib_lightning.lineage.Event`, on every process.
        adaptive: Take snapshots four times as often for a while after a feature or a metric has changed.
        max_overhead: Largest ratio of the time spent here to the training time: snapshots are planned by it, and those
            that would still exceed it are skipped. The first and the last one are always computed. None (null) is 0.03
            for the default schedule, with five snapshots at least, and no limit for any other; .inf is no limit.
        n_pushed: None (null) for exact edges; a number for that many features that each sample is pushed forward for,
            chosen at random, important ones more often.
        keep_snapshots: Which basis files and figures of single snapshots stay on disk: all; a number for the latest; or
            log_spaced for the first, about ten per tenfold increase of the step, and the latest.
        effort: auto chooses num_samples, n_probes and n_pushed, where they are None, once for all snapshots: exact if
            that fits into the snapshots' share of the training (max_overhead, or 0.03), counted in operations, else
            fewer, and metric and edges of some of the samples; exact takes None as exact.
        skip_positions: Positions whose activations flow on as ever but are left out of all features, metrics, edges and
            ablations: 1 for the first one, as of language models, whose first token often has most of the variance; -1
            for the last one; a list of indices; a slice, such as slice(2, 10). Counted in each sample, among the valid
            ones if there is a mask. None (null) for none; a NodeLayer may have its own.
        metric: next measures a node layer by the features of the next one, as the paper does; output measures all of
            them by what the model's output predicts.
        output_distribution: What the output is: categorical for logits of classes or tokens, bernoulli for logits of
            yes-or-no answers, gaussian for numbers with a squared error. auto finds out by the loss of the step, the
            model's configuration or the labels; none leaves out importances for the output.
        renderer: How the samples look at which features are largest and smallest: one of `lib_lightning.features`, such
            as TokenRenderer, ImageRenderer, TableRenderer or SeriesRenderer, or a function of a Sample. None (null)
            takes a fitting one. Where it raises an error, that sample is shown without a picture.
        output_names: Names of the outputs, such as classes: a list; a dict by number; a configuration with id2label; a
            tokenizer. None (null) takes those of the model's configuration, or the tokens of the renderer.
        causal_every: Interval between snapshots that count the features that demonstrably matter: those that change a
            score when they are set to their mean, on samples that are held out, as ``lib/causal_features/...``. The
            first and the last one count them in any case. None (null) counts them once, in the last one, where labels
            are known, with as many features and samples as take about as long as the rest of its graph; 0 is never.
        causal_score: The score: a function from the model's output and a batch to one number for each sample, higher is
            better. None (null) is the log-likelihood of the labels that the loss of the step is computed with.
        basis_seed: Seed of the random rotation of basis random, the same in all snapshots, and of the one at which ica
            and dictionary start; and of the weights of the control. Training's random numbers are left alone.
        control: reinit computes once, with the first snapshot, the graph of a copy of the model with re-initialised
            weights, on the same samples: logged as the constant ``reinit/...``, and the ratios of all totals as
            ``lib_over_reinit/...``. None (null) for no control.
        dictionaries: Objects with ``encode`` and ``decode``, such as sparse autoencoders, by node layer, whose latents
            are the features there; see `lib_lightning.compute_interaction_graph`. Each snapshot takes the weights that
            they have by then, so that they may be trained beside the model.

    Raises:
        LIBError: If fewer than two node layers are given.
        SettingError: If another setting is outside its range.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = LIBCallback(node_layers=["fc1:input", "fc2:input", "output"], log_spaced=10)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    # Created at the start of each run.
    resolver: NodeLayerResolver
    trigger: SnapshotTrigger
    samples: SampleStore
    reporter: SnapshotReporter
    recorder: SnapshotRecorder

    def __init__(  # noqa: PLR0913 (a public entry)
        self,
        node_layers: Sequence[str | NodeLayer] | None = None,
        num_samples: int | None = None,
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
        labeller: Labeller | ScoringLabeller | None = None,
        ablation: AblationPlan | None = None,
        follow: bool = True,
        on_event: EventHook | list[EventHook] | None = None,
        adaptive: bool = False,
        max_overhead: float | None = None,
        n_pushed: int | None = None,
        effort: Effort = "auto",
        keep_snapshots: KeepSnapshots = "all",
        skip_positions: SkipPositions | None = None,
        metric: MetricKind = "next",
        output_distribution: OutputSetting = "auto",
        renderer: Renderer | None = None,
        output_names: Any = None,
        causal_every: int | bool | None = None,
        causal_score: Callable[[Any, Any], Tensor] | None = None,
        basis_seed: int = 0,
        control: Literal["reinit"] | None = None,
        dictionaries: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dtype, (str, torch.dtype, type(None))) or dtype not in _DTYPES:
            raise SettingError(f"dtype is 'float32', 'float64' or None for the model's own; got {dtype!r}.")
        check_bool("follow", follow)
        check_bool("adaptive", adaptive)
        if num_samples is not None:  # before it is multiplied
            check_number("num_samples", num_samples, lambda n: n >= 2, AT_LEAST_TWO, integer=True)
        if adaptive and not follow:
            raise SettingError("adaptive=True reacts to events, and without follow=True there are none.")
        check_run_name(name)
        check_choice("effort", effort, get_args(Effort))
        basis, dictionaries = basis_and_dictionaries(basis, dictionaries)
        refuse_integration(dictionaries, integration_steps)
        self._keep_snapshots = check_keep(keep_snapshots)
        self.name, self.adaptive = name, adaptive
        baselines = check_list("baselines", baselines, "bases, such as ['pca']", lambda kind: isinstance(kind, str))
        self.spec = ModelSpec(input_fn, mask, _DTYPES[dtype], skip_positions)
        if isinstance(labeller, ExampleLabels):
            labeller = labeller.with_defaults(renderer, output_names)
        self.config = SnapshotConfig(
            LIBConfig(
                basis, final_basis, rtol, n_probes, integration_steps, final_metric, n_pushed, metric,
                output_distribution, basis_seed=basis_seed,
            ),
            tuple(baselines), metrics, labeller, ablation, memory_limit, follow, effort == "auto",
            CausalPlan(0 if causal_every is False else causal_every, causal_score), control, dictionaries,
        )  # fmt: skip
        kept = _MAX_SAMPLES if num_samples is None else num_samples * labelled_samples(labeller)
        self.sample_config = SampleConfig(
            kept, dataloader, val_dataloader, ablation is not None or bool(causal_every),
            None if ablation is None else ablation.val_dataloader,
        )  # fmt: skip
        self._rendering_config = RenderingConfig(renderer, output_names)
        self.schedule = Schedule(every_n_validations, every_n_steps, at_steps, log_spaced)
        self.max_overhead = max_overhead_of(max_overhead, self.schedule.is_explicit)
        self._takes_fewest = max_overhead is None and not self.schedule.is_explicit
        self.computer = SnapshotComputer(self.config, name)
        self.clock = time.perf_counter
        self.effort, self._all_samples = effort, num_samples is not None
        asked = {"num_samples": num_samples, "n_probes": n_probes, "n_pushed": n_pushed}
        # int() accepts NumPy's numbers, which a checkpoint could not be loaded with.
        self._effort_options: dict[str, int | str | None] = {
            name: None if number is None else int(number) for name, number in asked.items()
        }
        self._effort_options["effort"] = effort
        self._given_layers = None if node_layers is None else as_node_layers(node_layers)
        hooks = [on_event] if callable(on_event) else on_event or []
        self._hooks = check_list("on_event", hooks, "functions of an event", callable)
        self._process_group: ProcessGroup = SINGLE_PROCESS
        self._is_in_trainer, self._number = False, next(_numbers)
        self._has_warned_of_test = False
        _created.add(self)
        self._begin()

    def _begin(self) -> None:
        self.state = RunState(
            self.computer.folders, self.config.ablation, self.config.follow, self.schedule, self.config.causal
        )  # fmt: skip
        self.meter = TimeMeter(self.max_overhead, self.clock, self.state.time)
        self._is_second_call = self._has_ended = False

    @property
    def node_layers(self) -> list[NodeLayer] | None:
        """The node layers; None as long as they are to be proposed."""
        if self._given_layers is not None:
            return self._given_layers
        return as_node_layers(self.state.node_layers) if self.state.node_layers else None

    @property
    def graph(self) -> InteractionGraph | None:
        """The latest graph."""
        return self.graphs.get(self.name)

    @property
    def graphs(self) -> dict[str, InteractionGraph]:
        """The graphs of the latest snapshot, by prefix: the basis itself, then baselines; and the control."""
        return self.state.graphs

    @property
    def snapshots(self) -> int:
        """Number of snapshots so far."""
        return self.state.n_snapshots

    @property
    def state_key(self) -> str:
        """Distinguishes several callbacks in a checkpoint, by their names."""
        # A trainer refuses two equal keys when it is created, in five lines without a word on names. So of several
        # callbacks of one name that have not been in a run, only the first has this key; `setup` refuses the others.
        waiting = [x._number for x in _created if x.name == self.name and not x._is_in_trainer]
        number = {} if self._is_in_trainer or self._number <= min(waiting, default=0) else {"number": self._number}
        return self._generate_state_key(name=self.name, **number)

    # Before training: create the objects of the run, and detect wrong settings early.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a new run. The state of a checkpoint is loaded after this, and before the next hook."""
        self._is_in_trainer = True
        _check_names(trainer)
        if stage in ("fit", "validate"):
            self._begin()
        every = [one for one in trainer.callbacks if isinstance(one, LIBCallback)]  # type: ignore[attr-defined]
        if stage == "fit" and every[0] is self:
            add_layout(trainer, {one.name: list(one.computer.folders) for one in every})

    @timed_hook
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the objects of the run, and check names, now that the model is complete."""
        check_strategy(trainer, self.spec.dtype)
        self._start(trainer)
        self.resolver.check_names(pl_module)

    def _start(self, trainer: pl.Trainer) -> None:
        """Create the objects of the run. Some of them communicate, so all processes call this at the same time."""
        self.start(
            RunDestination.of_trainer(trainer), process_group_of(trainer),
            partial(trainer_precision, trainer, self.spec.dtype),
        )  # fmt: skip
        state = self.state
        counts_at_end = self.config.causal.is_wanted and trainer.state.fn == "fit"
        self.trigger = SnapshotTrigger(self.meter, state.skipped, self.name, self.config.follow, counts_at_end)
        self.samples = SampleStore(
            self.sample_config, state.samples, trainer, self._process_group, self.reporter.layout
        )  # fmt: skip
        self._tried: tuple[int | None, str | None] = (state.step, state.weights_hash)
        self._has_left_out_ablation = False
        self._trained = TrainedWeights()
        self._bar = SnapshotBar(self.name)
        self._has_checked_training_batch = False

    def start(
        self,
        destination: RunDestination,
        process_group: ProcessGroup = SINGLE_PROCESS,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Create those objects of a run that need no trainer.

        Args:
            destination: Where the run is reported.
            process_group: The processes of the run.
            precision: Returns a block in which the model is run.
        """
        state, self._process_group = self.state, process_group
        self.resolver = NodeLayerResolver(
            self._given_layers, state.node_layers, self.name, self.spec.called_as(state.call),
            state.set_node_layers, state.set_call, precision,
        )  # fmt: skip
        self.reporter = SnapshotReporter(
            self.name, self._hooks, state, list(self.computer.folders), destination, self.config.follow,
            self._keep_snapshots,
        )  # fmt: skip
        layout = self.reporter.layout
        if layout is not None and not destination.is_validation:
            state.enter_folder(str(layout.path.resolve()))
        folders = self.reporter.directory.folders if destination.is_global_zero else {}
        files = {prefix: folder.layout.renderings_file for prefix, folder in folders.items()}
        renderings = RunRenderings(self._rendering_config, self.name, files, is_new=state.n_snapshots == 0)
        self.recorder = SnapshotRecorder(self.computer, state, self.reporter, renderings, process_group)
        self._has_tried = False

    @timed_hook
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that there will be samples, and take the snapshot before training if one is due."""
        self.meter.begin(other_meters(trainer, self))
        is_due_early = self.state.cursor.next_step is not None
        self.samples.prepare(trainer, partial(self._check, trainer, pl_module), is_due_early)
        if not self.state.cursor.planned:
            self._plan_steps(trainer, FEWEST)  # as many as there are in any case, until the plan says how many
        self._snapshot_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Without a sanity check, look for mistakes on the first training batch instead."""
        if not self._has_checked_training_batch:
            self._has_checked_training_batch = True
            with self.meter.timed():  # not around every step: that would cost more than it measures
                self._check(trainer, pl_module, batch, strict=False)

    def _check(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, strict: bool = True
    ) -> BatchLayout:
        """Check the node layers on a batch; end the training there if SIGTERM has come, as the trainer would later."""
        try:
            with signals_at_safe_points(partial(has_received_sigterm, trainer)):
                return self.check(pl_module, batch, strict, self._has_checked_training_batch)
        except ComputationStopped:
            raise sigterm_exception(trainer) from None

    def check(self, model: nn.Module, batch: Any, strict: bool = True, is_late: bool = False) -> BatchLayout:
        """Check settings on a first batch.

        Args:
            model: The model.
            batch: The batch.
            strict: Whether it is one of the batches that snapshots are computed on; others may be of another form.
            is_late: Whether training has begun, from when on nothing stops the run.

        Returns:
            Which parts of the batch have one entry for each sample.

        Raises:
            LIBError: If the model cannot be called, or a setting does not fit the samples.
        """
        layout = self.resolver.check(model, batch, strict)
        if not (strict and is_late):
            self.recorder.renderings.check(InstrumentedModel(model, [], self.resolver.spec), batch)
        score = self.config.causal.score
        if strict and not self._has_tried and not is_late and not is_empty(batch):
            self._has_tried = True
            self.resolver.check_dictionaries(model, batch, self.config.dictionaries)
            if score is not None:
                self.resolver.check_score(model, batch, score)
        elif not strict and not self._has_tried:
            self.resolver.check_dictionaries(model, batch, self.config.dictionaries, strict=False)
        return layout

    # Validation: collect samples, compute snapshots, log scalars.

    @timed_hook
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start collecting samples."""
        if trainer.state.fn != "fit":
            self.state.forget_step()
            self._start(trainer)
            self.samples.collect_own(trainer, partial(self._check, trainer, pl_module))
        self.samples.start_validation()

    @timed_hook
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a copy of the batch."""
        self.samples.observe(trainer, batch, dataloader_idx, partial(self._check, trainer, pl_module))

    @timed_hook
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot if one is due, and log the latest scalars in any case.

        Where another callback has put other weights in place for validation, which it takes back in this hook, the
        snapshot is taken after that.
        """
        if self._is_second_call:
            self._end_second_call(trainer)
        else:
            self.samples.end_validation(trainer.sanity_checking)
            if trainer.sanity_checking or self._is_called_again(trainer, pl_module):
                return
        self._at_validation(trainer, pl_module)

    def _is_called_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        is_replaced = self._trained.are_replaced(trainer.global_step, pl_module)
        self._is_second_call = is_replaced and call_again_last(trainer, self)
        return self._is_second_call

    def _end_second_call(self, trainer: pl.Trainer) -> None:
        self._is_second_call = False
        remove_duplicates(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer's list of callbacks as it was."""
        if self._is_second_call:
            self._end_second_call(trainer)

    @timed_hook
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without validation, the end of an epoch takes its place."""
        # A callback that comes after this one may have ended the epoch at a step that was not expected to be its last.
        self._trained.note_if_unknown(trainer.global_step, pl_module)
        if not has_validation(trainer):
            self.samples.end_validation(is_sanity_check=False)
            self._at_validation(trainer, pl_module)

    def _at_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.state.cursor.due_at_validation(trainer.global_step) if trainer.state.fn == "fit" else True
        if due or self.state.cursor.due_at_step(trainer.global_step) or self.state.step is None:
            self._snapshot(trainer, pl_module)
        keys = self.computer.scalar_keys(self.resolver.names)
        scalars = self.reporter.changed_metrics(self._scalars(trainer), keys)
        pl_module.log_dict(
            scalars, on_step=False, on_epoch=True, batch_size=1, sync_dist=self._process_group.size > 1
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due at this step."""
        self._snapshot_if_due(trainer, pl_module)
        if may_validate_next(trainer, batch_idx):
            with self.meter.timed():
                self._trained.note(trainer.global_step, pl_module)

    @timed_hook
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last snapshot, write it as ``final.safetensors``, and log where everything is.

        In this hook, callbacks that average weights put the averages into the model. After all others have been called
        (except checkpoints, which hold the state of this one), the snapshot is taken again if the weights have changed.
        """
        self._take_last(trainer, pl_module)
        if self._is_second_call:
            self._end_second_call(trainer)
        elif call_again_last(trainer, self):
            self._is_second_call = True
            return
        self._complete_last(trainer, pl_module)
        result = self.reporter.finish(trainer.global_step)
        self.meter.end()
        self.trigger.log_summary(self.state.n_snapshots)
        self.reporter.say(result)
        self._has_ended = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that a test computes no snapshots, where there are none of a training either."""
        if not self.snapshots and not self._has_warned_of_test and trainer.is_global_zero:
            self._has_warned_of_test = True
            log.warning("%s: a test computes no snapshots; trainer.fit and trainer.validate do.", self.name)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the last snapshot again if the weights have changed since, such as in the model's own hooks."""
        if self._has_ended and weights_hash(pl_module) != self._tried[1]:
            with on_training_device(trainer, pl_module):
                self._take_last(trainer, pl_module)
                self._complete_last(trainer, pl_module)
                self.reporter.say(self.reporter.finish(trainer.global_step))
        self._has_ended = False

    def _take_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._snapshot(trainer, pl_module, is_last=True):
            self.reporter.log_scalars(self._scalars(trainer), logging_step(trainer))

    def _complete_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the last snapshot, whenever that was taken, what takes too long for each of many."""
        graph, counts = self.graph, self.config.causal.is_wanted
        is_there = graph is not None and self.state.step == trainer.global_step
        if graph is None or not is_there or self.recorder.is_complete(graph, counts):
            return
        try:
            with self._process_group.sync_errors(), signals_at_safe_points(partial(has_received_sigterm, trainer)):
                instrumented = self.resolver.instrument(pl_module, self._process_group)
                data = self.samples.for_snapshot(trainer)
                copied = instrumented.shared_copy(copied_bytes(self.config.memory_limit))
                with trainer_precision(trainer, self.spec.dtype), copied:
                    found = self.recorder.complete(graph, instrumented, data, counts)
        except ComputationStopped:
            return
        except Exception as error:
            self.reporter.log_failure(trainer.global_step, error)
            return
        if found:
            self.reporter.log_scalars(found, logging_step(trainer))

    def _snapshot_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.samples.is_ready and self.state.cursor.due_at_step(trainer.global_step):
            with self.meter.timed():
                if self._snapshot(trainer, pl_module):
                    self.reporter.log_scalars(self._scalars(trainer), logging_step(trainer))

    def _snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_last: bool = False) -> bool:
        """Take a snapshot, unless one was tried at this step or it would cost too much; return whether it succeeded.

        The last one belongs to the final weights: it is only skipped if all of it has been tried with these.
        """
        step, in_fit = trainer.global_step, trainer.state.fn == "fit"
        if self.samples.has_given_up or (self._tried[0] == step and not is_last):
            return False
        # Where several optimizers step, there are more steps than expected.
        is_at_end = is_last or (in_fit and step == training_steps(trainer))
        if in_fit and not is_last:
            kind, pace = self.state.next_kind(False, is_at_end), self._pace(trainer)
            if not self.trigger.can_take(step, kind, self._process_group, pace, self._takes_fewest):
                return False
        with self.meter.excluded():
            synchronize(trainer)
        weights = weights_hash(pl_module)
        if is_last and not self._on_any_process(self._tried != (step, weights) or self._has_left_out_ablation):
            return False
        metadata: dict[str, Any] = {
            STEP: step,
            LOGGING_STEP: logging_step(trainer),
            EPOCH: trainer.current_epoch,
            WEIGHTS_HASH: weights,
        }
        if in_fit:
            metadata[WEIGHTS] = self._trained.status(step, weights, is_last)
        kind = self.state.next_kind(is_last, is_at_end)
        self._tried = (step, weights)
        self._has_left_out_ablation = self.config.ablation is not None and not kind.ablation
        with self.trigger.measure(step, kind):
            succeeded = self._try_snapshot(trainer, pl_module, kind, metadata)
        self.trigger.on_result(kind, succeeded)
        return succeeded

    def _pace(self, trainer: pl.Trainer) -> Pace | None:
        """How far the run is, if its snapshots have been planned until the end of the training."""
        cursor, steps = self.state.cursor, training_steps(trainer)
        due = cursor.share_due(trainer.global_step)
        if due is None or not math.isfinite(steps):
            return None
        return Pace(min(1.0, trainer.global_step / max(1.0, steps)), due, len(cursor.planned))

    def _on_any_process(self, condition: bool) -> bool:
        # Of sharded weights, each process sees its own.
        return any(bool(t) for t in self._process_group.gather(torch.tensor([condition], device="cpu")))

    def _try_snapshot(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: SnapshotKind, metadata: dict[str, Any]
    ) -> bool:
        """Compute a snapshot, write it and make it part of the run; or log why that failed."""
        try:
            with self._process_group.sync_errors(), signals_at_safe_points(partial(has_received_sigterm, trainer)):
                with displayed_in(self._bar.of(trainer)):
                    snapshot = self._compute(trainer, pl_module, kind, metadata)
                figures, layouts = self.reporter.write(snapshot)
        except ComputationStopped:  # Lightning ends the training after this hook
            log.warning("%s: the snapshot after %d steps was dropped: SIGTERM.", self.name, trainer.global_step)
            return False
        except Exception as error:
            self.reporter.log_failure(trainer.global_step, error)
            return False
        self.recorder.commit(snapshot, figures, layouts, kind.figures or trainer.state.fn != "fit")
        if self.adaptive:
            # All processes have to take their snapshots at the same steps.
            has_changed = torch.tensor(any(event.kind in CHANGES for event in snapshot.events), device="cpu")
            if self._process_group.broadcast([has_changed])[0]:
                self.state.cursor.densify(snapshot.step)
        return True

    def _compute(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: SnapshotKind, metadata: dict[str, Any]
    ) -> Snapshot:
        instrumented = self.resolver.instrument(pl_module, self._process_group)
        before = self.state.before(metadata[STEP]).step
        interval = self.state.cursor.relative_interval(before, metadata[STEP], self.trigger.skipped.since_last)
        data = self.samples.for_snapshot(trainer)
        with trainer_precision(trainer, self.spec.dtype):
            # A resumed run may ask for another number of samples or probes than the interrupted one.
            if self.state.planned_for != self._effort_options:
                self.state.set_plan(self._plan(trainer, instrumented, data), self._effort_options)
            return self.recorder.compute(instrumented, data, metadata, kind, interval)

    def _plan(self, trainer: pl.Trainer, instrumented: InstrumentedModel, data: SnapshotData) -> RunPlan | None:
        """Choose once what every snapshot computes, and when; called by all processes at the same time."""
        own = torch.tensor([sum(map(instrumented.num_samples, data.batches))], device="cpu")
        counts = self._process_group.gather(own)  # by all processes, also those without samples
        expected: float = sum(int(n) for n in counts)
        if not self.samples.buffer.is_frozen:  # the whole validation is still to come
            size = instrumented.num_samples(data.batches[0]) if data.batches else 0
            expected = min(self.sample_config.num_samples, validation_samples(trainer, size) or math.inf)
        elif self._all_samples and expected < int(self._effort_options["num_samples"] or 0):
            rank_zero_info(
                f"{self.name}: num_samples={self._effort_options['num_samples']:,} is more than there are: snapshots "
                f"use all {expected:,.0f}."
            )
        planner = RunPlanner(trainer, self.schedule, self.max_overhead, len(self.computer.prefixes))
        plan, warnings = None, list[str]()
        if data.batches:
            found = planner.plan(instrumented, data.batches[0], self.plan_settings(int(expected)))
            plan, warnings = found.plan, found.warnings
            if trainer.is_global_zero and found.plan.snapshots is not None:
                self.reporter.check_space(found.plan.snapshots, self.file_bytes(found))
        plan = agree(plan, self._process_group)
        if plan is not None:
            if self.state.plan is None and plan.snapshots is not None:
                self._plan_steps(trainer, plan.snapshots)
            rank_zero_info(f"{self.name}: {planner.describe(plan, self.config.ablation is not None)}")
        for warning in warnings:
            log.warning("%s: %s", self.name, warning)
        return plan

    def plan_settings(self, available: int) -> PlanSettings:
        """What the user has asked for, as far as it decides how much a snapshot computes.

        Args:
            available: Number of samples that there are.

        Returns:
            The settings.
        """
        given = {name: value for name, value in self._effort_options.items() if value is not None}
        config = self.config
        reference = min(NUM_REFERENCE_SAMPLES, available) if config.follow else 0
        if self._all_samples:  # a labeller may look at more
            available = min(available, int(given["num_samples"]))
        counts_at_end = config.causal.every is None
        return PlanSettings(
            config.config, available, given, config.memory_limit, config.may_choose, counts_at_end, reference,
            config.dictionaries,
        )  # fmt: skip

    def file_bytes(self, result: PlanResult) -> int:
        """About the size of the file of a snapshot.

        Args:
            result: What it computes.

        Returns:
            The size, in bytes.
        """
        # Values of all features, as half-precision numbers.
        followed = 2 * NUM_REFERENCE_VALUES * sum(result.num_features) if self.config.follow else 0
        return result.file_bytes + followed

    def _plan_steps(self, trainer: pl.Trainer, snapshots: int) -> None:
        """Plan the steps of the snapshots, unless the user has given a schedule, or the length is unknown."""
        steps = training_steps(trainer)
        if not self.schedule.is_explicit and math.isfinite(steps) and steps >= 1:
            self.state.cursor.plan(snapshots, int(steps))

    def _scalars(self, trainer: pl.Trainer) -> dict[str, float]:
        """The latest scalars; called by all processes at the same time."""
        keys = self.computer.scalar_keys(self.resolver.names) if self.resolver.names else []
        scalars = self.reporter.scalars(trainer.global_step, keys, self.config.ablation is not None)
        if trainer.state.fn == "fit":
            (ratio,) = self._process_group.broadcast(
                [torch.tensor(self.meter.ratio, dtype=torch.float64, device="cpu")]
            )
            scalars[f"{self.name}/overhead"] = float(ratio)
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, for Lightning's checkpoints: plain values and tensors only."""
        if hasattr(self, "samples"):  # not in a callback that has not been in a run
            with self.meter.timed():
                self.samples.save()
        return self.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, also from one of version 0.1."""
        given = None if self._given_layers is None else [layer.name for layer in self._given_layers]
        self.state.load_state_dict(state_dict, given, self.computer.scalar_keys)
        self.meter = TimeMeter(self.max_overhead, self.clock, self.state.time)


def _check_names(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would write to the same folder, or log under the same prefix."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    prefixes = [prefix for one in callbacks if isinstance(one, LIBCallback) for prefix in one.computer.folders]
    if found := overlapping_names(prefixes):
        which = (
            f"would both write to '{found[0]}'"
            if len(set(found)) == 1
            else "would write to '{}' and '{}'".format(*found)
        )
        raise SettingError(f"Two LIBCallbacks of this trainer {which}: give each a name=, such as name='lib_2'.")
