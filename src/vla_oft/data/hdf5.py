"""HDF5 files: opened with errors that say what to do, kept open a while, read step by step.

An array has one row per step. In a chunked file, rows come in blocks that are decompressed whole; neighbouring steps, and steps of one
block, are therefore read as one slice:

    blocks of 4 rows    |0 1 2 3|4 5 6 7|8 9 ..
    wanted                   2 3   5   7 8
    slices                  [2 3] [5 . 7 8]

Every process keeps its own few files open: handles are dropped after a fork and never pickled. h5py lets one thread in at a time.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

try:
    import h5py
except ImportError:
    raise ImportError("reading HDF5 needs h5py: pip install 'vla-oft[data]'") from None

MAX_OPEN = 32
"""Files kept open per process."""

MAX_ARRAYS = 1024
"""Arrays kept at hand of each of them."""

MAX_BYTES = 1 << 30
"""Of one small array of an episode, of one row, of one compressed block: a header that claims more is damage, or an attack on memory."""

SUFFIXES = (".hdf5", ".h5")

_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError)  # all that h5py raises for it
_Open = tuple[tuple[int, ...], h5py.File, dict[str, h5py.Dataset]]
_files: "OrderedDict[str, _Open]" = OrderedDict()  # path -> (state when it was opened, file, arrays of it that were used)
_lock = threading.Lock()


def listing(folder: Path) -> list[Path]:
    """The HDF5 files of a folder, not of those below it, in numeric order: episode_10 comes after episode_9."""
    if not folder.is_dir():
        return []
    found = (entry for entry in os.scandir(folder) if entry.name.endswith(SUFFIXES) and not entry.name.startswith("."))
    return [folder / entry.name for entry in sorted(found, key=lambda entry: numeric(entry.name)) if entry.is_file()]


def numeric(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def contents(paths: Sequence[Path]) -> frozenset[str] | None:
    """Names at the top of the first readable one of some files; None when there is none among the first few."""
    for path in paths[:8]:
        try:
            with h5py.File(path, "r", locking="best-effort") as file:
                return frozenset(file)
        except _DAMAGE:
            continue
    return None


def open_file(path: str | Path) -> h5py.File:
    """The file, open for reading; keep the result for as long as anything of it is used. Raises ValueError saying what is wrong."""
    return _entry(path)[1]


def open_array(path: str | Path, key: str, where: str) -> h5py.Dataset:
    """The array `key` of a file. Finding it costs more than reading a picture, so it stays at hand as long as the file does.

    Raises ValueError naming `where` when there is none.
    """
    _, file, arrays = _entry(path)
    found = arrays.get(key)
    if found is None:
        if len(arrays) >= MAX_ARRAYS:
            arrays.clear()
        found = arrays[key] = dataset(file, key, where)
    return found


@contextmanager
def closing(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading, for one look at it: it does not push out files that are in use. Raises ValueError as `open_file`."""
    file = _open(path)
    try:
        yield file
    finally:
        file.close()


def group(node: h5py.Group, key: str, where: str) -> h5py.Group:
    """The group `key` below `node`. Raises ValueError naming `where` when there is none."""
    with damage_named(where):
        found = node.get(key)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{where}: group '{key}' is missing; record or copy the file again")
    return found


def dataset(node: h5py.Group, key: str, where: str) -> h5py.Dataset:
    """The array `key` below `node`. Raises ValueError naming `where` when there is none."""
    with damage_named(where):
        found = node.get(key)
        if isinstance(found, h5py.Dataset):
            _ = found.shape, found.dtype  # types that numpy does not know are found out here
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where}: '{key}' is missing; record or copy the file again")
    return found


def read_all(array: h5py.Dataset, where: str) -> np.ndarray:
    """A whole small array. Raises ValueError naming `where` when it is damaged, or larger than `MAX_BYTES`."""
    check_size(array, int(np.prod(array.shape, dtype=object)), where)
    with damage_named(f"{where}, '{array.name}'"):
        return np.asarray(array[()])


