"""Positions that are left out: which ones a setting means, in samples of any length.

Positions are counted in each sample, among the valid ones if there is a mask, so that the first one is the first token
also behind padding on the left. Their activations are computed and flow on as ever: other positions attend to them,
ablations leave them as they are. They are no part of means, covariances, metrics, edges and feature values: with
respect to them nothing is differentiated, and nothing of them is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import SettingError, shortened

# A number of first ones, indices, or a slice, in YAML and files as text: "slice(2, 10)". (YAML reads 2:10 as 130.)
SkipPositions = int | Sequence[int] | slice | str
# The same in plain values, for files.
PlainSkip = int | tuple[int, ...] | str

_NUMBER = r"\s*([-+]?\d+|None)\s*"
_SLICE = re.compile(rf"slice\({_NUMBER},{_NUMBER}(?:,{_NUMBER})?\)")


def plain_skip(skip: object) -> PlainSkip | None:
    """Check a setting of positions to leave out, and write it in plain values.

    Args:
        skip: A number of first positions, or of last ones if it is negative; a list of indices, or a slice, counted
            like those of a Python list; a slice may be text, such as ``"slice(2, 10)"``. None for nothing said.

    Returns:
        A number, a tuple of indices, the text of a slice, or None.

    Raises:
        SettingError: If it is anything else.

    Example:
        >>> plain_skip(1), plain_skip([0, -1]), plain_skip(slice(2, 10)), plain_skip("slice(None, None, 2)")
        (1, (0, -1), 'slice(2, 10, None)', 'slice(None, None, 2)')
    """
    if skip is None:
        return None
    with suppress(TypeError, ValueError):
        return _plain(skip)
    raise SettingError(
        "skip_positions is a number of first positions to leave out (negative: of last ones), a list of indices, or a "
        f"slice such as slice(2, 10); got {shortened(repr(skip), 80)}."
    )


def _plain(skip: Any) -> PlainSkip:
    if isinstance(skip, (str, slice)):
        found = _slice(skip) if isinstance(skip, str) else skip
        range(0)[found]  # refuses what cannot be a slice of positions
        return repr(slice(*(x if x is None else operator.index(x) for x in (found.start, found.stop, found.step))))
    if isinstance(skip, bool):
        raise TypeError
    return tuple(map(operator.index, skip)) if isinstance(skip, Sequence) else operator.index(skip)


def kept_positions(skip: PlainSkip, valid: Tensor) -> Tensor:
    """Which positions are left when some of the valid ones are left out.

    Args:
        skip: What to leave out, as `plain_skip` returns it.
        valid: True at valid positions, shape ``(n, S)``.

    Returns:
        True at valid positions that are not left out, shape ``(n, S)``.

    Example:
        >>> kept_positions(1, torch.tensor([[False, True, True], [True, True, False]]))
        tensor([[False, False,  True],
                [False,  True, False]])
    """
    lengths, kind = valid.sum(1).unique(return_inverse=True)
    keeps = torch.zeros(len(lengths), max(1, valid.shape[1]), dtype=torch.bool, device="cpu")
    for row, length in enumerate(lengths.tolist()):
        keeps[row, :length] = True
        keeps[row, skipped_of(skip, length)] = False
    # The index of each position among the valid ones of its sample.
    index = (valid.long().cumsum(1) - 1).clamp(min=0)
    return valid & keeps.to(valid.device)[kind].gather(1, index)


def skipped_of(skip: PlainSkip, length: int) -> list[int]:
    """Indices of the positions that are left out of a sample.

    Args:
        skip: What to leave out, as `plain_skip` returns it.
        length: Number of positions of the sample.

    Returns:
        The indices from 0, ascending. Positions that the sample does not have are ignored.

    Example:
        >>> skipped_of(2, 4), skipped_of(-1, 4), skipped_of((0, -1, 9), 4), skipped_of("slice(1, None, 2)", 4)
        ([0, 1], [3], [0, 3], [1, 3])
    """
    if isinstance(skip, tuple):
        return sorted({index % length for index in skip if -length <= index < length})
    if isinstance(skip, int):
        return list(range(length))[:skip] if skip >= 0 else list(range(length))[skip:]
    return sorted(range(length)[_slice(skip)])


def _slice(text: str) -> slice:
    words = _SLICE.fullmatch(text.strip())
    if words is None:
        raise ValueError
    return slice(*(None if word in ("None", None) else int(word) for word in words.groups()))
