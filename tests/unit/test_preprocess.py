"""The reference's image pipeline as one configuration: read from its file, kept in ours, and the same on both sides."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vla_oft
from vla_oft import preprocess
from vla_oft.config import from_dict, to_dict
from vla_oft.images import center_crop, crop_and_resize, fit_square, jpeg_round_trip, lanczos3, resize
from vla_oft.preprocess import Camera, Config, Preparation, from_preprocessor_config, prepare_image, reference_config

RNG = np.random.default_rng(0)
PHOTO = np.clip(np.cumsum(RNG.normal(0, 2, (48, 64, 3)), axis=1) + 120, 0, 255).astype(np.uint8)
OWN = Config(image_size=16, resize="box", crop_area=0.9)


def document(**changes) -> dict:
    """What the reference's converter writes, for 16-pixel towers."""
    whole = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, 16, 16], [3, 16, 16]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [[0.1, 0.2, 0.3], [0.5, 0.5, 0.25]],
        "stds": [[0.4, 0.5, 0.6], [0.5, 0.5, 0.5]],
        "tvf_crop_params": [{"output_size": [16, 16]}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": [0.11, 0.22, 0.33], "std": [0.44, 0.55, 0.66]},
            {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        ],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": [16, 16]}] * 2,
    }
    return {name: value for name, value in {**whole, **changes}.items() if value != "absent"}


def plain(**changes) -> dict:
    return {name: value for name, value in document(**changes).items() if not name.startswith("tvf_")}


def read(values: dict, **options) -> Config:
    return from_preprocessor_config(values, **{"image_size": 16, "crop_area": 0.9, **options})


def test_the_stored_constants_win_over_the_plain_ones():
    assert read(document()).dino_mean == (0.11, 0.22, 0.33) and read(document()).dino_std == (0.44, 0.55, 0.66)
    config = read(plain())
    assert config.dino_mean == (0.1, 0.2, 0.3) and config.siglip_mean == (0.5, 0.5, 0.25) and config.fit == "resize-naive"


