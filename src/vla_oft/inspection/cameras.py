"""What the cameras saw, judged by a sample: sizes, brightness, and pictures that do not change although the arm moves.

episode     |----------------------------------------|
spread      x         x         x         x          x     frozen: two of these alike, and the arm moved in between
burst                            xxxxxx                     repeated: alike with the one before, while others change
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from vla_oft.data.base import Source
from vla_oft.inspection.blocks import read_episode
from vla_oft.inspection.facts import Camera, Dimension, Place, Sighting

BURST, BURSTS = 6, 16
"""Consecutive frames that are compared, and in how many episodes at most."""

DARK, FLAT = 6.0, 2.0
"""Mean level below which a frame is black; standard deviation below which it has one colour. Levels are 0 to 255."""

MOVED = 0.1
"""Share of a dimension's range that the arm must cover between two pictures that are expected to differ."""

CHANGED_LEVELS, CHANGED_PIXELS, CHANGED_MEAN = 12, 1e-4, 1.0
"""Two pictures are alike when fewer pixels than this share differ by more levels than this, and all by less on average: as noise does."""

COMPARED_PIXELS = 65536

STRETCH = 8
"""Steps between two pictures from which on they should differ."""


class Motion:
    """How far the arm moves, in shares of each dimension's range: by the state, or without one by the actions."""

    def __init__(self, source: Source, state: Sequence[Dimension], action: Sequence[Dimension], dims: Sequence[int]) -> None:
        self._source, self._by_state = source, bool(state)
        spans = np.array([d.span for d in (state or action)])
        self._dims = [d for d in (dims if state else range(len(action))) if spans[d] > 1e-9]
        self._spans = spans[self._dims]

    def path(self, episode: int) -> np.ndarray:
        """(T, D) positions in shares of the range; NaN where they are not finite. Raises ValueError for an episode that cannot be read."""
        states, actions = read_episode(self._source, episode)
        return (states if self._by_state else actions)[:, self._dims] / self._spans

    @staticmethod
    def between(path: np.ndarray, first: int, last: int) -> float:
        """The largest range that a dimension covers from one step to another."""
        part = path[first : last + 1]
        return float(np.nan_to_num(part.max(axis=0) - part.min(axis=0)).max(initial=0))


