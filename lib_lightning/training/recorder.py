"""Computes the snapshots of a run and makes them part of it, in a training as well as along its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import CAUSAL, STEP
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import PNG
from lib_lightning.training.budget import SnapshotKind
from lib_lightning.training.renderings import RunRenderings
from lib_lightning.training.reporter import SnapshotReporter
from lib_lightning.training.run_state import RunState
from lib_lightning.training.snapshot import Previous, Snapshot, SnapshotComputer, SnapshotData


@dataclass
class SnapshotRecorder:
    """Takes the snapshots of one run: computes them, and makes those that have been written part of it.

    Args:
        computer: Computes a snapshot.
        state: The state of the run; updated.
        reporter: Writes and announces snapshots.
        renderings: Renders the samples that snapshots mention.
        process_group: The processes of the run.
    """

    computer: SnapshotComputer
    state: RunState
    reporter: SnapshotReporter
    renderings: RunRenderings
    process_group: ProcessGroup = SINGLE_PROCESS

    def compute(
        self,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        metadata: Mapping[str, Any],
        kind: SnapshotKind,
        interval: float = 1.0,
    ) -> Snapshot:
        """Compute a snapshot, which is not part of the run yet.

        Args:
            instrumented: The model and its node layers.
            data: The samples.
            metadata: What to note in the graphs.
            kind: What the snapshot includes.
            interval: Distance from the latest snapshot, in regular intervals.

        Returns:
            The snapshot.
        """
        before = self.state.before(metadata[STEP])
        previous = Previous(before.scalars, before.tracker, interval)
        snapshot = self.computer.compute(
            instrumented, data, metadata, previous, kind.ablation, self.process_group, self.state.plan, kind.causal
        )  # fmt: skip
        self.renderings.update(instrumented, snapshot.batches, snapshot.graphs, self.process_group)
        self.reporter.log_notes(snapshot.graphs)
        self.reporter.log_limits(snapshot.graphs[self.computer.name])
        self.reporter.log_weights(metadata)
        return snapshot

    def commit(
        self, snapshot: Snapshot, figures: Mapping[str, PNG], layouts: Mapping[str, AnimatedLayout], draws: bool
    ) -> None:
        """Make a snapshot that has been written part of the run, and announce it.

        Args:
            snapshot: The snapshot.
            figures: Its figures by tag.
            layouts: Where its features have been drawn.
            draws: Whether to draw the figures over the whole run.
        """
        known = list(self.state.events)  # where the last snapshot is taken once more
        self.state.commit(snapshot, layouts)
        self.reporter.show(figures, snapshot.step)
        self.reporter.notify([event for event in snapshot.events if event not in known])
        if draws:
            self.reporter.draw_run()
            self.state.mark_drawn()

    def is_complete(self, graph: InteractionGraph, counts: bool) -> bool:
        """Whether the last snapshot has all that it can have; see `complete`."""
        return not ((counts and CAUSAL not in graph.info) or self.computer.lacks_effects(graph, self.state.plan))

    def complete(
        self, graph: InteractionGraph, instrumented: InstrumentedModel, data: SnapshotData, counts: bool
    ) -> dict[str, float]:
        """Give the last snapshot what takes too long for each of many; its file is then written again.

        Args:
            graph: Its graph in the basis itself; changed.
            instrumented: The model and its node layers.
            data: The samples.
            counts: Whether to count the features that matter, unless that has been done.

        Returns:
            Scalars by name; none if no labels are known, or nothing was counted.
        """
        arguments = (graph, instrumented, data, self.state.plan, self.process_group)
        has_changed, counts = self.computer.complete(*arguments), counts and CAUSAL not in graph.info
        found = self.computer.count_causal(*arguments) if counts else {}
        if has_changed or found:
            self.renderings.name_outputs(graph)
            self.reporter.log_notes({self.computer.name: graph})
            self.reporter.write_again(graph, graph.info[STEP])
        if counts:
            self.state.set_causal(found)
        return found
