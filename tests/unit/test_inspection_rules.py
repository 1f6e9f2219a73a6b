import dataclasses
import json

import numpy as np
import pytest

from tests.unit.recordings import ARM, STEPS, Recordings, arm
from vla_oft.inspection import Options, Problem, inspect_source
from vla_oft.inspection.motion import still_steps
from vla_oft.inspection.page import render
from vla_oft.noops import kept_steps
from vla_oft_client import Gripper, RobotSpec


def problems(source, spec=None, **options) -> dict[str, Problem]:
    return {p.rule: p for p in inspect_source(source, spec, Options(**options)).problems}


def rules(source, spec=None, **options) -> set[str]:
    return set(problems(source, spec, **options))


def test_a_healthy_dataset_has_no_problems_but_a_note_on_its_gripper():
    assert rules(arm()) == {"gripper"}
    assert rules(arm(), ARM) == set()
    assert rules(arm(), max_episodes=0, check_files=False) == {"gripper"}


# --- values ---------------------------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_counted_and_kept_out_of_the_statistics():
    source = arm()
    clean = np.concatenate([a for e, a in enumerate(source.action_arrays)]).astype(np.float64)
    source.action_arrays[2][7, 3] = np.nan
    source.state_arrays[4][0, 1] = -np.inf
    found = inspect_source(source)
    broken = {p.title: p for p in found.problems if p.rule == "not-finite"}
    assert set(broken) == {"NaN or infinite values in the states", "NaN or infinite values in the actions"}
    action = broken["NaN or infinite values in the actions"]
    assert (action.severity, action.seen.count, str(action.seen.first)) == ("error", 1, "episode 2, step 7, dimension 3")
    assert found.action[3].non_finite == 1
    assert found.following.kind == "increments", "one broken value hides nothing else"
    rest = np.delete(clean, 2 * STEPS + 7, axis=0)
    assert found.action[0].mean == pytest.approx(rest[:, 0].mean(), rel=1e-12)
    assert found.action[0].q99 == pytest.approx(np.quantile(rest[:, 0], 0.99), rel=1e-12)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_dataset_without_any_finite_action_is_still_described():
    source = arm(episodes=2)
    for values in source.action_arrays:
        values[:] = np.nan
    found = inspect_source(source)
    assert found.action[0].mean is None
    assert found.action[0].histogram is None
    assert "gripper" not in {p.rule for p in found.problems}, "nothing is known of the gripper"
    json.dumps(found.to_json(), allow_nan=False)
    assert "no finite values" in render(found, source)


def test_constant_dimensions_are_named():
    source = arm()
    for states, actions in zip(source.state_arrays, source.action_arrays, strict=True):
        states[:, 3], actions[:, 4] = 0.25, 0
    found = [p for p in inspect_source(source).problems if p.rule == "constant"]
    assert [(p.severity, p.where) for p in found] == [("note", "3 = 0.25"), ("note", "4 = 0")]


def test_actions_that_never_change_are_an_error():
    source = arm()
    for actions in source.action_arrays:
        actions[:, :6] = 0.1
    assert problems(source)["constant"].severity == "error"


def test_a_dimension_that_rarely_changes_loses_its_quantiles():
    source = arm()
    for number, actions in enumerate(source.action_arrays):
        actions[:, 4] = 0
        actions[: 1 if number < 2 else 0, 4] = 0.5
    assert problems(source)["nearly-constant"].where == "dimension 4"
    source.action_arrays[0][:10, 4] = 0.5
    assert "nearly-constant" not in rules(source)


def test_a_spike_is_an_outlier_and_matters_more_where_bounds_normalise():
    source = arm()
    source.action_arrays[3][20, 2] = 40
    found = problems(source)["outliers"]
    assert found.severity == "note"
    assert found.where.startswith("dimension 2; 2: ")
    assert problems(source, dataclasses.replace(ARM, normalization="bounds"))["outliers"].severity == "warning"


