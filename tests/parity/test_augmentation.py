"""Training augmentation against the reference's recording of one image: every operation, then all of them."""

import numpy as np
import pytest
import torch

from vla_oft.data import augment_reference as reference


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity" / "pure_functions" / "image_augmentation.npz")


@pytest.fixture(scope="module")
def parameters(recorded):
    brightness, contrast, saturation, hue = (
        torch.tensor(recorded[f"random_{name}_param"])[None] for name in ("brightness", "contrast", "saturation", "hue")
    )
    boxes = torch.tensor(recorded["box_y1x1y2x2"])[None]
    return reference.Parameters(boxes=boxes, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


@pytest.mark.shared
def test_each_operation(recorded, parameters):
    """In 0..1; the recording holds every fourth pixel."""
    one, none = torch.ones(1), torch.zeros(1)
    pixels = reference.to_unit(torch.tensor(recorded["image_in"])[None])
    for name, operation in (
        ("resized_crop", lambda p: reference.crop_and_resize(p, parameters.boxes).clamp(0, 1)),
        ("brightness", lambda p: reference.adjust_brightness(p, parameters.brightness)),
        ("contrast", lambda p: reference.adjust_contrast(p, parameters.contrast)),
        ("saturation", lambda p: reference.adjust_saturation_and_hue(p, parameters.saturation, none)),
        ("hue", lambda p: reference.adjust_saturation_and_hue(p, one, parameters.hue)),
    ):
        before, pixels = pixels, operation(pixels)
        expected = recorded[f"after_random_{name}"]
        np.testing.assert_allclose(pixels[0].swapaxes(1, 2)[::4, ::4], expected, atol=1e-6, err_msg=name)
        assert (pixels - before).abs().max() > 1e-3, "the operation did something"


@pytest.mark.shared
def test_the_whole_augmentation(recorded, parameters):
    out = reference.augment(torch.tensor(recorded["image_in"])[None], parameters)[0].numpy()
    off = np.abs(out.astype(int) - recorded["image_out"])
    assert out.dtype == np.uint8 and off.max() <= 1 and (off > 0).mean() <= 2e-4
