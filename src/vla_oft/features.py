"""How other people's recordings become a robot's cameras, state and actions: facts that a `robots/*.py` file states as data.

    dataset    image, wrist_image | state | action (-1 opens, +1 closes)
    robot      front, wrist       | state | action (1 open, 0 closed)

A robot has several `Features`, one for each layout that its recordings are found in; `vla_oft.data.adapt` picks the one that fits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Convert = Callable[[np.ndarray | None, np.ndarray], tuple[np.ndarray | None, np.ndarray, np.ndarray]]
"""(states (T, S) or None, actions (T, D)) -> the robot's (states, actions, steps), N rows each; steps: int64 (N,) of the recording."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """One layout of recordings.

    name: how a person chooses it. formats: names of the formats that it occurs in.
    cameras: pairs (robot's camera, dataset's camera). state: names of arrays that are joined into the state; "state" is the dataset's own
    idea of it. action: likewise. image: what is done to every frame, uint8 (H, W, 3) to the same.
    convert: see `Convert`; None keeps everything. cuts: whether `convert` drops steps.
    drop_noops, drop_unlabelled: whether steps in which nothing moves, and episodes without an instruction, are left out before training, as
    the reference does for these recordings. fps: the true rate where these recordings note a wrong one.
    version: must change with what `convert` or `image` does, because caches are kept by it.
    """

    name: str
    formats: tuple[str, ...]
    cameras: tuple[tuple[str, str], ...]
    state: tuple[str, ...] = ("state",)
    action: str = "action"
    image: Callable[[np.ndarray], np.ndarray] | None = None
    convert: Convert | None = None
    cuts: bool = False
    drop_noops: bool = False
    drop_unlabelled: bool = False
    fps: float | None = None
    version: int = 1


@dataclass(frozen=True)
class EachAction:
    """A `Convert` that changes actions (T, D), step by step, and nothing else. A class, because it travels to worker processes."""

    change: Callable[[np.ndarray], np.ndarray]

    def __call__(self, states: np.ndarray | None, actions: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        return states, self.change(actions), np.arange(len(actions))
