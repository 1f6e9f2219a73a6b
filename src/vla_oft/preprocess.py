"""Camera images to the pixels that the vision towers read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_oft.images import Filter, center_crop, resize
from vla_oft_client import Observation

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that turns a raw image into model input.

    crop_area: central share of the image that is kept at inference (0.9 when training used random crops of that area, 1.0 otherwise).
    dino_*, siglip_*: per-channel mean and standard deviation of each tower's pixels, in [0, 1] units.
    """

    image_size: int
    resize: Filter
    crop_area: float
    dino_mean: Triple = (0.485, 0.456, 0.406)
    dino_std: Triple = (0.229, 0.224, 0.225)
    siglip_mean: Triple = (0.5, 0.5, 0.5)
    siglip_std: Triple = (0.5, 0.5, 0.5)


def prepare_image(config: Config, image: np.ndarray) -> np.ndarray:
    """Raw uint8 (H, W, 3) -> uint8 (S, S, 3): resize, then central crop."""
    return center_crop(resize(image, config.image_size, config.resize), config.crop_area)


@dataclass(frozen=True)
class Preparation:
    """`prepare_image` of one configuration, as a dataset takes it: training then reads the pixels that inference reads.

    With random crops in training, give it the configuration with crop_area=1: they take the central crop's place.
    """

    config: Config

    @property
    def size(self) -> int:
        """Side of the square images, pixels."""
        return self.config.image_size

    @property
    def key(self) -> str:
        """Names everything that decides the pixels: two preparations with the same key give the same images."""
        return f"{self.config.image_size}-{self.config.resize}-{self.config.crop_area!r}"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Raw uint8 (H, W, 3) -> uint8 (S, S, 3)."""
        return prepare_image(self.config, image)


def prepare_images(config: Config, observation: Observation, cameras: tuple[str, ...]) -> np.ndarray:
    """All cameras of one observation in the policy's order -> uint8 (V, S, S, 3)."""
    return np.stack([prepare_image(config, observation.images[camera]) for camera in cameras])


def to_pixels(config: Config, images: Tensor) -> Tensor:
    """uint8 (B, V, S, S, 3) (or float in 0..255) -> float32 (B, V, 6, S, S): DINO-normalised channels, then SigLIP-normalised ones."""
    mean = images.new_tensor([*config.dino_mean, *config.siglip_mean], dtype=torch.float32)
    std = images.new_tensor([*config.dino_std, *config.siglip_std], dtype=torch.float32)
    channels = images.permute(0, 1, 4, 2, 3).float().repeat(1, 1, 2, 1, 1)
    return channels.sub_((255 * mean)[:, None, None]).div_((255 * std)[:, None, None])
