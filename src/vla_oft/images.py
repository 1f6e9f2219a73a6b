"""Resizing and cropping of uint8 camera images, the same for training and inference.

Two families. Pillow's: fast, good, used by policies trained here. And the reference's, for imported checkpoints, which TensorFlow prepared:

    jpeg_round_trip -> lanczos3                    a camera image to 224 x 224
    crop_and_resize                                its central part, corner-aligned
    fit_square                                     what the checkpoint's image processor did (Pillow again)

These follow TensorFlow's order of float32 operations, because smooth images are full of values that end in .5: rounded the other way, they
make another picture. Checked against recordings of the reference in `tests/parity/test_images.py`.
"""

import ctypes
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

Filter = Literal["box", "bicubic", "lanczos"]
Fit = Literal["resize-naive", "letterbox", "resize-crop"]
"""How an image becomes a square: squeezed, padded, or cut. The names are those of the reference's `preprocessor_config.json`."""

_FILTERS = {"box": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
_JPEG_QUALITY = 95
_LANCZOS_RADIUS = np.float32(3)
_PI = np.float32(np.pi)


def resize(image: np.ndarray, size: int, method: Filter = "box", fast: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3), antialiased; the aspect ratio is not kept, as in the reference.

    `box` averages whole pixels: exact and fast for integer ratios, and used for those only.
    fast: the same filter through torch's vectorised kernels. One value in 200 differs from Pillow's, by one level; five to seven times as
    fast (256 to 224 pixels, lanczos: 0.21 against 1.39 ms on one core). Pillow's for enlarging, and where this torch lacks the filter.
    """
    return _resize(image, size, size, method, fast)


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


def fit_square(image: np.ndarray, size: int, fit: Fit, method: Filter, fill: tuple[int, int, int], fast: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3), as the reference's image processor does it with `method="bicubic"`.

    `resize-naive` squeezes the whole image; `letterbox` first pads it to a square with the colour `fill`; `resize-crop` brings the shorter
    side to `size` and keeps the middle of the longer one. fast: see `resize`.
    """
    if fit == "resize-naive":
        return resize(image, size, method, fast)
    height, width = image.shape[:2]
    if fit == "letterbox":
        top, left = (max(height, width) - height) // 2, (max(height, width) - width) // 2  # an odd remainder stays short, and is cut below
        padded = np.empty((height + 2 * top, width + 2 * left, 3), np.uint8)
        padded[:] = fill
        padded[top : top + height, left : left + width] = image
        image, (height, width) = padded, padded.shape[:2]
    shorter = min(height, width)
    image = _resize(image, size * height // shorter, size * width // shorter, method, fast)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same shape after JPEG compression at quality 95, 4:2:0.

    The reference compresses camera images because its training data were JPEG files. Pillow's encoder writes what TensorFlow's does; its
    decoder does not (exact integer DCT where TensorFlow takes the fast one: up to 12 levels apart), simplejpeg's does.
    Raises ImportError when simplejpeg is not installed.
    """
    try:
        import simplejpeg
    except ImportError:
        raise ImportError("this policy's images go through JPEG, which needs the package simplejpeg: pip install simplejpeg") from None
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0")
    return simplejpeg.decode_jpeg(buffer.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False)


def lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): antialiased Lanczos in float32, rounded ONCE, half to even.

    As in TensorFlow: first the rows, then the columns, each output the sum of its taps from the first to the last. Adding them up one tap
    at a time for a whole image costs no more than a matrix product with mostly zeros (1.4 ms for 256 to 224 pixels) and keeps that order.
    """
    pixels = _lanczos3(image, size)
    np.clip(np.rint(pixels, out=pixels), 0, 255, out=pixels)
    return np.ascontiguousarray(pixels.astype(np.uint8).swapaxes(0, 1))


def crop_and_resize(image: np.ndarray, area: float, size: int) -> np.ndarray:
    """The central part of uint8 (H, W, 3) that holds `area` of it -> uint8 (size, size, 3), as TensorFlow's crop_and_resize.

    Unlike `center_crop`, corner-aligned: the outer pixel CENTRES of the result lie on the outer edges of the box, which is measured in
    steps between pixel centres. Bilinear in float32; the result is truncated at 255.5 times the value in 0..1, not rounded.
    """
    if not 0 < area <= 1:
        raise ValueError(f"crop area must be in (0, 1], got {area}")
    pixels = _crop_and_resize(image, area, size)
    np.clip(pixels, 0, 1, out=pixels)
    pixels *= np.float32(255.5)
    return pixels.astype(np.uint8)


def _resize(image: np.ndarray, height: int, width: int, method: Filter, fast: bool = False) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    if method == "box" and (image.shape[0] % height or image.shape[1] % width):
        method = "lanczos"
    if fast and height <= image.shape[0] and width <= image.shape[1] and method in _torch_filters():
        return _resize_with_torch(image, height, width, method)
    return np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[method]))


