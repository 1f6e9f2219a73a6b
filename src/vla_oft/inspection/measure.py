"""One pass over the numbers of a dataset, a look at a sample of its pictures, and what follows from both.

numbers    every step, in blocks of whole episodes; memory does not grow with the number of steps, but for 4 % of them (exact quantiles)
pictures   `max_episodes` episodes, evenly spread, `frames_per_camera` frames each and a few consecutive ones
files      every file, by the dataset's own check
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vla_oft.data.base import Source
from vla_oft.inspection import problems
from vla_oft.inspection.blocks import blocks
from vla_oft.inspection.cameras import Motion, sample_cameras, spread_episodes
from vla_oft.inspection.facts import Dimension, Following, Inspection, Pauses, Timing
from vla_oft.inspection.following import Fingers, Follower, finger_dims, gripper_dims
from vla_oft.inspection.motion import Changes, Leaps, Stillness
from vla_oft.inspection.numbers import Numbers
from vla_oft.inspection.records import Clock, Copies, Instructions, Verdicts, episode_facts, length_facts, short_episodes
from vla_oft.progress import Advance
from vla_oft_client import RobotSpec

CHUNK_LEN = 8
"""Actions that a policy predicts at once, where no robot says it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How thorough to be.

    max_episodes: episodes whose pictures are looked at. frames_per_camera: how many of each, evenly spread.
    check_files: whether every file is opened, which reads large datasets a second time.
    chunk_len: actions that a policy is to predict at once; None for the robot's, or 8 without a robot.
    """

    max_episodes: int = 64
    frames_per_camera: int = 5
    check_files: bool = True
    chunk_len: int | None = None

    def __post_init__(self) -> None:
        if self.max_episodes < 0 or self.frames_per_camera < 1 or (self.chunk_len is not None and self.chunk_len < 1):
            raise ValueError(f"{self}: max_episodes must not be negative, frames_per_camera and chunk_len must be at least 1")


def inspect_source(
    source: Source, spec: RobotSpec | None = None, options: Options | None = None, advance: Advance = lambda amount, remark="": None
) -> Inspection:
    """Look at everything in `source`. spec: the robot in whose language it speaks, if any. advance: hears of `work(source, options)` units.

    What cannot be read is a finding, not an error. Raises ValueError when a robot's sizes are not the dataset's.
    """
    options = options or Options()
    if spec is not None and (source.action_dim, source.state_dim) not in ((spec.action_dim, spec.state_dim), (spec.action_dim, 0)):
        raise ValueError(
            f"dataset {source.path} has {source.state_dim} state and {source.action_dim} action dimensions, robot '{spec.name}' has "
            f"{spec.state_dim} and {spec.action_dim}; open it for that robot, or inspect it without one"
        )
    unreadable: dict[int, str] = {}
    numbers = _measure(source, spec, unreadable, advance)
    dims = _arm_dims(source, spec)
    motion = Motion(source, numbers["state"], numbers["action"], dims if source.kind == "demonstrations" else [])
    sample = spread_episodes(source.lengths, options.max_episodes)
    episodes = [e for e in sample if e not in unreadable]
    advance(len(sample) - len(episodes))
    cameras, twins = sample_cameras(source, motion, episodes, options.frames_per_camera, advance, unreadable)
    copies, verdicts = numbers.pop("copies"), numbers.pop("verdicts")
    provenance = source.recording.get("provenance")
    chunk_len = options.chunk_len or (spec.chunk_len if spec else CHUNK_LEN)
    found = Inspection(
        path=str(source.path),
        name=source.name,
        format=source.format,
        kind=source.kind,
        fingerprint=source.fingerprint(),
        robot=spec.name if spec else None,
        chunk_len=chunk_len,
        fps=source.fps,
        num_episodes=len(source),
        num_frames=int(source.lengths.sum()),
        lengths=length_facts(source.lengths),
        short=short_episodes(source.lengths, chunk_len),
        cameras=cameras,
        twins=twins,
        records=episode_facts(copies, verdicts, unreadable, source.damaged() if options.check_files else ()),
        extras=source.extras,
        provenance=provenance if isinstance(provenance, dict) else {},
        skipped=source.skipped,
        **numbers,
    )
    return dataclasses.replace(found, problems=problems.find(found, spec))


def work(source: Source, options: Options) -> int:
    """Units of work that `inspect_source` reports: episodes read, then episodes looked at."""
    return len(source) + len(spread_episodes(source.lengths, options.max_episodes))


def _measure(source: Source, spec: RobotSpec | None, unreadable: dict[int, str], advance: Advance) -> dict[str, Any]:
    """The pass over all numbers: the parts of an `Inspection` by name, and `copies` and `verdicts`."""
    frames, demonstrations = int(source.lengths.sum()), source.kind == "demonstrations"
    names = {"state": _names(source.state_names, source.state_dim), "action": _names(source.action_names, source.action_dim)}
    limits = {"state": None, "action": spec.action_limits if spec and demonstrations else None}
    numbers = {what: Numbers(what, names[what], frames, limits[what]) for what in ("state", "action")}
    changes = {what: Changes(what, names[what]) for what in ("state", "action")}
    grippers = gripper_dims(source.action_names, source.action_dim, spec) if demonstrations else ()
    fingers = finger_dims(source.state_names, grippers, source.state_dim, source.action_dim)
    arm = _arm_dims(source, spec)
    shared = [d for d in arm if d < source.action_dim and d not in grippers]
    leaps, still, follower = Leaps(arm), Stillness(grippers), Follower(shared if demonstrations else [])
    hands = Fingers(list(zip(grippers, fingers, strict=True)))
    instructions, copies, verdicts, clock = Instructions(source), Copies(), Verdicts(source), Clock(source)

    def visit(episode: int) -> None:
        for record in (instructions, verdicts, clock):
            record.add(episode)

    for block in blocks(source, unreadable, visit, advance):
        for measure in (*numbers.values(), *((*changes.values(), leaps, still, follower, hands, copies) if demonstrations else ())):
            measure.update(block)
    _complete(source, numbers)
    dimensions = {what: numbers[what].result() for what in ("state", "action")}
    driven = hands.result(dimensions["action"], dimensions["state"])
    gripping = {"state": {d for g in driven for d in g.states}, "action": {g.index for g in driven}}
    dimensions = {what: _with_changes(dimensions[what], changes[what], gripping[what]) for what in ("state", "action")}
    return {
        **dimensions,
        "broken_state": numbers["state"].broken(),
        "broken_action": numbers["action"].broken(),
        "grippers": driven,
        "following": follower.result(dimensions["state"], dimensions["action"]) if demonstrations else Following(),
        "pauses": still.result() if demonstrations else Pauses(),
        "timing": Timing(leaps=leaps.result(), gaps=clock.result()),
        "instructions": instructions.result(),
        "copies": copies,
        "verdicts": verdicts,
    }


def _complete(source: Source, numbers: dict[str, Numbers]) -> None:
    """Exact quantiles of datasets with holes, which need a second pass: only then is it known how many steps there are."""
    holes = [n for n in numbers.values() if not n.complete()]
    if holes and any(n.rows for n in holes):
        for block in blocks(source, {}):
            for n in holes:
                n.update_moments(block)


def _with_changes(dimensions: tuple[Dimension, ...], changes: Changes, gripping: set[int]) -> tuple[Dimension, ...]:
    found = []
    for d in dimensions:
        jumps, size = changes.jumps(d)
        found.append(dataclasses.replace(d, jumps=jumps, jump_size=size, wraps=changes.wraps(d), gripper=d.index in gripping))
    return tuple(found)


def _names(names: tuple[str, ...], dim: int) -> tuple[str, ...]:
    return names if len(names) == dim else tuple(str(index) for index in range(dim))


def _arm_dims(source: Source, spec: RobotSpec | None) -> list[int]:
    """Dimensions of the state that move with the arm: without those that may be fingers, which jump by nature."""
    grippers = gripper_dims(source.action_names, source.action_dim, spec)
    fingers = {d for dims in finger_dims(source.state_names, grippers, source.state_dim, source.action_dim) for d in dims}
    return [d for d in range(source.state_dim) if d not in fingers]
