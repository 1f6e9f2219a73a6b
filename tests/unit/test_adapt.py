"""Other people's recordings in a robot's language: cameras, units, pauses; and the choice of what fits."""

import dataclasses
import importlib
import pickle

import numpy as np
import pytest
from demonstrations import SPEC, episode, write

from tests.unit.recordings import ARM, arm
from vla_oft import robots
from vla_oft.data.adapt import for_robot
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.data.check import check_source, source_statistics, without_damaged
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.prepare import open_for
from vla_oft.data.recording import Episode
from vla_oft.data.select import Filters, episode_range, select, succeeded
from vla_oft.features import EachAction, Features
from vla_oft_client import RobotSpec

LIBERO, BRIDGE = robots.load("libero"), robots.load("bridge")


def record(out, spec: RobotSpec, cameras, lengths=(6, 4), **extras):
    """A dataset as somebody else would have made it: `spec`'s sizes, other camera names, no note of the robot."""
    other = dataclasses.replace(spec, name="somebody", cameras=cameras)
    rng = np.random.default_rng(0)
    with LeRobotWriter(out, other, fps=20) as writer:
        for length in lengths:
            actions = rng.normal(0, 0.3, (length, spec.action_dim)).astype(np.float32)
            actions[:, -1] = np.where(np.arange(length) % 2, 1, -1)
            images = {c: np.full((length, 16, 16, 3), 50 + 100 * i, np.uint8) for i, c in enumerate(cameras)}
            states = rng.normal(size=(length, spec.state_dim)).astype(np.float32)
            more = {name: values[:length] for name, values in extras.items()}
            writer.append_episode(Episode(images=images, states=states, actions=actions, instructions="do it", extras=more))
    (out / "meta" / "vla_oft.json").unlink()
    return open_source(out)


@pytest.mark.parametrize("cameras", [("image", "wrist_image"), ("image", "image2")])
def test_libero_in_lerobot_form_gets_its_cameras_and_its_gripper(tmp_path, cameras):
    raw = record(tmp_path / "set", LIBERO, cameras)
    source = for_robot(raw, LIBERO)
    assert source.cameras == ("front", "wrist") and source.fingerprint() != raw.fingerprint()
    np.testing.assert_array_equal(source.actions(0)[:, :6], raw.actions(0)[:, :6])
    np.testing.assert_array_equal(source.actions(0)[:, 6], np.where(raw.actions(0)[:, 6] == -1, 1, 0))
    assert raw.actions(0)[:, 6].min() == -1, "the dataset's own arrays stay as they are"
    assert abs(int(source.frames(0, [1], "wrist")[0, 0, 0, 0]) - 150) < 8
    assert not check_source(source, LIBERO)


def test_the_wrong_gripper_convention_is_said(tmp_path):
    raw = record(tmp_path / "set", LIBERO, ("front", "wrist"))
    assert for_robot(raw, LIBERO) is raw, "these are the robot's own names: nothing is converted"
    (warning,) = [w for w in check_source(raw, LIBERO) if "gripper" in w]
    assert "50 % of the gripper commands (opened and closed the other way round" in warning and "limits 0..1" in warning
    chosen = record(tmp_path / "other", LIBERO, ("image", "wrist_image"))
    assert for_robot(open_source(chosen.path, ReadOptions(cameras=(("front", "image"), ("wrist", "wrist_image")))), LIBERO, layout="as-is")


