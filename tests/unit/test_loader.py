"""Chunks, caches, mixtures and loaders: what a training run reads, and that it is the same every time."""

import dataclasses
import itertools
import os
import pickle

import numpy as np
import pytest
from demonstrations import LENGTHS, SPEC, bar_width, episode, write

from vla_oft.atomic import temporary_beside
from vla_oft.data import table
from vla_oft.data.base import open_source
from vla_oft.data.check import source_statistics
from vla_oft.data.chunks import ChunkDataset, Samples
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.data.table import DISTURBED, next_true
from vla_oft.images import Filter
from vla_oft.preprocess import Config, Preparation
from vla_oft.statistics import Normalizer, compute_statistics


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    write(folder)
    return open_source(folder)


def preparation(size: int = 16, resize: Filter = "box", crop_area: float = 1.0) -> Preparation:
    return Preparation(Config(image_size=size, resize=resize, crop_area=crop_area))


def dataset(*sources, **options) -> ChunkDataset:
    statistics = source_statistics(sources[0], SPEC.normalize_mask)
    normalizers = {
        "action_normalizer": Normalizer(statistics.action, statistics.normalize_mask, SPEC.normalization),
        "state_normalizer": None if statistics.state is None else Normalizer(statistics.state, None, SPEC.normalization),
    }
    return ChunkDataset(sources, SPEC, **{"prepare": preparation(), "grounding": "grounding", **normalizers, **options})


def keep(samples: Samples) -> Samples:
    return samples


def taken(loader: BatchLoader[Samples], count: int) -> list[Samples]:
    return list(itertools.islice(loader, count))


def same(first: Samples, second: Samples) -> bool:
    arrays = ("images", "state", "actions", "valid", "grounding", "indices")
    equal = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
    return equal and first.instructions == second.instructions and np.array_equal(first.seeds, second.seeds)


def test_a_sample_is_one_step_and_the_chunk_that_follows(source):
    samples = dataset(source).batch([0, 12, 18])
    action = Normalizer(source_statistics(source, SPEC.normalize_mask).action, np.array([True, False]), "bounds")
    assert samples.images.shape == (3, 2, 16, 16, 3) and samples.images.dtype == np.uint8
    assert [bar_width(image) for image in samples.images[:, 0]] == [1, 2, 3]  # steps 0, 1 and 2 of episodes 0, 1 and 2, at half size
    np.testing.assert_array_equal(samples.actions[1], action.normalize(source.actions(1)[1:5]))
    assert samples.actions.dtype == np.float32 and samples.state is not None and samples.state.shape == (3, 3)
    assert samples.instructions == ("first task", "second task", "first task")
    assert samples.grounding is not None
    np.testing.assert_array_equal(samples.grounding[2], source.extra("grounding", 2)[2])


def test_chunks_at_the_end_of_an_episode_hold_the_last_action_and_are_masked(source):
    samples = dataset(source).batch([8, 9, 10])
    assert samples.valid.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    for chunk in samples.actions[:, 3]:
        np.testing.assert_array_equal(chunk, samples.actions[2, 0])
    assert len(dataset(source)) == sum(LENGTHS)


def test_parity_drops_chunks_past_the_end(source):
    data = dataset(source, parity=True)
    assert len(data) == sum(length - 3 for length in LENGTHS)
    assert data.batch(range(len(data))).valid.all()
    with pytest.raises(ValueError, match="no episode has chunk_len=20 steps"):
        dataset(source, parity=True, chunk_len=20)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_cache_changes_nothing(source, tmp_path, cache):
    plain, cached = dataset(source), dataset(source, cache=cache, cache_dir=tmp_path / "cache")
    order = np.random.default_rng(0).permutation(len(plain))
    assert same(plain.batch(order), cached.batch(order)) and same(plain[3], cached[3])


def test_the_normalizers_given_are_the_ones_used(source):
    swapped = Normalizer(source_statistics(source, SPEC.normalize_mask).action, np.array([False, True]), "zscore")
    samples = dataset(source, action_normalizer=swapped, state_normalizer=None).batch([3])
    np.testing.assert_array_equal(samples.actions[0], swapped.normalize(source.actions(0)[3:7]))
    assert samples.state is None


def cached_folders(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir())


def test_a_killed_decoding_leaves_nothing_for_ever(source, tmp_path):
    dataset(source, cache="disk", cache_dir=tmp_path)
    (made,) = cached_folders(tmp_path)
    left = temporary_beside(made)
    left = left.with_name(left.name.replace(f".{os.getpid()}.", ".999999999."))
    made.rename(left)
    dataset(source, cache="disk", cache_dir=tmp_path)
    assert cached_folders(tmp_path) == [made]


