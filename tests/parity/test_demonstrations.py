"""From recorded demonstrations to training data, against the reference: pauses, gripper conventions, windows, statistics, units."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from vla_oft import grippers, noops, robots
from vla_oft.data.base import open_source
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Episode
from vla_oft.preprocess import Config, Preparation
from vla_oft.statistics import DatasetStatistics, Moments, Normalizer, compute_statistics

MOMENTS = ("mean", "std", "min", "max", "q01", "q99")
LENGTHS = (40, 20, 9, 8, 7, 3)


@pytest.fixture(scope="module")
def functions(shared):
    return shared / "parity" / "pure_functions"


@pytest.mark.shared
@pytest.mark.parametrize("suffix", ["", "2"])
def test_pauses_are_dropped(functions, suffix):
    recorded = np.load(functions / "noop_filter.npz")
    actions, kept = recorded[f"actions{suffix}"], recorded[f"kept_indices{suffix}"]
    np.testing.assert_array_equal(noops.kept_steps(actions), kept)
    before = [None, *actions[:-1]]
    flags = [noops.is_noop(action, previous) for action, previous in zip(actions, before, strict=True)]
    np.testing.assert_array_equal(flags, recorded[f"is_noop{suffix}_prev_is_previous_raw"])


@pytest.mark.shared
def test_pauses_against_the_last_step_that_was_kept(functions):
    recorded = np.load(functions / "noop_filter.npz")
    actions, kept = recorded["actions"], recorded["kept_indices"]
    last = [kept[kept < step][-1] if (kept < step).any() else None for step in range(len(actions))]
    flags = [noops.is_noop(action, None if i is None else actions[i]) for action, i in zip(actions, last, strict=True)]
    np.testing.assert_array_equal(flags, recorded["is_noop_prev_is_last_kept"])
    np.testing.assert_array_equal(actions[noops.kept_steps(actions)], recorded["kept_actions"])


@pytest.mark.shared
def test_gripper_recordings(functions):
    recorded = np.load(functions / "gripper.npz")
    for name in ("", "_end_mid"):
        np.testing.assert_array_equal(grippers.binarize(recorded[f"binarize_in{name}"]), recorded[f"binarize_out{name}"])
    np.testing.assert_array_equal(grippers.from_relative(recorded["rel2abs_in"]), recorded["rel2abs_out"])
    np.testing.assert_array_equal(grippers.invert(recorded["binarize_in"]), recorded["invert01_out"])


def unchanged(dim: int) -> Normalizer:
    zeros, ones = np.zeros(dim), np.ones(dim)
    return Normalizer(Moments(mean=zeros, std=ones, min=-ones, max=ones, q01=-ones, q99=ones), None, "zscore")


@pytest.mark.shared
@pytest.mark.parametrize("robot", ["libero", "aloha", "bridge"])
def test_windows(functions, tmp_path, robot):
    """Where the reference raises because an episode is too short, we have no window: such an episode is simply not trained on."""
    recorded = np.load(functions / f"action_chunking_{robot}.npz")
    spec = dataclasses.replace(
        robots.load(robot), cameras=("front",), state_dim=1, action_dim=2, gripper=(), absolute_mask=(True,) * 2,
        normalize_mask=(True,) * 2, action_limits=((-1e6, 1e6),) * 2,
    )  # fmt: skip
    with LeRobotWriter(tmp_path / "set", spec) as writer:
        for length in LENGTHS:
            images, states = {"front": np.zeros((length, 16, 16, 3), np.uint8)}, np.arange(length, dtype=np.float32)[:, None] + 0.5
            actions = recorded[f"T{length}_action_in"]
            writer.append_episode(Episode(images=images, states=states, actions=actions, instructions="do it"))
    data = ChunkDataset(
        [open_source(tmp_path / "set")],
        spec,
        prepare=Preparation(Config(image_size=16, resize="box", crop_area=1.0)),
        action_normalizer=unchanged(2),
        state_normalizer=unchanged(1),
        parity=True,
    )
    long_enough = [length for length in LENGTHS if f"T{length}_error" not in recorded]
    assert long_enough == [length for length in LENGTHS if length >= spec.chunk_len - 1]
    samples = data.batch(range(len(data)))
    windows = np.concatenate([recorded[f"T{length}_action_chunks"] for length in long_enough])
    np.testing.assert_allclose(samples.actions, windows, rtol=1e-6)
    np.testing.assert_allclose(samples.state, np.concatenate([recorded[f"T{length}_proprio"] for length in long_enough])[:, 0], rtol=1e-6)
    assert samples.valid.all() and all(recorded[f"T{length}_pad_mask"].all() for length in long_enough)


@pytest.mark.shared
@pytest.mark.parametrize("robot", ["libero", "aloha", "bridge"])
def test_which_tokens_are_the_current_action(functions, robot):
    """The reference finds them by counting labels, we by their place: action tokens as (K, D), the first row is the current action.

    The last sample has one more label in front, id 31743, which is no action but is counted: an accident that our layout cannot have.
    """
    recorded, spec = np.load(functions / f"action_masks_{robot}.npz"), robots.load(robot)
    for shifted in ("", "_shifted"):
        labels = recorded[f"labels{shifted}"]
        for row in range(3):
            tokens = np.flatnonzero(labels[row] > 31743).reshape(spec.chunk_len, spec.action_dim)
            np.testing.assert_array_equal(np.flatnonzero(recorded[f"current_action_mask{shifted}"][row]), tokens[0])
            np.testing.assert_array_equal(np.flatnonzero(recorded[f"next_actions_mask{shifted}"][row]), tokens[1:].ravel())


@pytest.mark.shared
def test_statistics(functions):
    data = np.load(functions / "dataset_statistics_input.npz")
    expected = DatasetStatistics.from_dict(json.loads((functions / "dataset_statistics_expected.json").read_text()))
    actions, states = ([data[f"traj{i}_{what}"] for i in range(2)] for what in ("action", "proprio"))
    found = compute_statistics(actions, states, expected.normalize_mask)
    for ours, theirs in ((found.action, expected.action), (found.state, expected.state)):
        assert ours is not None and theirs is not None
        for name in ("min", "max", "q01", "q99"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        for name in ("mean", "std"):  # the reference adds up in float32
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=3e-6, err_msg=name)
    assert (found.num_transitions, found.num_trajectories) == (expected.num_transitions, expected.num_trajectories) == (500, 2)


def recorded_moments(data: np.lib.npyio.NpzFile, what: str) -> Moments:
    return Moments(**{name: data[f"stats_{what}_{name}"].astype(np.float64) for name in MOMENTS})


@pytest.mark.shared
@pytest.mark.parametrize("give", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(("kind", "name"), [("bounds_q99", "bounds_q99"), ("bounds", "bounds"), ("zscore", "normal")])
def test_normalisation_for_training(functions, give, kind, name):
    data = np.load(functions / "normalization.npz")
    action, state, mask = recorded_moments(data, "action"), recorded_moments(data, "proprio"), data["stats_action_mask"]
    found = Normalizer(action, mask, kind, "train").normalize(give(data["action_raw"]))
    np.testing.assert_allclose(found, data[f"train_action_{name}"], atol=1e-6)
    found = Normalizer(state, None, kind, "train").normalize(give(data["proprio_raw"]))
    np.testing.assert_allclose(found, data[f"train_proprio_{name}"], atol=1e-6)
    if kind == "bounds_q99":
        found = Normalizer(action, None, kind, "train").normalize(give(data["action_raw"]))
        np.testing.assert_allclose(found, data["train_action_bounds_q99_nomask"], atol=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("give", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", ["bounds_q99", "bounds"])
def test_normalisation_at_inference(functions, give, kind):
    """Computed in float64 there; a policy that rounds its state to float32 first differs by 1e-6."""
    data = np.load(functions / "normalization.npz")
    action, state, mask = recorded_moments(data, "action"), recorded_moments(data, "proprio"), data["stats_action_mask"]
    raw, whole, partly = data["proprio_raw"].astype(np.float64), data[f"eval_proprio_{kind}"], data[f"eval_proprio_{kind}_masked"]
    same = (whole == partly).all(0)  # the recording does not hold the mask
    assert same.any() and not same.all()
    for wanted, chosen in ((whole, None), (partly, same)):
        np.testing.assert_allclose(Normalizer(state, chosen, kind, "eval").normalize(give(raw)), wanted, atol=1e-6)
    for suffix, chosen in (("", mask), ("_nomask", None)):
        found = Normalizer(action, chosen, kind, "eval").unnormalize(give(data["unnormalize_in"].astype(np.float64)))
        np.testing.assert_allclose(found, data[f"unnormalized_{kind}{suffix}"], atol=1e-6)
