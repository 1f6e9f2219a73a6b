"""Camera images to the towers' pixels on the device: `preprocess.prepare_image`, to the bit, without the host.

    uint8 (B, H, W, 3) per camera  ->  cameras of one shape as one batch (N, H, W, 3)  ->  stages  ->  uint8 (B, V, S, S, 3)

Which stages there are, and all their tables, is decided once for the cameras' shapes. A call is a fixed sequence of tensor operations on
the device, so it can be part of a captured graph. Stages that would change nothing are left out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vla_oft import preprocess
from vla_oft.engine.jpeg import JpegRoundTrip
from vla_oft.engine.reference_resize import CenterCrop, Lanczos
from vla_oft.engine.resample import Line, Resample
from vla_oft.images import Filter

Stage = Callable[[Tensor], Tensor]
"""uint8 (N, H, W, 3) -> uint8 (N, H', W', 3)."""


class Pixels:
    """Prepares the images of all cameras of one policy; `shapes`: (H, W) of each camera, in the policy's order."""

    def __init__(self, config: preprocess.Config, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Raises ValueError for a crop area outside (0, 1] and for empty images."""
        if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise ValueError(f"shapes={list(shapes)} must name the height and width of at least one camera, in pixels")
        self.shapes = [(height, width) for height, width in shapes]
        self._groups = [(shape, self._cameras(shape), stages(config, *shape, device)) for shape in dict.fromkeys(self.shapes)]

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Per camera uint8 (B, H, W, 3) -> uint8 (B, V, S, S, 3); one camera's images that need nothing are returned, not copied.

        Raises ValueError for images of another shape or type.
        """
        self._check(images)
        prepared: list[Tensor] = [images[0]] * len(images)
        for shape, cameras, chain in self._groups:
            batch = torch.stack([images[c] for c in cameras], 1) if len(cameras) > 1 else images[cameras[0]].unsqueeze(1)
            group = batch.reshape(-1, *shape, 3)
            for stage in chain:
                group = stage(group)
            group = group.unflatten(0, batch.shape[:2])
            if len(self._groups) == 1:
                return group.contiguous()
            for camera, image in zip(cameras, group.unbind(1), strict=True):
                prepared[camera] = image
        return torch.stack(prepared, 1)

    def _cameras(self, shape: tuple[int, int]) -> list[int]:
        return [camera for camera, other in enumerate(self.shapes) if other == shape]

    def _check(self, images: Sequence[Tensor]) -> None:
        if len(images) != len(self.shapes):
            raise ValueError(f"{len(images)} images for {len(self.shapes)} cameras; give one batch of images for each camera")
        for camera, (image, shape) in enumerate(zip(images, self.shapes, strict=True)):
            if image.dtype != torch.uint8 or image.shape[1:] != (*shape, 3) or len(image) != len(images[0]):
                got, wanted = f"{image.dtype} {tuple(image.shape)}", (len(images[0]), *shape, 3)
                raise ValueError(f"images[{camera}] is {got}, expected torch.uint8 {wanted}; make another Pixels for other shapes")


def stages(config: preprocess.Config, height: int, width: int, device: torch.device) -> list[Stage]:
    """What `prepare_image` does with images of one shape, in its order."""
    if not 0 < config.crop_area <= 1:
        raise ValueError(f"crop area must be in (0, 1], got {config.crop_area}")
    camera, size = config.camera, config.image_size
    chain: list[Stage] = []
    if camera is None:
        chain += _fit(config, height, width, device)
        return chain if config.crop_area == 1.0 else [*chain, _center_crop(config.crop_area, size, device)]
    if camera.resize != "none" and (height, width) != (camera.size, camera.size):
        if camera.resize == "jpeg-lanczos":
            chain.append(JpegRoundTrip(height, width, device))
        chain.append(Lanczos(height, width, camera.size, device))
        height = width = camera.size
    if config.crop_area != 1.0:
        chain.append(CenterCrop(height, width, config.crop_area, camera.size, device))
        height = width = camera.size
    return chain + _fit(config, height, width, device)


def _center_crop(area: float, size: int, device: torch.device) -> Stage:
    """`images.center_crop` of square images."""
    start = (1 - area**0.5) / 2 * size
    line = Line(size=size, out=size, start=start, end=size - start)
    return Resample(line, line, "bilinear", device)


def _fit(config: preprocess.Config, height: int, width: int, device: torch.device) -> list[Stage]:
    """`images.fit_square`."""
    size = config.image_size
    if config.fit == "resize-naive":
        return _resize((height, width), (size, size), size, config.resize, device)
    chain: list[Stage] = []
    if config.fit == "letterbox" and height != width:
        top, left = ((max(height, width) - side) // 2 for side in (height, width))  # an odd remainder stays short, and is cut below
        if top or left:
            chain.append(_Frame(top, left, height, width, config.letterbox_fill, device))
            height, width = height + 2 * top, width + 2 * left
    shorter = min(height, width)
    return chain + _resize((height, width), (size * height // shorter, size * width // shorter), size, config.resize, device)


def _resize(before: tuple[int, int], after: tuple[int, int], size: int, method: Filter, device: torch.device) -> list[Stage]:
    """To (height, width) = `after`, of which only the middle (size, size) is computed."""
    if before == after == (size, size):
        return []
    if method == "box" and any(a % b for a, b in zip(before, after, strict=True)):
        method = "lanczos"
    rows, columns = (
        Line(size=b, out=a, keep=(round((a - size) / 2), round((a - size) / 2) + size)) for b, a in zip(before, after, strict=True)
    )
    return [Resample(rows, columns, method, device)]


class _Frame:
    """Bars of one colour above and below, or left and right, of uint8 (N, H, W, 3)."""

    def __init__(self, top: int, left: int, height: int, width: int, fill: tuple[int, int, int], device: torch.device) -> None:
        self._axis = 1 if top else 2
        shape = (1, top, width, 3) if top else (1, height, left, 3)
        self._bar = torch.tensor(fill, dtype=torch.uint8).expand(shape).contiguous().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        bar = self._bar.expand(len(images), -1, -1, -1)
        return torch.cat([bar, images, bar], self._axis)
