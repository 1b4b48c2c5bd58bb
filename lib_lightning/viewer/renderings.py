"""How the samples among the examples of features look, as a run has kept it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from lib_lightning.viewer.json_text import dump


def read_renderings(path: Path) -> dict[int, str]:
    """Read the renderings of samples.

    Args:
        path: File with one JSON object a line, such as ``{"sample": 12, "kind": "text", "text": "..."}``.

    Returns:
        JSON of each, by the number of the sample; the last one if there are several. Incomplete lines, as of a file
        that is being written, are skipped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "samples.jsonl"
        ...     _ = path.write_text('{"sample": 3, "kind": "text", "text": "a"}' + chr(10) + '{"sample": 4, "ki')
        ...     read_renderings(path)
        {3: '{"kind":"text","text":"a"}'}
    """
    found = {}
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rendering = json.loads(line, parse_constant=lambda _: None)
            if isinstance(rendering, dict) and isinstance(sample := rendering.pop("sample", None), int):
                found[sample] = dump(rendering)
    return found
