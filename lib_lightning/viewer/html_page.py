"""The frame of HTML files that need no server and may load nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# Forbids the browser to load anything; pictures are part of the file.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def html_page(title: str, style: str, body: Iterable[str], script: str) -> str:
    """Write an HTML file.

    Args:
        title: Its title, as plain text.
        style: Its style sheet.
        body: Lines of HTML.
        script: Its JavaScript module, run at the end.

    Returns:
        Text of the file.

    Example:
        >>> page = html_page("a < b", "p { margin: 0; }", ["<p>text</p>"], "")
        >>> "<title>a &lt; b</title>" in page
        True
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_inline(style, 'style')}</style>",
            "</head>",
            "<body>",
            *body,
            f'<script type="module">{_inline(script, "script")}</script>',
            "</body>",
            "</html>",
            "",
        ]
    )


def _inline(code: str, tag: str) -> str:
    """Escape code so that it cannot close its own tag."""
    return re.sub(rf"</(?={tag})", r"<\\/", code, flags=re.IGNORECASE)
