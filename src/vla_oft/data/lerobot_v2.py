"""The index of a LeRobotDataset v2.0 or v2.1: one data file, and one video file a camera, for each episode.

meta/tasks.jsonl        {"task_index": 0, "task": "..."}
meta/episodes.jsonl     {"episode_index": 0, "tasks": ["..."], "length": 12}
data/chunk-000/episode_000000.parquet
videos/chunk-000/CAMERA/episode_000000.mp4
"""

from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data.lerobot_index import Index, Place, Tasks
from vla_oft.data.lerobot_info import Info, parse_json, read_text

NUMBERS = ("episode_chunk", "episode_index")
"""What the path templates are filled in with."""


def read_tasks(root: Path) -> Tasks:
    """The table of instructions."""
    path = root / "meta" / "tasks.jsonl"
    rows = _read_lines(path, ("task_index", "task"))
    return Tasks.of([row["task_index"] for row in rows], [row["task"] for row in rows], path)


def read_index(root: Path, info: Info) -> Index:
    """All episodes, by number."""
    path = root / "meta" / "episodes.jsonl"
    rows = _read_lines(path, ("episode_index", "length"))
    for row in rows:
        if not all(isinstance(row[name], int) and 0 <= row[name] < 2**31 for name in ("episode_index", "length")):
            raise ValueError(f"{path}: episode_index and length must be whole numbers, found {str(row)[:200]}; copy the dataset again")
    rows.sort(key=lambda row: row["episode_index"])
    numbers = np.array([row["episode_index"] for row in rows], np.int64)
    if (np.diff(numbers) == 0).any():
        raise ValueError(f"{path}: episode {numbers[:-1][np.diff(numbers) == 0][0]} is listed twice; copy the dataset again")
    keys, zeros = np.stack([numbers // info.chunks_size, numbers], axis=1), np.zeros(len(rows), np.int64)
    lengths = np.array([row["length"] for row in rows], np.int64)
    videos = [feature for feature in info.camera_features.values() if info.is_video(feature)]
    return Index(
        numbers=numbers,
        lengths=lengths,
        data=Place(keys=keys, start=zeros, total=lengths),
        videos={feature: Place(keys=keys, start=zeros.astype(np.float64)) for feature in videos},
    )


def _read_lines(path: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}")
            if any(name not in row for name in names):
                raise ValueError(f"{path}, line {number}: needs {', '.join(names)}, found {str(row)[:200]}; copy the dataset again")
            rows.append(row)
    return rows
