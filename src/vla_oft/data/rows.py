"""Tables of equal rows, in memory or in a file: what training draws at random from.

A file is read with `pread`, not mapped: resident memory stays flat however much of it has been read, and the operating system still keeps
what is used in its cache, once for all processes. Rows that follow each other are read together.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """N rows of one shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        """N."""
        ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number: int64 of any shape (...) -> (..., *shape), a copy."""
        ...


class RamRows:
    """Rows of an array (N, ...)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape[1:], array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `Rows.read`."""
        return self.array[rows]


class FileRows:
    """Rows of an `.npy` file (N, ...). Travels between processes as its path; threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            whole, fortran, self.dtype = read(file)
            self._offset = file.tell()
        if fortran or self.dtype.hasobject or not whole:
            raise ValueError(f"{path}: not a table of rows (shape {whole}, {self.dtype}); delete it, it is made anew")
        self._count, self.shape = whole[0], whole[1:]
        self._size = self.dtype.itemsize * int(np.prod(self.shape))
        if path.stat().st_size != self._offset + self._count * self._size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, its header says {self._count} rows; delete it, it is made anew")
        self._file: Any = None

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `Rows.read`."""
        wanted = np.asarray(rows, np.int64)
        flat = wanted.reshape(-1)
        single = int(flat[0]) if len(flat) == 1 else None  # by far the most frequent request: half the time without numpy's reductions
        low, high = (single, single) if single is not None else (flat.min(), flat.max()) if flat.size else (0, 0)
        if flat.size and not 0 <= low <= high < self._count:
            raise IndexError(f"{self.path} has rows 0..{self._count - 1}, asked for {low}..{high}")
        out = np.empty((len(flat), *self.shape), self.dtype)
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)
        if single is not None and out.size:
            self._read(out.data.cast("B"), self._offset + single * self._size)
        elif out.size:
            view = out.reshape(-1).view(np.uint8).data
            breaks = np.flatnonzero(np.diff(flat) != 1) + 1
            for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(flat)], strict=True):
                self._read(view[first * self._size : last * self._size], self._offset + int(flat[first]) * self._size)
        return out.reshape(*wanted.shape, *self.shape)

    def row(self, row: int) -> np.ndarray:
        """One row, not to be written to: what `read` gives, at a fifth of the cost for small rows."""
        if not 0 <= row < self._count:
            raise IndexError(f"{self.path} has rows 0..{self._count - 1}, asked for {row}")
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)
        data = os.pread(self._file.fileno(), self._size, self._offset + row * self._size)
        return np.frombuffer(data, self.dtype).reshape(self.shape) if len(data) == self._size else self.read(np.array(row))

    def _read(self, into: memoryview, offset: int) -> None:
        while len(into):
            count = os.preadv(self._file.fileno(), [into], offset)
            if not count:
                raise ValueError(f"{self.path}: the file became shorter while it was read; delete it, it is made anew")
            into, offset = into[count:], offset + count


class RowsFile:
    """A new `.npy` file of known size, written in any order by any number of threads."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        dtype = np.dtype(dtype)
        need_space(path.parent, int(np.prod(shape)) * dtype.itemsize)
        self.dtype, self._size = dtype, dtype.itemsize * int(np.prod(shape[1:]))
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by `close`)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._offset = self._file.tell()
        os.truncate(self._file.fileno(), self._offset + shape[0] * self._size)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows (N, ...) from number `first` on."""
        view = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        offset = self._offset + first * self._size
        while len(view):
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Make sure that everything is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def need_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError when `num_bytes` do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if num_bytes > 0.98 * free:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB are needed; free some space, choose another cache_dir, "
            "or decode frames when they are needed (frame_cache='none')"
        )
