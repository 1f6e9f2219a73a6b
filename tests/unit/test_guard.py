"""Steps that would break the weights are skipped, counted, and end the run when they do not stop."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_oft.train.guard import Guard, StepGuard
from vla_oft.train.tracking import Tracker


def judge(guard: StepGuard, steps: list[tuple[float, float]]) -> list[bool]:
    """(loss, gradient norm) of each step -> whether it is skipped."""
    return [bool(guard.check(torch.tensor(loss), torch.tensor(norm))) for loss, norm in steps]


def norms(*values: float) -> list[tuple[float, float]]:
    return [(1.0, value) for value in values]


def test_what_is_not_finite_is_skipped():
    guard = StepGuard(Guard(), "cpu")
    assert judge(guard, [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan), (1.0, 1e9)]) == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_a_spike_is_skipped_once_the_usual_is_known():
    guard = StepGuard(Guard(spike=5, warmup_steps=3), "cpu")
    assert judge(guard, norms(1, 1, 30, 1, 1)) == [False] * 5, "three norms are needed to know what is usual"
    assert judge(guard, norms(60, 1, 2)) == [True, False, False]


def test_skipped_steps_do_not_change_what_is_usual():
    guard = StepGuard(Guard(spike=3, warmup_steps=2, stop_after=99), "cpu")
    judge(guard, norms(1, 1))
    assert judge(guard, norms(*[10.0] * 20)) == [True] * 20
    assert judge(guard, norms(1, 2.9)) == [False, False]


def test_the_usual_norm_follows_a_slow_change():
    guard = StepGuard(Guard(spike=3, warmup_steps=10), "cpu")
    assert not any(judge(guard, norms(*np.geomspace(1, 1000, 200))))
    assert judge(guard, norms(*[10000.0])) == [True]


def test_batches_without_gradient_do_not_count_as_usual():
    guard = StepGuard(Guard(spike=3, warmup_steps=2), "cpu")
    assert not any(judge(guard, norms(0, 1, 0, 0, 1, 0, 0, 2)))


@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_the_rule_in_words(seed):
    rng = np.random.default_rng(seed)
    config = Guard(spike=4.0, warmup_steps=7, stop_after=1000)
    steps = [(float(rng.choice([1.0, math.nan], p=[0.9, 0.1])), float(np.exp(rng.normal(0, 1)))) for _ in range(200)]
    known, usual, expected = 0, 0.0, []
    for loss, norm in steps:
        bad = not math.isfinite(loss) or (known >= 7 and norm > 4 * math.exp(usual))
        expected.append(bad)
        if not bad:
            known += 1
            usual += (math.log(norm) - usual) / min(known, 7)
    assert judge(StepGuard(config, "cpu"), steps) == expected
    assert any(expected) and not all(expected)


def test_a_report_says_what_happened_since_the_last_one():
    guard = StepGuard(Guard(spike=5, warmup_steps=2), "cpu")
    judge(guard, norms(2, 2))
    assert guard.report() is None
    judge(guard, [(1.0, 20.0), (1.0, 2.0), (0.5, 50.0), (0.25, 40.0), (1.0, 2.0)])
    report = guard.report()
    assert report is not None
    assert (report.skipped, report.total, report.in_a_row, report.step, report.loss, report.grad_norm) == (3, 3, 2, 6, 0.25, 40.0)
    assert report.largest == 50 and report.reason == "the gradient norm is 20 times the usual 2"
    assert "skipped 3 steps, the last of them step 6" in report.line and "\n" not in report.line
    assert guard.report() is None
    judge(guard, [(1.0, math.inf), (1.0, 2.0), (math.nan, 1.0)])
    later = guard.report()
    assert later is not None and (later.skipped, later.total, later.in_a_row, later.largest) == (2, 5, 1, 1.0)
    assert "the loss is not finite" in later.line


def test_too_many_skipped_steps_in_a_row_end_the_run():
    guard = StepGuard(Guard(stop_after=4), "cpu")
    judge(guard, [(math.nan, 1.0)] * 3 + [(1.0, 1.0)] + [(math.nan, 1.0)] * 3)
    assert guard.report() is not None, "never four in a row"
    judge(guard, [(1.0, math.nan)])
    with pytest.raises(
        FloatingPointError, match=r"4 steps in a row .* up to step 8: the gradient is not finite .*checkpoints/step-5; lower lr"
    ):
        guard.report(Path("run/checkpoints/step-5"))


def test_a_long_row_of_skipped_steps_counts_though_it_is_over():
    guard = StepGuard(Guard(stop_after=4), "cpu")
    judge(guard, [(math.nan, 1.0)] * 4 + [(1.0, 1.0)] * 3)
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet"):
        guard.report()


def test_deciding_never_reads_from_the_device():
    guard = StepGuard(Guard(spike=3), "meta")  # tensors without values: reading one is an error
    bad = guard.check(torch.ones((), device="meta"), torch.ones((), device="meta"))
    assert bad.is_meta and bad.dtype == torch.bool and bad.shape == ()
    with pytest.raises(RuntimeError):
        guard.report()


def test_a_resumed_guard_decides_as_if_it_had_never_stopped(rng):
    steps = [(1.0, float(norm)) for norm in np.exp(rng.normal(0, 1, 120))]
    config = Guard(spike=3, warmup_steps=10, stop_after=100)
    whole, first, second = (StepGuard(config, "cpu") for _ in range(3))
    expected = judge(whole, steps)
    before = judge(first, steps[:57])
    second.load_state_dict(first.state_dict())
    assert before + judge(second, steps[57:]) == expected
    assert whole.report() == second.report()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_saved_state_does_not_change_afterwards():
    guard = StepGuard(Guard(), "cpu")
    state = guard.state_dict()
    judge(guard, [(math.nan, 1.0)])
    assert not any(state.values())


def test_torchs_fused_adamw_skips_a_step_whole():
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    for bad in (False, True, False):
        before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
        parameter.grad = torch.full((4, 3), math.nan if bad else 1.0)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad))
        optimizer.step()
        if bad:
            after = [parameter.detach(), *optimizer.state[parameter].values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.state[parameter]["step"] == 2 and parameter.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"spike": 1.0}, "spike"), ({"spike": math.nan}, "spike"), ({"stop_after": 0}, "stop_after"), ({"warmup_steps": 0}, "warmup")],
)
def test_settings_that_make_no_sense_are_refused(wrong, field):
    with pytest.raises(ValueError, match=field):
        Guard(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_that_is_judged_and_recorded_never_waits_for_the_gpu():
    guard, tracker = (
        StepGuard(Guard(spike=5), "cuda"),
        Tracker(None, log_every=100, total_steps=100, batch_size=1, start_step=0, device="cuda"),
    )
    loss, norm = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            bad = guard.check(loss, norm)
            assert tracker.add(step, {"loss": loss, "grad_norm": norm}, lr=1e-3, wait_s=0.0, skipped=bad) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.report() is None
