"""Shows the figures of a tutorial: this library returns figures, and opens no windows that pyplot would know."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

# Figures that have been shown: a name may stay in use for several blocks.
_shown: list[Figure] = []


def figures_of_this_block(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save each figure that has a name since this block, and return what includes them in the page.

    Args:
        block: What kind of block it is, its text and its line.
        block_vars: The tutorial's variables, and where its pictures go.
        gallery_conf: Settings of the gallery.
    """
    values = block_vars["example_globals"].values()
    figures = [value for value in values if isinstance(value, Figure) and not any(value is seen for seen in _shown)]
    figures += [figure for figure in map(plt.figure, plt.get_fignums()) if figure not in figures]
    paths = []
    for figure, path in zip(figures, block_vars["image_path_iterator"], strict=False):
        figure.savefig(path, dpi=110, bbox_inches="tight")
        paths.append(path)
    _shown.extend(figures)
    plt.close("all")
    return figure_rst(paths, gallery_conf["src_dir"])


def _get_sg_image_scraper() -> Any:
    """What sphinx-gallery asks a module for that is named as a scraper."""
    return figures_of_this_block
