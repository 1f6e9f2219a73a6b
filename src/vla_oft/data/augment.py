"""Image augmentation for training, vectorised over a batch with its own parameters for every image.

    crop (a random square of 90 % of the area, resized back) -> brightness, contrast, saturation, hue

`method="fast"`: the colour operations are linear in RGB, so they compose into ONE 3 x 3 matrix and offset per image and cost one
multiplication: saturation mixes with luma, hue rotates in YIQ. `method="reference"`: the reference computes both in HSV, clips after each
operation and crops corner-aligned (`augment_reference`). The same strengths, not the same bits. On one core, 1.5 against 1.8 ms for an
image of 224 pixels, 0.5 against 0.6 ms for one of 128.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.data import augment_reference
from vla_oft.data.random_numbers import Draws
from vla_oft.transfer import sent

_LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The reference's training augmentation by default.

    crop_area: share of the image that a random crop keeps, 1.0 for no crop; evaluation uses the central crop of the same area.
    shift: further random displacement, as a share of the image side (edge pixels are repeated). brightness: added, of full scale.
    contrast, saturation: factors are drawn from 1 - x .. 1 + x. hue: share of a full turn, in both directions.
    method: see above. The reference's crops lie on the image's diagonal: it draws top and left with the same seed.
    """

    method: Literal["fast", "reference"] = "fast"
    crop_area: float = 0.9
    shift: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area must be in (0, 1], got {self.crop_area}")
        for name in ("shift", "brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.method == "reference" and self.shift:
            raise ValueError(f"the reference has no shift: shift={self.shift} needs method='fast'")


def augment(images: Tensor, config: AugmentConfig, draws: Draws, masks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Augment images (..., H, W, 3), uint8 or float in 0..255, each on its own; same shape and dtype.

    masks (..., C, P, P), one stack for each image (grounding), are cropped along, same dtype; None stays None.
    draws: for as many images; the same on every device.
    """
    flat = images.reshape(-1, *images.shape[-3:])
    if config.method == "reference":
        parameters = sample_parameters(config, draws, images.device)
        if masks is not None and parameters.boxes is not None:
            masks = crop_masks(masks, corner_aligned(parameters.boxes, *flat.shape[1:3]))
        return augment_reference.augment(flat, parameters).reshape(images.shape), masks
    boxes = sent(sample_boxes(config, draws), images.device)
    brightness, contrast, matrix = (sent(p, images.device) for p in sample_colours(config, draws))
    pixels = flat.permute(0, 3, 1, 2).contiguous().float()  # moving bytes is cheaper than moving floats
    if config.crop_area < 1 or config.shift:
        pixels = crop_resize(pixels, boxes)
        if masks is not None:
            masks = crop_masks(masks, boxes)
    # contrast c about the mean m, after adding b:  c (x + b - m - b) + m + b  =  c x + (1 - c) m + b;  then the colour matrix
    offset = (1 - contrast) * pixels.mean((2, 3)) + 255 * brightness
    pixels = torch.baddbmm((matrix @ offset[:, :, None]), matrix * contrast[:, :, None], pixels.flatten(2))
    pixels = _to_dtype(pixels.clamp_(0, 255), images.dtype).reshape(flat.shape[0], 3, *flat.shape[1:3])
    return torch.stack(pixels.unbind(1), dim=-1).reshape(images.shape), masks


def sample_parameters(config: AugmentConfig, draws: Draws, device: torch.device | None = None) -> augment_reference.Parameters:
    """Random parameters of the reference's operations for every image. device: where they are used; the CPU by default."""
    device, boxes = device or torch.device("cpu"), None
    if config.crop_area < 1:
        side = torch.tensor(config.crop_area).sqrt()
        corner = draws.uniform(1) * (1 - side)  # one number for top and left, as in the reference
        boxes = sent(torch.cat([corner, corner, corner + side, corner + side], dim=1), device)
    brightness, contrast, saturation, hue = sent(2 * draws.uniform(4).T - 1, device)
    return augment_reference.Parameters(
        boxes=boxes,
        brightness=config.brightness * brightness,
        contrast=1 + config.contrast * contrast,
        saturation=1 + config.saturation * saturation,
        hue=config.hue * hue,
    )


def sample_boxes(config: AugmentConfig, draws: Draws) -> Tensor:
    """Random squares (images, 3): top, left, side, as shares of the image."""
    side = config.crop_area**0.5
    corner = draws.uniform(2) * (1 - side)
    corner += (2 * draws.uniform(2) - 1) * config.shift
    return torch.cat([corner, torch.full((len(corner), 1), side)], dim=1)


def sample_colours(config: AugmentConfig, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Random brightness (images, 1), contrast factor (images, 1), and the RGB matrix (images, 3, 3) of saturation and hue."""
    uniform = 2 * draws.uniform(4).T[:, :, None] - 1
    count = uniform.shape[1]
    brightness, contrast = config.brightness * uniform[0], 1 + config.contrast * uniform[1]
    saturation = (1 + config.saturation * uniform[2])[:, :, None]
    angle = 2 * math.pi * config.hue * uniform[3, :, 0]
    to_yiq = torch.tensor(_RGB_TO_YIQ)
    rotation = torch.zeros(count, 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    gray = torch.tensor(_LUMA).expand(3, 3)
    saturate = saturation * torch.eye(3) + (1 - saturation) * gray
    return brightness, contrast, torch.linalg.inv(to_yiq) @ rotation @ to_yiq @ saturate


def crop_masks(masks: Tensor, boxes: Tensor) -> Tensor:
    """Cut boxes (N, 3) out of masks (..., C, P, P), of which there are N stacks, and resize them back; same dtype."""
    return _to_dtype(crop_resize(masks.reshape(-1, *masks.shape[-3:]).float(), boxes), masks.dtype).reshape(masks.shape)


def corner_aligned(boxes: Tensor, height: int, width: int) -> Tensor:
    """Squares (N, 3) of the image's area from corner-aligned boxes (N, 4), which are measured between the outer pixels' centres.

    Pixel i of n has its centre at i + 1/2 of n, or at i of n - 1 in the latter units.
    """
    top, left, bottom, _ = boxes.unbind(1)
    side = bottom - top
    return torch.stack([(start * (n - 1) + 0.5 * (1 - side)) / n for start, n in ((top, height), (left, width))] + [side], dim=1)


def crop_resize(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Cut boxes (N, 3) out of (N, C, H, W) and resize them back, bilinear, pixel centres at halves, edges repeated."""
    count, _, height, width = pixels.shape
    top, left, side = boxes.unbind(1)
    grid = pixels.new_empty(count, height, width, 2)  # in [-1, 1] across the image; much faster than affine_grid on a CPU
    for axis, (start, size) in enumerate(((left, width), (top, height))):
        centres = (torch.arange(size, device=pixels.device) + 0.5) / size
        line = 2 * (start[:, None] + side[:, None] * centres) - 1
        grid[..., axis] = line[:, None, :] if axis == 0 else line[:, :, None]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype.is_floating_point else values.round().to(dtype)
