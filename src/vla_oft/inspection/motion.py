"""What happens from one step to the next: jumps, whole turns, steps that were left out, pauses.

A JUMP is a change of one dimension that is far beyond the ordinary ones (8 times what 95 % of the steps stay below) and a good part (a
fifth) of the whole range of that dimension. Angles that pass from pi to -pi are counted apart, as WRAPS.

A LEAP is what a lost frame leaves behind: a steady motion that covers twice the way, or more, in one single step, in the same direction.

    position   0.0  0.1  0.2  0.3  0.5  0.6  0.7
    change        .1   .1   .1   .2   .1   .1        one frame is missing
"""

import math
from collections.abc import Sequence

import numpy as np

from vla_oft.inspection.blocks import Block
from vla_oft.inspection.facts import Dimension, Pauses, Place, Sighting
from vla_oft.inspection.histograms import SizeHistogram
from vla_oft.noops import THRESHOLD, kept_steps

ORDINARY, FACTOR, RANGE = 0.95, 8.0, 0.2
"""A jump is FACTOR times what ORDINARY of the changes stay below, and RANGE of the dimension's range."""

COMMON = 0.02
"""What more than this share of the steps does is how the signal is, not an accident."""

TURN, TURN_SLACK = 2 * math.pi, 0.3


class Changes:
    """Changes of the state, or of the actions, from one step to the next. what: "state" or "action"."""

    def __init__(self, what: str, names: tuple[str, ...]) -> None:
        self._what, self._names = what, names
        self._all, self._unturned = _Sizes(names), _Sizes(names)  # which of both counts is known when the range is
        self._turns, self._first_turn = np.zeros(len(names), np.int64), dict[int, Place]()
        self._count = 0

    def update(self, block: Block) -> None:
        """Add a block."""
        values, good = (block.states, block.finite_states) if self._what == "state" else (block.actions, block.finite_actions)
        rows = block.pairs(1, good, good)
        if not rows.size or not self._names:
            return
        sizes = np.abs(values[rows + 1] - values[rows])
        turns = np.abs(sizes - TURN) < TURN_SLACK
        self._all.update(block, rows + 1, sizes)
        self._unturned.update(block, rows + 1, np.where(turns, 0, sizes))
        self._count += len(rows)
        self._turns += turns.sum(axis=0)
        for dim in np.flatnonzero(turns.any(axis=0)):
            self._first_turn.setdefault(int(dim), block.place(int(rows[np.argmax(turns[:, dim])]) + 1, self._names[dim]))

    def jumps(self, dimension: Dimension) -> tuple[Sighting, float | None]:
        """(jumps of one dimension, the largest). Dimensions with a few distinct values have no jumps: they consist of them."""
        if dimension.values is not None or not self._count or not dimension.span:
            return Sighting(of=self._count), None
        changes, index = self._unturned if _is_angle(dimension) else self._all, dimension.index
        size = max(FACTOR * changes.histogram.quantile(index, ORDINARY), RANGE * dimension.span)
        count, _ = changes.histogram.above(index, size)
        if not count or count > max(1, COMMON * self._count):
            return Sighting(of=self._count), None
        return Sighting(count=count, of=self._count, first=changes.where[index]), float(changes.largest[index])

    def wraps(self, dimension: Dimension) -> Sighting:
        """Whole turns of one dimension, if its range is that of an angle."""
        if not _is_angle(dimension):
            return Sighting(of=self._count)
        return Sighting(count=int(self._turns[dimension.index]), of=self._count, first=self._first_turn.get(dimension.index))


