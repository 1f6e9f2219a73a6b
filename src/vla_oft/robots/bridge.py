"""The WidowX-250 arm of BridgeData V2.

Action (7): end-effector increments x, y, z (metres) and roll, pitch, yaw (radians), gripper (1 open, 0 closed).
State (7): end-effector position (3, metres), roll, pitch, yaw (3, radians), gripper opening (1, 0 closed to 1 open).

5 Hz: the dataset. Chunks of 5, q01/q99 normalisation: the reference's constants. Limits: those of the arm's published environment, 5 cm and
0.25 rad a step.
"""

import numpy as np

from vla_oft.features import Features
from vla_oft.grippers import binarize
from vla_oft_client import Gripper, RobotSpec

SPEC = RobotSpec(
    name="bridge",
    cameras=("front",),
    state_dim=7,
    action_dim=7,
    control_hz=5.0,
    chunk_len=5,
    action_kind="delta_ee",
    absolute_mask=(False,) * 6 + (True,),
    normalize_mask=(True,) * 6 + (False,),
    normalization="bounds_q99",
    action_limits=((-0.05, 0.05),) * 3 + ((-0.25, 0.25),) * 3 + ((0.0, 1.0),),
    gripper=(Gripper(index=6, open=1.0, closed=0.0),),
    on_underflow="hold",
)


def reached(states: np.ndarray | None, actions: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """BridgeData's states and actions (T, 7) -> what the reference trains on, and int64 (T - 2,) which steps those are.

    An action is the motion that was REACHED, the difference to the next state, not the one that was commanded; the gripper is commanded,
    made binary. The first step shows no motion yet, the last one has no next state. Raises ValueError without states.
    """
    if states is None:
        raise ValueError("BridgeData's actions are differences of states, which this dataset does not have")
    steps = np.arange(1, max(len(actions) - 1, 1))
    moved = states[steps + 1, :6] - states[steps, :6] if len(steps) else np.empty((0, 6), actions.dtype)
    gripper = binarize(actions[1:, 6])[: len(steps), None].astype(actions.dtype)
    return states[steps], np.concatenate([moved.astype(actions.dtype), gripper], axis=1), steps


FEATURES = (Features(name="rlds", formats=("rlds",), cameras=(("front", "image_0"),), convert=reached, cuts=True, drop_unlabelled=True),)
"""BridgeData V2 as converted for the reference, which trains on nothing without an instruction."""
