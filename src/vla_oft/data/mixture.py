"""Which sample comes when: an endless, weighted, shuffled order over several datasets, as a pure function of (seed, position).

Because draw number n is always the same sample, training resumes at any position, the number of workers changes nothing, and
ranks share one global order: with W ranks, rank r takes draws r, r + W, r + 2W, ...
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 4096
"""Draws whose datasets are chosen together."""

MAX_DATASETS = 64
"""So that rounding never takes more from the largest dataset's share of a block than it has."""

ROUNDS = 6
"""Rounds of a shuffle; four are enough for a Feistel network whose round function is random (Luby and Rackoff 1988)."""

VERSION = 2
"""Of the order: a run that began with another one cannot be continued exactly."""


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
        if len(self.sizes) > MAX_DATASETS:
            raise ValueError(f"{len(self.sizes)} datasets, at most {MAX_DATASETS} can be mixed: join some of them")
        self._offsets = np.cumsum([0, *self.sizes[:-1]])
        self._latest: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def describe(self) -> dict[str, Any]:
        """What the order depends on; two orders with the same description are the same."""
        return {"order": VERSION, "seed": self.seed, "sizes": self.sizes, "weights": self.weights}

    def draw(self, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Sample numbers of draws start, start + stride, ...: int64 (count,)."""
        positions = start + stride * np.arange(count)
        out = np.empty(count, np.int64)
        for block in range(positions[0] // BLOCK, positions[-1] // BLOCK + 1):
            inside = positions // BLOCK == block
            out[inside] = self._block(block, positions[inside] - block * BLOCK)
        return out

    def _block(self, block: int, slots: np.ndarray) -> np.ndarray:
        """Sample numbers of the draws `slots` of a block."""
        if self._latest[0] != block:
            self._latest = (block, *self._plan(block))
        _, choices, numbers = self._latest
        out = np.empty(len(slots), np.int64)
        for dataset in np.unique(choices[slots]):
            here = choices[slots] == dataset
            out[here] = self._offsets[dataset] + self._shuffled(int(dataset), numbers[slots[here]])
        return out

    def _plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw of a block, which dataset it comes from, and the how many-th draw of that dataset it is: int64 (BLOCK,) each."""
        before, after = self._counts(block), self._counts(block + 1)
        choices = np.repeat(np.arange(len(self.sizes)), after - before)
        choices = np.random.default_rng([self.seed, 0, block]).permutation(choices)
        numbers = np.empty(BLOCK, np.int64)
        for dataset in range(len(self.sizes)):
            slots = np.flatnonzero(choices == dataset)
            numbers[slots] = before[dataset] + np.arange(len(slots))
        return choices, numbers

    def _counts(self, block: int) -> np.ndarray:
        """Draws of each dataset before a block: its share, rounded down; the largest one gets what is left. So any position is at hand."""
        counts = np.floor(block * BLOCK * np.asarray(self.weights)).astype(np.int64)
        largest = int(np.argmax(self.weights))
        counts[largest] += block * BLOCK - counts.sum()
        return counts

    def _shuffled(self, dataset: int, numbers: np.ndarray) -> np.ndarray:
        """Which sample the dataset's n-th draws are."""
        size = self.sizes[dataset]
        out = np.empty(len(numbers), np.int64)
        for epoch in np.unique(numbers // size):
            inside = numbers // size == epoch
            out[inside] = shuffle(numbers[inside] % size, size, [self.seed, 1, dataset, int(epoch)])
        return out


def shuffle(numbers: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where `numbers` (int64, in 0..size - 1) go in a shuffle of 0..size - 1: int64, a bijection, without a table of all of them.

    A Feistel network permutes the smallest square that holds `size`; what lands outside goes through again until it is inside.

        (left, right)  ->  (right, left XOR hash(right))        invertible whatever the hash
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(key).integers(0, 2**63, ROUNDS, np.uint64)
    low = np.uint64(2**bits - 1)
    out = numbers.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(bits), out[outside] & low
        for round_key in keys:
            left, right = right, left ^ (_hash(right ^ round_key) & low)
        out[outside] = (left << np.uint64(bits)) | right
        outside[outside] = out[outside] >= size
    return out.astype(np.int64)


def _hash(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 in which every bit depends on every bit: the finaliser of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
