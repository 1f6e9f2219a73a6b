"""How state and actions belong together: absolute targets or increments, with which delay; which way round the grippers turn.

    absolute     action[t] is about state[t + lag]                     ALOHA: joint targets of a leader arm
    increments   action[t] is proportional to the state's change       LIBERO: end-effector steps

Dimensions are compared by their index, so this shows where both begin with the same quantities, and stays silent elsewhere.
"""

from collections.abc import Sequence

import numpy as np

from vla_oft.inspection.blocks import Block
from vla_oft.inspection.facts import Dimension, Following, Gripper
from vla_oft_client import RobotSpec

LAGS, CHANGE_LAGS = 11, 4
EXPLAINED, CORRELATED = 0.8, 0.5
"""From which share of variance on actions count as targets, and from which correlation on as increments."""

ENOUGH = 20
"""Pairs of steps below which nothing is said."""

DELAY = 2
"""Steps after a command when the gripper's opening is looked at."""

TOLD = 0.4
"""Correlation from which on a gripper's direction is believed."""


class Follower:
    """Collects blocks. dims: dimensions that the state shares with the actions by index, without grippers."""

    def __init__(self, dims: Sequence[int]) -> None:
        self._dims = list(dims)
        self._squares = np.zeros((LAGS, len(self._dims)))
        self._counts = np.zeros(LAGS, np.int64)
        self._changes = [Correlation(len(self._dims)) for _ in range(CHANGE_LAGS)]

    def update(self, block: Block) -> None:
        """Add a block."""
        if not self._dims:
            return
        actions, states = block.actions[:, self._dims], block.states[:, self._dims]
        for lag in range(LAGS):
            rows = block.pairs(lag, block.finite_actions, block.finite_states)
            self._squares[lag] += ((actions[rows] - states[rows + lag]) ** 2).sum(axis=0)
            self._counts[lag] += len(rows)
        for lag, correlation in enumerate(self._changes):
            rows = block.pairs(lag + 1, block.finite_actions & block.finite_states, block.finite_states)
            rows = rows[block.finite_states[rows + lag]]
            correlation.update(actions[rows], states[rows + lag + 1] - states[rows + lag])

    def result(self, state: Sequence[Dimension], action: Sequence[Dimension]) -> Following:
        """The verdict, from dimensions that move in both."""
        moving = [i for i, d in enumerate(self._dims) if (state[d].std or 0) > 1e-9 and (action[d].std or 0) > 1e-9]
        if not moving or self._counts[0] < ENOUGH:
            return Following()
        variance = np.array([(state[self._dims[i]].std or 0) ** 2 for i in moving])
        used = np.flatnonzero(self._counts >= ENOUGH)
        explained = 1 - self._squares[used][:, moving] / self._counts[used, None] / variance
        top = int(np.argmax(explained.mean(axis=1)))
        best, strength = int(used[top]), float(np.median(explained[top]))
        if strength >= EXPLAINED:
            return Following(kind="absolute", strength=strength, lag=best, copies=bool((explained[0] > 1 - 1e-9).all()))
        found = np.stack([np.nan_to_num(c.result())[moving] for c in self._changes])
        lag = int(found.mean(axis=1).argmax())
        agreeing = found[lag] > CORRELATED
        if agreeing.sum() >= max(1, len(moving) / 3) and found[lag].mean() > CORRELATED / 2:
            return Following(kind="increments", strength=float(found[lag][agreeing].mean()), lag=lag + 1)
        return Following()


