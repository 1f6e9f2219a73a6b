"""What the episodes in a folder of HDF5 files hold: found once, from headers and actions, and kept in an index.

A `Scheme` says where a format keeps things within an episode's group:

    /data/demo_3          actions (T, 7), dones (T,)            top: one row per step
    /data/demo_3/obs      ee_states (T, 6), agentview_rgb ...   groups: everything in them has one row per step
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_oft.data import hdf5, pictures
from vla_oft.data.index_cache import cached_index
from vla_oft.progress import progress

VERSION = 1
"""Of the index file. Raise it when an index means something else than before."""

FEW_FILES, FEW_BYTES = 50, 1 << 28
"""Smaller folders are looked through anew each time: faster than a person notices, and nothing is written."""

JPEG = "jpeg"
"""Stands for the dtype of images that are stored compressed, as rows of padded bytes."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Where a format keeps what belongs to an episode; keys are relative to the episode's group.

    action: key of the actions. required: keys of what else there must be.
    states: alternatives, each the keys of arrays that are joined into the state.
    images: group of the cameras. jpeg: whether rows of bytes in it are compressed images.
    groups: groups of arrays with one row per step. top: such arrays in the episode's own group; others there may mean anything.
    """

    action: str
    required: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    images: str
    jpeg: bool
    groups: tuple[str, ...]
    top: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a file says about all of its episodes. groups: theirs. info: what `Source.episode_info` repeats."""

    groups: tuple[str, ...]
    instruction: str | None = None
    fps: float | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    """file: relative to the dataset's folder. layout: number of its layout. digest: of its actions."""

    file: str
    group: str
    length: int
    layout: int
    digest: str
    size: int
    instruction: str | None
    fps: float | None
    info: dict[str, Any]


Layout = dict[str, tuple[tuple[int, ...], str]]
"""Key of an array -> (shape of one step, dtype or JPEG)."""


@dataclass(frozen=True)
class Index:
    """Everything that was found. bad: one line for everything that could not be read."""

    layouts: list[Layout]
    episodes: list[Episode]
    bad: tuple[str, ...]


Look = Callable[[h5py.File, Path], Facts]


def index_of(root: Path, paths: Sequence[Path], scheme: Scheme, look: Look, *, kind: str, skip_bad: bool, cache_dir: Path | None) -> Index:
    """What these files hold; remembered where there are many. Raises ValueError for the first bad one unless `skip_bad`."""
    if len(paths) <= FEW_FILES and sum(path.stat().st_size for path in paths) <= FEW_BYTES:
        return _build(root, paths, scheme, look, skip_bad)

    def build(folder: Path) -> None:
        (folder / "index.json").write_text(_dump(_build(root, paths, scheme, look, skip_bad)))

    locked = [path.name for path in paths if not os.access(path, os.R_OK)] if skip_bad else []  # giving access does not change a file
    settings = [skip_bad, locked, [str(path.relative_to(root)) for path in paths[:1]]]
    folder = cached_index(f"{kind}-{VERSION}", root, paths, build, cache_dir=cache_dir, settings=settings)
    return _load((folder / "index.json").read_text())


def examine(group: h5py.Group, scheme: Scheme, where: str) -> tuple[int, Layout, str]:
    """(steps, layout, digest of the actions) of one episode. Raises ValueError naming `where` and what is wrong."""
    actions = hdf5.dataset(group, scheme.action, where)
    if len(actions.shape or ()) != 2 or actions.dtype.kind not in "fiu" or not actions.shape[1]:
        raise ValueError(f"{where}: '{scheme.action}' is {actions.dtype} {actions.shape}, not numbers (steps, dimensions)")
    length = int(actions.shape[0])
    if not length:
        raise ValueError(f"{where}: the episode is empty (0 steps); record it again, or remove it")
    layout: Layout = {}
    for key, array in _arrays(group, scheme, where):
        if not array.shape or (key not in scheme.top and key.count("/") == 0 and array.shape[0] != length):
            continue
        if array.shape[0] != length:
            raise ValueError(f"{where}: '{key}' has {array.shape[0]} steps, but '{scheme.action}' has {length}; record it again")
        if array.dtype.kind not in "fiu" and any(key in keys for keys in scheme.states):
            raise ValueError(f"{where}: '{key}' is {array.dtype}, not numbers")
        if array.dtype.kind in "fiub":
            layout[key] = _entry(key, array, scheme, where)
    _check_roles(layout, scheme, where)
    digest = hashlib.blake2b(np.ascontiguousarray(hdf5.read_all(actions, where)).tobytes(), digest_size=8).hexdigest()
    return length, layout, digest


def cameras(layout: Layout, scheme: Scheme) -> dict[str, str]:
    """Camera -> key of its images, in alphabetical order."""
    within = scheme.images + "/"
    found = (key for key, (shape, dtype) in layout.items() if key.startswith(within) and (dtype == JPEG or _is_image(shape, dtype)))
    return {key[len(within) :]: key for key in sorted(found)}


