"""Recordings for people: the simulator's picture, what the policy saw, what it was told, and the verdict.

    +-------------------+-------+
    |                   |  cam  |   the cameras at the policy's last look
    |  Simulator.frame  +-------+
    |                   |  cam  |
    +-------------------+-------+
    | touch the red block       |   the words that the policy was given
    | 1.35 s            success |
    +---------------------------+

Needs PyAV (extra `data`).
"""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, BAND = 480, 360, 64
BACKGROUND, INK, QUIET = (17, 20, 26), (238, 241, 245), (148, 158, 172)
GOOD, BAD = (74, 202, 128), (255, 122, 110)
HOLD_S = 1.0


class Mp4:
    """H.264 in yuv420p with the index in front, which every browser plays."""

    def __init__(self, path: Path, fps: float) -> None:
        import av

        self.path, self.fps, self._av = path, fps, av
        self._container: Any = None
        self._stream: Any = None

    def add(self, frame: np.ndarray, repeat: int = 1) -> None:
        """One more frame, uint8 (H, W, 3), both even and always the same; shown `repeat` times. The first one creates the file."""
        if self._container is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(self.path), "w", options={"movflags": "faststart"})
            self._stream = self._container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1000))
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": "25", "preset": "veryfast"}
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        for _ in range(repeat):
            picture.pts = None  # the encoder counts by itself
            self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Flush the encoder and write the index."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None


class Recorder:
    """Draws the frames of one episode and writes them to a file."""

    def __init__(self, sink: Mp4, *, control_hz: float, show_cameras: bool) -> None:
        self.sink, self.control_hz, self.show_cameras = sink, control_hz, show_cameras
        self._last: tuple[np.ndarray, str, Mapping[str, np.ndarray], float] | None = None

    def add(self, picture: np.ndarray, instruction: str, cameras: Mapping[str, np.ndarray], time_s: float) -> None:
        """One control step: `picture` uint8 (HEIGHT, WIDTH, 3), `cameras` as the policy last saw them."""
        self._last = (picture, instruction, cameras if self.show_cameras else {}, time_s)
        self.sink.add(draw(*self._last))

    def finish(self, verdict: str, good: bool) -> None:
        """Hold the last moment with the verdict for `HOLD_S` seconds, then close the file."""
        if self._last is not None:
            self.sink.add(draw(*self._last, verdict=verdict, good=good), hold_frames(self.control_hz))
        self.sink.close()


def hold_frames(control_hz: float) -> int:
    """Number of frames at the end of a recording that show the verdict."""
    return max(1, round(control_hz * HOLD_S))


def draw(
    picture: np.ndarray, instruction: str, cameras: Mapping[str, np.ndarray], time_s: float, *, verdict: str = "", good: bool = False
) -> np.ndarray:
    """One captioned frame, uint8 (HEIGHT + BAND, WIDTH + the cameras' column, 3)."""
    height, picture_width = picture.shape[:2]
    side = min(height // len(cameras), height // 2) // 2 * 2 if cameras else 0
    width = picture_width + side
    canvas = Image.new("RGB", (width, height + BAND), BACKGROUND)
    canvas.paste(Image.fromarray(picture), (0, 0))
    for place, image in enumerate(cameras.values()):
        canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), (picture_width, place * side))
    pen = ImageDraw.Draw(canvas)
    words, font = _fitted(pen, instruction, width - 28)
    pen.text((14, height + 11), words, font=font, fill=INK)
    small = ImageFont.load_default(13)
    pen.text((14, height + 39), f"{time_s:5.2f} s", font=small, fill=QUIET)
    if verdict:
        pen.text((width - 14 - pen.textlength(verdict, font=small), height + 39), verdict, font=small, fill=GOOD if good else BAD)
    return np.asarray(canvas)


def _fitted(pen: ImageDraw.ImageDraw, text: str, width: int) -> tuple[str, ImageFont.ImageFont | ImageFont.FreeTypeFont]:
    """`text` and the largest font in which it fits; cut only when even the smallest is too large."""
    font = ImageFont.load_default(18)
    for size in range(18, 10, -1):
        font = ImageFont.load_default(size)
        if pen.textlength(text, font=font) <= width:
            return text, font
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "...", font
