"""The file of a run with the renderings of its samples: one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Numbers of samples are those among some samples, which their hash tells from others.
SAMPLE, SAMPLES = "sample", "samples"
_HEAD = re.compile(rf'{{"{SAMPLE}": (\d+), "{SAMPLES}": "(\w*)"')

Key = tuple[int, str]


def rendering_line(sample: int, samples: str, rendering: Mapping[str, Any]) -> str:
    """A line of the file.

    Args:
        sample: Number of the sample.
        samples: Hash of the samples among which it has that number: ``info["samples"]`` of a graph.
        rendering: Its rendering.

    Returns:
        The line.

    Example:
        >>> rendering_line(3, "1f", {"kind": "text", "text": "a"})
        '{"sample": 3, "samples": "1f", "kind": "text", "text": "a"}'
    """
    return json.dumps({SAMPLE: sample, SAMPLES: samples, **rendering}, ensure_ascii=False, allow_nan=False)


def key_of(line: str) -> Key | None:
    """Number of the sample in a line and hash of its samples; None if the line is none of `rendering_line`.

    Args:
        line: The line.

    Returns:
        Both.

    Example:
        >>> key_of('{"sample": 3, "samples": "1f", "kind": "text", "text": "a"}')
        (3, '1f')
    """
    match = _HEAD.match(line)
    return (int(match[1]), match[2]) if match and line.rstrip().endswith("}") else None


def read_lines(path: Path) -> list[str]:
    """The lines of the file; those of a process that was killed while writing one are left out.

    Args:
        path: The file.

    Returns:
        The lines; none if there is no file.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.split("\n") if key_of(line) is not None]


def append_lines(path: Path, lines: Iterable[str], anew: bool = False) -> None:
    """Write lines at the end of the file.

    Args:
        path: The file; it is made if there is none, and its folder as well.
        lines: The lines.
        anew: Whether they replace those that are in it.

    Raises:
        OSError: If they cannot be written; a full disk leaves none of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() and not anew else 0
    try:
        with path.open("wb" if anew else "ab+") as file:
            if size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process was killed while writing
                    file.write(b"\n")
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size) if size else path.unlink()
        raise


def read_renderings(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Read all renderings.

    Args:
        path: The file.

    Returns:
        Renderings by the hash of the samples, ``info["samples"]`` of the graph whose examples they are ("" if a line
        has none), and by the number of the sample; the last one if there are several. Incomplete lines, as of a file
        that is being written, are left out.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "samples.jsonl"
        ...     append_lines(path, [rendering_line(3, "1f", {"kind": "text", "text": "a"}), '{"sample": 4, "ki'])
        ...     read_renderings(path)
        {'1f': {3: {'kind': 'text', 'text': 'a'}}}
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rendering = json.loads(line, parse_constant=lambda _: None)
            if isinstance(rendering, dict) and isinstance(sample := rendering.pop(SAMPLE, None), int):
                found.setdefault(str(rendering.pop(SAMPLES, "")), {})[sample] = rendering
    return found