def test_a_disk_cache_is_reused_and_belongs_to_its_contents(source, tmp_path, capsys):
    first = dataset(source, cache="disk", cache_dir=tmp_path)
    assert "decoding set" in capsys.readouterr().err
    again = dataset(source, cache="disk", cache_dir=tmp_path)
    assert "decoding" not in capsys.readouterr().err and same(first[5], again[5])
    others = (preparation(8), preparation(16, "bicubic"), preparation(16, "lanczos"), preparation(16, "box", 0.9))
    for prepare in others:
        cached = dataset(source, cache="disk", cache_dir=tmp_path, prepare=prepare)
        assert same(cached.batch([0, 20]), dataset(source, prepare=prepare).batch([0, 20])), "each has its own file"
    assert [p.name[:7] for p in cached_folders(tmp_path)] == ["frames-"] * (1 + len(others))
    assert len(pickle.dumps(first)) < 100_000 and same(pickle.loads(pickle.dumps(first))[5], first[5])


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_batches_do_not_depend_on_the_number_of_workers(source, tmp_path, cache):
    data = dataset(source, cache=cache, cache_dir=tmp_path)
    order = MixtureOrder(data.sizes, seed=3)
    inline, parallel = (taken(BatchLoader(data, order, 7, keep, num_workers=n), 10) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(inline, parallel, strict=True))
    assert len({seed for batch in inline for seed in batch.seeds.tolist()}) == 10 * 7


def test_training_resumes_where_it_stopped(source):
    data = dataset(source, cache="ram")
    whole = taken(BatchLoader(data, MixtureOrder(data.sizes, seed=3), 8, keep), 9)
    first = BatchLoader(data, MixtureOrder(data.sizes, seed=3), 8, keep)
    taken(first, 5)
    state = first.state_dict()
    assert state["position"] == 40
    resumed = BatchLoader(data, MixtureOrder(data.sizes, seed=3), 8, keep)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(whole[5:], taken(resumed, 4), strict=True))
    with pytest.raises(ValueError, match="cannot resume: the loader's seed was 3, now it is 4"):
        BatchLoader(data, MixtureOrder(data.sizes, seed=4), 8, keep).load_state_dict(state)


def test_runs_of_neighbours_are_not_cut_and_not_resumed_as_something_else(source):
    data = dataset(source, cache="ram")
    loader = BatchLoader(data, MixtureOrder(data.sizes, seed=3, neighbours=2), 6, keep)
    first = taken(loader, 2)
    assert all((np.diff(batch.indices.reshape(3, 2)) % len(data) == 1).all() for batch in first)
    resumed = BatchLoader(data, MixtureOrder(data.sizes, seed=3, neighbours=2), 6, keep)
    resumed.load_state_dict(loader.state_dict())
    assert same(taken(loader, 1)[0], taken(resumed, 1)[0])
    with pytest.raises(ValueError, match="cannot resume: the loader's order was 2 with 2 neighbours, now it is 2;"):
        BatchLoader(data, MixtureOrder(data.sizes, seed=3), 6, keep).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="batch_size=7 would cut runs of neighbours=2: use a multiple of it"):
        BatchLoader(data, MixtureOrder(data.sizes, seed=3, neighbours=2), 7, keep)