def test_our_own_recording_is_never_converted(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    convert = Features(name="trap", formats=("lerobot",), cameras=(("front", "front"), ("wrist", "wrist")), convert=EachAction(np.negative))
    assert for_robot(source, SPEC, features=[convert]) is source
    forced = for_robot(source, SPEC, features=[convert], layout="trap")
    np.testing.assert_array_equal(forced.actions(1), -source.actions(1))
    assert forced.fingerprint() != source.fingerprint()
    with pytest.raises(ValueError, match="layout 'none' is unknown for robot 'pair'; known: as-is, trap"):
        for_robot(source, SPEC, features=[convert], layout="none")


def test_fewer_cameras_and_no_state_can_be_asked_for(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    seen = for_robot(source, dataclasses.replace(SPEC, cameras=("wrist",), state_dim=0))
    assert seen.cameras == ("wrist",) and seen.state_dim == 0
    np.testing.assert_array_equal(seen.frames(2, [3], "wrist"), source.frames(2, [3], "wrist"))
    with pytest.raises(ValueError, match="has no state"):
        seen.states(0)
    with pytest.raises(ValueError, match="has no camera 'front'; it has wrist"):
        seen.frames(0, [0], "front")


def test_a_dataset_of_another_robot_is_refused_with_what_was_looked_for(tmp_path):
    raw = record(tmp_path / "set", LIBERO, ("left", "right"))
    with pytest.raises(ValueError, match="has cameras left, right, but the robot has front, wrist") as error:
        for_robot(raw, LIBERO)
    assert "'hdf5' (libero_hdf5) needs cameras agentview_rgb, eye_in_hand_rgb" in str(error.value)


def test_bridge_actions_are_the_motion_that_was_reached():
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(7, 7)), rng.normal(size=(7, 7))
    actions[:, 6] = [0.3, 0.99, 0.5, 0.01, 0.02, 0.99, 1.0]  # at 2 the gripper is on its way to closed
    convert = BRIDGE_FEATURES.convert
    assert convert is not None
    new_states, new_actions, steps = convert(states, actions)
    assert steps.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(new_states, states[1:6])
    np.testing.assert_allclose(new_actions[:, :6], np.diff(states[1:7, :6], axis=0))
    assert new_actions[:, 6].tolist() == [1, 0, 0, 0, 1]
    for length in (0, 1, 2):
        assert all(len(part) == 0 for part in convert(states[:length], actions[:length]))
    with pytest.raises(ValueError, match="differences of states"):
        convert(None, actions)


BRIDGE_FEATURES = robots.features("bridge")[0]


def test_a_view_that_cuts_looks_frames_up_in_the_recording(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    view = select(source, Filters(every=3))
    assert view.lengths.tolist() == [4, 2, 5] and view.fps == source.fps / 3
    np.testing.assert_array_equal(view.frames(2, [4, 1], "front"), source.frames(2, [12, 3], "front"))
    np.testing.assert_array_equal(view.actions(2), source.actions(2)[::3])
    np.testing.assert_array_equal(view.states(2), source.states(2)[::3])
    np.testing.assert_array_equal(view.extra("grounding", 0), source.extra("grounding", 0)[::3])
    np.testing.assert_array_equal(view.task_indices(1), source.task_indices(1)[::3])
    with pytest.raises(IndexError, match=r"steps 0\.\.3"):
        view.frames(0, [4], "front")
    again = pickle.loads(pickle.dumps(view))
    np.testing.assert_array_equal(again.actions(1), view.actions(1))
    assert again.fingerprint() == view.fingerprint() != source.fingerprint()


def test_pauses_are_dropped_with_their_frames(tmp_path):
    pausing = episode(0, 8)
    pausing.actions[[0, 3, 4]] = [0, 5]  # nothing before the first motion; then a pause whose gripper changes once
    pausing.actions[:, 1] = [5, 5, 5, 5, 7, 7, 7, 7]
    pausing.actions[[1, 2, 5, 6, 7], 0] = 1
    with LeRobotWriter(tmp_path / "set", SPEC) as writer:
        writer.append_episode(pausing)
    source = open_source(tmp_path / "set")
    view = select(source, Filters(drop_noops=True))
    np.testing.assert_array_equal(view.actions(0), source.actions(0)[[1, 2, 4, 5, 6, 7]])
    np.testing.assert_array_equal(view.frames(0, [2], "front"), source.frames(0, [4], "front"))


def test_an_episode_of_pauses_only_is_not_seen(tmp_path):
    with LeRobotWriter(tmp_path / "set", SPEC) as writer:
        for number in range(3):
            one = episode(number, 5)
            if number == 1:
                one.actions[:] = 0
            else:
                one.actions[:, 0] = 1
            writer.append_episode(one)
    view = select(open_source(tmp_path / "set"), Filters(drop_noops=True))
    assert len(view) == 2 and [view.episode_info(e)["seed"] for e in range(2)] == [0, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:2", [0, 1]), ("3:", [3, 4]), ("-2:", [3, 4]), ("4,0:2,4", [4, 0, 1]), (":", [0, 1, 2, 3, 4]), ("-1", [4])],
)
def test_episode_ranges(text, expected):
    assert episode_range(text, 5).tolist() == expected


@pytest.mark.parametrize(
    ("text", "reason"), [("5", "'5' is no range"), ("a:b", "'a:b' is no range"), ("5:9", "selects none"), ("", "'' is no")]
)
def test_wrong_ranges_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        episode_range(text, 5)


def test_failed_episodes_are_those_that_the_recording_calls_so(tmp_path):
    raw = record(tmp_path / "set", LIBERO, ("front", "wrist"), lengths=(4, 5), reward=np.array([0, 0, 0, 0, 1], np.float32))
    assert [succeeded(raw, e) for e in range(2)] == [False, True]
    view = select(raw, Filters(drop_failed=True))
    assert view.lengths.tolist() == [5]
    np.testing.assert_array_equal(view.actions(0), raw.actions(1))
    plain = record(tmp_path / "plain", LIBERO, ("front", "wrist"))
    assert succeeded(plain, 0) is None
    with pytest.raises(ValueError, match="does not say which episodes failed"):
        select(plain, Filters(drop_failed=True))


def test_increments_must_not_be_thinned_out(tmp_path):
    write(tmp_path / "set")
    with pytest.raises(ValueError, match="every=2 would lose motion"):
        open_for(SPEC, tmp_path / "set", filters=Filters(every=2))


def test_damaged_episodes_are_left_out_and_listed(tmp_path):
    write(tmp_path / "set", video_files_size_in_mb=0)  # one file for each episode
    source = open_source(tmp_path / "set")
    assert without_damaged(source) is source
    (tmp_path / "set/videos/observation.images.wrist/chunk-000/file-001.mp4").unlink()
    with pytest.raises(ValueError, match=r"file-001\.mp4, episode 1.*missing"):
        check_source(source, SPEC)
    left = open_for(SPEC, tmp_path / "set", ReadOptions(skip_bad=True))
    assert [left.episode_info(e)["seed"] for e in range(len(left))] == [0, 2]
    (line,) = left.skipped
    assert "episode 1" in line and "file-001.mp4" in line
    check_source(left, SPEC)  # no longer refused


def test_episodes_with_numbers_that_are_not_finite_are_left_out_with_what_is_damaged():
    source = arm()
    source.state_arrays[4][9, 2] = np.nan
    with pytest.raises(ValueError, match="episode 4: state is not finite in step 9, dimension 2; leave the episode out, with skip_bad"):
        check_source(source, ARM)
    with pytest.raises(ValueError, match="state is not finite in dataset /data/arm, episode 4, step 9, dimension 2"):
        source_statistics(source, [True] * 7)
    left = without_damaged(source)
    assert left.skipped == ("dataset /data/arm, episode 4: state is not finite in step 9, dimension 2",)
    assert len(left) == len(source) - 1
    check_source(left, ARM)  # no longer refused


def bridge_like(out, labels=("do it", "do it"), rewards=True):
    """Episodes whose reward is on the last step only, which Bridge's conversion drops."""
    spec = dataclasses.replace(BRIDGE, name="somebody", cameras=("image_0",))
    rng = np.random.default_rng(0)
    with LeRobotWriter(out, spec, fps=5) as writer:
        for number, label in enumerate(labels):
            length = 6 + number
            extras = {"reward": np.eye(length, dtype=np.float32)[-1]} if rewards else {}
            states = rng.normal(size=(length, 7)).astype(np.float32)
            images = {"image_0": np.full((length, 16, 16, 3), 90, np.uint8)}
            writer.append_episode(Episode(images=images, states=states, actions=states, instructions=label, extras=extras))
    (out / "meta" / "vla_oft.json").unlink()


LAYOUT = dataclasses.replace(BRIDGE_FEATURES, formats=("lerobot",))


def test_success_is_judged_before_any_step_is_dropped(tmp_path, monkeypatch):
    bridge_like(tmp_path / "set")
    monkeypatch.setattr(importlib.import_module("vla_oft.robots.bridge"), "FEATURES", (LAYOUT,))
    source = open_for(BRIDGE, tmp_path / "set", filters=Filters(drop_failed=True, episodes="1:"))
    assert source.lengths.tolist() == [5] and succeeded(source, 0) is True
    assert source.extra("reward", 0).ravel().tolist() == [0, 0, 0, 0, 1], "what a dropped step noted is kept with the step before it"


def test_a_robot_that_reads_no_state_still_converts_with_it(tmp_path):
    bridge_like(tmp_path / "set")
    raw = open_source(tmp_path / "set")
    blind = for_robot(raw, dataclasses.replace(BRIDGE, state_dim=0), features=[LAYOUT])
    assert blind.state_dim == 0
    np.testing.assert_array_equal(blind.actions(1), for_robot(raw, BRIDGE, features=[LAYOUT]).actions(1))


def test_unlabelled_episodes_are_left_out_where_the_layout_says_so(tmp_path):
    bridge_like(tmp_path / "set", labels=("do it", " ", "do that"))
    raw = open_source(tmp_path / "set")
    assert for_robot(raw, BRIDGE, features=[LAYOUT]).lengths.tolist() == [4, 6]
    assert len(for_robot(raw, BRIDGE, features=[dataclasses.replace(LAYOUT, drop_unlabelled=False)])) == 3


def test_a_push_is_not_forgotten_with_its_step(tmp_path):
    pushed = np.zeros((8, 1), np.uint8)
    pushed[3] = 1
    with LeRobotWriter(tmp_path / "set", SPEC) as writer:
        writer.append_episode(dataclasses.replace(episode(0, 8), extras={"disturbed": pushed}))
    view = select(open_source(tmp_path / "set"), Filters(every=2))
    assert view.extra("disturbed", 0).ravel().tolist() == [0, 1, 0, 0]


def test_partial_rewards_say_nothing_of_success(tmp_path):
    raw = record(tmp_path / "set", LIBERO, ("front", "wrist"), lengths=(5,), reward=np.array([0, 1, 1, 2, 2], np.float32))
    assert succeeded(raw, 0) is None


def test_what_a_conversion_does_is_part_of_the_fingerprint(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    layout = Features(name="x", formats=("lerobot",), cameras=(("front", "front"), ("wrist", "wrist")), convert=EachAction(np.negative))
    others = (
        layout,
        dataclasses.replace(layout, convert=EachAction(np.abs)),
        dataclasses.replace(layout, version=2),
        dataclasses.replace(layout, cameras=(("front", "wrist"), ("wrist", "front"))),
    )
    prints = [for_robot(source, SPEC, features=[f], layout="x").fingerprint() for f in others]
    prints += [select(source, Filters(episodes=e)).fingerprint() for e in ("0", "1", "0:2")]
    assert len(set(prints)) == len(prints)


def test_a_forced_layout_must_fit(tmp_path):
    raw = record(tmp_path / "set", LIBERO, ("front", "wrist"))
    with pytest.raises(ValueError, match=r"has no image, wrist_image, which layout 'openpi' needs"):
        for_robot(raw, LIBERO, layout="openpi")


def first_dimension(actions: np.ndarray) -> np.ndarray:
    return actions[:, :1]


def test_a_conversion_that_returns_other_sizes_is_said(tmp_path):
    write(tmp_path / "set")
    cameras = (("front", "front"), ("wrist", "wrist"))
    wide = Features(name="wide", formats=("lerobot",), cameras=cameras, convert=EachAction(first_dimension))
    view = for_robot(open_source(tmp_path / "set"), SPEC, features=[wide], layout="wide")
    with pytest.raises(ValueError, match="wide/1: the conversion returned shapes"):
        view.actions(0)


def test_thinning_out_is_only_advised_for_absolute_targets(tmp_path):
    absolute = dataclasses.replace(SPEC, action_kind="absolute_joint", action_limits=((-1e4, 1e4),) * 2, control_hz=5.0)
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert "every=2 keeps one step of 2" in check_source(source, absolute)[0]
    assert "every" not in check_source(source, dataclasses.replace(absolute, action_kind="delta_ee"))[0]
