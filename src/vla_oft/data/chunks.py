"""Time steps of demonstrations as training samples: what the robot saw, and the next K actions.

episode     a0 a1 a2 a3 a4          K = 3
step 1      [a1 a2 a3]              valid 1 1 1
step 3            [a3 a4 a4]        valid 1 1 0      past the end: repeat the last action, mask it out
step 4               [a4 a4 a4]     valid 1 0 0
`parity=True` drops steps 3 and 4 as the reference does: it never trains on the end of an episode.

Where a source notes that the robot was pushed (`disturbed`: something else was executed than recorded), the chunk is valid up to that step:
what follows answers a push that could not be seen.

disturbed    0  0  1  0  0
step 0      [a0 a1 a2]              valid 1 1 1
step 1         [a1 a2 a3]           valid 1 1 0

With `skip_bad`, another sample of the same dataset takes the place of one of which a frame cannot be decoded: a whole sample, drawn twice.
Which one depends on the damaged sample alone, so batches are the same whatever decodes them. A blank one in its place would need every head
and auxiliary loss to leave it out, and batches of nothing but blanks would have no loss at all.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.damage import Damaged
from vla_oft.data.decoding import Prepare
from vla_oft.data.frames import Caching, Frames
from vla_oft.data.table import LEFT, TASK, VALID, load_table
from vla_oft.data.workers import Allocate
from vla_oft.statistics import Normalizer
from vla_oft_client import RobotSpec

TRIES = 64
"""Samples that are tried in place of a damaged one, before the dataset counts as unreadable."""

_SUBSTITUTES = (7, 1)
"""Begins the seeds of which samples these are."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch in numpy, B samples.

    images: uint8 (B, V, size, size, 3), cameras in the robot's order. state: float32 (B, S) normalised, or None.
    actions: float32 (B, K, D) normalised; valid: bool (B, K). instructions: B strings. grounding: uint8 (B, V, 2, P, P) or None.
    landmarks: float32 (B, 2, 3) or None: where the named object and its destination are, metres; NaN where there is none.
    indices: int64 (B,) of the samples in their dataset; others than were asked for where these are damaged. seeds: uint64
    (B,), for augmentation; the same draw always has the same seed. damaged: frames that were met and left out.
    """

    images: np.ndarray
    state: np.ndarray | None
    actions: np.ndarray
    valid: np.ndarray
    instructions: tuple[str, ...]
    grounding: np.ndarray | None
    landmarks: np.ndarray | None
    indices: np.ndarray
    seeds: np.ndarray
    damaged: tuple[Damaged, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


class ChunkDataset:
    """All time steps of one or more sources, concatenated. Map-style: `dataset[i]` is one sample, `batch(indices)` many at once.

    prepare: from a recorded frame to the policy's image. action_normalizer, state_normalizer: the policy's own; without the latter,
    samples have no state. chunk_len: K, by default the robot's. cache: "ram" or "disk" decodes and prepares everything once, now; "none"
    decodes what is asked for. cache_dir: for what lies on the disk, one folder for all sources or one for each; by default `.cache` beside
    each dataset. grounding, landmarks: also return the sources' extras of those names. parity: drop windows past the end of an episode.
    skip_bad: of all sources or of each: frames that cannot be decoded are left out and listed, see above, instead of raising ValueError.
    Memory does not grow with the number of frames, except in "ram".

    damaged: frames that caches have found to be damaged; without a cache nobody knows before they are drawn.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        spec: RobotSpec,
        *,
        prepare: Prepare,
        action_normalizer: Normalizer,
        state_normalizer: Normalizer | None = None,
        chunk_len: int | None = None,
        cache: Caching = "none",
        cache_dir: str | Path | Sequence[Path | None] | None = None,
        grounding: str | None = None,
        landmarks: str | None = None,
        parity: bool = False,
        skip_bad: bool | Sequence[bool] = False,
    ) -> None:
        if not sources:
            raise ValueError("no datasets: give at least one")
        if cache_dir is None or isinstance(cache_dir, str | Path):
            cache_dir = [None if cache_dir is None else Path(cache_dir)] * len(sources)
        _check_sizes(sources, spec, action_normalizer, state_normalizer)
        self.sources, self.spec, self.prepare, self.grounding = tuple(sources), spec, prepare, grounding
        self.chunk_len = spec.chunk_len if chunk_len is None else chunk_len
        self._parts = [
            _Part(source, action_normalizer, state_normalizer, self.chunk_len, grounding, landmarks, parity, place)
            for source, place in zip(sources, cache_dir, strict=True)
        ]
        self._ends = np.cumsum([part.num_samples for part in self._parts])
        if not self._ends[-1]:
            raise ValueError(f"no episode has chunk_len={self.chunk_len} steps: use a shorter chunk, or parity=False")
        skip = [skip_bad] * len(sources) if isinstance(skip_bad, bool) else list(skip_bad)
        self._frames = [
            Frames(source, spec.cameras, prepare, cache, place, skip_bad=bad)
            for source, place, bad in zip(sources, cache_dir, skip, strict=True)
        ]
        self.damaged = tuple(dataclasses.replace(d, source=n) for n, frames in enumerate(self._frames) for d in frames.damaged)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def sizes(self) -> list[int]:
        """Samples of each source, in order: what a mixture is drawn from."""
        return np.diff(self._ends, prepend=0).tolist()

    def count(self, indices: np.ndarray) -> tuple[int, ...]:
        """How many of these samples come from each source."""
        return tuple(np.bincount(np.searchsorted(self._ends, indices, side="right"), minlength=len(self._ends)).tolist())

    def __getitem__(self, index: int) -> Samples:
        return self.batch([index])

    def batch(self, indices: Sequence[int] | np.ndarray, seeds: np.ndarray | None = None, allocate: Allocate = np.empty) -> Samples:
        """Gather many samples at once. seeds: one for each, 0 by default. allocate: where images are decoded to."""
        wanted = np.asarray(indices, np.int64)
        seeds = np.zeros(len(wanted), np.uint64) if seeds is None else seeds
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"the dataset has samples 0..{len(self) - 1}, asked for {wanted.tolist()[:5]}")
        source_of = np.searchsorted(self._ends, wanted, side="right")
        chosen = np.unique(source_of)
        if len(chosen) == 1:
            return self._gather(int(chosen[0]), wanted, seeds, allocate)
        slots = [np.flatnonzero(source_of == source) for source in chosen]
        groups = [self._gather(int(source), wanted[slot], seeds[slot], np.empty) for source, slot in zip(chosen, slots, strict=True)]
        return _interleave(groups, np.argsort(np.concatenate(slots)))

    def _gather(self, source: int, wanted: np.ndarray, seeds: np.ndarray, allocate: Allocate) -> Samples:
        part, start = self._parts[source], int(self._ends[source]) - self._parts[source].num_samples
        images, samples, damaged = self._read_images(source, wanted - start, allocate)
        rows = part.rows(samples)
        steps = part.table.steps.read(rows)
        ahead = np.arange(self.chunk_len)
        action_rows = rows[:, None] + np.minimum(ahead, steps[:, LEFT, None] - 1)
        extras = part.table.extras
        return Samples(
            images=images,
            state=part.states(rows),
            actions=part.actions(action_rows),
            valid=(ahead < steps[:, VALID, None]) & part.has_actions,
            instructions=tuple(part.source.tasks[task] for task in steps[:, TASK]),
            grounding=extras[part.grounding].read(rows) if part.grounding else None,
            landmarks=extras[part.landmarks].read(rows) if part.landmarks else None,
            indices=samples + start,
            seeds=seeds,
            damaged=damaged,
        )

    def _read_images(self, source: int, samples: np.ndarray, allocate: Allocate) -> tuple[np.ndarray, np.ndarray, tuple[Damaged, ...]]:
        """Images of samples of one source; the samples that they are of, others for damaged ones; what is damaged."""
        part, frames = self._parts[source], self._frames[source]
        images, bad = frames.read(part.rows(samples), allocate)
        if not bad:
            return images, samples, ()
        samples, damaged = samples.copy(), []
        for slot in sorted(bad):
            damaged += bad[slot]
            for other in np.random.default_rng([*_SUBSTITUTES, int(samples[slot])]).integers(part.num_samples, size=TRIES):
                found, worse = frames.read(part.rows(np.array([other])))
                if not worse:
                    images[slot], samples[slot] = found[0], other
                    break
                damaged += worse[0]
            else:
                raise ValueError(
                    f"dataset {part.source.path}: nothing to put in the place of damaged frames, {TRIES} others are damaged, too; "
                    f"copy or record it again; for example {damaged[-1].reason}"
                )
        return images, samples, tuple(dataclasses.replace(d, source=source) for d in damaged)


