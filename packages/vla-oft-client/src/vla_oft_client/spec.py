"""What a robot is: its cameras, its state, its actions and how they are normalised.

A `RobotSpec` is the whole agreement between demonstrations, a policy and a robot. It is written into every checkpoint and
sent in every handshake, so that a mismatch is refused with a readable difference before anything moves.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

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

    def __post_init__(self) -> None:
        for field, ok, fix in (
            ("index", _is_int, "must be a whole number"),
            ("open", _is_number, "must be a finite number"),
            ("closed", _is_number, "must be a finite number"),
            ("binary", _is_bool, "must be true or false"),
        ):
            if not ok(getattr(self, field)):
                raise ValueError("Gripper: %s=%r %s" % (field, getattr(self, field), fix))

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "Gripper":
        """The inverse of `RobotSpec.to_dict` for one gripper."""
        return cls(**_known_fields(cls, values, "Gripper"))


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

        for field, ok, fix in _TYPES:
            need(ok(getattr(self, field)), field, fix)
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
        """The inverse of `to_dict`, also after a trip through JSON. Whatever does not fit raises ValueError naming the field."""
        values = _known_fields(cls, values, "RobotSpec")
        for field in ("cameras", "absolute_mask", "normalize_mask", "action_limits", "gripper"):
            if isinstance(values.get(field), list):
                values[field] = tuple(values[field])
        if isinstance(values["action_limits"], tuple):
            values["action_limits"] = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in values["action_limits"])
        if isinstance(values.get("gripper"), tuple):
            values["gripper"] = tuple(g if isinstance(g, Gripper) else Gripper.from_dict(g) for g in values["gripper"])
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


def _known_fields(cls: Any, values: Any, what: str) -> Dict[str, Any]:
    """A copy of `values`, which holds every required field of `cls` and no unknown one."""
    if not isinstance(values, dict):
        raise ValueError("%s: %r is no table of fields; give an object like the one that to_dict returns" % (what, values))
    known = {f.name for f in dataclasses.fields(cls)}
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    unknown, missing = sorted(str(name) for name in set(values) - known), sorted(required - set(values))
    if unknown or missing:
        raise ValueError("%s: unknown fields %s, missing fields %s; the fields are %s" % (what, unknown, missing, sorted(known)))
    return dict(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_gripper(value: Any) -> bool:
    return isinstance(value, Gripper)


def _tuple_of(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(ok, value))


_TYPES: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", _is_text, "must be text"),
    ("cameras", _tuple_of(_is_text), 'must be a list of names, for example ["front"]'),
    ("state_dim", _is_int, "must be a whole number"),
    ("action_dim", _is_int, "must be a whole number"),
    ("control_hz", _is_number, "must be a finite number of actions a second, for example 20.0"),
    ("chunk_len", _is_int, "must be a whole number"),
    ("action_kind", _is_text, "must be text"),
    ("absolute_mask", _tuple_of(_is_bool), "must be a list of true and false"),
    ("normalize_mask", _tuple_of(_is_bool), "must be a list of true and false"),
    ("normalization", _is_text, "must be text"),
    ("action_limits", _tuple_of(_is_pair), "must be a list of pairs of finite numbers [low, high]"),
    ("gripper", _tuple_of(_is_gripper), "must be a list of grippers"),
    ("on_underflow", _is_text, "must be text"),
)
"""Fields that arrive as JSON from another machine are checked by type first, so that the checks of their values cannot fail oddly."""
