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
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vla_oft.data import cache as frame_cache
from vla_oft.data.base import Source
from vla_oft.data.cache import Prepare
from vla_oft.statistics import Normalizer
from vla_oft_client import RobotSpec

Caching = Literal["none", "ram", "disk"]
DISTURBED = "disturbed"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch in numpy, B samples.

    images: uint8 (B, V, size, size, 3), cameras in the robot's order. state: float32 (B, S) normalised, or None.
    actions: float32 (B, K, D) normalised; valid: bool (B, K). instructions: B strings. grounding: uint8 (B, V, 2, P, P) or None.
    landmarks: float32 (B, 2, 3) or None: where the named object and its destination are, metres; NaN where there is none.
    indices: int64 (B,) of the samples in their dataset. seed: for augmentation; the same batch always has the same seed.
    """

    images: np.ndarray
    state: np.ndarray | None
    actions: np.ndarray
    valid: np.ndarray
    instructions: tuple[str, ...]
    grounding: np.ndarray | None
    landmarks: np.ndarray | None
    indices: np.ndarray
    seed: int = 0

    def __len__(self) -> int:
        return len(self.indices)


def chunk_rows(starts: np.ndarray, ends: np.ndarray, chunk_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, K) of the actions from `starts` (B,) on, held at the last row before `ends` (B,); and which are valid (B, K)."""
    rows = starts[:, None] + np.arange(chunk_len)
    return np.minimum(rows, ends[:, None] - 1), rows < ends[:, None]


def next_true(flags: np.ndarray) -> np.ndarray:
    """For each row of bool (N,), the first row from there on that is True; N where there is none."""
    rows = np.where(flags, np.arange(len(flags)), len(flags))
    return np.minimum.accumulate(rows[::-1])[::-1]


