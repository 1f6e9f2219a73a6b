import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_oft.evaluate.success import Rate, count, separated, wilson


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # scipy 1.17.1: scipy.stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        (0, 10, 0.0, 0.2775327998628892),
        (10, 10, 0.7224672001371107, 1.0),
        (5, 10, 0.2365930905125640, 0.7634069094874361),
        (9, 10, 0.5958499732047615, 0.9821237869049271),
        (485, 500, 0.9510963331640543, 0.9817367868020865),
        (1, 1, 0.2065493143772375, 1.0),
    ],
)
def test_wilson_matches_known_values(successes, episodes, low, high):
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=1e-12)


counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_interval_contains_the_rate_and_stays_in_the_unit_range(pair):
    low, high = wilson(*pair)
    assert 0 <= low <= pair[0] / pair[1] <= high <= 1
    assert low < high


@given(counts)
def test_interval_is_symmetric_in_success_and_failure(pair):
    low, high = wilson(*pair)
    other_low, other_high = wilson(pair[1] - pair[0], pair[1])
    assert (low, high) == pytest.approx((1 - other_high, 1 - other_low))


@given(counts)
def test_more_episodes_at_the_same_rate_narrow_the_interval(pair):
    low, high = wilson(*pair)
    more_low, more_high = wilson(pair[0] * 4, pair[1] * 4)
    assert more_high - more_low < high - low


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_one_more_success_raises_both_ends(pair):
    low, high = wilson(*pair)
    next_low, next_high = wilson(pair[0] + 1, pair[1])
    assert next_low > low
    assert next_high > high or high == 1.0


def test_nothing_observed_is_the_whole_range_and_has_no_rate():
    assert (Rate(0, 0).value, Rate(0, 0).low, Rate(0, 0).high) == (None, 0.0, 1.0)
    assert str(Rate(0, 0)) == "no episodes"


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="successes=3"):
        Rate(3, 2)


def test_separated_means_that_intervals_do_not_overlap():
    assert separated(Rate(45, 50), Rate(20, 50))
    assert separated(Rate(20, 50), Rate(45, 50))
    assert not separated(Rate(5, 6), Rate(3, 6))
    assert not separated(Rate(9, 10), Rate(9, 10))
    assert not separated(Rate(10, 10), Rate(0, 0))


def test_count_reads_verdicts():
    assert count([True, False, True]) == Rate(2, 3)
