"""Training and inference see the same robot: same pixels, same units."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.tiny import tiny_config, tiny_policy
from vla_oft import preprocess
from vla_oft.data.base import Source, open_source
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Episode
from vla_oft.images import Filter
from vla_oft.policy import Policy
from vla_oft.robots.tabletop import SPEC
from vla_oft_client import Observation

STEPS = [0, 3, 5]


def recorded(folder, size: int) -> Source:
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder, SPEC) as writer:
        writer.append_episode(
            Episode(
                images={camera: rng.integers(0, 256, (6, size, size, 3), dtype=np.uint8) for camera in SPEC.cameras},
                states=rng.normal(size=(6, 8)).astype(np.float32),
                actions=rng.normal(size=(6, 7)).astype(np.float32),
                instructions="touch the red block",
            )
        )
    return open_source(folder)


def training_data(policy: Policy, source: Source, prepare: preprocess.Preparation) -> ChunkDataset:
    return ChunkDataset(
        [source],
        SPEC,
        prepare=prepare,
        action_normalizer=policy.action_normalizer,
        state_normalizer=policy.state_normalizer,
        chunk_len=policy.config.chunk_len,
        cache="ram",
    )


@pytest.mark.parametrize("crop_area", [1.0, 0.9])
@pytest.mark.parametrize("resize", ["box", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [16, 32, 40])
def test_training_images_and_states_are_what_inference_sees(tmp_path, size: int, resize: Filter, crop_area: float):
    policy = tiny_policy(preprocess=preprocess.Config(image_size=16, resize=resize, crop_area=crop_area))
    source = recorded(tmp_path / "set", size)
    samples = training_data(policy, source, preprocess.Preparation(policy.config.preprocess)).batch(STEPS)
    raw = {camera: source.frames(0, STEPS, camera) for camera in SPEC.cameras}
    seen = [
        Observation({camera: raw[camera][i] for camera in SPEC.cameras}, source.states(0)[step], source.tasks[0])
        for i, step in enumerate(STEPS)
    ]
    for image, observation in zip(samples.images, seen, strict=True):
        np.testing.assert_array_equal(image, preprocess.prepare_images(policy.config.preprocess, observation, SPEC.cameras))
    inputs = policy.prepare(seen)
    assert torch.equal(preprocess.to_pixels(policy.config.preprocess, torch.from_numpy(samples.images)), inputs.pixels)
    assert inputs.state is not None and samples.state is not None
    np.testing.assert_array_equal(samples.state, inputs.state.numpy())


def test_actions_come_back_from_training_units_as_they_were_recorded(tmp_path):
    policy = tiny_policy()
    mask = np.array([True] * 3 + [False] * 4)  # not the robot's own: statistics of a base policy may be
    policy.interface.action_normalizer = dataclasses.replace(policy.action_normalizer, mask=mask, kind="zscore")
    source = recorded(tmp_path / "set", 16)
    actions = training_data(policy, source, preprocess.Preparation(tiny_config().preprocess)).batch([0]).actions[0, :6]
    np.testing.assert_allclose(policy.action_normalizer.unnormalize(actions), source.actions(0), atol=1e-5)


def test_a_preparation_is_named_after_everything_that_decides_the_pixels():
    base = preprocess.Config(image_size=16, resize="box", crop_area=1.0)
    changes = ({}, {"image_size": 17}, {"resize": "lanczos"}, {"crop_area": 0.9}, {"crop_area": 0.9001})
    keys = [preprocess.Preparation(dataclasses.replace(base, **change)).key for change in changes]
    assert len(set(keys)) == len(keys)
    assert preprocess.Preparation(dataclasses.replace(base, dino_mean=(0.0, 0.0, 0.0))).key == keys[0], "normalised later"
