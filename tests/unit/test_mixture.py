"""The order of samples: a bijection, at any position at once, with exact shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_oft.data.mixture import BLOCK, MixtureOrder, shuffle


@given(size=st.integers(1, 3000), key=st.integers(0, 2**32))
def test_a_shuffle_is_a_bijection(size, key):
    found = shuffle(np.arange(size), size, [key])
    np.testing.assert_array_equal(np.sort(found), np.arange(size))
    np.testing.assert_array_equal(shuffle(np.arange(size)[::-1], size, [key]), found[::-1])


def test_every_place_is_equally_likely():
    counts = np.zeros((7, 7))
    for key in range(7000):
        counts[np.arange(7), shuffle(np.arange(7), 7, [key])] += 1
    deviation = ((counts - 1000) ** 2 / 1000).sum()  # chi squared with 36 degrees of freedom
    assert deviation < 80  # exceeded by chance once in 30,000


def test_neighbours_do_not_stay_together():
    found = shuffle(np.arange(100_000), 100_000, [1])
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02 and abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.02


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.001, 0.999], [0.2, 0.8]])
def test_shares_are_exact_to_a_few_draws(weights):
    order = MixtureOrder([50, 500], seed=0, weights=weights)
    count = 5 * BLOCK
    drawn = (order.draw(0, count) < 50).mean()
    assert abs(drawn - weights[0] / sum(weights)) <= 2 / BLOCK


def test_no_sample_comes_twice_before_all_of_its_dataset_came():
    order = MixtureOrder([37, 1000], seed=5, weights=[1, 2])
    drawn = order.draw(0, 3 * BLOCK)
    for first, size in ((0, 37), (37, 1000)):
        own = drawn[(drawn >= first) & (drawn < first + size)] - first
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size].tolist())) == size


def test_many_small_shares_never_take_more_than_there_is():
    order = MixtureOrder([5] * 64, seed=0, weights=np.random.default_rng(0).random(64))
    assert (np.bincount(order.draw(0, 20 * BLOCK) // 5, minlength=64) > 0).all()
    with pytest.raises(ValueError, match="at most 64"):
        MixtureOrder([5] * 65, seed=0)


def test_a_far_position_costs_no_more_than_a_near_one():
    order = MixtureOrder([10**9, 10**6], seed=0, weights=[1, 1])
    np.testing.assert_array_equal(order.draw(10**12, 100), MixtureOrder([10**9, 10**6], seed=0, weights=[1, 1]).draw(10**12 - 50, 150)[50:])
