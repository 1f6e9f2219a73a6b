"""One training batch with prompts of two lengths: loss, metrics and every gradient norm against the reference's recordings (float32)."""

import math

import numpy as np
import pytest
import torch

from tests.parity.fixtures import close, expected, load, our_name, recorded_training, recording, training_batch
from vla_oft.heads import discrete

METRICS = {
    "curr_action_l1_loss": "action_l1_first",
    "next_actions_l1_loss": "action_l1_rest",
    "l1_loss": "action_l1",
    "curr_action_accuracy": "token_accuracy_first",
    "next_actions_accuracy": "token_accuracy_rest",
    "action_accuracy": "token_accuracy_first",
}


@pytest.mark.parametrize("name", ["libero-l1", "libero-discrete-pd", "openvla-ar"])
def test_loss_metrics_and_gradients(shared, name):
    folder = shared / "parity" / name
    policy, wanted = load(folder).train(), expected(folder, "train_expected")
    metrics, norms = recorded_training(folder)
    with recording(policy) as seen:
        loss, ours = policy(training_batch(folder, policy))
    loss.backward()
    assert loss.item() == pytest.approx(metrics["loss_value"], abs=1e-5)
    assert {METRICS[k] for k in metrics if k != "loss_value"} <= ours.keys()
    for theirs, value in metrics.items():
        if theirs != "loss_value":
            assert ours[METRICS[theirs]].item() == pytest.approx(value, abs=1e-5), theirs
    for part in ("vision_features", "projected_patches", "proprio_embedding", "head_input", "head_output"):
        if part in wanted and part in seen:
            close(seen[part][0], wanted[part])
    check_gradients(policy, norms)
    if (folder / "train_grads_selected.npz").is_file():
        selected = np.load(folder / "train_grads_selected.npz")
        gradients = {n: p.grad for n, p in policy.named_parameters()}
        for theirs in selected.files:
            close(gradients[our_name(theirs)], selected[theirs], atol=1e-5, rtol=1e-3)


def check_gradients(policy: torch.nn.Module, norms: dict[str, float]) -> None:
    ours = {name: p.grad.norm().item() for name, p in policy.named_parameters() if p.grad is not None}
    assert ours.keys() == norms.keys()
    for name, norm in norms.items():
        assert ours[name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("name", ["libero-discrete-pd", "openvla-ar"])
def test_predicted_tokens_while_training(shared, name):
    folder = shared / "parity" / name
    policy, wanted = load(folder).train(), expected(folder, "train_expected")
    batch = training_batch(folder, policy)
    config, num_tokens = policy.action_head.config, policy.config.vlm.tokens.num_tokens
    ids = discrete.encode(batch.actions, config.bins, num_tokens)
    shifted = wanted["labels"][:, 1:]
    action_rows = shifted > num_tokens - config.bins - 1
    np.testing.assert_array_equal(ids.flatten(1), shifted[action_rows].reshape(2, -1))
    with torch.no_grad(), recording(policy) as seen:
        policy(batch)
        predicted = policy.vlm.language_model.lm_head(seen["actions_hidden_states"][0]).argmax(-1)
    np.testing.assert_array_equal(predicted[:, :-1], wanted["predicted_token_ids"][action_rows].reshape(2, -1))


def test_padding_counts_in_film_only_with_parity(shared):
    """The reference's mean over language embeddings includes padding; ours only when asked to."""
    folder = shared / "parity" / "aloha-l1-film"
    policy = load(folder).train()
    batch = training_batch(folder, policy)
    assert not batch.prompt_mask.all()
    with torch.no_grad():
        with_padding, _ = policy(batch)
        without_padding, _ = policy.eval()(batch)
    assert math.isfinite(with_padding.item())
    assert abs(with_padding.item() - without_padding.item()) > 1e-6
