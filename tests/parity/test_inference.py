"""From raw images, state and instruction to actions, through imported checkpoints, against the reference's recordings."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.parity.fixtures import INFERENCE, close, expected, inputs, load, observation, recording
from vla_oft.policy import PolicyInputs

ONE_PASS = [name for name in INFERENCE if name not in ("openvla-ar", "libero-diffusion")]
"""Autoregressive steps are below; denoising, which is chaotic with random weights, is checked pass by pass in test_diffusion.py."""
REGRESSION = ["libero-l1", "aloha-l1-film", "libero-l1-lora"]


@pytest.mark.parametrize("name", [*ONE_PASS, "libero-diffusion"])
def test_token_ids(shared, name):
    policy, wanted = load(shared / "parity" / name), expected(shared / "parity" / name)
    ids, mask = policy.encode_prompts([observation(shared / "parity" / name, policy).instruction])
    num_slots = policy.config.chunk_len * policy.config.robot.action_dim
    np.testing.assert_array_equal(wanted["full_input_ids"][0, 1 : -num_slots - 1], ids[0])
    assert mask.all()
    assert policy.config.vlm.tokens.bos == wanted["full_input_ids"][0, 0]
    assert policy.config.vlm.tokens.stop == wanted["full_input_ids"][0, -1]


@pytest.mark.parametrize("name", INFERENCE)
def test_pixels_and_state(shared, name):
    folder = shared / "parity" / name
    policy, wanted = load(folder), expected(folder)
    prepared = policy.prepare([observation(folder, policy)])
    levels = np.abs(prepared.pixels.numpy().reshape(wanted["pixel_values"].shape) - wanted["pixel_values"])
    level = 1 / 255 / 0.22  # the widest step between two 8-bit values, in normalised units
    assert levels.max() <= 1.01 * level
    assert (levels > 1e-5).mean() <= 2e-4
    if prepared.state is not None:
        close(prepared.state, wanted["normalized_proprio"], atol=1e-6)


@pytest.mark.parametrize("name", ONE_PASS)
def test_hidden_states(shared, name):
    folder = shared / "parity" / name
    policy, wanted = load(folder), expected(folder)
    with torch.inference_mode(), recording(policy) as seen:
        policy.predict(inputs(folder, policy))
        embeddings = seen["multimodal_embeddings"][0]
        whole, _ = policy.vlm.language_model(embeddings, torch.arange(embeddings.shape[1])[None], key_mask=None, causal=False)
    for part in ("vision_features", "projected_patches", "proprio_embedding", "multimodal_embeddings"):
        if part in wanted and part in seen:
            close(seen[part][0], wanted[part])
    close(whole, wanted["last_hidden_state"])
    last_decode = seen["actions_hidden_states"][-2]  # the last one is `whole`
    close(last_decode, wanted["actions_hidden_states"])
    if name in REGRESSION:
        close(seen["head_input"][0], wanted["head_input"])
        close(seen["head_output"][0], wanted["head_output"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("name", [*ONE_PASS, "openvla-ar"])
def test_actions(shared, name, center_crop):
    """The whole way: what `Policy.act` returns is what the reference hands to the robot."""
    folder = shared / "parity" / name
    policy = load(folder, center_crop=center_crop)
    wanted = expected(folder, INFERENCE[name].replace("true", str(center_crop).lower()))
    (chunk,) = policy.act([observation(folder, policy)])
    scale = policy.action_normalizer.unnormalize(np.ones_like(chunk.actions)) - policy.action_normalizer.unnormalize(
        -np.ones_like(chunk.actions)
    )
    tolerance = 5e-5 * np.abs(scale) / 2 + 1e-6
    np.testing.assert_array_less(np.abs(chunk.actions - wanted["actions"].reshape(chunk.actions.shape)), tolerance)


@pytest.mark.parametrize("center_crop", [True, False])
def test_base_and_adapter_merge_in_float32(shared, center_crop):
    """The unmerged recording, which the reference's own merge in bfloat16 misses by 1e-2."""
    folder = shared / "parity" / "libero-l1-lora"
    policy = load(folder, base=True, center_crop=center_crop)
    wanted = expected(folder, f"infer_unmerged_center_crop_{str(center_crop).lower()}")
    with torch.inference_mode(), recording(policy) as seen:
        actions = policy.predict(inputs(folder, policy, center_crop=center_crop))
    close(actions, wanted["normalized_actions"], atol=5e-5, rtol=0)
    for part in ("head_input", "actions_hidden_states", "multimodal_embeddings"):
        if part in wanted:
            close(seen[part][0], wanted[part])


