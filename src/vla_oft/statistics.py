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
KINDS = ("bounds_q99", "bounds", "zscore")
PARITY = (None, "train", "eval")
ADVICE = "compute the statistics anew with vla_oft.data.base.source_statistics, or copy the file from the training run"
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


def compute_moments(episodes: Sequence[np.ndarray], what: str) -> Moments:
    """Exact moments over all steps of `episodes`, each (T, D). `what` ("action", "state") names the data in errors."""
    if not episodes or not sum(len(e) for e in episodes):
        raise ValueError(f"no {what} data: the dataset is empty")
    for index, episode in enumerate(episodes):
        bad = np.argwhere(~np.isfinite(episode))
        if bad.size:
            step, dim = bad[0]
            value = episode[step, dim]
            raise ValueError(f"{what} is not finite in episode {index}, step {step}, dimension {dim}: {value}; repair or drop that episode")
    values = np.concatenate(episodes).astype(np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    low, high = values.min(axis=0), values.max(axis=0)
    return Moments(mean=values.mean(axis=0), std=values.std(axis=0), min=low, max=high, q01=q01, q99=q99)


def compute_statistics(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray] | None, normalize_mask: Sequence[bool] | np.ndarray
) -> DatasetStatistics:
    """Statistics of episodes of actions (T, D) and states (T, S)."""
    moments = compute_moments(actions, "action")
    mask = np.asarray(normalize_mask, bool)
    if mask.shape != (moments.dim,):
        raise ValueError(f"normalize_mask has {mask.size} entries, the actions have {moments.dim} dimensions")
    return DatasetStatistics(
        action=moments,
        state=None if states is None else compute_moments(states, "state"),
        normalize_mask=mask,
        num_transitions=sum(len(e) for e in actions),
        num_trajectories=len(actions),
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
