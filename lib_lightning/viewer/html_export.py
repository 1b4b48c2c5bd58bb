"""The film of one or more runs as a single HTML file that needs no server and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence

from lib_lightning.plots.palette import PAPER, TEXT, dark_variables, ink
from lib_lightning.viewer.bundle import bundle, static_files
from lib_lightning.viewer.embedded_features import EmbeddedFeatures, budget, compressed, embed_features
from lib_lightning.viewer.html_page import html_page
from lib_lightning.viewer.json_text import dump, object_
from lib_lightning.viewer.many_runs import shared_features, universal_files
from lib_lightning.viewer.run_view import RunView

# Default for the maximum number of edges per section and snapshot.
MAX_EDGES = 400
_START = """
modules["view.js"].mount(document.getElementById("lib-view"), modules["embedded.js"].embeddedSource(document));
"""
_START_FEATURE = """
const script = document.getElementById("lib-feature-data");
modules["feature_page.js"].mountFeature(document.getElementById("lib-view"), script);
"""

# A page of more bytes takes browsers seconds to open.
MAX_BYTES = 20_000_000
# Fewer edges than this are left out before snapshots are.
_FEWEST_EDGES = 50


def film_page(
    runs: Sequence[RunView],
    title: str,
    edges: int = MAX_EDGES,
    every: int = 1,
    max_bytes: int = MAX_BYTES,
    feature_bytes: int | None = None,
) -> str:
    """Export the film of runs as one HTML file.

    Args:
        runs: Runs to show side by side, with different names.
        title: Title of the page.
        edges: Maximum number of edges per section and snapshot; the strongest are included.
        every: Include every n-th snapshot of a run, and the last one.
        max_bytes: Size of the file. If it would be larger, there are fewer edges and snapshots, and the page says so.
        feature_bytes: How much of it is for the pages of features, of as many snapshots as fit; by default a quarter,
            up to 5 MB.

    Returns:
        Text of the file.

    Raises:
        NotFoundError: If a run has no readable snapshot.
    """
    asked = edges, every
    for_features = budget(max_bytes) if feature_bytes is None else feature_bytes
    edges, every = _that_fit(runs, edges, every, max_bytes - for_features)
    content = object_(
        {
            "runs": dump([run.entry() for run in runs]),
            "run": object_({run.name: run.run(every) for run in runs}),
            **({"shared": _shared(runs)} if len(runs) > 1 else {}),
        }
    )
    snapshots = [
        f'<script type="text/plain" class="lib-snapshot" data-run="{html.escape(run.name)}" data-step="{step}">'
        f"{compressed(run.snapshot(step, edges))}</script>"
        for run in runs
        for step in run.steps(every)
    ]
    embedded = {run.name: embed_features(run, run.steps(every), for_features // len(runs)) for run in runs}
    body = [
        '<div id="lib-view"></div>',
        *([_note(edges, every, max_bytes)] if (edges, every) != asked else []),
        f'<script type="text/plain" id="lib-runs">{compressed(content)}</script>',
        *snapshots,
        *_feature_scripts(embedded),
    ]
    return _page(title, body, {"view.js": "mount", "embedded.js": "embeddedSource"}, _START)


def _shared(runs: Sequence[RunView]) -> str:
    return shared_features(runs, universal_files([run.folder for run in runs]))


def feature_page(title: str, content: str) -> str:
    """Export the page of one feature as HTML.

    Args:
        title: Title of the page.
        content: JSON of the name of the run, the feature's page, its pages at other steps, and its first step.

    Returns:
        Text of the file.
    """
    body = [
        '<div id="lib-view"></div>',
        f'<script type="text/plain" id="lib-feature-data">{compressed(content)}</script>',
    ]
    return _page(title, body, {"feature_page.js": "mountFeature"}, _START_FEATURE)


def _page(title: str, body: Sequence[str], entry_points: Mapping[str, str], start: str) -> str:
    static = static_files()
    script = bundle(static, entry_points) + start
    # What is around the viewer: a note, and the page where it is scrolled beyond its end.
    around = f"body {{ margin: 0; background: {ink(PAPER)}; color: {ink(TEXT)}; }}"
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark_variables()} color-scheme: dark; }} }}"
    style = f"{around}\n{dark}\n{static['view.css']}"
    return html_page(title, style, body, f"\n{script}")


def _that_fit(runs: Sequence[RunView], edges: int, every: int, max_bytes: int) -> tuple[int, int]:
    """Largest number of edges, and smallest distance of snapshots, with which a page is not too large."""
    # What is in every page; some snapshots of all ages say how large the others are.
    static = sum(map(len, static_files().values()))
    while True:
        content = sum(len(compressed(run.run(every))) for run in runs)
        steps = [(run, step) for run in runs for step in run.steps(every)]
        some = steps[:: max(1, len(steps) // 16)]
        size = sum(len(compressed(run.snapshot(step, edges))) + 120 for run, step in some)
        snapshots = size * len(steps) / max(1, len(some))
        if static + content + snapshots <= 0.9 * max_bytes or len(steps) <= 2 * len(runs):
            return edges, every
        if edges > _FEWEST_EDGES:
            edges = max(_FEWEST_EDGES, edges // 2)
        else:
            every *= 2


def _note(edges: int, every: int, max_bytes: int) -> str:
    of_snapshots = f"every {every}th snapshot and " if every > 1 else ""
    return (
        f'<p id="lib-thinned" style="margin: 0 20px 20px">To stay below {max_bytes / 1e6:.3g} MB, this page has '
        f"{of_snapshots}the strongest {edges} edges of each section. The tab in TensorBoard shows all of them.</p>"
    )


def _feature_scripts(embedded: Mapping[str, EmbeddedFeatures]) -> Iterator[str]:
    for name, features in embedded.items():
        run = html.escape(name)
        yield f'<script type="text/plain" class="lib-features-of-run" data-run="{run}">{features.run}</script>'
        for step, pages in features.snapshots.items():
            yield f'<script type="text/plain" class="lib-features" data-run="{run}" data-step="{step}">{pages}</script>'
