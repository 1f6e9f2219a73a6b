"""All frames of a dataset, decoded and prepared once: training then reads bytes instead of video.

A table of rows uint8 (V, size, size, 3), one for each step: in memory, or in one file that all processes share and that may be larger than
memory. Beside the file, `damaged.json` lists the frames that could not be decoded, where there are any.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.damage import GO_ON, Damaged, too_many
from vla_oft.data.decoding import Prepare, decode_rows
from vla_oft.data.index_cache import cached
from vla_oft.data.rows import FileRows, RamRows, Rows, RowsFile
from vla_oft.progress import progress

BLOCK = 256
"""Frames that a thread decodes before it writes them: an episode may be longer than memory."""

TRIED_AGAIN = 64
"""Episodes of which a damaged frame is tried again when a cache is opened that lists it."""


def prepared(
    source: Source,
    cameras: Sequence[str],
    prepare: Prepare,
    where: Literal["ram", "disk"],
    cache_dir: Path | None = None,
    *,
    skip_bad: bool = False,
) -> tuple[Rows, tuple[Damaged, ...]]:
    """Decode everything, now: rows uint8 (V, size, size, 3), N of them, and the frames that cannot be decoded, which are black.

    where: "disk" keeps them in a folder `frames-...` below `cache_dir` (see `index_cache`) and finds them there the next
    time; the name changes with the dataset, the preparation and the cameras.
    Raises ValueError when the disk is too small, for the first damaged frame without `skip_bad`, for too many of them with it, and when
    a frame that the cache lists as damaged can be decoded now.
    """
    shape = (int(source.lengths.sum()), len(cameras), prepare.size, prepare.size, 3)
    if where == "ram":
        frames = np.empty(shape, np.uint8)

        def keep(first: int, images: np.ndarray) -> None:
            frames[first : first + len(images)] = images

        return RamRows(frames), _decode_all(source, cameras, prepare, keep, skip_bad)

    def build(folder: Path) -> None:
        file = RowsFile(folder / "frames.npy", shape, np.uint8)
        damaged = _decode_all(source, cameras, prepare, file.write, skip_bad)
        file.close()
        if damaged:
            (folder / "damaged.json").write_text(json.dumps([asdict(d) for d in damaged], indent=1))

    name = f"frames-{source.fingerprint()}-{prepare.key}-{'-'.join(cameras)}"
    folder = cached(name, source.path, build, cache_dir)
    return FileRows(folder / "frames.npy"), _listed(folder, source, prepare, skip_bad)


def _listed(folder: Path, source: Source, prepare: Prepare, skip_bad: bool) -> tuple[Damaged, ...]:
    """The damaged frames that a cache lists; another process, or an earlier run, may have made it."""
    path = folder / "damaged.json"
    if not path.is_file():
        return ()
    try:
        damaged = tuple(Damaged(**entry) for entry in json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error}); delete {folder}, it is made anew") from None
    for frame in _one_an_episode(source, damaged):
        if _is_readable(source, frame, prepare):  # copied again; the name need not show it, where sizes stay the same
            raise ValueError(f"cache {folder} was made while a frame was damaged that is not any more ({frame.reason}): delete the folder")
    if not skip_bad:
        raise ValueError(f"{damaged[0].reason}; {GO_ON}")
    return damaged


def _one_an_episode(source: Source, damaged: Sequence[Damaged]) -> list[Damaged]:
    """The first damaged frame of each damaged episode, of at most `TRIED_AGAIN` of these."""
    episodes = np.searchsorted(np.cumsum(source.lengths), [d.row for d in damaged], side="right")
    firsts = np.unique(episodes, return_index=True)[1]
    chosen = np.unique(np.linspace(0, len(firsts) - 1, min(len(firsts), TRIED_AGAIN)).round().astype(int))
    return [damaged[int(i)] for i in firsts[chosen]]


def _is_readable(source: Source, frame: Damaged, prepare: Prepare) -> bool:
    episode = int(np.searchsorted(np.cumsum(source.lengths), frame.row, side="right"))
    step, out = frame.row - int(source.lengths[:episode].sum()), np.empty((1, 1, prepare.size, prepare.size, 3), np.uint8)
    return not decode_rows(source, episode, [step], [frame.camera], prepare, out, skip_bad=True)


def _decode_all(
    source: Source, cameras: Sequence[str], prepare: Prepare, keep: Callable[[int, np.ndarray], None], skip_bad: bool
) -> tuple[Damaged, ...]:
    """Decoding and resizing release the GIL, so threads are enough, and nothing is copied between processes."""
    firsts, num_frames = np.cumsum(source.lengths) - source.lengths, int(source.lengths.sum())
    damaged: list[Damaged] = []
    lock = threading.Lock()

    def decode(episode: int) -> int:
        length = int(source.lengths[episode])
        for start in range(0, length, BLOCK):
            steps = np.arange(start, min(start + BLOCK, length))
            first = int(firsts[episode]) + start
            images = np.empty((len(steps), len(cameras), prepare.size, prepare.size, 3), np.uint8)
            bad = decode_rows(source, episode, steps, cameras, prepare, images, skip_bad=skip_bad)
            keep(first, images)
            if bad:
                with lock:
                    damaged.extend(Damaged(row=first + slot, camera=camera, reason=reason) for slot, camera, reason in bad)
                    _refuse_too_many(source, damaged, num_frames)
        return length

    with progress(f"decoding {source.name}", num_frames, "frames") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode, range(len(source))):
            advance(count)
    return tuple(sorted(damaged, key=lambda d: (d.row, cameras.index(d.camera))))


def _refuse_too_many(source: Source, damaged: list[Damaged], num_frames: int) -> None:
    count = len({d.row for d in damaged})
    if too_many(count, num_frames, num_frames):
        raise ValueError(
            f"dataset {source.path}: {count} or more of {num_frames} steps cannot be decoded, too many to leave out; "
            f"copy or record them again, or choose others with episodes (--episodes); for example {damaged[-1].reason}"
        )
