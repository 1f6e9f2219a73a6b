"""Steps in which a demonstrator did nothing: the reference drops them from LIBERO's recordings before training.

A policy that has seen pauses pauses too. The gripper counts by its CHANGE: a command that only repeats the one before is nothing new.

step           0    1    2    3    4    5
arm          still moves still still still moves
gripper       -1   -1   -1   +1   +1   +1
kept                1         3         5       3 closes the gripper; before the first motion, nothing is kept
"""

import numpy as np

THRESHOLD = 1e-4
"""Norm of the motion below which the arm stands still, in action units."""


def is_noop(action: np.ndarray, previous: np.ndarray | None = None, threshold: float = THRESHOLD) -> bool:
    """Whether an action (D,), gripper last, changes nothing. previous: the action before it, None at the start of an episode."""
    still = bool(np.linalg.norm(action[:-1]) < threshold)
    return still and (previous is None or bool(action[-1] == previous[-1]))


def kept_steps(actions: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Steps of an episode (T, D) that do something, int64 in order; each is compared with the last one that was KEPT."""
    kept, gripper = np.asarray(np.linalg.norm(actions[:, :-1], axis=1) >= threshold), actions[:, -1]
    last: int | None = None  # only pauses need a look at what was kept before them
    for step in range(len(actions)):
        if not kept[step]:
            kept[step] = last is not None and gripper[step] != gripper[last]
        if kept[step]:
            last = step
    return np.flatnonzero(kept)
