"""What a robot is: its cameras, its state, its actions and how they are normalised.

A `RobotSpec` is the whole agreement between demonstrations, a policy and a robot. It is written into every checkpoint and
sent in every handshake, so that a mismatch is refused with a readable difference before anything moves.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

ACTION_KINDS = ("delta_ee", "absolute_ee", "delta_joint", "absolute_joint")
NORMALIZATIONS = ("bounds_q99", "bounds", "zscore")
ON_UNDERFLOW = ("hold", "stop")


@dataclass(frozen=True)
class Gripper:
    """Which action dimension drives the gripper, and what its values mean in robot units.

    `binary` grippers only know two commands: a predicted value is snapped to the nearer of `open` and `closed`.
    """

    index: int
    open: float
    closed: float
    binary: bool = True


@dataclass(frozen=True)
class RobotSpec:
    """One robot (or one family of identical robots) as a policy sees it.

    name: unique, also the file name under `vla_oft/robots/`.
    cameras: camera names in the order in which the policy reads them; the first is the main, external view.
    state_dim: size S of the proprioceptive state; 0 when the policy does not read it.
    action_dim: size D of one action.
    control_hz: how many actions a second the robot executes.
    chunk_len: K, the number of actions predicted at once.
    action_kind: one of `ACTION_KINDS`.
    absolute_mask: per action dimension, True for absolute targets (a gripper opening, a joint angle), False for increments.
    normalize_mask: per action dimension, False where the value is already in the policy's range and passes through unchanged.
    normalization: one of `NORMALIZATIONS`, used for actions and state.
    action_limits: per action dimension (low, high) in robot units; nothing outside ever reaches the robot.
    gripper: one entry for each gripper.
    on_underflow: what the robot does when it has no valid action left: `hold` its pose, or `stop`.
    """

    name: str
    cameras: Tuple[str, ...]
    state_dim: int
    action_dim: int
    control_hz: float
    chunk_len: int
    action_kind: str
    absolute_mask: Tuple[bool, ...]
    normalize_mask: Tuple[bool, ...]
    normalization: str
    action_limits: Tuple[Tuple[float, float], ...]
    gripper: Tuple[Gripper, ...] = ()
    on_underflow: str = "hold"

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, fix: str) -> None:
            if not ok:
                raise ValueError("RobotSpec '%s': %s=%r %s" % (self.name, field, getattr(self, field), fix))

        need(bool(self.name), "name", "must not be empty")
        need(len(self.cameras) > 0, "cameras", "must name at least one camera")
        need(len(set(self.cameras)) == len(self.cameras), "cameras", "must not repeat a name")
        need(self.state_dim >= 0, "state_dim", "must be 0 (no state) or positive")
        need(self.action_dim > 0, "action_dim", "must be positive")
        need(self.control_hz > 0, "control_hz", "must be positive")
        need(self.chunk_len > 0, "chunk_len", "must be positive")
        need(self.action_kind in ACTION_KINDS, "action_kind", "must be one of %s" % (ACTION_KINDS,))
        need(self.normalization in NORMALIZATIONS, "normalization", "must be one of %s" % (NORMALIZATIONS,))
        need(self.on_underflow in ON_UNDERFLOW, "on_underflow", "must be one of %s" % (ON_UNDERFLOW,))
        for field in ("absolute_mask", "normalize_mask", "action_limits"):
            need(len(getattr(self, field)) == self.action_dim, field, "must have action_dim=%d entries" % self.action_dim)
        need(all(low < high for low, high in self.action_limits), "action_limits", "must have low < high in every dimension")
        need(all(0 <= g.index < self.action_dim for g in self.gripper), "gripper", "must point at an action dimension")

    @property
    def period_s(self) -> float:
        """Seconds between two actions."""
        return 1.0 / self.control_hz

    def to_dict(self) -> Dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "RobotSpec":
        """The inverse of `to_dict`, also after a trip through JSON. Unknown or missing fields raise ValueError."""
        values = dict(values)
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if set(values) - known or required - set(values):
            raise ValueError(
                "RobotSpec: unknown fields %s, missing fields %s" % (sorted(set(values) - known), sorted(required - set(values)))
            )
        for field in ("cameras", "absolute_mask", "normalize_mask"):
            values[field] = tuple(values[field])
        values["action_limits"] = tuple((float(low), float(high)) for low, high in values["action_limits"])
        values["gripper"] = tuple(g if isinstance(g, Gripper) else Gripper(**g) for g in values.get("gripper", ()))
        return cls(**values)

    def differences(self, other: "RobotSpec") -> List[str]:
        """One readable line for each field in which the two specs disagree; empty when they match."""
        return [
            "%s: %r here, %r there" % (f.name, getattr(self, f.name), getattr(other, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    def camera_index(self, camera: str) -> Optional[int]:
        """Position of `camera` in the policy's order, or None."""
        return self.cameras.index(camera) if camera in self.cameras else None
