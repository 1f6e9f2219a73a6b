"""Which policies may drive a simulated robot."""

import dataclasses

import pytest

from tests.tiny import tiny_policy
from vla_oft.evaluate.command import check_robot
from vla_oft.robots.tabletop import SPEC


def test_fewer_cameras_no_state_and_other_chunks_are_fine():
    """The paper's table compares such policies on the same robot."""
    robot = dataclasses.replace(SPEC, cameras=("wrist",), state_dim=0, chunk_len=3, normalization="bounds")
    check_robot(tiny_policy(robot=robot, chunk_len=3, use_state=False, grounding=None), "tabletop/touch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_hz": 5.0}, "control_hz: 5.0 here, 20.0 there"),
        ({"cameras": ("front", "left")}, "cameras: .*left"),
        ({"name": "ur5"}, "robot 'ur5'"),
    ],
)
def test_another_robot_is_refused_with_the_difference(change, message):
    with pytest.raises(ValueError, match=message):
        check_robot(tiny_policy(robot=dataclasses.replace(SPEC, **change)), "tabletop/touch")
