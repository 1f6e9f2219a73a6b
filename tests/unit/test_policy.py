"""The model's promises: bidirectional attention, blindness to padding, sight, and faithful checkpoints."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tiny import INSTRUCTIONS, observation, tiny_batch, tiny_config, tiny_policy, tiny_statistics
from vla_oft.heads import l1
from vla_oft.policy import Policy, PolicyInputs, load_config


def predict(policy: Policy, inputs: PolicyInputs) -> torch.Tensor:
    with torch.inference_mode():
        return policy.predict(inputs)


def test_the_first_token_sees_the_last_one():
    policy = tiny_policy()
    llm = policy.vlm.language_model
    embeds = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(0))
    changed = embeds.clone()
    changed[:, -1] += 1
    positions = torch.arange(12)[None]
    with torch.inference_mode():
        full = [llm(e, positions, key_mask=None, causal=False)[0][:, 0] for e in (embeds, changed)]
        causal = [llm(e, positions, key_mask=None, causal=True)[0][:, 0] for e in (embeds, changed)]
    assert (full[0] - full[1]).abs().max() > 1e-3
    assert torch.equal(causal[0], causal[1])


def test_the_first_action_depends_on_the_last_slot_and_the_stop_token():
    policy = tiny_policy()
    inputs = policy.prepare([observation()])
    before = predict(policy, inputs)
    with torch.no_grad():
        policy.vlm.language_model.model.embed_tokens.weight[policy.config.vlm.tokens.stop] += 1
    assert (predict(policy, inputs) - before)[:, 0].abs().max() > 1e-5


@pytest.mark.parametrize("film", [True, False])
def test_padding_never_changes_an_answer(film: bool):
    policy = tiny_policy(film=film)
    inputs = policy.prepare([observation()])
    padded = dataclasses.replace(
        inputs,
        prompt_ids=F.pad(inputs.prompt_ids, (5, 0), value=policy.config.vlm.tokens.pad),
        prompt_mask=F.pad(torch.ones_like(inputs.prompt_ids, dtype=torch.bool), (5, 0)),
    )
    with torch.no_grad():  # whatever the padding token's embedding is
        policy.vlm.language_model.model.embed_tokens.weight[policy.config.vlm.tokens.pad] = 100.0
    assert (predict(policy, padded) - predict(policy, inputs)).abs().max() < 1e-5


def test_a_batch_of_different_prompts_answers_like_one_at_a_time():
    policy = tiny_policy()
    observations = [observation(instruction=text, seed=i) for i, text in enumerate(INSTRUCTIONS)]
    together = policy.act(observations)
    for chunk, single in zip(together, observations, strict=True):
        np.testing.assert_allclose(chunk.actions, policy.act([single])[0].actions, atol=1e-5)


def test_black_and_white_images_give_different_actions():
    policy = tiny_policy()
    black, white = policy.act([observation(0), observation(255)])
    assert np.abs(black.actions - white.actions).max() > 1e-3


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_each_camera_matters(camera: str):
    policy = tiny_policy()
    plain = observation()
    changed = dataclasses.replace(plain, images={**plain.images, camera: 255 - plain.images[camera]})
    before, after = policy.act([plain, changed])
    assert np.abs(before.actions - after.actions).max() > 1e-4


def test_the_instruction_and_the_state_matter():
    policy = tiny_policy()
    plain = observation()
    assert plain.state is not None
    other_words = dataclasses.replace(plain, instruction=INSTRUCTIONS[1])
    other_state = dataclasses.replace(plain, state=-plain.state)
    before, words, state = policy.act([plain, other_words, other_state])
    assert np.abs(before.actions - words.actions).max() > 1e-4
    assert np.abs(before.actions - state.actions).max() > 1e-4


def test_film_changes_the_vision_features_only_when_it_is_on():
    for film in (True, False):
        policy = tiny_policy(film=film)
        inputs = policy.prepare([observation()])
        language = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            first, second = (policy.vlm.embed_images(inputs.pixels, each) for each in language)
        assert ((first - second).abs().max() > 1e-4) == film


def test_film_is_the_identity_at_initialisation():
    fresh = Policy.create(tiny_config(), tiny_statistics(), tiny_policy().tokenizer, seed=0).eval()
    pixels = fresh.prepare([observation()]).pixels
    language = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(fresh.vlm.embed_images(pixels, language[0]), fresh.vlm.embed_images(pixels, language[1]))


def test_a_checkpoint_gives_the_same_answers_back(tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path / "checkpoint")
    loaded = Policy.load(tmp_path / "checkpoint")
    assert loaded.config == policy.config
    for name, weight in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    np.testing.assert_allclose(loaded.act([observation()])[0].actions, policy.act([observation()])[0].actions, atol=1e-5)


def test_saving_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        tiny_policy().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "statistics.json").unlink(), "no statistics.json"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no model"),
        (lambda d: (d / "policy.json").unlink(), "not a checkpoint"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(tmp_path, damage, message):
    folder = tmp_path / "checkpoint"
    tiny_policy().save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Policy.load(folder)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_policy().save(folder)
    document = json.loads((folder / "policy.json").read_text())
    document["chunk_len"] = 4
    document["vlm"]["llm"]["mlp_dim"] = 100
    (folder / "policy.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"gate_proj.*\(96, 48\) instead of \(100, 48\)"):
        Policy.load(folder)


def test_an_unknown_field_of_a_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_policy().save(folder)
    document = json.loads((folder / "policy.json").read_text())
    document["chunk_length"] = 4
    (folder / "policy.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="chunk_length"):
        load_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"front": np.zeros((8, 8, 3), np.uint8)}}, "no camera 'wrist'"),
        ({"images": {"front": np.zeros((8, 8, 3), np.float32), "wrist": np.zeros((8, 8, 3), np.uint8)}}, "must be uint8"),
        ({"state": None}, "no state"),
        ({"state": np.zeros(7, np.float32)}, r"shape \(8,\)"),
        ({"state": np.full(8, np.nan, np.float32)}, "not finite"),
        ({"instruction": " "}, "instruction"),
    ],
)
def test_a_bad_observation_is_refused_before_the_model_runs(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy().act([dataclasses.replace(observation(), **change)])


def test_broken_weights_never_reach_the_robot():
    policy = tiny_policy()
    with torch.no_grad():
        policy.action_head.model.fc2.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        policy.act([observation()])


def test_steps_beyond_the_end_of_an_episode_do_not_train():
    policy = tiny_policy()
    batch = tiny_batch(policy)
    valid = batch.valid.clone()
    valid[:, 5:] = False
    wild = batch.actions.clone()
    wild[:, 5:] = 1e6
    calm = dataclasses.replace(batch, valid=valid)
    assert torch.equal(policy(calm)[0], policy(dataclasses.replace(calm, actions=wild))[0])


def test_every_trained_parameter_receives_a_gradient():
    policy = tiny_policy().train()
    batch = tiny_batch(policy)
    policy(dataclasses.replace(batch, grounding=torch.ones_like(batch.grounding)))[0].backward()
    silent = [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert not policy.vlm.language_model.lm_head.weight.requires_grad, "nothing reads the vocabulary projection of a continuous head"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_policy_acts_in_the_precision_that_it_is_loaded_in(tmp_path, dtype):
    policy = tiny_policy()
    policy.save(tmp_path / "checkpoint")
    loaded = Policy.load(tmp_path / "checkpoint", dtype=dtype)
    assert loaded.dtype == dtype
    np.testing.assert_allclose(loaded.act([observation()])[0].actions, policy.act([observation()])[0].actions, atol=0.1)
    loaded.save(tmp_path / "again")
    again = Policy.load(tmp_path / "again")
    assert again.dtype == torch.float32, "the precision of a CPU, whatever the weights are stored in"
    for name, weight in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.float()), name


def test_huber_is_quadratic_near_zero_and_linear_far_away():
    policy = tiny_policy(head=l1.Config(loss="huber", delta=0.5))
    batch = tiny_batch(policy)
    with torch.inference_mode():
        target = policy.predict(batch)
        losses = {gap: float(policy(dataclasses.replace(batch, actions=target + gap, grounding=None))[0]) for gap in (0.1, 0.2, 2.0, 4.0)}
    assert losses[0.2] == pytest.approx(4 * losses[0.1], rel=1e-2)
    assert losses[4.0] - losses[2.0] == pytest.approx(2.0, rel=1e-2)
