"""What the viewer shows of comparisons with other runs: which features are the same, from the files of `compare`."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib_lightning.io.run_layout import RunLayout
from lib_lightning.viewer.run_discovery import FileStamp, regular_files

_NAME = re.compile(r"comparison(-\d+)?\.json")
# A comparison of a hundred layers of a thousand features has 20 MB.
_MAX_BYTES = 64 << 20


def comparison_files(folder: Path) -> list[FileStamp]:
    """Find the comparisons of a run with others.

    Args:
        folder: Folder of the run, without symbolic links in its path.

    Returns:
        JSON files, the newest first, and those written at the same time by name.
    """
    found = regular_files(RunLayout(folder).comparison_page.parent)
    named = [file for file in found if _NAME.fullmatch(file.path.name) and file.size <= _MAX_BYTES]
    return sorted(named, key=lambda file: (-file.mtime_ns, file.path))


def read_comparison(file: FileStamp) -> dict[str, Any] | None:
    """Read a comparison.

    Args:
        file: Its JSON file, which may contain anything.

    Returns:
        ``fingerprints`` of the two snapshots, and for each pair of node ``layers`` their names ``a`` and ``b``, the
        ``matches`` as rows of both numbers, kind, similarity and p-value, and the ``features`` of both sides as rows of
        number, kind, similarity, p-value and share of the importance. None for a file that does not contain that,
        such as one of an earlier version, which does not say of which snapshots it is.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads(file.path.read_text("utf-8"), parse_constant=lambda _: None)
        first, second = map(_text, content["fingerprints"])
        return {"fingerprints": [first, second], "layers": [_layer(layer) for layer in content["layers"]]}
    return None


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    names = [_text(layer[side]["layer"]) for side in "ab"]
    matches = [
        [*(_number_in(match[side], name) for side, name in zip("ab", names, strict=True)), *_evidence(match)]
        for match in layer["matches"]
    ]
    features = [
        [
            [_number_in(one["id"], name), *_evidence(one), _finite(one["importance"]) or 0.0]
            for one in layer[side]["features"]
        ]
        for side, name in zip("ab", names, strict=True)
    ]
    return {"a": names[0], "b": names[1], "matches": matches, "features": features}


def _evidence(entry: Mapping[str, Any]) -> list[Any]:
    return [_text(entry["kind"]), _finite(entry["similarity"]), _finite(entry["p_value"])]


def _number_in(feature_id: Any, layer: str) -> int:
    """The number in the id of a feature."""
    of_layer, _, number = _text(feature_id).rpartition("/")
    if of_layer != layer or not (number.isascii() and number.isdigit() and len(number) < 16):
        raise ValueError(f"'{feature_id}' is no feature of '{layer}'.")
    return int(number)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text.")
    return value


def _finite(value: Any) -> float | None:
    """A number with five digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
