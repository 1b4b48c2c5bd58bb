"""Lists the links that lead out of the pages: Sphinx checks the others, and these need a network."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PREFIXES = ("http://", "https://", "ftp://", "mailto:")


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Remember the links of a page."""
    targets = {node["refuri"] for node in doctree.findall(nodes.reference) if "refuri" in node}
    found = app.env.external_links = getattr(app.env, "external_links", {})  # type: ignore[attr-defined]
    found[app.env.docname] = sorted(target for target in targets if target.startswith(PREFIXES))


def write(app: Sphinx, exception: Exception | None) -> None:
    """Write ``external_links.txt`` beside the pages: each address, and the pages that have it."""
    if exception is not None:
        return
    pages = defaultdict(list)
    for page, targets in getattr(app.env, "external_links", {}).items():
        for target in targets:
            pages[target].append(page)
    lines = [f"{target}  ({', '.join(sorted(on))})\n" for target, on in sorted(pages.items())]
    Path(app.outdir, "external_links.txt").write_text("".join(lines), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to the events of a build."""
    app.connect("doctree-read", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
