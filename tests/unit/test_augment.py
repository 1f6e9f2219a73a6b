"""Augmentation: reproducible, per image, in range, and consistent with the evaluation crop."""

import numpy as np
import pytest
import torch

from vla_oft import images as reference
from vla_oft.data.augment import AugmentConfig, augment, crop_resize

PLAIN = AugmentConfig(crop_area=1.0, brightness=0, contrast=0, saturation=0, hue=0)


def photos(count: int = 6, size: int = 32) -> torch.Tensor:
    rows, columns = np.mgrid[:size, :size]
    base = np.stack([rows * 7 % 256, columns * 5 % 256, (rows + columns) * 3 % 256], -1)
    return torch.as_tensor(np.stack([(base + 9 * i) % 256 for i in range(count)]).astype(np.uint8))


def only(**strength: float) -> AugmentConfig:
    return AugmentConfig(**{"crop_area": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, **strength})


def run(images: torch.Tensor, config: AugmentConfig, seed: int = 0, masks: torch.Tensor | None = None):
    return augment(images, config, torch.Generator().manual_seed(seed), masks)


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    images = photos()
    first, again, other = (run(images, AugmentConfig(), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_strength_nothing_changes():
    images = photos()
    assert torch.equal(run(images, PLAIN)[0], images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shape_type_and_range_are_kept(dtype):
    images = photos(6).reshape(3, 2, 32, 32, 3).to(dtype)
    out, _ = run(images, AugmentConfig(brightness=0.9))
    assert out.shape == images.shape and out.dtype == dtype and out.min() >= 0 and out.max() <= 255


def test_every_image_has_its_own_parameters():
    same = photos(1).expand(4, 32, 32, 3)
    out, _ = run(same, AugmentConfig())
    assert len({image.numpy().tobytes() for image in out}) == 4


def test_brightness_adds_and_contrast_keeps_the_mean():
    gray = torch.full((50, 8, 8, 3), 100.0)
    shift = run(gray, only(brightness=0.2))[0] - gray
    assert shift.abs().max() <= 51 and shift.std(0).min() > 10 and shift.flatten(1).std(1).max() < 1e-3
    ramp = torch.linspace(60, 190, 64).reshape(1, 8, 8, 1).expand(50, 8, 8, 3)
    out, _ = run(ramp, only(contrast=0.2))
    torch.testing.assert_close(out.mean((1, 2, 3)), ramp.mean((1, 2, 3)), atol=0.1, rtol=0)
    assert 0.8 <= (out.std((1, 2, 3)) / ramp.std((1, 2, 3))).min() < (out.std((1, 2, 3)) / ramp.std((1, 2, 3))).max() <= 1.2


def test_saturation_and_hue_leave_gray_alone_and_keep_luma():
    gray = torch.full((20, 4, 4, 3), 90.0)
    torch.testing.assert_close(run(gray, only(saturation=0.2, hue=0.05))[0], gray, atol=0.1, rtol=0)
    colour = torch.tensor([120.0, 90.0, 60.0]).expand(20, 4, 4, 3)
    out, _ = run(colour, only(saturation=0.2, hue=0.05))
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(out @ luma, colour @ luma, atol=0.1, rtol=0)
    assert (out - colour).abs().max() > 5


def test_masks_are_cropped_with_their_image():
    images = torch.zeros(200, 64, 64, 3, dtype=torch.uint8)
    images[:, 24:32, 40:48] = 255
    masks = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    masks[:, 0, 3, 5] = 255
    out, moved = run(images, only(crop_area=0.9, shift=0.1), masks=masks)
    assert moved is not None and moved.shape == masks.shape and moved.dtype == torch.uint8
    grid = torch.arange(64) + 0.5

    def centre(weights: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        return (weights.double() * coordinates).sum((1, 2)) / weights.double().sum((1, 2))

    for axis in (0, 1):
        pixel = centre(out[..., 0], grid.reshape((-1, 1) if axis == 0 else (1, -1)))
        patch = centre(moved[:, 0], (8 * torch.arange(8) + 4.0).reshape((-1, 1) if axis == 0 else (1, -1)))
        assert (pixel - patch).abs().max() < 1.0


def test_a_random_crop_that_falls_on_the_centre_is_the_policys_central_crop():
    images, side = photos(3, 48), 0.9**0.5
    expected = np.stack([reference.center_crop(image, 0.9) for image in images.numpy()])
    centre = torch.tensor([[(1 - side) / 2, (1 - side) / 2, side]]).expand(3, 3)
    cropped = crop_resize(images.permute(0, 3, 1, 2).float(), centre).permute(0, 2, 3, 1)
    assert np.abs(cropped.round().numpy().astype(int) - expected).max() <= 1


def test_crops_stay_inside_the_image_unless_shifted():
    ramp = torch.arange(32.0).reshape(1, 1, 32, 1).expand(100, 32, 32, 3)
    out, _ = run(ramp, only(crop_area=0.9))
    width = out[:, 0, -1, 0] - out[:, 0, 0, 0]
    torch.testing.assert_close(width, torch.full_like(width, 31 * 0.9**0.5), atol=0.05, rtol=0)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="crop_area must be in"):
        AugmentConfig(crop_area=0)
    with pytest.raises(ValueError, match="hue must be in"):
        AugmentConfig(hue=-0.1)
