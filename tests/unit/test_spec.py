"""Robot descriptions: round trips, refusals, readable differences."""

import dataclasses
import json

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
    ],
)
def test_an_impossible_robot_is_refused_by_field(change, field):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(robots.load("tabletop"), **change)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="colour"):
        RobotSpec.from_dict({**robots.load("tabletop").to_dict(), "colour": "red"})
