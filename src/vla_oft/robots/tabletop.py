"""The embedded simulator's arm: one ViperX-300s over a table, driven like LIBERO's Panda.

Action (7): end-effector increments x, y, z (1.0 = 5 cm), rotation increments (ignored), gripper (-1 open, +1 closed).
State (8): end-effector position (3, metres), axis-angle orientation (3, radians), the two finger joints (2, metres).
"""

from vla_oft_client import Gripper, RobotSpec

SPEC = RobotSpec(
    name="tabletop",
    cameras=("front", "wrist"),
    state_dim=8,
    action_dim=7,
    control_hz=20.0,
    chunk_len=8,
    action_kind="delta_ee",
    absolute_mask=(False,) * 6 + (True,),
    normalize_mask=(True,) * 6 + (False,),
    normalization="bounds_q99",
    action_limits=((-1.0, 1.0),) * 7,
    gripper=(Gripper(index=6, open=-1.0, closed=1.0),),
    on_underflow="hold",
)
