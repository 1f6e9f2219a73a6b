"""The reference's robots: constants, gripper conventions, orientations, image rotation."""

import json

import numpy as np
import pytest

from vla_oft import robots
from vla_oft.robots import libero
from vla_oft.statistics import load_statistics

ROBOTS = {
    "libero-l1": "libero",
    "libero-diffusion": "libero",
    "libero-discrete-pd": "libero",
    "libero-l1-lora": "libero",
    "aloha-l1-film": "aloha",
    "openvla-ar": "bridge",
}


@pytest.fixture(scope="module")
def functions(shared):
    return shared / "parity" / "pure_functions"


@pytest.fixture(scope="module")
def gripper(functions):
    return np.load(functions / "gripper.npz")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["libero", "aloha", "bridge"])
def test_constants(functions, name):
    expected, spec = json.loads((functions / f"constants_{name}.json").read_text()), robots.load(name)
    assert spec.chunk_len == expected["NUM_ACTIONS_CHUNK"]
    assert spec.action_dim == expected["ACTION_DIM"]
    assert spec.state_dim == expected["PROPRIO_DIM"]
    assert spec.normalization == expected["ACTION_PROPRIO_NORMALIZATION_TYPE"]


@pytest.mark.shared
@pytest.mark.parametrize(("folder", "name"), ROBOTS.items())
def test_which_dimensions_are_normalised_and_how_many_cameras_there_are(shared, folder, name):
    folder, spec = shared / "parity" / folder, robots.load(name)
    (statistics,) = load_statistics(folder / "checkpoint" / "dataset_statistics.json").values()
    assert tuple(statistics.normalize_mask) == spec.normalize_mask
    images = json.loads((folder / "meta.json").read_text())["images"]
    assert images <= len(spec.cameras), "a checkpoint may use fewer cameras than the robot has"


@pytest.mark.shared
def test_a_policys_gripper_for_liberos_environment(gripper):
    actions = gripper["action"]
    before = actions.copy()
    np.testing.assert_array_equal(libero.to_environment(actions), gripper["invert_of_binarized"])
    continuous = libero.to_environment(actions, binary=False)
    np.testing.assert_array_equal(continuous[:, :6], gripper["normalize_only"][:, :6])
    np.testing.assert_array_equal(continuous[:, 6], -gripper["normalize_only"][:, 6])
    np.testing.assert_array_equal(actions, before)


@pytest.mark.shared
def test_liberos_recordings(gripper):
    out = libero.from_environment(gripper["libero_transform_action_in"])
    np.testing.assert_array_equal(out, gripper["libero_transform_action_out"])
    assert out.dtype == np.float32


@pytest.mark.shared
def test_orientations(functions):
    recorded = np.load(functions / "quat2axisangle.npz")
    found = np.stack([libero.axis_angle(quaternion) for quaternion in recorded["quat_xyzw"]])
    np.testing.assert_allclose(found, recorded["axisangle"], atol=1e-12)
    np.testing.assert_array_equal(libero.SETTLE_ACTION, recorded["dummy_action"])


@pytest.mark.shared
def test_image_rotation(functions):
    recorded = np.load(functions / "libero_image_rotation.npz")
    np.testing.assert_array_equal(libero.upright(recorded["agentview_image"]), recorded["out"])
