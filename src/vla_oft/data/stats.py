"""`vla-oft data stats`: the exact statistics of one dataset, for people and in the reference's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data.base import Source
from vla_oft.data.check import source_statistics
from vla_oft.statistics import DatasetStatistics, Moments, save_statistics
from vla_oft_client import RobotSpec

COLUMNS = ("mean", "std", "min", "q01", "q99", "max")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The statistics, and of what. robot: in whose units; None for the dataset's own."""

    source: Source
    robot: str | None
    statistics: DatasetStatistics

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `statistics` is what `save` writes."""
        source = self.source
        return {
            "path": str(source.path),
            "format": source.format,
            "robot": self.robot,
            "fingerprint": source.fingerprint(),
            "num_episodes": len(source),
            "num_frames": int(source.lengths.sum()),
            "state_names": list(source.state_names),
            "action_names": list(source.action_names),
            "statistics": {source.name: self.statistics.to_dict()},
            "skipped": list(source.skipped),
        }

    def lines(self) -> list[str]:
        """A table: one line for each dimension."""
        source, found = self.source, self.statistics
        units = f"in the units of robot '{self.robot}'" if self.robot else "in the dataset's own units"
        head = f"{source.name} ({source.format}): {len(source)} episodes, {int(source.lengths.sum())} frames, {units}"
        lines = [head, *_table("action", found.action, source.action_names, found.normalize_mask)]
        if found.state is not None:
            lines += _table("state", found.state, source.state_names, np.ones(found.state.dim, bool))
        if not found.normalize_mask.all():
            lines.append("* not normalised: passes through as it is")
        return lines


def measure(source: Source, spec: RobotSpec | None) -> Measured:
    """Exact statistics of `source`, which speaks the language of robot `spec`, if any. Raises ValueError for what is not finite."""
    recorded = source.recording.get("robot") or {}
    mask = list(spec.normalize_mask) if spec else recorded.get("normalize_mask", [])
    if spec is None and len(mask) != source.action_dim:
        mask = [True] * source.action_dim
    return Measured(source=source, robot=spec.name if spec else recorded.get("name"), statistics=source_statistics(source, mask))


def check_out(path: Path) -> None:
    """Raise ValueError unless `save` can write `path`: nothing is ever overwritten."""
    if path.exists():
        raise ValueError(f"output {path} exists; choose another file, or remove it first")
    if not path.parent.is_dir():
        raise ValueError(f"output {path}: there is no folder {path.parent}; create it first")


def save(measured: Measured, path: Path) -> None:
    """Write `dataset_statistics.json`."""
    save_statistics(path, {measured.source.name: measured.statistics})


def _table(what: str, moments: Moments, names: Sequence[str], mask: np.ndarray) -> list[str]:
    labels = [f"{dim}{' ' if mask[dim] else '*'} {names[dim] if dim < len(names) else ''}".rstrip() for dim in range(moments.dim)]
    width = max(len(what), *map(len, labels)) + 2
    rows = [f"{what:<{width}}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for dim, label in enumerate(labels):
        rows.append(f"{label:<{width}}" + "".join(f"{getattr(moments, name)[dim]:>12.5g}" for name in COLUMNS))
    return ["", *rows]
