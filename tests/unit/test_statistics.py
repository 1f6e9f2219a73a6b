"""Statistics and normalisation: exact numbers and readable errors; against the reference in `tests/parity/test_demonstrations.py`."""

import numpy as np
import pytest
import torch

from vla_oft.robots import load
from vla_oft.statistics import DatasetStatistics, Normalizer, StreamingMoments, compute_statistics, load_statistics, save_statistics


def example(dim: int = 3, steps: int = 50, seed: int = 0) -> DatasetStatistics:
    rng = np.random.default_rng(seed)
    episodes = [rng.normal(size=(steps, dim)).astype(np.float32) for _ in range(2)]
    for episode in episodes:
        episode[:, 1] = 0.7
    return compute_statistics(episodes, episodes, [True] * dim)


@pytest.mark.parametrize("kind", ["bounds_q99", "bounds", "zscore"])
def test_normalise_then_unnormalise_is_the_identity_inside_the_bounds(kind):
    statistics = example()
    normalizer = Normalizer(statistics.action, np.array([True, True, False]), kind)
    inside = np.linspace(statistics.action.q01, statistics.action.q99, 11)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(inside)), inside, atol=1e-6)
    np.testing.assert_array_equal(normalizer.normalize(inside)[:, 2], inside[:, 2])


@pytest.mark.parametrize("kind", ["bounds_q99", "bounds", "zscore"])
def test_a_constant_dimension_is_zero_for_the_policy_and_its_constant_for_the_robot(kind):
    normalizer = Normalizer(example().action, None, kind)
    assert normalizer.constant_dims() == [1]
    odd = np.array([[0.0, 9.0, 0.0]])
    assert normalizer.normalize(odd)[0, 1] == 0
    assert normalizer.unnormalize(odd)[0, 1] == np.float64(np.float32(0.7))


def test_only_normalised_dimensions_are_reported_as_constant_and_by_the_kinds_own_measure():
    rare = np.zeros((1000, 3), np.float32)
    rare[0] = 1.0  # outside the 1 % and 99 % quantiles
    moments = compute_statistics([rare], None, [True] * 3).action
    assert Normalizer(moments, np.array([True, False, True]), "bounds_q99").constant_dims() == [0, 2]
    assert Normalizer(moments, None, "bounds").constant_dims() == Normalizer(moments, None, "zscore").constant_dims() == []


def test_numpy_and_torch_agree_and_keep_their_type():
    normalizer = Normalizer(example().action, np.array([True, True, False]), "bounds_q99")
    values = np.random.default_rng(1).normal(size=(4, 5, 3)).astype(np.float32)
    as_numpy, as_torch = normalizer.normalize(values), normalizer.normalize(torch.as_tensor(values))
    assert as_numpy.dtype == np.float32 and as_torch.dtype == torch.float32
    np.testing.assert_allclose(as_numpy, as_torch.numpy(), atol=1e-6)
    assert normalizer.normalize(torch.as_tensor(values).bfloat16()).dtype == torch.float32


def test_a_file_round_trip_keeps_every_number(tmp_path):
    statistics = {"a": example(), "b": example(seed=1)}
    save_statistics(tmp_path / "dataset_statistics.json", statistics)
    back = load_statistics(tmp_path / "dataset_statistics.json")
    assert {name: entry.to_dict() for name, entry in back.items()} == {name: entry.to_dict() for name, entry in statistics.items()}
    assert set(back["a"].to_dict()["action"]) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_statistics.json"]


def test_an_entry_without_state_or_mask_is_read():
    entry = example().to_dict()
    del entry["proprio"], entry["action"]["mask"]
    back = DatasetStatistics.from_dict(entry)
    assert back.state is None and back.normalize_mask.all()


def test_a_nan_is_refused_naming_episode_step_and_dimension():
    episodes = [np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)]
    episodes[1][3, 1] = np.nan
    with pytest.raises(ValueError, match="state is not finite in episode 1, step 3, dimension 1"):
        compute_statistics([np.zeros((4, 1))], episodes, [True])


def test_statistics_of_another_robot_are_refused():
    with pytest.raises(ValueError, match="describe 3 action dimensions, robot 'tabletop' has 7"):
        example().check(load("tabletop"))
    with pytest.raises(ValueError, match="describe 7 state dimensions, robot 'tabletop' has 8"):
        example(dim=7).check(load("tabletop"))
    assert example(dim=8).state is not None


def test_bad_input_is_refused_with_its_name(tmp_path):
    moments = example().action
    with pytest.raises(ValueError, match="kind 'q99' is unknown"):
        Normalizer(moments, None, "q99")
    with pytest.raises(ValueError, match=r"last dimension must be 3, got shape \(2, 4\)"):
        Normalizer(moments, None, "bounds").normalize(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="mask has shape"):
        Normalizer(moments, np.array([True]), "bounds")
    with pytest.raises(ValueError, match=r"no such file; compute the statistics anew with vla_oft\.data\.check\.source_statistics"):
        load_statistics(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": {"action": {"mean": [0]}}}')
    with pytest.raises(ValueError, match="a/action: no std"):
        load_statistics(tmp_path / "bad.json")


def test_moments_in_one_pass_are_numpys(tmp_path):
    """Enough rows for many merges, with means that drift, values that repeat and one constant."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120_000, 3)) + np.linspace(0, 50, 120_000)[:, None]
    rows[:, 1] = np.round(rows[:, 1])
    rows[:, 2] = 0.1
    streaming = StreamingMoments(len(rows), 3)
    for part in np.array_split(rows, 700):
        streaming.update(part)
    found = streaming.result()
    np.testing.assert_array_equal([found.q01, found.q99], np.quantile(rows, [0.01, 0.99], axis=0))
    np.testing.assert_array_equal([found.min, found.max], [rows.min(0), rows.max(0)])
    np.testing.assert_allclose([found.mean[:2], found.std[:2]], [rows.mean(0)[:2], rows.std(0)[:2]], rtol=1e-12)
    assert found.mean[2] == 0.1 and found.std[2] == 0
    streaming.update(rows[:3])
    with pytest.raises(ValueError, match="120000 rows were announced, 120003 came"):
        streaming.result()
