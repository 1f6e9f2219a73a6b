"""Which sample comes when: an endless, weighted, shuffled order over several datasets, as a pure function of (seed, position).

Because draw number n is always the same sample, training resumes at any position, the number of workers changes nothing, and
ranks share one global order: with W ranks, rank r takes draws r, r + W, r + 2W, ...

Where a random frame costs several decoded ones (video with keyframes further apart than one frame), draws can come in runs of neighbours: n
samples that follow each other, then n others from somewhere else. Ranks take whole runs.

    n = 1     17  3 42  8 25 30  1 11 ...
    n = 4      8  9 10 11 40 41 42 43 ...          in each epoch of a dataset the runs begin elsewhere

That has a price: neighbours look alike and share most of their actions, so a batch tells hardly more than one of B / n samples.
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

MOST_NEIGHBOURS = 64
"""A block must hold many runs, or shares would be exact over long stretches only."""

VERSION = 2
"""Of the order: a run that began with another one cannot be continued exactly."""


class MixtureOrder:
    """Every dataset is shuffled anew in each of its own epochs; no sample repeats before all others of its dataset were drawn.

    sizes: samples of each dataset; weights: relative shares of draws, by default the sizes.
    neighbours: draws that follow each other are so many neighbouring samples (a power of two); 1: none are.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None, neighbours: int = 1) -> None:
        self.sizes, self.seed, self.neighbours = [int(size) for size in sizes], seed, neighbours
        if not 1 <= neighbours <= MOST_NEIGHBOURS or neighbours & (neighbours - 1):
            raise ValueError(f"neighbours={neighbours} must be 1, 2, 4, 8, ... or {MOST_NEIGHBOURS}")
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
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def describe(self) -> dict[str, Any]:
        """What the order depends on; two orders with the same description are the same."""
        order = VERSION if self.neighbours == 1 else f"{VERSION} with {self.neighbours} neighbours"
        return {"order": order, "seed": self.seed, "sizes": self.sizes, "weights": self.weights}

    def draw(self, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Sample numbers of draws start, start + stride, ...: int64 (count,)."""
        return self.at(start + stride * np.arange(count))

    def positions(self, start: int, count: int, rank: int, world_size: int) -> np.ndarray:
        """Of the `count` x `world_size` draws from `start` on, those of one rank: int64 (count,), ascending.

        Raises ValueError where batches of `count` would cut runs of neighbours.
        """
        if count % self.neighbours:
            raise ValueError(f"batches of {count} samples would cut runs of neighbours={self.neighbours}: use a multiple of it")
        runs, inside = np.divmod(np.arange(count), self.neighbours)
        return start + (runs * world_size + rank) * self.neighbours + inside

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers of draws, by their positions in ascending order: int64, same shape (N,)."""
        out = np.empty(len(positions), np.int64)
        for block in range(positions[0] // BLOCK, positions[-1] // BLOCK + 1):
            inside = positions // BLOCK == block
            out[inside] = self._block(block, positions[inside] - block * BLOCK)
        return out

    def _block(self, block: int, slots: np.ndarray) -> np.ndarray:
        """Sample numbers of the draws `slots` of a block. All of it is worked out at once: it costs as much as a few batches alone."""
        if self._latest[0] != block:
            choices, numbers = self._plan(block)
            samples = np.empty(BLOCK, np.int64)
            for dataset in np.unique(choices):
                here = choices == dataset
                samples[here] = self._offsets[dataset] + self._shuffled(int(dataset), numbers[here])
            self._latest = block, samples
        return self._latest[1][slots]

    def _plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw of a block, which dataset it comes from, and the how many-th draw of that dataset it is: int64 (BLOCK,) each."""
        before, after = self._counts(block), self._counts(block + 1)
        choices = np.repeat(np.arange(len(self.sizes)), (after - before) // self.neighbours)
        choices = np.repeat(np.random.default_rng([self.seed, 0, block]).permutation(choices), self.neighbours)
        numbers = np.empty(BLOCK, np.int64)
        for dataset in range(len(self.sizes)):
            slots = np.flatnonzero(choices == dataset)
            numbers[slots] = before[dataset] + np.arange(len(slots))
        return choices, numbers

    def _counts(self, block: int) -> np.ndarray:
        """Draws of each dataset before a block: its share, rounded down; the largest one gets what is left. So any position is at hand."""
        counts = np.floor(block * BLOCK * np.asarray(self.weights) / self.neighbours).astype(np.int64) * self.neighbours
        largest = int(np.argmax(self.weights))
        counts[largest] += block * BLOCK - counts.sum()
        return counts

    def _shuffled(self, dataset: int, numbers: np.ndarray) -> np.ndarray:
        """Which sample the dataset's n-th draws are: in each epoch whole runs in random order, then the few samples that make no run."""
        size, count = self.sizes[dataset], self.sizes[dataset] // self.neighbours
        epochs, epoch_of = np.unique(numbers // size, return_inverse=True)
        seeds = [[self.seed, 1, dataset, int(epoch)] for epoch in epochs]
        keys, numbers = np.stack([_round_keys(seed) for seed in seeds])[epoch_of], numbers % size
        if self.neighbours == 1 or not count:
            return _permuted(numbers, size, keys)
        runs, inside = np.divmod(numbers, self.neighbours)
        whole, out = runs < count, numbers.copy()
        out[whole] = _permuted(runs[whole], count, keys[whole]) * self.neighbours + inside[whole]
        begins = np.array([np.random.default_rng([*seed, 1]).integers(size) for seed in seeds])
        return (out + begins[epoch_of]) % size


def shuffle(numbers: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where `numbers` (int64 (N,), in 0..size - 1) go in a shuffle of 0..size - 1: int64, a bijection, without a table of all of them.

    A Feistel network permutes the smallest square that holds `size`; what lands outside goes through again until it is inside.

        (left, right)  ->  (right, left XOR hash(right))        invertible whatever the hash
    """
    return _permuted(numbers, size, np.broadcast_to(_round_keys(key), (len(numbers), ROUNDS)))


def _round_keys(key: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 2**63, ROUNDS, np.uint64)


def _permuted(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """See `shuffle`. keys: uint64 (N, ROUNDS), of the shuffle that each number is in."""
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64(2**bits - 1)
    out = numbers.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> np.uint64(bits), out[outside] & low
        for round_key in keys[outside].T:
            left, right = right, left ^ (_hash(right ^ round_key) & low)
        out[outside] = (left << np.uint64(bits)) | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _hash(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 in which every bit depends on every bit: the finaliser of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
