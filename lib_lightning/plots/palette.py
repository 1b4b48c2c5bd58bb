"""Colours, names and sizes shared by the figures and the viewer; both read them from ``theme.json``.

The colours are the palette of Okabe and Ito, which remains distinguishable under all common forms of colour blindness.
Its yellow is hard to see on white and is replaced by a wine red.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from lib_lightning.algorithm.basis_kinds import kind_and_number

THEME: dict[str, Any] = json.loads((files("lib_lightning.plots") / "theme.json").read_text("utf-8"))

_COLORS: dict[str, str] = THEME["colors"]
_SERIES: list[str] = [_COLORS[name] for name in THEME["series"]]

PAPER, TEXT, MUTED = THEME["paper"], THEME["text"], THEME["muted"]
BLUE, VERMILION = _COLORS["blue"], _COLORS["vermilion"]
# Neighbouring colours also differ in lightness.
MODULES: tuple[str, ...] = tuple(_COLORS[name] for name in THEME["modules"])
OTHER_MODULES, NO_MODULE = THEME["other_modules"], THEME["no_module"]
# Lines between modules.
BETWEEN_MODULES = THEME["between_modules"]
# Lines where a feature drives another, and where it holds against it.
DRIVES, AGAINST = _COLORS[THEME["signs"]["drives"]], _COLORS[THEME["signs"]["against"]]
BASIS_NAMES: dict[str, str] = THEME["basis_names"]
BASES = dict(zip(BASIS_NAMES, _SERIES, strict=False))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Styles that no other line than those of LIB, PCA and neurons has.
_ALWAYS_KNOWN = 3


def ink(color: str) -> str:
    """A colour for a page that may be dark, as CSS.

    Args:
        color: A colour of the theme, as on light pages.

    Returns:
        The variable that `dark_variables` sets, with the colour for where it is not set.

    Example:
        >>> ink(TEXT) == f"var(--ink-{TEXT[1:]}, {TEXT})"
        True
    """
    return f"var(--ink-{color.removeprefix('#')}, {color})"


def dark_variables() -> str:
    """The colours of dark pages, as CSS variables by the colours of light ones.

    Returns:
        Declarations for a style sheet.

    Example:
        >>> "--ink-222222: #E5E5E5;" in dark_variables()
        True
    """
    dark = {THEME[name]: color for name, color in THEME["dark"].items() if name != "colors"}
    dark |= {_COLORS[name]: color for name, color in THEME["dark"]["colors"].items()}
    return " ".join(f"--ink-{light.removeprefix('#')}: {color};" for light, color in dark.items())


def module_color(number: int) -> str:
    """The colour of a module, in every picture of a graph.

    Args:
        number: Number of the module, as in `InteractionGraph.modules`; -1 for features in no module.

    Returns:
        A colour of its own for each of the first modules, and one neutral colour for all others.

    Example:
        >>> module_color(0) == MODULES[0], module_color(7) == module_color(8) == OTHER_MODULES
        (True, True)
    """
    if number < 0:
        return str(NO_MODULE)
    return MODULES[number] if number < len(MODULES) else str(OTHER_MODULES)


def paler(color: str) -> str:
    """The colour of a line between modules, where colours stand for signs.

    Args:
        color: `DRIVES` or `AGAINST`.

    Returns:
        The colour mixed with white.

    Example:
        >>> paler("#000000")
        '#737373'
    """
    share = THEME["signs"]["between_modules"]
    parts = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(255 * share + part * (1 - share)):02X}" for part in parts)


def label_group(label: str) -> str:
    """The common part of related labels, which have the same colour.

    Args:
        label: Label of a feature.

    Returns:
        "k=17" of "k=17 a+b", or else the label without a percentage at its end.

    Example:
        >>> label_group("k=17 a+b 93%"), label_group("edge detector 80%"), label_group("")
        ('k=17', 'edge detector', '')
    """
    match = re.match(r"\S+=\S+", label)
    return match.group() if match else without_percentage(label)


def without_percentage(label: str) -> str:
    """Drop a percentage at the end of a label, which changes from snapshot to snapshot.

    Args:
        label: Label of a feature.

    Returns:
        The rest.

    Example:
        >>> without_percentage("k=17 a+b 93%")
        'k=17 a+b'
    """
    return re.sub(r"\s*[0-9]+(\.[0-9]+)?%\Z", "", label)


def label_colors(groups: Sequence[dict[str, float]]) -> dict[str, str]:
    """Choose the colours of groups of labels.

    Args:
        groups: For each snapshot, the importance of each group of labels.

    Returns:
        Colours by group: those with most importance in the last snapshot first, then those that are only in earlier
        ones. Groups beyond the palette have one neutral colour.

    Example:
        >>> list(label_colors([{"old": 9.0, "b": 1.0}, {"a": 1.0, "b": 2.0}]))
        ['b', 'a', 'old']
    """
    newest: dict[str, tuple[int, float]] = {}
    for k, weights in enumerate(groups):
        newest |= {group: (k, weight) for group, weight in weights.items() if group}
    ranked = sorted(sorted(newest), key=lambda group: newest[group], reverse=True)
    return {group: module_color(k) for k, group in enumerate(ranked)}


def basis_title(name: str) -> str:
    """What a basis is called in a figure.

    Args:
        name: Its kind, with the number of a draw after the first; any other name is its own title.

    Example:
        >>> basis_title("random_2"), basis_title("mine")
        ('random rotation (2)', 'mine')
    """
    kind, number = kind_and_number(name)
    title: str = BASIS_NAMES.get(kind, kind)
    return title if number == 1 else f"{title} ({number})"


def basis_styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Choose a colour and a marker for each line of a figure.

    Args:
        names: Names of the lines. The kinds of basis ("lib", "pca", "random", ...) always have the same style, and all
            draws of one kind.

    Returns:
        Colour and marker by name.

    Example:
        >>> basis_styles(["pca", "mine"])
        {'pca': ('#D55E00', 's'), 'mine': ('#CC79A7', 'D')}
    """
    order = {name: k for k, name in enumerate(BASES)}
    known = {name: order[kind] for name in names if (kind := kind_and_number(name)[0]) in order}
    taken = {*known.values()}
    free = [k for k in range(_ALWAYS_KNOWN, len(_SERIES)) if k not in taken] or [*range(_ALWAYS_KNOWN, len(_SERIES))]
    others = [name for name in names if name not in known]
    positions = known | {name: free[k % len(free)] for k, name in enumerate(others)}
    return {name: (_SERIES[positions[name]], _MARKERS[positions[name]]) for name in names}
