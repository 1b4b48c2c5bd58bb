"""The alignment of events as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lib_lightning.alignment.offsets import KindOffsets
from lib_lightning.alignment.steepest import SteepestChange


def table_of(
    scalar: str,
    log: bool,
    weight: str,
    runs: Sequence[tuple[str, SteepestChange]],
    kinds: Sequence[KindOffsets],
) -> str:
    """Write an alignment as tables.

    Args:
        scalar: Name of the scalar.
        log: Whether the axis is logarithmic.
        weight: What an event counts, ``"importance"`` or ``"equal"``.
        runs: Each run with its steepest change.
        kinds: Each kind of event with its offsets.

    Returns:
        Lines of text.
    """
    head = ["event", "events", "runs", "median", "quartiles", "times its step", "before", "within", "after", "p"]
    rows = [_row(kind) for kind in kinds]
    changes = _aligned([[name, f"{scalar} {change.text}"] for name, change in runs], left=2)
    if not rows:
        return "\n".join([*changes, "", "No events to align."])
    spread = "over the events" if all(kind.num_runs == 1 for kind in kinds) else "over runs"
    counted = (
        "Each event counts by the largest share of its layer's importance that its feature ever has."
        if weight == "importance"
        else "All events count the same."
    )
    return "\n".join(
        [
            *changes,
            "",
            *_aligned([head, *rows], left=1),
            "",
            f"Median and quartiles {spread}: steps after the steepest change of {scalar} on a "
            f"{'logarithmic' if log else 'linear'} axis; negative: before it.",
            "Before, within, after: runs in which the median event is so to the steps in parentheses. p: sign test of "
            "before and after.",
            counted,
        ]
    )


def _row(kind: KindOffsets) -> list[str]:
    low, high = kind.quartiles
    return [
        kind.kind,
        f"{kind.num_events:,}",
        f"{kind.num_runs}",
        f"{kind.offset:+,.0f}",
        f"{low:+,.0f} to {high:+,.0f}",
        "-" if math.isnan(kind.times) else f"{kind.times:.2f}",
        f"{kind.before}",
        f"{kind.within}",
        f"{kind.after}",
        "-" if math.isnan(kind.p_value) else f"{kind.p_value:.2g}",
    ]


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows in columns of equal width, of which the first ones begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
