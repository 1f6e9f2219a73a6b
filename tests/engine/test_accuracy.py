"""Precisions on the shipped policy, whose weights are trained, and on pictures of the simulator."""

import numpy as np
import pytest
import torch

from tests.engine.test_engine import HEADS
from tests.tiny import observation, tiny_policy
from vla_oft import engine
from vla_oft.engine import accuracy
from vla_oft.evaluate.suite import resolve
from vla_oft.policy import Policy
from vla_oft.recipes.nano_finetune import BASE


@pytest.fixture(scope="module")
def observations():
    """Scenes as they begin, and after a few actions of the policy."""
    policy, found = Policy.load(BASE), []
    for task in resolve("tabletop/touch,tabletop/lift"):
        env = task.make(128)
        for seed in range(3):
            env.reset(seed)
            for _ in range(2):
                found.append(env.observe())
                for action in policy.act([found[-1]])[0].actions:
                    env.step(action)
        env.close()
    return found


@pytest.mark.parametrize("precision", engine.PRECISIONS)
def test_every_precision_passes_its_gate_on_the_shipped_policy(precision, observations):
    fast = engine.load_compiled(BASE, precision=precision)
    error = accuracy.check_accuracy(fast, Policy.load(BASE), observations)
    assert precision != "int4" or fast.num_bytes < 0.95 * engine.load_compiled(BASE, precision="int8").num_bytes
    assert precision == "fp32" or error > 1e-4, "a reduced precision that changes nothing is not used"


def test_bfloat16_is_as_exact_as_the_plain_policys(observations):
    exact, plain = Policy.load(BASE), Policy.load(BASE, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted, found = (torch.cat([p.predict(p.prepare([o])).float() for o in observations]) for p in (exact, plain))
    error = accuracy.action_error(engine.load_compiled(BASE, precision="bf16"), exact, observations)
    assert error <= 1.1 * accuracy.relative_error(found, wanted)


def test_the_gate_refuses_what_is_too_far_off(observations):
    fast = engine.load_compiled(BASE, precision="int4")
    with pytest.raises(ValueError, match=r"precision='int4': actions are .* more than 1.0e-04: choose a more precise one"):
        accuracy.check_accuracy(fast, Policy.load(BASE), observations, limit=1e-4)
    with pytest.raises(ValueError, match=r"torch.bfloat16: load it with dtype=torch.float32"):
        accuracy.action_error(fast, Policy.load(BASE, dtype=torch.bfloat16), observations)
    assert np.isnan(accuracy.relative_error(torch.tensor([float("nan")]), torch.ones(1)))


def test_denoising_starts_from_the_same_noise():
    policy = tiny_policy(head=HEADS["diffusion"])
    assert accuracy.action_error(engine.compile_policy(policy), policy, [observation()]) < 1e-5
