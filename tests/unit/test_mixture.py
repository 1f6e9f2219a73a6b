"""The order of samples: a bijection, at any position at once, with exact shares."""

import numpy as np
import pytest
from hypothesis import given, settings
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


NEIGHBOURS = st.sampled_from([1, 2, 4, 8, 32])


@settings(deadline=None)
@given(size=st.integers(1, 400), neighbours=NEIGHBOURS, seed=st.integers(0, 2**32))
def test_runs_of_neighbours_bring_every_sample_once_per_epoch(size, neighbours, seed):
    drawn = MixtureOrder([size], seed=seed, neighbours=neighbours).draw(0, 3 * size)
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_draws_that_follow_each_other_are_neighbours_and_runs_are_not():
    drawn = MixtureOrder([100_000], seed=1, neighbours=4).draw(0, 40_000).reshape(-1, 4)
    assert (np.diff(drawn) % 100_000 == 1).all()
    starts = drawn[:, 0]
    assert len(set(starts.tolist())) == 10_000 and abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.03


def test_runs_begin_elsewhere_in_each_epoch():
    drawn = MixtureOrder([4000], seed=0, neighbours=4).draw(0, 8 * 4000).reshape(8, -1, 4)
    assert len({int(epoch[0, 0]) % 4 for epoch in drawn}) > 1


@settings(deadline=None)
@given(neighbours=NEIGHBOURS, ranks=st.integers(1, 5), start=st.integers(0, 10_000), batch=st.integers(1, 4))
def test_ranks_share_the_draws_of_a_step_and_take_whole_runs(neighbours, ranks, start, batch):
    order, count, start = MixtureOrder([5000, 700], seed=3, weights=[1, 2], neighbours=neighbours), batch * neighbours, start * neighbours
    shares = [order.positions(start, count, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(start, start + count * ranks))
    together = order.draw(start, count * ranks)
    for share in shares:
        np.testing.assert_array_equal(order.at(share), together[share - start])
        assert (np.diff(share.reshape(batch, neighbours)) == 1).all()


def test_without_neighbours_ranks_take_every_so_many_th_draw():
    order = MixtureOrder([5000], seed=3)
    np.testing.assert_array_equal(order.positions(96, 32, 2, 3), 96 + 2 + 3 * np.arange(32))


def test_shares_of_a_mixture_are_exact_with_neighbours():
    order = MixtureOrder([50, 500, 3], seed=0, weights=[3, 1, 0.5], neighbours=8)
    drawn = order.draw(0, 10 * BLOCK)
    shares = np.bincount(np.searchsorted([50, 550], drawn, side="right"), minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, np.array([3, 1, 0.5]) / 4.5, atol=16 / len(drawn))
    np.testing.assert_array_equal(order.draw(7 * BLOCK + 11, 300), drawn[7 * BLOCK + 11 : 7 * BLOCK + 311])


@pytest.mark.parametrize("neighbours", [0, 3, -4, 128])
def test_an_impossible_number_of_neighbours_is_refused(neighbours):
    with pytest.raises(ValueError, match=f"neighbours={neighbours} must be 1, 2, 4, 8"):
        MixtureOrder([100], seed=0, neighbours=neighbours)
