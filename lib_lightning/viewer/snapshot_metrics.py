"""The metrics of a snapshot, from the header of its file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lib_lightning.io import basis_format
from lib_lightning.io.basis_file import read_parts
from lib_lightning.viewer.run_discovery import FileStamp


@dataclass(frozen=True)
class SnapshotMetrics:
    """What the header of a snapshot says of its metrics.

    Attributes:
        metrics: Values by name, without those that the snapshot has not measured.
        logging_step: Where Lightning logged the scalars of the snapshot; None in files of version 0.1.
    """

    metrics: dict[str, float]
    logging_step: int | None

    def size(self) -> int:
        """Approximate size in bytes."""
        return 200 + 120 * len(self.metrics)


class Curve(NamedTuple):
    """A quantity over steps.

    Attributes:
        steps: Numbers of optimizer steps, ascending.
        values: A value for each.
    """

    steps: list[int]
    values: np.ndarray


def read_metrics(file: FileStamp) -> SnapshotMetrics:
    """Read the metrics of a snapshot. No tensor is read.

    Args:
        file: Basis file of the snapshot.

    Returns:
        The metrics.

    Raises:
        UNREADABLE: If the file is missing, incomplete, or not an interaction graph.
    """
    _, header = read_parts(file.path, lambda _: False)
    info = header[basis_format.INFO]
    found = {str(key): metric["value"] for key, metric in info.get(basis_format.METRICS, {}).items()}
    logging_step = info.get(basis_format.LOGGING_STEP)
    return SnapshotMetrics(
        {key: float(value) for key, value in found.items() if value is not None},
        logging_step if isinstance(logging_step, int) else None,
    )


def metric_curves(snapshots: Mapping[int, SnapshotMetrics]) -> dict[str, Curve]:
    """Curves of the metrics of snapshots.

    Args:
        snapshots: Metrics by step, ascending.

    Returns:
        A curve for each metric, at the steps that have measured it.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for step, one in snapshots.items():
        for name, value in one.metrics.items():
            points.setdefault(name, []).append((step, value))
    return {
        name: Curve([step for step, _ in found], np.array([value for _, value in found]))
        for name, found in points.items()
    }
