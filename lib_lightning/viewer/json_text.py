"""JSON text for the viewer, with numbers of five significant digits.

`json.dumps` cannot limit the digits of numbers, and converting large arrays element by element is slow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def number(value: float | None, digits: int = 5) -> str:
    """Encode a number.

    Args:
        value: Any number, or None.
        digits: Number of significant digits.

    Returns:
        JSON; null for None, NaN and infinities.

    Example:
        >>> number(0.123456), number(float("nan"))
        ('0.12346', 'null')
    """
    return "null" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def numbers(values: np.ndarray | None, digits: int = 5) -> str:
    """Encode an array of numbers.

    Args:
        values: Floating-point array of shape ``(n,)``; or None.
        digits: Number of significant digits.

    Returns:
        JSON; null for None, and for each NaN and infinity.

    Example:
        >>> numbers(np.array([1.0, 2 / 3, np.inf]))
        '[1,0.66667,null]'
    """
    if values is None:
        return "null"
    if not np.isfinite(values).all():
        return f"[{','.join(number(value, digits) for value in values.tolist())}]"
    # One format for the whole array is twice as fast as one per element.
    return f"[{','.join([f'%.{digits}g'] * len(values)) % tuple(values.tolist())}]"


def integers(values: np.ndarray | None) -> str:
    """Encode an array of integers or booleans.

    Args:
        values: Array of shape ``(n,)``; or None.

    Returns:
        JSON; null for None.

    Example:
        >>> integers(np.array([3, 1])), integers(np.array([True]))
        ('[3,1]', '[true]')
    """
    return "null" if values is None else json.dumps(values.tolist(), separators=(",", ":"))


def object_(entries: Mapping[str, str]) -> str:
    """Build a JSON object from encoded values.

    Args:
        entries: JSON by key.

    Returns:
        JSON of the object.

    Example:
        >>> object_({"a": "[1,2]", "b": "null"})
        '{"a":[1,2],"b":null}'
    """
    return f"{{{','.join(f'{json.dumps(key)}:{value}' for key, value in entries.items())}}}"


def array(items: Iterable[str]) -> str:
    """Build a JSON array from encoded values.

    Args:
        items: JSON of each item.

    Returns:
        JSON of the array.

    Example:
        >>> array(["1", "null"])
        '[1,null]'
    """
    return f"[{','.join(items)}]"


def dump(value: Any) -> str:
    """Encode a small value, such as a list of names, with all digits.

    Args:
        value: Any value that can be represented in JSON.

    Returns:
        JSON, in ASCII.

    Raises:
        ValueError: If there is a NaN or an infinity.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
