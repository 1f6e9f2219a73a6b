"""ALOHA: two ViperX-300s arms, driven by absolute joint positions.

Action and state (14): the left arm's waist, shoulder, elbow, forearm roll, wrist angle, wrist rotation (radians) and gripper (0 closed,
1 open), then the right arm's.

Chunks of 25 actions, one second at the paper's 25 Hz (section V-B; ALOHA itself runs at 50 Hz: the demonstrations were subsampled), and
normalisation by minimum and maximum, all dimensions: the reference's constants. Joint ranges: the arm's MJCF file in gym-aloha.
"""

from vla_oft.features import Features
from vla_oft_client import Gripper, RobotSpec

_WAIST, _ROLL = (-3.14158, 3.14158), (-3.14158, 3.14158)
_SHOULDER, _ELBOW, _WRIST = (-1.85005, 1.25664), (-1.76278, 1.6057), (-1.8675, 2.23402)
_ARM = (_WAIST, _SHOULDER, _ELBOW, _ROLL, _WRIST, _ROLL, (0.0, 1.0))

SPEC = RobotSpec(
    name="aloha",
    cameras=("cam_high", "cam_left_wrist", "cam_right_wrist"),
    state_dim=14,
    action_dim=14,
    control_hz=25.0,
    chunk_len=25,
    action_kind="absolute_joint",
    absolute_mask=(True,) * 14,
    normalize_mask=(True,) * 14,
    normalization="bounds",
    action_limits=_ARM * 2,
    gripper=(Gripper(index=6, open=1.0, closed=0.0, binary=False), Gripper(index=13, open=1.0, closed=0.0, binary=False)),
    on_underflow="hold",
)

FEATURES = (
    Features(
        name="rlds",
        formats=("rlds",),
        cameras=(("cam_high", "image"), ("cam_left_wrist", "left_wrist_image"), ("cam_right_wrist", "right_wrist_image")),
    ),
)
"""The converted demonstrations. The recorder's own files, and their copies in LeRobot's format, use this robot's names already."""
