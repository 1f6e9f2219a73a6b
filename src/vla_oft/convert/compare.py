"""The written dataset, read again and held against its source: whatever should be equal is, or the conversion failed.

Compared are lengths, states, actions, instructions, extras and notes of every episode, and its first and last frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_oft.convert.plan import Plan
from vla_oft.data.base import Source
from vla_oft.progress import Advance


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the written frames are from the source's. num_frames: compared; max_error: of one colour of one pixel, 0 to 255.

    mean_error: of all of them. min_psnr_db: of the worst frame, None where all are equal; worst: (episode, step, camera) of that frame.
    """

    num_frames: int
    max_error: int
    mean_error: float
    min_psnr_db: float | None
    worst: tuple[int, int, str] | None


def compare(source: Source, written: Source, episodes: Sequence[int], plan: Plan, advance: Advance) -> Comparison:
    """Raises ValueError naming what differs. episodes: numbers in `source` of those that were written."""
    if len(written) != len(episodes):
        raise ValueError(f"{written.path}: {len(written)} episodes were written instead of {len(episodes)}")
    num_frames, max_error, total, worst, where = 0, 0, 0.0, 0.0, None
    for number, episode in enumerate(episodes):
        _need_equal(source, episode, written, number, plan)
        last = int(source.lengths[episode]) - 1
        for camera in source.cameras:
            steps = [0, last] if last else [0]
            before, after = source.frames(episode, steps, camera), written.frames(number, steps, camera)
            for step, a, b in zip(steps, before, after, strict=True):
                error = np.abs(a.astype(np.int16) - b)
                square = float((error.astype(np.float64) ** 2).mean())
                num_frames, max_error, total = num_frames + 1, max(max_error, int(error.max())), total + float(error.mean())
                if square > worst:
                    worst, where = square, (episode, step, camera)
        advance(1)
    return Comparison(
        num_frames=num_frames,
        max_error=max_error,
        mean_error=total / max(num_frames, 1),
        min_psnr_db=float(10 * np.log10(255**2 / worst)) if worst else None,
        worst=where,
    )


def _need_equal(source: Source, episode: int, written: Source, number: int, plan: Plan) -> None:
    arrays = {"actions": (source.actions(episode), written.actions(number))}
    if source.state_dim:
        arrays["states"] = (source.states(episode), written.states(number))
    for name in plan.extras:
        arrays[f"extra '{name}'"] = (source.extra(name, episode), written.extra(name, number))
    different = [name for name, (a, b) in arrays.items() if not _same(a, b)]
    if int(source.lengths[episode]) != int(written.lengths[number]):
        different.append("length")
    if _instructions(source, episode) != _instructions(written, number):
        different.append("instructions")
    info = written.episode_info(number)
    different += [f"episode_info '{name}'" for name, value in plan.infos[episode].items() if not _same_value(value, info.get(name))]
    if different:
        raise ValueError(f"{written.path}, episode {number} differs from episode {episode} of {source.path}: {', '.join(different)}")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, so that NaN equals NaN and 0 is not -0."""
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _same_value(a: Any, b: Any) -> bool:
    """NaN equals NaN, and None, which a column of numbers cannot hold."""
    return a == b or ((a is None or a != a) and (b is None or b != b))


def _instructions(source: Source, episode: int) -> list[str]:
    return [source.tasks[task] for task in source.task_indices(episode).tolist()]
