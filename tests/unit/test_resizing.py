"""The reference's image operations where nothing was recorded: odd shapes, identities, and what their formulas promise."""

import sys

import numpy as np
import pytest
from PIL import Image

from vla_oft import images
from vla_oft.images import Fit, crop_and_resize, fit_square, jpeg_round_trip, lanczos3

BLACK, GRAY = (0, 0, 0), (127, 127, 127)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, with a little noise."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([127 + 90 * np.sin(rows / 9 + columns / 13), 255 * columns / width, 255 * rows / height], -1)
    return np.clip(smooth + np.random.default_rng(seed).normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def lanczos_by_definition(length: int, size: int) -> np.ndarray:
    """The matrix (size, length) of resizing one line, float64, straight from the formula."""
    step = length / size
    distance = (np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * step) / max(step, 1.0)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(256, 256, 224), (181, 333, 64), (33, 47, 56), (480, 640, 224), (7, 5, 9), (50, 1, 8)]
)
def test_lanczos_is_its_definition_up_to_float32(height, width, size):
    image = photo(height, width)
    rows = np.tensordot(lanczos_by_definition(height, size), image.astype(float), 1)
    expected = np.tensordot(lanczos_by_definition(width, size), rows, (1, 1)).swapaxes(0, 1)
    np.testing.assert_allclose(images._lanczos3(image, size).swapaxes(0, 1), expected, atol=0.02)
    assert np.abs(lanczos3(image, size) - np.clip(expected, 0, 255)).max() <= 0.52


def test_overshoot_beside_an_edge_is_cut_not_wrapped_around():
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[:, 16:] = 255
    floating = images._lanczos3(edge, 48)
    assert floating.min() < -5 and floating.max() > 260
    line = lanczos3(edge, 48)[24, :, 0].astype(int)
    assert (line[:22] < 20).all() and (line[26:] > 235).all()


def test_pure_colours_survive_every_operation():
    for colour in (0, 1, 127, 254, 255):
        image = np.full((61, 83, 3), colour, np.uint8)
        for out in (lanczos3(image, 32), crop_and_resize(image, 0.9, 32), jpeg_round_trip(image)):
            assert (out == colour).all()


def test_views_and_copies_give_the_same_picture():
    image = photo(60, 80)
    turned = image[::-1, ::-1]
    assert not turned.flags.c_contiguous
    for operation in (jpeg_round_trip, lambda i: lanczos3(i, 32), lambda i: crop_and_resize(i, 0.9, 32)):
        before = turned.copy()
        np.testing.assert_array_equal(operation(turned), operation(np.ascontiguousarray(turned)))
        np.testing.assert_array_equal(turned, before)


def test_without_glibc_weights_differ_in_their_last_bits_only(monkeypatch):
    if images._c_library_sine() is None:
        pytest.skip("there is no glibc here")
    indices, exact = images.lanczos_taps(256, 224)
    monkeypatch.setattr(images, "_c_library_sine", lambda: None)
    same, close = images.lanczos_taps.__wrapped__(256, 224)
    np.testing.assert_array_equal(indices, same)
    assert 0 < (exact != close).mean() < 0.1
    np.testing.assert_allclose(exact, close, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("area", [0.9, 0.5, 0.123])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (41, 90)])
def test_the_reference_crop_is_corner_aligned(area, height, width):
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    side = area**0.5
    out = crop_and_resize(image, area, 32) / 1.0
    for channel, length in ((0, height), (1, width)):
        line = out[:, 0, 0] if channel == 0 else out[0, :, 1]
        expected = (length - 1) * ((1 - side) / 2 + np.linspace(0, side, 32))
        assert np.abs(line - expected).max() <= 1.0  # truncated at 255.5 / 255 of the value


def test_the_whole_image_is_its_own_crop():
    image = photo(40, 40)
    np.testing.assert_array_equal(crop_and_resize(image, 1.0, 40), image)
    with pytest.raises(ValueError, match=r"crop area must be in \(0, 1\], got 0"):
        crop_and_resize(image, 0, 40)


@pytest.mark.parametrize("fit", ["resize-naive", "letterbox", "resize-crop"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 41), (41, 30), (33, 64), (200, 31)])
def test_every_fit_gives_a_square(fit: Fit, height: int, width: int):
    out = fit_square(photo(height, width), 32, fit, "bicubic", GRAY)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    if height == width == 32:
        np.testing.assert_array_equal(out, photo(height, width))


def test_letterbox_pads_the_shorter_side_and_resize_crop_cuts_the_longer():
    image = np.full((20, 40, 3), 200, np.uint8)
    image[:, :10] = 50
    boxed = fit_square(image, 40, "letterbox", "bicubic", (1, 2, 3))
    assert (boxed[:10] == (1, 2, 3)).all() and (boxed[30:] == (1, 2, 3)).all()
    np.testing.assert_array_equal(boxed[10:30], image)
    cut = fit_square(image, 20, "resize-crop", "bicubic", BLACK)
    np.testing.assert_array_equal(cut, image[:, 10:30])


def test_fitting_is_pillows_resizing():
    image = photo(50, 75)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fit_square(image, 32, "resize-naive", "bicubic", BLACK), expected)
    wide = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fit_square(image, 32, "resize-crop", "bicubic", BLACK), wide[:, 8:40])


def test_jpeg_keeps_the_picture_but_not_the_bits():
    image = photo(77, 99)
    off = np.abs(jpeg_round_trip(image).astype(int) - image)
    assert 0 < off.mean() < 4


def test_a_missing_decoder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ImportError, match="pip install simplejpeg"):
        jpeg_round_trip(photo(8, 8))


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "box"])
@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (480, 640, 224), (96, 128, 224), (33, 57, 16), (224, 224, 224)])
def test_fast_resizing_is_within_one_level_of_pillow(method, height, width, size):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    exact, fast = images.resize(image, size, method), images.resize(image, size, method, fast=True)
    difference = np.abs(exact.astype(int) - fast.astype(int))
    assert fast.dtype == np.uint8 and fast.shape == exact.shape
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    turned = image[::-1, ::-1]
    turned.flags.writeable = False
    np.testing.assert_array_equal(images.resize(turned, size, method, fast=True), images.resize(turned.copy(), size, method, fast=True))
