"""What `meta/info.json` of a LeRobot dataset says: features, frame rate, splits, and where files lie.

The paths of files are templates of the dataset's, as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`. They come from whoever
made the dataset, so they are filled in by name only, and may not leave its folder.
"""

import json
import math
import re
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import numpy as np

CAMERA_PREFIX, EXTRA_PREFIX = "observation.images.", "observation."
INDEX_FEATURES = frozenset({"timestamp", "frame_index", "episode_index", "index", "task_index"})
_STATE_NAMES, _ACTION_NAMES = ("observation.state", "state"), ("action", "actions")
_NUMBERS = frozenset({"bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})
_PLACEHOLDERS = {2: {"episode_chunk", "episode_index", "video_key"}, 3: {"chunk_index", "file_index", "video_key"}}
_SPEC = re.compile(r"0?\d{0,2}d?")
_CHANNEL = ("channel", "channels", "c")


class Info:
    """The contents of `info.json`, checked.

    major: 2 or 3. fps: frames a second. camera_features: camera name -> feature. state: feature, None without; action: feature.
    extras: name -> (feature, shape) of additional numbers. chunks_size: episodes in a folder (v2). num_episodes: -1 where it is not said.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, read_json(path)
        self.major = self._version()
        self.features: dict[str, dict[str, Any]] = self._features()
        fps = self.values.get("fps")
        if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not 0 < fps < math.inf:
            raise ValueError(f"{path}: fps={fps!r} must be a positive number of frames a second; correct it")
        self.fps = float(fps)
        self.camera_features = self._cameras()
        self.state = next((name for name in _STATE_NAMES if name in self.features), None)
        action = next((name for name in _ACTION_NAMES if name in self.features), None)
        if action is None:
            raise ValueError(f"{path}: no feature {' or '.join(_ACTION_NAMES)} among {sorted(self.features)}; record actions")
        self.action: str = action
        for name in (self.state, self.action):
            if name is not None and self.features[name]["dtype"] not in _NUMBERS:
                raise ValueError(f"{path}: '{name}' is {self.features[name]['dtype']}, not numbers; re-export the dataset")
        self.extras = self._extras()
        self.chunks_size = self._count("chunks_size", 1, 1000)
        self.num_episodes = self._count("total_episodes", 0, -1)
        self._check_template("data_path")
        if any(self.features[name]["dtype"] == "video" for name in self.camera_features.values()):
            self._check_template("video_path")

    def size(self, feature: str | None) -> int:
        """Numbers of one feature at each step; 0 for None."""
        return int(np.prod(self.features[feature]["shape"])) if feature is not None else 0

    def is_video(self, feature: str) -> bool:
        """Whether a camera is stored as video files rather than as pictures in the data files."""
        return self.features[feature]["dtype"] == "video"

    def picture_size(self, feature: str) -> tuple[int, int]:
        """(height, width) of a camera, as `info.json` has it."""
        shape, place = self.features[feature]["shape"], _channel_place(self.features[feature])
        height, width = (n for index, n in enumerate(shape) if index != place % 3)
        return height, width

    def dimension_names(self, feature: str | None) -> tuple[str, ...]:
        """One name for each dimension; empty where there are none, or not as many."""
        names = tuple(_flat(self.features[feature].get("names"))) if feature is not None else ()
        return names if len(names) == self.size(feature) else ()

    def data_path(self, **numbers: int) -> str:
        """Path of a data file, relative to the dataset."""
        return inside(self.values["data_path"].format(**numbers), self.path)

    def video_path(self, feature: str, **numbers: int) -> str:
        """Path of a video file, relative to the dataset."""
        return inside(self.values["video_path"].format(video_key=feature, **numbers), self.path)

    def split(self, wanted: str | None) -> range | None:
        """Numbers of the episodes in one split, None for all: the training split, or the only one, when `wanted` is None."""
        splits = self.values.get("splits") or {}
        if not isinstance(splits, dict):
            raise ValueError(f"{self.path}: splits={splits!r} must map names to ranges such as '0:40'; correct it")
        name = wanted or ("train" if "train" in splits else next(iter(splits), None) if len(splits) == 1 else None)
        if name is None and not splits:
            return None
        if name not in splits:
            raise ValueError(f"{self.path}: no split '{name or 'train'}'; choose one of {', '.join(splits) or '(there are none)'}")
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(splits[name]))
        if found is None:
            raise ValueError(f"{self.path}: split '{name}' is {splits[name]!r}, not a range such as '0:40'; correct it")
        return range(int(found[1]), int(found[2]))

    def _version(self) -> int:
        version = str(self.values.get("codebase_version", "of an unknown version"))
        found = re.match(r"v?([23])\.\d", version)
        if found is None:
            raise ValueError(
                f"{self.path.parent.parent} is LeRobot {version}; v2.0, v2.1 and v3.0 are read: convert it with lerobot's own scripts"
            )
        return int(found[1])

    def _features(self) -> dict[str, dict[str, Any]]:
        features = self.values.get("features")
        if not isinstance(features, dict) or not features:
            raise ValueError(f"{self.path}: 'features' is missing or empty; copy the dataset again")
        for name, feature in features.items():
            shape = feature.get("shape") if isinstance(feature, dict) else None
            good = isinstance(shape, list) and all(isinstance(n, int) and 0 <= n < 2**31 for n in shape)
            if not good or not isinstance(feature.get("dtype"), str):
                raise ValueError(f"{self.path}: feature '{name}' needs a dtype and a shape, found {str(feature)[:200]}; correct it")
        return features

    def _cameras(self) -> dict[str, str]:
        cameras: dict[str, str] = {}
        for feature, entry in self.features.items():
            if entry["dtype"] in ("video", "image") and not _is_depth(entry):
                name = feature.removeprefix(CAMERA_PREFIX).removeprefix(EXTRA_PREFIX)
                cameras[feature if name in cameras else name] = feature
        return cameras

    def _extras(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        extras: dict[str, tuple[str, tuple[int, ...]]] = {}
        for feature, entry in self.features.items():
            if feature not in INDEX_FEATURES | {self.state, self.action} and entry["dtype"] in _NUMBERS and 0 not in entry["shape"]:
                name = feature.removeprefix(EXTRA_PREFIX)
                extras[feature if name in extras else name] = feature, tuple(entry["shape"])
        return extras

    def _count(self, name: str, least: int, absent: int) -> int:
        value = self.values.get(name)
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{self.path}: {name}={value!r} must be a number, at least {least}; correct it")
        return absent if value is None else value

    def _check_template(self, name: str) -> None:
        template, known = self.values.get(name), _PLACEHOLDERS[self.major]
        if not isinstance(template, str):
            raise ValueError(f"{self.path}: {name}={template!r} must be the path of a file with placeholders {sorted(known)}; correct it")
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}={template!r} is no path template ({error}); correct it") from None
        inside(template, self.path)
        for _, field, spec, conversion in parts:
            # names alone: `{a.b}` and `{a[0]}` look into objects, and a width of millions would fill the memory
            if field is not None and (field not in known or conversion or not _SPEC.fullmatch(spec or "")):
                raise ValueError(
                    f"{self.path}: {name} has the placeholder '{{{field}{':' if spec else ''}{spec}}}'; "
                    f"known in v{self.major}: {', '.join(sorted(known))}; correct it"
                )


def inside(relative: str, where: Path) -> str:
    """`relative` itself. Raises ValueError when it would lead out of the dataset's folder; `where`: the file that names it."""
    parts = PurePosixPath(relative).parts
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts or "\\" in relative or "\0" in relative:
        raise ValueError(f"{where}: the path {relative!r} leads out of the dataset; refused")
    return relative


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: Path | str) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming `where` it was found."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: cannot read ({error}); copy the dataset again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: holds a {type(values).__name__}, not an object; copy the dataset again")
    return values