def test_actions_beyond_the_robots_limits_are_counted():
    source = arm()
    source.action_arrays[1][:9, 0] = 1.2
    narrow = problems(source, ARM)["limits"]
    assert (narrow.severity, narrow.seen.count, str(narrow.seen.first)) == ("warning", 9, "episode 1, step 0, dimension 0")
    source.action_arrays[1][2:9, 0] = 1.0
    assert problems(source, ARM)["limits"].severity == "note"


# --- motion ---------------------------------------------------------------------------------------------------------------------------


def test_a_jump_of_the_state_is_found():
    source = arm()
    span = np.ptp(np.concatenate(source.state_arrays)[:, 2])
    source.state_arrays[3][33:, 2] += 0.8 * span
    found = problems(source)["jumps"]
    assert (found.severity, found.seen.count, str(found.seen.first)) == ("warning", 1, "episode 3, step 33, dimension 2")


def test_fast_but_usual_motion_and_fingers_are_no_jumps(rng):
    source = arm()
    for states in source.state_arrays:
        states[:, 2] = np.where(np.arange(STEPS) % 6 < 3, 0, 1) + 0.01 * rng.normal(size=STEPS)
        states[:, 6] = np.where(np.arange(STEPS) == 30, 0.0, 0.04)
        states[:, 7] = -states[:, 6]
        # dimension 3 changes every 20th step: that is how this signal is
        states[:, 3] = np.where(np.arange(STEPS) % 40 < 20, 0, 1) + 0.001 * rng.normal(size=STEPS)
    assert "jumps" not in rules(source)


def test_an_angle_that_turns_over_is_no_jump_but_a_wrap():
    source = arm()
    for states in source.state_arrays:
        angle = 3.0 + 0.02 * np.arange(STEPS) - 0.3
        states[:, 4] = np.mod(angle + np.pi, 2 * np.pi) - np.pi
    found = problems(source)
    assert found["wraps"].seen.count == len(source)
    assert found["wraps"].where == "dimension 4"
    assert "jumps" not in found
    source.state_arrays[2][:9, 4] -= 1.5
    found = problems(source)
    assert found["jumps"].where.startswith("dimension 4; the largest: 4 changes by 1.5")
    assert found["wraps"].seen.count == len(source)


def test_a_change_by_two_pi_of_what_is_no_angle_is_a_jump():
    source = arm()
    for states in source.state_arrays:
        states[:, 4] *= 10
    source.state_arrays[2][25:, 4] += 2 * np.pi
    found = problems(source)
    assert str(found["jumps"].seen.first) == "episode 2, step 25, dimension 4"
    assert "wraps" not in found


def test_a_lost_frame_leaves_a_leap():
    source = arm()
    for episode in (1, 3):
        t = np.arange(STEPS + 1)
        steady = np.stack([0.01 * t, 0.02 * t, *np.zeros((4, STEPS + 1))], 1)
        source.state_arrays[episode][:, :6] = np.delete(steady, 25, axis=0)
    found = problems(source)["lost-frames"]
    assert (found.seen.count, found.severity, str(found.seen.first)) == (2, "warning", "episode 1, step 25")


def test_smooth_noisy_and_accelerating_motion_has_no_leaps(rng):
    source = arm(episodes=30, steps=200)
    for number, states in enumerate(source.state_arrays):
        t = np.arange(200)[:, None]
        smooth = np.cumsum(np.cumsum(rng.normal(size=(200, 6)), 0), 0) * 1e-4
        states[:, :6] = [smooth, smooth + 1e-3 * rng.normal(size=smooth.shape), 1e-5 * t**2, np.cumsum(rng.normal(size=(200, 6)), 0)][
            number % 4
        ]
    assert inspect_source(source, options=Options(max_episodes=0)).timing.leaps.count <= 1


