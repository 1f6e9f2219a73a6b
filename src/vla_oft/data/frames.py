"""The pictures of a dataset's steps, as training draws them: from a cache, or decoded when asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.cache import prepared
from vla_oft.data.damage import Damaged
from vla_oft.data.decoding import Prepare, decode_rows
from vla_oft.data.rows import Rows
from vla_oft.data.workers import Allocate

Caching = Literal["none", "ram", "disk"]


class Frames:
    """Rows of V prepared images, one row for each step of `source`, episodes one after another.

    damaged: the frames that are known not to be decodable; without a cache nobody knows before they are read.
    """

    def __init__(
        self, source: Source, cameras: Sequence[str], prepare: Prepare, cache: Caching, cache_dir: Path | None, *, skip_bad: bool
    ) -> None:
        self._source, self._cameras, self._prepare, self._skip_bad = source, cameras, prepare, skip_bad
        self._ends = np.cumsum(source.lengths)
        self._firsts = self._ends - source.lengths
        self._cached: Rows | None = None
        self.damaged: tuple[Damaged, ...] = ()
        if cache != "none":
            self._cached, self.damaged = prepared(source, cameras, prepare, cache, cache_dir, skip_bad=skip_bad)
        self._known: dict[int, list[Damaged]] = {}
        for frame in self.damaged:
            self._known.setdefault(frame.row, []).append(frame)

    def read(self, rows: np.ndarray, allocate: Allocate = np.empty) -> tuple[np.ndarray, dict[int, list[Damaged]]]:
        """Rows int64 (N,) -> uint8 (N, V, size, size, 3), and which of the N rows have frames that cannot be decoded.

        allocate: where images are decoded to. Raises ValueError for a damaged frame unless they are to be skipped.
        """
        if self._cached is not None:
            known = self._known
            return self._cached.read(rows), {n: known[row] for n, row in enumerate(rows.tolist()) if row in known} if known else {}
        out = allocate((len(rows), len(self._cameras), self._prepare.size, self._prepare.size, 3), np.uint8)
        damaged: dict[int, list[Damaged]] = {}
        episodes = np.searchsorted(self._ends, rows, side="right")
        steps = rows - self._firsts[episodes]
        order = np.lexsort((steps, episodes))  # frames that lie together are decoded together, each into its place
        for group in np.split(order, np.flatnonzero(np.diff(episodes[order])) + 1):
            images, episode = [out[n] for n in group], int(episodes[group[0]])
            bad = decode_rows(self._source, episode, steps[group], self._cameras, self._prepare, images, skip_bad=self._skip_bad)
            for number, camera, reason in bad:
                n = int(group[number])
                damaged.setdefault(n, []).append(Damaged(row=int(rows[n]), camera=camera, reason=reason))
        return out, damaged
