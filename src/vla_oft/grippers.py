"""Gripper recordings of other people's datasets, brought to one convention: 1 open, 0 closed, absolute commands.

measured openings   0.98 0.60 0.30 0.02 0.01   `binarize`        1 0 0 0 0       between open and closed, what comes next counts
relative commands   0 +1 0 0 -1 0              `from_relative`   1 0 0 0 1 1     +1 closes, -1 opens, 0 keeps
"""

import numpy as np

OPEN, CLOSED = 0.95, 0.05
"""Openings beyond which a gripper counts as open or closed."""

COMMAND = 0.1
"""Relative commands up to this size are no commands."""


def binarize(openings: np.ndarray) -> np.ndarray:
    """Openings (T,), 1 open to 0 closed -> float32 (T,) of 0 and 1: a gripper on its way already counts as what it becomes.

    Where it never arrives before the end of the episode, its last opening stands as it is.
    """
    out = np.array(openings, np.float32)
    ahead = out[-1] if len(out) else np.float32(0)
    for step in range(len(out) - 1, -1, -1):
        if out[step] > OPEN:
            ahead = np.float32(1)
        elif out[step] < CLOSED:
            ahead = np.float32(0)
        out[step] = ahead
    return out


def invert(openings: np.ndarray) -> np.ndarray:
    """0 open to 1 closed -> 1 open to 0 closed, and back; same shape and dtype."""
    return 1 - openings


def from_relative(commands: np.ndarray) -> np.ndarray:
    """Relative commands (T,), positive closes -> float32 (T,) of 1 (open) and 0 (closed).

    Before the first command, the gripper is in the state that this command leaves; without any, it is open.
    """
    wanted = np.where(np.asarray(commands) > COMMAND, 0.0, np.where(np.asarray(commands) < -COMMAND, 1.0, np.nan)).astype(np.float32)
    given = np.flatnonzero(~np.isnan(wanted))
    if not given.size:
        return np.ones_like(wanted)
    latest = np.maximum.accumulate(np.where(np.isnan(wanted), -1, np.arange(len(wanted))))
    return np.where(latest < 0, 1 - wanted[given[0]], wanted[latest])
