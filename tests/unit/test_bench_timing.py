"""Random policies, their inputs, and the clock: what every benchmark rests on."""

import dataclasses

import numpy as np
import pytest
import torch

from vla_oft.bench import latency, random_policy, rows, timing, workloads
from vla_oft.heads import diffusion

CPU = torch.device("cpu")


def build(name: str, **changes):
    workload = workloads.load(name)
    workload = dataclasses.replace(workload, config=dataclasses.replace(workload.config, **changes))
    return workload, random_policy.build(workload, device=CPU, dtype=torch.float32)


def answers(policy, workload, count: int = 4) -> torch.Tensor:
    found = workloads.observations(policy.config.robot, workload.instruction, workload.camera_size, count)
    return timing.answers(timing.Eager(policy), [[o] for o in found], rows.start_noise(policy))


@pytest.mark.parametrize("name", workloads.names())
def test_prompts_have_exactly_the_tokens_of_the_cost_model(name):
    workload = workloads.load(name)
    with torch.device("meta"):
        policy = random_policy.Policy(workload.config, workload.statistics(), workload.tokenizer())
    ids = policy.encode_prompts.ids(workload.instruction)
    assert 1 + len(ids) == workload.prompt_len == 30
    assert ids[-1] == workload.config.vlm.tokens.empty and max(ids) < workload.config.vlm.llm.vocab_size


def test_the_large_workloads_are_the_published_model():
    sizes = {name: random_policy.num_parameters(workloads.load(name)) / 1e9 for name in "ABC"}
    assert 7.5 < sizes["A"] < sizes["B"] < sizes["C"] < 8.3, "C has FiLM's projections on top"


def test_random_policies_answer_to_their_inputs_and_repeat_by_seed():
    workload, policy = build("nano")
    found = answers(policy, workload)
    assert found.isfinite().all() and 0.1 < found.std() < 10
    assert (found - found.mean(0)).norm() > 0.05 * found.norm(), "actions must depend on the observation"
    again = random_policy.build(workload, device=CPU, dtype=torch.float32)
    assert torch.equal(answers(again, workload), found)
    other = random_policy.build(workload, device=CPU, dtype=torch.float32, seed=1)
    assert not torch.allclose(answers(other, workload), found, atol=0.1)


def test_film_of_a_random_policy_listens():
    workload, policy = build("nano")
    (observation,) = workloads.observations(policy.config.robot, workload.instruction, (64, 64), 1)
    language = [torch.randn(1, 160, generator=torch.Generator().manual_seed(i)) * 0.004 for i in range(2)]
    pixels = policy.prepare([observation]).pixels
    with torch.no_grad():
        one, two = (policy.vlm.embed_images(pixels, words) for words in language)
    assert (one - two).norm() > 1e-3 * one.norm()


def test_policies_share_every_parameter_that_fits():
    _, donor = build("nano")
    workload = workloads.load("nano")
    config = dataclasses.replace(workload.config, head=diffusion.Config(inference_steps=2))
    policy = random_policy.build(dataclasses.replace(workload, config=config), device=CPU, dtype=torch.float32, donor=donor)
    ours, theirs = dict(policy.named_parameters()), dict(donor.named_parameters())
    shared = [name for name in ours if ours[name] is theirs.get(name)]
    assert {name for name in ours if not name.startswith("action_head.")} == set(shared)
    alone = random_policy.build(dataclasses.replace(workload, config=config), device=CPU, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), ours.values(), strict=True)), "sharing changes no number"


def test_many_denoising_steps_of_a_random_policy_do_not_blow_up_rounding():
    workload, policy = build("nano", head=diffusion.Config(inference_steps=50))
    before = answers(policy, workload, 2)
    noise = torch.Generator().manual_seed(0)
    for p in policy.parameters():
        p.data.mul_(1 + 1e-6 * torch.randn(p.shape, generator=noise))
    assert timing.relative_error(answers(policy, workload, 2), before) < 1e-3


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(random_policy, "free_bytes", lambda device: 20_000_000_000)
    with pytest.raises(ValueError, match=r"workload B \(7\.7 B parameters\) needs 63 GB on cpu, 20 GB are free; choose a smaller"):
        latency.require_memory(workloads.load("B"), CPU)
    latency.require_memory(workloads.load("cpu"), CPU)


def test_percentiles_interpolate():
    assert timing.percentiles(np.arange(101.0)) == (50.0, 95.0, 99.0)
    assert timing.percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.percentiles([1.0, 2.0]) == pytest.approx((1.5, 1.95, 1.99))


class Counting:
    """Counts its calls and notes which observations came."""

    def __init__(self) -> None:
        self.acts, self.prepared, self.ran = [], [], 0

    def act(self, observations, noise=None):
        self.acts.append(observations[0])
        return []

    def prepare(self, observations, noise=None):
        self.prepared.append(observations[0])

        def call():
            self.ran += 1
            return torch.zeros(1)

        return call


def test_calls_are_counted_and_inputs_rotate():
    subject = Counting()
    times = timing.measure(subject, [["a"], ["b"], ["c"]], None, timing.Plan(calls=7, warmup=2), CPU)
    assert len(times.model_ms) == len(times.end_to_end_ms) == 7 == subject.ran
    assert subject.prepared == list("abcabca") and subject.acts == [*"ab", *"abcabca"]
    assert times.peak_bytes is None or times.peak_bytes > 1e6


def test_a_budget_limits_calls_but_never_below_two():
    subject = Counting()
    times = timing.measure(subject, [["a"]], None, timing.Plan(calls=10**9, warmup=3, budget_s=0.02), CPU)
    assert 2 <= len(times.model_ms) < 10**6
    tight = timing.measure(Counting(), [["a"]], None, timing.Plan(calls=50, warmup=5, budget_s=0.0), CPU)
    assert len(tight.model_ms) == len(tight.end_to_end_ms) == timing.MIN_CALLS


def test_float32_answers_leave_the_policy_as_it_was():
    workload, policy = build("nano")
    before = answers(policy, workload, 2)
    policy.bfloat16()
    stored = {name: p.clone() for name, p in policy.named_parameters()}
    found = workloads.observations(policy.config.robot, workload.instruction, workload.camera_size, 2)
    exact = rows.float32_answers(policy, [[o] for o in found], None)
    assert policy.dtype == torch.bfloat16 and all(torch.equal(p, stored[name]) for name, p in policy.named_parameters())
    rounded = timing.relative_error(answers(policy, workload, 2), exact)
    assert 1e-4 < rounded < 0.1, "bfloat16 arithmetic differs from float32 with the same weights"
    assert timing.relative_error(exact, before) < 0.1
