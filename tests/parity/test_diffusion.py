"""Denoising diffusion against the reference's recordings: the pure functions, each step of inference, one training batch."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.parity.fixtures import close, expected, load, observation, our_name, recorded_training, recording, training_batch
from vla_oft import preprocess
from vla_oft.heads import diffusion
from vla_oft.policy import PolicyInputs

CONTEXT = 1 + 512 + 1  # index of the level's token: after BOS, patches and state


@pytest.fixture
def folder(shared):
    return shared / "parity" / "libero-diffusion"


@pytest.fixture(scope="module")
def functions(shared):
    return np.load(shared / "parity" / "pure_functions" / "diffusion_ddim.npz")


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


# pure functions


def test_schedule(functions):
    betas, alphas = diffusion._tables(50)
    np.testing.assert_array_equal(np.float32(betas), functions["betas"])
    np.testing.assert_array_equal(np.float32(alphas), functions["alphas_cumprod"])
    np.testing.assert_array_equal(diffusion.alphas_cumprod(50).numpy(), functions["alphas_cumprod"])


def test_noise_of_every_level(functions):
    noisy = diffusion.add_noise(tensor(functions["add_noise_x0"]), tensor(functions["add_noise_noise"]), torch.arange(50), 50)
    close(noisy, functions["add_noise_out"], atol=1e-7, rtol=0)


@pytest.mark.parametrize("width", [32, 64, 4096])
def test_embedded_levels(functions, width):
    """Angles reach 49 radians: another order of float32 operations differs by 4e-6, so 5e-7 tells them apart."""
    embedded = diffusion.embed_levels(tensor(functions[f"sincos_dim{width}_t"]).long(), width)
    close(embedded, functions[f"sincos_dim{width}"], atol=5e-7, rtol=0)


@pytest.mark.parametrize("steps", [50, 10, 5, 1])
def test_denoising_steps(functions, steps):
    levels = diffusion.inference_levels(50, steps)
    assert levels == functions[f"ddim{steps}_timesteps"].tolist()
    actions = tensor(functions[f"ddim{steps}_start"])
    for i, level in enumerate(levels):
        predicted = tensor(functions[f"ddim{steps}_noise_pred"][i])[None]
        actions = diffusion.denoise(actions, predicted, level, 50, steps)
        close(actions, functions[f"ddim{steps}_prev_sample"][i], atol=1e-6, rtol=0)


# the whole policy


@contextmanager
def recording_head(head, replies=None):
    """Slots' scalars, slots and predicted noise of every pass; `replies` (passes, ...) take the place of the predicted noise.

    The fixture's weights are random, and its denoising chaotic: each pass makes a difference about eight times larger. Initial noise that
    differs by 1e-7 ends up 1.5 apart after 50 passes, 0.14 after 10; so do two float32 programs that round differently. With the
    recorded noise as replies every pass starts where the reference's did.
    """
    seen = {"noisy_actions": [], "slots": [], "predicted": []}

    def note_slots(module, args, output):
        seen["noisy_actions"].append(args[0].detach())
        seen["slots"].append(output.detach())

    def note_noise(module, args, output):
        seen["predicted"].append(output.detach())
        return None if replies is None else tensor(replies[len(seen["predicted"]) - 1]).view_as(output)

    hooks = [head.noisy_action_projector.register_forward_hook(note_slots), head.noise_predictor.register_forward_hook(note_noise)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def recorded_inputs(folder, policy, images) -> PolicyInputs:
    """The recorded observation, with images as the reference prepared them: ours may differ by one 8-bit level here and there."""
    pixels = preprocess.to_pixels(policy.config.preprocess, tensor(images)[None])
    return dataclasses.replace(policy.prepare([observation(folder, policy)]), pixels=pixels)


@pytest.mark.parametrize("name", ["infer_50steps_center_crop_true", "infer_50steps_center_crop_false", "infer_10steps_center_crop_true"])
def test_every_inference_step(folder, name):
    policy, wanted = load(folder), expected(folder, name)
    steps = policy.action_head.inference_steps = len(wanted["timesteps"])
    images = (wanted if "images_after_prepare" in wanted else expected(folder))["images_after_prepare"]
    inputs = recorded_inputs(folder, policy, images)
    with torch.inference_mode(), recording(policy) as backbone, recording_head(policy.action_head, wanted["noise_pred_per_step"]) as head:
        actions = policy.predict(inputs, noise=tensor(wanted["initial_noise"]))
    assert diffusion.inference_levels(50, steps) == wanted["timesteps"].tolist()
    close(torch.cat(head["predicted"]), wanted["noise_pred_per_step"], atol=5e-5, rtol=0)
    close(torch.cat(head["noisy_actions"]), wanted["noisy_actions_per_step"], atol=1e-6, rtol=0)
    sequences, hidden = backbone["multimodal_embeddings"], backbone["actions_hidden_states"]
    close(torch.cat(sequences)[:, CONTEXT], wanted["timestep_embedding_per_step"], atol=1e-6, rtol=0)
    close(hidden[0], wanted["head_input_step0"], atol=5e-5, rtol=0)
    close(hidden[-1], wanted["actions_hidden_states"], atol=5e-5, rtol=0)
    close(actions, wanted["normalized_actions"], atol=1e-6, rtol=0)
    if "multimodal_embeddings" in wanted:
        close(head["slots"][0], wanted["noisy_action_features_step0"], atol=1e-6, rtol=0)
        close(sequences[0], wanted["multimodal_embeddings"], atol=1e-5, rtol=0)
        close(sequences[-1], wanted["multimodal_embeddings_last_step"], atol=1e-5, rtol=0)


def train_with(policy, noise, levels) -> None:
    """Let the policy's own forward pass use recorded draws."""
    head = policy.action_head
    head.loss = lambda decode, actions, valid: head.noise_loss(decode, actions, valid, noise, levels)


