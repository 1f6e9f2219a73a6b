"""LIBERO's Panda arm (simulated), in the units of the converted demonstrations, which are those that policies are trained on.

Action (7): end-effector increments x, y, z and rotation increments (all in -1..1, robosuite's OSC_POSE), gripper (1 open, 0 closed).
State (8): end-effector position (3, metres), axis-angle orientation (3, radians), the two finger joints (2, metres).

The simulator itself, and the raw demonstrations, turn the gripper around: -1 opens, +1 closes. `to_environment` and `from_environment`
translate. 20 Hz, chunks of 8, q01/q99 normalisation: the paper, section V-A, and the reference's constants.
"""

import numpy as np

from vla_oft.features import EachAction, Features
from vla_oft_client import Gripper, RobotSpec

SPEC = RobotSpec(
    name="libero",
    cameras=("front", "wrist"),
    state_dim=8,
    action_dim=7,
    control_hz=20.0,
    chunk_len=8,
    action_kind="delta_ee",
    absolute_mask=(False,) * 6 + (True,),
    normalize_mask=(True,) * 6 + (False,),
    normalization="bounds_q99",
    action_limits=((-1.0, 1.0),) * 6 + ((0.0, 1.0),),
    gripper=(Gripper(index=6, open=1.0, closed=0.0),),
    on_underflow="hold",
)

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""What the environment is given while objects fall into place, in ITS convention: nothing moves, the gripper opens."""


def to_environment(actions: np.ndarray, binary: bool = True) -> np.ndarray:
    """A policy's actions (..., 7) -> what the environment takes, same shape and dtype; the input is left alone.

    The gripper's 1 (open) .. 0 (closed) becomes -1 .. +1. binary: only the two ends; exactly 0.5, which is neither, becomes 0.
    """
    actions = np.array(actions, copy=True)
    gripper = 2 * actions[..., -1] - 1
    actions[..., -1] = -(np.sign(gripper) if binary else gripper)
    return actions


def from_environment(actions: np.ndarray) -> np.ndarray:
    """Actions (..., 7) as recorded from the environment -> those of the converted demonstrations, same shape and dtype.

    The gripper's commands are cut to 0..1 and turned around: everything up to 0 means open (1).
    """
    actions = np.array(actions, copy=True)
    actions[..., -1] = 1 - np.clip(actions[..., -1], 0, 1)
    return actions


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternion (4,) in the order x, y, z, w -> rotation axis times angle in 0..2 pi, float64 (3,), radians.

    As in robosuite, without choosing the shorter of both ways round: q and -q give different vectors. The state needs exactly this.
    """
    x, y, z, w = np.asarray(quaternion, np.float64)
    w = np.clip(w, -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    if sine == 0:
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * np.arccos(w) / sine)


def upright(image: np.ndarray) -> np.ndarray:
    """LIBERO renders upside down and mirrored: (H, W, 3) turned by 180 degrees. Both cameras, as in the converted demonstrations."""
    return np.ascontiguousarray(image[::-1, ::-1])


_CAMERAS = (("front", "image"), ("wrist", "wrist_image"))
_TO_ROBOT = EachAction(from_environment)

FEATURES = (
    Features(name="rlds", formats=("rlds",), cameras=_CAMERAS, convert=_TO_ROBOT),
    Features(name="openpi", formats=("lerobot",), cameras=_CAMERAS, convert=_TO_ROBOT, fps=20.0),  # openpi's converter notes 10
    Features(name="lerobot", formats=("lerobot",), cameras=(("front", "image"), ("wrist", "image2")), convert=_TO_ROBOT),
    Features(
        name="hdf5",
        formats=("libero_hdf5",),
        cameras=(("front", "agentview_rgb"), ("wrist", "eye_in_hand_rgb")),
        image=upright,
        convert=_TO_ROBOT,
        drop_noops=True,
    ),
)
"""The converted demonstrations, their copies in LeRobot's format under two sets of names, and LIBERO's own recordings.

All hold the environment's gripper. Only the last still hold pauses, and images as they were rendered.
"""
