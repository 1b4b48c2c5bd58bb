"""How the samples among the examples of features look, as a run has kept it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from lib_lightning.io.rendering_file import SAMPLE, SAMPLES
from lib_lightning.viewer.json_text import dump


def read_renderings(path: Path) -> dict[str, dict[int, str]]:
    """Read the renderings of samples.

    Args:
        path: File with one JSON object a line; see `lib_lightning.io.rendering_file.rendering_line`.

    Returns:
        By the hash of the samples ("" if a line has none), JSON of each sample by its number; the last one if there are
        several. Incomplete lines, as of a file that is being written, are skipped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "samples.jsonl"
        ...     line = '{"sample": 3, "samples": "1f", "kind": "text", "text": "a"}'
        ...     _ = path.write_text(line + chr(10) + '{"sample": 4, "ki')
        ...     read_renderings(path)
        {'1f': {3: '{"kind":"text","text":"a"}'}}
    """
    found: dict[str, dict[int, str]] = {}
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rendering = json.loads(line, parse_constant=lambda _: None)
            if isinstance(rendering, dict) and isinstance(sample := rendering.pop(SAMPLE, None), int):
                of_samples = str(rendering.pop(SAMPLES, ""))
                found.setdefault(of_samples, {})[sample] = dump(rendering)
    return found
