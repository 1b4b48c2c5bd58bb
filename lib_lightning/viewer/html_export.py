"""The film of one run or several as one HTML file, which needs no server and loads nothing from anywhere."""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections.abc import Sequence

from lib_lightning.viewer.bundle import joined, static_files
from lib_lightning.viewer.json_text import dump, object_
from lib_lightning.viewer.run_view import RunView

# Most edges of a section in a snapshot: all snapshots are in the file.
EDGES = 400
_START = """
modules["view.js"].mount(document.getElementById("lib-view"), modules["embedded.js"].embeddedSource(document));
"""
# The browser itself is told to load nothing.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def film_page(films: Sequence[RunView], title: str, edges: int = EDGES, every: int = 1) -> str:
    """Write the film of runs as one HTML file.

    Args:
        films: The runs, to be seen side by side; of different names.
        title: Title of the page.
        edges: Most edges of a section in each snapshot, the strongest.
        every: Take each so-manieth snapshot of a run, and its last one.

    Returns:
        The text of the file.

    Raises:
        NotThereError: If a run has no snapshot that can be read.
    """
    runs = object_({film.name: film.run(every) for film in films})
    entries = dump([film.entry() for film in films])
    snapshots = [
        f'<script type="text/plain" class="lib-snapshot" data-run="{html.escape(film.name)}" data-step="{step}">'
        f"{_packed(film.snapshot(step, edges))}</script>"
        for film in films
        for step in film.steps(every)
    ]
    static = static_files()
    script = joined(static, {"view.js": "mount", "embedded.js": "embeddedSource"}) + _START
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>body {{ margin: 0; }}\n{_inline(static['view.css'], 'style')}</style>",
            "</head>",
            "<body>",
            '<div id="lib-view"></div>',
            f'<script type="text/plain" id="lib-runs">{_packed(object_({"runs": entries, "run": runs}))}</script>',
            *snapshots,
            f'<script type="module">\n{_inline(script, "script")}</script>',
            "</body>",
            "</html>",
            "",
        ]
    )


def _packed(json: str) -> str:
    # No time of day inside: the same run gives the same file.
    return base64.b64encode(gzip.compress(json.encode(), compresslevel=6, mtime=0)).decode()


def _inline(code: str, tag: str) -> str:
    """Code that cannot end the tag it stands in."""
    return re.sub(rf"</(?={tag})", r"<\\/", code, flags=re.IGNORECASE)
