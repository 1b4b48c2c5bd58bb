"""The features of many networks as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

# Features that are listed by name.
_LISTED = 12
_WIDTH = 118


def table_of(
    names: Sequence[str],
    layers: Sequence[tuple[str, Sequence[int], Sequence[float], Sequence[float], bool]],
    features: Sequence[tuple[str, int, float, float, str, str]],
    values: str,
    level: float,
) -> str:
    """Write which features how many networks have as a table.

    Args:
        names: What the networks are called.
        layers: For each node layer its name, the number of features of each network, the number of features per network
            and their share of the importance by the number of networks that have them, and whether all are identical.
        features: For each feature its node layer, the number of networks that have it, importance, similarity, the id
            of the central one, and a label.
        values: What the features were compared by.
        level: The false discovery rate of matches.

    Returns:
        Lines of text.
    """
    n = len(names)
    bins = number_bins(n)
    head = ["features", "per network", *(title for title, _, _ in bins), f"importance in all {n}", "in one"]
    rows = [head]
    for layer, num_features, counts, importance, _ in layers:
        sums = [sum(counts[k - 1] for k in range(low, high + 1)) for _, low, high in bins]
        mean = sum(num_features) / n
        rows.append(
            [layer, f"{mean:.1f}", *(f"{x:.1f}" for x in sums), f"{importance[-1]:.0%}", f"{importance[0]:.0%}"]
        )
    lines = _aligned(rows)
    ranked = sorted(features, key=lambda feature: (-feature[1], -feature[2]))
    if ranked:
        head = ["feature", "networks", "importance", "similarity", "label"]
        listed = [
            [feature_id, f"{count} of {n}", f"{share:.1%}", f"{similarity:.2f}", label]
            for _, count, share, similarity, feature_id, label in ranked[:_LISTED]
        ]
        lines += ["", *_aligned([head, *listed], (0, len(head) - 1))]
        if len(ranked) > _LISTED:
            lines.append(f"and {len(ranked) - _LISTED:,} more that at least two networks have")
    identical = [layer for layer, *_, is_identical in layers if is_identical]
    if identical:
        lines += [
            "",
            *_wrapped(
                f"{', '.join(identical)}: every feature has the same values in all networks, as those of the input "
                "itself have, or of layers with the same weights. That all have it says nothing about training."
            ),
        ]
    lines += [
        "",
        *_wrapped(
            f"{n} networks, each compared with each other by {values}, with a false discovery rate of {level:.0%} over "
            "all of them, against permuted samples and random bases of the same subspace. Numbers of features are "
            "means per network; importance is the share of the node layer's, mean over networks. The id of a feature "
            "is that in its central network."
        ),
    ]
    return "\n".join(lines)


def number_bins(n: int) -> list[tuple[str, int, int]]:
    """Divide numbers of networks into ranges.

    Args:
        n: Number of networks.

    Returns:
        Title, smallest and largest number of each range, from all networks down to one.

    Example:
        >>> number_bins(12)
        [('in all 12', 12, 12), ('in 6 to 11', 6, 11), ('in 2 to 5', 2, 5), ('in one', 1, 1)]
        >>> number_bins(2)
        [('in both', 2, 2), ('in one', 1, 1)]
    """
    half = max(2, -(-n // 2))
    ranges = [(half, n - 1), (2, half - 1)]
    middle = [(f"in {a} to {b}" if a < b else f"in {a}", a, b) for a, b in ranges if a <= b]
    return [("in both" if n == 2 else f"in all {n}", n, n), *middle, ("in one", 1, 1)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, subsequent_indent="  ")


def _aligned(rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            x.ljust(width) if column in text_columns else x.rjust(width)
            for column, (x, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
