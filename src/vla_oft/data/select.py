"""Which episodes and steps of a dataset to use: a range, successes only, without pauses, at a lower rate.

Selections are `View`s, so they cost nothing and can be stacked; everything that they do is part of the dataset's fingerprint.
"""

from dataclasses import dataclass

import numpy as np

from vla_oft.data.base import REWARD, SUCCESS, Source, instruction
from vla_oft.data.view import View
from vla_oft.noops import THRESHOLD, kept_steps


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What to leave out.

    episodes: Python-like ranges joined by commas, "0:40", "10:", "3,7,20:30", of the episodes that can be read; None for all.
    drop_failed: episodes that the recording itself calls failed. Without such a note in the dataset, this is an error.
    drop_unlabelled: episodes without an instruction.
    drop_noops: steps in which nothing moves, see `vla_oft.noops`; for actions that are increments, with the gripper last.
    every: keep one step of so many: 50 Hz recordings of absolute targets for a 25 Hz policy need 2.
    """

    episodes: str | None = None
    drop_failed: bool = False
    drop_unlabelled: bool = False
    drop_noops: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1: keep one step of so many")


def select(source: Source, filters: Filters) -> Source:
    """`source` without what `filters` leave out. Raises ValueError when nothing is left."""
    return select_steps(select_episodes(source, filters), filters)


def select_episodes(source: Source, filters: Filters) -> Source:
    """Whole episodes: judged by the recording as it is, before any step of it is dropped."""
    chosen = episode_numbers(source, filters)
    if len(chosen) == len(source) and filters.episodes is None:
        return source
    _need_some(len(chosen), source, filters)
    return View(source, key="episodes", episodes=chosen, state=("state",) if source.state_dim else ())


def select_steps(source: Source, filters: Filters) -> Source:
    """Steps within episodes: judged by the actions that `source` has, so by the robot's own where it is a robot's view."""
    if not filters.drop_noops and filters.every == 1:
        return source
    view = View(
        source,
        key=f"noops:{THRESHOLD if filters.drop_noops else None},every:{filters.every}",
        convert=_Keep(filters.drop_noops, filters.every),
        cuts=True,
        state=("state",) if source.state_dim else (),
    )
    _need_some(len(view), source, filters)
    if filters.every > 1 and view.fps is not None:
        view.fps = view.fps / filters.every
    return view


def episode_numbers(source: Source, filters: Filters) -> np.ndarray:
    """Which episodes `filters` leave, int64."""
    numbers = np.arange(len(source)) if filters.episodes is None else episode_range(filters.episodes, len(source))
    if filters.drop_failed:
        numbers = np.array([e for e in numbers if _need_success(source, int(e))], np.int64)
    if filters.drop_unlabelled:
        numbers = np.array([e for e in numbers if instruction(source, int(e)).strip()], np.int64)
    return numbers


def episode_range(text: str, count: int) -> np.ndarray:
    """Episode numbers of "0:40", "10:", "3,7,20:30" or "-5:", of `count` episodes: int64, each once, in order of appearance."""
    numbers: list[np.ndarray] = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            if colon:
                numbers.append(np.arange(count)[slice(int(first) if first else None, int(last) if last else None)])
            else:
                number = int(first)
                if not -count <= number < count:
                    raise ValueError
                numbers.append(np.array([number % count]))
        except ValueError:
            raise ValueError(f"episodes='{text}': '{part}' is no range of 0..{count - 1}; write for example 0:40 or 3,7,20:30") from None
    found = np.concatenate(numbers).astype(np.int64)
    if not found.size:
        raise ValueError(f"episodes='{text}' selects none of {count} episodes")
    return found[np.sort(np.unique(found, return_index=True)[1])]


def succeeded(source: Source, episode: int) -> bool | None:
    """Whether the recording says that an episode succeeded; None where it says nothing."""
    for name in SUCCESS:
        if name in source.extras:
            return bool(np.any(source.extra(name, episode)))
    for name in REWARD:
        if name in source.extras:
            rewards = source.extra(name, episode)
            return bool(np.any(rewards == 1)) if np.isin(rewards, (0, 1)).all() else None  # partial rewards say nothing of success
    return None


def _need_some(count: int, source: Source, filters: Filters) -> None:
    if not count:
        raise ValueError(f"dataset {source.path}: nothing is left of {len(source)} episodes after {filters}; loosen the filters")


def _need_success(source: Source, episode: int) -> bool:
    verdict = succeeded(source, episode)
    if verdict is None:
        raise ValueError(
            f"dataset {source.path} does not say which episodes failed (no {', '.join(SUCCESS)}; no {', '.join(REWARD)} of only 0 and 1): "
            "leave drop_failed off, or name the good ones with episodes"
        )
    return verdict


@dataclass(frozen=True)
class _Keep:
    """A `Convert` that only drops steps. A class, because it travels to worker processes."""

    noops: bool
    every: int

    def __call__(self, states: np.ndarray | None, actions: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        kept = (kept_steps(actions) if self.noops else np.arange(len(actions)))[:: self.every]
        return None if states is None else states[kept], actions[kept], kept
