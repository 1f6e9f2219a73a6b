"""Histograms of values whose range is only known at the end, in one pass.

Bins lie on the grid of a power of two, [i 2^k, (i + 1) 2^k). When a value falls outside, bins are merged in pairs and k grows by one, so
every count stays exact:

    k = 0    | 3 | 1 | 4 |                   a value comes at 9: six bins are allowed, ten would be needed
    k = 1    |   4   |   4   | 0 | 0 | 1 |   bins 0..4 of width 2
"""

import math

import numpy as np

from vla_oft.inspection.facts import Histogram

BINS = 1024
SHOWN = 48
"""Bins that are kept, and those that are shown at most; between half as many and all."""


class GridHistogram:
    """Counts of one dimension's values."""

    def __init__(self) -> None:
        self._exponent: int | None = None
        self._first = 0
        self._counts = np.zeros(0, np.int64)

    def update(self, values: np.ndarray) -> None:
        """Add finite values (N,)."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if self._exponent is None:
            self._exponent = _finest(low, high)
            self._first = math.floor(math.ldexp(low, -self._exponent))
        low, high = math.ldexp(low, -self._exponent), math.ldexp(high, -self._exponent)
        first, last = min(self._first, math.floor(low)), max(self._first + len(self._counts) - 1, math.floor(high))
        while last - first >= BINS:
            self._coarsen()
            first, last = first >> 1, last >> 1
        counts = np.zeros(last - first + 1, np.int64)
        counts[self._first - first : self._first - first + len(self._counts)] = self._counts
        index = np.floor(np.ldexp(values, -self._exponent)).astype(np.int64) - first
        self._counts, self._first = counts + np.bincount(index, minlength=len(counts)), first

    def result(self) -> Histogram | None:
        """At most `SHOWN` bins; None without values."""
        if self._exponent is None:
            return None
        while len(self._counts) > SHOWN:
            self._coarsen()
        edges = [math.ldexp(self._first + i, self._exponent) for i in range(len(self._counts) + 1)]
        return Histogram(edges=tuple(edges), counts=tuple(self._counts.tolist()))

    def _coarsen(self) -> None:
        assert self._exponent is not None
        counts = self._counts if self._first % 2 == 0 else np.concatenate([[0], self._counts])
        counts = counts if len(counts) % 2 == 0 else np.concatenate([counts, [0]])
        self._counts = counts.reshape(-1, 2).sum(axis=1)
        self._first, self._exponent = self._first >> 1, self._exponent + 1


def _finest(low: float, high: float) -> int:
    """Exponent of the bins to begin with. Not finer than a millionth of the values, where float32 ends."""
    size = max(abs(low), abs(high), 1e-30)
    spread = (high - low) / BINS
    return max(math.frexp(size)[1] - 21, math.frexp(spread)[1] if spread else -120)


OCTAVES, PER_OCTAVE = 40, 4
"""Sizes from 2^-40 to 2^40, four bins from one to its double."""


class SizeHistogram:
    """Counts of the sizes of values in `dim` dimensions on a logarithmic scale: enough for quantiles to 19 %, and exact above any edge."""

    def __init__(self, dim: int) -> None:
        self.counts = np.zeros((dim, 2 * OCTAVES * PER_OCTAVE), np.int64)

    def update(self, values: np.ndarray) -> None:
        """Add finite values (N, dim); the first bin takes zeros."""
        dim, bins = self.counts.shape
        with np.errstate(divide="ignore"):
            index = np.clip(np.floor(PER_OCTAVE * np.log2(np.abs(values))) + OCTAVES * PER_OCTAVE, 0, bins - 1).astype(np.int64)
        self.counts += np.bincount((index + bins * np.arange(dim)).ravel(), minlength=dim * bins).reshape(dim, bins)

    def quantile(self, dimension: int, share: float) -> float:
        """Upper edge of the bin that the quantile lies in; 0 for zeros."""
        counts = self.counts[dimension]
        index = int(np.searchsorted(np.cumsum(counts), share * counts.sum(), side="left"))
        return _edge(index + 1) if index else 0.0

    def above(self, dimension: int, size: float) -> tuple[int, float]:
        """(values in bins that begin at `size` or above it, where the first of these begins)."""
        bins = self.counts.shape[1]
        index = min(bins - 1, max(1, math.ceil(PER_OCTAVE * math.log2(size) - 1e-9) + OCTAVES * PER_OCTAVE)) if size > 0 else 1
        return int(self.counts[dimension, index:].sum()), _edge(index)


def _edge(index: int) -> float:
    return 2.0 ** ((index - OCTAVES * PER_OCTAVE) / PER_OCTAVE)
