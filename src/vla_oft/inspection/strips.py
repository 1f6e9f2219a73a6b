"""Film strips: frames from the beginning to the end of an episode, side by side in one small JPEG."""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vla_oft.data.base import Source
from vla_oft.inspection.facts import Inspection

FRAMES = 5
HEIGHT, WIDEST, GAP, QUALITY = 120, 240, 4, 78

EPISODES, TASKS = 2, 12
"""Episodes of one instruction, and instructions, that are shown."""


@dataclass
class Strips:
    """Strips of `source`, as long as they stay below `budget` bytes together; `left_out` counts the others."""

    source: Source
    budget: int
    used: int = 0
    left_out: int = 0
    failures: list[str] = field(default_factory=list)

    def make(self, episode: int) -> dict[str, tuple[bytes, list[int]]]:
        """Camera -> (JPEG, steps) of one episode; without cameras that cannot be read or do not fit any more."""
        found = {}
        for camera in self.source.cameras:
            if self.used >= self.budget:
                self.left_out += 1
                continue
            try:
                steps = np.unique(np.linspace(0, int(self.source.lengths[episode]) - 1, FRAMES).round().astype(int))
                picture = strip(self.source.frames(episode, steps, camera))
            except ValueError as error:
                self.failures.append(str(error))
                continue
            if self.used + len(picture) > self.budget:
                self.left_out += 1
                continue
            self.used += len(picture)
            found[camera] = (picture, steps.tolist())
        return found


def strip(frames: np.ndarray) -> bytes:
    """Frames uint8 (N, H, W, 3) as one JPEG, each at most `HEIGHT` high and `WIDEST` wide; small ones are enlarged without blurring."""
    height, width = frames.shape[1:3]
    scale = min(HEIGHT / height, WIDEST / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    whole = Image.new("RGB", (len(frames) * (size[0] + GAP) - GAP, size[1]), (127, 127, 127))
    for index, frame in enumerate(frames):
        whole.paste(Image.fromarray(np.ascontiguousarray(frame)).resize(size, method), (index * (size[0] + GAP), 0))
    stream = io.BytesIO()
    whole.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def shown_episodes(found: Inspection) -> dict[str, list[int]]:
    """Instruction -> first and last episode that follow it, for the most frequent instructions; broken episodes are left out."""
    broken = {episode for episode, _ in found.records.unreadable}
    shown: dict[str, list[int]] = {}
    for i in sorted(found.instructions, key=lambda i: -i.episodes)[:TASKS]:
        both = [e for e in (i.first, i.last) if e is not None and e not in broken]
        if both:
            shown[i.text] = sorted(set(both))[:EPISODES]
    return shown


def suspect_episodes(found: Inspection) -> list[int]:
    """Episodes that problems of cameras name, at most four."""
    return sorted({p.seen.first.episode for p in found.problems if p.seen.first is not None and p.seen.first.camera is not None})[:4]
