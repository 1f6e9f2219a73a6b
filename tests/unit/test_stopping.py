"""A run ends early when its error is low and no longer falls, and never before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_oft.train.stopping import EarlyStop, Plateau


def stopped_at(plateau: Plateau, values: list[float | None], every: int = 10, start: int = 0) -> int | None:
    """The step after which the run ends, with one value every so many steps."""
    for number, value in enumerate(values, start=1):
        row = {"step": start + number * every, "loss": 1.0, plateau.config.metric: value}
        if plateau.should_stop(row):
            return row["step"]
    return None


@settings(max_examples=60, deadline=None)
@given(
    first=st.floats(1e-3, 10),
    drop=st.floats(0.03, 0.5),
    rows=st.integers(2, 60),
    below=st.one_of(st.none(), st.floats(1e-4, 10)),
)
def test_a_falling_error_never_ends_the_run(first, drop, rows, below):
    plateau = Plateau(EarlyStop(below=below, patience_steps=10 * rows, min_drop=0.02))
    falling = [first * (1 - drop) ** (i / rows) for i in range(rows * 20)]  # `drop` within the patience
    assert stopped_at(plateau, falling) is None


@settings(max_examples=60, deadline=None)
@given(value=st.floats(1e-6, 0.0099), rows=st.integers(1, 50), before=st.integers(0, 20))
def test_a_flat_low_error_ends_the_run_after_the_patience(value, rows, before):
    plateau = Plateau(EarlyStop(patience_steps=10 * rows))
    values = [value * 1.5 ** (before - i) for i in range(before)] + [value] * (4 * rows + 20)
    step = stopped_at(plateau, values)
    assert step is not None
    assert 10 * (before + rows) <= step <= 10 * (before + 2 * rows + 9) + 10


@given(value=st.floats(0.01, 100))
def test_a_flat_error_that_is_still_high_does_not_end_the_run(value):
    assert stopped_at(Plateau(EarlyStop(patience_steps=100)), [value] * 100) is None


def test_without_a_threshold_any_plateau_counts():
    assert stopped_at(Plateau(EarlyStop(below=None, patience_steps=100)), [5.0] * 100) == 120


def test_a_plateau_before_the_first_step_allowed_is_sat_out():
    assert stopped_at(Plateau(EarlyStop(below=None, patience_steps=100, after=500)), [5.0] * 100) == 500


@pytest.mark.parametrize("seed", range(10))
def test_noise_does_not_look_like_a_plateau(seed):
    rng = np.random.default_rng(seed)
    values = [0.009 * 0.85 ** (i / 250) * math.exp(rng.normal(0, 0.15)) for i in range(3000)]  # 15 % less every 5,000 steps
    assert stopped_at(Plateau(EarlyStop(patience_steps=5000)), values, every=20) is None


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_rows_without_a_value_say_nothing(nothing):
    values: list[float | None] = [0.009] * 30
    expected = stopped_at(Plateau(EarlyStop(patience_steps=100)), values)
    gaps = [value for pair in zip(values, [nothing] * 30, strict=True) for value in pair]
    assert stopped_at(Plateau(EarlyStop(patience_steps=100)), gaps, every=5) == expected - 5 == 115
    assert stopped_at(Plateau(EarlyStop(patience_steps=100)), [nothing] * 100) is None
    assert Plateau(EarlyStop(metric="validation_action_l1")).should_stop({"step": 1, "loss": 0.0}) is None


def test_the_reason_names_metric_value_and_threshold():
    plateau = Plateau(EarlyStop(patience_steps=10))
    assert [plateau.should_stop({"step": step, "action_l1": 0.009}) for step in (10, 20)] == [None, None]
    assert plateau.should_stop({"step": 2000, "action_l1": 0.00895}) == (
        "action_l1 0.00895 is below 0.01 and has not fallen by 0.02 of its value since step 20 (0.009)"
    )


def test_a_resumed_run_ends_at_the_same_step(rng):
    falling = [0.02 * 0.97**i for i in range(60)] + list(0.009 * np.exp(rng.normal(0, 0.02, 200)))
    config = EarlyStop(below=0.01, patience_steps=300)
    for values in (falling, [0.009] * 60):
        expected = stopped_at(Plateau(config), values)
        assert expected is not None
        for cut in (1, 2, 20, expected // 10 - 1):
            before, after = Plateau(config), Plateau(config)
            assert stopped_at(before, values[:cut]) is None
            after.load_state_dict(before.state_dict())
            assert stopped_at(after, values[cut:], start=10 * cut) == expected


@pytest.mark.parametrize(
    ("wrong", "field"), [({"patience_steps": 0}, "patience_steps"), ({"min_drop": 1.0}, "min_drop"), ({"below": -1.0}, "below")]
)
def test_settings_that_make_no_sense_are_refused(wrong, field):
    with pytest.raises(ValueError, match=field):
        EarlyStop(**wrong)