class _Sizes:
    """How large changes are in each dimension, and where the largest one is."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.histogram, self.largest = SizeHistogram(len(names)), np.zeros(len(names))
        self.where: list[Place | None] = [None] * len(names)

    def update(self, block: Block, rows: np.ndarray, sizes: np.ndarray) -> None:
        self.histogram.update(sizes)
        top = sizes.argmax(axis=0)
        for dim in np.flatnonzero(sizes.max(axis=0) > self.largest):
            self.largest[dim] = sizes[top[dim], dim]
            self.where[dim] = block.place(int(rows[top[dim]]), self._names[dim])


def _is_angle(dimension: Dimension) -> bool:
    """Whether the range is a whole turn: an angle that turns over comes close to both ends."""
    return abs(dimension.span - TURN) < 2 * TURN_SLACK


STEADY, LEAP, ALIGNED = 1.4, 1.7, 0.97
"""Neighbouring changes differ by less than STEADY; a leap is LEAP times the largest of them; their directions agree (cosine)."""


class Leaps:
    """Steps that look as if frames before them had been left out. dims: dimensions of the state that move with the arm."""

    def __init__(self, dims: list[int]) -> None:
        self._dims = dims
        self._count, self._of = 0, 0
        self._first: Place | None = None

    def update(self, block: Block) -> None:
        """Add a block."""
        good = block.finite_states
        centre = block.pairs(5, good, good) + 2  # the change from row c to c + 1, with two changes on either side
        if not centre.size or not self._dims:
            return
        states = block.states[:, self._dims]
        change = np.diff(states, axis=0)
        speed = np.linalg.norm(np.nan_to_num(change, nan=0, posinf=0, neginf=0), axis=1)
        around = np.stack([speed[centre + shift] for shift in (-2, -1, 1, 2)])
        self._of += len(centre)
        moving = around.min(axis=0) > 0.2 * np.quantile(speed, 0.9)
        found = moving & (around.max(axis=0) < STEADY * around.min(axis=0)) & (speed[centre] > LEAP * around.max(axis=0))
        rows = centre[found]
        if not rows.size:
            return
        agree = (_cosine(change[rows - 1], change[rows]) > ALIGNED) & (_cosine(change[rows], change[rows + 1]) > ALIGNED)
        rows = rows[agree]
        self._count += len(rows)
        if self._first is None and rows.size:
            self._first = block.place(int(rows[0]) + 1)

    def result(self) -> Sighting:
        """Leaps among the steps with enough neighbours."""
        return Sighting(count=self._count, of=self._of, first=self._first)


def still_steps(actions: np.ndarray, grippers: Sequence[int]) -> np.ndarray:
    """bool (T,): steps of an episode's finite increments (T, D) in which nothing is done, as `vla_oft.noops` defines it.

    With one gripper in the last dimension this is what the filter drops. Several grippers count as one with all their positions
    together; without any, only motion counts.
    """
    arm = np.delete(actions, list(grippers), axis=1)
    if len(grippers) == 1:
        hand = actions[:, grippers[0]]
    else:
        hand = np.unique(actions[:, list(grippers)], axis=0, return_inverse=True)[1].reshape(-1) if grippers else np.zeros(len(actions))
    still = np.ones(len(actions), bool)
    still[kept_steps(np.column_stack([arm, hand]))] = False
    return still


class Stillness:
    """Pauses, of actions of either kind. grippers: their dimensions."""

    def __init__(self, grippers: Sequence[int]) -> None:
        self._grippers = list(grippers)
        self._rows = self._noops = self._repeats = self._pairs = 0
        self._first_noop: Place | None = None
        self._first_repeat: Place | None = None

    def update(self, block: Block) -> None:
        """Add a block. Steps that are not finite are no pauses."""
        good = block.finite_actions
        starts = np.flatnonzero(block.steps == 0)
        for start, end in zip(starts, [*starts[1:], len(block.steps)], strict=True):
            rows = start + np.flatnonzero(good[start:end])
            still = still_steps(block.actions[rows], self._grippers)
            self._rows, self._noops = self._rows + len(rows), self._noops + int(still.sum())
            if self._first_noop is None and still.any():
                self._first_noop = block.place(int(rows[np.argmax(still)]))
        rows = block.pairs(1, good, good)
        same = np.abs(block.actions[rows + 1] - block.actions[rows]).max(axis=1, initial=0) < THRESHOLD
        self._pairs, self._repeats = self._pairs + len(rows), self._repeats + int(same.sum())
        if self._first_repeat is None and same.any():
            self._first_repeat = block.place(int(rows[np.argmax(same)]) + 1)

    def result(self) -> Pauses:
        """Shares of all steps."""
        return Pauses(
            noops=Sighting(count=self._noops, of=self._rows, first=self._first_noop),
            repeated_targets=Sighting(count=self._repeats, of=self._pairs, first=self._first_repeat),
        )


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