def test_ranks_share_one_order(source):
    data = dataset(source, cache="ram")
    order = MixtureOrder(data.sizes, seed=0)
    alone = taken(BatchLoader(data, order, 8, keep), 3)
    ranks = [taken(BatchLoader(data, order, 4, keep, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for step in range(3):
        np.testing.assert_array_equal(np.stack([ranks[0][step].indices, ranks[1][step].indices], 1).reshape(-1), alone[step].indices)
    assert not set(ranks[0][0].seeds.tolist()) & set(ranks[1][0].seeds.tolist())


def test_every_sample_comes_once_per_epoch():
    order = MixtureOrder([100], seed=1)
    draws = order.draw(0, 300)
    assert all(sorted(draws[i : i + 100]) == list(range(100)) for i in (0, 100, 200)) and not np.array_equal(draws[:100], draws[100:200])
    np.testing.assert_array_equal(MixtureOrder([100], seed=1).draw(9000, 50), order.draw(8990, 60)[10:])


def test_a_mixture_keeps_its_weights_and_its_datasets_epochs():
    order = MixtureOrder([50, 500], seed=0, weights=[3, 1])
    draws = order.draw(0, 20000)
    assert abs((draws < 50).mean() - 0.75) < 0.02
    small, large = draws[draws < 50], draws[draws >= 50]
    assert sorted(small[:50]) == list(range(50)) and sorted(large[500:1000]) == list(range(50, 550))
    assert MixtureOrder([50, 500], seed=0, weights=[0, 1]).draw(0, 1000).min() >= 50


def test_two_datasets_are_gathered_into_one_batch(source, tmp_path):
    write(tmp_path / "other", (6, 7))
    both, other = dataset(source, open_source(tmp_path / "other")), open_source(tmp_path / "other")
    assert both.sizes == [30, 13]
    samples = both.batch([31, 2, 42, 0])
    assert [bar_width(image) for image in samples.images[:, 0]] == [2, 3, 7, 1]
    assert samples.instructions == ("first task", "first task", "second task", "first task")
    assert samples.grounding is not None
    np.testing.assert_array_equal(samples.grounding[2], other.extra("grounding", 1)[6])


def test_an_error_in_the_background_reaches_the_training_loop(source):
    def fail(samples: Samples) -> Samples:
        raise ValueError("no such token")

    data = dataset(source)
    with pytest.raises(ValueError, match="no such token"):
        taken(BatchLoader(data, MixtureOrder(data.sizes, seed=0), 4, fail), 1)


def test_bad_settings_are_refused(source):
    data = dataset(source)
    order = MixtureOrder(data.sizes, seed=0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        BatchLoader(data, order, 0, keep)
    with pytest.raises(ValueError, match="rank must be in"):
        BatchLoader(data, order, 1, keep, rank=2, world_size=2)
    with pytest.raises(ValueError, match="the order was made for"):
        BatchLoader(data, MixtureOrder([7], seed=0), 1, keep)
    with pytest.raises(ValueError, match="2 weights for 1 datasets"):
        MixtureOrder([7], seed=0, weights=[1, 2])
    with pytest.raises(ValueError, match="weights must be non-negative"):
        MixtureOrder([7], seed=0, weights=[-1])
    with pytest.raises(ValueError, match="have a weight but no samples"):
        MixtureOrder([7, 0], seed=0, weights=[1, 1])
    with pytest.raises(ValueError, match=r"has no \['depth'\]; it has \['grounding'\]"):
        dataset(source, grounding="depth")
    with pytest.raises(IndexError, match="asked for"):
        data.batch([len(data)])
    moments = compute_statistics([np.zeros((2, 5))], None, [True] * 5).action
    with pytest.raises(ValueError, match="no datasets"):
        ChunkDataset([], SPEC, prepare=preparation(), action_normalizer=Normalizer(moments, None, "bounds"))
    with pytest.raises(ValueError, match="has 2 action dimensions, the normalizer 5"):
        dataset(source, action_normalizer=Normalizer(moments, None, "bounds"))
    with pytest.raises(ValueError, match="has 3 state dimensions, the normalizer 5"):
        dataset(source, state_normalizer=Normalizer(moments, None, "bounds"))


def test_next_true_finds_the_row_itself_or_a_later_one():
    assert next_true(np.array([False, True, False, True, False])).tolist() == [1, 1, 3, 3, 5]


def test_a_chunk_is_valid_up_to_the_step_in_which_the_robot_was_pushed(tmp_path):
    pushed = np.zeros((11, 1), np.uint8)
    pushed[4] = 1
    plain = episode(0, 11)
    with LeRobotWriter(tmp_path / "data", SPEC) as writer:
        writer.append_episode(dataclasses.replace(plain, extras={**plain.extras, DISTURBED: pushed}))
    data = dataset(open_source(tmp_path / "data"))
    valid = data.batch(np.arange(11)).valid
    assert valid[0].tolist() == [True] * 4
    assert valid[2].tolist() == [True, True, True, False]
    assert valid[4].tolist() == [True, False, False, False], "the action of the disturbed step answers what is seen"
    assert valid[5].all() and valid[9].tolist() == [True, True, False, False]


def test_a_table_in_a_file_changes_nothing(source, tmp_path, monkeypatch):
    plain = dataset(source)
    monkeypatch.setattr(table, "IN_MEMORY", 0)
    filed = dataset(source, cache_dir=tmp_path)
    assert {p.name for p in next(tmp_path.glob("table-*")).iterdir()} == {"steps.npy", "actions.npy", "states.npy", "extra-grounding.npy"}
    order = np.random.default_rng(0).permutation(len(plain))
    assert same(plain.batch(order), filed.batch(order))
    assert len(pickle.dumps(filed)) < 20_000 and same(pickle.loads(pickle.dumps(filed))[5], plain[5])


def test_damage_in_a_worker_is_said_in_one_line(tmp_path):
    write(tmp_path / "set")
    data = dataset(open_source(tmp_path / "set"))
    (tmp_path / "set/videos/observation.images.wrist/chunk-000/file-000.mp4").unlink()
    with pytest.raises(ValueError, match=r"file-000\.mp4.*missing") as error:
        taken(BatchLoader(data, MixtureOrder(data.sizes, seed=0), 4, keep, num_workers=2), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"num_workers": -1}, {"prefetch": 0}, {"num_workers": 2, "prefetch": 0}])
def test_impossible_settings_are_refused(source, settings):
    data = dataset(source)
    with pytest.raises(ValueError, match="must not be negative and prefetch"):
        BatchLoader(data, MixtureOrder(data.sizes, seed=0), 4, keep, **settings)