def _resize_with_torch(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    import torch

    # with the batch added BEFORE the permutation, torch sees that colours lie together, and answers in that order, too: twice as fast
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode=method, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


@lru_cache(maxsize=1)
def _torch_filters() -> frozenset[str]:
    """The filters that this torch has for bytes on a CPU: lanczos came late."""
    import torch

    found = set()
    for method in ("bicubic", "lanczos"):
        try:
            torch.nn.functional.interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode=method, antialias=True)
            found.add(method)
        except (NotImplementedError, ValueError, RuntimeError):
            continue
    return frozenset(found)


def _lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (size, size, 3) in 0..255 with a little overshoot, TRANSPOSED: columns first."""
    height, width = image.shape[:2]
    rows = _weighted_rows(image.astype(np.float32).reshape(height, -1), *lanczos_taps(height, size))
    columns = np.ascontiguousarray(rows.reshape(size, width, 3).swapaxes(0, 1)).reshape(width, -1)
    return _weighted_rows(columns, *lanczos_taps(width, size)).reshape(size, size, 3)


@lru_cache(maxsize=64)
def lanczos_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which inputs every output reads, int64 (taps, size_out), and their weights, float32 (taps, size_out, 1); unused taps weigh 0.

    The kernel sinc(x) sinc(x / 3), stretched when shrinking. In float32 throughout, in TensorFlow's order of operations: positions of
    float64 would be 1e-5 pixels elsewhere, which is enough to round another way.
    """
    step = np.float32(1) / (np.float32(size_out) / np.float32(size_in))
    stretch = max(step, np.float32(1))
    reach = _LANCZOS_RADIUS * stretch
    half = np.float32(0.5)
    centres = (np.arange(size_out, dtype=np.float32) + half) * step
    first = np.maximum(np.ceil(centres - reach - half), 0).astype(np.int64)
    last = np.minimum(np.floor(centres + reach - half), size_in - 1).astype(np.int64)
    taps = first + np.arange((last - first).max() + 1)[:, None]
    x = np.abs((taps.astype(np.float32) + half - centres) * (np.float32(1) / stretch))
    near = x <= np.float32(1e-3)
    safe = np.where(near, np.float32(1), x)
    lobes = _LANCZOS_RADIUS * _sin(_PI * safe) * _sin(_PI * safe / _LANCZOS_RADIUS) / (_PI * _PI * safe * safe)
    weights = np.where(near, np.float32(1), lobes)
    weights[(taps > last) | (x > _LANCZOS_RADIUS)] = 0
    weights *= np.float32(1) / np.cumsum(weights, axis=0)[-1]  # cumsum adds in order
    indices, weights = np.minimum(taps, size_in - 1), weights[:, :, None]
    indices.flags.writeable = weights.flags.writeable = False  # they are shared
    return indices, weights


def _sin(x: np.ndarray) -> np.ndarray:
    """Sine of float32 as the C library computes it, because TensorFlow calls that: one result in eighty is not the nearest float32.

    Without glibc, the nearest: a few weights then differ in their last bit, which shows in one value of a thousand of a perfect ramp.
    """
    sine = _c_library_sine()
    if sine is None:
        return np.sin(x.astype(np.float64)).astype(np.float32)
    return np.array([sine(value) for value in x.ravel().tolist()], np.float32).reshape(x.shape)


@lru_cache(maxsize=1)
def _c_library_sine() -> Callable[[float], float] | None:
    try:
        sine = ctypes.CDLL("libm.so.6").sinf
    except OSError:
        return None
    sine.argtypes, sine.restype = [ctypes.c_float], ctypes.c_float
    return sine


def _weighted_rows(pixels: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 (N, M), indices (taps, size), weights (taps, size, 1) -> float32 (size, M); taps are added in order, without fusing."""
    out = pixels[indices[0]]
    out *= weights[0]
    tap = np.empty_like(out)
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        np.take(pixels, index, axis=0, out=tap, mode="clip")  # "raise" would copy; all indices are in range
        tap *= weight
        out += tap
    return out


def _crop_and_resize(image: np.ndarray, area: float, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (size, size, 3) in 0..1."""
    pixels = image.astype(np.float32)
    pixels *= np.float32(1 / 255)
    for axis in (1, 0):  # across first, as TensorFlow does
        before, after, share = crop_samples(image.shape[axis], size, area)
        start, pixels = np.take(pixels, before, axis), np.take(pixels, after, axis)
        pixels -= start
        pixels *= share[:, None] if axis else share[:, None, None]
        pixels += start
    return pixels


@lru_cache(maxsize=64)
def crop_samples(size_in: int, size_out: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which two inputs every output lies, int64 (size_out,) each, and how far along, float32 (size_out,)."""
    side = np.sqrt(np.float32(area))
    low = (np.float32(1) - side) / np.float32(2)
    steps = np.float32(size_in - 1)
    scale = (low + side - low) * steps / np.float32(max(size_out - 1, 1))
    positions = low * steps + np.arange(size_out, dtype=np.float32) * scale
    before = np.minimum(np.floor(positions), steps)
    return before.astype(np.int64), np.minimum(np.ceil(positions), steps).astype(np.int64), positions - before
