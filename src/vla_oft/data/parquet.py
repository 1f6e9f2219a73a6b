"""Rows of parquet files, wherever they lie, without reading whole files and without keeping more than a budget.

    row groups   |0 |1 |2 |3 |4 |5 |6 |7 |       lerobot writes one for each episode
    blocks       |---- 0 -----|---- 1 -----|     consecutive groups of together at most `BLOCK_ROWS` rows, read at once and kept for a while

A scan from episode to episode reads every block once; a jump reads one block. Pictures are read a row group at a time; where they are
stored uncompressed, one at a time once it is known where they lie.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_oft.data.pieces import Pieces
from vla_oft.data.recent import Recent

BLOCK_ROWS, BLOCK_BYTES = 8192, 64 * 2**20
"""A block ends where it would get larger than either, all columns counted, unless it is a single row group."""

MAX_GROUP_BYTES = 2**31
"""Most that is read of a single row group. Whoever writes larger ones makes a dataset that cannot be read at random."""

MAX_OPEN = 16
"""Files kept open per thread."""

ADVICE = "copy the dataset again"
_blocks: Recent[dict[str, np.ndarray]] = Recent(32 * 2**20)
_pictures: Recent[pa.ChunkedArray] = Recent(32 * 2**20)
_PLACES_BYTES = 500  # of an entry without the places, its key included
_places: Recent[np.ndarray | None] = Recent(64 * 2**20)
_pieces = Pieces()
_layouts: Recent["_Layout"] = Recent(64 * 2**20)


@dataclass(frozen=True)
class _Layout:
    """A file's footer: starts (G + 1,) of its row groups, blocks (B + 1,) as row group numbers; version: of the file's contents."""

    path: Path
    version: tuple[int, int]
    metadata: pq.FileMetaData
    names: frozenset[str]
    starts: np.ndarray
    blocks: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])


def num_rows(path: Path) -> int:
    """Rows of a file, from its footer."""
    return _layout(path).num_rows


def read_table(path: Path, keep: Any = lambda name: True) -> pa.Table:
    """A whole small file, of it the columns whose name `keep` accepts."""
    layout = _layout(path)
    with _named(path):
        file = pq.ParquetFile(path, metadata=layout.metadata)
        return file.read(columns=[name for name in file.schema_arrow.names if keep(name)], use_threads=False)


def read_rows(path: Path, columns: tuple[str, ...], first: int, count: int) -> dict[str, np.ndarray]:
    """Numeric columns of `count` rows from `first` on, each (count, size): lists and scalars alike. Not to be written to.

    Raises ValueError naming the file when it is missing or damaged, or has too few rows, no such column, or rows of different sizes.
    """
    layout = _layout(path)
    if not 0 <= first <= first + count <= layout.num_rows:
        raise ValueError(f"{path}: {layout.num_rows} rows, {first}..{first + count - 1} are needed; {ADVICE}")
    parts: list[dict[str, np.ndarray]] = []
    row = first
    while row < first + count:
        block = int(np.searchsorted(layout.starts[layout.blocks], row, side="right")) - 1
        low, high = (int(layout.starts[layout.blocks[b]]) for b in (block, block + 1))
        values = _blocks.get((path, layout.version, block, columns), lambda block=block: _read_block(layout, block, columns))
        parts.append({name: array[row - low : min(high, first + count) - low] for name, array in values.items()})
        row = high
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in columns}


def read_pictures(path: Path, column: str, rows: Sequence[int] | np.ndarray) -> list[tuple[bytes | None, str | None]]:
    """Stored pictures of some rows: (encoded bytes or None, path or None) each. Raises ValueError as `read_rows` does."""
    layout = _layout(path)
    found = []
    for row in map(int, rows):
        if not 0 <= row < layout.num_rows:
            raise ValueError(f"{path}: {layout.num_rows} rows, row {row} is needed; {ADVICE}")
        group = int(layout.starts.searchsorted(row, side="right")) - 1
        key, inside = (path, layout.version, group, column), row - int(layout.starts[group])
        places = _places.get(key, lambda key=key: _find_places(layout, key))
        if places is not None:
            offset, size = places[inside].tolist()
            found.append((_pieces.read(path, offset, size, path, layout.version), None))
            continue
        value = _stored(layout, key)[inside].as_py()
        found.append((None, None) if value is None else (value, None) if isinstance(value, bytes) else (value["bytes"], value.get("path")))
    return found


def _stored(layout: _Layout, key: tuple[Any, ...]) -> pa.ChunkedArray:
    """The pictures of the row group and column that `key` names."""
    return _pictures.get(key, lambda: _read_pictures(layout, key[2], key[3]))


def _find_places(layout: _Layout, key: tuple[Any, ...]) -> tuple[np.ndarray | None, int]:
    """Where in the file the pictures of a row group lie as they are, int64 (rows, 2) of offset and size; None unless all of them do."""
    group, column = layout.metadata.row_group(key[2]), key[3]
    leaves = [group.column(index) for index in range(group.num_columns)]
    leaf = next((leaf for leaf in leaves if leaf.path_in_schema in (column, f"{column}.bytes")), None)
    if leaf is None or leaf.compression != "UNCOMPRESSED" or leaf.total_compressed_size > MAX_GROUP_BYTES:
        return None, _PLACES_BYTES
    values = [value.as_py() for value in _stored(layout, key)]
    encoded = [value if isinstance(value, bytes) else value and value["bytes"] for value in values]
    start = min(offset for offset in (leaf.data_page_offset, leaf.dictionary_page_offset) if offset is not None)
    chunk = _pieces.read(layout.path, start, leaf.total_compressed_size, layout.path, layout.version)
    places, at = np.empty((len(encoded), 2), np.int64), 0
    for row, data in enumerate(encoded):
        at = chunk.find(data, at) if data else -1
        if at < 0:
            return None, _PLACES_BYTES
        places[row] = start + at, len(data)
        at += len(data)
    return places, _PLACES_BYTES + places.nbytes


def _layout(path: Path) -> _Layout:
    with _named(path):
        stat = os.stat(path)
    version = (stat.st_mtime_ns, stat.st_size)
    return _layouts.get((path, version), lambda: _read_layout(path, version))


def _read_layout(path: Path, version: tuple[int, int]) -> tuple[_Layout, int]:
    with _named(path):
        file = pq.ParquetFile(path)
        metadata, names = file.metadata, frozenset(file.schema_arrow.names)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        starts, ends = (np.cumsum([0, *sizes]) for sizes in ([g.num_rows for g in groups], [g.total_byte_size for g in groups]))
    blocks = [0]
    while blocks[-1] < len(groups):
        last = min(int(np.searchsorted(e, e[blocks[-1]] + most, "right")) - 1 for e, most in ((starts, BLOCK_ROWS), (ends, BLOCK_BYTES)))
        blocks.append(max(blocks[-1] + 1, last))
    # parsed, a footer takes several times its size in the file
    return _Layout(path, version, metadata, names, starts, np.array(blocks)), 8 * metadata.serialized_size


def _read_groups(layout: _Layout, groups: range, columns: tuple[str, ...]) -> pa.Table:
    missing = [name for name in columns if name not in layout.names]
    if missing:
        raise ValueError(f"{layout.path}: no column '{missing[0]}', only {sorted(layout.names)}; re-export the dataset")
    only = layout.metadata.row_group(groups[0]) if len(groups) == 1 else None
    size = _group_bytes(only, columns) if only is not None and only.total_byte_size > MAX_GROUP_BYTES else 0
    if size > MAX_GROUP_BYTES:
        raise ValueError(f"{layout.path}: a row group of {size / 2**30:.1f} GiB is too large to read; re-export with smaller ones")
    with _named(layout.path):
        return _readers.of(layout).read_row_groups(list(groups), columns=list(columns), use_threads=False)


class _Readers(threading.local):
    """Open files of one thread: opening one, and asking for its data in advance, would cost more than reading a few pictures."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Path, tuple[int, int]], pq.ParquetFile] = OrderedDict()
        self._process = os.getpid()

    def of(self, layout: _Layout) -> pq.ParquetFile:
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        key = layout.path, layout.version
        if key not in self._files:
            self._files[key] = pq.ParquetFile(layout.path, metadata=layout.metadata, pre_buffer=False)
            while len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        return self._files[key]


