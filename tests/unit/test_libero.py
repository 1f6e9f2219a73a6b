"""LIBERO's conventions where nothing was recorded."""

import numpy as np
import pytest

from vla_oft.robots import libero


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_translating_there_and_back_keeps_the_gripper(dtype):
    actions = np.zeros((2, 3, 7), dtype)
    actions[..., 6] = [[0, 1, 0], [1, 1, 0]]
    there = libero.to_environment(actions)
    assert there.dtype == dtype and set(there[..., 6].ravel()) == {-1.0, 1.0}
    np.testing.assert_array_equal(libero.from_environment(there), actions)
    assert there[0, 0, 6] == 1, "a closed gripper (0) is the environment's +1"


def test_a_rotation_is_its_axis_times_its_angle():
    rng = np.random.default_rng(0)
    for angle in (1e-6, 0.3, 3.0, 6.0):
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        quaternion = np.array([*(axis * np.sin(angle / 2)), np.cos(angle / 2)])
        before = quaternion.copy()
        np.testing.assert_allclose(libero.axis_angle(quaternion), axis * angle, atol=1e-9)
        np.testing.assert_array_equal(quaternion, before)


def test_no_rotation_has_no_axis():
    for w in (1.0, -1.0, 1.0000001):
        np.testing.assert_array_equal(libero.axis_angle(np.array([0, 0, 0, w])), np.zeros(3))


def test_turning_twice_changes_nothing_and_gives_contiguous_images():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    turned = libero.upright(image)
    np.testing.assert_array_equal(turned[0, 0], image[-1, -1])
    np.testing.assert_array_equal(libero.upright(turned), image)
    assert turned.flags.c_contiguous
