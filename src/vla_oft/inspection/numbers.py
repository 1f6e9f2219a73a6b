"""How the numbers of the state, or of the actions, are distributed: exact moments, histograms, distinct values, what is not finite."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_oft.data.check import TOLERANCE
from vla_oft.inspection.blocks import Block
from vla_oft.inspection.facts import Dimension, Place, Sighting
from vla_oft.inspection.histograms import GridHistogram
from vla_oft.statistics import Moments, StreamingMoments

DISTINCT = 8
"""Up to so many distinct values are counted one by one: commands of a gripper, flags."""


class Numbers:
    """Collects blocks. what: "state" or "action". names: one for each dimension. rows: how many steps are announced.

    limits: (low, high) of each dimension, beyond which values are counted; None counts nothing.
    """

    def __init__(self, what: str, names: tuple[str, ...], rows: int, limits: Sequence[tuple[float, float]] | None = None) -> None:
        self.what, self.names, self._announced = what, names, rows
        dim = len(names)
        self.rows, self._broken_rows, self._first_broken = 0, 0, None
        self._non_finite = np.zeros(dim, np.int64)
        self._histograms = [GridHistogram() for _ in names]
        self._distinct: list[dict[float, int] | None] = [{} for _ in names]
        self._moments = StreamingMoments(max(rows, 1), dim, what)
        self._limits = None if limits is None else np.array(limits, np.float64).T
        self._outside, self._first_outside = np.zeros(dim, np.int64), dict[int, Place]()

    def update(self, block: Block) -> None:
        """Add a block."""
        values, good = self._of(block)
        if not self.names:
            return
        self._note_broken(block, values, good)
        self._note_outside(block, values)
        values = values[good]
        self._moments.update(values)
        self.rows += len(values)
        for dim, column in enumerate(values.T):
            self._histograms[dim].update(column)
            self._count_distinct(dim, column)

    def complete(self) -> bool:
        """Whether every announced step came and was finite. Otherwise give all blocks to `update_moments` before `result`."""
        if self.rows == self._announced or not self.names:
            return True
        self._moments = StreamingMoments(max(self.rows, 1), len(self.names), self.what)
        return False

    def update_moments(self, block: Block) -> None:
        """The second pass of a dataset with holes: exact quantiles need the number of rows beforehand."""
        values, good = self._of(block)
        self._moments.update(values[good])

    def result(self) -> tuple[Dimension, ...]:
        """One entry for each dimension."""
        moments = self._moments.result() if self.rows else None
        return tuple(self._dimension(index, moments) for index in range(len(self.names)))

    def broken(self) -> Sighting:
        """Steps with values that are not finite."""
        return Sighting(count=self._broken_rows, of=self.rows + self._broken_rows, first=self._first_broken)

    def _of(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        return (block.states, block.finite_states) if self.what == "state" else (block.actions, block.finite_actions)

    def _note_broken(self, block: Block, values: np.ndarray, good: np.ndarray) -> None:
        if good.all():
            return
        bad = ~np.isfinite(values)
        self._non_finite += bad.sum(axis=0)
        self._broken_rows += int((~good).sum())
        if self._first_broken is None:
            row, dim = np.argwhere(bad)[0]
            self._first_broken = block.place(int(row), self.names[dim])

    def _note_outside(self, block: Block, values: np.ndarray) -> None:
        if self._limits is None:
            return
        low, high = self._limits
        slack = TOLERANCE * (high - low)
        outside = (values < low - slack) | (values > high + slack)
        self._outside += outside.sum(axis=0)
        for dim in np.flatnonzero(outside.any(axis=0)):
            self._first_outside.setdefault(int(dim), block.place(int(np.argmax(outside[:, dim])), self.names[dim]))

    def _count_distinct(self, dim: int, column: np.ndarray) -> None:
        seen = self._distinct[dim]
        if seen is None:
            return
        for value, count in zip(*np.unique(column, return_counts=True), strict=True):
            seen[float(value)] = seen.get(float(value), 0) + int(count)
            if len(seen) > DISTINCT:
                self._distinct[dim] = None
                return

    def _dimension(self, index: int, moments: Moments | None) -> Dimension:
        seen = self._distinct[index]
        outside = Sighting(count=int(self._outside[index]), of=self.rows + self._broken_rows, first=self._first_outside.get(index))
        numbers: dict[str, Any] = {} if moments is None else {name: values[index] for name, values in moments.to_dict().items()}
        return Dimension(
            index=index,
            name=self.names[index],
            histogram=self._histograms[index].result(),
            values=tuple(sorted(seen.items())) if seen else None,
            non_finite=int(self._non_finite[index]),
            outside=None if self._limits is None else outside,
            **numbers,
        )