_readers = _Readers()


def _group_bytes(group: Any, columns: tuple[str, ...]) -> int:
    chunks = [group.column(index) for index in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{name}.") for name in columns))


def _read_block(layout: _Layout, block: int, columns: tuple[str, ...]) -> tuple[dict[str, np.ndarray], int]:
    table = _read_groups(layout, range(int(layout.blocks[block]), int(layout.blocks[block + 1])), columns)
    arrays = {name: _to_numpy(table.column(name), layout.path, name) for name in columns}
    return arrays, sum(array.nbytes for array in arrays.values())


def _read_pictures(layout: _Layout, group: int, column: str) -> tuple[pa.ChunkedArray, int]:
    stored = _read_groups(layout, range(group, group + 1), (column,)).column(column)
    kind = stored.type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) and not pa.types.is_binary(kind):
        raise ValueError(f"{layout.path}: '{column}' holds {kind}, not pictures (structs of bytes and path); re-export the dataset")
    return stored, stored.nbytes


def _to_numpy(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    """(N, size). A copy of its own, so that nothing else of the file stays in memory."""
    rows, array = len(column), column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        if array.null_count or (len(array) and not _regular(array)):
            raise ValueError(f"{path}: '{name}' has missing values or rows of different sizes; re-export the dataset")
        array = array.flatten()
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise ValueError(f"{path}: '{name}' holds {column.type} with {array.null_count} missing values, not numbers; re-export the dataset")
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(rows, -1 if rows else 1)


def _regular(array: Any) -> bool:
    """Whether all lists of an array are of one size."""
    if pa.types.is_fixed_size_list(array.type):
        return True
    steps = np.diff(array.offsets.to_numpy())
    return bool((steps == steps[0]).all())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong while reading becomes a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; {ADVICE}") from None
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod -R u+rX)") from None
    except (pa.ArrowException, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable parquet file ({reason}); {ADVICE}") from None
