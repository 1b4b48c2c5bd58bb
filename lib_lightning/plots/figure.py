"""Figures that notebooks show, and that are freed when they are no longer referenced."""

from __future__ import annotations

from matplotlib.figure import Figure

from lib_lightning.plots.image import render_png


class NotebookFigure(Figure):
    """A figure that is not registered with pyplot, and that a notebook shows as the last value of a cell.

    Example:
        >>> NotebookFigure(figsize=(2, 1), dpi=50)._repr_png_()[1:4]
        b'PNG'
    """

    def _repr_png_(self) -> bytes:
        # Where pyplot's inline backend is active, notebooks use its own formatter and do not ask for this.
        return render_png(self).data
