"""The engine on a real GPU: captured graphs, fused kernels, tuned products, images prepared on the device."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.engine.test_engine import BATCHES, HEADS, LONG, NOISE, actions, random_adapter, same, save
from tests.tiny import INSTRUCTIONS, observation, tiny_policy
from vla_oft import engine, preprocess
from vla_oft.heads import diffusion
from vla_oft.policy import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ERROR = {"fp32": 1e-4, "bf16": 0.1, "fp8-llm": 0.4, "fp8": 0.6, "int8": 0.15, "int4": 0.9, "int8-dynamic": 0.2}
"""Largest relative error of the actions of tiny policies with random weights, which are far more sensitive than trained ones."""


UNTUNED = engine.Options(tune=False)
"""Tuning takes a while for every new shape: one test below does it."""


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def compiled(policy, **arguments):
    return engine.compile_policy(policy, **{"device": "cuda", "precision": "fp32", "options": UNTUNED, **arguments})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_answers_as_on_the_cpu(head, batch):
    policy = tiny_policy(head=HEADS[head])
    for arguments in ({}, {"max_prompt_len": 30}):
        fast = compiled(policy, **arguments)
        for _ in range(3):  # captured, then replayed
            same(fast, policy, BATCHES[batch], tolerance=2e-4)


@pytest.mark.parametrize("option", engine.Options.names())
def test_every_optimisation_can_be_turned_off(option):
    policy = tiny_policy()
    fast = compiled(policy, options=dataclasses.replace(UNTUNED, **{option: False}))
    for batch in BATCHES.values():
        same(fast, policy, batch, tolerance=2e-4)


@pytest.mark.parametrize("head", ["l1", "pooled", "diffusion", "autoregressive"])
@pytest.mark.parametrize("precision", engine.PRECISIONS)
def test_every_precision_runs_every_head(precision, head):
    """Vocabulary tokens jump where they change at all: of the discrete head only that it runs is checked."""
    policy = tiny_policy(head=HEADS[head])
    fast = compiled(policy, precision=precision)
    for batch in BATCHES.values():
        wanted, found = actions(policy, batch, noise=NOISE), actions(fast, batch, noise=NOISE)
        assert np.isfinite(found).all()
        if head != "autoregressive":
            assert np.linalg.norm(found - wanted) <= ERROR[precision] * np.linalg.norm(wanted)


@pytest.mark.parametrize("precision", engine.PRECISIONS)
def test_the_gpu_computes_what_the_cpu_computes_at_the_same_precision(precision):
    """With the pooled head, which barely enlarges roundings."""
    policy = tiny_policy(head=HEADS["pooled"])
    slow, fast = (compiled(policy, device=device, precision=precision) for device in ("cpu", "cuda"))
    for batch in BATCHES.values():
        wanted = actions(slow, batch)
        assert np.linalg.norm(actions(fast, batch) - wanted) <= 3e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4", "int8-dynamic"])
def test_tuned_products_answer_alike_and_are_remembered(precision, tmp_path):
    policy = tiny_policy()
    fast = compiled(policy, precision=precision, options=engine.Options())
    wanted = actions(policy, BATCHES["one"])
    for _ in range(2):
        assert np.linalg.norm(actions(fast, BATCHES["one"]) - wanted) <= ERROR[precision] * np.linalg.norm(wanted)
    (cache,) = (tmp_path / "vla_oft").glob("gemm-*.json")
    before = cache.read_text()
    again = compiled(policy, precision=precision, options=engine.Options())
    np.testing.assert_array_equal(actions(again, BATCHES["one"]), actions(fast, BATCHES["one"]))
    assert cache.read_text() == before


def test_inputs_change_between_replays():
    policy = tiny_policy()
    fast = compiled(policy)
    for seed, text in enumerate([INSTRUCTIONS[0], "touch the blue block", LONG, INSTRUCTIONS[0], LONG, "touch the blue block"]):
        same(fast, policy, [observation(seed=seed, instruction=text)], tolerance=2e-4)
    assert len(fast._runners) <= 3, "one graph for each length of prompt"


@pytest.mark.parametrize(
    "config",
    [
        preprocess.Config(image_size=16, resize="lanczos", crop_area=0.9),
        preprocess.Config(image_size=16, resize="bicubic", crop_area=1.0, fit="letterbox"),
        preprocess.reference_config(image_size=16),
    ],
)
def test_images_are_prepared_on_the_device_as_on_the_host(config):
    policy = tiny_policy(preprocess=config)
    rng = np.random.default_rng(0)
    sizes = dict(zip(policy.config.robot.cameras, [(48, 64), (97, 31)], strict=False))
    images = {camera: rng.integers(0, 256, (*sizes[camera], 3), dtype=np.uint8)[::-1, ::-1] for camera in sizes}
    observations = [dataclasses.replace(observation(seed=1), images=images)]
    fast = compiled(policy, cameras=sizes, instruction=INSTRUCTIONS[0])
    assert len(fast._runners) == 1
    same(fast, policy, observations, tolerance=2e-4)
    assert len(fast._runners) == 1, "the graph that was made beforehand is the one that is used"


def test_adapters_are_exchanged_under_a_captured_graph(tmp_path):
    policy = tiny_policy()
    folders = [save(policy, tmp_path / str(seed), random_adapter(policy, seed)) for seed in range(2)]
    fast = engine.load_compiled(folders[0], device="cuda", precision="fp32", options=UNTUNED)
    for folder in (*folders, *folders):
        fast.swap(folder)
        same(fast, Policy.load(folder), BATCHES["one"], tolerance=2e-4)
    assert len(fast._runners) == 1


def test_denoising_steps_have_a_graph_each():
    policy = tiny_policy(head=diffusion.Config(inference_steps=4))
    fast = compiled(policy)
    for steps in (4, 2, 4):
        fast.action_head.inference_steps = policy.action_head.inference_steps = steps
        same(fast, policy, BATCHES["one"], tolerance=2e-4)
    assert len(fast._runners) == 2


def test_a_second_batch_waits_for_the_first_to_have_left_the_host():
    policy = tiny_policy()
    fast = compiled(policy)
    batches = [[observation(seed=seed)] for seed in range(20)]
    wanted = [actions(policy, batch)[0] for batch in batches]
    found = []
    for batch in batches:
        found.append(fast.prepare(batch)().clone())
    torch.cuda.synchronize()
    got = np.stack([policy.interface.chunks(f.cpu().numpy(), b)[0].actions for f, b in zip(found, batches, strict=True)])
    np.testing.assert_allclose(got, np.stack(wanted), atol=2e-4)
