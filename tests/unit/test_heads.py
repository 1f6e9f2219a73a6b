"""Continuous action heads on a small stand-in for the backbone: a real attention layer, the same for every head."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import observation, tiny_batch, tiny_policy
from vla_oft.heads import diffusion, l1, pooled
from vla_oft.policy import Policy

WIDTH, CHUNK, DIM, BATCH = 32, 4, 3, 2
CONFIGS = [l1.Config(), l1.Config(loss="huber"), diffusion.Config(), pooled.Config(dropout=0.0), pooled.Config(loss="huber")]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make these tiny operations a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StandIn(nn.Module):
    """Implements `Decode` for `BATCH` fixed observations, repeated: one layer of full attention; row i predicts slot i."""

    def __init__(self, copies: int = 1) -> None:
        super().__init__()
        self.copies = copies
        torch.manual_seed(0)
        self.observations = nn.Parameter(torch.randn(BATCH, 3, WIDTH))
        self.positions = nn.Parameter(torch.randn(3 + 1 + CHUNK * DIM, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.calls: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def zeros(self, num_slots: int) -> Tensor:
        return self.observations.new_zeros(BATCH * self.copies, num_slots, WIDTH)

    def forward(self, slots: Tensor, context: Tensor | None = None) -> Tensor:
        context = self.zeros(1)[:, 0] if context is None else context
        x = torch.cat([self.observations.repeat(self.copies, 1, 1), context[:, None], slots], dim=1)
        x = x + self.positions[: x.shape[1]]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        hidden = (x + self.mlp(x))[:, 3:-1]
        if hidden.requires_grad:
            hidden.retain_grad()
        self.calls.append((slots, context, hidden))
        return hidden


def build(config) -> nn.Module:
    torch.manual_seed(1)
    module = {l1.Config: l1, diffusion.Config: diffusion, pooled.Config: pooled}[type(config)]
    return module.Head(config, WIDTH, CHUNK, DIM)


def draw(seed: int) -> Tensor:
    return torch.randn(BATCH, CHUNK, DIM, generator=torch.Generator().manual_seed(seed))


ACTIONS = draw(5).clamp(-1, 1)
VALID = torch.ones(BATCH, CHUNK, dtype=torch.bool)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_parameter_learns_and_shapes_fit(config):
    head, decode = build(config), StandIn()
    loss, metrics = head.loss(decode, ACTIONS, VALID)
    loss.backward()
    assert loss.ndim == 0 and not any(m.requires_grad or m.ndim for m in metrics.values())
    idle = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle and decode.observations.grad.any()
    head.eval()
    with torch.no_grad():
        actions = head.sample(decode, torch.Generator().manual_seed(0))
    assert actions.shape == (BATCH, CHUNK, DIM) and actions.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "num_updates", "copies"),
    [
        (l1.Config(), 150, 1),
        (l1.Config(loss="huber"), 150, 1),
        (pooled.Config(dropout=0.0), 150, 1),
        (diffusion.Config(), 800, 16),  # copies: each sees other noise at another level
    ],
    ids=str,
)
def test_a_small_batch_is_learnt_by_heart(config, num_updates, copies):
    head, decode = build(config), StandIn(copies)
    start = 1e-2 if copies > 1 else 3e-3
    optimizer = torch.optim.Adam([*head.parameters(), *decode.parameters()])
    actions, valid = ACTIONS.repeat(copies, 1, 1), VALID.repeat(copies, 1)
    for update in range(num_updates):
        optimizer.param_groups[0]["lr"] = start * (1 - update / num_updates)
        optimizer.zero_grad()
        head.loss(decode, actions, valid)[0].backward()
        optimizer.step()
        decode.calls.clear()
    head.eval()
    for steps in (50, 10, 5) if isinstance(config, diffusion.Config) else (1,):
        head.inference_steps = steps  # other heads do not look at it
        with torch.no_grad():
            error = (head.sample(decode, torch.Generator().manual_seed(0)) - actions).abs().mean()
        assert error < 0.15 * ACTIONS.abs().mean()


@pytest.mark.parametrize("config", [l1.Config(), l1.Config(loss="huber"), pooled.Config(dropout=0.0)], ids=str)
def test_targets_beyond_the_episodes_end_do_not_count(config):
    head, decode, valid, other = build(config), StandIn(), VALID.clone(), ACTIONS.clone()
    valid[1, 2:], other[1, 2:] = False, 9.0
    loss, metrics = head.loss(decode, ACTIONS, valid)
    changed, changed_metrics = head.loss(decode, other, valid)
    assert loss == changed and all(changed_metrics[k] == v for k, v in metrics.items())
    assert loss != head.loss(decode, ACTIONS, VALID)[0]


def test_diffusion_learns_nothing_from_steps_beyond_the_episodes_end():
    head, decode, valid = build(diffusion.Config()), StandIn(), VALID.clone()
    valid[1, 2:] = False
    head.loss(decode, ACTIONS, valid)[0].backward()
    gradient = decode.calls[0][2].grad.view(BATCH, CHUNK, -1)
    assert not gradient[~valid].any() and gradient[valid].any(-1).all()
    loss, metrics = head.loss(decode, ACTIONS, torch.zeros_like(valid))
    assert loss == 0 and metrics["noise_mse"] == 0


@pytest.mark.parametrize("config", [*CONFIGS[:2], diffusion.Config(inference_steps=1), *CONFIGS[3:]], ids=str)
def test_bfloat16_weights_give_nearly_the_same_actions(config):
    """One pass: random weights, denoised often, would make any difference large."""
    head, decode = build(config).eval(), StandIn()
    with torch.no_grad():
        expected = head.sample(decode, None, draw(3))
        decode.calls.clear()
        actual = head.bfloat16().sample(decode.bfloat16(), None, draw(3))
    assert actual.dtype == torch.float32
    assert all(part.dtype == torch.bfloat16 for part in decode.calls[0])
    assert (actual - expected).abs().mean() < 0.02
    loss, _ = head.loss(decode, ACTIONS, VALID)
    loss.backward()
    assert loss.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("config", [diffusion.Config(inference_steps=3), pooled.Config(dropout=0.0)], ids=str)
def test_a_policy_with_this_head_survives_its_checkpoint(tmp_path, config):
    policy = tiny_policy(head=config)
    observations, noise = [observation(seed=0), observation(seed=1)], torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    loss, _ = policy.train()(tiny_batch(policy))
    assert torch.isfinite(loss)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert loaded.config.head == config
    for ours, theirs in zip(policy.act(observations, noise), loaded.act(observations, noise), strict=True):
        np.testing.assert_array_equal(ours.actions, theirs.actions)


# diffusion


def test_diffusion_decodes_once_per_step_one_slot_per_scalar_and_tells_the_level():
    head, decode = build(diffusion.Config()), StandIn()
    for steps, levels in [(50, [*range(49, -1, -1)]), (10, [*range(45, -1, -5)]), (5, [40, 30, 20, 10, 0]), (2, [25, 0]), (1, [0])]:
        head.inference_steps = steps
        decode.calls.clear()
        with torch.no_grad():
            actions = head.sample(decode, None, draw(3))
        assert torch.isfinite(actions).all() and actions.abs().max() <= 1
        assert [slots.shape for slots, _, _ in decode.calls] == [(BATCH, CHUNK * DIM, WIDTH)] * steps
        for (_, context, _), level in zip(decode.calls, levels, strict=True):
            assert torch.equal(context, diffusion.embed_levels(torch.full((BATCH,), level), WIDTH))


@pytest.mark.parametrize("steps", range(1, 51))
def test_perfect_predictions_lead_through_every_level_to_the_actions(steps):
    noise, levels = draw(3), diffusion.inference_levels(50, steps)
    assert len(levels) == steps and levels[-1] == 0 and len({*np.diff(levels)}) <= 1
    x = diffusion.add_noise(ACTIONS, noise, torch.full((BATCH,), levels[0]), 50)
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        x = diffusion.denoise(x, noise, level, 50, steps)
        wanted = ACTIONS if following is None else diffusion.add_noise(ACTIONS, noise, torch.full((BATCH,), following), 50)
        torch.testing.assert_close(x, wanted, atol=1e-3, rtol=0)


def test_noise_decides_and_a_generator_draws_it_on_the_cpu():
    head, decode = build(diffusion.Config(inference_steps=5)), StandIn()
    with torch.no_grad():
        torch.manual_seed(8)
        given = head.sample(decode, None, draw(3))
        torch.manual_seed(9)
        assert torch.equal(given, head.sample(decode, None, draw(3)))
        assert torch.equal(given, head.sample(decode, torch.Generator().manual_seed(3)))
        assert not torch.equal(given, head.sample(decode, torch.Generator().manual_seed(4)))


def test_each_training_step_draws_its_own_noise_and_the_given_one_is_reproducible():
    head, decode = build(diffusion.Config()), StandIn()
    assert head.loss(decode, ACTIONS, VALID)[0] != head.loss(decode, ACTIONS, VALID)[0]
    levels = torch.tensor([3, 49])
    first, _ = head.noise_loss(decode, ACTIONS, VALID, draw(1), levels)
    assert first == head.noise_loss(decode, ACTIONS, VALID, draw(1), levels)[0]
    assert first != head.noise_loss(decode, ACTIONS, VALID, draw(1), levels.flip(0))[0]


def test_training_draws_every_level():
    head, decode = build(diffusion.Config(train_steps=4, inference_steps=4)), StandIn()
    seen = set()
    for _ in range(40):
        decode.calls.clear()
        head.loss(decode, ACTIONS, VALID)
        seen |= {tuple(row) for row in decode.calls[0][1].tolist()}
    assert seen == {tuple(row) for row in diffusion.embed_levels(torch.arange(4), WIDTH).tolist()}


def test_sampled_l1_is_the_error_of_the_sampled_actions():
    head, decode, valid = build(diffusion.Config(inference_steps=3)), StandIn(), VALID.clone()
    valid[:, 2:] = False
    metrics = head.sampled_l1(decode, ACTIONS, valid, draw(3))
    with torch.no_grad():
        error = (head.sample(decode, None, draw(3)) - ACTIONS).abs()
    torch.testing.assert_close(metrics["action_l1"], error[:, :2].mean())
    torch.testing.assert_close(metrics["action_l1_first"], error[:, 0].mean())
    torch.testing.assert_close(metrics["action_l1_rest"], error[:, 1].mean())
    assert math.isnan(head.sampled_l1(decode, ACTIONS, torch.zeros_like(valid), draw(3))["action_l1"])


def test_diffusion_stores_weights_only_and_survives_the_meta_device():
    config, decode = diffusion.Config(inference_steps=5), StandIn()
    trained = build(config)
    assert {name.split(".")[0] for name in trained.state_dict()} == {"noisy_action_projector", "noise_predictor"}
    diffusion._tables.cache_clear()
    with torch.device("meta"):
        loaded = build(config)
    loaded.load_state_dict(trained.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(loaded.sample(decode, None, draw(3)), trained.sample(decode, None, draw(3)))


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_an_impossible_number_of_inference_steps_is_refused(steps):
    with pytest.raises(ValueError, match="inference_steps.*between 1 and train_steps=50"):
        diffusion.Config(inference_steps=steps)
    head = build(diffusion.Config())
    with pytest.raises(ValueError, match="inference_steps.*between 1 and train_steps=50"):
        head.inference_steps = steps
    assert head.inference_steps == 50
    with pytest.raises(ValueError, match="train_steps=0"):
        diffusion.Config(train_steps=0, inference_steps=1)


# pooled


def test_pooled_needs_one_slot_and_starts_near_zero():
    head, decode = build(pooled.Config()).eval(), StandIn()
    with torch.no_grad():
        actions = head.sample(decode, None)
    assert [slots.shape[1] for slots, _, _ in decode.calls] == [1]
    assert 0 < actions.abs().max() < 0.05


def test_pooled_drops_out_only_while_training():
    head, decode = build(pooled.Config(dropout=0.5)), StandIn()
    with torch.no_grad():
        assert not torch.equal(head.sample(decode, None), head.sample(decode, None))
        head.eval()
        assert torch.equal(head.sample(decode, None), head.sample(decode, None))


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"dropout": -0.1}, {"delta": 0.0}])
def test_pooled_refuses_impossible_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        pooled.Config(**bad)


def test_huber_is_quadratic_below_delta_and_as_steep_as_l1_above():
    actions = torch.zeros(1, 1, 2)
    small, large = torch.full((1, 1, 2), 0.05), torch.full((1, 1, 2), 1.0)
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert float(l1.regression_loss(small, actions, valid, "huber", 0.1)[0]) == pytest.approx(0.5 * 0.05**2 / 0.1)
    assert float(l1.regression_loss(large, actions, valid, "huber", 0.1)[0]) == pytest.approx(1.0 - 0.05)
    assert float(l1.regression_loss(large, actions, valid, "l1", 0.1)[0]) == pytest.approx(1.0)
