"""The WidowX-250 arm of BridgeData V2.

Action (7): end-effector increments x, y, z (metres) and roll, pitch, yaw (radians), gripper (1 open, 0 closed).
State (7): end-effector position (3, metres), roll, pitch, yaw (3, radians), gripper opening (1, 0 closed to 1 open).

5 Hz: the dataset. Chunks of 5, q01/q99 normalisation: the reference's constants. Limits: those of the arm's published environment, 5 cm and
0.25 rad a step.
"""

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
