"""LeRobotDataset v3.0, written without lerobot.

    with LeRobotWriter(out, spec) as writer:                            # a temporary sibling of `out`
        writer.append(encode(episodes, spec.control_hz))                # `encode` may run in other processes
                                                                        # leaving the block renames it to `out`

Additional per-frame arrays are stored flat (lerobot reads them as vectors); their shapes are in `meta/vla_oft.json`.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vla_oft
from vla_oft.atomic import atomic_directory, replace_file
from vla_oft.data.lerobot import CAMERA_PREFIX, EXTRA_PREFIX, INFO_PREFIX, LeRobotSource
from vla_oft.data.lerobot_meta import (
    aggregate,
    array_stats,
    episodes_table,
    feature_entry,
    stats_json,
    table_metadata,
    tasks_table,
)
from vla_oft.data.recording import Block, Episode, check_episode, encode
from vla_oft.data.video import Clip, ClipFile
from vla_oft.statistics import compute_statistics, save_statistics
from vla_oft_client import RobotSpec

ROWS_PER_GROUP = 4096
MEGABYTE = 2**20


class LeRobotWriter:
    """Writes `out` when the `with` block ends; any exception, or a kill, leaves no `out`.

    fps: frames a second; None takes the robot's control rate. kind: "demonstrations" or "scenes", see `data.base.Source`.
    provenance: JSON facts about the recording.
    """

    def __init__(
        self,
        out: str | Path,
        spec: RobotSpec,
        *,
        fps: float | None = None,
        kind: str = "demonstrations",
        provenance: dict[str, Any] | None = None,
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
        chunks_size: int = 1000,
    ) -> None:
        self.out, self.spec, self.fps, self.kind = Path(out), spec, fps or spec.control_hz, kind
        self.provenance = provenance or {}
        self._limits = {"data_files_size_in_mb": data_files_size_in_mb, "video_files_size_in_mb": video_files_size_in_mb}
        self._chunks_size = chunks_size
        self._tasks: dict[str, int] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._extra_shapes: dict[str, tuple[int, ...]] = {}
        self._num_frames = 0
        self._rows: list[pa.Table] = []
        self._data: pq.ParquetWriter | None = None
        self._data_index, self._data_bytes = 0, 0
        self._videos: dict[str, ClipFile] = {}
        self._video_index: dict[str, int] = {}
        self._meta: dict[str, list[Any]] = {}
        self._stats: dict[str, list[np.ndarray]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "LeRobotWriter":
        self.folder = self._stack.enter_context(atomic_directory(self.out))
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            try:
                if error[0] is None:
                    self._finish()
            finally:
                self._close()
            if error[0] is not None:
                self._stack.__exit__(*error)

    @property
    def num_episodes(self) -> int:
        """Episodes appended so far."""
        return len(self._meta.get("length", []))

    def append_episode(self, episode: Episode) -> None:
        """Encode and append one episode."""
        self.append(encode([episode], self.fps))

    def append(self, block: Block) -> None:
        """Append encoded episodes."""
        for episode in block.episodes:
            check_episode(episode, self.spec, block)
        if not self._features:
            self._define_features(block)
        positions = {camera: self._append_clip(camera, clip) for camera, clip in block.clips.items()}
        offset = 0
        for number, episode in enumerate(block.episodes):
            self._append_rows(episode, {camera: stats[number] for camera, stats in block.image_stats.items()})
            for camera, first in positions.items():
                index, key = self._video_index[camera], f"videos/{CAMERA_PREFIX}{camera}"
                self._note(f"{key}/chunk_index", index // self._chunks_size)
                self._note(f"{key}/file_index", index % self._chunks_size)
                self._note(f"{key}/from_timestamp", (first + offset) / self.fps)
                self._note(f"{key}/to_timestamp", (first + offset + len(episode)) / self.fps)
            offset += len(episode)

    def _define_features(self, block: Block) -> None:
        first = block.episodes[0]
        for camera, clip in block.clips.items():
            self._features[CAMERA_PREFIX + camera] = feature_entry("video", (clip.height, clip.width, 3), self.fps)
        if first.states is not None:
            self._features["observation.state"] = feature_entry("float32", (self.spec.state_dim,))
        self._features["action"] = feature_entry("float32", (self.spec.action_dim,))
        for name, values in first.extras.items():
            self._extra_shapes[EXTRA_PREFIX + name] = values.shape[1:]
            self._features[EXTRA_PREFIX + name] = feature_entry(str(values.dtype), (int(np.prod(values.shape[1:])),))
        for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            self._features[name] = feature_entry("float32" if name == "timestamp" else "int64", (1,))

    def _append_clip(self, camera: str, clip: Clip) -> int:
        file = self._videos.get(camera)
        if file is not None and file.num_bytes + len(clip.data) > self._limits["video_files_size_in_mb"] * MEGABYTE:
            file.close()
            self._video_index[camera] += 1
            file = None
        if file is None:
            index = self._video_index.setdefault(camera, 0)
            path = f"videos/{CAMERA_PREFIX}{camera}/chunk-{index // self._chunks_size:03d}/file-{index % self._chunks_size:03d}.mp4"
            file = self._videos[camera] = ClipFile(self.folder / path, self.fps)
        return file.append(clip)

    def _append_rows(self, episode: Episode, stats_of_images: dict[str, np.ndarray]) -> None:
        length, number = len(episode), self.num_episodes
        instructions = [episode.instructions] * length if isinstance(episode.instructions, str) else list(episode.instructions)
        tasks = np.array([self._tasks.setdefault(task, len(self._tasks)) for task in instructions], np.int64)
        steps = np.arange(length)
        columns: dict[str, np.ndarray] = {} if episode.states is None else {"observation.state": episode.states.astype(np.float32)}
        columns["action"] = episode.actions.astype(np.float32)
        extras = {EXTRA_PREFIX + name: values.reshape(length, -1) for name, values in episode.extras.items()}
        index = {
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, number),
            "index": self._num_frames + steps,
            "task_index": tasks,
        }
        table = pa.table({**{k: _fixed_lists(v) for k, v in {**columns, **extras}.items()}, **{k: pa.array(v) for k, v in index.items()}})
        if self._data_bytes and self._data_bytes + table.nbytes > self._limits["data_files_size_in_mb"] * MEGABYTE:
            self._close_data()
            self._data_index, self._data_bytes = self._data_index + 1, 0
        self._rows.append(table)
        self._data_bytes += table.nbytes
        if sum(len(rows) for rows in self._rows) >= ROWS_PER_GROUP:
            self._flush()
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(instructions)),
            "length": length,
            "data/chunk_index": self._data_index // self._chunks_size,
            "data/file_index": self._data_index % self._chunks_size,
            "dataset_from_index": self._num_frames,
            "dataset_to_index": self._num_frames + length,
            **{INFO_PREFIX + name: value for name, value in episode.info.items()},
        }
        for name, value in row.items():
            self._note(name, value)
        for name, stats in array_stats({**columns, **index}).items():
            self._stats.setdefault(name, []).append(stats)
        for camera, stats in stats_of_images.items():
            self._stats.setdefault(CAMERA_PREFIX + camera, []).append(stats)
        self._num_frames += length

    def _note(self, name: str, value: Any) -> None:
        self._meta.setdefault(name, []).append(value)

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.concat_tables(self._rows).replace_schema_metadata(table_metadata(self._features))
        if self._data is None:
            chunk, file = divmod(self._data_index, self._chunks_size)
            path = self.folder / f"data/chunk-{chunk:03d}/file-{file:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema)
        self._data.write_table(table)
        self._rows = []

    def _close_data(self) -> None:
        self._flush()
        if self._data is not None:
            self._data.close()
            self._data = None

    def _close(self) -> None:
        if self._data is not None:
            self._data.close()
        for file in self._videos.values():
            file.close()
        self._videos = {}

    def _finish(self) -> None:
        if not self.num_episodes:
            raise ValueError(f"nothing was recorded for {self.out}: append at least one episode")
        self._close_data()
        meta = self.folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        stats = {name: np.stack(values) for name, values in self._stats.items()}
        pq.write_table(episodes_table(self._meta, stats), meta / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(tasks_table(list(self._tasks)), meta / "tasks.parquet")
        replace_file(meta / "stats.json", json.dumps(stats_json({name: aggregate(s) for name, s in stats.items()}), indent=4))
        info = {
            "codebase_version": "v3.0",
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "features": self._features,
            "total_episodes": self.num_episodes,
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": self._chunks_size,
            **self._limits,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "robot_type": self.spec.name,
            "splits": {"train": f"0:{self.num_episodes}"},
        }
        ours = {
            "robot": self.spec.to_dict(),
            "kind": self.kind,
            "extras": {name: list(shape) for name, shape in self._extra_shapes.items()},
            "versions": {"vla_oft": vla_oft.__version__, "numpy": np.__version__, "av": av.__version__},
            "provenance": self.provenance,
        }
        replace_file(meta / "info.json", json.dumps(info, indent=4))
        replace_file(meta / "vla_oft.json", json.dumps(ours, indent=2))
        if self.kind == "demonstrations":
            self._write_statistics(LeRobotSource(self.folder))

    def _write_statistics(self, source: LeRobotSource) -> None:
        episodes = range(len(source))
        states = [source.states(e) for e in episodes] if source.state_dim else None
        statistics = compute_statistics([source.actions(e) for e in episodes], states, self.spec.normalize_mask)
        save_statistics(self.folder / "meta" / "dataset_statistics.json", {self.out.resolve().name: statistics})


def _fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
