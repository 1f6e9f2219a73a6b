"""What is damaged in a LeRobot dataset, found without decoding it.

Every data file's numbers are read, and every video's header: length, rate, and whether the file holds all bytes that its index lists.
Of at most `DECODED` files of each camera, spread evenly, the first and last needed frame are decoded. Damage in the midst of a video shows
only when that frame is read.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vla_oft.data.video import num_frames

if TYPE_CHECKING:
    from vla_oft.data.lerobot_source import LeRobotSource

DECODED = 64
"""Files of each camera of which two frames are decoded."""


def damaged(source: "LeRobotSource") -> Iterator[tuple[int, str]]:
    """(episode, what is wrong with which file), one for each episode that cannot be read; see `data.base.Source.damaged`."""
    bad: set[int] = set()
    checks = [_numbers(source)]
    for camera, feature in source.camera_features.items():
        checks.append(_video(source, feature, bad) if source.info.is_video(feature) else iter(()))
        checks.append(_samples(source, camera, feature, bad))
    for check in checks:
        for episode, reason in check:
            if episode not in bad:
                bad.add(episode)
                yield episode, reason


def _numbers(source: "LeRobotSource") -> Iterator[tuple[int, str]]:
    for episode in range(len(source)):
        try:
            source.rows(episode)
            source.task_indices(episode)
        except ValueError as error:
            yield episode, str(error)


def _video(source: "LeRobotSource", feature: str, bad: set[int]) -> Iterator[tuple[int, str]]:
    place = source.index.videos[feature]
    for episodes in _by_file(place.keys):
        good = [episode for episode in episodes if episode not in bad]
        if not good:
            continue
        try:
            path = source.video_file(good[0], feature)
        except ValueError as error:
            yield from ((episode, str(error)) for episode in good)
            continue
        try:
            found = num_frames(path, source.info.fps)
        except ValueError as error:
            yield from ((episode, source.at(error, path, episode)) for episode in good)
            continue
        for episode in good:
            needed = round(float(place.start[episode]) * source.info.fps) + int(source.lengths[episode])
            if found < needed:
                error = ValueError(f"{path}: {found} frames, {needed} needed; copy or record the file again")
                yield episode, source.at(error, path, episode)


def _samples(source: "LeRobotSource", camera: str, feature: str, bad: set[int]) -> Iterator[tuple[int, str]]:
    place = source.index.videos[feature] if source.info.is_video(feature) else source.index.data
    files = _by_file(place.keys)
    chosen = np.unique(np.linspace(0, len(files) - 1, min(len(files), DECODED)).astype(int)) if files else []
    for file in chosen:
        for episode, step in ((files[file][0], 0), (files[file][-1], -1)):
            if episode not in bad:
                try:
                    source.frames(episode, [step % int(source.lengths[episode])], camera)
                except ValueError as error:
                    yield episode, str(error)


def _by_file(keys: np.ndarray) -> list[list[int]]:
    """Episodes of each file."""
    files: dict[tuple[int, ...], list[int]] = {}
    for episode, key in enumerate(keys.tolist()):
        files.setdefault(tuple(key), []).append(episode)
    return list(files.values())