def test_a_letterbox_has_the_colour_that_was_stored_or_the_last_towers_mean():
    assert read(plain(image_resize_strategy="letterbox")).letterbox_fill == (127, 127, 63)
    stored = document(
        image_resize_strategy="letterbox",
        tvf_do_letterbox=True,
        tvf_letterbox_fill=[1, 2, 3],
        tvf_resize_params=[{"interpolation": 3, "size": 16}] * 2,
    )
    assert read(stored).letterbox_fill == (1, 2, 3) and read(stored).fit == "letterbox"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (plain(image_resize_strategy="stretch"), "image_resize_strategy='stretch' is not supported; supported: resize-naive, letterbox"),
        (plain(input_sizes=[[3, 16, 16]]), r"input_sizes=\[\(3, 16, 16\)\] must be two towers' \(3, 16, 16\)"),
        (plain(input_sizes=[[3, 16, 16], [3, 32, 32]]), "must be two towers'"),
        (plain(means="absent"), "no 'means'"),
        (plain(interpolations=["bilinear", "bilinear"]), "must be bicubic or lanczos"),
        (plain(interpolations=["bicubic", "lanczos"]), "the same for both towers"),
        (plain(means=[[0.5], [0.5]]), "mean and std of three channels"),
        (document(image_resize_strategy="absent"), "no 'image_resize_strategy'"),
        (document(image_resize_strategy="resize-crop"), r"'resize-crop' contradicts tvf_resize_params.size=\[16, 16\]"),
        (document(tvf_do_letterbox=True), "'resize-naive' contradicts tvf_do_letterbox=True"),
        (document(tvf_resize_params=[{"interpolation": 3, "size": [16, 16], "antialias": False}] * 2), "only antialias=true"),
        (document(tvf_crop_params=[{"output_size": [14, 14]}] * 2), r"tvf_crop_params.output_size=\[14, 14\] must be \[16, 16\]"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        read(values)


def test_the_reference_pipeline_in_order():
    config = reference_config(image_size=16, crop_area=0.5)
    stages = lanczos3(jpeg_round_trip(PHOTO), 224)
    cropped = crop_and_resize(stages, 0.5, 224)
    np.testing.assert_array_equal(prepare_image(config, PHOTO), fit_square(cropped, 16, "resize-naive", "bicubic", (0, 0, 0)))
    whole = dataclasses.replace(config, image_size=224, crop_area=1.0)
    np.testing.assert_array_equal(prepare_image(whole, PHOTO), stages)


def test_an_image_of_the_right_size_goes_through_nothing_but_the_crop(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # not needed, so not missed
    ready = fit_square(PHOTO, 224, "resize-naive", "bicubic", (0, 0, 0))
    np.testing.assert_array_equal(prepare_image(reference_config(crop_area=1.0), ready), ready)
    np.testing.assert_array_equal(prepare_image(reference_config(), ready), crop_and_resize(ready, 0.9, 224))
    data_loader = reference_config(crop_area=1.0, camera=Camera(resize="lanczos"))
    np.testing.assert_array_equal(prepare_image(data_loader, PHOTO), lanczos3(PHOTO, 224))
    with pytest.raises(ImportError, match="simplejpeg"):
        prepare_image(reference_config(), PHOTO)


def test_the_original_openvla_leaves_the_first_resize_to_what_comes_next():
    config = reference_config(camera=Camera(resize="none"))
    np.testing.assert_array_equal(prepare_image(config, PHOTO), crop_and_resize(PHOTO, 0.9, 224))
    whole = dataclasses.replace(config, crop_area=1.0)
    np.testing.assert_array_equal(prepare_image(whole, PHOTO), resize(PHOTO, 224, "bicubic"))


@pytest.mark.parametrize(
    "config", [OWN, dataclasses.replace(OWN, resize="lanczos"), dataclasses.replace(OWN, resize="bicubic", crop_area=1.0)]
)
def test_policies_trained_here_see_what_they_always_saw(config):
    np.testing.assert_array_equal(prepare_image(config, PHOTO), center_crop(resize(PHOTO, 16, config.resize), config.crop_area))


def test_the_shipped_policys_file_still_loads_and_keeps_its_key():
    stored = json.loads((Path(vla_oft.__file__).parent / "assets" / "nano_base" / "policy.json").read_text())["preprocess"]
    config = from_dict(Config, {name: stored[name] for name in ("image_size", "resize", "crop_area")})
    assert config.camera is None and config.fit == "resize-naive"
    assert Preparation(config).key == f"{config.image_size}-{config.resize}-{config.crop_area!r}"


def test_a_reference_configuration_survives_json():
    config = reference_config(image_size=16, fit="letterbox", letterbox_fill=(1, 2, 3), camera=Camera(size=128, resize="lanczos"))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_keys_name_everything_that_decides_the_pixels():
    base = reference_config(image_size=16)
    letterbox = dataclasses.replace(base, fit="letterbox")
    different = [
        OWN,
        base,
        dataclasses.replace(base, crop_area=1.0),
        dataclasses.replace(base, image_size=32),
        dataclasses.replace(base, resize="lanczos"),
        dataclasses.replace(base, camera=None),
        dataclasses.replace(base, camera=Camera(size=128)),
        dataclasses.replace(base, camera=Camera(resize="lanczos")),
        dataclasses.replace(base, fit="resize-crop"),
        letterbox,
        dataclasses.replace(letterbox, letterbox_fill=(0, 0, 0)),
    ]
    keys = [Preparation(config).key for config in different]
    assert len(set(keys)) == len(keys) and all("/" not in key and " " not in key for key in keys)
    assert Preparation(dataclasses.replace(base, siglip_mean=(0.0, 0.0, 0.0))).key == Preparation(base).key


def test_pixels_are_normalised_per_tower():
    config = read(document())
    images = torch.from_numpy(RNG.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8))
    pixels = preprocess.to_pixels(config, images)
    channels = images.permute(0, 1, 4, 2, 3).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (config.dino_mean, config.dino_std))
    assert pixels.shape == (2, 3, 6, 16, 16) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, :, :3].double(), (channels - mean) / std, atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, :, 3:].double(), (channels - 0.5) / 0.5, atol=1e-6, rtol=0)
