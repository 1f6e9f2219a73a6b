"""Augmentation: reproducible, per image, in range, and consistent with the evaluation crop."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch

from vla_oft import images as reference
from vla_oft.data import augment_reference
from vla_oft.data.augment import AugmentConfig, augment, crop_resize, sample_parameters
from vla_oft.data.random_numbers import Draws, seeds_of

METHODS = ["fast", "reference"]
PLAIN = AugmentConfig(crop_area=1.0, brightness=0, contrast=0, saturation=0, hue=0)


def photos(count: int = 6, size: int = 32) -> torch.Tensor:
    rows, columns = np.mgrid[:size, :size]
    base = np.stack([rows * 7 % 256, columns * 5 % 256, (rows + columns) * 3 % 256], -1)
    return torch.as_tensor(np.stack([(base + 9 * i) % 256 for i in range(count)]).astype(np.uint8))


def only(**changes) -> AugmentConfig:
    return dataclasses.replace(PLAIN, **changes)


def run(images: torch.Tensor, config: AugmentConfig, seed: int = 0, masks: torch.Tensor | None = None):
    count = images[..., 0, 0, 0].numel()
    return augment(images, config, Draws(seeds_of(seed, np.arange(count))), masks)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_images_and_another_seed_others(method):
    images = photos()
    first, again, other = (run(images, AugmentConfig(method=method), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("method", METHODS)
def test_without_strength_nothing_changes(method):
    images = photos()
    assert torch.equal(run(images, dataclasses.replace(PLAIN, method=method))[0], images)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shape_type_and_range_are_kept(dtype, method):
    images = photos(6).reshape(3, 2, 32, 32, 3).to(dtype)
    out, _ = run(images, AugmentConfig(brightness=0.9, method=method))
    assert out.shape == images.shape and out.dtype == dtype and out.min() >= 0 and out.max() <= 255


@pytest.mark.parametrize("method", METHODS)
def test_every_image_has_its_own_parameters(method):
    same = photos(1).expand(4, 32, 32, 3)
    out, _ = run(same, AugmentConfig(method=method))
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


@pytest.mark.parametrize("config", [only(crop_area=0.9, shift=0.1), only(crop_area=0.6, method="reference")])
def test_masks_are_cropped_with_their_image(config):
    images = torch.zeros(200, 64, 64, 3, dtype=torch.uint8)
    images[:, 24:32, 40:48] = 255
    masks = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    masks[:, 0, 3, 5] = 255
    out, moved = run(images, config, masks=masks)
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
    with pytest.raises(ValueError, match="the reference has no shift"):
        AugmentConfig(method="reference", shift=0.1)


def given(**changes: float) -> augment_reference.Parameters:
    """One image's parameters, neutral but for `changes`."""
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, **changes}
    return augment_reference.Parameters(boxes=None, **{name: torch.tensor([value]) for name, value in neutral.items()})


def test_the_references_parameters_have_their_ranges_and_its_diagonal_crops():
    drawn = sample_parameters(AugmentConfig(), Draws(seeds_of(0, np.arange(4000))))
    assert drawn.boxes is not None
    top, left, bottom, right = drawn.boxes.unbind(1)
    assert torch.equal(top, left) and torch.equal(bottom, right), "one seed for both"
    torch.testing.assert_close(bottom - top, torch.full_like(top, 0.9**0.5))
    for values, low, high in (
        (top, 0.0, 1 - 0.9**0.5),
        (drawn.brightness, -0.2, 0.2),
        (drawn.contrast, 0.8, 1.2),
        (drawn.saturation, 0.8, 1.2),
        (drawn.hue, -0.05, 0.05),
    ):
        span = high - low
        assert low <= values.min() < low + 0.01 * span and high - 0.01 * span < values.max() <= high
    assert sample_parameters(PLAIN, Draws(seeds_of(0, np.arange(3)))).boxes is None


@pytest.mark.parametrize(("saturation", "hue"), [(0.3, 0.0), (1.9, 0.0), (1.0, 0.05), (1.0, -0.4), (1.2, 0.9)])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    colours = np.array([[0, 0, 0], [255, 255, 255], [80, 80, 80], [255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 240, 3], [9, 200, 201]])
    colours = np.concatenate([colours, np.random.default_rng(0).integers(0, 256, (56, 3))])
    image = torch.tensor(colours.reshape(1, 8, 8, 3), dtype=torch.float32)
    out = augment_reference.augment(image, given(saturation=saturation, hue=hue)).reshape(-1, 3).numpy()
    for colour, got in zip(colours, out, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*colour / 255)
        np.testing.assert_allclose(got, 255 * np.array(colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)), atol=1e-3)


def test_the_reference_clips_after_every_operation():
    image = torch.full((1, 4, 4, 3), 250.0)
    image[0, :2] = 200.0
    out = augment_reference.augment(image, given(brightness=0.2, contrast=0.5))
    mean = (251 + 255) / 2  # not of 251 and 301
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([mean - 1, mean - 1, mean + 1, mean + 1]), atol=1e-3, rtol=0)


def test_the_references_random_crop_that_falls_on_the_centre_is_its_central_crop():
    images, side = photos(3, 48), torch.tensor(0.9).sqrt()
    low = (1 - side) / 2
    boxes = torch.stack([low, low, low + side, low + side]).expand(3, 4)
    neutral = {name: getattr(given(), name).expand(3) for name in ("brightness", "contrast", "saturation", "hue")}
    out = augment_reference.augment(images, augment_reference.Parameters(boxes=boxes, **neutral))
    expected = np.stack([reference.crop_and_resize(image, 0.9, 48) for image in images.numpy()])
    off = np.abs(out.numpy().astype(int) - expected)
    assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_an_image_is_augmented_alike_in_any_batch():
    images = photos(5, 160)  # more than fit into one group
    drawn = sample_parameters(AugmentConfig(), Draws(seeds_of(0, np.arange(5))))
    whole = augment_reference.augment(images, drawn)
    for i in range(5):
        single = augment_reference.Parameters(**{f.name: getattr(drawn, f.name)[i : i + 1] for f in dataclasses.fields(drawn)})
        assert torch.equal(augment_reference.augment(images[i : i + 1], single)[0], whole[i])


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_augmented_alike_in_any_batch_and_its_cameras_differ(method):
    images = photos(1).expand(6, 2, 32, 32, 3)
    seeds = seeds_of(7, np.arange(6))
    whole, _ = augment(images, AugmentConfig(method=method), Draws(seeds, 2))
    part, _ = augment(images[3:5], AugmentConfig(method=method), Draws(seeds[3:5], 2))
    assert torch.equal(whole[3:5], part)
    assert len({image.numpy().tobytes() for image in whole.flatten(0, 1)}) == 12


def test_draws_are_uniform_and_independent():
    numbers = Draws(seeds_of(0, np.arange(20_000)), 2).uniform(3).numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, 16, (0, 1))[0] / numbers.size, 1 / 16, atol=1.5e-3)
    neighbours = np.concatenate([numbers[:-1], numbers[1:]], axis=1)  # of both cameras, of samples in a row
    assert np.abs(np.corrcoef(neighbours.T) - np.eye(6))[np.triu_indices(6, 1)].max() < 0.02
