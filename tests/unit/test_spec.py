"""Robot descriptions: round trips, refusals, readable differences."""

import dataclasses
import json
import math

import pytest

from vla_oft import robots
from vla_oft_client import RobotSpec


@pytest.mark.parametrize("name", robots.names())
def test_every_robot_survives_json_and_keeps_its_file_name(name: str):
    spec = robots.load(name)
    assert spec.name == name
    assert RobotSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_unknown_robot_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown robot 'toaster'; known: .*tabletop"):
        robots.load("toaster")


def test_a_difference_names_the_field_and_both_values():
    spec = robots.load("tabletop")
    other = dataclasses.replace(spec, control_hz=25.0)
    assert spec.differences(other) == ["control_hz: 20.0 here, 25.0 there"]
    assert spec.differences(spec) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cameras": ()}, "cameras"),
        ({"cameras": ("a", "a")}, "cameras"),
        ({"normalize_mask": (True,)}, "normalize_mask"),
        ({"normalization": "minmax"}, "normalization"),
        ({"control_hz": 0.0}, "control_hz"),
        ({"action_limits": ((1.0, -1.0),) * 7}, "action_limits"),
        ({"action_limits": ((-math.inf, 1.0),) * 7}, "action_limits"),
        ({"action_limits": ((math.nan, 1.0),) * 7}, "action_limits"),
        ({"control_hz": math.inf}, "control_hz"),
        ({"gripper": ({"index": 6, "open": 0.0, "closed": 1.0},)}, "gripper"),
    ],
)
def test_an_impossible_robot_is_refused_by_field(change, field):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(robots.load("tabletop"), **change)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="colour"):
        RobotSpec.from_dict({**robots.load("tabletop").to_dict(), "colour": "red"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_hz": "20"}, "control_hz='20' must be a finite number"),
        ({"control_hz": None}, "control_hz=None must be a finite number"),
        ({"cameras": "front"}, "cameras='front' must be a list of names"),
        ({"cameras": [1]}, "cameras=.* must be a list of names"),
        ({"chunk_len": 8.0}, "chunk_len=8.0 must be a whole number"),
        ({"state_dim": True}, "state_dim=True must be a whole number"),
        ({"name": 3}, "name=3 must be text"),
        ({"normalize_mask": [1] * 7}, "normalize_mask=.* must be a list of true and false"),
        ({"absolute_mask": None}, "absolute_mask=None must be a list of true and false"),
        ({"action_limits": [[-1, 1, 2]] * 7}, "action_limits=.* must be a list of pairs"),
        ({"action_limits": [["-1", "1"]] * 7}, "action_limits=.* must be a list of pairs"),
        ({"action_limits": 1}, "action_limits=1 must be a list of pairs"),
        ({"gripper": {"index": 6}}, "gripper=.* must be a list of grippers"),
        ({"gripper": [{"index": 6, "open": 0, "shut": 1}]}, r"Gripper: unknown fields \['shut'\], missing fields \['closed'\]"),
        ({"gripper": [{"index": "6", "open": 0, "closed": 1}]}, "Gripper: index='6' must be a whole number"),
        ({"gripper": [6]}, "Gripper: 6 is no table of fields"),
    ],
)
def test_a_description_from_another_machine_is_checked_by_type(change, message):
    with pytest.raises(ValueError, match=message):
        RobotSpec.from_dict({**json.loads(json.dumps(robots.load("tabletop").to_dict())), **change})


def test_what_is_no_description_at_all_is_refused():
    with pytest.raises(ValueError, match="RobotSpec: 'tabletop' is no table of fields"):
        RobotSpec.from_dict("tabletop")  # type: ignore[arg-type]
