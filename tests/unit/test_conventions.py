"""Pauses and grippers of other people's recordings, where nothing was recorded from the reference."""

import numpy as np

from vla_oft import grippers, noops


def steps(motions: list[float], gripper: list[float]) -> np.ndarray:
    """(T, 7): motion along one axis, gripper."""
    actions = np.zeros((len(motions), 7))
    actions[:, 2], actions[:, 6] = motions, gripper
    return actions


def test_the_gripper_counts_by_its_change_once_something_moved():
    actions = steps([0, 1, 0, 0, 0, 1], [-1, -1, -1, 1, 1, 1])
    assert noops.kept_steps(actions).tolist() == [1, 3, 5]
    assert noops.kept_steps(actions).dtype == np.int64


def test_a_motion_below_the_threshold_is_a_pause():
    actions = steps([1, 9e-5, 1.1e-4, -9e-5], [0, 0, 0, 0])
    assert noops.kept_steps(actions).tolist() == [0, 2]
    assert noops.kept_steps(actions, threshold=1e-3).tolist() == [0]
    assert noops.kept_steps(steps([], [])).tolist() == []


def test_an_opening_between_counts_as_what_comes_next():
    openings = np.array([0.98, 0.6, 0.3, 0.02, 0.5, 0.99], np.float32)
    before = openings.copy()
    assert grippers.binarize(openings).tolist() == [1, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(openings, before)
    assert grippers.binarize(np.array([])).tolist() == []


def test_an_opening_that_never_arrives_stands_as_it_is():
    np.testing.assert_allclose(grippers.binarize(np.array([0.0, 0.4, 0.6])), [0, 0.6, 0.6])


def test_relative_commands_hold_until_the_next():
    assert grippers.from_relative(np.array([0, 1, 0, 0, -1, 0])).tolist() == [1, 0, 0, 0, 1, 1]
    assert grippers.from_relative(np.array([0, -1, 0, 1])).tolist() == [0, 1, 1, 0]
    assert grippers.from_relative(np.array([0.05, -0.05])).tolist() == [1, 1], "too small to be commands: open"
    assert grippers.from_relative(np.array([])).tolist() == []
