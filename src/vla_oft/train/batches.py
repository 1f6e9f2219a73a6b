"""From samples to what the policy reads, in two stages: the first runs beside the training, the second where the policy is.

loader (background, CPU)          uint8 images, token ids      bytes: an eighth of the pixels that become of them
device (GPU, or again the loader) augmented, normalised, float
"""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vla_oft import preprocess
from vla_oft.data.augment import AugmentConfig, augment
from vla_oft.data.chunks import Samples
from vla_oft.data.random_numbers import Draws
from vla_oft.policy import Batch, Policy

Fields = TypeVar("Fields", bound="Examples | Batch")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A batch before its images are augmented and normalised.

    images: uint8 (B, V, size, size, 3). seeds: uint64 (B,), of the augmentation. The rest is as in `Batch`.
    """

    images: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor | None
    state: Tensor | None
    actions: Tensor
    valid: Tensor
    grounding: Tensor | None
    landmarks: Tensor | None
    seeds: np.ndarray

    @property
    def num_valid(self) -> int:
        """Chunk steps that count, before they leave the host."""
        return int(self.valid.sum())

    def seen(self, pixels: Tensor, grounding: Tensor | None = None) -> Batch:
        """The batch with these pixels, float (B, V, 6, size, size), and masks."""
        return Batch(
            pixels=pixels,
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            state=self.state,
            actions=self.actions,
            valid=self.valid,
            grounding=grounding,
            landmarks=self.landmarks,
        )


class Collate:
    """Samples to `Examples`: prompts encoded, images as they are."""

    def __init__(self, policy: Policy) -> None:
        self.encode = policy.encode_prompts

    def __call__(self, samples: Samples) -> Examples:
        ids, mask = self.encode(list(samples.instructions))
        return Examples(
            images=torch.from_numpy(np.ascontiguousarray(samples.images)),
            prompt_ids=torch.from_numpy(ids),
            prompt_mask=None if mask.all() else torch.from_numpy(mask),
            state=None if samples.state is None else torch.from_numpy(samples.state),
            actions=torch.from_numpy(samples.actions),
            valid=torch.from_numpy(samples.valid),
            grounding=None if samples.grounding is None else torch.from_numpy(samples.grounding),
            landmarks=None if samples.landmarks is None else torch.from_numpy(samples.landmarks),
            seeds=samples.seeds,
        )


class Finish:
    """`Examples` to a `Batch` on the device where they are. augmentation None for images as they are."""

    def __init__(self, policy: Policy, augmentation: AugmentConfig | None) -> None:
        self.preprocess, self.augmentation = policy.config.preprocess, augmentation

    def __call__(self, examples: Examples) -> Batch:
        images, masks = examples.images, examples.grounding
        if self.augmentation is not None:
            images, masks = augment(images, self.augmentation, Draws(examples.seeds, images.shape[1]), masks)
        return examples.seen(preprocess.to_pixels(self.preprocess, images), masks)


class Both:
    """Both stages in the loader: for a policy on the CPU, so that images are augmented while it trains."""

    def __init__(self, collate: Collate, finish: Finish) -> None:
        self.collate, self.finish = collate, finish

    def __call__(self, samples: Samples) -> Batch:
        return self.finish(self.collate(samples))


def to_device(batch: Fields, device: torch.device) -> Fields:
    """The same on `device`. To a GPU it travels from pinned memory, while the host goes on."""
    if device.type == "cpu":
        return batch
    tensors = {f.name: value for f in dataclasses.fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    pinned = {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in tensors.items()}
    return dataclasses.replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()})
