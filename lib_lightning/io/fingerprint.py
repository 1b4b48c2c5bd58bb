"""A short name for the features of a snapshot, by which a comparison says which snapshots it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def fingerprint(step: Any, weights: Any, layers: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Hash of what identifies the features of a snapshot: labels, notes and effects that are added later do not count.

    Args:
        step: Number of optimizer steps before it; None for a graph outside of a run.
        weights: Hash of the weights that it was computed with; None if that is unknown.
        layers: For each node layer its name, and the ids and importances of its features, shape ``(r,)``.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> layer = ("fc1", np.array([0, 1]), np.array([2.0, 1.0]))
        >>> fingerprint(10, None, [layer]) == fingerprint(10, None, [layer])
        True
        >>> fingerprint(10, None, [layer]) == fingerprint(20, None, [layer])
        False
    """
    digest = hashlib.sha256(json.dumps([step, weights]).encode())
    for name, ids, importance in layers:
        digest.update(json.dumps([name, len(ids)]).encode())
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
        digest.update(np.asarray(importance, dtype="<f8").tobytes())
    return digest.hexdigest()[:16]
