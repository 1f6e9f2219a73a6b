"""Where the rows of an HDF5 array lie in the file, so that one is read with a `pread` instead of by way of the library.

    in one piece      row i begins at `offset` + i * size of a row
    in blocks         a list of offsets, one for each block of rows: |0 1 2|3 4 5| ...

Only arrays that are stored as they are have places: no compression, blocks as wide as the array, every block written. Places of many files
are remembered within a budget, so a random picture of ten thousand episodes opens no HDF5 file once each was looked at.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from vla_oft.data import hdf5
from vla_oft.data.pieces import Pieces
from vla_oft.data.recent import Recent

BUDGET = 64 * 2**20
"""Bytes of places remembered: 8 a block, so for some million compressed pictures."""

_OVERHEAD = 400  # of an entry, its key included


@dataclass(frozen=True)
class Places:
    """Of one array: offsets int64 (blocks,) of its blocks of `rows_per_block` rows, each row of `shape`, bytes, `size` of them."""

    offsets: np.ndarray
    rows_per_block: int
    shape: tuple[int, ...]
    size: int
    num_rows: int

    def offset(self, row: int) -> int:
        """Where a row begins in the file."""
        block, inside = divmod(row, self.rows_per_block)
        return int(self.offsets[block]) + inside * self.size


_places: Recent[Places | None] = Recent(BUDGET)
_pieces = Pieces()


def read_row(path: str | Path, key: str, row: int, num_rows: int, where: str) -> bytes | None:
    """The bytes of one row of the uint8 array `key`; None where they lie nowhere as they are, or the array has not `num_rows` rows."""
    version = hdf5.state_of(path)
    places = _find(path, key, version, where)
    if places is None or places.num_rows != num_rows:
        return None
    return _pieces.read(path, places.offset(row), places.size, where, version)


def read_row_into(path: str | Path, key: str, row: int, num_rows: int, out: np.ndarray, where: str) -> bool:
    """Read one row of the uint8 array `key` into `out`, contiguous; False for other shapes and where `read_row` is None."""
    version = hdf5.state_of(path)
    places = _find(path, key, version, where)
    if places is None or places.num_rows != num_rows or places.shape != out.shape:
        return False
    _pieces.read_into(path, places.offset(row), out, where, version)
    return True


def _find(path: str | Path, key: str, version: tuple[int, ...], where: str) -> Places | None:
    def make() -> tuple[Places | None, int]:
        array = hdf5.open_array(path, key, where)
        with hdf5.damage_named(where):
            found = _places_of(array)
        return found, _OVERHEAD + (found.offsets.nbytes if found else 0)

    return _places.get((path, version, key), make)


def _places_of(array: h5py.Dataset) -> Places | None:
    plain = array.id.get_create_plist()
    if array.dtype != np.uint8 or len(array.shape) < 2 or not array.size or plain.get_nfilters() or plain.get_external_count():
        return None
    shape, size = tuple(array.shape[1:]), int(np.prod(array.shape[1:]))
    if array.file.userblock_size:  # releases of the library disagree on whether offsets count it
        return None
    if plain.get_layout() == h5py.h5d.CONTIGUOUS:
        offset = array.id.get_offset()
        return None if offset is None else Places(np.array([offset]), len(array), shape, size, len(array))
    if plain.get_layout() != h5py.h5d.CHUNKED or array.chunks is None or array.chunks[1:] != shape:
        return None
    rows = array.chunks[0]
    offsets = np.full(-(-len(array) // rows), -1, np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if not chunk.filter_mask and chunk.size == rows * size:
            offsets[chunk.chunk_offset[0] // rows] = chunk.byte_offset

    array.id.chunk_iter(note)
    return None if (offsets < 0).any() else Places(offsets, rows, shape, size, len(array))
