"""The reference's resizing of uint8 images on the device: what `images.lanczos3` and `images.crop_and_resize` do, to the bit.

Both compute in float32, where the order of operations decides the last bit, and smooth images are full of values that end in .5. Every
product and every sum is therefore an operation of its own, and taps are added one after another: neither `addcmul` and `lerp`, whose
kernels fuse the product into the sum, nor `torch.compile`, which would, nor `sum`, which adds in an order of its own choosing.
"""

import torch
from torch import Tensor

from vla_oft.images import crop_samples, lanczos_taps


class Lanczos:
    """uint8 (N, H, W, 3) -> uint8 (N, size, size, 3), as `images.lanczos3`."""

    def __init__(self, height: int, width: int, size: int, device: torch.device) -> None:
        self._rows, self._columns = (_weighted(*lanczos_taps(side, size), device) for side in (height, width))

    def __call__(self, images: Tensor) -> Tensor:
        indices, weights = self._rows
        rows = _sum_in_order(images.index_select(1, indices).unflatten(1, weights.shape) * weights[..., None, None], 1)
        indices, weights = self._columns
        pixels = _sum_in_order(rows.index_select(2, indices).unflatten(2, weights.shape).mul_(weights[..., None]), 2)
        return pixels.round_().clamp_(0, 255).to(torch.uint8)  # round half to even, as rint


class CenterCrop:
    """uint8 (N, H, W, 3) -> uint8 (N, size, size, 3), as `images.crop_and_resize`."""

    def __init__(self, height: int, width: int, area: float, size: int, device: torch.device) -> None:
        self._rows, self._columns = (_between(side, size, area, device) for side in (height, width))
        self._unit = torch.tensor([1 / 255], dtype=torch.float32, device=device)
        self._size = size

    def __call__(self, images: Tensor) -> Tensor:
        indices, share = self._columns
        ends = (images.index_select(2, indices) * self._unit).unflatten(2, (2, self._size))
        pixels = (ends[:, :, 1] - ends[:, :, 0]).mul_(share[:, None]).add_(ends[:, :, 0])
        indices, share = self._rows
        ends = pixels.index_select(1, indices).unflatten(1, (2, self._size))
        pixels = (ends[:, 1] - ends[:, 0]).mul_(share[:, None, None]).add_(ends[:, 0])
        return pixels.clamp_(0, 1).mul_(255.5).to(torch.uint8)  # truncated


def _sum_in_order(terms: Tensor, axis: int) -> Tensor:
    first, *others = terms.unbind(axis)
    if not others:
        return first.clone()
    total = first + others[0]
    for term in others[1:]:
        total += term
    return total


def _weighted(indices, weights, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices int64 (taps * size,), weights float32 (taps, size)."""
    return torch.tensor(indices.ravel(), device=device), torch.tensor(weights[:, :, 0], device=device)


def _between(side: int, size: int, area: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both neighbours of every output, int64 (2 * size,), the former ones first, and how far it lies between them, float32 (size,)."""
    before, after, share = (torch.tensor(values) for values in crop_samples(side, size, area))
    return torch.cat([before, after]).to(device), share.to(device)
