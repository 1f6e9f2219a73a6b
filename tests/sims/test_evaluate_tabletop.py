"""The evaluation on the embedded simulator itself: few episodes, real physics and pictures."""

from importlib.util import find_spec

import numpy as np
import pytest

from vla_oft.evaluate.plan import FIRST_SEED, EvalConfig
from vla_oft.evaluate.runner import evaluate
from vla_oft.evaluate.success import Rate
from vla_oft.evaluate.suite import resolve
from vla_oft.robots.tabletop import SPEC
from vla_oft_client import ActionChunk

pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)


class Idle:
    def act(self, observations):
        return [ActionChunk(np.zeros((8, 7), np.float32), o.time_s, SPEC.period_s).check(SPEC) for o in observations]


def test_an_idle_policy_fails_where_the_expert_succeeds(tmp_path):
    config = EvalConfig(suite="tabletop/touch", trials=3, num_envs=2, controls=("expert",), camera_size=64, out=tmp_path)
    results = evaluate(Idle(), config)
    assert results.success == Rate(0, 3)
    assert results.score().correct == Rate(0, 0)
    assert results.score("expert").success == Rate(3, 3)
    assert "mujoco" in results.versions
    assert results.versions["renderer"]


def test_swapping_the_instruction_keeps_every_pixel():
    env = resolve("tabletop/stack")[0].make(64)
    env.reset(FIRST_SEED)
    normal = env.observe()
    env.reset(FIRST_SEED, swap=1)
    swapped = env.observe()
    env.close()
    assert normal.instruction != swapped.instruction
    for camera in SPEC.cameras:
        np.testing.assert_array_equal(normal.images[camera], swapped.images[camera])
    np.testing.assert_array_equal(normal.state, swapped.state)
