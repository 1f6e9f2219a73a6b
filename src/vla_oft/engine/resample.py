"""Pillow's resizing of uint8 images as a few tensor operations, equal to Pillow to the bit.

Pillow resizes in one direction, rounds to uint8, then in the other. One output of either pass is a sum of neighbouring pixels ("taps") with
weights of 22 bits behind the point, in integers, so it does not matter in which order they are added:

    row (W)  --gather-->  (taps, W')  --times weights-->  (taps, W')  --sum-->  (W')  --add half, shift, clamp-->  uint8 (W')

All taps of a pass are gathered at once: three large operations cost less on a GPU than three small ones for every tap.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
_PILLOW: dict[Filter, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_REACH: dict[Filter, float] = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_FRACTION_BITS = 22
_HALF = 1 << (_FRACTION_BITS - 1)
_DOWN, _ACROSS = 1, 2  # axes of (N, H, W, 3)


@dataclass(frozen=True, kw_only=True)
class Line:
    """How one line of pixels is resized.

    size: pixels before. out: pixels after. start, end: the part of the line that is stretched to all of `out`, in pixels; the whole of it
    unless given. keep: first and last + 1 of the pixels after that are wanted; all of them unless given.
    """

    size: int
    out: int
    start: float = 0.0
    end: float | None = None
    keep: tuple[int, int] | None = None

    @property
    def part(self) -> tuple[float, float]:
        """Start and end, as Pillow holds them: rounded to float32."""
        return float(np.float32(self.start)), float(np.float32(self.size if self.end is None else self.end))

    @property
    def kept(self) -> tuple[int, int]:
        """`keep`, filled in."""
        return self.keep or (0, self.out)

    @property
    def is_identity(self) -> bool:
        """Whether Pillow leaves the line as it is, up to `keep`."""
        return self.out == self.size and self.part == (0.0, float(self.size))


class Resample:
    """uint8 (N, H, W, 3) -> uint8 (N, H', W', 3) on `device`, for one shape of images."""

    def __init__(self, rows: Line, columns: Line, method: Filter, device: torch.device, axes: tuple[int, int] | None = None) -> None:
        """axes: which comes first, 1 (down) or 2 (across); as the installed Pillow does it unless given."""
        lines = {_DOWN: rows, _ACROSS: columns}
        if axes is None:
            axes = (_ACROSS, _DOWN) if rows.is_identity or columns.is_identity else _order(rows, columns, method)
        self._passes = [_Pass(lines[axis], method, axis, device) for axis in axes if not lines[axis].is_identity]
        needed = {one.axis: one.needed for one in self._passes}  # the other pixels are not even looked at
        self._rows, self._columns = (needed.get(axis, slice(*line.kept)) for axis, line in lines.items())

    def __call__(self, images: Tensor) -> Tensor:
        images = images[:, self._rows, self._columns]
        for one in self._passes:
            images = one(images)
        return images


class _Pass:
    """One direction. needed: the part of the line that has any weight; the pass is given only that."""

    def __init__(self, line: Line, method: Filter, axis: int, device: torch.device) -> None:
        indices, weights = taps(line, method)
        self.axis = axis
        self.needed = slice(int(indices.min()), int(indices.max()) + 1)
        self._shape = indices.shape
        self._indices = torch.from_numpy((indices - self.needed.start).ravel()).to(device)
        self._weights = torch.from_numpy(weights).reshape(*weights.shape, *[1] * (3 - axis)).to(device)
        self._overshoots = bool((weights < 0).any())

    def __call__(self, images: Tensor) -> Tensor:
        gathered = images.index_select(self.axis, self._indices).unflatten(self.axis, self._shape)
        sums = (gathered * self._weights).sum(self.axis, dtype=torch.int32)
        sums.add_(_HALF).bitwise_right_shift_(_FRACTION_BITS)
        return (sums.clamp_(0, 255) if self._overshoots else sums).to(torch.uint8)


def taps(line: Line, method: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels every kept output reads, int64 (taps, kept), and their weights, int32 of the same shape; unused taps weigh 0.

    In float64 and in Pillow's order of operations, up to the last bit of a sine, which 22 bits do not show.
    """
    start, end = line.part
    step = float(np.float32(end - start)) / line.out
    stretch = max(step, 1.0)
    reach = _REACH[method] * stretch
    centres = start + (np.arange(*line.kept) + 0.5) * step
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)  # truncated, as in C
    last = np.minimum((centres + reach + 0.5).astype(np.int64), line.size)
    indices = first + np.arange((last - first).max())[:, None]
    weights = np.where(indices < last, _kernel((indices - centres + 0.5) * (1.0 / stretch), method), 0.0)
    total = np.cumsum(weights, axis=0)[-1]  # cumsum adds in order
    weights /= np.where(total == 0, 1.0, total)
    fixed = np.trunc(weights * (1 << _FRACTION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return np.minimum(indices, line.size - 1), fixed.astype(np.int32)


def _kernel(x: np.ndarray, method: Filter) -> np.ndarray:
    """The filter's weight at distance x, float64. One edge of the box belongs to it, the other does not; so it is with Lanczos."""
    distance = np.abs(x)
    if method == "box":
        return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)
    if method == "bilinear":
        return np.where(distance < 1, 1.0 - distance, 0.0)
    if method == "bicubic":
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0, 1.0, x) * np.pi
    return np.where(x == 0, 1.0, np.sin(angle) / angle)


@lru_cache(maxsize=64)
def _order(rows: Line, columns: Line, method: Filter) -> tuple[int, int]:
    """Which axis comes first. Old versions of Pillow start across, new ones choose by the sizes: the installed one is asked.

    Raises RuntimeError when its answer is neither, which means that this version computes something else.
    """
    image = np.random.default_rng(0).integers(0, 256, (rows.size, columns.size, 3), dtype=np.uint8)
    (top, bottom), (left, right) = rows.part, columns.part
    resized = Image.fromarray(image).resize((columns.out, rows.out), _PILLOW[method], box=(left, top, right, bottom))
    expected = torch.from_numpy(np.array(resized)[slice(*rows.kept), slice(*columns.kept)])
    for axes in ((_ACROSS, _DOWN), (_DOWN, _ACROSS)):
        if torch.equal(Resample(rows, columns, method, torch.device("cpu"), axes)(torch.from_numpy(image)[None])[0], expected):
            return axes
    sizes = f"{rows.size} x {columns.size} to {rows.out} x {columns.out}"
    raise RuntimeError(f"Pillow {PIL.__version__} resizes {sizes} ({method}) in a way that is unknown here; prepare images on the host")
