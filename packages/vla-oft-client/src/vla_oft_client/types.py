"""What a robot sees and what it is told to do: the same two types in a dataset, a simulator, a server and on a robot."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Dict, Optional

import numpy as np

from vla_oft_client.spec import RobotSpec


@dataclass(frozen=True)
class Observation:
    """One moment, in raw units.

    images: camera name -> uint8 (H, W, 3) RGB; sizes may differ between cameras.
    state: float32 (S,) or None when the robot has none.
    instruction: what to do, in plain language.
    time_s: seconds on the robot's clock at which the images were taken.
    """

    images: Dict[str, np.ndarray]
    state: Optional[np.ndarray]
    instruction: str
    time_s: float = 0.0

    def check(self, spec: RobotSpec) -> "Observation":
        """Return self if it fits `spec`; otherwise raise ValueError naming the field, the value and the fix."""
        if not isinstance(self.images, Mapping):
            raise ValueError("images must be a dictionary from camera name to image, got %s" % type(self.images).__name__)
        for camera in spec.cameras:
            if camera not in self.images:
                raise ValueError(
                    "observation has no camera '%s'; it has %s; robot '%s' needs %s"
                    % (camera, sorted(self.images), spec.name, list(spec.cameras))
                )
            image = self.images[camera]
            if not isinstance(image, np.ndarray):
                raise ValueError("image of camera '%s' must be a numpy array, uint8 (H, W, 3) RGB, got %s" % (camera, type(image).__name__))
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ValueError("image of camera '%s' must be uint8 (H, W, 3) RGB, got %s %s" % (camera, image.dtype, image.shape))
        if spec.state_dim:
            if self.state is None:
                raise ValueError("observation has no state; robot '%s' needs %d values" % (spec.name, spec.state_dim))
            try:
                state = np.asarray(self.state, np.float64)
            except (TypeError, ValueError):
                raise ValueError("state must be %d numbers, got %r" % (spec.state_dim, self.state)) from None
            if state.shape != (spec.state_dim,):
                raise ValueError("state must have shape (%d,) for robot '%s', got %s" % (spec.state_dim, spec.name, state.shape))
            bad = np.flatnonzero(~np.isfinite(state))
            if bad.size:
                raise ValueError("state is not finite in dimensions %s: %s; check the robot's encoders" % (bad.tolist(), state))
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise ValueError("instruction must be a non-empty string, got %r" % (self.instruction,))
        return self


@dataclass(frozen=True)
class ActionChunk:
    """K actions to execute one after another.

    actions: float32 (K, D) in robot units.
    start_time_s: time of the observation that they answer, on the robot's clock: action k belongs to start_time_s + k * period_s.
    period_s: seconds between two actions.
    """

    actions: np.ndarray
    start_time_s: float
    period_s: float

    def __post_init__(self) -> None:
        if not isinstance(self.actions, np.ndarray) or self.actions.ndim != 2:
            raise ValueError("actions must be a numpy array (K, D), got %s %s" % (type(self.actions).__name__, np.shape(self.actions)))
        if not (math.isfinite(self.period_s) and self.period_s > 0):
            raise ValueError("period_s=%r must be positive; use the robot's RobotSpec.period_s" % (self.period_s,))
        if not math.isfinite(self.start_time_s):
            raise ValueError("start_time_s=%r must be finite; use the observation's time_s" % (self.start_time_s,))

    def __len__(self) -> int:
        return int(self.actions.shape[0])

    def check(self, spec: RobotSpec) -> "ActionChunk":
        """Return self if it fits `spec`; otherwise raise ValueError. Limits are enforced by whoever drives the robot."""
        if self.actions.shape[1] != spec.action_dim:
            raise ValueError("actions must have %d dimensions for robot '%s', got %d" % (spec.action_dim, spec.name, self.actions.shape[1]))
        if not np.isfinite(self.actions).all():
            raise ValueError("actions are not finite: the policy is broken or its input was")
        return self
