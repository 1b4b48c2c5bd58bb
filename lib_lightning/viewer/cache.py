"""What has been made of files, kept as long as there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Cache:
    """Keeps what was used last, up to a number of bytes. Any thread may ask.

    Args:
        limit: Most bytes to keep.

    Attributes:
        size: Bytes kept.

    Example:
        >>> cache = Cache(limit=10)
        >>> [cache.get(n, lambda: "*" * n, size=len) for n in (4, 5, 6)]
        ['****', '*****', '******']
        >>> cache.size
        6
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """Get what belongs to a key; it is made if it is not there.

        Args:
            key: What tells it apart.
            make: Makes it. What two threads make at once is kept once.
            size: Tells its size in bytes.

        Returns:
            What was kept or made.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                value: T = self._kept[key][0]
                return value
        made = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made, size(made)
                self.size += self._kept[key][1]
            while self.size > self._limit:
                self.size -= self._kept.popitem(last=False)[1][1]
        return made
