"""Patch masks point at what the instruction names, also in random poses."""

from importlib.util import find_spec

import numpy as np
import pytest

from vla_oft.sims import tabletop
from vla_oft.sims.tabletop_scene import PALETTE

PATCHES = 16
pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)


@pytest.fixture(scope="module")
def env():
    env = tabletop.TabletopEnv("pick_place", camera_size=128)
    yield env
    env.close()


def centre(mask):
    """(2,) row and column of the middle of a mask (P, P), in parts of the image."""
    return (np.argwhere(mask).mean(axis=0) + 0.5) / len(mask)


def projected(env, camera, point):
    """(2,) where a world point appears, in parts of the image: row, column."""
    camera_id = env._model.camera(camera).id
    inside = env._data.cam_xmat[camera_id].reshape(3, 3).T @ (point - env._data.cam_xpos[camera_id])
    scale = 0.5 / np.tan(np.radians(env._model.cam_fovy[camera_id]) / 2)
    return np.array([0.5 - scale * inside[1] / -inside[2], 0.5 + scale * inside[0] / -inside[2]])


def test_masks_lie_where_the_named_block_and_the_plate_are(env):
    for seed in range(5):
        env.reset(seed)
        masks = env.patch_masks(PATCHES)
        assert {camera: (mask.shape, mask.dtype) for camera, mask in masks.items()} == dict.fromkeys(
            ("front", "wrist"), ((2, PATCHES, PATCHES), np.dtype(np.uint8))
        )
        for channel, point in enumerate(env.landmarks()):
            assert np.abs(centre(masks["front"][channel]) - projected(env, "front", point)).max() < 0.05


def test_masked_patches_have_the_colour_of_the_named_block(env):
    for seed in range(5):
        env.reset(seed)
        image = env.observe().images["front"].reshape(PATCHES, 8, PATCHES, 8, 3)
        for target, colour in enumerate(env.objects):
            env.set_instruction("pick_place", target)
            pixels = image.transpose(0, 2, 1, 3, 4)[env.patch_masks(PATCHES)["front"][0] == 1].reshape(-1, 3).astype(float)
            hues = {name: np.array(rgb) - np.mean(rgb) for name, rgb in PALETTE.items()}
            likeness = np.stack([(pixels - pixels.mean(1, keepdims=True)) @ hue / np.linalg.norm(hue) for hue in hues.values()], axis=1)
            strongest = likeness[likeness.max(axis=1) > 60].argmax(axis=1)  # pixels that are coloured at all
            assert np.bincount(strongest, minlength=len(hues)).argmax() == list(hues).index(colour), (seed, colour)


def test_tasks_without_a_destination_have_an_empty_second_channel(env):
    env.reset(0)
    for family, empty in (("touch", True), ("push", True), ("lift", True), ("pick_place", False), ("stack", False)):
        env.set_instruction(family, 0, 1)
        assert (not env.patch_masks(PATCHES)["front"][1].any()) == empty
        assert np.isnan(env.landmarks()[1]).all() == empty


def test_the_destination_of_stack_is_the_second_block(env):
    env.reset(3)
    env.set_instruction("stack", 0, 2)
    stack = env.patch_masks(PATCHES)["front"]
    env.set_instruction("touch", 2)
    assert np.array_equal(stack[1], env.patch_masks(PATCHES)["front"][0])
    assert env.landmarks()[0, :2] == pytest.approx(env.layout.positions_m[2], abs=0.002)


def test_masks_of_different_blocks_differ(env):
    env.reset(1)
    masks = []
    for target in range(3):
        env.set_instruction("lift", target)
        masks.append(env.patch_masks(PATCHES)["front"][0])
    assert all(mask.any() for mask in masks)
    assert not any((masks[i] & masks[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_masks_do_not_change_pictures(env):
    env.reset(2)
    before = env.observe().images
    env.patch_masks(8)
    assert all(np.array_equal(before[camera], image) for camera, image in env.observe().images.items())


def test_patches_must_divide_the_image(env):
    with pytest.raises(ValueError, match="patches_per_side=7 must divide camera_size=128"):
        env.patch_masks(7)


def test_random_poses_vary_and_are_valid_pictures(env):
    env.reset(0)
    rng = np.random.default_rng(0)
    hands, held, raised = [], 0, 0
    for _ in range(40):
        env.randomize_pose(rng)
        observation = env.observe().check(env.spec)
        hands.append(observation.state[:3])
        heights = env.moment().blocks[:, 2]
        held += int(np.any(np.linalg.norm(env.moment().blocks - observation.state[:3], axis=1) < 0.015))
        raised += int(heights.max() > 0.03)
        assert heights.min() > 0.01
    assert np.all(np.ptp(hands, axis=0) > 0.1)
    assert 3 < held < 30 and raised > 5


def test_a_random_pose_is_the_same_for_the_same_generator(env):
    pictures = []
    for _ in range(2):
        env.reset(5)
        env.randomize_pose(np.random.default_rng(7))
        pictures.append(env.observe().images["wrist"])
    assert np.array_equal(*pictures)


def test_two_different_blocks_are_needed_for_a_stack(env):
    with pytest.raises(ValueError, match="two different blocks"):
        env.set_instruction("stack", 1, 1)
