"""What an inspection found out about a dataset, as plain frozen values: a table, a page and a JSON object are made of these.

Numbers that the dataset does not have are None. Everything here is small, whatever the size of the dataset.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something was seen. dimension: its name."""

    episode: int
    step: int | None = None
    dimension: str | None = None
    camera: str | None = None

    def __str__(self) -> str:
        parts = {"episode": self.episode, "step": self.step, "dimension": self.dimension, "camera": self.camera}
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """Something seen `count` times among `of` things looked at, for the first time at `first`."""

    count: int = 0
    of: int = 0
    first: Place | None = None

    @property
    def share(self) -> float:
        """count / of, 0 where there was nothing to look at."""
        return self.count / self.of if self.of else 0.0


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between rising `edges`, one more than counts. Every bin but the last leaves out its upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of the state or of the actions, over all steps that are finite in every dimension; exact.

    values: (value, how often) where there are at most eight distinct ones, otherwise None. non_finite: NaN and infinite values.
    jumps: changes between two steps far beyond the ordinary ones, see `motion`, at its place the largest, of `jump_size`.
    wraps: changes by a whole turn, as of an angle that passes from pi to -pi. gripper: whether it belongs to a gripper.
    outside: actions beyond the robot's limits; None without a robot.
    """

    index: int
    name: str
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    q01: float | None = None
    q99: float | None = None
    histogram: Histogram | None = None
    values: tuple[tuple[float, int], ...] | None = None
    non_finite: int = 0
    jumps: Sighting = Sighting()
    jump_size: float | None = None
    wraps: Sighting = Sighting()
    gripper: bool = False
    outside: Sighting | None = None

    @property
    def constant(self) -> bool:
        """Whether it has one value only."""
        return self.min is not None and self.min == self.max

    @property
    def span(self) -> float:
        """max - min; 0 without finite values."""
        return 0.0 if self.min is None or self.max is None else self.max - self.min


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Steps of the episodes."""

    min: int
    median: float
    max: int
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera, judged by a sample of `frames` frames.

    sizes: (height, width) -> in how many of them. brightness: mean of all channels, 0 to 255.
    black, uniform: frames that are dark all over; that have one colour all over.
    frozen: stretches in which the arm moved far and the picture did not change, `frozen_steps` the longest.
    repeated: pictures shown again in the next step while the arm moved and other pictures followed it.
    """

    name: str
    frames: int = 0
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    brightness: float | None = None
    black: Sighting = Sighting()
    uniform: Sighting = Sighting()
    frozen: Sighting = Sighting()
    frozen_steps: int = 0
    repeated: Sighting = Sighting()


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction. first, last: episodes that follow it, None when none does."""

    text: str
    episodes: int
    frames: int
    first: int | None
    last: int | None


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """How one action dimension drives a gripper.

    convention: "binary", "continuous" or "constant". values: what it takes, in words.
    states: dimensions of the state that show its opening. correlation: of the command with the opening two steps later, -1 to 1.
    opens: whether higher commands open ("high") or close ("low") it; only two mirrored fingers tell. None where it cannot be told.
    """

    index: int
    name: str
    convention: str
    values: str
    states: tuple[int, ...] = ()
    correlation: float | None = None
    opens: str | None = None


@dataclass(frozen=True, kw_only=True)
class Following:
    """How the state answers the actions.

    kind: "absolute" (actions are states to come), "increments" (actions are proportional to changes of the state) or None: neither shows.
    strength: share of the state's variance explained, or correlation. lag: after how many steps the state fits best.
    copies: actions repeat the state of their own step, so that there is nothing to predict.
    """

    kind: str | None = None
    strength: float | None = None
    lag: int | None = None
    copies: bool = False


@dataclass(frozen=True, kw_only=True)
class Pauses:
    """Steps without motion: of actions that are increments (see `vla_oft.noops`), and of targets that equal the target before them."""

    noops: Sighting = Sighting()
    repeated_targets: Sighting = Sighting()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time that is missing between two steps.

    leaps: the state goes on as if one or more steps had been left out. gaps: the recorded times say so; None where there are none.
    """

    leaps: Sighting = Sighting()
    gaps: Sighting | None = None


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What concerns whole episodes. duplicates: their states and actions repeat an earlier one's; `duplicate_of` for the first of them.

    failed: the recording itself says so, among those about which it says anything. unreadable: (episode, reason), at most 100 of them;
    damaged counts all.
    """

    duplicates: Sighting = Sighting()
    duplicate_of: int | None = None
    failed: Sighting = Sighting()
    damaged: int = 0
    unreadable: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to know before training. rule: its stable name. unit: what `seen` counts ("steps", "episodes").

    where: dimensions or instructions concerned, in words. effect: what it does to training. fix: what to do.
    """

    rule: str
    severity: Severity
    title: str
    seen: Sighting
    unit: str
    where: str = ""
    effect: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything. robot: the one that it was checked against. chunk_len: actions that a policy predicts at once, for the checks.

    records: what concerns whole episodes. twins: pairs of cameras that show the same pictures. provenance: what our own recorder noted.
    """

    path: str
    name: str
    format: str
    kind: str
    fingerprint: str
    robot: str | None
    chunk_len: int
    fps: float | None
    num_episodes: int
    num_frames: int
    lengths: Lengths
    short: Sighting
    cameras: tuple[Camera, ...]
    twins: tuple[tuple[str, str], ...]
    state: tuple[Dimension, ...]
    action: tuple[Dimension, ...]
    broken_state: Sighting
    broken_action: Sighting
    grippers: tuple[Gripper, ...]
    following: Following
    pauses: Pauses
    timing: Timing
    instructions: tuple[Instruction, ...]
    records: Episodes
    extras: Mapping[str, tuple[int, ...]]
    provenance: Mapping[str, Any]
    skipped: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def duration_s(self) -> float | None:
        """Seconds of all episodes together; None without a frame rate."""
        return self.num_frames / self.fps if self.fps else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, finite numbers only (others become None); the counts are called `episodes` and `frames`."""
        counts = {"episodes": self.num_episodes, "frames": self.num_frames, "duration_s": self.duration_s}
        sizes = {"state_dim": len(self.state), "action_dim": len(self.action)}
        rest = {name: value for name, value in _fields(self).items() if name not in ("num_episodes", "num_frames")}
        return _plain({**counts, **sizes, **rest})


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Place):
        return {name: entry for name, entry in _fields(value).items() if entry is not None}
    if isinstance(value, Camera):
        sizes = [{"height": h, "width": w, "frames": count} for (h, w), count in value.sizes.items()]
        return _plain({**_fields(value), "sizes": sizes})
    if dataclasses.is_dataclass(value):
        return _plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