def read_text(path: Path) -> str:
    """The text of a small file. Raises ValueError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; copy the dataset again") from None
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod -R u+rX)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read ({error}); copy the dataset again") from None


def _is_depth(entry: dict[str, Any]) -> bool:
    """Depth maps and other pictures of one channel are not cameras."""
    info = entry.get("info") or entry.get("video_info") or {}
    depth = isinstance(info, dict) and (info.get("is_depth_map") or info.get("video.is_depth_map"))
    return bool(depth) or len(entry["shape"]) != 3 or entry["shape"][_channel_place(entry)] not in (3, 4)


def _channel_place(entry: dict[str, Any]) -> int:
    """Which of the three sizes of a picture counts its channels: first or last."""
    names, shape = entry.get("names"), entry["shape"]
    if isinstance(names, list) and len(names) == len(shape):
        named = [place for place, name in enumerate(names) if name in _CHANNEL]
        if named:
            return named[0]
    return 0 if shape[0] in (1, 3, 4) and shape[-1] not in (1, 3, 4) else -1


def _flat(names: Any) -> list[str]:
    """Names as lerobot versions and recorders write them: ["x", "y"], {"motors": ["x", "y"]}, {"x": 0, "y": 1}, or these nested."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        return sorted(names, key=lambda name: names[name])
    parts = names.values() if isinstance(names, dict) else names if isinstance(names, list) else ()
    return [name for part in parts for name in _flat(part)]
