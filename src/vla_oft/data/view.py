"""A dataset seen through a conversion: fewer episodes, fewer steps, other names, other units. The files stay as they are.

recording        s0 s1 s2 s3 s4 s5          `convert` keeps the steps 1, 2 and 4
view                s1 s2    s4             steps 0, 1, 2 of the view; frames are looked up at 1, 2, 4
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_oft.data.base import DISTURBED, REWARD, SUCCESS, Direct, Source, check_steps
from vla_oft.features import Convert
from vla_oft.progress import progress

REMEMBERED = 64
"""Converted episodes that are kept in memory."""


@dataclass(frozen=True)
class _Steps:
    """One converted episode."""

    states: np.ndarray | None
    actions: np.ndarray
    kept: np.ndarray


class View:
    """A `Source` over another one.

    key: names the conversion in fingerprints; it must change whenever the conversion's result would.
    episodes: int64 (E,) of the other source's episodes that are seen, in this order; None for all.
    cameras: name -> the other source's name; None for all. image: what is done to each frame.
    state: names of arrays that are joined into the state, action: of the one that is the action ("state", "action" are the other
    source's own; () leaves the state out). convert: see `features.Convert`. cuts: whether `convert` drops steps; all episodes are then
    converted once, to know their lengths, and those of which nothing is left are not seen.
    """

    def __init__(
        self,
        source: Source,
        *,
        key: str,
        episodes: Sequence[int] | np.ndarray | None = None,
        cameras: Mapping[str, str] | None = None,
        image: Callable[[np.ndarray], np.ndarray] | None = None,
        state: tuple[str, ...] = ("state",),
        action: str = "action",
        convert: Convert | None = None,
        cuts: bool = False,
    ) -> None:
        self.source, self.key = source, key
        self.path, self.name, self.format, self.kind, self.fps = source.path, source.name, source.format, source.kind, source.fps
        self.tasks, self.recording, self.skipped = source.tasks, source.recording, source.skipped
        self._cameras = dict(cameras) if cameras is not None else {name: name for name in source.cameras}
        self.cameras, self._image = tuple(self._cameras), image
        self._state, self._action, self._convert, self._cuts = state, action, convert, cuts
        self._recent: OrderedDict[int, _Steps] = OrderedDict()
        self._kept: np.ndarray | None = None  # steps that are kept, of all episodes: 4 bytes a step, so that frames need no conversion
        unknown = [name for name in (*state, action) if name not in ("state", "action") and name not in source.extras]
        if unknown:
            raise ValueError(f"dataset {source.path} has no arrays {unknown}; it has {sorted(source.extras) or 'no extras'}")
        self.extras = {name: shape for name, shape in source.extras.items() if name not in (*state, action)}
        self.state_dim = sum(self._width(name) for name in state)
        self.action_dim = self._width(action)
        self.state_names = source.state_names if state == ("state",) else ()
        self.action_names = source.action_names if action == "action" else ()
        self._episodes = np.arange(len(source)) if episodes is None else np.asarray(episodes, np.int64)
        self.lengths = source.lengths[self._episodes]
        if cuts:
            self._measure()

    def __len__(self) -> int:
        return len(self._episodes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict()}

    def fingerprint(self) -> str:
        facts = [self.source.fingerprint(), self.key, self._cameras, self._state, self._action]
        digest = hashlib.sha256(json.dumps(facts).encode() + self._episodes.tobytes())
        if self._convert is not None and len(self):  # a sample of what the conversion does, should its key not have changed with it
            first = self._steps(0)
            for values in (first.states, first.actions, first.kept):
                digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        wanted = check_steps(self, episode, indices, camera)
        if self._kept is not None:
            wanted = self._kept[self._starts[episode] + wanted].astype(np.int64)
        images = self.source.frames(self._inner(episode), wanted, self._cameras[camera])
        if self._image is None or not len(images):
            return images
        return np.stack([self._image(image) for image in images])

    def frame_into(self, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
        """See `base.Direct`."""
        direct: Direct | None = getattr(self.source, "frame_into", None)
        if direct is None or self._image is not None:
            return False
        if self._kept is not None:
            step = int(self._kept[self._starts[episode] + step])
        return direct(self._inner(episode), step, self._cameras[camera], out)

    def recorded(self, episode: int, step: int, camera: str) -> tuple[int, int, str]:
        """(episode, step, camera) as the recording counts and calls them, behind all views: what messages should name."""
        if self._kept is not None:
            step = int(self._kept[self._starts[episode] + step])
        place = self._inner(episode), step, self._cameras[camera]
        return self.source.recorded(*place) if isinstance(self.source, View) else place

    def states(self, episode: int) -> np.ndarray:
        states = self._steps(episode).states
        if states is None:
            raise ValueError(f"dataset {self.path} has no state")
        return states

    def actions(self, episode: int) -> np.ndarray:
        return self._steps(episode).actions

    def task_indices(self, episode: int) -> np.ndarray:
        return self._cut(episode, self.source.task_indices(self._inner(episode)))

    def extra(self, name: str, episode: int) -> np.ndarray:
        if name not in self.extras:
            raise ValueError(f"dataset {self.path} has no extra '{name}'; it has {sorted(self.extras) or 'none'}")
        values = self.source.extra(name, self._inner(episode))
        return self._gather(episode, values) if name in (DISTURBED, *SUCCESS, *REWARD) else self._cut(episode, values)

    def episode_info(self, episode: int) -> dict[str, Any]:
        return self.source.episode_info(self._inner(episode))

    def damaged(self) -> Iterator[tuple[int, str]]:
        seen = {int(inner): number for number, inner in enumerate(self._episodes)}
        for inner, reason in self.source.damaged():
            if inner in seen:
                yield seen[inner], reason

    def _inner(self, episode: int) -> int:
        return int(self._episodes[episode])

    def _cut(self, episode: int, values: np.ndarray) -> np.ndarray:
        return values[self._steps(episode).kept] if self._cuts else values

    def _gather(self, episode: int, values: np.ndarray) -> np.ndarray:
        """Of what must not be lost with a dropped step (a push, a success): the largest value from each kept step to the next."""
        return np.maximum.reduceat(values, self._steps(episode).kept, axis=0) if self._cuts else values

    def _width(self, name: str) -> int:
        widths = {"state": self.source.state_dim, "action": self.source.action_dim}
        return widths[name] if name in widths else int(np.prod(self.source.extras[name]))

    def _array(self, name: str, inner: int) -> np.ndarray:
        if name == "state":
            return self.source.states(inner)
        return self.source.actions(inner) if name == "action" else self.source.extra(name, inner).reshape(-1, self._width(name))

    def _steps(self, episode: int) -> _Steps:
        steps = self._recent.get(episode)
        if steps is None:
            steps = self._recent[episode] = self._converted(self._inner(episode))
            while len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        return steps

    def _converted(self, inner: int) -> _Steps:
        parts = [self._array(name, inner) for name in self._state] if self.state_dim else []
        states = np.concatenate(parts, axis=1) if len(parts) > 1 else (parts[0] if parts else None)
        actions = self._array(self._action, inner)
        if self._convert is None:
            return _Steps(states, actions, np.arange(len(actions)))
        states, actions, kept = self._convert(states, actions)
        if not self._cuts and len(actions) != self.source.lengths[inner]:
            raise ValueError(f"{self.key}: the conversion drops steps, but does not say so; set cuts=True")
        shapes = [None if states is None else states.shape, actions.shape, kept.shape]
        if shapes != [(len(kept), self.state_dim) if self.state_dim else None, (len(kept), self.action_dim), (len(kept),)]:
            raise ValueError(
                f"{self.key}: the conversion returned shapes {shapes} for {self.state_dim} state and {self.action_dim} actions"
            )
        return _Steps(states, actions, kept)

    def _measure(self) -> None:
        lengths, kept = np.empty(len(self._episodes), np.int64), []
        with progress(f"looking through {self.name}", len(lengths), "episodes") as advance:
            for number, inner in enumerate(self._episodes):
                kept.append(self._converted(int(inner)).kept.astype(np.int32))
                lengths[number] = len(kept[-1])
                advance(1)
        self._episodes, self.lengths = self._episodes[lengths > 0], lengths[lengths > 0]
        self._kept, self._starts = np.concatenate([np.empty(0, np.int32), *kept]), np.cumsum(self.lengths) - self.lengths
