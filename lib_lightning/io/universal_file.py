"""The file with the features that many runs have, in the folder that contains the runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

# Version of the file.
FORMAT = 1
NAME = "universal.json"


def read_universal(path: Path) -> dict[str, Any] | None:
    """Read the features that many runs have.

    Args:
        path: The file.

    Returns:
        ``names`` of the networks; ``runs``, their folders relative to that of the file; ``steps`` of their snapshots;
        ``level``, ``layers``. None if the file is missing, incomplete, or something else.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        read = json.loads(path.read_text("utf-8"), parse_constant=lambda _: None)
        n = len(read["names"])
        is_whole = (
            read["format"] == FORMAT
            and n == len(read["runs"]) == len(read["steps"])
            and all(isinstance(run, str) for run in read["runs"])
            and all(_is_layer(layer, n) for layer in read["layers"])
        )
        return dict(read) if is_whole else None
    return None


def _is_layer(layer: dict[str, Any], n: int) -> bool:
    by_number = ("counts", "importance", "num_features")
    return (
        isinstance(layer["layer"], str)
        and all(len(layer[key]) == n and all(isinstance(x, (int, float)) for x in layer[key]) for key in by_number)
        and all(
            len(feature["members"]) == len(feature["labels"]) == n
            and all(isinstance(feature[key], (int, float)) for key in ("importance", "similarity", "p_value"))
            for feature in layer["features"]
        )
    )
