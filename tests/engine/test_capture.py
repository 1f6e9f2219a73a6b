"""What a captured graph would do, on the CPU: every operation of a pass is recorded once and replayed on the same memory.

A pass that read anything which is not refilled in place (a prompt's table, an old weight), or that asked the host for a value, would show.
"""

from collections import Counter

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.test_engine import HEADS, INSTRUCTIONS, LONG, same, save
from tests.tiny import SPEC, observation, tiny_policy
from vla_oft import engine, preprocess
from vla_oft_client import Observation

TEXTS = [INSTRUCTIONS[0], "touch the blue block", "touch the green block", INSTRUCTIONS[1], LONG, "go"]
ASKS_THE_HOST = ("_local_scalar_dense", "nonzero", "equal.default")
UNPACKED = engine.Options(pack=False)
"""Packed weights of the CPU move when they are exchanged; those of a GPU do not."""


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.asked = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ASKS_THE_HOST):
            self.asked[str(func)] += 1
        self.calls.append((func, args, kwargs or {}, out))
        return out


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(value) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(value)}


class Replay:
    """Stands in for `torch.cuda.CUDAGraph`. Views are not repeated: they are the same memory."""

    def __init__(self, recorder: Recorder) -> None:
        self.calls = []
        for func, args, kwargs, out in recorder.calls:
            views = all(memory(t) <= memory((args, kwargs)) for t in tensors(out)) and tensors(out)
            if func._schema.is_mutable or not views:
                self.calls.append((func, args, kwargs, tensors(out)))

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for output, new in zip(outputs, tensors(found), strict=True):
                    output.copy_(new)


@pytest.fixture(autouse=True)
def captures(monkeypatch) -> Counter:
    count = Counter()

    def capture(self) -> Replay:
        self._forward()
        with Recorder() as recorder:
            self._actions = self._forward()
        assert not recorder.asked
        self._actions.fill_(float("nan"))
        count["captures"] += 1
        return Replay(recorder)

    monkeypatch.setattr(engine.runner.Runner, "_capture", capture)
    return count


def on_graphs(fast: engine.CompiledPolicy) -> engine.CompiledPolicy:
    fast._graph = fast._device_images = True
    return fast


@pytest.mark.parametrize("arguments", [{}, {"max_prompt_len": 30}])
@pytest.mark.parametrize("head", ["l1", "discrete", "autoregressive", "diffusion"])
def test_replays_answer_as_the_plain_policy_for_any_sequence_of_batches(captures, head, arguments):
    policy = tiny_policy(head=HEADS[head])
    fast, rng = on_graphs(engine.compile_policy(policy, options=UNPACKED, **arguments)), np.random.default_rng(0)
    calls = 8 if head == "autoregressive" else 10
    for i in range(calls):
        if head == "diffusion" and i % 3 == 2:
            policy.action_head.inference_steps = fast.action_head.inference_steps = 1 + i % 4
        count = int(rng.integers(1, 6))
        same(fast, policy, [observation(seed=10 * i + j, instruction=TEXTS[int(rng.integers(6))]) for j in range(count)], tolerance=3e-5)
    assert captures["captures"] == len(fast._runners) < calls, "some batches were served by graphs of earlier ones"


def test_batches_of_any_size_and_prompts_of_like_length_share_graphs(captures):
    policy = tiny_policy(head=HEADS["pooled"])
    fast = on_graphs(engine.compile_policy(policy, options=UNPACKED))
    for count in (3, 4, 3, 4):
        texts = [INSTRUCTIONS[0] + " red" * ((i + count) % 3) for i in range(count)]
        assert len({len(policy.encode_prompts.ids(text)) for text in texts}) == 3
        same(fast, policy, [observation(seed=i, instruction=text) for i, text in enumerate(texts)])
    assert captures["captures"] == 1


@pytest.mark.parametrize(
    "config",
    [preprocess.reference_config(image_size=16), preprocess.Config(image_size=16, resize="lanczos", crop_area=0.9, fit="letterbox")],
)
def test_images_are_prepared_inside_the_graph(captures, config):
    policy = tiny_policy(preprocess=config)
    fast = on_graphs(engine.compile_policy(policy, options=UNPACKED))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        images = {camera: rng.integers(0, 256, (40 + 7 * i, 50, 3), dtype=np.uint8)[::-1] for i, camera in enumerate(SPEC.cameras)}
        same(fast, policy, [Observation(images, rng.normal(size=8).astype(np.float32), TEXTS[0])])
    assert captures["captures"] == 1


def test_weights_are_exchanged_under_a_graph(captures, tmp_path):
    policies = [tiny_policy(seed=seed) for seed in range(2)]
    folders = [save(policy, tmp_path / str(seed)) for seed, policy in enumerate(policies)]
    fast = on_graphs(engine.load_compiled(folders[0], options=UNPACKED))
    for seed in (0, 1, 0, 1):
        fast.swap(folders[seed])
        same(fast, policies[seed], [observation(seed=3)])
    assert captures["captures"] == 1
