"""One episode, read and encoded: what worker processes do.

Frames pass through in pieces, so that an episode of any length fits into memory: all that stays of it is its video.

decoded     [ 32 MB ] [ 32 MB ] ...          encoded     mp4 in memory, about a hundredth
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vla_oft.convert.plan import Plan, check_size
from vla_oft.data.base import Source
from vla_oft.data.clips import encode_clip
from vla_oft.data.lerobot_meta import image_stats
from vla_oft.data.recording import Block, Episode, Pictures

PIECE_BYTES = 2**25
"""Decoded frames of one camera that are held at a time."""
MAX_PICTURES_BYTES = 10**9
"""PNG of one camera in one episode, all of which must be in memory at once: some 4000 steps of 480 x 640."""
SAMPLED = 8
"""Frames of which the statistics of an episode's images are made; they are spread over its whole length."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all episodes share. images: PNG instead of video of quality `crf` with a keyframe every `keyint` frames."""

    source: Source
    plan: Plan
    crf: int
    keyint: int
    images: bool
    skip_bad: bool


@dataclass(frozen=True)
class Encoded:
    """An episode, or why it is left out."""

    episode: int
    block: Block | None
    reason: str = ""


def picture_sizes(job: Job, episode: int) -> dict[str, tuple[int, int]] | None:
    """Camera -> (height, width) of an episode's first frames; None when they are unreadable, and damaged episodes are to be skipped."""
    source = job.source
    try:
        return {camera: source.frames(episode, [0], camera).shape[1:3] for camera in source.cameras}  # type: ignore[misc]
    except ValueError:
        if not job.skip_bad:
            raise
        return None


def encode_episode(job: Job, episode: int, sizes: dict[str, tuple[int, int]]) -> Encoded:
    """sizes: camera -> (height, width). Raises ValueError naming the episode when it cannot be kept, unless damaged ones are skipped."""
    try:
        return Encoded(episode, _encode(job, episode, sizes))
    except ValueError as error:
        if not job.skip_bad:
            raise
        return Encoded(episode, None, str(error))


class Frames(Sequence):
    """All frames of one camera, uint8 (H, W, 3), decoded in pieces when iterated. sampled: some of them, after that."""

    def __init__(self, source: Source, episode: int, camera: str, size: tuple[int, int]) -> None:
        self.source, self.episode, self.camera, self.size = source, episode, camera, size
        self.length = int(source.lengths[episode])
        self.sampled: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self._read([index])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        wanted = set(np.linspace(0, self.length - 1, min(self.length, SAMPLED)).astype(int).tolist())
        piece = max(1, PIECE_BYTES // (self.size[0] * self.size[1] * 3))
        self.sampled = []
        for first in range(0, self.length, piece):
            steps = range(first, min(first + piece, self.length))
            for step, frame in zip(steps, self._read(steps), strict=True):
                if step in wanted:
                    self.sampled.append(frame.copy())  # not a view that keeps its whole piece alive
                yield frame

    def _read(self, steps: Sequence[int]) -> np.ndarray:
        frames = self.source.frames(self.episode, steps, self.camera)
        where = f"dataset {self.source.path}, episode {self.episode}, step {steps[0]}"
        check_size({self.camera: frames.shape[1:3]}, {self.camera: self.size}, where)  # type: ignore[dict-item]
        return frames


def _encode(job: Job, number: int, sizes: dict[str, tuple[int, int]]) -> Block:
    source, plan = job.source, job.plan
    episode = Episode(
        images={},
        states=source.states(number) if source.state_dim else None,
        actions=source.actions(number),
        instructions=[source.tasks[task] for task in source.task_indices(number).tolist()],
        extras={name: source.extra(name, number) for name in plan.extras},
        info=plan.infos[number],
    )
    _check_numbers(source, number, episode)
    clips, stats = {}, {}
    for camera in source.cameras:
        frames = Frames(source, number, camera, sizes[camera])
        clips[camera] = _pictures(frames) if job.images else encode_clip(frames, plan.fps, crf=job.crf, keyint=job.keyint)
        stats[camera] = image_stats(np.stack(frames.sampled))[None]
    return Block((episode,), clips, stats)


def _pictures(frames: Frames) -> Pictures:
    encoded, size = [], 0
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())
        size += len(encoded[-1])
        if size > MAX_PICTURES_BYTES:
            where = f"dataset {frames.source.path}, episode {frames.episode}"
            raise ValueError(
                f"{where}: more than {MAX_PICTURES_BYTES / 1e9:.1f} GB of PNG of camera {frames.camera}; write video, without images"
            )
    return Pictures(tuple(encoded), *frames.size)


def _check_numbers(source: Source, number: int, episode: Episode) -> None:
    for what, values in (("action", episode.actions), ("state", episode.states)):
        if values is not None and not np.isfinite(values).all():
            step, dim = np.argwhere(~np.isfinite(values))[0]
            where = f"dataset {source.path}, episode {number}"
            raise ValueError(f"{where}: {what} is not finite in step {step}, dimension {dim}; leave it out, with episodes or skip_bad")
