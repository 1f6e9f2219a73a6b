"""Episodes in HDF5 files as a `Source`; what LIBERO's and ALOHA's recordings share.

In memory lies the index alone. Arrays and frames are read from the file when they are asked for.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data import hdf5, hdf5_places, pictures
from vla_oft.data.base import ReadOptions, camera_names, check_steps
from vla_oft.data.hdf5_index import JPEG, Episode, Index, Layout, Scheme, cameras, examine, state_keys

MAX_EXTRA = 4096
"""Values per step above which an array is no extra: depth images, say. Extras are read whole."""

NO_INSTRUCTION = "no instruction; say what is done with instruction='fold the shirt', on the command line --instruction 'fold the shirt'"


class Hdf5Source:
    """A `Source` over the episodes of an index. Picklable.

    path: the dataset's folder, name: what it is called. instruction: of episodes that have none of their own.
    Raises ValueError when the episodes do not go together, or when something that was asked for is not there.
    """

    kind = "demonstrations"
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def __init__(
        self, path: Path, name: str, form: str, scheme: Scheme, index: Index, options: ReadOptions, instruction: str | None = None
    ) -> None:
        self.path, self.name, self.format, self.recording = path, name, form, dict[str, Any]()
        self._scheme, self._layouts, self._flip = scheme, index.layouts, options.colour_order == "bgr"
        self._episodes, skipped = self._matching(index.episodes, options)
        self._instructions, lacking = self._spoken(options.instruction, instruction, options.skip_bad)
        self.skipped = (*index.bad, *skipped, *lacking)
        self.lengths = np.array([episode.length for episode in self._episodes], np.int64)
        self.tasks = tuple(dict.fromkeys(self._instructions))
        self._task_numbers = {task: number for number, task in enumerate(self.tasks)}
        self.fps = self._rate(options.fps)
        self._fill(options)
        self._digest = ""

    def __len__(self) -> int:
        return len(self._episodes)

    def fingerprint(self) -> str:
        if not self._digest:
            how = [self.format, self._cameras, self._state, self._action, self._flip, self._layouts, self._instructions]
            rows = [[e.file, e.size, e.group, e.length, e.layout, e.digest, e.fps, e.info] for e in self._episodes]
            self._digest = hashlib.sha256(json.dumps([how, rows], sort_keys=True).encode()).hexdigest()[:16]
        return self._digest

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        wanted = check_steps(self, episode, indices, camera)
        key, where = self._cameras[camera], self._where(episode)
        with_one = wanted if len(wanted) else np.zeros(1, np.int64)  # an empty answer has a size, too
        rows = self._rows(episode, key, with_one)
        if self._layout(episode)[key][1] == JPEG:
            images = [pictures.decode(row, f"{where}, step {step}, camera {camera}") for row, step in zip(rows, with_one, strict=True)]
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"{where}: the images of camera {camera} differ in size; record the episode again")
            rows = np.stack(images)
        rows = rows[: len(wanted)]
        return np.ascontiguousarray(rows[..., ::-1]) if self._flip else rows

    def frame_into(self, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
        """See `base.Direct`."""
        entry, key = self._episodes[episode], self._cameras[camera]
        path, where = os.path.join(self.path, entry.file), f"{self._where(episode)}, step {step}, camera {camera}"
        array = f"{entry.group}/{key}"
        if self._layout(episode)[key][1] == JPEG:
            data = hdf5_places.read_row(path, array, step, entry.length, where)
            return data is not None and pictures.decode_into(data, out, where, bgr=self._flip)
        return not self._flip and hdf5_places.read_row_into(path, array, step, entry.length, out, where)

    def states(self, episode: int) -> np.ndarray:
        if not self._state:
            raise ValueError(f"dataset {self.path} has no state")
        parts = [self._floats(episode, key) for key in self._state]
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def actions(self, episode: int) -> np.ndarray:
        return self._floats(episode, self._action)

    def task_indices(self, episode: int) -> np.ndarray:
        return np.full(self.lengths[episode], self._task_numbers[self._instructions[episode]], np.int64)

    def extra(self, name: str, episode: int) -> np.ndarray:
        if name not in self.extras:
            raise ValueError(f"dataset {self.path} has no extra '{name}'; it has {sorted(self.extras) or 'none'}")
        return self._whole(episode, self._extras[name])

    def episode_info(self, episode: int) -> dict[str, Any]:
        entry = self._episodes[episode]
        demo = {} if entry.group == "/" else {"demo": entry.group.rpartition("/")[2]}
        return {"file": entry.file, **demo, **entry.info}

    def damaged(self) -> Iterator[tuple[int, str]]:
        for episode in range(len(self)):
            try:
                self._check(episode)
            except ValueError as error:
                yield episode, str(error)

    def _check(self, episode: int) -> None:
        entry, where = self._episodes[episode], self._where(episode)
        group = hdf5.group(hdf5.open_file(self.path / entry.file), entry.group, where)
        if examine(group, self._scheme, where) != (entry.length, self._layout(episode), entry.digest):
            raise ValueError(f"{where}: the file has changed since it was opened; open the dataset again")
        for key in {*self._state, *self._extras.values()}:
            self._whole(episode, key)
        for camera in self.cameras:
            self.frames(episode, sorted({0, entry.length // 2, entry.length - 1}), camera)

    def _where(self, episode: int) -> str:
        entry = self._episodes[episode]
        within = "" if entry.group == "/" else f" ({entry.group.rpartition('/')[2]})"
        return f"{os.path.join(self.path, entry.file)}, episode {episode}{within}"

    def _layout(self, episode: int) -> Layout:
        return self._layouts[self._episodes[episode].layout]

    def _array(self, episode: int, key: str) -> Any:
        entry, where = self._episodes[episode], self._where(episode)
        array = hdf5.open_array(self.path / entry.file, f"{entry.group}/{key}", where)
        if not array.shape or array.shape[0] != entry.length:
            raise ValueError(f"{where}: the file has changed since it was opened; open the dataset again")
        return array

    def _rows(self, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
        return hdf5.read_steps(self._array(episode, key), steps, self._where(episode))

    def _whole(self, episode: int, key: str) -> np.ndarray:
        return hdf5.read_all(self._array(episode, key), self._where(episode))

    def _floats(self, episode: int, key: str) -> np.ndarray:
        values = self._whole(episode, key)
        dtype = np.float64 if np.result_type(values.dtype, np.float32).itemsize > 4 else np.float32
        return values.reshape(len(values), -1).astype(dtype, copy=False)

    def _matching(self, episodes: list[Episode], options: ReadOptions) -> tuple[list[Episode], list[str]]:
        """The episodes of the kind that most are of, and a line for each of the others."""
        kinds = [_kind(layout, self._scheme, options) for layout in self._layouts]
        rates = Counter(e.fps for e in episodes if e.fps)
        counts = Counter(json.dumps(kinds[e.layout]) for e in episodes)
        usual = json.loads(counts.most_common(1)[0][0]) if counts else {}
        rate = rates.most_common(1)[0][0] if rates else None
        kept: list[Episode] = []
        skipped: list[str] = []
        for episode in episodes:
            kind = {**kinds[episode.layout], "frames a second": episode.fps or rate}
            unlike = next((what for what, value in {**usual, "frames a second": rate}.items() if kind[what] != value), None)
            if unlike is None:
                kept.append(episode)
                continue
            typical = next(e for e in episodes if kinds[e.layout] == usual and (e.fps or rate) == rate)
            line = self._unlike(episode, unlike, kind[unlike], typical, {**usual, "frames a second": rate}[unlike])
            if not options.skip_bad:
                raise ValueError(f"{line}; keep one kind of recording in a folder, or leave the others out with skip_bad (--skip-bad)")
            skipped.append(line)
        return kept, skipped

    def _unlike(self, episode: Episode, what: str, value: object, typical: Episode, usual: object) -> str:
        place, other = (
            str(self.path / e.file) + ("" if e.group == "/" else f", episode {e.group.rpartition('/')[2]}") for e in (episode, typical)
        )
        return f"{place}: {what}: {value or 'none'}, but {usual or 'none'} in {other}"

    def _spoken(self, forced: str | None, fallback: str | None, skip_bad: bool) -> tuple[list[str], list[str]]:
        """The instruction of every episode; those without one are dropped, or an error."""
        said = [forced or episode.instruction or fallback for episode in self._episodes]
        silent = [episode for episode, words in zip(self._episodes, said, strict=True) if not words]
        if silent and (not skip_bad or len(silent) == len(said)):
            raise ValueError(f"{self.path / silent[0].file}: {NO_INSTRUCTION}")
        self._episodes = [episode for episode, words in zip(self._episodes, said, strict=True) if words]
        return [words for words in said if words], [f"{self.path / episode.file}: {NO_INSTRUCTION}" for episode in silent]

    def _rate(self, wanted: float | None) -> float | None:
        noted = next((episode.fps for episode in self._episodes if episode.fps), None)
        if wanted is not None and noted is not None and abs(wanted - noted) > 1e-3:
            raise ValueError(f"dataset {self.path} says {noted:g} frames a second, but fps={wanted:g} was given; leave fps out")
        return noted if noted is not None else wanted

    def _fill(self, options: ReadOptions) -> None:
        """What all episodes have in common: cameras, sizes, extras."""
        used = [self._layouts[number] for number in sorted({episode.layout for episode in self._episodes})]
        first: Layout = used[0] if used else {}
        self._cameras = camera_names(cameras(first, self._scheme), options, str(self.path)) if used else {}
        self.cameras, self._action, self._state = tuple(self._cameras), self._scheme.action, state_keys(first, self._scheme)
        self.action_dim, self.state_dim = (_width(first, keys) for keys in ((self._action,), self._state))
        taken = {self._action, *self._state, *cameras(first, self._scheme).values()}
        shared = [k for k, entry in first.items() if k not in taken and all(layout.get(k) == entry for layout in used)]
        shared = [k for k in shared if first[k][1] != JPEG and int(np.prod(first[k][0])) <= MAX_EXTRA]
        names = Counter(key.rpartition("/")[2] for key in shared)
        self._extras = {(short if names[short := key.rpartition("/")[2]] == 1 else key): key for key in sorted(shared)}
        self.extras = {name: first[key][0] for name, key in self._extras.items()}


def _kind(layout: Layout, scheme: Scheme, options: ReadOptions) -> dict[str, Any]:
    """In what episodes must agree."""
    found = cameras(layout, scheme)
    chosen = {own for _, own in options.cameras} or {*found}
    seen = [f"{name}{' (JPEG)' if layout[key][1] == JPEG else ''}" for name, key in found.items() if name in chosen or key in chosen]
    dims = {"action dimensions": _width(layout, (scheme.action,)), "state dimensions": _width(layout, state_keys(layout, scheme))}
    return {"cameras": ", ".join(seen), **dims, "state": ", ".join(state_keys(layout, scheme))}


def _width(layout: Layout, keys: Sequence[str]) -> int:
    return sum(int(np.prod(layout[key][0])) for key in keys if key in layout)
