"""Indices of datasets whose format has none: built once, shared by all processes that open the same files.

    .cache/rlds-libero_spatial-0f3c.../          one folder for each state of the files (names, sizes, times of change)
    .cache/.rlds-libero_spatial-0f3c....lock     whoever holds it builds; the others wait

A folder appears whole or not at all, and is never changed: what is open stays valid. Old folders can be deleted at any time.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vla_oft.atomic import atomic_directory

_PATIENCE_S = 2.0


def cached_index(
    kind: str, dataset: Path, files: Sequence[Path], build: Callable[[Path], None], *, cache_dir: Path | None = None, settings: Any = None
) -> Path:
    """The folder that holds what `build(folder)` wrote for exactly these files; built now if it is not there yet.

    kind: the format, and the version of what `build` writes. dataset: its folder; the index lies in `.cache` beside it, or in the user's
    cache (`~/.cache/vla-oft`) where that may not be written. cache_dir: lies there instead. files: all that the index depends on, and that
    exist. settings: anything JSON can hold that changes what `build` writes.
    Raises ValueError when there is no place to write, and whatever `build` raises.
    """
    return cached(f"{kind}-{dataset.resolve().name}-{_key(dataset, files, settings)}", dataset, build, cache_dir)


def cached(name: str, dataset: Path, build: Callable[[Path], None], cache_dir: Path | None = None) -> Path:
    """The folder `name` that holds what `build(folder)` wrote; built now if it is not there yet. Places and errors as above."""
    places = [cache_dir] if cache_dir else [dataset.resolve().parent / ".cache", user_cache()]
    for place in places:
        if os.path.isdir(place / name):
            return place / name
    place = next((place for place in places if _is_writable(place)), None)
    if place is None:
        tried = " and ".join(str(place) for place in places)
        raise ValueError(f"dataset {dataset} needs a cache, but {tried} cannot be written; name a folder with cache_dir")
    with _locked(place / f".{name}.lock", dataset):
        if not os.path.isdir(place / name):
            _build(place / name, build)
    return place / name


def user_cache() -> Path:
    """The folder for what can be made again, of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-oft"


def _key(dataset: Path, files: Sequence[Path], settings: Any) -> str:
    stats = [(file.name, file.stat()) for file in files]
    state = [str(dataset.resolve()), settings, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _is_writable(place: Path) -> bool:
    """Makes the folder. One that nobody may write was locked on purpose, even if root could."""
    existing = next(folder for folder in (place, *place.parents) if os.path.isdir(folder))
    if not (existing.stat().st_mode & 0o222 and os.access(existing, os.W_OK | os.X_OK)):
        return False
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only file system
        return False
    return True


def _build(path: Path, build: Callable[[Path], None]) -> None:
    try:
        with atomic_directory(path) as folder:
            build(folder)
    except OSError as error:
        if not os.path.isdir(path):  # else: no locks on this file system, and another process was faster
            raise ValueError(f"cache {path} cannot be written ({error}); free some space, or name another folder with cache_dir") from None


@contextmanager
def _locked(path: Path, dataset: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            print(f"another process prepares {dataset}; waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    except NotImplementedError:  # a file system without locks: several may build, and the first to finish wins
        pass
    try:
        yield
    finally:
        lock.release()
