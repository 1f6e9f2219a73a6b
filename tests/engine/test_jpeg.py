"""The JPEG round trip on the device, against the encoder and decoder it stands for."""

import numpy as np
import pytest
import torch

from vla_oft.engine.jpeg import JpegRoundTrip
from vla_oft.images import jpeg_round_trip

RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    """Smooth, hence full of ties."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * columns // max(width - 1, 1), 255 * rows // max(height - 1, 1), (rows + columns) % 256], -1).astype(np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """Waves with a little noise and a box with sharp edges."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([127 + 90 * np.sin(rows / 9 + columns / 13), 255 * columns / width, 255 * rows / height], -1)
    smooth[height // 4 : height // 2, width // 3 : width // 2] = (220, 40, 30)
    return np.clip(smooth + RNG.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def black_and_white(height: int, width: int) -> np.ndarray:
    return RNG.choice([0, 255], (height, width, 3)).astype(np.uint8)


def primaries(height: int, width: int) -> np.ndarray:
    """Pure colours in squares that lie across the blocks: chroma at its limits."""
    squares = RNG.choice([0, 255], (height // 5 + 1, width // 5 + 1, 3))
    return np.kron(squares, np.ones((5, 5, 1))).astype(np.uint8)[:height, :width]


def round_trip(images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    return JpegRoundTrip(height, width, torch.device("cpu"))(torch.from_numpy(images)).numpy()


def assert_same(images: np.ndarray) -> None:
    np.testing.assert_array_equal(round_trip(images), np.stack([jpeg_round_trip(image) for image in images]))


@pytest.mark.parametrize("picture", [noise, ramp, scene, black_and_white, primaries])
@pytest.mark.parametrize(
    "size", [(480, 640), (256, 256), (180, 320), (97, 131), (131, 97), (33, 5), (17, 33), (8, 8), (5, 3), (3, 6), (2, 50), (50, 1), (1, 1)]
)
def test_every_pixel_is_the_decoders(size, picture):
    assert_same(np.stack([picture(*size), picture(*size)]))


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_a_plain_surface_stays_plain(value):
    assert_same(np.full((1, 32, 32, 3), value, np.uint8))


@pytest.mark.parametrize("noise_level", [0, 10, 40])
def test_where_the_decoder_overflows_its_16_bits_so_do_we(noise_level):
    chequers = np.kron(np.indices((16, 16)).sum(0) % 2 * 255.0, np.ones((4, 4)))
    images = np.stack([chequers, 255 - chequers, np.roll(chequers, 2, 1), np.roll(chequers, 1, 0)])[..., None].repeat(3, -1)
    images = np.clip(images + RNG.normal(0, noise_level, images.shape), 0, 255).astype(np.uint8)
    if not noise_level:
        assert (round_trip(images[:1]) ^ images[:1] == 255).mean() > 0.4  # what was black is white: this does overflow
    assert_same(images)


def test_frequencies_at_full_contrast_are_the_decoders():
    """Each block is one frequency, or the difference of two, as black and white as it can be: the largest numbers in every place."""
    waves = np.cos(np.outer(np.arange(8), 2 * np.arange(8) + 1) * np.pi / 16)
    parts = np.concatenate([waves, waves[[1, 2, 3, 5, 1]] - waves[[7, 6, 5, 3, 3]], [waves[1] - waves[3] + waves[5] - waves[7]]])
    blocks = np.where(np.einsum("ax,by->abxy", parts, parts) > 0, 255, 0).astype(np.uint8)
    gray = np.pad(blocks.swapaxes(1, 2).reshape(len(parts) * 8, -1), (0, 8))
    colour = np.stack([gray, np.roll(gray, 8, 0), 255 - np.roll(gray, 8, 1)], -1)
    large = colour.repeat(2, 0).repeat(2, 1)  # survives the halving of colours
    for image in (np.stack([gray] * 3, -1), colour, large):
        assert_same(np.stack([image, 255 - image]))
