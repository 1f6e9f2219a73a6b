"""What was recorded beside what happens when it is done again.

+----------+----------+
| recorded | replayed |   one row for each camera
+----------+----------+
| recorded | replayed |
+----------+----------+
| touch the red block |
| 1.35 s      success |
+---------------------+
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from vla_oft.data.base import Source
from vla_oft.evaluate.video import Mp4, Recorder

SIDE = 240
BLOCK = 64
"""Recorded frames that are decoded at a time."""


class SideBySide:
    """Draws one episode into a file."""

    def __init__(self, path: Path, control_hz: float) -> None:
        self.path, self._hz = path, control_hz
        self._recorder = Recorder(Mp4(path, control_hz), control_hz=control_hz, show_cameras=False)

    def begin(self, source: Source, episode: int, instruction: str) -> None:
        """What the left half shows."""
        self._source, self._episode, self._instruction = source, episode, instruction
        self._frames: dict[str, np.ndarray] = {}
        self._first = 0

    def add(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """One step: what the simulator's cameras see before its action. Raises ValueError when the recorded frame is unreadable."""
        if not self._frames or not self._first <= step < self._first + BLOCK:
            self._first = step
            steps = range(step, min(step + BLOCK, int(self._source.lengths[self._episode])))
            self._frames = {camera: self._source.frames(self._episode, steps, camera) for camera in self._source.cameras}
        rows = [
            np.concatenate([_square(frames[step - self._first]), _square(images.get(camera))], axis=1)
            for camera, frames in self._frames.items()
        ]
        self._recorder.add(np.concatenate(rows), f"recorded | replayed: {self._instruction}", {}, step / self._hz)

    def finish(self, verdict: str, good: bool) -> None:
        """Hold the last picture with the verdict, and close the file."""
        self._recorder.finish(verdict, good)

    def abandon(self) -> None:
        """Leave no file of an episode that broke."""
        self._recorder.sink.close()
        self.path.unlink(missing_ok=True)


def _square(image: np.ndarray | None) -> np.ndarray:
    """(SIDE, SIDE, 3); black without an image, and above and below one that is not square."""
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    if image is not None:
        scale = SIDE / max(image.shape[:2])
        height, width = (max(1, round(length * scale)) for length in image.shape[:2])
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        canvas[top : top + height, left : left + width] = np.asarray(scaled)
    return canvas
