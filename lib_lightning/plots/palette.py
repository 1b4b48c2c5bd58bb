"""Colours, names and sizes shared by the figures and the viewer; both read them from ``theme.json``.

The colours are the palette of Okabe and Ito, which remains distinguishable under all common forms of colour blindness.
Its yellow is hard to see on white and is replaced by a wine red.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

THEME: dict[str, Any] = json.loads((files("lib_lightning.plots") / "theme.json").read_text("utf-8"))

_COLORS: dict[str, str] = THEME["colors"]
_SERIES: list[str] = [_COLORS[name] for name in THEME["series"]]

TEXT, MUTED = THEME["text"], THEME["muted"]
BLUE, VERMILION = _COLORS["blue"], _COLORS["vermilion"]
# Neighbouring colours also differ in lightness.
MODULES: tuple[str, ...] = tuple(_COLORS[name] for name in THEME["modules"])
OTHER_MODULES, NO_MODULE = THEME["other_modules"], THEME["no_module"]
BASIS_NAMES: dict[str, str] = THEME["basis_names"]
BASES = dict(zip(BASIS_NAMES, _SERIES, strict=False))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def basis_styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Choose a colour and a marker for each line of a figure.

    Args:
        names: Names of the lines. The kinds of basis ("lib", "pca", "neuron") always have the same style.

    Returns:
        Colour and marker by name.

    Example:
        >>> basis_styles(["pca", "mine"])
        {'pca': ('#D55E00', 's'), 'mine': ('#CC79A7', 'D')}
    """
    others = [name for name in names if name not in BASES]
    colors = BASES | {name: _SERIES[len(BASES) :][k % (len(_SERIES) - len(BASES))] for k, name in enumerate(others)}
    positions = {name: k for k, name in enumerate([*BASES, *others])}
    return {name: (colors[name], _MARKERS[positions[name] % len(_MARKERS)]) for name in names}
