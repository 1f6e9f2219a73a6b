"""Several whole episodes end to end, so that one numpy call measures thousands of steps.

row        0  1  2  3  4  5  6  7
episode    0  0  0  1  1  1  1  1
step       0  1  2  0  1  2  3  4
pairs(2)   0        3  4  5           rows whose second next row belongs to the same episode
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla_oft.data.base import Source
from vla_oft.inspection.facts import Place

ROWS = 16384
"""Steps of a block, at least, where there are so many: enough to hide the cost of calls, 3 MB of 14-dimensional data."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """episodes, steps: int64 (N,). states: float64 (N, S), S may be 0. actions: float64 (N, D). All rounded to float32, as in training."""

    episodes: np.ndarray
    steps: np.ndarray
    states: np.ndarray
    actions: np.ndarray

    @cached_property
    def finite_states(self) -> np.ndarray:
        """bool (N,): rows of finite states."""
        return np.asarray(np.isfinite(self.states).all(axis=1))

    @cached_property
    def finite_actions(self) -> np.ndarray:
        """bool (N,): rows of finite actions."""
        return np.asarray(np.isfinite(self.actions).all(axis=1))

    def pairs(self, lag: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Rows t, int64, with t + lag in the same episode, where first[t] and second[t + lag] are true."""
        if lag >= len(self.steps):
            return np.empty(0, np.int64)
        head = len(self.steps) - lag
        return np.flatnonzero((self.episodes[:head] == self.episodes[lag:]) & first[:head] & second[lag:])

    def place(self, row: int, dimension: str | None = None) -> Place:
        """Episode and step of one row."""
        return Place(episode=int(self.episodes[row]), step=int(self.steps[row]), dimension=dimension)


def blocks(
    source: Source,
    unreadable: dict[int, str],
    visit: Callable[[int], None] = lambda episode: None,
    advance: Callable[[int], None] = lambda episodes: None,
) -> Iterator[Block]:
    """All episodes in order; `visit` sees each of them while its file is at hand, `advance` hears of every one.

    Those that cannot be read, or that `visit` refuses with ValueError, are left out and added to `unreadable`: episode -> reason.
    """
    waiting, rows = list[tuple[int, np.ndarray, np.ndarray]](), 0
    for episode in range(len(source)):
        try:
            states, actions = read_episode(source, episode)
            visit(episode)
        except ValueError as error:
            unreadable[episode] = str(error)
        else:
            waiting.append((episode, states, actions))
            rows += len(actions)
        advance(1)
        if rows >= ROWS:
            yield _joined(waiting)
            waiting, rows = [], 0
    if rows:
        yield _joined(waiting)


def read_episode(source: Source, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """(states (T, S), actions (T, D)), float64 after rounding to float32. Raises ValueError where their sizes are not as announced."""
    length = int(source.lengths[episode])
    found = {"action": (source.actions(episode), source.action_dim)}
    found["state"] = (source.states(episode) if source.state_dim else np.empty((length, 0)), source.state_dim)
    for what, (values, dim) in found.items():
        if values.shape != (length, dim):
            raise ValueError(f"{source.path}, episode {episode}: {what} is {values.shape}, announced were {(length, dim)}; record it again")
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is reported as such
        states, actions = (found[what][0].astype(np.float32).astype(np.float64) for what in ("state", "action"))
    return states, actions


def _joined(waiting: list[tuple[int, np.ndarray, np.ndarray]]) -> Block:
    lengths = [len(actions) for _, _, actions in waiting]
    return Block(
        episodes=np.repeat([episode for episode, _, _ in waiting], lengths),
        steps=np.concatenate([np.arange(length) for length in lengths]),
        states=np.concatenate([states for _, states, _ in waiting]),
        actions=np.concatenate([actions for _, _, actions in waiting]),
    )
