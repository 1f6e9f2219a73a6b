"""Pieces of files, read where they are known to lie: what random access comes down to once an index knows the places.

Files stay open, a few at a time; `pread` needs no position, so threads may share them. Other processes open their own.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

MAX_OPEN = 64
"""Files kept open by each `Pieces`."""


class Pieces:
    """Reads pieces of many files. Picklable, and of use after a fork."""

    def __init__(self) -> None:
        self._open: dict[Hashable, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}

    def read(self, path: str | Path, offset: int, size: int, where: str | Path, version: Hashable = None) -> bytes:
        """`size` bytes of a file. version: of its contents; another one is opened anew.

        Raises ValueError naming `where` when the file does not have them; nothing is allocated for what is not there.
        """
        try:
            file = self._file(path, version)
            if not 0 <= offset <= offset + size <= os.fstat(file).st_size:
                raise ValueError(f"{where}: the file is shorter than when it was indexed; copy it again")
            data = os.pread(file, size, offset)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read ({error.strerror or error}); copy the file again, or mend its permissions") from None
        if len(data) != size:
            raise ValueError(f"{where}: only {len(data)} of {size} bytes can be read; copy the file again")
        return data

    def read_into(self, path: str | Path, offset: int, out: np.ndarray, where: str | Path, version: Hashable = None) -> None:
        """Fill `out`, uint8 and contiguous, from `offset` on. Raises ValueError as `read` does."""
        try:
            count = os.preadv(self._file(path, version), [out.reshape(-1).data], offset)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read ({error.strerror or error}); copy the file again, or mend its permissions") from None
        if count != out.nbytes:
            raise ValueError(f"{where}: only {count} of {out.nbytes} bytes can be read; copy the file again")

    def _file(self, path: str | Path, version: Hashable) -> int:
        file = self._open.get((path, version))
        if file is None:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed when nobody reads it any more)
            if len(self._open) >= MAX_OPEN:
                self._open = {}  # a lock here could be held at the moment of a fork
            self._open[path, version] = file
        return file.fileno()