def test_recorded_times_show_gaps():
    source = arm()
    times = np.arange(STEPS) / 20.0
    source.extra_arrays["observation.timestamp"] = [times[:, None].copy() for _ in range(len(source))]
    assert "lost-frames" not in rules(source)
    source.extra_arrays["observation.timestamp"][2][40:] += 0.15
    found = problems(source)["lost-frames"]
    assert (found.seen.count, str(found.seen.first), found.title) == (1, "episode 2, step 40", "Frames are missing, by the recorded times")


def test_pauses_are_counted_as_the_filter_would_drop_them():
    source = arm()
    for actions in source.action_arrays:
        actions[10:20, :6] = 0
    found = problems(source)["pauses"]
    assert (found.seen.count, found.severity, str(found.seen.first)) == (54, "warning", "episode 0, step 10"), (
        "the gripper closes in step 18"
    )
    for actions in source.action_arrays[1:]:
        actions[10:20, 0] = 0.3
    assert problems(source)["pauses"].severity == "note"


def test_pauses_do_not_depend_on_where_the_gripper_is(rng):
    actions = np.where(rng.random((40, 3)) < 0.6, 0, rng.normal(size=(40, 3)))
    hand = np.where(rng.random(40) < 0.8, -1.0, 1.0)
    expected = np.setdiff1d(np.arange(40), kept_steps(np.column_stack([actions, hand]))).tolist()
    assert 0 < len(expected) < 40
    assert np.flatnonzero(still_steps(np.column_stack([actions, hand]), [3])).tolist() == expected
    assert np.flatnonzero(still_steps(np.column_stack([hand, actions]), [0])).tolist() == expected
    assert np.flatnonzero(still_steps(np.column_stack([hand, actions, hand]), [0, 4])).tolist() == expected
    motionless = np.linalg.norm(actions, axis=1) < 1e-4
    assert still_steps(actions, []).tolist() == motionless.tolist()


def test_pauses_of_absolute_targets_are_targets_that_stay():
    source = _leader(lag=2)
    assert "pauses" not in rules(source)
    for actions in source.action_arrays:
        actions[20:40] = actions[20]
    found = problems(source)["pauses"]
    assert found.title == "Steps in which the target does not move"
    assert found.seen.count == 19 * len(source)
    assert str(found.seen.first) == "episode 0, step 21"


def test_increments_and_absolute_targets_are_told_apart():
    increments = inspect_source(arm()).following
    assert (increments.kind, increments.lag) == ("increments", 1)
    absolute = inspect_source(_leader(lag=3)).following
    assert (absolute.kind, absolute.lag, absolute.copies) == ("absolute", 3, False)
    source = arm()
    rng = np.random.default_rng(0)
    for actions in source.action_arrays:
        actions[:, :6] = rng.uniform(-1, 1, (STEPS, 6))
    assert inspect_source(source).following.kind is None


def test_actions_of_the_wrong_kind_are_reported_for_a_robot():
    absolute = dataclasses.replace(ARM, state_dim=7, action_kind="absolute_joint", absolute_mask=(True,) * 7)
    assert "action-kind" in rules(_leader(lag=2), dataclasses.replace(ARM, state_dim=7))
    assert "action-kind" not in rules(_leader(lag=2), absolute)
    assert "action-kind" in rules(arm(), dataclasses.replace(absolute, state_dim=8))


def test_actions_that_copy_the_state_are_an_error():
    assert problems(_leader(lag=0))["copied-state"].severity == "error"
    assert "copied-state" not in rules(_leader(lag=1))


# --- grippers -------------------------------------------------------------------------------------------------------------------------


def test_the_gripper_is_described_and_its_direction_told_by_the_fingers():
    (gripper,) = inspect_source(arm()).grippers
    assert (gripper.index, gripper.convention, gripper.opens, sorted(gripper.states)) == (6, "binary", "low", [6, 7])
    source = arm()
    for states in source.state_arrays:
        states[:, [6, 7]] = states[:, [7, 6]]
    assert inspect_source(source).grippers[0].opens == "low", "the order of the fingers does not matter"
    for actions in source.action_arrays:
        actions[:, 6] *= -1
    assert inspect_source(source).grippers[0].opens == "high"


