"""The reference's image augmentation, operation by operation, in float32 in 0..1, with TensorFlow's meaning of each.

    crop (corner-aligned) -> brightness -> contrast -> saturation -> hue        each clipped to 0..1; uint8 at the end, truncated

`vla_oft.data.augment` draws the parameters and offers the cheap variant of the same thing. Images are (N, H, 3, W) in here: rows of one
colour are contiguous, and so is what a crop copies. Checked against recordings in `tests/parity/test_augmentation.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP_PIXELS = 224 * 224  # worked on at once: one large image stays in the cache, which makes it three times as fast as a whole batch


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What happens to N images, float32.

    boxes: (N, 4) top, left, bottom, right as shares of the steps between the outer pixels' centres; None leaves images whole.
    brightness: (N,) added. contrast, saturation: (N,) factors. hue: (N,) share of a full turn, added.
    """

    boxes: Tensor | None
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor


def augment(images: Tensor, parameters: Parameters) -> Tensor:
    """Images (N, H, W, 3), uint8 or float in 0..255 -> the same shape and dtype."""
    out = torch.empty_like(images)
    group = max(1, _GROUP_PIXELS // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), group):
        part = slice(start, start + group)
        pixels = to_unit(images[part])
        if parameters.boxes is not None:
            pixels = crop_and_resize(pixels, parameters.boxes[part]).clamp_(0, 1)
        pixels = adjust_brightness(pixels, parameters.brightness[part])
        pixels = adjust_contrast(pixels, parameters.contrast[part])
        pixels = adjust_saturation_and_hue(pixels, parameters.saturation[part], parameters.hue[part])
        out[part] = from_unit(pixels, images.dtype)
    return out


def to_unit(images: Tensor) -> Tensor:
    """(N, H, W, 3) in 0..255 -> float32 (N, H, 3, W) in 0..1."""
    return images.transpose(2, 3).contiguous().float().mul_(1 / 255)


def from_unit(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: integers are truncated at 255.5 times the value, as TensorFlow converts."""
    pixels = (pixels * (255 if dtype.is_floating_point else 255.5)).to(dtype)
    return torch.stack(pixels.unbind(2), dim=-1)


def crop_and_resize(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Cut boxes (N, 4) out of (N, H, 3, W) and resize them back: bilinear, corner-aligned."""
    pixels = _stretch(pixels.transpose(1, 3).contiguous(), boxes[:, 1], boxes[:, 3])  # first along W, as TensorFlow adds
    return _stretch(pixels.transpose(1, 3).contiguous(), boxes[:, 0], boxes[:, 2])


def adjust_brightness(pixels: Tensor, delta: Tensor) -> Tensor:
    """Add delta (N,)."""
    return (pixels + _per_image(delta)).clamp_(0, 1)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each colour's mean over the image by factor (N,)."""
    mean = pixels.mean((1, 3), keepdim=True)
    return (pixels - mean).mul_(_per_image(factor)).add_(mean).clamp_(0, 1)


def adjust_saturation_and_hue(pixels: Tensor, factor: Tensor, turn: Tensor) -> Tensor:
    """In HSV: saturation times factor (N,), at most 1; then hue plus turn (N,), in full turns. The value, max(R, G, B), stays.

    Two of the reference's operations at once: saturation leaves the hue alone, and hue leaves the range max - min alone, so that
    range = saturation * value carries over.
    """
    red, green, blue = pixels.unbind(2)
    factor, turn = factor[:, None, None], turn[:, None, None]
    value = pixels.amax(2)
    spread = value - pixels.amin(2)
    sextant = torch.where(  # 0 red, 2 green, 4 blue
        red == value, green - blue, torch.where(green == value, blue - red + 2 * spread, red - green + 4 * spread)
    )
    sextant = (sextant / spread.clamp(min=torch.finfo(spread.dtype).tiny)).add_(6 * turn).remainder_(6)
    spread = torch.minimum(spread * factor, value)
    shares = ((sextant - 3).abs_() - 1, 2 - (sextant - 2).abs_(), 2 - (sextant - 4).abs_())
    return torch.stack([value - spread * (1 - share.clamp_(0, 1)) for share in shares], dim=2).clamp_(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _stretch(lines: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Resample the first spatial dimension of (N, L, ...): L positions from `start` to `end` (N,), as shares of L - 1 steps."""
    count, length = lines.shape[:2]
    scale = (end - start) * (length - 1) / max(length - 1, 1)
    positions = (start * (length - 1))[:, None] + torch.arange(length, device=lines.device, dtype=scale.dtype) * scale[:, None]
    before = positions.floor().clamp_(0, length - 1)
    share = (positions - before).reshape(count, length, *[1] * (lines.dim() - 2))
    flat = lines.flatten(0, 1)  # picking whole lines is a copy of memory
    offset = length * torch.arange(count, device=lines.device)[:, None]

    def pick(index: Tensor) -> Tensor:
        return flat.index_select(0, (index.long() + offset).flatten()).reshape(lines.shape)

    first = pick(before)
    return pick(positions.ceil().clamp_(0, length - 1)).sub_(first).mul_(share).add_(first)
