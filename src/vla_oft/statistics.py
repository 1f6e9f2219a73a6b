"""What a dataset's numbers look like, and how they become a policy's [-1, 1] and back.

    robot units  --normalize-->  policy units  --unnormalize-->  robot units

Statistics are exact (population standard deviation, linearly interpolated quantiles) and live in the reference's
`dataset_statistics.json`, so that checkpoints travel in both directions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vla_oft.atomic import replace_file
from vla_oft_client import RobotSpec

EPSILON = 1e-8
QUANTILE = 0.01
KINDS = ("bounds_q99", "bounds", "zscore")
PARITY = (None, "train", "eval")
ADVICE = "compute the statistics anew with vla_oft.data.check.source_statistics, or copy the file from the training run"
_MOMENTS = ("mean", "std", "max", "min", "q01", "q99")
Array = TypeVar("Array")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Per-dimension statistics, each float64 (D,), in robot units."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return int(self.mean.shape[0])

    def to_dict(self) -> dict[str, list[float]]:
        """Plain JSON types, in the reference's order."""
        return {name: getattr(self, name).tolist() for name in _MOMENTS}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "moments") -> "Moments":
        """The inverse of `to_dict`. Raises ValueError naming a missing or badly shaped entry."""
        missing = [name for name in _MOMENTS if name not in values]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}; {ADVICE}")
        arrays = {name: np.asarray(values[name], np.float64) for name in _MOMENTS}
        shapes = {name: array.shape for name, array in arrays.items()}
        if len(set(shapes.values())) != 1 or arrays["mean"].ndim != 1:
            raise ValueError(f"{where}: every entry must be a list of the same length, got shapes {shapes}")
        return cls(**arrays)


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Statistics of one dataset.

    normalize_mask: bool (D,), False where an action dimension passes through unchanged.
    state: None when the dataset has no proprioceptive state. state_mask: bool (S,), like normalize_mask; None normalises all.
    """

    action: Moments
    state: Moments | None
    normalize_mask: np.ndarray
    num_transitions: int
    num_trajectories: int
    state_mask: np.ndarray | None = None

    def check(self, spec: RobotSpec) -> "DatasetStatistics":
        """Return self if the sizes fit robot `spec`; otherwise raise ValueError."""
        if self.action.dim != spec.action_dim:
            raise ValueError(f"the statistics describe {self.action.dim} action dimensions, robot '{spec.name}' has {spec.action_dim}")
        if spec.state_dim and (self.state is None or self.state.dim != spec.state_dim):
            found = "no state" if self.state is None else f"{self.state.dim} state dimensions"
            raise ValueError(f"the statistics describe {found}, robot '{spec.name}' has {spec.state_dim}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """One entry of the reference's `dataset_statistics.json`."""
        entry: dict[str, Any] = {"action": {**self.action.to_dict(), "mask": [bool(m) for m in self.normalize_mask]}}
        if self.state is not None:
            mask = {} if self.state_mask is None else {"mask": [bool(m) for m in self.state_mask]}
            entry["proprio"] = {**self.state.to_dict(), **mask}
        return {**entry, "num_transitions": self.num_transitions, "num_trajectories": self.num_trajectories}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "statistics") -> "DatasetStatistics":
        """The inverse of `to_dict`; also reads entries without a mask (everything is normalised) or without a state."""
        if "action" not in values:
            raise ValueError(f"{where}: no 'action' entry; found {sorted(values)}")
        action = Moments.from_dict(values["action"], f"{where}/action")
        mask = _mask(values["action"], action.dim, f"{where}/action")
        proprio = values.get("proprio")
        state = Moments.from_dict(proprio, f"{where}/proprio") if proprio else None
        return cls(
            action=action,
            state=state,
            normalize_mask=np.ones(action.dim, bool) if mask is None else mask,
            num_transitions=int(values.get("num_transitions") or 0),
            num_trajectories=int(values.get("num_trajectories") or 0),
            state_mask=_mask(proprio, state.dim, f"{where}/proprio") if proprio and state else None,
        )


def _mask(values: dict[str, Any], dim: int, where: str) -> np.ndarray | None:
    """bool (dim,), or None where there is none."""
    if values.get("mask") is None:
        return None
    mask = np.asarray(values["mask"], bool)
    if mask.shape != (dim,):
        raise ValueError(f"{where}: mask has {mask.size} entries for {dim} dimensions")
    return mask