class ChunkDataset:
    """All time steps of one or more sources, concatenated. Map-style: `dataset[i]` is one sample, `batch(indices)` many at once.

    prepare: from a recorded frame to the policy's image. action_normalizer, state_normalizer: the policy's own; without the latter,
    samples have no state. chunk_len: K, by default the robot's. cache: "ram" or "disk" (in `cache_dir`, by default `.cache` beside each
    dataset) decodes and prepares everything once, now; "none" decodes what is asked for. grounding, landmarks: also return the sources'
    extras of those names. parity: drop windows past the end of an episode.
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
        cache_dir: str | Path | None = None,
        grounding: str | None = None,
        landmarks: str | None = None,
        parity: bool = False,
    ) -> None:
        if not sources:
            raise ValueError("no datasets: give at least one")
        _check_sizes(sources, spec, action_normalizer, state_normalizer)
        self.sources, self.spec, self.prepare, self.grounding = tuple(sources), spec, prepare, grounding
        self.chunk_len = spec.chunk_len if chunk_len is None else chunk_len
        self._parts = [_Part(s, action_normalizer, state_normalizer, self.chunk_len, grounding, landmarks, parity) for s in sources]
        self._ends = np.cumsum([len(part.starts) for part in self._parts])
        if not self._ends[-1]:
            raise ValueError(f"no episode has chunk_len={self.chunk_len} steps: use a shorter chunk, or parity=False")
        self._caches: list[frame_cache.FrameCache | None] = [None] * len(sources)
        if cache != "none":
            self._caches = [self._decode(source, cache, cache_dir) for source in sources]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def sizes(self) -> list[int]:
        """Samples of each source, in order: what a mixture is drawn from."""
        return np.diff(self._ends, prepend=0).tolist()

    def __getitem__(self, index: int) -> Samples:
        return self.batch([index])

    def batch(self, indices: Sequence[int] | np.ndarray, seed: int = 0) -> Samples:
        """Gather many samples at once."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"the dataset has samples 0..{len(self) - 1}, asked for {wanted.tolist()[:5]}")
        source_of = np.searchsorted(self._ends, wanted, side="right")
        chosen = np.unique(source_of)
        if len(chosen) == 1:
            return self._gather(int(chosen[0]), wanted, seed)
        slots = [np.flatnonzero(source_of == source) for source in chosen]
        groups = [self._gather(int(source), wanted[slot], seed) for source, slot in zip(chosen, slots, strict=True)]
        return _interleave(groups, np.argsort(np.concatenate(slots)), wanted, seed)

    def _gather(self, source: int, wanted: np.ndarray, seed: int) -> Samples:
        part, cache = self._parts[source], self._caches[source]
        rows = part.starts[wanted - (self._ends[source] - len(part.starts))]
        action_rows, valid = chunk_rows(rows, part.ends[rows], self.chunk_len)
        return Samples(
            images=self._read_images(part, rows) if cache is None else np.asarray(cache[rows]),
            state=None if part.states is None else part.states[rows],
            actions=part.actions[action_rows],
            valid=valid & part.has_actions & (action_rows <= part.undisturbed_until[rows, None]),
            instructions=tuple(part.source.tasks[task] for task in part.tasks[rows]),
            grounding=None if part.grounding is None else part.grounding[rows],
            landmarks=None if part.landmarks is None else part.landmarks[rows],
            indices=wanted,
            seed=seed,
        )

    def _read_images(self, part: "_Part", rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), len(self.spec.cameras), self.prepare.size, self.prepare.size, 3), np.uint8)
        episodes = part.episodes[rows]
        for episode in np.unique(episodes):
            slots = np.flatnonzero(episodes == episode)
            steps = rows[slots] - (part.ends[rows[slots]] - part.source.lengths[episode])
            out[slots] = frame_cache.decode_rows(part.source, int(episode), steps, self.spec.cameras, self.prepare)
        return out

    def _decode(self, source: Source, cache: Caching, cache_dir: str | Path | None) -> frame_cache.FrameCache:
        if cache == "ram":
            return frame_cache.in_memory(source, self.spec.cameras, self.prepare)
        folder = Path(cache_dir) if cache_dir is not None else source.path.parent / ".cache"
        return frame_cache.on_disk(folder, source, self.spec.cameras, self.prepare)


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
    """The low-dimensional data of one source, by frame, normalised once."""

    def __init__(
        self,
        source: Source,
        action: Normalizer,
        state: Normalizer | None,
        chunk_len: int,
        grounding: str | None,
        landmarks: str | None,
        parity: bool,
    ) -> None:
        missing = [name for name in (grounding, landmarks) if name is not None and name not in source.extras]
        if missing:
            raise ValueError(f"dataset {source.path} has no {missing}; it has {sorted(source.extras) or 'no extras'}")
        episodes = range(len(source))
        self.source, self.has_actions = source, source.kind != "scenes"
        self.actions = action.normalize(np.concatenate([source.actions(e) for e in episodes]))
        self.states = None if state is None else state.normalize(np.concatenate([source.states(e) for e in episodes]))
        self.tasks = np.concatenate([source.task_indices(e) for e in episodes])
        self.grounding, self.landmarks = (
            None if name is None else np.concatenate([source.extra(name, e) for e in episodes]) for name in (grounding, landmarks)
        )
        self.undisturbed_until = np.full(len(self.actions), len(self.actions))
        if DISTURBED in source.extras:
            pushed = np.concatenate([source.extra(DISTURBED, e) for e in episodes]).reshape(len(self.actions), -1).any(axis=1)
            self.undisturbed_until = next_true(np.asarray(pushed))
        self.episodes = np.repeat(np.arange(len(source)), source.lengths)
        self.ends = np.repeat(np.cumsum(source.lengths), source.lengths)
        rows = np.arange(len(self.actions))
        self.starts = rows[rows + chunk_len <= self.ends] if parity else rows


def _interleave(groups: list[Samples], order: np.ndarray, indices: np.ndarray, seed: int) -> Samples:
    """Join batches of several sources, then put the samples back into the order of `indices`."""

    def join(name: str) -> np.ndarray | None:
        values = [getattr(group, name) for group in groups]
        return None if values[0] is None else np.concatenate(values)[order]

    flat = [text for group in groups for text in group.instructions]
    arrays = {name: join(name) for name in ("images", "state", "actions", "valid", "grounding", "landmarks")}
    return Samples(**arrays, instructions=tuple(flat[i] for i in order), indices=indices, seed=seed)  # type: ignore[arg-type]
