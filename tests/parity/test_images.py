"""Camera images to pixels, without TensorFlow: against the reference's recordings of every stage."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from vla_oft import images, preprocess
from vla_oft.images import crop_and_resize, jpeg_round_trip, lanczos3

TIES = 0.0 if images._c_library_sine() else 2e-4  # share of values that may be one level off: weights differ in their last bit
NAMES = ["img0", "img1", "img2", "img3", "img4"]  # 256 x 256, 224 x 224, 480 x 640, 180 x 320, 128 x 128


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity" / "pure_functions" / "image_preprocessing.npz")


@pytest.fixture(scope="module")
def document(shared):
    return json.loads((shared / "parity" / "libero-l1" / "checkpoint" / "preprocessor_config.json").read_text())


def assert_same_picture(image: np.ndarray, expected: np.ndarray) -> None:
    assert image.dtype == np.uint8 and image.shape == expected.shape
    off = np.abs(image.astype(int) - expected)
    assert off.max() <= 1 and (off > 0).mean() <= TIES, f"{(off > 0).sum()} values differ, by up to {off.max()}"


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_jpeg(recorded, name):
    np.testing.assert_array_equal(jpeg_round_trip(recorded[f"{name}_raw"]), recorded[f"{name}_after_jpeg"])


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_lanczos(recorded, name):
    assert_same_picture(lanczos3(recorded[f"{name}_raw"], 224), recorded[f"{name}_lanczos_no_jpeg"])
    assert_same_picture(lanczos3(recorded[f"{name}_after_jpeg"], 224), recorded[f"{name}_resize_for_policy"])


@pytest.mark.shared
def test_before_rounding(recorded):
    """The same operations in the same order: every bit, or four units in the last place of 255 where sines differ."""
    resized = images._lanczos3(recorded["img0_raw"], 224).swapaxes(0, 1)
    np.testing.assert_allclose(resized[:64], recorded["img0_lanczos_float"], atol=6.2e-5 if TIES else 0, rtol=0)
    np.testing.assert_array_equal(images._crop_and_resize(recorded["img1_raw"], 0.9, 224)[:64], recorded["img1_crop_resize_float"])


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_central_crop(recorded, name):
    for before, after in (("resize_for_policy", "center_crop"), ("raw", "center_crop_of_raw")):
        np.testing.assert_array_equal(crop_and_resize(recorded[f"{name}_{before}"], 0.9, 224), recorded[f"{name}_{after}"])


@pytest.mark.shared
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("folder", "run"),
    [
        ("libero-l1", "infer_center_crop"),
        ("libero-l1-lora", "infer_center_crop"),
        ("libero-discrete-pd", "infer_center_crop"),
        ("libero-diffusion", "infer_50steps_center_crop"),
        ("aloha-l1-film", "infer_center_crop"),
    ],
)
def test_a_checkpoints_images(shared, folder, run, crop):
    folder = shared / "parity" / folder
    document = json.loads((folder / "checkpoint" / "preprocessor_config.json").read_text())
    config = preprocess.from_preprocessor_config(document, image_size=224, crop_area=0.9 if crop else 1.0)
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / f"{run}_{str(crop).lower()}.npz")
    prepared = np.stack([preprocess.prepare_image(config, inputs[n]) for n in inputs.files if n.startswith("image_")])
    assert_same_picture(prepared, expected["images_after_prepare"])
    if crop:  # the other recordings hold no pixels
        pixels = preprocess.to_pixels(config, torch.from_numpy(expected["images_after_prepare"])[None])
        np.testing.assert_allclose(pixels.reshape(1, -1, 224, 224), expected["pixel_values"], atol=1e-6)


@pytest.mark.shared
def test_the_original_openvlas_images(shared):
    """Before OFT, a raw camera image of any size was cropped to 224 pixels at once."""
    folder = shared / "parity" / "openvla-ar"
    document = json.loads((folder / "checkpoint" / "preprocessor_config.json").read_text())
    config = preprocess.from_preprocessor_config(document, image_size=224, crop_area=0.9, camera=preprocess.Camera(resize="none"))
    image = np.load(folder / "inputs.npz")["image_0_full_image"]
    expected = np.load(folder / "infer_center_crop_true.npz")["pixel_values"]
    assert image.shape == (240, 320, 3)
    np.testing.assert_allclose(pixels(config, image)[None], expected, atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("array", "image", "change", "stored"),
    [
        ("pixel_values_img1", "img1", {}, True),
        ("pixel_values_img1_recomputed_stats", "img1", {}, False),
        ("pixel_values_img2_480x640", "img2", {}, True),
        ("pixel_values_img4_128", "img4", {}, True),
        ("letterbox_img2", "img2", {"image_resize_strategy": "letterbox"}, False),
        ("resizecrop_img2", "img2", {"image_resize_strategy": "resize-crop"}, False),
    ],
)
def test_the_image_processor_alone(shared, recorded, document, array, image, change, stored):
    """`stored`: with the parameters that the converter wrote, or with those that the processor derives from means and strategy."""
    expected = np.load(shared / "parity" / "pure_functions" / "image_transform.npz")[array]
    plain = {name: value for name, value in document.items() if stored or not name.startswith("tvf_")}
    config = preprocess.from_preprocessor_config({**plain, **change}, image_size=224, crop_area=1.0)
    alone = dataclasses.replace(config, camera=None)
    np.testing.assert_allclose(pixels(alone, recorded[f"{image}_raw"]), expected, atol=1e-6)


def pixels(config: preprocess.Config, image: np.ndarray) -> np.ndarray:
    """float32 (6, S, S) of one image."""
    return preprocess.to_pixels(config, torch.tensor(preprocess.prepare_image(config, image))[None, None])[0, 0].numpy()
