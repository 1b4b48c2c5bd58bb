"""What a page of the theme lacks for a keyboard or a screen reader."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# After that of the theme, which makes the navigation.
_LAST = 900


def level_of_captions(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Say of which level the headings of the navigation are."""
    tree = context.get("furo_navigation_tree")
    if isinstance(tree, str):
        context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> dict[str, Any]:
    """Change pages; add the script by which code that is wider than the page can be scrolled with arrow keys."""
    app.connect("html-page-context", level_of_captions, priority=_LAST)
    app.add_js_file("scrollable.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