class StreamingMoments:
    """Exact `Moments` of `num_rows` rows of `dim` numbers in one pass, in 4 % of the memory that the rows would take.

    q01 and q99 only depend on the lowest and highest hundredth of the values, so those are all that is kept. The number of rows must be
    known in advance. `what` ("action", "state") names the data in errors.
    """

    def __init__(self, num_rows: int, dim: int, what: str = "values") -> None:
        if num_rows < 1:
            raise ValueError(f"no {what} data: the dataset is empty")
        self.num_rows, self.dim, self.what = num_rows, dim, what
        self._tail = min(num_rows, int(QUANTILE * (num_rows - 1)) + 2)
        self._low, self._high = np.empty((0, dim)), np.empty((0, dim))
        self._waiting: list[np.ndarray] = []
        self._num_waiting = self._count = 0
        self._first: np.ndarray | None = None
        self._mean, self._sum_of_squares = np.zeros(dim), np.zeros(dim)  # of differences to the first row: constants stay exact

    def update(self, values: np.ndarray, where: str = "") -> None:
        """Add rows (T, dim). Raises ValueError naming `where` (for example "episode 3"), step and dimension if one is not finite."""
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"{what_where(self.what, where)} must be (T, {self.dim}), got {values.shape}")
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            step, dim = bad[0]
            place = f"{where}, step {step}, dimension {dim}".removeprefix(", ")
            raise ValueError(f"{self.what} is not finite in {place}: {values[step, dim]}; repair or drop that episode")
        self._waiting.append(np.asarray(values, np.float64))
        self._num_waiting += len(values)
        if self._num_waiting >= max(self._tail, 16384):
            self._merge()

    def result(self) -> Moments:
        """The moments of all rows. Raises ValueError unless exactly `num_rows` have been added."""
        self._merge()
        if self._count != self.num_rows or self._first is None:
            raise ValueError(f"{self.what}: {self.num_rows} rows were announced, {self._count} came")
        low, high = np.sort(self._low, axis=0), np.sort(self._high, axis=0)
        return Moments(
            mean=self._first + self._mean,
            std=np.sqrt(self._sum_of_squares / self._count),
            min=low[0],
            max=high[-1],
            q01=_interpolate(low, QUANTILE * (self.num_rows - 1)),
            q99=_interpolate(high, (1 - QUANTILE) * (self.num_rows - 1) - (self.num_rows - len(high))),
        )

    def _merge(self) -> None:
        if not self._num_waiting:
            return
        values = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        if self._first is None:
            self._first = values[0].copy()
        self._low = _smallest(np.concatenate([self._low, values]), self._tail)
        self._high = -_smallest(-np.concatenate([self._high, values]), self._tail)
        values -= self._first
        count, mean = len(values), values.mean(axis=0)
        delta, total = mean - self._mean, self._count + count
        self._sum_of_squares += ((values - mean) ** 2).sum(axis=0) + delta**2 * (self._count * count / total)  # Chan et al. 1979
        self._mean += delta * (count / total)
        self._count = total


def what_where(what: str, where: str) -> str:
    """ "action" and "episode 3" -> "action of episode 3"."""
    return f"{what} of {where}" if where else what


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    return values if len(values) <= count else np.partition(values, count - 1, axis=0)[:count]


def _interpolate(ordered: np.ndarray, position: float) -> np.ndarray:
    """Between the two rows beside `position`, in the same arithmetic as numpy's quantile."""
    before = min(max(int(np.floor(position)), 0), len(ordered) - 1)
    after, share = min(before + 1, len(ordered) - 1), position - before
    low, high = ordered[before], ordered[after]
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


def compute_moments(episodes: Sequence[np.ndarray], what: str) -> Moments:
    """Exact moments over all steps of `episodes`, each (T, D). `what` ("action", "state") names the data in errors."""
    dims = {episode.shape[1] for episode in episodes if episode.ndim == 2}
    moments = StreamingMoments(sum(len(e) for e in episodes), dims.pop() if dims else 0, what)
    for number, episode in enumerate(episodes):
        moments.update(episode, f"episode {number}")
    return moments.result()


def compute_statistics(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray] | None, normalize_mask: Sequence[bool] | np.ndarray
) -> DatasetStatistics:
    """Statistics of episodes of actions (T, D) and states (T, S)."""
    state = None if states is None else compute_moments(states, "state")
    return assemble(compute_moments(actions, "action"), state, normalize_mask, sum(len(e) for e in actions), len(actions))


def assemble(
    action: Moments, state: Moments | None, normalize_mask: Sequence[bool] | np.ndarray, num_transitions: int, num_trajectories: int
) -> DatasetStatistics:
    """Statistics from moments. Raises ValueError when the mask does not fit the actions."""
    mask = np.asarray(normalize_mask, bool)
    if mask.shape != (action.dim,):
        raise ValueError(f"normalize_mask has {mask.size} entries, the actions have {action.dim} dimensions")
    return DatasetStatistics(
        action=action, state=state, normalize_mask=mask, num_transitions=num_transitions, num_trajectories=num_trajectories
    )


