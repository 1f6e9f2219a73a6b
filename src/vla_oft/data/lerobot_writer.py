"""LeRobotDataset v3.0, written without lerobot.

    with LeRobotWriter(out, spec) as writer:                            # a temporary sibling of `out`
        writer.append(encode(episodes, spec.control_hz))                # `encode` may run in other processes
                                                                        # leaving the block renames it to `out`

For datasets that belong to no robot of ours: `LeRobotWriter(out, Schema(...), fps=10)`.
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
from vla_oft.data.base import ReadOptions
from vla_oft.data.check import source_statistics
from vla_oft.data.clips import Clip
from vla_oft.data.files import Folder
from vla_oft.data.lerobot_files import DATA_PATH, VIDEO_PATH, DataFiles, VideoFiles
from vla_oft.data.lerobot_info import CAMERA_PREFIX, EXTRA_PREFIX
from vla_oft.data.lerobot_meta import (
    aggregate,
    array_stats,
    episodes_table,
    feature_entry,
    stats_json,
    table_metadata,
    tasks_table,
)
from vla_oft.data.lerobot_source import LeRobotSource
from vla_oft.data.lerobot_v3 import INFO_PREFIX
from vla_oft.data.recording import Block, Episode, Pictures, Schema, check_episode, encode
from vla_oft.statistics import save_statistics
from vla_oft_client import RobotSpec


class LeRobotWriter:
    """Writes `out` when the `with` block ends; any exception, or a kill, leaves no `out`.

    what: the robot that is recorded, or the schema of any dataset. fps: frames a second; None takes the robot's control rate.
    kind: "demonstrations" or "scenes", see `data.base.Source`. provenance: JSON facts about the recording.
    images: store frames as PNG pictures in the data files instead of video: without loss, and of any size.
    crf: quality of the video that `append_episode` encodes, 0 lossless to 51.
    """

    def __init__(
        self,
        out: str | Path,
        what: RobotSpec | Schema,
        *,
        fps: float | None = None,
        kind: str = "demonstrations",
        provenance: dict[str, Any] | None = None,
        images: bool = False,
        crf: int = 18,
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
        chunks_size: int = 1000,
    ) -> None:
        self.robot = what if isinstance(what, RobotSpec) else None
        self.schema = what if isinstance(what, Schema) else Schema.of(what)
        if fps is None and self.robot is None:
            raise ValueError(f"fps is needed to write {out}: a schema does not say how many frames a second there are")
        self.out, self.kind, self.images, self.crf = Path(out), kind, images, crf
        self.fps = float(fps if fps is not None else what.control_hz)  # type: ignore[union-attr]
        self.provenance = provenance or {}
        self._limits = {"data_files_size_in_mb": data_files_size_in_mb, "video_files_size_in_mb": video_files_size_in_mb}
        self._chunks_size = chunks_size
        self._tasks: dict[str, int] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._extra_shapes: dict[str, tuple[int, ...]] = {}
        self._num_frames = 0
        self._meta: dict[str, list[Any]] = {}
        self._stats: dict[str, list[np.ndarray]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "LeRobotWriter":
        self.folder = self._stack.enter_context(atomic_directory(self.out))
        self._data = DataFiles(self.folder, self._limits["data_files_size_in_mb"], self._chunks_size)
        self._videos = VideoFiles(self.folder, self.fps, self._limits["video_files_size_in_mb"], self._chunks_size)
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            try:
                if error[0] is None:
                    self._finish()
            finally:
                self._data.abandon()
                self._videos.close()
            if error[0] is not None:
                self._stack.__exit__(*error)

    @property
    def num_episodes(self) -> int:
        """Episodes appended so far."""
        return len(self._meta.get("length", []))

    def append_episode(self, episode: Episode) -> None:
        """Encode and append one episode."""
        self.append(encode([episode], self.fps, crf=self.crf, images=self.images))

    def append(self, block: Block) -> None:
        """Append encoded episodes."""
        for episode in block.episodes:
            check_episode(episode, self.schema, block)
        if any(isinstance(clip, Pictures) != self.images for clip in block.clips.values()):
            raise ValueError(f"{self.out} is written with images={self.images}: give `encode` the same")
        if not self._features:
            self._define_features(block)
        self._check_sizes(block)
        videos = {c: self._videos.append(CAMERA_PREFIX + c, clip) for c, clip in block.clips.items() if isinstance(clip, Clip)}
        offset = 0
        for number, episode in enumerate(block.episodes):
            stored = {c: p.data[offset : offset + len(episode)] for c, p in block.clips.items() if isinstance(p, Pictures)}
            self._append_rows(episode, stored, {camera: stats[number] for camera, stats in block.image_stats.items()})
            for camera, place in videos.items():
                key = f"videos/{CAMERA_PREFIX}{camera}"
                self._note(f"{key}/chunk_index", place["chunk_index"])
                self._note(f"{key}/file_index", place["file_index"])
                self._note(f"{key}/from_timestamp", (place["first"] + offset) / self.fps)
                self._note(f"{key}/to_timestamp", (place["first"] + offset + len(episode)) / self.fps)
            offset += len(episode)

    def _define_features(self, block: Block) -> None:
        first, schema = block.episodes[0], self.schema
        for camera, clip in block.clips.items():
            kind = "image" if self.images else "video"
            self._features[CAMERA_PREFIX + camera] = feature_entry(kind, (clip.height, clip.width, 3), fps=self.fps)
        if first.states is not None:
            self._features["observation.state"] = feature_entry(_float_type(first.states), (schema.state_dim,), schema.state_names)
        self._features["action"] = feature_entry(_float_type(first.actions), (schema.action_dim,), schema.action_names)
        for name, values in first.extras.items():
            self._extra_shapes[EXTRA_PREFIX + name] = values.shape[1:]
            self._features[EXTRA_PREFIX + name] = feature_entry(str(values.dtype), (int(np.prod(values.shape[1:])),))
        for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            self._features[name] = feature_entry("float32" if name == "timestamp" else "int64", (1,))

    def _check_sizes(self, block: Block) -> None:
        for camera, clip in block.clips.items():
            height, width, _ = self._features[CAMERA_PREFIX + camera]["shape"]
            if (clip.height, clip.width) != (height, width):
                sizes = f"'{camera}' is {width} x {height}, got {clip.width} x {clip.height}"
                raise ValueError(f"{self.out}: images of one camera must have one size: {sizes}")

    def _append_rows(self, episode: Episode, stored: dict[str, Any], stats_of_images: dict[str, np.ndarray]) -> None:
        """Add the steps of one episode. stored: camera -> PNG files of its steps, where they are kept here."""
        length = len(episode)
        instructions = [episode.instructions] * length if isinstance(episode.instructions, str) else list(episode.instructions)
        columns, index = self._numbers(episode), self._index_columns(instructions)
        pictures = {CAMERA_PREFIX + camera: _pictures(data) for camera, data in stored.items()}
        extras = {EXTRA_PREFIX + name: values.reshape(length, -1) for name, values in episode.extras.items()}
        lists = {name: _column(values) for name, values in {**columns, **extras}.items()}
        table = pa.table({**pictures, **lists, **{name: pa.array(values) for name, values in index.items()}})
        chunk, file = self._data.append(table, table_metadata(self._features))
        row = {
            "episode_index": self.num_episodes,
            "tasks": list(dict.fromkeys(instructions)),
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
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

    def _numbers(self, episode: Episode) -> dict[str, np.ndarray]:
        """State and action; all episodes have one type of number, so that nothing is rounded unseen."""
        found = {"observation.state": episode.states, "action": episode.actions}
        columns = {name: values.astype(_float_type(values)) for name, values in found.items() if values is not None}
        for name, values in columns.items():
            if str(values.dtype) != self._features[name]["dtype"]:
                raise ValueError(f"{self.out}: '{name}' is {values.dtype}, in earlier episodes {self._features[name]['dtype']}; choose one")
        return columns

    def _index_columns(self, instructions: list[str]) -> dict[str, np.ndarray]:
        steps = np.arange(len(instructions))
        return {
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(len(steps), self.num_episodes),
            "index": self._num_frames + steps,
            "task_index": np.array([self._tasks.setdefault(task, len(self._tasks)) for task in instructions], np.int64),
        }

    def _note(self, name: str, value: Any) -> None:
        self._meta.setdefault(name, []).append(value)

    def _finish(self) -> None:
        if not self.num_episodes:
            raise ValueError(f"nothing was recorded for {self.out}: append at least one episode")
        self._data.close()
        self._videos.close()
        meta = self.folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        stats = {name: np.stack(values) for name, values in self._stats.items()}
        pq.write_table(episodes_table(self._meta, stats), meta / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(tasks_table(list(self._tasks)), meta / "tasks.parquet")
        replace_file(meta / "stats.json", json.dumps(stats_json({name: aggregate(s) for name, s in stats.items()}), indent=4))
        replace_file(meta / "info.json", json.dumps(self._info(), indent=4))
        ours = {
            **({"robot": self.robot.to_dict()} if self.robot is not None else {}),
            "kind": self.kind,
            "extras": {name: list(shape) for name, shape in self._extra_shapes.items()},
            "versions": {"vla_oft": vla_oft.__version__, "numpy": np.__version__, "av": av.__version__},
            "provenance": self.provenance,
        }
        replace_file(meta / "vla_oft.json", json.dumps(ours, indent=2))
        if self.kind == "demonstrations" and self.schema.normalize_mask is not None:
            statistics = source_statistics(LeRobotSource(Folder(self.folder), ReadOptions()), self.schema.normalize_mask)
            save_statistics(meta / "dataset_statistics.json", {self.out.resolve().name: statistics})

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "fps": int(self.fps) if self.fps.is_integer() else self.fps,
            "features": self._features,
            "total_episodes": self.num_episodes,
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": self._chunks_size,
            **self._limits,
            "data_path": DATA_PATH,
            "video_path": None if self.images else VIDEO_PATH,
            "robot_type": self.schema.robot_type,
            "splits": {"train": f"0:{self.num_episodes}"},
        }


def _float_type(values: np.ndarray) -> str:
    """float32, or float64 where float32 would lose something."""
    return str(np.result_type(values.dtype, np.float32))


def _column(values: np.ndarray) -> pa.Array:
    """(T, size): lists, but bare numbers where there is one a step: lerobot opens no other file of a feature of shape [1]."""
    numbers = pa.array(np.ascontiguousarray(values).reshape(-1))
    return numbers if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(numbers, values.shape[1])


def _pictures(data: Any) -> pa.StructArray:
    """As the `datasets` library stores pictures: bytes, and a path that is a mere name."""
    names = [f"frame-{step:06d}.png" for step in range(len(data))]
    return pa.StructArray.from_arrays([pa.array(data, pa.binary()), pa.array(names, pa.string())], ["bytes", "path"])
