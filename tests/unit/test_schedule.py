"""Learning-rate schedules."""

import pytest

from vla_oft.train.schedule import Cosine, MultiStep, Reference


def test_cosine_starts_at_the_peak_and_ends_at_its_floor():
    schedule = Cosine(floor=0.1)
    assert schedule.factor(0, 100) == 1.0
    assert schedule.factor(50, 100) == pytest.approx(0.55)
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(1000, 100) == pytest.approx(0.1)


def test_warm_up_rises_and_never_cancels_the_decay():
    schedule = MultiStep(milestones=(100,), warmup_steps=9)
    factors = [schedule.factor(step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[99] == 1.0 and factors[100] == pytest.approx(0.1)


def test_milestones_multiply():
    assert MultiStep(milestones=(10, 20), gamma=0.5).factor(25, 100) == 0.25


def test_the_references_warm_up_loses_the_decay():
    with_warmup, without = Reference(warmup_steps=3, decay_at=4), Reference(decay_at=4)
    assert [with_warmup.factor(step, 9) for step in range(9)] == pytest.approx([0.4, 0.7] + 7 * [1.0])
    assert [without.factor(step, 9) for step in range(9)] == pytest.approx(4 * [1.0] + 5 * [0.1])
