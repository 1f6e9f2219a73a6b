"""The low-dimensional data of one dataset, step after step, as training draws it: small in memory, or in a file.

row        0   1   2   3   4 | 5   6   7        two episodes
left       5   4   3   2   1 | 3   2   1        steps from here to the end of the episode
valid      2   1   5   4   3 | 3   2   1        how many actions from here on answer what was seen: a push came in step 1

Up to `IN_MEMORY` bytes are kept in memory. Larger tables are written once, beside the dataset, and read from there: memory does not grow
with the dataset, and all workers and ranks share one copy.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_oft.data.base import DISTURBED, Source
from vla_oft.data.index_cache import cached
from vla_oft.data.rows import FileRows, RamRows, Rows, RowsFile, need_space
from vla_oft.progress import progress

IN_MEMORY = 64 * 2**20
VERSION = 1
TASK, LEFT, VALID = 0, 1, 2
"""Columns of `Table.steps`."""


@dataclass(frozen=True)
class Table:
    """Rows of all steps of a dataset, episodes one after another.

    steps: int32 (N, 3), see above; actions: float32 (N, D); states: float32 (N, S) or None; extras: name -> (N, ...).
    """

    steps: Rows
    actions: Rows
    states: Rows | None
    extras: dict[str, Rows]


def next_true(flags: np.ndarray) -> np.ndarray:
    """For each row of bool (N,), the first row from there on that is True; N where there is none."""
    rows = np.where(flags, np.arange(len(flags)), len(flags))
    return np.minimum.accumulate(rows[::-1])[::-1]


def load_table(source: Source, extras: Sequence[str] = (), *, with_states: bool = True, cache_dir: Path | None = None) -> Table:
    """The table of `source`. Raises ValueError naming the episode when a number is not finite, or when the disk is full."""
    count = int(source.lengths.sum())
    layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "steps": ((count, 3), np.dtype(np.int32)),
        "actions": ((count, source.action_dim), np.dtype(np.float32)),
    }
    if with_states and source.state_dim:
        layout["states"] = ((count, source.state_dim), np.dtype(np.float32))
    for name in extras:
        layout[f"extra-{name}"] = ((count, *source.extras[name]), source.extra(name, 0).dtype)
    num_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values())
    if num_bytes <= IN_MEMORY:
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
        for first, columns in _episodes(source, extras, "states" in layout):
            for name, values in columns.items():
                arrays[name][first : first + len(values)] = values
        return _table({name: RamRows(array) for name, array in arrays.items()}, extras)

    def build(folder: Path) -> None:
        need_space(folder, num_bytes)
        files = {name: RowsFile(folder / f"{name}.npy", shape, dtype) for name, (shape, dtype) in layout.items()}
        for first, columns in _episodes(source, extras, "states" in layout):
            for name, values in columns.items():
                files[name].write(first, values)
        for file in files.values():
            file.close()

    key = hashlib.sha256(f"{VERSION} {source.fingerprint()} {sorted(layout)}".encode()).hexdigest()[:16]
    folder = cached(f"table-{source.name}-{key}", source.path, build, cache_dir)
    return _table({name: FileRows(folder / f"{name}.npy") for name in layout}, extras)


def _table(rows: dict[str, Rows], extras: Sequence[str]) -> Table:
    return Table(rows["steps"], rows["actions"], rows.get("states"), {name: rows[f"extra-{name}"] for name in extras})


def _episodes(source: Source, extras: Sequence[str], with_states: bool) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first row, columns) of each episode."""
    first = 0
    with progress(f"reading {source.name}", len(source), "episodes") as advance:
        for episode in range(len(source)):
            columns = {"steps": _steps(source, episode), "actions": source.actions(episode)}
            if with_states:
                columns["states"] = source.states(episode)
            for name in ("actions", "states"):
                if name not in columns:
                    continue
                with np.errstate(over="ignore"):
                    columns[name] = columns[name].astype(np.float32, copy=False)
                if not np.isfinite(columns[name]).all():
                    step, dim = np.argwhere(~np.isfinite(columns[name]))[0]
                    where = f"episode {episode}, step {step}, dimension {dim}"
                    raise ValueError(f"dataset {source.path}: {name} are not finite in {where}; drop that episode")
            columns |= {f"extra-{name}": source.extra(name, episode) for name in extras}
            yield first, columns
            first += int(source.lengths[episode])
            advance(1)


def _steps(source: Source, episode: int) -> np.ndarray:
    """int32 (T, 3): see the top of this file."""
    length = int(source.lengths[episode])
    here = np.arange(length)
    steps = np.stack([source.task_indices(episode), length - here, length - here], axis=1).astype(np.int32)
    if DISTURBED in source.extras and length:
        pushed = np.asarray(source.extra(DISTURBED, episode).reshape(length, -1).any(axis=1))
        steps[:, VALID] = np.minimum(steps[:, VALID], next_true(pushed) - here + 1)
    return steps
