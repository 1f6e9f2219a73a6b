"""What was read lately, kept within a budget of memory.

One store serves all datasets of a process, so its budget bounds them together. After a fork it is empty: its lock may be held by a thread
that does not exist in the child.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key; the least recently used are dropped when their sizes exceed `budget` together. The latest one always stays."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._start()

    def _start(self) -> None:
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock, self._process, self.total = threading.Lock(), os.getpid(), 0

    def get(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`, made (with its size) if it is not there. Two threads may make the same value at once: none waits."""
        if self._process != os.getpid():
            self._start()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value, size = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value, size
                self.total += size
            while self.total > self.budget and len(self._values) > 1:
                self.total -= self._values.popitem(last=False)[1][1]
        return value