def test_a_single_finger_shows_only_that_it_follows():
    source = arm()
    for number, states in enumerate(source.state_arrays):
        source.state_arrays[number] = states[:, :7]
    (gripper,) = inspect_source(source).grippers
    assert (gripper.opens, gripper.states) == (None, (6,))
    assert gripper.correlation is not None
    assert gripper.correlation < -0.9
    assert "after high values dimension 6 of the state goes down" in problems(source)["gripper"].title


def test_a_gripper_that_is_turned_around_is_an_error_for_its_robot():
    source = arm()
    for actions in source.action_arrays:
        actions[:, 6] *= -1
    found = problems(source, ARM)["gripper"]
    assert found.severity == "error"
    assert "turned around" in found.title


def test_another_range_of_gripper_commands_is_an_error_for_its_robot():
    unit = dataclasses.replace(ARM, action_limits=((-1.0, 1.0),) * 6 + ((0.0, 1.0),), gripper=(Gripper(index=6, open=0.0, closed=1.0),))
    found = problems(arm(), unit)["gripper"]
    assert found.severity == "error"
    assert "-1 (" in found.title
    source = arm()
    for actions in source.action_arrays:
        actions[:, 6] = (actions[:, 6] + 1) / 2
    assert rules(source, unit) == set()


def test_a_third_command_and_a_continuous_one_are_no_binary_gripper():
    source = arm()
    source.action_arrays[0][:3, 6] = 0
    found = problems(source)["gripper"]
    assert "third" in {p.title.split(": ")[0].split()[-1] for p in inspect_source(source).problems if p.rule == "gripper"}
    assert found.rule == "gripper"
    for actions in source.action_arrays:
        actions[:, 6] = np.linspace(-1, 1, STEPS)
    assert inspect_source(source).grippers[0].convention == "continuous"
    assert "knows nothing between" in problems(source, ARM)["gripper"].title


def test_a_gripper_that_never_moves_is_noted():
    source = arm()
    for actions in source.action_arrays:
        actions[:, 6] = 1
    found = problems(source, ARM)["gripper"]
    assert (found.severity, found.title) == ("note", "The gripper never moves: always 1")


# --- cameras --------------------------------------------------------------------------------------------------------------------------


def test_a_camera_that_freezes_while_the_arm_moves_is_found():
    source = arm()
    source.pictures["wrist"][2][20:] = source.pictures["wrist"][2][20]
    found = problems(source)["frozen-camera"]
    assert found.seen.first is not None
    assert (found.severity, found.seen.first.episode, found.seen.first.camera) == ("warning", 2, "wrist")
    for frames in source.pictures["wrist"]:
        frames[:] = frames[0]
    assert problems(source)["frozen-camera"].severity == "error"


def test_a_frozen_camera_is_found_behind_compression_and_noise(rng):
    source = arm()
    for frames in source.pictures["front"]:
        frames[:] = np.clip(frames[0] + rng.integers(-1, 2, frames.shape), 0, 255)
    assert "frozen-camera" in rules(source)


def test_a_scene_in_which_nothing_moves_is_not_frozen():
    source = arm()
    for states, frames in zip(source.state_arrays, source.pictures["front"], strict=True):
        states[20:] = states[20]
        frames[20:] = frames[20]
    assert "frozen-camera" not in rules(source)


def test_a_frozen_camera_is_found_in_short_episodes():
    """Five pictures of 16 steps are 4 steps apart: each is compared with the next that is far enough away."""
    source = arm(steps=16)
    source.pictures["front"][3][:] = source.pictures["front"][3][0]
    found = problems(source)["frozen-camera"]
    assert (found.severity, str(found.seen.first)) == ("warning", "episode 3, step 0, camera front")
    assert "longest over 11 steps" in found.where


def test_pictures_that_are_close_in_time_may_look_alike():
    source = arm(steps=8)
    for frames in source.pictures["front"]:
        frames[:] = frames[0]
    assert "frozen-camera" not in rules(source)


