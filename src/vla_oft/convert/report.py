"""What a conversion did: as JSON, and as lines for people."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_oft.convert.compare import Comparison


@dataclass(frozen=True, kw_only=True)
class Converted:
    """source_bytes: None where the source is not a folder of its own. remarks: what could not be kept; skipped: damaged episodes."""

    source: str
    format: str
    fingerprint: str
    out: Path
    num_episodes: int
    num_frames: int
    cameras: tuple[str, ...]
    fps: float
    duration_s: float
    source_bytes: int | None
    out_bytes: int
    comparison: Comparison
    remarks: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def frames_per_s(self) -> float:
        """Pictures of all cameras that were read and encoded in a second."""
        return self.num_frames * max(len(self.cameras), 1) / max(self.duration_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "out": str(self.out), "frames_per_s": round(self.frames_per_s, 1)}

    def lines(self) -> list[str]:
        """For people."""
        cameras, found = len(self.cameras), self.comparison
        before = f"{_size(self.source_bytes)} -> " if self.source_bytes is not None else ""
        lines = [
            f"{self.out}: {self.num_episodes} episodes, {self.num_frames} steps, {cameras} camera{'' if cameras == 1 else 's'}; "
            f"{before}{_size(self.out_bytes)}, {self.frames_per_s:.0f} frames/s",
            "states, actions, instructions and extras are equal, bit for bit",
        ]
        if found.num_frames and found.min_psnr_db is None:
            lines.append(f"images are equal in the {found.num_frames} frames that were compared")
        elif found.worst is not None:
            episode, step, camera = found.worst
            lines.append(
                f"images: at most {found.max_error} of 255 apart, on average {found.mean_error:.2f}; PSNR {found.min_psnr_db:.1f} dB "
                f"or more (episode {episode}, step {step}, {camera}) in {found.num_frames} frames"
            )
        lines += [f"note: {remark}" for remark in self.remarks]
        return lines + ([f"{len(self.skipped)} damaged episodes or files were skipped"] if self.skipped else [])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
