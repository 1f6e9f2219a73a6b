"""Resizing and cropping of uint8 camera images, the same for training and inference."""

from typing import Literal

import numpy as np
from PIL import Image

Filter = Literal["box", "bicubic", "lanczos"]
_FILTERS = {"box": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def resize(image: np.ndarray, size: int, method: Filter = "box") -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3), antialiased; the aspect ratio is not kept, as in the reference.

    `box` averages whole pixels: exact and fast for integer ratios, and used for those only.
    """
    if image.shape[:2] == (size, size):
        return image
    if method == "box" and (image.shape[0] % size or image.shape[1] % size):
        method = "lanczos"
    return np.asarray(Image.fromarray(image).resize((size, size), _FILTERS[method]))


def center_crop(image: np.ndarray, area: float) -> np.ndarray:
    """The central part of uint8 (H, W, 3) that holds `area` of it, resized back: the evaluation side of random-crop training."""
    if not 0 < area <= 1:
        raise ValueError(f"crop area must be in (0, 1], got {area}")
    if area == 1.0:
        return image
    height, width = image.shape[:2]
    side = area**0.5
    top, left = (1 - side) / 2 * height, (1 - side) / 2 * width
    box = (left, top, width - left, height - top)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box))
