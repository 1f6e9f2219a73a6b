"""Frames of one episode, decoded and prepared; those that cannot be are found one by one, and named.

A batch or a block is decoded together, which is fast. Only when that fails, every frame is tried alone: a frame counts as damaged when it
cannot be decoded alone, so what is damaged depends neither on what was asked for with it nor on what was decoded before.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from vla_oft.data.base import Direct, Source
from vla_oft.data.damage import GO_ON


class Prepare(Protocol):
    """From a recorded frame, uint8 (H, W, 3), to what is cached, uint8 (size, size, 3); `vla_oft.preprocess.Preparation` is one.

    key: part of a file name; changes whenever the result would.
    """

    @property
    def size(self) -> int:
        """Side of the square images, pixels."""
        ...

    @property
    def key(self) -> str:
        """See above."""
        ...

    def keeps(self, height: int, width: int) -> bool:
        """Whether frames of this size are cached as they are."""
        ...

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Prepare one frame."""
        ...


def decode_rows(
    source: Source,
    episode: int,
    steps: Sequence[int] | np.ndarray,
    cameras: Sequence[str],
    prepare: Prepare,
    out: Sequence[np.ndarray] | np.ndarray,
    *,
    skip_bad: bool = False,
) -> list[tuple[int, str, str]]:
    """Decode frames of one episode into `out`: for each of the N steps, uint8 (V, size, size, 3).

    With `skip_bad`, frames that cannot be decoded stay black, and come back as (which of the N, camera, reason). Without it, the first of
    them is a ValueError naming file, episode, step and camera.
    """
    try:
        _decode(source, episode, steps, cameras, prepare, out)
    except ValueError:
        found = []
        for slot, camera, reason in _one_by_one(source, episode, steps, cameras, prepare, out):
            if not skip_bad:
                raise ValueError(f"{reason}; {GO_ON}") from None
            found.append((slot, camera, reason))
        return found
    return []


def _decode(
    source: Source,
    episode: int,
    steps: Sequence[int] | np.ndarray,
    cameras: Sequence[str],
    prepare: Prepare,
    out: Sequence[np.ndarray] | np.ndarray,
) -> None:
    direct: Direct | None = getattr(source, "frame_into", None) if prepare.keeps(prepare.size, prepare.size) else None
    for view, camera in enumerate(cameras):
        left = [slot for slot, step in enumerate(steps) if not (direct and direct(episode, int(step), camera, out[slot][view]))]
        if left:
            for slot, image in zip(left, source.frames(episode, np.asarray(steps)[left], camera), strict=True):
                out[slot][view] = prepare(image)


def _one_by_one(
    source: Source,
    episode: int,
    steps: Sequence[int] | np.ndarray,
    cameras: Sequence[str],
    prepare: Prepare,
    out: Sequence[np.ndarray] | np.ndarray,
) -> Iterator[tuple[int, str, str]]:
    for slot, step in enumerate(steps):
        for view, camera in enumerate(cameras):
            reason = None
            # Twice: a video that is open may stumble over another damaged frame on its way to this one; an error closes it.
            for _ in range(2):
                try:
                    _decode(source, episode, [int(step)], [camera], prepare, [out[slot][view : view + 1]])
                    break
                except ValueError as error:
                    reason = str(error)
            else:
                assert reason is not None
                out[slot][view] = 0
                yield slot, camera, _named(source, episode, int(step), camera, reason)


def _named(source: Source, episode: int, step: int, camera: str, reason: str) -> str:
    """`reason`, which names file and episode, with the step and the camera behind the episode where it does not name them."""
    recorded = getattr(source, "recorded", None)  # a view: files are better searched by what was recorded
    if recorded is not None:
        _, step, camera = recorded(episode, step, camera)
    after_path = len(str(source.path)) if reason.startswith(str(source.path)) else 0
    if re.search(rf"\bstep {step}\b", reason[after_path:]):
        return reason
    where = f"step {step}, camera '{camera}'"
    named = re.compile(r"episode \d+( \([^)]*\))?").search(reason, after_path)
    return f"{where}: {reason}" if named is None else f"{reason[: named.end()]}, {where}{reason[named.end() :]}"
