"""Where in the input of a model the positions of a node layer are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Places:
    """The parts of an input that the positions of a node layer are shown at.

    The position with indices ``k`` of the grid is shown from ``start + stride * k`` on, along each axis, over ``size``.

    Attributes:
        grid: Shape of the positions: ``(T,)`` or ``(H, W)``.
        start: Where the first position begins, along each axis, in pixels or steps of the input.
        stride: Distance of neighbouring positions.
        size: Length of each part.
        input: Shape of the input.
        skipped: Number of positions in front of those of the grid that belong to no part of the input, such as the
            class token of a vision transformer.
        is_region: Whether a part is all of the input that its position depends on; False where the input is only
            divided evenly.

    Example:
        >>> convolved = Places((4, 4), (-1, -1), (2, 2), (3, 3), (8, 8), is_region=True)
        >>> convolved.part(5), convolved.part(0)
        ((1, 1, 3, 3), (0, 0, 2, 2))
    """

    grid: tuple[int, ...]
    start: tuple[float, ...]
    stride: tuple[float, ...]
    size: tuple[float, ...]
    input: tuple[int, ...]
    skipped: int = 0
    is_region: bool = False

    def part(self, position: int) -> tuple[int, ...] | None:
        """The part of the input for a position.

        Args:
            position: Its index among the positions of a sample, as flattened.

        Returns:
            Where it begins along each axis, then its length along each: ``(top, left, height, width)`` in pixels, or
            ``(first, length)`` in steps; None for a position without any.
        """
        index, indices = position - self.skipped, list[int]()
        if not 0 <= index < math.prod(self.grid):
            return None
        for length in reversed(self.grid):
            indices.insert(0, index % length)
            index //= length
        ends = []
        for k, start, stride, size, length in zip(indices, self.start, self.stride, self.size, self.input, strict=True):
            first = start + stride * k
            ends.append((max(0, math.floor(first + 1e-6)), min(length, math.ceil(first + size - 1e-6))))
        return (*(a for a, _ in ends), *(max(0, b - a) for a, b in ends))

    def step(self, position: int) -> int | None:
        """The step or token of a sequence that is in the middle of the part for a position.

        Args:
            position: Its index.

        Returns:
            The index of the step; None for a position without any, and in images.
        """
        if len(self.grid) != 1 or self.part(position) is None:
            return None
        middle = self.start[0] + self.stride[0] * (position - self.skipped) + (self.size[0] - 1) / 2
        return min(self.input[0] - 1, max(0, math.floor(middle + 0.5 + 1e-6)))

    @property
    def plain(self) -> dict[str, Any]:
        """The same in lists and numbers, for files."""
        found = {name: list(getattr(self, name)) for name in ("grid", "start", "stride", "size", "input")}
        return {**found, "skipped": self.skipped, "is_region": self.is_region}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | None) -> Places | None:
        """The places that `plain` describes; None for None, and for anything else.

        Args:
            plain: What `plain` returned, or None.

        Example:
            >>> places = Places((4,), (0,), (1,), (1,), (4,))
            >>> Places.from_plain(places.plain) == places, Places.from_plain(None)
            (True, None)
        """
        try:
            assert plain is not None
            axes = {name: tuple(plain[name]) for name in ("grid", "start", "stride", "size", "input")}
            return cls(**axes, skipped=int(plain["skipped"]), is_region=bool(plain["is_region"]))
        except (AssertionError, KeyError, TypeError, ValueError):
            return None


def position_in_input(places: Mapping[str, Any] | None, position: int) -> dict[str, Any]:
    """Where to show a position, for the page of a feature.

    Args:
        places: Of its node layer, from ``info["places"]`` of a graph: `Places.plain`, or None.
        position: Its index among the positions of a sample.

    Returns:
        ``position_box``: ``[top, left, height, width]`` in pixels of the input, None for no image; ``token``: index of
        the token or step, None for no sequence.

    Example:
        >>> position_in_input(Places((2, 2), (0, 0), (4, 4), (4, 4), (8, 8)).plain, 3)
        {'position_box': [4, 4, 4, 4], 'token': None}
    """
    found = Places.from_plain(places)
    part = None if found is None else found.part(position)
    if found is None or part is None:
        return {"position_box": None, "token": None}
    return {"position_box": list(part) if len(part) == 4 else None, "token": found.step(position)}