def load_statistics(path: str | Path) -> dict[str, DatasetStatistics]:
    """Read a `dataset_statistics.json`: dataset name -> statistics."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {ADVICE}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: expected {{dataset name: statistics}}")
    return {name: DatasetStatistics.from_dict(entry, f"{path}: {name}") for name, entry in entries.items()}


def save_statistics(path: str | Path, statistics: dict[str, DatasetStatistics]) -> None:
    """Write `dataset_statistics.json`; an existing file is replaced in one step."""
    replace_file(Path(path), json.dumps({name: entry.to_dict() for name, entry in statistics.items()}, indent=2))


@dataclass(frozen=True)
class Normalizer:
    """Robot units <-> policy units, for numpy arrays and torch tensors of shape (..., D).

    kind: `bounds_q99` maps [q01, q99] to [-1, 1] and clips, `bounds` maps [min, max], `zscore` is (x - mean) / std, unclipped.
    mask: bool (D,), False where a dimension passes through unchanged; None normalises all.
    parity: None treats a constant dimension alike everywhere (0 in policy units, its constant in robot units). The reference does not:
    "train" zeroes dimensions with min == max whatever the mask (bounds only); "eval" does not, and clips even masked dimensions.
    """

    moments: Moments
    mask: np.ndarray | None
    kind: str
    parity: str | None = None
    _constants: dict[Any, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"normalization kind {self.kind!r} is unknown; choose one of {KINDS}")
        if self.parity not in PARITY:
            raise ValueError(f"parity={self.parity!r} is unknown; choose one of {PARITY}")
        if self.mask is not None and np.shape(self.mask) != (self.moments.dim,):
            raise ValueError(f"mask has shape {np.shape(self.mask)}, the statistics have {self.moments.dim} dimensions")

    def normalize(self, values: Array) -> Array:
        """Policy units of robot units `values`, same type and shape, in the precision of `values` (at least float32)."""
        where, clip, x, (low, high, mask, zero) = self._prepare(values)
        if self.kind == "zscore":
            scaled = where(mask, (x - low) / (high + EPSILON), x)
        else:
            scaled = 2 * (x - low) / (high - low + EPSILON) - 1
            if self.parity == "eval":
                scaled = clip(where(mask, scaled, x), -1, 1)
            else:
                scaled = where(mask, clip(scaled, -1, 1), x)
        return where(zero, scaled * 0, scaled)

    def unnormalize(self, values: Array) -> Array:
        """Robot units of policy units `values`: the inverse of `normalize` up to its clipping."""
        where, _, x, (low, high, mask, zero) = self._prepare(values)
        if self.kind == "zscore":
            scaled = x * (high + EPSILON) + low
        else:
            scaled = 0.5 * (x + 1) * (high - low + EPSILON) + low
        scaled = where(mask, scaled, x)
        return scaled if self.parity else where(zero, low + x * 0, scaled)

    def constant_dims(self) -> list[int]:
        """Normalised dimensions that never change in the data, by this kind's measure: the policy cannot learn to move them."""
        mask = np.ones(self.moments.dim, bool) if self.mask is None else np.asarray(self.mask, bool)
        return np.flatnonzero(self._zero_range() & mask).tolist()

    def _zero_range(self) -> np.ndarray:
        m = self.moments
        return m.q01 == m.q99 if self.kind == "bounds_q99" else m.min == m.max

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(low, high) or (mean, std), mask, and the dimensions that become 0."""
        m = self.moments
        low, high = {"bounds_q99": (m.q01, m.q99), "bounds": (m.min, m.max), "zscore": (m.mean, m.std)}[self.kind]
        mask = np.ones(m.dim, bool) if self.mask is None else np.asarray(self.mask, bool)
        if self.parity is None:
            zero = self._zero_range() & mask
        else:
            zero = (m.min == m.max) & (self.parity == "train" and self.kind != "zscore")
        if self.kind == "zscore" and self.parity is None:
            low = np.where(zero, m.min, low)  # the mean of a constant carries rounding
        return low, high, mask, zero

    def _prepare(self, values: Any) -> tuple[Any, Any, Any, Any]:
        """(where, clip, values in working precision, constants beside them)."""
        if np.shape(values)[-1:] != (self.moments.dim,):
            raise ValueError(f"last dimension must be {self.moments.dim}, got shape {tuple(np.shape(values))}")
        if isinstance(values, np.ndarray):
            dtype = values.dtype if values.dtype in (np.float32, np.float64) else np.dtype(np.float32)
            if dtype not in self._constants:
                low, high, mask, zero = self._arrays()
                self._constants[dtype] = (low.astype(dtype), high.astype(dtype), mask, zero)
            return np.where, np.clip, values.astype(dtype, copy=False), self._constants[dtype]
        import torch  # tensors only exist where torch is already loaded

        precision = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32
        key = (precision, values.device)
        if key not in self._constants:  # copied to the device once: a captured graph must not see a host copy
            low, high, mask, zero = (torch.as_tensor(a, device=values.device) for a in self._arrays())
            self._constants[key] = (low.to(precision), high.to(precision), mask, zero)
        return torch.where, torch.clamp, values.to(precision), self._constants[key]