def test_discrete_tokens_and_logits(shared):
    folder = shared / "parity" / "libero-discrete-pd"
    policy, wanted = load(folder), expected(folder)
    with torch.inference_mode(), recording(policy) as seen:
        policy.predict(inputs(folder, policy))
        logits = policy.vlm.language_model.lm_head(seen["actions_hidden_states"][0])
    np.testing.assert_array_equal(logits.argmax(-1), wanted["predicted_token_ids"])
    close(logits[..., 31744:32000], wanted["action_logits_last256"])
    others = torch.cat([logits[..., :31744], logits[..., 32000:]], dim=-1)
    close(others.amax(-1), wanted["action_logits_max_other"])


def test_autoregressive_steps(shared):
    folder = shared / "parity" / "openvla-ar"
    policy, wanted = load(folder), expected(folder)
    ids, _ = policy.encode_prompts([observation(folder, policy).instruction])
    np.testing.assert_array_equal(wanted["generate_input_ids"][0, 1:], ids[0])
    with torch.inference_mode(), recording(policy) as seen:
        actions = policy.predict(inputs(folder, policy))
        hidden = torch.cat(seen["actions_hidden_states"], dim=1)
        logits = policy.vlm.language_model.lm_head(hidden)
        embeddings = seen["multimodal_embeddings"][0]
        prefill, _ = policy.vlm.language_model(embeddings, torch.arange(embeddings.shape[1])[None], key_mask=None, causal=True)
    close(embeddings, wanted["multimodal_embeddings"])
    close(prefill, wanted["prefill_last_hidden_state"])
    close(hidden, wanted["step_hidden_states"])
    close(logits[..., 31744:32000], wanted["step_logits_last256"])
    np.testing.assert_array_equal(logits.argmax(-1)[0], wanted["action_token_ids"])
    close(actions, wanted["normalized_actions"], atol=1e-6, rtol=0)


def test_cached_steps_equal_one_causal_pass_with_padding(shared):
    """Two prompts of different lengths: keys and values from the cache, and one pass over the finished sequence."""
    folder = shared / "parity" / "openvla-ar"
    policy = load(folder)
    first = inputs(folder, policy)
    longer, mask = policy.encode_prompts([observation(folder, policy).instruction, "put it down"])
    both = PolicyInputs(
        pixels=first.pixels.expand(2, -1, -1, -1, -1), prompt_ids=torch.from_numpy(longer), prompt_mask=torch.from_numpy(mask), state=None
    )
    with torch.inference_mode():
        together = policy.predict(both)
        alone = policy.predict(first)
        ids, ones = policy.encode_prompts(["put it down"])
        short = policy.predict(PolicyInputs(pixels=first.pixels, prompt_ids=torch.from_numpy(ids), prompt_mask=None, state=None))
    assert ones.all()
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(together[1], short[0], atol=1e-6)


@pytest.mark.parametrize("name", ["libero-l1", "aloha-l1-film"])
@pytest.mark.parametrize("padding", [1, 3])
def test_padding_changes_nothing(shared, name, padding):
    folder = shared / "parity" / name
    policy, wanted = load(folder), expected(folder)
    alone = inputs(folder, policy)
    prompt = alone.prompt_ids
    with torch.inference_mode():
        actions = policy.predict(
            PolicyInputs(
                pixels=alone.pixels,
                prompt_ids=F.pad(prompt, (padding, 0), value=policy.config.vlm.tokens.pad),
                prompt_mask=F.pad(torch.ones_like(prompt, dtype=torch.bool), (padding, 0)),
                state=alone.state,
            )
        )
    close(actions, wanted["normalized_actions"], atol=5e-5, rtol=0)
