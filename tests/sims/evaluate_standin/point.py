"""A tiny real simulator for testing the evaluation: a point is driven onto the pad that the instruction names.

Action (2): velocity, 1.0 = a tenth of the table a step. State (2): position of the point in [0, 1].
"""

import numpy as np

from vla_oft.sims.base import Outcome, SimulatorError
from vla_oft_client import Observation, RobotSpec

FAMILIES = ("touch", "fragile")
COLOURS = ("red", "green", "blue")
RGB = {"red": (220, 60, 50), "green": (60, 180, 80), "blue": (60, 90, 220)}
SPEC = RobotSpec(
    name="point",
    cameras=("front",),
    state_dim=2,
    action_dim=2,
    control_hz=20.0,
    chunk_len=4,
    action_kind="delta_ee",
    absolute_mask=(False, False),
    normalize_mask=(True, True),
    normalization="bounds",
    action_limits=((-1.0, 1.0), (-1.0, 1.0)),
)


def make(family, *, camera_size=128):
    return Point(family, camera_size)


class Point:
    """Three pads at seeded places. In the family "fragile" every third scene breaks on a simulator's first use, every fifth always."""

    spec, max_steps = SPEC, 30

    def __init__(self, family, camera_size):
        self.family, self.camera_size, self.resets = family, camera_size, 0
        self.instruction = ""

    def reset(self, seed, *, swap=0):
        random = np.random.default_rng(seed)
        self.seed, self.steps = seed, 0
        self.pads = {c: (0.2 + 0.3 * i, random.uniform(0.55, 0.95)) for i, c in enumerate(random.permutation(COLOURS))}
        self.target = COLOURS[(int(random.integers(3)) + swap) % 3]
        self.position = np.array([0.5, 0.05])
        self.instruction = f"touch the {self.target} pad"
        self.resets += 1

    def observe(self):
        return Observation(
            {"front": self.frame(self.camera_size, self.camera_size)}, self.position.astype(np.float32), self.instruction, self.steps / 20
        )

    def step(self, action):
        if self.family == "fragile" and self.steps == 2 and (self.seed % 5 == 0 or (self.seed % 3 == 0 and self.resets > 1)):
            raise SimulatorError("physics unstable") if self.seed % 2 else RuntimeError("renderer lost")
        self.position = np.clip(self.position + 0.1 * action, 0, 1)
        self.steps += 1

    def outcome(self):
        chosen = next((c for c, pad in self.pads.items() if np.abs(self.position - pad).max() < 0.06), None)
        return Outcome(success=chosen == self.target, chosen=chosen, correct=None if chosen is None else chosen == self.target)

    def frame(self, height, width):
        y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
        image = np.full((height, width, 3), 235, np.uint8)
        for colour, pad in self.pads.items():
            image[np.maximum(abs(x - pad[0]), abs(1 - y - pad[1])) < 0.06] = RGB[colour]
        image[np.hypot(x - self.position[0], 1 - y - self.position[1]) < 0.03] = 20
        return image

    def close(self):
        pass
