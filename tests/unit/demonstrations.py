"""Small real datasets for the data tests."""

from pathlib import Path

import numpy as np

from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Episode
from vla_oft_client import RobotSpec

SPEC = RobotSpec(
    name="pair",
    cameras=("front", "wrist"),
    state_dim=3,
    action_dim=2,
    control_hz=10.0,
    chunk_len=4,
    action_kind="delta_ee",
    absolute_mask=(False, False),
    normalize_mask=(True, False),
    normalization="bounds",
    action_limits=((-100.0, 100.0),) * 2,
)
LENGTHS = (11, 5, 14)


def episode(number: int, length: int, size: int = 32) -> Episode:
    """Frame t of episode e: red = 40 e + 20, blue bar of 2 t + 2 columns; wrist is the inverse. Action 0 is 100 e + t."""
    front = np.zeros((length, size, size, 3), np.uint8)
    front[..., 0] = 40 * number + 20
    for step in range(length):
        front[step, :, : 2 * step + 2, 2] = 200
    rng = np.random.default_rng(number)
    actions = np.stack([100 * number + np.arange(length), np.full(length, number)], 1)
    return Episode(
        images={"front": front, "wrist": 255 - front},
        states=rng.normal(size=(length, 3)).astype(np.float32),
        actions=actions.astype(np.float32),
        instructions=["first task", "second task"][number % 2],
        extras={"grounding": rng.integers(0, 2, (length, 2, 2, 4, 4)).astype(np.uint8)},
        info={"seed": number},
    )


def write(out: Path, lengths: tuple[int, ...] = LENGTHS, **options) -> list[Episode]:
    episodes = [episode(number, length) for number, length in enumerate(lengths)]
    with LeRobotWriter(out, SPEC, **options) as writer:
        for e in episodes:
            writer.append_episode(e)
    return episodes


def bar_width(image: np.ndarray) -> int:
    """Which step a front image shows: see `episode`."""
    return int((image[image.shape[0] // 2, :, 2] > 100).sum())
