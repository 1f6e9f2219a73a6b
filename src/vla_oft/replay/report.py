"""What a replay found out: as JSON, and as lines for people."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data.base import Source
from vla_oft.evaluate.success import Rate, count
from vla_oft.replay.episode import Replayed


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Everything that was found. notes: what makes the replay differ from the recording, for all episodes."""

    source: Source
    episodes: tuple[Replayed, ...]
    tolerance: float
    out: Path | None
    notes: tuple[str, ...]
    versions: dict[str, str]
    duration_s: float

    def rate(self, disturbed: bool | None = None) -> Rate:
        """Success of all episodes, or only of those that were (not) disturbed; without those that the simulator broke."""
        return count([e.success for e in self.episodes if e.success is not None and disturbed in (None, e.disturbed)])

    @property
    def sim_errors(self) -> int:
        """How many episodes the simulator broke."""
        return sum(e.sim_error is not None for e in self.episodes)

    def diverged(self, disturbed: bool) -> list[int]:
        """Numbers of the episodes that strayed beyond the tolerance."""
        return [e.episode for e in self.episodes if e.deviation and e.deviation.diverged_at is not None and e.disturbed == disturbed]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        source = self.source
        return {
            "dataset": {"path": str(source.path), "name": source.name, "format": source.format, "fingerprint": source.fingerprint()},
            "recorded_with": {name: source.recording[name] for name in ("versions", "provenance") if name in source.recording},
            "versions": self.versions,
            "tolerance": self.tolerance,
            "success": self.rate().to_dict(),
            "undisturbed": self._group(disturbed=False),
            "disturbed": self._group(disturbed=True),
            "sim_errors": self.sim_errors,
            "notes": list(self.notes),
            "skipped": list(source.skipped),
            "duration_s": round(self.duration_s, 3),
            "episodes": [dataclasses.asdict(e) for e in self.episodes],
        }

    def lines(self) -> list[str]:
        """A line for each episode, then the sums."""
        names, lines = self.source.state_names, []
        for e in self.episodes:
            verdict = "simulator error" if e.success is None else "success" if e.success else "failed"
            lines.append(f"episode {e.episode:>4}  {e.scene!s:<32} {verdict:<9}{_strayed(e, names)}{'  disturbed' if e.disturbed else ''}")
            lines += [f"    {line}" for line in (*e.remarks, *([e.sim_error] if e.sim_error else []))]
        for name, disturbed in (("undisturbed", False), ("disturbed", True)):
            if any(e.disturbed == disturbed for e in self.episodes):
                group = self._group(disturbed)
                apart = group["deviation"]
                strayed = f"; deviation at most {apart['max']:.2g}, median {apart['median']:.2g}" if apart else ""
                beyond = f"; beyond {self.tolerance:g} in {len(group['diverged'])}" if apart else ""
                lines.append(f"{name}: {self.rate(disturbed)}{strayed}{beyond}")
        if any(e.disturbed for e in self.episodes):
            lines.append("disturbed: something else was executed than the recorded action, so that these replays must differ")
        lines += [f"{self.sim_errors} simulator errors, which are no failures"] if self.sim_errors else []
        lines += [f"note: {note}" for note in self.notes]
        return lines + ([f"rows and videos: {self.out}"] if self.out is not None else [])

    def _group(self, disturbed: bool) -> dict[str, Any]:
        apart = [e.deviation for e in self.episodes if e.deviation is not None and e.disturbed == disturbed]
        deviation = {"max": max(d.max for d in apart), "median": float(np.median([d.median for d in apart]))} if apart else None
        return {**self.rate(disturbed).to_dict(), "deviation": deviation, "diverged": self.diverged(disturbed)}


def _strayed(episode: Replayed, names: tuple[str, ...]) -> str:
    apart = episode.deviation
    if apart is None:
        return "  no recorded states to compare with" if episode.sim_error is None else ""
    where = names[apart.dimension] if apart.dimension < len(names) else f"dimension {apart.dimension}"
    return f"  deviation max {apart.max:.2g} ({where}, step {apart.step}), median {apart.median:.2g}"