def sample_cameras(
    source: Source, motion: Motion, episodes: Sequence[int], each: int, advance: Callable[[int], None], unreadable: dict[int, str]
) -> tuple[tuple[Camera, ...], tuple[tuple[str, str], ...]]:
    """(cameras, pairs of cameras that show the same), from `each` frames and a burst of some episodes; failures go to `unreadable`."""
    tallies = {camera: _Tally(camera) for camera in source.cameras}
    alike = {(a, b): True for i, a in enumerate(source.cameras) for b in source.cameras[i + 1 :]}
    bursts = set(list(episodes)[:: max(1, -(-len(episodes) // BURSTS))])
    for episode in episodes:
        try:
            path = motion.path(episode)
            spread = np.unique(np.linspace(0, len(path) - 1, each).round().astype(int))
            burst = _burst(path) if episode in bursts else np.empty(0, int)
            seen = {}
            for camera, tally in tallies.items():
                frames = source.frames(episode, np.concatenate([spread, burst]), camera)
                tally.sizes[frames.shape[1], frames.shape[2]] += len(spread)
                frames = _thinned(frames)
                tally.add(episode, spread, frames[: len(spread)], path)
                tally.add_burst(episode, burst, frames[len(spread) :], path)
                seen[camera] = frames[: len(spread)]
        except ValueError as error:
            unreadable[episode] = str(error)
            continue
        finally:
            advance(1)
        for a, b in alike:
            alike[a, b] = alike[a, b] and seen[a].shape == seen[b].shape and all(map(_alike, seen[a], seen[b]))
    enough = any(tally.frames for tally in tallies.values())
    return tuple(t.result() for t in tallies.values()), tuple(pair for pair, same in alike.items() if same and enough)


def spread_episodes(lengths: np.ndarray, count: int) -> list[int]:
    """At most `count` episodes that have steps, evenly spread over the dataset."""
    some = np.flatnonzero(lengths > 0)
    return [int(e) for e in some[np.unique(np.linspace(0, len(some) - 1, min(count, len(some))).round().astype(int))]] if some.size else []


@dataclass
class _Tally:
    name: str
    frames: int = 0
    level: float = 0.0
    frozen_steps: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    seen: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, Place] = field(default_factory=dict)

    def note(self, what: str, found: bool, episode: int, step: int) -> None:
        count = self.seen.setdefault(what, [0, 0])
        count[0], count[1] = count[0] + found, count[1] + 1
        if found:
            self.first.setdefault(what, Place(episode=episode, step=step, camera=self.name))

    def add(self, episode: int, steps: np.ndarray, frames: np.ndarray, path: np.ndarray) -> None:
        for step, frame in zip(steps.tolist(), frames, strict=True):
            self.frames += 1
            self.level += float(frame.mean())
            dark = bool(frame.mean() < DARK)
            self.note("black", dark, episode, step)
            self.note("uniform", not dark and bool(frame.std(axis=(0, 1)).max() < FLAT), episode, step)
        for i, j in enumerate(np.searchsorted(steps, steps + STRETCH).tolist()):  # the next one, in short episodes a later one
            first, last = int(steps[i]), int(steps[min(j, len(steps) - 1)])
            if last - first >= STRETCH and Motion.between(path, first, last) >= MOVED:
                frozen = _alike(frames[i], frames[j])
                self.note("frozen", frozen, episode, first)
                self.frozen_steps = max(self.frozen_steps, (last - first) * frozen)

    def add_burst(self, episode: int, steps: np.ndarray, frames: np.ndarray, path: np.ndarray) -> None:
        if len(steps) < BURST:
            return
        change = np.array([_difference(a, b).mean() for a, b in pairwise(frames)])
        moved = np.abs(np.diff(path[steps], axis=0)).max(axis=1, initial=0)
        if change.max() < CHANGED_MEAN / 2 or not moved.sum() >= MOVED / 4:
            return
        for i in np.flatnonzero(moved >= moved.mean() / 2):
            self.note("repeated", bool(change[i] <= 0.05 * change.max()), episode, int(steps[i + 1]))

    def result(self) -> Camera:
        sightings = {
            name: Sighting(count=count, of=of, first=self.first.get(name)) for name, (count, of) in self.seen.items() if name != "frames"
        }
        brightness = self.level / self.frames if self.frames else None
        return Camera(
            name=self.name, frames=self.frames, sizes=dict(self.sizes), brightness=brightness, frozen_steps=self.frozen_steps, **sightings
        )


def _burst(path: np.ndarray) -> np.ndarray:
    """`BURST` steps around which the arm moves fastest; none in an episode that is shorter."""
    if len(path) < BURST:
        return np.empty(0, int)
    speed = np.nan_to_num(np.abs(np.diff(path, axis=0))).max(axis=1, initial=0)
    total = np.convolve(speed, np.ones(BURST - 1), mode="valid")
    return int(total.argmax()) + np.arange(BURST)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    difference = _difference(a, b)
    return bool(difference.mean() < CHANGED_MEAN and (difference.max(axis=-1) > CHANGED_LEVELS).mean() < CHANGED_PIXELS)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute difference of two pictures of one size."""
    return np.abs(a.astype(np.int16) - b.astype(np.int16))


def _thinned(frames: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) with every n-th row and column only, where pictures are large: the judgement does not need more."""
    stride = max(1, round((frames.shape[1] * frames.shape[2] / COMPARED_PIXELS) ** 0.5))
    return np.ascontiguousarray(frames[:, ::stride, ::stride])
