"""LeRobotDataset v3.0, read without lerobot: many episodes per file, video or images inside parquet.

    meta/info.json                      features, path templates, frame rate
    meta/tasks.parquet                  instruction <-> task_index
    meta/episodes/chunk-000/file-000    one row per episode: length, which files, where in the video
    data/chunk-000/file-000.parquet     one row per frame: state, action, task_index, extras (and images, in one variant)
    videos/CAMERA/chunk-000/file-000.mp4

`stats.json` is ignored: its quantiles are not the dataset's (docs/data.md). `meta/vla_oft.json` is ours and optional.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla_oft.data.video import num_frames, read_frames

CAMERA_PREFIX = "observation.images."
EXTRA_PREFIX = "observation."
INFO_PREFIX = "vla_oft/"
_STATE_NAMES, _ACTION_NAMES = ("observation.state", "state"), ("action", "actions")
_INDEX_FEATURES = frozenset({"timestamp", "frame_index", "episode_index", "index", "task_index"})


def detect(path: Path) -> bool:
    """Whether `path` looks like a LeRobot dataset."""
    return (path / "meta" / "info.json").is_file()


def open_source(path: Path, cameras: Mapping[str, str] | None) -> "LeRobotSource":
    """Open the dataset; see `data.base.open_source`."""
    return LeRobotSource(path, cameras)


class LeRobotSource:
    """A `Source` over a LeRobot v3.0 folder. Picklable; nothing but metadata is read until it is asked for."""

    def __init__(self, path: Path, cameras: Mapping[str, str] | None = None) -> None:
        self.path, self.name = path, path.resolve().name
        self._info = _read_json(path / "meta" / "info.json")
        version = self._info.get("codebase_version", "unknown")
        if not version.startswith("v3"):
            raise ValueError(f"{path} is LeRobot {version}; convert it to v3.0 with lerobot's convert_dataset_v21_to_v30 script")
        features = self._info["features"]
        self.fps = float(self._info["fps"])
        self._camera_features = _camera_features(path, features, cameras)
        self.cameras = tuple(self._camera_features)
        self._state = next((name for name in _STATE_NAMES if name in features), None)
        self._action = next((name for name in _ACTION_NAMES if name in features), None)
        if self._action is None:
            raise ValueError(f"{path}: no action feature; found {sorted(features)}")
        self.state_dim = int(np.prod(features[self._state]["shape"])) if self._state else 0
        self.action_dim = int(np.prod(features[self._action]["shape"]))
        ours = path / "meta" / "vla_oft.json"
        self.recording: dict[str, Any] = _read_json(ours) if ours.is_file() else {}
        self.kind = self.recording.get("kind", "demonstrations")
        self.extras = {
            name.removeprefix(EXTRA_PREFIX): tuple(self.recording.get("extras", {}).get(name, feature["shape"]))
            for name, feature in features.items()
            if name not in _INDEX_FEATURES | {self._state, self._action} and feature["dtype"] not in ("video", "image", "string")
        }
        self.tasks = _read_tasks(path / "meta" / "tasks.parquet")
        self._episodes = _read_episodes(path / "meta" / "episodes")
        self.lengths = np.asarray(self._episodes["length"], np.int64)
        self._rows = np.concatenate([[0], np.cumsum(self.lengths)])  # of each episode's first frame, over all files
        self._files: dict[Path, list[int]] = {}  # data file -> its episodes
        for episode in range(len(self.lengths)):
            self._files.setdefault(self._data_path(episode), []).append(episode)
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != "dataset_statistics.json"):
            digest.update(f"{file.relative_to(self.path)} {file.stat().st_size}\n".encode())
            if file.parts[len(self.path.parts)] == "meta":
                digest.update(file.read_bytes())
        digest.update(json.dumps(self._camera_features).encode())
        return digest.hexdigest()[:16]

    def states(self, episode: int) -> np.ndarray:
        if self._state is None:
            raise ValueError(f"dataset {self.path} has no state")
        return self._slice(self._state, episode).astype(np.float32, copy=False)

    def actions(self, episode: int) -> np.ndarray:
        assert self._action is not None
        return self._slice(self._action, episode).astype(np.float32, copy=False)

    def task_indices(self, episode: int) -> np.ndarray:
        return self._slice("task_index", episode)[:, 0].astype(np.int64, copy=False)

    def extra(self, name: str, episode: int) -> np.ndarray:
        if name not in self.extras:
            raise ValueError(f"dataset {self.path} has no extra '{name}'; it has {sorted(self.extras) or 'none'}")
        feature = EXTRA_PREFIX + name if EXTRA_PREFIX + name in self._info["features"] else name
        return self._slice(feature, episode).reshape(-1, *self.extras[name])

    def episode_info(self, episode: int) -> dict[str, Any]:
        return {name.removeprefix(INFO_PREFIX): values[episode] for name, values in self._episodes.items() if name.startswith(INFO_PREFIX)}

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        if camera not in self._camera_features:
            raise ValueError(f"dataset {self.path} has no camera '{camera}'; it has {', '.join(self.cameras)}")
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.lengths[episode]):
            last = self.lengths[episode] - 1
            raise IndexError(f"episode {episode} of {self.path} has steps 0..{last}, asked for {wanted.min()}..{wanted.max()}")
        feature = self._camera_features[camera]
        try:
            if self._info["features"][feature]["dtype"] == "image":
                return self._stored_images(episode, wanted, feature)
            first = round(self._episodes[f"videos/{feature}/from_timestamp"][episode] * self.fps)
            return read_frames(self._video_path(episode, feature), wanted + first, self.fps)
        except ValueError as error:
            raise ValueError(f"episode {episode}, camera '{camera}': {error}") from None

    def check(self) -> None:
        for file, episodes in self._files.items():
            rows = _open_parquet(file).metadata.num_rows
            needed = int(self.lengths[episodes].sum())
            if rows != needed:
                raise ValueError(f"{file} has {rows} rows, episodes {episodes[0]}..{episodes[-1]} need {needed}: copy the dataset again")
        index = self._column("episode_index")[:, 0]
        if (index != np.repeat(self._episodes["episode_index"], self.lengths)).any():
            raise ValueError(f"{self.path}: frames are not stored in the order of meta/episodes; re-export the dataset with lerobot")
        for camera, feature in self._camera_features.items():
            if self._info["features"][feature]["dtype"] == "image":
                for episodes in self._files.values():
                    self.frames(episodes[0], [0], camera)
                continue
            ends: dict[Path, tuple[int, int]] = {}
            for episode in range(len(self)):
                end = round(self._episodes[f"videos/{feature}/to_timestamp"][episode] * self.fps)
                path = self._video_path(episode, feature)
                ends[path] = max(ends.get(path, (0, 0)), (end, episode))
            for path, (end, episode) in ends.items():
                try:
                    if num_frames(path, self.fps) < end:
                        raise ValueError(f"{path}: {num_frames(path, self.fps)} frames, {end} needed; copy or record the file again")
                    read_frames(path, [0, end - 1], self.fps)
                except ValueError as error:
                    raise ValueError(f"episode {episode}: {error}") from None

    def _video_path(self, episode: int, feature: str) -> Path:
        chunk, file = (int(self._episodes[f"videos/{feature}/{what}_index"][episode]) for what in ("chunk", "file"))
        return self.path / self._info["video_path"].format(video_key=feature, chunk_index=chunk, file_index=file)

    def _data_path(self, episode: int) -> Path:
        chunk, file = (int(self._episodes[f"data/{what}_index"][episode]) for what in ("chunk", "file"))
        return self.path / self._info["data_path"].format(chunk_index=chunk, file_index=file)

    def _slice(self, feature: str, episode: int) -> np.ndarray:
        return self._column(feature)[self._rows[episode] : self._rows[episode + 1]]

    def _column(self, feature: str) -> np.ndarray:
        """One feature of all frames, (N, size)."""
        if feature not in self._columns:
            values = [_to_numpy(_read_column(file, feature), file, feature) for file in self._files]
            column = np.concatenate(values)
            if len(column) != self._rows[-1]:
                raise ValueError(f"{self.path}/data has {len(column)} frames, meta/episodes lists {self._rows[-1]}: copy the dataset again")
            self._columns[feature] = column
        return self._columns[feature]

    def _stored_images(self, episode: int, wanted: np.ndarray, feature: str) -> np.ndarray:
        file = self._data_path(episode)
        first = int(self._rows[episode] - self._rows[self._files[file][0]])
        images = [_decode(_stored_bytes(file, feature, first + int(step)), file) for step in wanted]
        return np.stack(images) if images else np.empty((0, *self._info["features"][feature]["shape"]), np.uint8)


def _camera_features(path: Path, features: dict[str, Any], cameras: Mapping[str, str] | None) -> dict[str, str]:
    found = {name.removeprefix(CAMERA_PREFIX): name for name, feature in features.items() if feature["dtype"] in ("video", "image")}
    if cameras is None:
        return found
    known = {**found, **{name: name for name in found.values()}}
    missing = [feature for feature in cameras.values() if feature not in known]
    if missing:
        raise ValueError(f"dataset {path} has no camera {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    return {camera: known[feature] for camera, feature in cameras.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read ({error}); copy the dataset again") from None


def _read_tasks(path: Path) -> tuple[str, ...]:
    table = _open_parquet(path).read()
    # lerobot's recorder names the pandas index `task`; its v2.1 converter leaves it unnamed, which is stored as `__index_level_0__`
    index = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    found = table.column_names
    text = next((name for name in ("task", *index, "__index_level_0__") if name in found), None)
    if text is None or "task_index" not in found:
        raise ValueError(f"{path}: needs the columns 'task' (or a pandas index) and 'task_index', found {found}; convert the dataset again")
    names, order = table.column(text).to_pylist(), table.column("task_index").to_pylist()
    if sorted(order) != list(range(len(order))) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: column '{text}' must hold one text for each task_index 0..{len(order) - 1}; convert the dataset again")
    return tuple(name for _, name in sorted(zip(order, names, strict=True)))


def _read_episodes(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{folder}: no episode metadata; copy the dataset again")
    keep = [name for name in _open_parquet(files[0]).schema_arrow.names if not name.startswith("stats/")]
    table = pa.concat_tables([_open_parquet(file).read(columns=keep) for file in files]).sort_by("dataset_from_index")
    return {name: table.column(name).to_numpy() if name != "tasks" else None for name in keep}


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; copy the dataset again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy the dataset again") from None


def _read_column(path: Path, feature: str) -> pa.ChunkedArray:
    try:
        return _open_parquet(path).read(columns=[feature]).column(0)
    except (IndexError, pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot read '{feature}' ({error}); copy the dataset again") from None


def _to_numpy(column: pa.ChunkedArray, file: Path, feature: str) -> np.ndarray:
    rows = len(column)
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()
    if array.null_count or (rows and len(array) % rows):
        raise ValueError(f"{file}: '{feature}' has missing values or rows of different sizes; re-export the dataset")
    return array.to_numpy(zero_copy_only=False).reshape(rows, -1)


@lru_cache(maxsize=8)
def _row_group(file: Path, group: int, feature: str) -> pa.ChunkedArray:
    return _open_parquet(file).read_row_group(group, columns=[feature]).column(0)


@lru_cache(maxsize=1024)
def _group_starts(file: Path) -> np.ndarray:
    metadata = _open_parquet(file).metadata
    return np.cumsum([0] + [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])


def _stored_bytes(file: Path, feature: str, row: int) -> bytes:
    starts = _group_starts(file)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    value = _row_group(file, group, feature)[row - int(starts[group])].as_py()
    if not value or not value.get("bytes"):
        raise ValueError(f"{file}: row {row} of '{feature}' holds no image; re-export the dataset with its images")
    return value["bytes"]


def _decode(data: bytes, file: Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file}: damaged image ({error}); copy the dataset again") from None
