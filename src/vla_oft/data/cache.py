"""All frames of a dataset, decoded and prepared once: training then reads bytes instead of video.

A table of rows uint8 (V, size, size, 3), one for each step: in memory, or in one file that all processes share and that may be larger than
memory.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from vla_oft.data.base import Direct, Source
from vla_oft.data.index_cache import cached
from vla_oft.data.rows import FileRows, RamRows, Rows, RowsFile
from vla_oft.progress import progress

BLOCK = 256
"""Frames that a thread decodes before it writes them: an episode may be longer than memory."""


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


def prepared(
    source: Source, cameras: Sequence[str], prepare: Prepare, where: Literal["ram", "disk"], cache_dir: Path | None = None
) -> Rows:
    """Decode everything, now: rows uint8 (V, size, size, 3), N of them.

    where: "disk" keeps them in a folder `frames-...` below `cache_dir` (see `index_cache`) and finds them there the next
    time; the name changes with the dataset, the preparation and the cameras. Raises ValueError when the disk is too small.
    """
    shape = (int(source.lengths.sum()), len(cameras), prepare.size, prepare.size, 3)
    if where == "ram":
        frames = np.empty(shape, np.uint8)

        def keep(first: int, images: np.ndarray) -> None:
            frames[first : first + len(images)] = images

        _decode_all(source, cameras, prepare, keep)
        return RamRows(frames)

    def build(folder: Path) -> None:
        file = RowsFile(folder / "frames.npy", shape, np.uint8)
        _decode_all(source, cameras, prepare, file.write)
        file.close()

    name = f"frames-{source.fingerprint()}-{prepare.key}-{'-'.join(cameras)}"
    folder = cached(name, source.path, build, cache_dir)
    return FileRows(folder / "frames.npy")


def decode_rows(
    source: Source,
    episode: int,
    steps: Sequence[int] | np.ndarray,
    cameras: Sequence[str],
    prepare: Prepare,
    out: Sequence[np.ndarray] | np.ndarray,
) -> None:
    """Decode frames of one episode into `out`: for each of the N steps, uint8 (V, size, size, 3)."""
    direct: Direct | None = getattr(source, "frame_into", None) if prepare.keeps(prepare.size, prepare.size) else None
    for view, camera in enumerate(cameras):
        left = [slot for slot, step in enumerate(steps) if not (direct and direct(episode, int(step), camera, out[slot][view]))]
        if left:
            for slot, image in zip(left, source.frames(episode, np.asarray(steps)[left], camera), strict=True):
                out[slot][view] = prepare(image)


def _decode_all(source: Source, cameras: Sequence[str], prepare: Prepare, keep: Callable[[int, np.ndarray], None]) -> None:
    """Decoding and resizing release the GIL, so threads are enough, and nothing is copied between processes."""
    firsts = np.cumsum(source.lengths) - source.lengths

    def decode(episode: int) -> int:
        length = int(source.lengths[episode])
        for start in range(0, length, BLOCK):
            steps = np.arange(start, min(start + BLOCK, length))
            images = np.empty((len(steps), len(cameras), prepare.size, prepare.size, 3), np.uint8)
            decode_rows(source, episode, steps, cameras, prepare, images)
            keep(int(firsts[episode]) + start, images)
        return length

    num_frames = int(source.lengths.sum())
    with progress(f"decoding {source.name}", num_frames, "frames") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode, range(len(source))):
            advance(count)
