"""The index of a LeRobotDataset v3.0: many episodes in each file.

meta/tasks.parquet                  instruction <-> task_index
meta/episodes/chunk-000/file-000    one row per episode: length, which files, where in the video
data/chunk-000/file-000.parquet     one row per frame
videos/CAMERA/chunk-000/file-000.mp4
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from vla_oft.data.lerobot_index import Index, Place, Tasks
from vla_oft.data.lerobot_info import Info
from vla_oft.data.parquet import read_table

NUMBERS = ("chunk_index", "file_index")
"""What the path templates are filled in with."""

INFO_PREFIX = "vla_oft/"
"""Our own columns of `meta/episodes`."""


def read_tasks(root: Path) -> Tasks:
    """The table of instructions."""
    path = root / "meta" / "tasks.parquet"
    table = read_table(path)
    # lerobot's recorder names the pandas index `task`; its v2.1 converter leaves it unnamed, which is stored as `__index_level_0__`
    index = _pandas_index(table.schema)
    found = table.column_names
    text = next((name for name in ("task", *index, "__index_level_0__") if name in found), None)
    if text is None or "task_index" not in found:
        raise ValueError(f"{path}: needs the columns 'task' (or a pandas index) and 'task_index', found {found}; convert the dataset again")
    return Tasks.of(table.column("task_index").to_pylist(), table.column(text).to_pylist(), path)


def read_index(root: Path, info: Info) -> Index:
    """All episodes, in the order of their frames."""
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{folder}: no episode metadata; copy the dataset again")
    videos = [feature for feature in info.camera_features.values() if info.is_video(feature)]
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{feature}/{what}" for feature in videos for what in ("chunk_index", "file_index", "from_timestamp")]
    tables = [read_table(file, lambda name: name in columns or name.startswith(INFO_PREFIX)) for file in files]
    for file, table in zip(files, tables, strict=True):
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise ValueError(f"{file}: has no column '{missing[0]}'; copy the dataset again")
    try:
        table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables], promote_options="default")
    except pa.ArrowException as error:
        raise ValueError(f"{folder}: its files do not fit together ({' '.join(str(error).split())}); copy the dataset again") from None
    table = table.sort_by("dataset_from_index")
    whole = {name: _whole_numbers(table, name, folder) for name in columns if not name.endswith("from_timestamp")}
    keys = np.stack([whole["data/chunk_index"], whole["data/file_index"]], axis=1)
    return Index(
        numbers=whole["episode_index"],
        lengths=whole["length"],
        data=_data_place(keys, whole["length"]),
        videos={feature: _video_place(table, whole, feature, folder) for feature in videos},
        notes={n.removeprefix(INFO_PREFIX): table.column(n).to_numpy() for n in table.column_names if n.startswith(INFO_PREFIX)},
    )


def _data_place(keys: np.ndarray, lengths: np.ndarray) -> Place:
    """Episodes of a file follow each other there as they do in the dataset."""
    _, file = np.unique(keys, axis=0, return_inverse=True)
    file = file.reshape(-1)
    order = np.argsort(file, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    total = np.bincount(file, weights=lengths).astype(np.int64) if len(lengths) else lengths
    start = np.empty(len(keys), np.int64)
    start[order] = before - (np.cumsum(total) - total)[file[order]]
    return Place(keys=keys, start=start, total=total[file])


def _video_place(table: pa.Table, whole: dict[str, np.ndarray], feature: str, folder: Path) -> Place:
    name = f"videos/{feature}/from_timestamp"
    start = _numbers(table, name, folder).astype(np.float64)
    if not (np.isfinite(start) & (start >= 0)).all():
        raise ValueError(f"{folder}: '{name}' must be a time in the video, found {start[~(start >= 0)][:1]}; copy the dataset again")
    return Place(keys=np.stack([whole[f"videos/{feature}/{what}_index"] for what in ("chunk", "file")], axis=1), start=start)


def _whole_numbers(table: pa.Table, name: str, folder: Path) -> np.ndarray:
    values = _numbers(table, name, folder)
    if values.dtype.kind not in "iu" or (values.size and not (values.min() >= 0 and values.max() < 2**40)):
        raise ValueError(f"{folder}: '{name}' must hold whole numbers that are not negative; copy the dataset again")
    return values.astype(np.int64)


def _numbers(table: pa.Table, name: str, folder: Path) -> np.ndarray:
    column = table.column(name)
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(f"{folder}: '{name}' must hold a number for every episode, it has {column.type}; copy the dataset again")
    return column.to_numpy()


def _pandas_index(schema: pa.Schema) -> list[str]:
    try:
        index = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        return []
    return [name for name in index if isinstance(name, str)] if isinstance(index, list) else []
