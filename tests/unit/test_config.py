"""Frozen configurations to JSON and back, strictly."""

import json
from dataclasses import dataclass

import pytest

from tests.tiny import tiny_config
from vla_oft.config import from_dict, to_dict
from vla_oft.policy import PolicyConfig


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Twig:
    name: str


@dataclass(frozen=True, kw_only=True)
class Tree:
    part: Leaf | Twig
    leaves: tuple[Leaf, ...] = ()
    note: str | None = None


def test_a_policy_config_survives_json_and_names_its_head():
    config = tiny_config()
    assert to_dict(config)["head"]["kind"] == "l1"
    assert from_dict(PolicyConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("tree", [Tree(part=Leaf(size=3)), Tree(part=Twig(name="x"), leaves=(Leaf(size=1, ratio=2.0),), note="n")])
def test_unions_keep_their_kind(tree):
    assert from_dict(Tree, json.loads(json.dumps(to_dict(tree)))) == tree


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"part": {"kind": "leaf", "size": "3"}}, r"Tree.part.size: expected int, got '3'"),
        ({"part": {"kind": "stone", "size": 3}}, "kind 'stone' is unknown"),
        ({"part": {"kind": "leaf", "size": 3, "colour": 1}}, "unknown fields \\['colour'\\]"),
        ({"part": {"kind": "leaf"}}, "missing fields \\['size'\\]"),
        ({"part": {"kind": "leaf", "size": True}}, "expected int, got True"),
        ({"part": {"kind": "leaf", "size": 3}, "leaves": "many"}, "expected a list"),
        ([], "expected an object"),
    ],
)
def test_mistakes_are_named(document, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Tree, document)
