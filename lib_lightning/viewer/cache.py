"""A cache limited by size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Cache:
    """A thread-safe cache of recently used values, limited to a number of bytes.

    Args:
        limit: Maximum total size, in bytes.

    Attributes:
        size: Current total size, in bytes.

    Example:
        >>> cache = Cache(limit=10)
        >>> [cache.get(n, lambda: "*" * n, size=len) for n in (4, 5, 6)]
        ['****', '*****', '******']
        >>> cache.size
        6
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """Return the value of a key, computing it if it is not cached.

        Args:
            key: Key of the value.
            make: Computes the value. Two threads may compute it simultaneously; one of the results is kept.
            size: Computes the size of the value in bytes.

        Returns:
            The cached or computed value.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                value: T = self._entries[key][0]
                return value
        computed = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = computed, size(computed)
                self.size += self._entries[key][1]
            while self.size > self._limit:
                self.size -= self._entries.popitem(last=False)[1][1]
        return computed
