"""Whether a dataset can train a policy for a robot: found out before any expensive work."""

from collections.abc import Sequence

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.view import View
from vla_oft.statistics import DatasetStatistics, StreamingMoments, assemble
from vla_oft_client import RobotSpec

TOLERANCE = 1e-3
"""How far outside the robot's limits an action may lie, as a share of their range."""

MANY = 0.01
"""Share of steps outside the limits from which on a warning is given: single outliers are common in recordings."""

LEAVE_OUT = "leave the episode out, with skip_bad (--skip-bad) or episodes (--episodes)"


def check_source(source: Source, spec: RobotSpec) -> list[str]:
    """Raise ValueError unless `source` can train a policy for robot `spec`; return warnings about what looks odd.

    Reads all low-dimensional data and opens every file: seconds now instead of a crash hours into a run.
    """
    missing = [camera for camera in spec.cameras if camera not in source.cameras]
    if missing:
        raise ValueError(
            f"dataset {source.path} has no camera {', '.join(missing)} that robot '{spec.name}' needs; "
            f"it has {', '.join(source.cameras) or 'none'}; rename them with cameras (robot's name=dataset's name)"
        )
    for what, found, needed in (("action", source.action_dim, spec.action_dim), ("state", source.state_dim, spec.state_dim)):
        if needed and found != needed:
            raise ValueError(f"dataset {source.path} has {found} {what} dimensions, robot '{spec.name}' has {needed}: choose another robot")
    for _, reason in source.damaged():
        raise ValueError(f"{reason}; or {LEAVE_OUT}")
    outside = np.zeros(spec.action_dim)
    limits = np.array(spec.action_limits).T
    slack = TOLERANCE * (limits[1] - limits[0])
    for episode in range(len(source)):
        actions = source.actions(episode)
        if broken := _not_finite(actions, source.states(episode) if spec.state_dim else None):
            raise ValueError(f"dataset {source.path}, episode {episode}: {broken}; {LEAVE_OUT}")
        outside += ((actions < limits[0] - slack) | (actions > limits[1] + slack)).sum(axis=0)
    return _warnings(source, spec, outside / int(source.lengths.sum()))


def _warnings(source: Source, spec: RobotSpec, outside: np.ndarray) -> list[str]:
    empty = [task for task in source.tasks if not task.strip()]
    warnings = [f"{len(empty)} empty instructions"] if empty else []
    if source.kind != "demonstrations":
        return warnings
    grippers = [g.index for g in spec.gripper]
    for dim in np.flatnonzero(outside > MANY):
        what = "gripper commands (opened and closed the other way round, or in another range?)" if dim in grippers else "actions"
        low, high = spec.action_limits[dim]
        warnings.append(
            f"{100 * outside[dim]:.0f} % of the {what} in dimension {dim} lie outside robot '{spec.name}'s limits {low:g}..{high:g}"
        )
    if source.fps is not None and abs(source.fps - spec.control_hz) > 1e-3:
        every = source.fps / spec.control_hz
        whole = every >= 2 and abs(every - round(every)) < 1e-3
        advice = f": every={every:.0f} keeps one step of {every:.0f}" if whole and not spec.action_kind.startswith("delta") else ""
        warnings.append(f"recorded at {source.fps:g} frames per second, but robot '{spec.name}' runs at {spec.control_hz:g} Hz{advice}")
    return warnings


def without_damaged(source: Source) -> Source:
    """`source` without its damaged episodes and those with numbers that are not finite; one more line in `skipped` for each."""
    damaged: dict[int, str] = {}
    for episode, reason in source.damaged():
        damaged[episode] = f"{damaged[episode]}; {reason}" if episode in damaged else reason
    for episode in range(len(source)):
        if episode not in damaged:
            broken = _not_finite(source.actions(episode), source.states(episode) if source.state_dim else None)
            if broken:
                damaged[episode] = f"dataset {source.path}, episode {episode}: {broken}"
    if not damaged:
        return source
    good = [episode for episode in range(len(source)) if episode not in damaged]
    if not good:
        raise ValueError(f"dataset {source.path}: every episode is damaged; the first: {next(iter(damaged.values()))}")
    view = View(source, key="good", episodes=good, state=("state",) if source.state_dim else ())
    view.skipped = (*source.skipped, *damaged.values())
    return view


def _not_finite(actions: np.ndarray, states: np.ndarray | None) -> str:
    """Which number of an episode is not finite, in words; empty where all are."""
    for what, values in (("action", actions), ("state", states)):
        if values is not None and not np.isfinite(values).all():
            step, dim = np.argwhere(~np.isfinite(values))[0]
            return f"{what} is not finite in step {step}, dimension {dim}"
    return ""


def source_statistics(source: Source, normalize_mask: Sequence[bool] | np.ndarray) -> DatasetStatistics:
    """Exact statistics of the actions and states of one dataset, in one pass over its episodes.

    The dataset's own statistics files are not trusted: see docs/data.md.
    """
    count = int(source.lengths.sum())
    action = StreamingMoments(count, source.action_dim, "action")
    state = StreamingMoments(count, source.state_dim, "state") if source.state_dim else None
    for episode in range(len(source)):
        where = f"dataset {source.path}, episode {episode}"
        action.update(np.asarray(source.actions(episode), np.float32), where)
        if state is not None:
            state.update(np.asarray(source.states(episode), np.float32), where)
    return assemble(action.result(), None if state is None else state.result(), normalize_mask, count, len(source))