def read_steps(array: h5py.Dataset, steps: np.ndarray, where: str) -> np.ndarray:
    """Rows `steps` (int64, any order, repeats allowed) of an array, (N, ...). Raises ValueError naming `where` when it is damaged."""
    check_size(array, int(np.prod(array.shape[1:], dtype=object)), where)
    out: np.ndarray | None = None
    with damage_named(f"{where}, '{array.name}'"):
        sliced = _slices(steps, array.chunks[0] if array.chunks else 1)
        for first, last, slots in sliced:
            rows = np.asarray(array[first : last + 1])
            if len(sliced) == 1 and len(rows) == len(steps) and np.array_equal(steps, np.arange(first, last + 1)):
                return rows
            if out is None:
                out = np.empty((len(steps), *array.shape[1:]), array.dtype)
            out[slots] = rows[steps[slots] - first]
    return out if out is not None else np.empty((0, *array.shape[1:]), array.dtype)


def state_of(path: str | Path) -> tuple[int, ...]:
    """Changes when the file does; empty where there is none."""
    try:
        stat = os.stat(path)
    except OSError:  # opening it says what is wrong
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def check_size(array: h5py.Dataset, values: int, where: str) -> None:
    """Raise ValueError when so many values of an array, or one of its blocks, exceed `MAX_BYTES`."""
    block = int(np.prod(array.chunks, dtype=object)) if array.chunks else 0
    size = max(values, block) * array.dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"{where}, '{array.name}': {size} bytes at once, at most {MAX_BYTES} are read; store it in smaller parts")


def attribute(node: Any, name: str, where: str) -> Any:
    """One value: str for text, otherwise as h5py gives it; None when absent. Raises ValueError naming `where` for anything else.

    Text whose length is damaged can cost up to 4 GiB for a moment: the library trusts it, and h5py does not show it before.
    """
    with damage_named(f"{where}, attribute '{name}'"):
        if name not in node.attrs:
            return None
        several = node.attrs.get_id(name).shape not in ((), (1,))
        value = None if several else node.attrs[name]
    if several:
        raise ValueError(f"{where}: attribute '{name}' holds several values, not one; record or copy the file again")
    value = value.item() if isinstance(value, np.ndarray | np.generic) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Turn whatever h5py raises for damaged contents into a ValueError that names `where`. Put nothing but h5py's calls inside."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{where}: damaged ({_reason(error)}); copy or record the file again") from None


def _entry(path: str | Path) -> _Open:
    key, state = str(path), state_of(path)
    with _lock:
        if key in _files and _files[key][0] != state:
            del _files[key]  # recorded again since
        if key not in _files:
            _files[key] = state, _open(path), {}
            while len(_files) > MAX_OPEN:
                _files.popitem(last=False)  # not closed: another thread may still read; it closes when nobody holds it
        _files.move_to_end(key)
        return _files[key]


def _open(path: str | Path) -> h5py.File:
    try:
        # no cache of blocks: one for each array that is kept at hand would add up, and steps of one block are read together anyway
        return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=0)
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; copy the dataset again") from None
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod u+r)") from None
    except BlockingIOError:
        raise ValueError(f"{path}: another program is writing to it; wait until the recording is finished") from None
    except _DAMAGE as error:
        reason = _reason(error)
        what = "truncated" if "truncated" in reason else "not a readable HDF5 file"
        raise ValueError(f"{path}: {what} ({reason}); copy or record the file again") from None


def _reason(error: BaseException) -> str:
    """What h5py says in brackets, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    inner = re.search(r"\((.*)\)", text)
    return (inner.group(1) if inner else text.strip("'\""))[:200]


def _slices(steps: np.ndarray, block: int) -> list[tuple[int, int, np.ndarray]]:
    """(first row, last row, which of `steps` lie in between) of each slice to read."""
    if not len(steps):
        return []
    order = np.argsort(steps, kind="stable")
    rows = steps[order]
    apart = (np.diff(rows) > 1) & (np.diff(rows // block) > 0)
    parts = np.split(order, np.flatnonzero(apart) + 1)
    return [(int(steps[part[0]]), int(steps[part[-1]]), part) for part in parts]


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may have been held by a thread that does not exist here
    _files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)  # after h5py's own, which waits for the library to be idle