def _check_sizes(sources: Sequence[Source], spec: RobotSpec, action: Normalizer, state: Normalizer | None) -> None:
    """Raise ValueError unless everything is about the same robot."""
    for source in sources:
        missing = [camera for camera in spec.cameras if camera not in source.cameras]
        if missing:
            raise ValueError(f"dataset {source.path} has no camera {', '.join(missing)} of robot '{spec.name}'; it has {source.cameras}")
        if source.action_dim != action.moments.dim:
            raise ValueError(f"dataset {source.path} has {source.action_dim} action dimensions, the normalizer {action.moments.dim}")
        if state is not None and source.state_dim != state.moments.dim:
            raise ValueError(f"dataset {source.path} has {source.state_dim} state dimensions, the normalizer {state.moments.dim}")


class _Part:
    """One source: where its samples lie, and its low-dimensional data, normalised as they are read."""

    def __init__(
        self,
        source: Source,
        action: Normalizer,
        state: Normalizer | None,
        chunk_len: int,
        grounding: str | None,
        landmarks: str | None,
        parity: bool,
        cache_dir: Path | None,
    ) -> None:
        wanted = [name for name in (grounding, landmarks) if name is not None]
        missing = [name for name in wanted if name not in source.extras]
        if missing:
            raise ValueError(f"dataset {source.path} has no {missing}; it has {sorted(source.extras) or 'no extras'}")
        self.source, self.has_actions, self.grounding, self.landmarks = source, source.kind != "scenes", grounding, landmarks
        self._action, self._state = action, state
        self.table = load_table(source, wanted, with_states=state is not None, cache_dir=cache_dir)
        self._first_rows = np.concatenate([[0], np.cumsum(source.lengths)])
        samples = np.maximum(source.lengths - (chunk_len - 1), 0) if parity else source.lengths
        self._first_samples = np.concatenate([[0], np.cumsum(samples)])
        self.num_samples = int(self._first_samples[-1])

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Rows of the table at which `samples` of this source begin."""
        episodes = np.searchsorted(self._first_samples, samples, side="right") - 1
        return self._first_rows[episodes] + samples - self._first_samples[episodes]

    def actions(self, rows: np.ndarray) -> np.ndarray:
        """Normalised actions, float32 (..., D)."""
        return self._action.normalize(self.table.actions.read(rows))

    def states(self, rows: np.ndarray) -> np.ndarray | None:
        """Normalised states, float32 (..., S), or None."""
        return None if self._state is None or self.table.states is None else self._state.normalize(self.table.states.read(rows))


def _interleave(groups: list[Samples], order: np.ndarray) -> Samples:
    """Join batches of several sources, then put the samples into `order`."""

    def join(name: str) -> np.ndarray | None:
        values = [getattr(group, name) for group in groups]
        return None if values[0] is None else np.concatenate(values)[order]

    flat = [text for group in groups for text in group.instructions]
    arrays = {name: join(name) for name in ("images", "state", "actions", "valid", "grounding", "landmarks", "indices", "seeds")}
    damaged = tuple(frame for group in groups for frame in group.damaged)
    return Samples(**arrays, instructions=tuple(flat[i] for i in order), damaged=damaged)  # type: ignore[arg-type]