class Correlation:
    """Pearson's correlation of two streams of (N, D), dimension by dimension."""

    def __init__(self, dim: int) -> None:
        self._sums = np.zeros((6, dim))  # n, x, y, xx, yy, xy

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows."""
        self._sums += np.stack([np.full(x.shape[1], len(x)), *(v.sum(axis=0) for v in (x, y, x * x, y * y, x * y))])

    def result(self) -> np.ndarray:
        """float64 (D,); NaN where fewer than `ENOUGH` rows came, or one side never changes."""
        n, x, y, xx, yy, xy = self._sums
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = (xx - x * x / n) * (yy - y * y / n)
            floor = 1e-12 * np.maximum(xx, 1e-30) * np.maximum(yy, 1e-30)
            return np.where((n >= ENOUGH) & (spread > floor), (xy - x * y / n) / np.sqrt(np.maximum(spread, 1e-300)), np.nan)


class Fingers:
    """Collects what grippers are told and what their fingers do. pairs: (action dimension, dimensions of the state) of each gripper."""

    def __init__(self, pairs: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        self._pairs = pairs
        self._follow = [Correlation(1) for _ in pairs]
        self._mirror = [Correlation(1) for _ in pairs]
        self._difference = [Correlation(1) for _ in pairs]

    def update(self, block: Block) -> None:
        """Add a block."""
        rows = block.pairs(DELAY, block.finite_actions, block.finite_states)
        after = block.states[rows + DELAY]
        for number, (action, states) in enumerate(self._pairs):
            command = block.actions[rows, action][:, None]
            if states:
                self._follow[number].update(command, after[:, [states[0]]])
            if len(states) == 2:
                self._mirror[number].update(after[:, [states[0]]], after[:, [states[1]]])
                self._difference[number].update(command, after[:, [states[0]]] - after[:, [states[1]]])

    def result(self, action: Sequence[Dimension], state: Sequence[Dimension]) -> tuple[Gripper, ...]:
        """One entry for each gripper."""
        return tuple(self._gripper(number, action, state) for number in range(len(self._pairs)))

    def _gripper(self, number: int, action: Sequence[Dimension], state: Sequence[Dimension]) -> Gripper:
        index, states = self._pairs[number]
        side = 0 if len(states) < 2 or not self._mirror[number].result()[0] < -0.8 else _side(state[states[0]], state[states[1]])
        mirrored = side != 0
        found = float(side * self._difference[number].result()[0] if mirrored else self._follow[number].result()[0])
        told = bool(np.isfinite(found)) and abs(found) >= TOLD
        convention, values = _convention(action[index])
        return Gripper(
            index=index,
            name=action[index].name,
            convention=convention,
            values=values,
            states=states if mirrored else states[:1],
            correlation=found if np.isfinite(found) else None,
            opens=("high" if found > 0 else "low") if told and mirrored else None,
        )


def gripper_dims(names: Sequence[str], dim: int, spec: RobotSpec | None) -> tuple[int, ...]:
    """Action dimensions that drive grippers: the robot's, those called so, or the last of each arm (7 or 14 dimensions, and the like)."""
    if spec is not None:
        return tuple(g.index for g in spec.gripper)
    called = tuple(i for i, name in enumerate(names) if "grip" in name.lower())
    if called or dim < 5:
        return called
    return (6, 13) if dim == 14 else (dim - 1,)


def finger_dims(names: Sequence[str], grippers: Sequence[int], state_dim: int, action_dim: int) -> tuple[tuple[int, ...], ...]:
    """For each gripper the dimensions of the state that may show its opening: those called so, the same index, or the last ones."""
    called = [i for i, name in enumerate(names) if "grip" in name.lower() or "finger" in name.lower()]
    if called and len(called) in (len(grippers), 2 * len(grippers)):
        each = len(called) // max(1, len(grippers))
        return tuple(tuple(called[each * i : each * (i + 1)]) for i in range(len(grippers)))
    if state_dim == action_dim:
        return tuple((index,) for index in grippers)
    if len(grippers) == 1 and state_dim >= 7:
        return ((state_dim - 1, state_dim - 2),)
    return tuple(() for _ in grippers)


def _side(a: Dimension, b: Dimension) -> int:
    """1 when a - b is the opening between two fingers, -1 when it is b - a, 0 when they do not lie on either side of zero."""
    first, second = a.mean or 0, b.mean or 0
    return 0 if first * second >= 0 else 1 if first > 0 else -1


def _convention(dimension: Dimension) -> tuple[str, str]:
    if dimension.min is None or dimension.max is None:
        return "constant", "no finite values"
    if dimension.constant:
        return "constant", f"always {dimension.min:g}"
    if dimension.values is not None and len(dimension.values) <= 3:
        return "binary", ", ".join(f"{value:g} ({count} steps)" for value, count in dimension.values)
    return "continuous", f"{dimension.min:g} to {dimension.max:g}"
