"""How much a run's snapshots are computed on: on all samples, on a part of them, or with probes, as time allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.features import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import is_empty, slice_batch
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.training.sample_buffer import SampleBuffer
from lib_lightning.training.schedule import Schedule
from lib_lightning.training.snapshot import Snapshot, SnapshotComputer
from lib_lightning.training.time_meter import TimeMeter

# So many due snapshots for each one taken are thinned by spacing alone. Beyond, snapshots are made cheaper, once in a
# run: down to a part of the samples, but not to so few that importances would be unsure, and to probes where the exact
# metric goes through many times as many outputs. Nobody knows what the first one will cost, so it is tried on that
# part, and goes on to all samples if these will be taken.
_THINNED = 4
_FEWER, _ENOUGH = 4, 512
_PROBES, _MANY = 16, 128


class Extent:
    """Chooses, once in a run, the part of the samples and the number of probes, and says so.

    Args:
        overhead: What has been spent.
        schedule: When snapshots are due.
        watcher: What takes them.

    Attributes:
        part: Part of each process's samples to compute on.
        n_probes: Number of probes; 0 for what was asked for.
        on_trial: Whether that is only what the first snapshot was tried on.
    """

    def __init__(self, overhead: TimeMeter, schedule: Schedule, watcher: SnapshotComputer) -> None:
        self._overhead, self._schedule, self._watcher = overhead, schedule, watcher
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._computing, self._outputs = 0.0, 0
        self._set(1.0, 0)

    def _set(self, part: float, n_probes: int, on_trial: bool = False) -> None:
        settings = self._watcher.watched.settings
        self.part, self.n_probes, self.on_trial = part, n_probes, on_trial
        self._watcher.settings = replace(settings, n_probes=n_probes) if n_probes else settings

    @property
    def choice(self) -> tuple[float, int]:
        """Part of the samples, and number of probes."""
        return self.part, self.n_probes

    @property
    def chosen(self) -> dict[str, Any]:
        """Samples and probes that were chosen in place of those asked for, for `InteractionGraph.info`; if any were."""
        if self.choice == (1.0, 0):
            return {}
        chosen = {"max_overhead": self._overhead.limit, "part_of_samples": self.part}
        return {"budget": {**chosen, "n_probes": self._watcher.settings.n_probes}}

    def try_first(
        self, take: Callable[[], Snapshot], steps: int, samples: SampleBuffer, process_group: ProcessGroup
    ) -> Snapshot:
        """Take the first snapshot on a part of the samples, and on all of them if there is time.

        Args:
            take: Takes it, on `part` of each process's samples.
            steps: Optimizer steps since training began.
            samples: The samples of this process.
            process_group: The processes, of which the first one's time counts.

        Returns:
            The snapshot.
        """
        n = sum(int(t) for t in process_group.gather(torch.tensor([samples.count])))
        part = _part(n)
        if part == 1 or steps <= 0 or self._schedule.even is None or self._watcher.ablates(last=False):
            return take()
        before = self._overhead.spent
        self._set(part, 0)
        try:
            taken = take()
        except BaseException:
            self._set(1.0, 0)
            raise
        # As far from the next one as from the beginning, snapshots have so much time, half of it for computing.
        affordable = _THINNED * self._overhead.limit * self._overhead.training
        (too_dear,) = process_group.broadcast([torch.tensor(2 * taken.computing / part > affordable)])
        if not too_dear:
            self._set(1.0, 0)
            self._overhead.not_again(self._overhead.spent - before)
            return take()
        self.on_trial = True
        rank_zero_info(
            f"{self._watcher.name}: the first snapshot, after {steps:,} steps, is computed on {round(part * n):,} of "
            f"{n:,} samples, as max_overhead={self._overhead.limit:g} leaves little time for it."
        )
        return taken

    def look(
        self, taken: Snapshot, instrumented: InstrumentedModel, batches: Sequence[Any], process_group: ProcessGroup
    ) -> None:
        """Note what a snapshot's cost is made of.

        Args:
            taken: The snapshot.
            instrumented: The model and its node layers.
            batches: What it was computed on.
            process_group: The processes.
        """
        self._computing = taken.computing
        if self._overhead.limit < math.inf and not self._outputs:
            graph = taken.graphs[self._watcher.name]
            own = torch.tensor([_outputs(instrumented, graph, [batch for batch in batches if not is_empty(batch)][:1])])
            self._outputs = max(int(t) for t in process_group.gather(own))

    def choose(self, steps: int, cost: float) -> tuple[float, int]:
        """Part of the samples, and number of probes, with which not too many snapshots are left out.

        Args:
            steps: Optimizer steps since training began.
            cost: Seconds that a snapshot costs now.

        Returns:
            Both, 0 for as many probes as were asked for.
        """
        gap = self._schedule.gap
        if self.chosen and not self.on_trial:
            return self.choice
        if gap is None or steps <= 0:
            return 1.0, 0
        computing, expected = self._on_all(cost)
        affordable = _THINNED * self._overhead.limit * self._overhead.training / steps * gap
        # Figures and files cost the same whatever they are made of.
        if expected <= affordable or computing < expected / 2:
            return 1.0, 0
        part = _part(self._n_samples)
        still_too_much = expected - computing * (1 - part) > affordable
        exact = "lib" in self._watcher.prefixes.values() and self._watcher.settings.n_probes is None
        return part, _PROBES if still_too_much and exact and self._outputs >= _MANY else 0

    def go_on_with(self, part: float, n_probes: int, cost: float) -> None:
        """Compute on so much from here on, and say so if that is news.

        Args:
            part: Part of the samples.
            n_probes: Number of probes, 0 for what was asked for.
            cost: Seconds that a snapshot costs now.
        """
        if (part, n_probes) == self.choice and not self.on_trial:
            return
        (computing, expected), n = self._on_all(cost), self._n_samples
        now = expected - computing * (1 - self.part)
        self._set(part, n_probes)
        self._overhead.expect((expected - computing * (1 - part)) / now)
        on = f"{round(part * n):,} of {n:,} samples" if part < 1 else f"all {n:,} samples"
        how = f", with n_probes={n_probes} in place of all {self._outputs:,} outputs of a layer" if n_probes else ""
        limit, most = self._overhead.limit, _THINNED - 1
        why, then = f"which max_overhead={limit:g} has time for", "numbers before and after may differ by that."
        if self.chosen:
            why = f"for which max_overhead={limit:g} would leave out more than {most} of {_THINNED} that are due"
            then += (
                " A larger max_overhead keeps what was asked for, as does a schedule with fewer snapshots and "
                "max_overhead=inf."
            )
        rank_zero_info(
            f"{self._watcher.name}: snapshots cost {expected:.3g} s, {why}. From here on they are computed on "
            f"{on}{how}; {then}"
        )

    def _on_all(self, cost: float) -> tuple[float, float]:
        """Seconds that the graphs of all samples take, and a snapshot with them; it costs so many now."""
        computing = self._computing / self.part
        return computing, cost + computing - self._computing

    @property
    def _n_samples(self) -> int:
        return round(int(self._watcher.numbers[f"{self._watcher.name}/samples"]) / self.part)

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers."""
        return {"choice": [*self.choice, self.on_trial], "computing": self._computing, "outputs": self._outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._computing, self._outputs = state["computing"], state["outputs"]
        self._set(*state["choice"])


def _part(n: int) -> float:
    """Part of so many samples that will do."""
    return min(1.0, max(n // _FEWER, _ENOUGH) / max(1, n))


def _outputs(instrumented: InstrumentedModel, graph: InteractionGraph, batches: Sequence[Any]) -> int:
    """Positions times features of the widest node layer but the first: what an exact metric goes through."""
    try:
        (values,) = feature_values(instrumented, graph, [slice_batch(batch, 0, 2) for batch in batches])
    except Exception:  # no samples here, or the model takes no two of them: then it cannot tell
        return 0
    return max(values.features[name].shape[1:].numel() for name in graph.node_layers[1:])
