"""LeRobot datasets of every version as one `Source`.

    meta/info.json      features, path templates, frame rate                lerobot_info.py
    meta/...            episodes and instructions                           lerobot_v2.py, lerobot_v3.py -> lerobot_index.py
    data/...parquet     one row per frame: state, action, task_index, extras (and images, in one variant)      parquet.py
    videos/...mp4       frames                                              video.py

Only `meta/` is read at first. `stats.json` and `episodes_stats.jsonl` are ignored: their quantiles are not the dataset's (docs/data.md).
`meta/vla_oft.json` is ours and optional.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data import lerobot_v2, lerobot_v3, pictures
from vla_oft.data.base import ReadOptions, camera_names, check_steps
from vla_oft.data.files import Files
from vla_oft.data.lerobot_index import Index
from vla_oft.data.lerobot_info import Info, inside, read_json
from vla_oft.data.parquet import num_rows, read_pictures, read_rows
from vla_oft.data.video import read_frame_into, read_frames

MAX_FPS_DIFFERENCE = 1e-3
"""Share by which the frame rate in the options may differ from the dataset's."""


MAX_PATHS = 16384
"""Paths of files that are kept."""


class LeRobotSource:
    """A `Source` over a LeRobot dataset, v2.0 to v3.0. Picklable; nothing but metadata is read until it is asked for.

    `skip_bad` looks into every file at once, and downloads all of a hub dataset for that.
    """

    format = "lerobot"

    def __init__(self, files: Files, options: ReadOptions) -> None:
        files.fetch("meta/*")
        self.files, self.path, self.name = files, files.root, files.name
        self.info = Info(self.path / "meta" / "info.json")
        self._check_options(options)
        self.fps: float | None = self.info.fps
        self.camera_features = camera_names(self.info.camera_features, options, str(self.path))
        self.cameras = tuple(self.camera_features)
        self.state_dim, self.action_dim = self.info.size(self.info.state), self.info.size(self.info.action)
        self.state_names, self.action_names = (self.info.dimension_names(f) for f in (self.info.state, self.info.action))
        ours = self.path / "meta" / "vla_oft.json"
        self.recording: dict[str, Any] = read_json(ours) if ours.is_file() else {}
        self.kind = str(self.recording.get("kind", "demonstrations"))
        shapes = self.recording.get("extras", {})
        self.extras = {name: tuple(shapes.get(feature, shape)) for name, (feature, shape) in self.info.extras.items()}
        version = lerobot_v2 if self.info.major == 2 else lerobot_v3
        self._numbers, self._tasks = version.NUMBERS, version.read_tasks(self.path)
        self._instruction = options.instruction
        self.tasks = self._tasks.names if options.instruction is None else (options.instruction,)
        self.skipped: tuple[str, ...] = ()
        self.index = self._chosen(version.read_index(self.path, self.info), options)
        self.lengths = self.index.lengths
        self._looked_through = False
        self._paths: dict[tuple[int, str | None], Path] = {}
        if options.skip_bad:
            damaged = dict(self.damaged())
            self.skipped += tuple(damaged.values())
            self.index = self.index.take(np.array([e not in damaged for e in range(len(self))], bool))
            self.lengths = self.index.lengths
            self._paths = {}  # episodes have other numbers now
            self._looked_through = True

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": {}}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for line in [self.files.identity] if self.files.identity is not None else _contents(self.path):
            digest.update(f"{line}\n".encode())
        digest.update(json.dumps([self.camera_features, self._instruction]).encode())
        digest.update(self.index.numbers.tobytes())
        return digest.hexdigest()[:16]

    def states(self, episode: int) -> np.ndarray:
        if self.info.state is None:
            raise ValueError(f"dataset {self.path} has no state")
        return _as_float(self.rows(episode)[self.info.state])

    def actions(self, episode: int) -> np.ndarray:
        return _as_float(self.rows(episode)[self.info.action])

    def task_indices(self, episode: int) -> np.ndarray:
        if self._instruction is not None:
            return np.zeros(self.lengths[episode], np.int64)
        return self._tasks.find(self.rows(episode)["task_index"][:, 0].astype(np.int64), self._where(self.data_file(episode), episode))

    def extra(self, name: str, episode: int) -> np.ndarray:
        if name not in self.extras:
            raise ValueError(f"dataset {self.path} has no extra '{name}'; it has {sorted(self.extras) or 'none'}")
        feature, shape = self.info.extras[name][0], self.extras[name]
        values = self._read(episode, (feature,))[feature]
        self._check_size(episode, feature, values, int(np.prod(shape)))
        return values.reshape(-1, *shape).copy()

    def episode_info(self, episode: int) -> dict[str, Any]:
        return {name: values[episode].item() if values.dtype.kind != "O" else values[episode] for name, values in self.index.notes.items()}

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        steps = check_steps(self, episode, indices, camera)
        feature = self.camera_features[camera]
        if not self.info.is_video(feature):
            return self._stored_pictures(episode, steps, feature)
        path, start_s = self.video_file(episode, feature), float(self.index.videos[feature].start[episode])
        try:
            return read_frames(path, steps, self.info.fps, start_s)
        except ValueError as error:
            raise ValueError(self.at(error, path, episode)) from None

    def frame_into(self, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
        """See `base.Direct`."""
        feature = self.camera_features[camera]
        if not self.info.is_video(feature):
            return self._picture_into(episode, step, feature, out)
        path = self.video_file(episode, feature)
        try:
            return read_frame_into(path, step, self.info.fps, float(self.index.videos[feature].start[episode]), out)
        except ValueError as error:
            raise ValueError(self.at(error, path, episode)) from None

    def damaged(self) -> Iterator[tuple[int, str]]:
        from vla_oft.data.lerobot_check import damaged

        return iter(()) if self._looked_through else damaged(self)

    def rows(self, episode: int) -> dict[str, np.ndarray]:
        """State, action and task_index of one episode, each (T, size) as stored. Raises ValueError unless they are what `meta/` says."""
        names = (*((self.info.state,) if self.info.state else ()), self.info.action, "task_index", "episode_index")
        values = self._read(episode, names)
        found, number = values["episode_index"][:, 0], int(self.index.numbers[episode])
        if (found != number).any():
            other, where = int(found[found != number][0]), self._where(self.data_file(episode), episode)
            raise ValueError(f"{where}: frames of episode {other} lie where meta/ says that this one lies; re-export the dataset")
        for name in names[:-2]:
            self._check_size(episode, name, values[name], self.info.size(name))
        return values

    def data_file(self, episode: int) -> Path:
        """The data file of one episode, downloaded first if need be."""
        return self._file(episode, None)

    def video_file(self, episode: int, feature: str) -> Path:
        """The video file of one episode, downloaded first if need be."""
        return self._file(episode, feature)

    def _file(self, episode: int, feature: str | None) -> Path:
        found = self._paths.get((episode, feature))  # put together again for every frame, it would cost a tenth of decoding it
        if found is None:
            key = self.index.data.keys[episode] if feature is None else self.index.videos[feature].keys[episode]
            fields = self._fields(key)
            found = self.files.path(self.info.data_path(**fields) if feature is None else self.info.video_path(feature, **fields))
            if len(self._paths) >= MAX_PATHS:
                self._paths = {}  # a lock here could be held at the moment of a fork
            self._paths[episode, feature] = found
        return found

    def at(self, error: ValueError, path: Path, episode: int) -> str:
        """The message of `error` about file `path`, with the episode named behind the file."""
        return str(error).replace(str(path), self._where(path, episode), 1)

    def _read(self, episode: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        path, place = self.data_file(episode), self.index.data
        assert place.total is not None
        try:
            if num_rows(path) != place.total[episode]:
                raise ValueError(f"{path}: {num_rows(path)} rows, meta/ lists {place.total[episode]}; copy the dataset again")
            return read_rows(path, names, int(place.start[episode]), int(self.lengths[episode]))
        except ValueError as error:
            raise ValueError(self.at(error, path, episode)) from None

    def _check_size(self, episode: int, feature: str, values: np.ndarray, size: int) -> None:
        if values.shape[1] != size:
            where = self._where(self.data_file(episode), episode)
            raise ValueError(f"{where}: '{feature}' has {values.shape[1]} numbers a step, meta/info.json says {size}; one robot a dataset")

    def _stored_pictures(self, episode: int, steps: np.ndarray, feature: str) -> np.ndarray:
        images = []
        for data, where in self._encoded(episode, steps, feature):
            images.append(pictures.decode(data, where))
            if images[0].shape != images[-1].shape:
                raise ValueError(f"{where}: image of {images[-1].shape}, others have {images[0].shape}; re-export the dataset")
        return np.stack(images) if images else np.empty((0, *self.info.picture_size(feature), 3), np.uint8)

    def _picture_into(self, episode: int, step: int, feature: str, out: np.ndarray) -> bool:
        data, where = next(self._encoded(episode, np.array([step]), feature))
        return pictures.decode_into(data, out, where)

    def _encoded(self, episode: int, steps: np.ndarray, feature: str) -> Iterator[tuple[bytes, str]]:
        """(JPEG or PNG, where it was found) of each step."""
        path, first = self.data_file(episode), int(self.index.data.start[episode])
        try:
            stored = read_pictures(path, feature, first + steps)
        except ValueError as error:
            raise ValueError(self.at(error, path, episode)) from None
        for step, (data, relative) in zip(steps, stored, strict=True):
            where = f"{self._where(path, episode)}, step {step} of '{feature}'"
            if not data and relative:
                data = _read_bytes(self.files.path(inside(relative, Path(where))), where)
            if not data:
                raise ValueError(f"{where}: holds no image; re-export the dataset with its images")
            yield data, where

    def _check_options(self, options: ReadOptions) -> None:
        if options.fps is not None and abs(options.fps / self.info.fps - 1) > MAX_FPS_DIFFERENCE:
            raise ValueError(f"{self.info.path} says fps={self.info.fps:g}, the options fps={options.fps:g}; leave it out")
        if options.colour_order is not None:
            raise ValueError(
                f"colour_order='{options.colour_order}' is for formats that leave the order open; {self.path} is LeRobot, always RGB"
            )

    def _chosen(self, index: Index, options: ReadOptions) -> Index:
        """The episodes of the split, without empty ones."""
        if self.info.num_episodes not in (-1, len(index)):
            self._complain(
                options,
                f"{self.info.path}: total_episodes={self.info.num_episodes}, but meta/ lists {len(index)} episodes; copy the dataset again",
            )
        for number in index.numbers[index.lengths == 0]:
            self._complain(options, f"{self.path / 'meta'}, episode {number}: it has no steps; remove it, or read with skip_bad")
        keep, split = index.lengths > 0, self.info.split(options.split)
        if split is not None:
            keep &= (index.numbers >= split.start) & (index.numbers < split.stop)
        return index if keep.all() else index.take(keep)

    def _complain(self, options: ReadOptions, problem: str) -> None:
        if not options.skip_bad:
            raise ValueError(problem)
        self.skipped = (*self.skipped, problem)

    def _fields(self, key: np.ndarray) -> dict[str, int]:
        return {name: int(number) for name, number in zip(self._numbers, key, strict=True)}

    def _where(self, path: Path, episode: int) -> str:
        return f"{path}, episode {self.index.numbers[episode]}"


def _as_float(values: np.ndarray) -> np.ndarray:
    """float32 and float64 as stored; whole numbers in whichever of the two holds them exactly. A copy: `values` are shared and kept."""
    return values.astype(np.result_type(values.dtype, np.float32))


def _contents(root: Path) -> Iterator[str]:
    """Every file with its size, and what is in `meta/`. Hidden folders are not the dataset's: downloads leave them behind."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path, relative = os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), root)
            if name == "dataset_statistics.json" or name.startswith("."):
                continue
            contents = hashlib.sha256(Path(path).read_bytes()).hexdigest() if relative.startswith("meta" + os.sep) else ""
            yield f"{Path(relative).as_posix()} {os.path.getsize(path)} {contents}"


def _read_bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: its image {path} cannot be read ({error.strerror}); copy the dataset again") from None
