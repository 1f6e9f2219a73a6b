"""The pixels of a frame that FFmpeg has decoded."""

from typing import Any

import numpy as np


def copy_rgb(frame: Any, out: np.ndarray) -> None:
    """An rgb24 frame of PyAV's into `out`, uint8 (H, W, 3) contiguous; the frame's rows may be padded."""
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(frame.height, frame.planes[0].line_size)
    out.reshape(frame.height, -1)[:] = rows[:, : frame.width * 3]
