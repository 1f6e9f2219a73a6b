"""Which episodes a LeRobot dataset has, and where each lies: the same answer for v2.x (`lerobot_v2.py`) and v3.0 (`lerobot_v3.py`).

                 v2.x                                   v3.0
data             one file an episode, rows from 0       many episodes a file, one after the other
video            one file an episode, from 0 s          many episodes a file, from `from_timestamp` on
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Instructions. names: distinct. numbers: int64 (N,) sorted task numbers of the dataset; which: (N,) the name of each."""

    names: tuple[str, ...]
    numbers: np.ndarray
    which: np.ndarray

    @classmethod
    def of(cls, numbers: list[Any], texts: list[Any], where: Any) -> "Tasks":
        """From a table of tasks. Raises ValueError when a number is repeated or a text is none."""
        if not all(isinstance(n, int) for n in numbers) or len(set(numbers)) != len(numbers) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{where}: every task needs its own number and a text; convert the dataset again")
        order = np.argsort(np.array(numbers, np.int64), kind="stable")
        names = tuple(dict.fromkeys(texts[i] for i in order))
        place = {name: index for index, name in enumerate(names)}
        return cls(names=names, numbers=np.array(numbers, np.int64)[order], which=np.array([place[texts[i]] for i in order], np.int64))

    def find(self, numbers: np.ndarray, where: str) -> np.ndarray:
        """int64, which of `names` each number means. Raises ValueError naming `where` for numbers that are not in the table."""
        rows = np.searchsorted(self.numbers, numbers)
        known = rows < len(self.numbers)
        known[known] = self.numbers[rows[known]] == numbers[known]
        if not known.all():
            raise ValueError(f"{where}: task_index {int(numbers[~known][0])} is not in the table of tasks; copy meta/ again")
        return self.which[rows]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where episodes lie in files of one kind.

    keys: int64 (E, 2), the numbers in the path template. start: (E,) first row, or second of the video.
    total: int64 (E,) rows that the whole file must have; None for video.
    """

    keys: np.ndarray
    start: np.ndarray
    total: np.ndarray | None = None

    def take(self, chosen: np.ndarray) -> "Place":
        """The places of some episodes."""
        return Place(keys=self.keys[chosen], start=self.start[chosen], total=None if self.total is None else self.total[chosen])


@dataclass(frozen=True, kw_only=True)
class Index:
    """Episodes in order. numbers: int64 (E,) the dataset's own numbers; lengths: int64 (E,) steps; notes: name -> (E,) of our writer's."""

    numbers: np.ndarray
    lengths: np.ndarray
    data: Place
    videos: dict[str, Place]
    notes: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, chosen: np.ndarray) -> "Index":
        """Some of the episodes: bool (E,), or their positions."""
        return Index(
            numbers=self.numbers[chosen],
            lengths=self.lengths[chosen],
            data=self.data.take(chosen),
            videos={feature: place.take(chosen) for feature, place in self.videos.items()},
            notes={name: values[chosen] for name, values in self.notes.items()},
        )