def test_training_batch(folder):
    policy, wanted = load(folder).train(), expected(folder, "train_expected")
    metrics, norms = recorded_training(folder)
    noise, levels = tensor(wanted["noise"]), tensor(wanted["diffusion_timesteps"])
    batch = training_batch(folder, policy)
    train_with(policy, noise, levels)
    with recording(policy) as backbone, recording_head(policy.action_head) as head:
        loss, ours = policy(batch)
    loss.backward()
    assert loss.item() == pytest.approx(metrics["loss_value"], abs=1e-5)
    assert loss.item() == pytest.approx(float(wanted["loss"]), abs=1e-5)
    assert ours["noise_mse"].item() == loss.item()
    close(batch.actions, wanted["actions"], atol=0, rtol=0)
    close(head["noisy_actions"][0], wanted["noisy_actions"], atol=1e-6, rtol=0)
    close(head["slots"][0], wanted["noisy_action_features"], atol=1e-6, rtol=0)
    close(head["predicted"][0], wanted["head_output"], atol=5e-5, rtol=0)
    close(diffusion.embed_levels(levels, 32), wanted["diffusion_timestep_embeddings"], atol=1e-6, rtol=0)
    assert batch.prompt_mask is not None
    after_padding = CONTEXT + (~batch.prompt_mask).sum(1)
    context = backbone["multimodal_embeddings"][0][torch.arange(len(after_padding)), after_padding]
    close(context, wanted["diffusion_timestep_embeddings"], atol=1e-6, rtol=0)
    close(backbone["actions_hidden_states"][0], wanted["head_input"], atol=5e-5, rtol=0)
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    selected = np.load(folder / "train_grads_selected.npz")
    for theirs in selected.files:
        close(gradients[our_name(theirs)], selected[theirs], atol=1e-5, rtol=1e-3)


def test_sampling_while_training(folder):
    policy, wanted = load(folder).train(), np.load(folder / "train_diffusion_sampling.npz")
    head, batch = policy.action_head, training_batch(folder, policy)
    train_with(policy, tensor(wanted["noise"]), tensor(wanted["diffusion_timesteps"]))
    with torch.no_grad():
        loss, _ = policy(batch)
    assert loss.item() == pytest.approx(float(wanted["loss"]), abs=1e-5)
    noisy = diffusion.add_noise(batch.actions, tensor(wanted["noise"]), tensor(wanted["diffusion_timesteps"]), 50)
    close(noisy, wanted["noisy_actions"], atol=1e-6, rtol=0)
    metrics = {}

    def sample(decode, actions, valid):
        metrics.update(head.sampled_l1(decode, actions, valid, tensor(wanted["sampling_initial_noise"])))
        return actions.sum(), metrics

    head.loss = sample
    with recording_head(head, wanted["sampling_noise_pred_per_step"]) as seen:
        policy(batch)
    close(torch.stack(seen["predicted"]), wanted["sampling_noise_pred_per_step"], atol=5e-5, rtol=0)
    assert metrics["action_l1_first"].item() == pytest.approx(float(wanted["curr_action_l1_loss"]), abs=1e-5)
    assert metrics["action_l1_rest"].item() == pytest.approx(float(wanted["next_actions_l1_loss"]), abs=1e-5)
