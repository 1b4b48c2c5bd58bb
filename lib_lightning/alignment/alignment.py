"""How long before or after the steepest change of a scalar the events of each kind come, over runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from lib_lightning.alignment.offsets import KindOffsets, kind_of, offsets_of
from lib_lightning.alignment.steepest import Direction, SteepestChange, steepest_change
from lib_lightning.alignment.table import table_of
from lib_lightning.errors import LIBError, SettingError, did_you_mean, quoted
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.plots.steps_axis import is_log_spaced
from lib_lightning.viewer.run import Run, described_runs, read_scalars

Weight = Literal["importance", "equal"]
Axis = Literal["auto", "linear", "log"]
# Version of the JSON file.
_FORMAT = 1


@dataclass(frozen=True)
class AlignedRun:
    """A run, and where its scalar changes most steeply.

    Attributes:
        name: Name of the run.
        change: The change; without a step if there is none.
        events: Steps and weights of its events, by kind.
    """

    name: str
    change: SteepestChange
    events: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class EventAlignment:
    """How long before or after the steepest change of a scalar the events of each kind come.

    Attributes:
        scalar: Name of the scalar.
        log: Whether the axis of steps is logarithmic.
        weight: ``"importance"`` or ``"equal"``, what an event counts.
        runs: The runs.
        kinds: For each kind of event, its offsets from the change.
    """

    scalar: str
    log: bool
    weight: str
    runs: list[AlignedRun]
    kinds: list[KindOffsets]

    def table(self) -> str:
        """Both as tables: the runs with their steepest changes, and the kinds of events with their offsets."""
        changes = [(run.name, run.change) for run in self.runs]
        return table_of(self.scalar, self.log, self.weight, changes, self.kinds)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON value; numbers that there are not are None."""
        return {
            "format": _FORMAT,
            "scalar": self.scalar,
            "log": self.log,
            "weight": self.weight,
            "runs": [_finite(asdict(run)) for run in self.runs],
            "kinds": [_finite(asdict(kind)) for kind in self.kinds],
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything as JSON. An existing file is replaced atomically.

        Args:
            path: The file; missing folders are created.
        """
        write_bytes(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def align_events(
    runs: Iterable[Run | str | PathLike[str]],
    scalar: str,
    kinds: Sequence[str] | None = None,
    direction: Direction = "either",
    axis: Axis = "auto",
    weight: Weight = "importance",
    between: tuple[float, float] = (-math.inf, math.inf),
) -> EventAlignment:
    r"""Measure how long before or after the steepest change of a scalar the events of each kind come.

    A feature is born at the first snapshot that has it, and dies at the first without it. A change of its importance,
    or of a metric, happens at the snapshot at which half of it (of the logarithm) was done, which is long before it is
    detected if it is gradual. In each run, a kind of event comes at the weighted median of its events; what is said
    about several runs is said of these medians.

    Args:
        runs: Runs, or their folders.
        scalar: Name of a scalar in `Run.scalars`, such as ``"val/loss"``; a metric of the snapshots also without its
            ``lib/``.
        kinds: Kinds of events: those of `lib_lightning.lineage.Event`, and ``"metric rose"`` and ``"metric fell"`` for
            metrics of the graphs. None for all that there are.
        direction: Which change of the scalar: ``"rise"``, ``"fall"``, or ``"either"`` for the steeper in each run.
        axis: ``"linear"`` or ``"log"`` steps, on which the change is steepest; ``"auto"`` for the axis that tab and
            figures have, logarithmic if snapshots are log-spaced.
        weight: ``"importance"`` counts an event by the largest share of its layer's importance that its feature ever
            has, since most features that are born never matter; ``"equal"`` counts events.
        between: First and last step at which to look for the change.

    Returns:
        Offsets by kind, and the steepest change of each run.

    Raises:
        LIBError: If a run cannot be read, or none has the scalar.
        SettingError: If an argument is none of its values.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
        >>> with tempfile.TemporaryDirectory() as logs:
        ...     graph.save(f"{logs}/lib/snapshots/step-00000010.safetensors")
        ...     event = {"step": 300, "kind": "born", "text": "...", "layer": "input", "lineage": 1}
        ...     _ = Path(logs, "lib", "events.jsonl").write_text(json.dumps(event))
        ...     rows = [f"{step},{float(step >= 700)}" for step in range(0, 2000, 100)]
        ...     _ = Path(logs, "probe.csv").write_text("\n".join(["step,accuracy", *rows]))
        ...     found = align_events([logs], "probe/accuracy")
        >>> found.runs[0].change.text, found.kinds[0].offset
        ('rises most steeply at step 650 (600 to 700)', -350.0)
    """
    for argument, value, values in (("axis", axis, get_args(Axis)), ("weight", weight, get_args(Weight))):
        if value not in values:
            raise SettingError(f"{argument} must be one of {', '.join(values)}; got {value!r}.")
    given = [run if isinstance(run, Run) else Run(run) for run in runs]
    opened = list({run.folder: run for run in given}.values())
    if not opened:
        raise SettingError("There must be at least one run.")
    described = described_runs(opened)
    is_log = axis == "log" or (
        axis == "auto" and is_log_spaced([one["step"] for run in described.values() for one in run["snapshots"]])
    )
    prefixes = [run.folder.name for run in opened]
    scalars = [read_scalars(run, prefix) for run, prefix in zip(described.values(), prefixes, strict=True)]
    series = [
        found.get(scalar, found.get(f"{prefix}/{scalar}")) for found, prefix in zip(scalars, prefixes, strict=True)
    ]
    if not any(series):
        names = sorted({name for found in scalars for name in found})
        raise LIBError(
            f"There is no scalar '{scalar}' in {quoted(described)}.{did_you_mean(scalar, names)} "
            f"Known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}."
        )
    aligned = [
        AlignedRun(
            name,
            SteepestChange(reason="was not logged")
            if line is None
            else steepest_change(*line, direction=direction, log=is_log, between=between),
            _events([*run["events"], *run["lifetimes"]], weight),
        )
        for (name, run), line in zip(described.items(), series, strict=True)
    ]
    present = dict.fromkeys(kind for run in aligned for kind in run.events)
    if wrong := [kind for kind in kinds or () if kind not in present]:
        known = ", ".join(present) or "none at all"
        raise SettingError(f"There are no events '{wrong[0]}'.{did_you_mean(wrong[0], present)} There are: {known}.")
    located = [run for run in aligned if run.change.exists]
    chosen = kinds or sorted(present)
    offsets = [offsets_of(kind, [(run.change, run.events.get(kind, [])) for run in located]) for kind in chosen]
    return EventAlignment(scalar, is_log, weight, aligned, [one for one in offsets if one.num_events])


def _events(events: Sequence[Mapping[str, Any]], weight: Weight) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        counts = 1.0 if weight == "equal" or event["share"] is None else float(event["share"])
        found.setdefault(kind_of(event), []).append((event["at"], counts))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
