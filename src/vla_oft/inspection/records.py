"""What concerns whole episodes: instructions, repetitions, success, recorded times, files that cannot be read."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.select import succeeded
from vla_oft.inspection.blocks import Block
from vla_oft.inspection.facts import Episodes, Histogram, Instruction, Lengths, Place, Sighting

LISTED = 100
"""Damaged episodes that are listed; all are counted."""

TIMES = ("timestamp", "timestamps", "time")
GAP = 1.5
"""A step that took so many times the usual one has lost something."""


class Instructions:
    """Counts of every instruction of `source`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        count = len(source.tasks)
        self._episodes, self._frames = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._first, self._last = np.full(count, -1), np.full(count, -1)

    def add(self, episode: int) -> None:
        """Add one episode. Raises ValueError where its instructions cannot be read, or are not among those announced."""
        indices = self._source.task_indices(episode)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < len(self._episodes):
            raise ValueError(f"{self._source.path}, episode {episode}: task {int(indices.max())} is not among {len(self._episodes)}")
        counts = np.bincount(indices, minlength=len(self._episodes))
        for task in np.flatnonzero(counts):
            self._episodes[task] += 1
            self._frames[task] += counts[task]
            self._first[task] = episode if self._first[task] < 0 else self._first[task]
            self._last[task] = episode

    def result(self) -> tuple[Instruction, ...]:
        """In the order of the dataset's own table."""
        columns = (values.tolist() for values in (self._episodes, self._frames, self._first, self._last))
        return tuple(
            Instruction(text=text, episodes=episodes, frames=frames, first=first if episodes else None, last=last if episodes else None)
            for text, episodes, frames, first, last in zip(self._source.tasks, *columns, strict=True)
        )


class Copies:
    """Finds episodes whose states and actions repeat an earlier one's. 16 bytes an episode."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self._count = self._of = 0
        self._first: tuple[int, int] | None = None

    def update(self, block: Block) -> None:
        """Add a block."""
        starts = np.flatnonzero(block.steps == 0)
        for start, end in zip(starts, [*starts[1:], len(block.steps)], strict=True):
            digest = hashlib.blake2b(digest_size=16)
            digest.update(block.states[start:end].tobytes())
            digest.update(block.actions[start:end].tobytes())
            episode, self._of = int(block.episodes[start]), self._of + 1
            original = self._seen.setdefault(digest.digest(), episode)
            if original != episode:
                self._count += 1
                self._first = self._first or (episode, original)

    def result(self) -> tuple[Sighting, int | None]:
        """(repetitions, the episode that the first of them repeats)."""
        if self._first is None:
            return Sighting(of=self._of), None
        return Sighting(count=self._count, of=self._of, first=Place(episode=self._first[0])), self._first[1]


class Verdicts:
    """Which episodes the recording itself calls failed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._failed = self._of = 0
        self._first: Place | None = None

    def add(self, episode: int) -> None:
        """Add one episode."""
        verdict = succeeded(self._source, episode)
        if verdict is None:
            verdict = self._source.episode_info(episode).get("success")
        if verdict is None:
            return
        self._of += 1
        if not verdict:
            self._failed += 1
            self._first = self._first or Place(episode=episode)

    def result(self) -> Sighting:
        """Failed episodes, of those with a verdict."""
        return Sighting(count=self._failed, of=self._of, first=self._first)


class Clock:
    """Gaps in the times that were recorded with the steps, in seconds; without them, or without a frame rate, there is nothing to see."""

    def __init__(self, source: Source) -> None:
        self._source = source
        sizes = {name: int(np.prod(shape)) for name, shape in source.extras.items()}
        self._name = next((name for name in sizes if name.split(".")[-1].split("/")[-1] in TIMES and sizes[name] == 1), None)
        self._gaps = self._of = 0
        self._first: Place | None = None

    def add(self, episode: int) -> None:
        """Add one episode."""
        if self._name is None or not self._source.fps:
            return
        times = np.asarray(self._source.extra(self._name, episode), np.float64).reshape(-1)
        late = np.diff(times) * self._source.fps > GAP
        self._of, self._gaps = self._of + len(late), self._gaps + int(late.sum())
        if self._first is None and late.any():
            self._first = Place(episode=episode, step=int(np.argmax(late)) + 1)

    def result(self) -> Sighting | None:
        """None without recorded times."""
        return None if self._name is None or not self._source.fps else Sighting(count=self._gaps, of=self._of, first=self._first)


def episode_facts(copies: Copies, verdicts: Verdicts, unreadable: dict[int, str], damaged: Iterable[tuple[int, str]]) -> Episodes:
    """All of it. unreadable: what failed during the inspection; damaged: what the dataset says when asked."""
    reasons = dict(sorted({**dict(damaged), **unreadable}.items()))
    duplicates, original = copies.result()
    return Episodes(
        duplicates=duplicates,
        duplicate_of=original,
        failed=verdicts.result(),
        damaged=len(reasons),
        unreadable=tuple(islice(reasons.items(), LISTED)),
    )


def length_facts(lengths: np.ndarray) -> Lengths:
    """Shortest, median and longest, and how many there are of each length."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // 32))
    bins = -(-(high - low + 1) // width)
    edges = [low + width * i for i in range(bins + 1)]
    counts = np.histogram(lengths, edges)[0] if bins > 0 else []
    histogram = Histogram(edges=tuple(float(e) for e in edges), counts=tuple(int(c) for c in counts))
    return Lengths(min=low, median=float(np.median(lengths)), max=high, histogram=histogram)


def short_episodes(lengths: Sequence[int] | np.ndarray, chunk_len: int) -> Sighting:
    """Episodes with fewer steps than one chunk."""
    short = np.flatnonzero(np.asarray(lengths) < chunk_len)
    return Sighting(count=len(short), of=len(lengths), first=Place(episode=int(short[0])) if short.size else None)
