"""Which sample comes when: an endless, weighted, shuffled order over several datasets, as a pure function of (seed, position).

Because draw number n is always the same sample, training resumes at any position, the number of workers changes nothing, and
ranks share one global order: with W ranks, rank r takes draws r, r + W, r + 2W, ...
"""

from collections.abc import Sequence

import numpy as np

BLOCK = 4096
"""Draws whose datasets are chosen together."""


class MixtureOrder:
    """Every dataset is shuffled anew in each of its own epochs; no sample repeats before all others of its dataset were drawn.

    sizes: samples of each dataset; weights: relative shares of draws, by default the sizes.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None) -> None:
        self.sizes, self.seed = [int(size) for size in sizes], seed
        chosen = np.asarray(self.sizes if weights is None else weights, np.float64)
        if len(chosen) != len(self.sizes) or not len(chosen):
            raise ValueError(f"{len(chosen)} weights for {len(self.sizes)} datasets: give one for each")
        if not np.isfinite(chosen).all() or (chosen < 0).any() or not chosen.sum():
            raise ValueError(f"weights must be non-negative and not all zero, got {chosen.tolist()}")
        empty = [i for i, (size, weight) in enumerate(zip(self.sizes, chosen, strict=True)) if weight and size <= 0]
        if empty:
            raise ValueError(f"datasets {empty} have a weight but no samples")
        self.weights = (chosen / chosen.sum()).tolist()
        self._offsets = np.cumsum([0, *self.sizes[:-1]])
        self._counts = [np.zeros(len(self.sizes), np.int64)]  # draws of each dataset before block b
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}  # dataset -> (epoch, its order)

    def draw(self, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Sample numbers of draws start, start + stride, ...: int64 (count,)."""
        positions = start + stride * np.arange(count)
        out = np.empty(count, np.int64)
        for block in range(positions[0] // BLOCK, positions[-1] // BLOCK + 1):
            inside = positions // BLOCK == block
            out[inside] = self._block(block)[positions[inside] - block * BLOCK]
        return out

    def _choices(self, block: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0, block])
        return rng.choice(len(self.sizes), BLOCK, p=self.weights) if len(self.sizes) > 1 else np.zeros(BLOCK, np.int64)

    def _block(self, block: int) -> np.ndarray:
        while len(self._counts) <= block:
            self._counts.append(self._counts[-1] + np.bincount(self._choices(len(self._counts) - 1), minlength=len(self.sizes)))
        choices, out = self._choices(block), np.empty(BLOCK, np.int64)
        for dataset in np.unique(choices):
            slots = np.flatnonzero(choices == dataset)
            numbers = self._counts[block][dataset] + np.arange(len(slots))
            out[slots] = self._offsets[dataset] + self._shuffled(int(dataset), numbers)
        return out

    def _shuffled(self, dataset: int, numbers: np.ndarray) -> np.ndarray:
        """Which sample the dataset's n-th draws are."""
        size = self.sizes[dataset]
        out = np.empty(len(numbers), np.int64)
        for epoch in range(numbers[0] // size, numbers[-1] // size + 1):
            if self._shuffles.get(dataset, (-1,))[0] != epoch:
                self._shuffles[dataset] = (epoch, np.random.default_rng([self.seed, 1, dataset, epoch]).permutation(size))
            inside = numbers // size == epoch
            out[inside] = self._shuffles[dataset][1][numbers[inside] % size]
        return out
