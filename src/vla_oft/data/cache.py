"""All frames of a dataset, decoded and prepared once: training then reads bytes instead of video.

One file `FINGERPRINT-PREPARATION-CAMERAS.npy`, uint8 (frames, V, size, size, 3), memory-mapped: the operating system keeps
what is used in RAM, all processes share it, and a dataset larger than RAM still works.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_oft.atomic import temporary_beside
from vla_oft.data.base import Source
from vla_oft.progress import progress


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

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Prepare one frame."""
        ...


class FrameCache:
    """Frames of `cameras`, by global frame number, uint8 (N, V, size, size, 3)."""

    def __init__(self, frames: np.ndarray, path: Path | None) -> None:
        self.frames, self.path = frames, path

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.frames[rows]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself: a memory map would be copied into the pickle.
        return {"path": self.path, "frames": self.frames if self.path is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self.frames = state["frames"] if self.path is None else np.load(self.path, mmap_mode="r")


def in_memory(source: Source, cameras: Sequence[str], prepare: Prepare, threads: int | None = None) -> FrameCache:
    """Decode everything into RAM."""
    frames = np.empty(_shape(source, cameras, prepare.size), np.uint8)
    _fill(frames, source, cameras, prepare, threads)
    return FrameCache(frames, None)


def on_disk(folder: Path, source: Source, cameras: Sequence[str], prepare: Prepare, threads: int | None = None) -> FrameCache:
    """Decode everything into a file in `folder`, or map the file that is already there. Appears whole or not at all."""
    path = folder / f"{source.fingerprint()}-{prepare.key}-{'-'.join(cameras)}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            frames = np.lib.format.open_memmap(temporary, "w+", np.uint8, _shape(source, cameras, prepare.size))
            _fill(frames, source, cameras, prepare, threads)
            frames.flush()
            del frames
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    frames = np.load(path, mmap_mode="r")
    if frames.shape != _shape(source, cameras, prepare.size):
        raise ValueError(f"{path} holds {frames.shape}, expected {_shape(source, cameras, prepare.size)}; delete it")
    return FrameCache(frames, path)


def decode_rows(source: Source, episode: int, steps: Sequence[int] | np.ndarray, cameras: Sequence[str], prepare: Prepare) -> np.ndarray:
    """Frames of one episode without a cache, uint8 (N, V, size, size, 3)."""
    views = [[prepare(image) for image in source.frames(episode, steps, camera)] for camera in cameras]
    return np.stack([np.stack(view) for view in views], axis=1)


def _shape(source: Source, cameras: Sequence[str], size: int) -> tuple[int, ...]:
    return (int(source.lengths.sum()), len(cameras), size, size, 3)


def _fill(frames: np.ndarray, source: Source, cameras: Sequence[str], prepare: Prepare, threads: int | None) -> None:
    """Decoding and resizing release the GIL, so threads are enough, and nothing is copied between processes."""
    ends = np.cumsum(source.lengths)

    def fill(episode: int) -> int:
        steps = np.arange(source.lengths[episode])
        frames[ends[episode] - len(steps) : ends[episode]] = decode_rows(source, episode, steps, cameras, prepare)
        return len(steps)

    with progress(f"decoding {source.name}", len(frames), "frames") as advance, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for count in pool.map(fill, range(len(source))):
            advance(count)