def test_black_pictures_and_pictures_of_one_colour_are_found():
    source = arm()
    source.pictures["front"][1][:] = 2
    found = problems(source)["blank-pictures"]
    assert (found.severity, found.seen.count, "black" in found.title) == ("warning", 5, True)
    for frames in source.pictures["front"]:
        frames[:] = (20, 90, 200)
    found = problems(source)["blank-pictures"]
    assert (found.severity, "one colour" in found.title) == ("error", True)


def test_a_camera_that_is_slower_than_the_recording_is_found():
    source = arm()
    source.pictures["front"] = [frames[np.arange(STEPS) // 2 * 2] for frames in _detailed(source)]
    found = problems(source)
    assert found["repeated-pictures"].seen.first is not None
    assert found["repeated-pictures"].seen.first.camera == "front"
    source.pictures["front"] = _detailed(source)
    assert "repeated-pictures" not in rules(source)


def test_mixed_sizes_and_equal_cameras_are_found():
    source = arm()
    source.pictures["front"][4] = source.pictures["front"][4][:, :24]
    found = problems(source)["mixed-sizes"]
    assert (found.seen.count, found.where) == (5, "32 x 32 (25), 32 x 24 (5)")
    source = arm()
    source.pictures["wrist"] = source.pictures["front"]
    assert "'front' and 'wrist'" in problems(source)["same-pictures"].title
    source.pictures["wrist"] = [255 - source.pictures["front"][0], *source.pictures["front"][1:]]
    assert "same-pictures" not in rules(source), "one episode shows that they differ"


def test_a_dataset_without_cameras_or_without_state_is_described():
    source = arm()
    source.pictures = {}
    assert problems(source)["no-camera"].severity == "error"
    source = arm()
    source.state_arrays = []
    found = inspect_source(source)
    assert found.state == ()
    assert {p.rule for p in found.problems} == {"gripper"}
    for frames in source.pictures["front"]:
        frames[:] = frames[0]
    assert "frozen-camera" in rules(source), "without a state, the actions tell that something moves"


def test_only_a_sample_of_frames_is_read():
    source = arm(episodes=40)
    asked: list[int] = []
    read = source.frames
    source.frames = lambda episode, indices, camera: asked.append(len(indices)) or read(episode, indices, camera)
    found = inspect_source(source, options=Options(max_episodes=8, frames_per_camera=3))
    assert [c.frames for c in found.cameras] == [24, 24]
    assert len(asked) == 16
    assert sum(asked) <= 16 * (3 + 6)


# --- episodes -------------------------------------------------------------------------------------------------------------------------


def test_episodes_shorter_than_a_chunk_are_counted():
    source = arm()
    source.action_arrays[4], source.state_arrays[4] = source.action_arrays[4][:9], source.state_arrays[4][:9]
    assert "short-episodes" not in rules(source)
    found = problems(source, ARM)["short-episodes"]
    assert (found.seen.count, str(found.seen.first), found.where) == (1, "episode 4", "the shortest has 9 steps")
    assert "short-episodes" in rules(source, chunk_len=12)
    assert "short-episodes" not in rules(source, chunk_len=9)


def test_an_episode_that_repeats_another_is_found():
    source = arm()
    source.state_arrays[5], source.action_arrays[5] = source.state_arrays[1].copy(), source.action_arrays[1].copy()
    found = problems(source)["duplicates"]
    assert (found.seen.count, str(found.seen.first), found.where) == (1, "episode 5", "the first repeats episode 1")
    source.action_arrays[5][-1, 0] += 1e-3
    assert "duplicates" not in rules(source)


def test_instructions_that_are_empty_or_spelt_in_two_ways_are_found():
    source = arm()
    source.tasks = ("pick up the bowl", "Pick up  the bowl.", "  ")
    found = problems(source)
    assert found["empty-instruction"].seen.count == 2
    assert found["instruction-spelling"].seen.count == 4
    source.tasks = ("pick up the bowl", "pick up the bowls", "open it")
    assert rules(source) == {"gripper"}
    source.tasks = ("a", "b", "c", "d", "e", "f", "A", "")
    assert rules(source) == {"gripper"}, "no episode follows the last two"


def test_failed_episodes_are_counted_by_what_the_recording_says():
    source = arm()
    source.extra_arrays["next.success"] = [np.arange(STEPS)[:, None] == STEPS - 1 for _ in range(len(source))]
    assert "failed-episodes" not in rules(source)
    source.extra_arrays["next.success"][3][:] = False
    found = problems(source)["failed-episodes"]
    assert (found.severity, found.seen.count, found.seen.of, str(found.seen.first)) == ("warning", 1, 6, "episode 3")
    for flags in source.extra_arrays["next.success"]:
        flags[:] = False
    assert problems(source)["failed-episodes"].severity == "note"
    source = arm()
    source.infos = {0: {"success": True}, 1: {"success": False}}
    assert problems(source)["failed-episodes"].seen.of == 2


def test_unreadable_and_damaged_episodes_are_findings_not_errors():
    source = arm()
    source.unreadable = {2: "shard 7, episode 2: cut off"}
    source.damage = {4: "clip.mp4, episode 4: missing"}
    source.skipped = ("shard 9: damaged",)
    found = inspect_source(source)
    assert found.records.unreadable == ((2, "shard 7, episode 2: cut off"), (4, "clip.mp4, episode 4: missing"))
    assert {p.rule: p.severity for p in found.problems} == {"damaged": "error", "skipped": "warning", "gripper": "note"}
    assert found.action[0].mean == pytest.approx(np.concatenate([a for e, a in enumerate(source.action_arrays) if e != 2])[:, 0].mean())
    assert "cut off" in render(found, source)


def test_arrays_of_other_sizes_than_announced_are_damage():
    source = arm()
    source.state_arrays[1] = source.state_arrays[1][:, :5]
    assert "announced were (60, 8)" in problems(source)["damaged"].where


def test_the_rate_must_be_the_robots():
    source = arm()
    assert "rate" not in rules(source, ARM)
    source.fps = 10.0
    slow = problems(source, ARM)["rate"]
    assert slow.severity == "warning"
    assert "every" not in slow.fix, "leaving out steps makes a slow recording faster still"
    source.fps = 40.0
    assert "--every 2" in problems(source, ARM)["rate"].fix
    source.fps = None
    assert problems(source)["rate"].severity == "note"
    assert inspect_source(source).duration_s is None


def test_scenes_are_not_judged_as_demonstrations():
    source = arm(steps=1)
    source.kind = "scenes"
    assert rules(source) == set()
    assert "Epis" in render(inspect_source(source), source)


def test_a_robot_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="8 state and 7 action dimensions, robot 'arm' has 8 and 3"):
        inspect_source(arm(), _three(ARM))
    with pytest.raises(ValueError, match="frames_per_camera"):
        Options(frames_per_camera=0)


# --- helpers --------------------------------------------------------------------------------------------------------------------------


def _three(spec: RobotSpec) -> RobotSpec:
    masks = (True,) * 3
    return dataclasses.replace(spec, action_dim=3, absolute_mask=masks, normalize_mask=masks, action_limits=((0.0, 1.0),) * 3, gripper=())


def _leader(lag: int) -> Recordings:
    """Seven joints that follow absolute targets after `lag` steps; the gripper is the last of both."""
    source = arm(steps=STEPS + lag)
    for number, states in enumerate(source.state_arrays):
        joints = states[:, :7].copy()
        source.action_arrays[number], source.state_arrays[number] = joints[lag:], joints[:STEPS]
    return source


def _detailed(source: Recordings) -> list[np.ndarray]:
    """Pictures in which every step differs: a pattern that slides on by a pixel."""
    pattern = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    return [np.stack([np.roll(pattern, step, axis=1) for step in range(length)]) for length in source.lengths]
