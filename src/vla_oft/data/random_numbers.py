"""Random numbers as a pure function of where they are used: no generator whose position would depend on who drew before.

So a sample is augmented the same way on one GPU or eight, in batches of any size, by any number of workers, before and after a resume.
"""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MANTISSA_BITS = 24


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 in which every bit depends on every bit: the finaliser of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seeds_of(seed: int, positions: np.ndarray) -> np.ndarray:
    """A seed for each position of a run's order: uint64, same shape."""
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return mix(start + positions.astype(np.uint64) * _GOLDEN)


class Draws:
    """Uniform numbers for images, each image with a stream of its own.

    seeds: uint64 (B,), of samples; per_sample: images of each, one after the other.
    """

    def __init__(self, seeds: np.ndarray, per_sample: int = 1) -> None:
        image = np.arange(per_sample, dtype=np.uint64)
        self._streams = mix(seeds.astype(np.uint64)[:, None] ^ mix(image + np.uint64(1))[None]).reshape(-1)
        self._drawn = 0

    def uniform(self, count: int) -> Tensor:
        """float32 (images, count) in [0, 1), on the CPU: the next numbers of every image."""
        ahead = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64)
        self._drawn += count
        bits = mix(self._streams[:, None] + ahead[None] * _GOLDEN) >> np.uint64(64 - _MANTISSA_BITS)
        return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-_MANTISSA_BITS))
