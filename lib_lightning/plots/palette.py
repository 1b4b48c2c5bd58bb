"""The colours of all figures: the palette of Okabe and Ito, told apart under every common colour blindness."""

from __future__ import annotations

TEXT, MUTED = "#222222", "#666666"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
# Neighbours in this order differ in lightness, too. The palette's yellow is lost on white; a wine takes its place.
MODULES = (BLUE, ORANGE, GREEN, PURPLE, "#6B1030", SKY, VERMILION)
OTHER_MODULES, NO_MODULE = "#6E6E6E", "#B8B8B8"
BASES = {"lib": BLUE, "pca": VERMILION, "neuron": GREEN}
_OTHER_BASES = (PURPLE, "#6B1030", ORANGE, SKY)
BASIS_NAMES = {"lib": "LIB", "pca": "PCA", "neuron": "neurons"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def basis_styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Choose a colour and a marker for each line of a figure.

    Args:
        names: What the lines are called; the kinds of basis have colours of their own.

    Returns:
        Colour and marker by name.

    Example:
        >>> basis_styles(["pca", "mine"])
        {'pca': ('#D55E00', 's'), 'mine': ('#CC79A7', 'D')}
    """
    others = [name for name in names if name not in BASES]
    colors = BASES | {name: _OTHER_BASES[k % len(_OTHER_BASES)] for k, name in enumerate(others)}
    places = {name: k for k, name in enumerate([*BASES, *others])}
    return {name: (colors[name], _MARKERS[places[name] % len(_MARKERS)]) for name in names}