def state_keys(layout: Layout, scheme: Scheme) -> tuple[str, ...]:
    """The arrays that make up the state; empty where there is none."""
    return next((keys for keys in scheme.states if any(key in layout for key in keys)), ())


@dataclass
class _Scan:
    """An index in the making."""

    root: Path
    scheme: Scheme
    look: Look
    skip_bad: bool
    layouts: dict[str, int] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add_file(self, path: Path) -> None:
        with self.skipping(), hdf5.closing(path) as file:
            facts = self.look(file, path)
            for group in facts.groups:
                with self.skipping():
                    self.add_episode(file, path, facts, group)

    def add_episode(self, file: h5py.File, path: Path, facts: Facts, group: str) -> None:
        where = str(path) if group == "/" else f"{path}, episode {group.rpartition('/')[2]}"
        length, layout, digest = examine(hdf5.group(file, group, where), self.scheme, where)
        number = self.layouts.setdefault(json.dumps(layout, sort_keys=True), len(self.layouts))
        name, size = str(path.relative_to(self.root)), path.stat().st_size
        self.episodes.append(Episode(name, group, length, number, digest, size, facts.instruction, facts.fps, facts.info))

    @contextmanager
    def skipping(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if not self.skip_bad:
                raise
            self.bad.append(str(error))


def _build(root: Path, paths: Sequence[Path], scheme: Scheme, look: Look, skip_bad: bool) -> Index:
    scan = _Scan(root, scheme, look, skip_bad)
    shown = progress(f"index of {root.name}", len(paths), "files") if len(paths) > FEW_FILES else nullcontext(_silent)
    with shown as advance:
        for path in paths:
            scan.add_file(path)
            advance(1)
    return Index([_layout(json.loads(text)) for text in scan.layouts], scan.episodes, tuple(scan.bad))


def _silent(amount: int, remark: str = "") -> None:
    """Progress of what is over at once."""


def _arrays(group: h5py.Group, scheme: Scheme, where: str) -> list[tuple[str, h5py.Dataset]]:
    found: list[tuple[str, h5py.Dataset]] = []
    for prefix in ("", *scheme.groups):
        node = hdf5.group(group, prefix, where) if prefix else group
        with hdf5.damage_named(where):
            children = list(node.items())
            _ = [(child.shape, child.dtype) for _, child in children if isinstance(child, h5py.Dataset)]  # numpy may not know the type
        if not all(isinstance(name, str) for name, _ in children):
            raise ValueError(f"{where}: damaged (the names of arrays are not text); copy or record the file again")
        found += [(f"{prefix}/{name}" if prefix else name, child) for name, child in children if isinstance(child, h5py.Dataset)]
    return found


def _entry(key: str, array: h5py.Dataset, scheme: Scheme, where: str) -> tuple[tuple[int, ...], str]:
    shape, dtype = tuple(int(n) for n in array.shape[1:]), str(array.dtype)
    if key.startswith(scheme.images + "/") and scheme.jpeg and dtype == "uint8":
        if len(shape) == 1:
            return (), JPEG
        if not _is_image(shape, dtype):
            raise ValueError(f"{where}: '{key}' is uint8 {array.shape}: images are (steps, height, width, 3), or compressed (steps, bytes)")
    if _is_image(shape, dtype):
        if not 0 < shape[0] * shape[1] <= pictures.MAX_PIXELS:
            raise ValueError(f"{where}: '{key}' claims images of {shape[1]} x {shape[0]} pixels, at most {pictures.MAX_PIXELS} are read")
        hdf5.check_size(array, int(np.prod(shape)), f"{where}, '{key}'")
    return shape, dtype


def _check_roles(layout: Layout, scheme: Scheme, where: str) -> None:
    if not cameras(layout, scheme):
        raise ValueError(f"{where}: no images, uint8 (steps, height, width, 3), in '{scheme.images}'; record it with cameras")
    missing = [key for key in scheme.required if key not in layout]
    if missing:
        raise ValueError(f"{where}: '{missing[0]}' is missing; record or copy the file again")
    keys = state_keys(layout, scheme)
    for key in keys:
        if key not in layout:
            raise ValueError(f"{where}: '{key}' is missing; with {', '.join(k for k in keys if k in layout)} it makes up the state")
        if len(layout[key][0]) > 1:
            raise ValueError(f"{where}: a step of '{key}' has shape {layout[key][0]}, not (dimensions,)")


def _is_image(shape: Sequence[int], dtype: str) -> bool:
    return dtype == "uint8" and len(shape) == 3 and shape[2] == 3


def _layout(data: dict[str, Any]) -> Layout:
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in data.items()}


def _dump(index: Index) -> str:
    return json.dumps({"layouts": index.layouts, "episodes": [astuple(e) for e in index.episodes], "bad": index.bad})


def _load(text: str) -> Index:
    data = json.loads(text)
    return Index([_layout(layout) for layout in data["layouts"]], [Episode(*row) for row in data["episodes"]], tuple(data["bad"]))
