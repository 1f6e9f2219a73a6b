"""An RLDS split as a `Source`: small arrays from its index, pictures straight from the shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data import pictures
from vla_oft.data.base import ReadOptions, camera_names, check_steps
from vla_oft.data.pieces import Pieces
from vla_oft.data.rlds_index import Index
from vla_oft.data.rlds_layout import Feature, Layout

STATES = ("state", "proprio", "EEF_state", "eef_state", "robot_state")
"""Which array of `steps/observation` is the state: the first of these that there is."""

INSTRUCTIONS = (
    "steps/language_instruction",
    "steps/observation/natural_language_instruction",
    "steps/natural_language_instruction",
    "steps/observation/language_instruction",
    "language_instruction",
    "episode_metadata/language_instruction",
)
"""Which text is the instruction: the first of these that there is."""

_ACTION = "steps/action"


class RldsSource:
    """See `data.base.Source`.

    shards: the path of each shard by its number in the index, which was built for `instruction_feature(layout)`.
    """

    format, kind = "rlds", "demonstrations"
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def __init__(
        self, path: Path, name: str, layout: Layout, index: Index, shards: Sequence[Path], options: ReadOptions, skipped: tuple[str, ...]
    ) -> None:
        self.path, self.name, self.fps, self.skipped = path, name, options.fps, skipped
        self.recording: dict[str, Any] = {}
        self._index, self._shards, self._files = index, tuple(shards), Pieces()
        self._instruction = options.instruction
        self.tasks = (options.instruction,) if options.instruction else index.tasks
        self.lengths = index.records[:, 2]
        named = _by_name(layout)
        self._cameras = camera_names({n.replace("/", "."): f.key for n, f in named.items() if _is_camera(f)}, options, str(path))
        self._features = {feature.key: feature for feature in layout.features}
        self.cameras = tuple(self._cameras)
        self._action, self._state = action_feature(layout, path), _state_feature(layout)
        self.action_dim = int(np.prod(self._action.shape))
        self.state_dim = self._state.shape[0] if self._state else 0
        taken = (self._action, self._state)
        self._extras = {name: feature for name, feature in named.items() if feature.kind == "array" and feature not in taken}
        self.extras = {name: feature.shape for name, feature in self._extras.items()}

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        facts = ["rlds", self._index.digest, str(self._features), self._cameras, self._instruction, self.fps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        wanted = check_steps(self, episode, indices, camera)
        key, path = self._cameras[camera], self._shards[self._index.records[episode, 0]]
        rows = self._index.columns[key].read(self._index.starts[episode] + wanted)
        out = np.empty((0, *(max(size, 0) for size in self._features[key].shape)), np.uint8)
        for number, (step, (offset, size)) in enumerate(zip(wanted.tolist(), rows.tolist(), strict=True)):
            where = f"{path}: episode {episode}, camera '{camera}', step {step}"
            image = pictures.decode(self._files.read(path, offset, size, where), where)
            if len(wanted) == 1:
                return image[None]
            if not number:
                out = np.empty((len(wanted), *image.shape), np.uint8)
            if image.shape != out.shape[1:]:
                raise ValueError(f"{where}: a picture of another size than those before it; record the episode again")
            out[number] = image  # at once: the picture's own memory, still in the processor's cache, is used for the next one
        return out

    def frame_into(self, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
        """See `base.Direct`."""
        key, path = self._cameras[camera], self._shards[self._index.records[episode, 0]]
        offset, size = self._index.columns[key].row(int(self._index.starts[episode]) + step).tolist()
        where = f"{path}: episode {episode}, camera '{camera}', step {step}"
        return pictures.decode_into(self._files.read(path, offset, size, where), out, where)

    def states(self, episode: int) -> np.ndarray:
        if self._state is None:
            raise ValueError(f"dataset {self.path} has no state (none of {', '.join(STATES)} in its observations)")
        return self._index.rows(self._state.key, episode)

    def actions(self, episode: int) -> np.ndarray:
        return self._index.rows(_ACTION, episode).reshape(-1, self.action_dim)

    def task_indices(self, episode: int) -> np.ndarray:
        return np.zeros(self.lengths[episode], np.int64) if self._instruction else self._index.task_indices(episode)

    def extra(self, name: str, episode: int) -> np.ndarray:
        if name not in self.extras:
            raise ValueError(f"dataset {self.path} has no extra '{name}'; it has {sorted(self.extras) or 'none'}")
        return self._index.rows(self._extras[name].key, episode)

    def episode_info(self, episode: int) -> dict[str, Any]:
        """What the recorder noted, and `shard` and `record`: where the episode lies."""
        shard, record = self._index.records[episode, :2].tolist()
        return {**self._index.notes(episode), "shard": self._shards[shard].name, "record": record}

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Every byte was checked when the index was built. What went wrong since shows in the last picture of each camera."""
        for episode, length in enumerate(self.lengths.tolist()):
            for camera in self.cameras:
                try:
                    self.frames(episode, [length - 1], camera)
                except ValueError as error:
                    yield episode, str(error)
                    break


def action_feature(layout: Layout, path: Path) -> Feature:
    """The feature that holds the action. Raises ValueError when there is none, or when it is not one vector a step."""
    found = {feature.key: feature for feature in layout.features if feature.per_step and feature.kind == "array"}
    action = found.get(_ACTION)
    if action is None or action.dtype != "float32" or len(action.shape) != 1:
        parts = ", ".join(key for key in found if key.startswith("steps/act")) or "none"
        raise ValueError(
            f"dataset {path}: features.json has no '{_ACTION}' that is one vector of floats a step (found {parts}); "
            "which parts in which order a robot wants is nothing to guess: write the dataset again with one action vector"
        )
    return action


def instruction_feature(layout: Layout) -> Feature | None:
    """The feature that holds the instruction."""
    texts = {feature.key: feature for feature in layout.features if feature.kind == "text"}
    return next((texts[key] for key in INSTRUCTIONS if key in texts), None)


def _state_feature(layout: Layout) -> Feature | None:
    found = {feature.key: feature for feature in layout.features if feature.dtype == "float32" and len(feature.shape) == 1}
    return next((found[key] for key in (f"steps/observation/{name}" for name in STATES) if key in found), None)


def _is_camera(feature: Feature) -> bool:
    return feature.kind == "image" and feature.dtype == "uint8" and len(feature.shape) == 3 and feature.shape[2] == 3


def _by_name(layout: Layout) -> dict[str, Feature]:
    """Features of steps; where two share a name, both keep more of their keys."""
    steps = [feature for feature in layout.features if feature.per_step]
    names = [feature.name for feature in steps]
    return {f.name if names.count(f.name) == 1 else f.key.removeprefix("steps/"): f for f in steps}
