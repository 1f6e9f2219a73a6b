"""What travels between a robot and its policy: everything that does not fit is refused by name."""

import math

import numpy as np
import pytest

from tests.tiny import observation
from vla_oft.robots.tabletop import SPEC
from vla_oft_client import ActionChunk, Observation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"front": [[0]], "wrist": [[0]]}}, "image of camera 'front' must be a numpy array, uint8 .* got list"),
        ({"images": None}, "images must be a dictionary from camera name to image, got NoneType"),
        ({"images": {}}, "observation has no camera 'front'"),
        ({"images": {"front": np.zeros((4, 4, 3)), "wrist": np.zeros((4, 4, 3))}}, "must be uint8 .* got float64"),
        ({"state": None}, "observation has no state"),
        ({"state": "up"}, "state must be 8 numbers, got 'up'"),
        ({"state": np.zeros(3)}, r"state must have shape \(8,\) for robot 'tabletop', got \(3,\)"),
        ({"state": np.full(8, np.nan)}, "state is not finite in dimensions"),
        ({"instruction": " "}, "instruction must be a non-empty string"),
    ],
)
def test_a_bad_observation_is_refused_by_field(change, message):
    with pytest.raises(ValueError, match=message):
        Observation(**{**vars(observation()), **change}).check(SPEC)


def test_a_chunk_has_no_period_of_its_own():
    with pytest.raises(TypeError, match="period_s"):
        ActionChunk(np.zeros((4, 7), np.float32))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"period_s": 0.0}, "period_s=0.0 must be positive; use the robot's RobotSpec.period_s"),
        ({"period_s": math.nan}, "period_s=nan must be positive"),
        ({"start_time_s": math.inf}, "start_time_s=inf must be finite; use the observation's time_s"),
        ({"actions": [[0.0] * 7]}, r"actions must be a numpy array \(K, D\), got list \(1, 7\)"),
        ({"actions": np.zeros(7)}, r"actions must be a numpy array \(K, D\), got ndarray \(7,\)"),
    ],
)
def test_a_bad_chunk_is_refused_by_field(change, message):
    with pytest.raises(ValueError, match=message):
        ActionChunk(**{"actions": np.zeros((4, 7), np.float32), "start_time_s": 0.0, "period_s": 0.05, **change})
