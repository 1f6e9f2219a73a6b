"""LIBERO's HDF5 recordings: the recorded sample, and small files of every kind, good and bad."""

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_oft.data import hdf5, hdf5_index
from vla_oft.data.base import ReadOptions, instruction, open_source
from vla_oft.data.check import check_source
from vla_oft.data.formats import libero_hdf5
from vla_oft.data.libero_files import words_of

SAMPLE = "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate_demo.hdf5"
NAME = "KITCHEN_SCENE1_open_the_drawer_demo.hdf5"


def demo(group: h5py.Group, length: int = 5, seed: int = 0, size: int = 16, **storage) -> None:
    """One demonstration. Pixels say where they belong: red is the step, green the demonstration."""
    rng = np.random.default_rng(seed)
    group["actions"] = rng.uniform(-1, 1, (length, 7))
    for name in ("dones", "rewards"):
        group[name] = (np.arange(length) == length - 1).astype(np.uint8)
    group["robot_states"], group["states"] = rng.normal(size=(length, 9)), rng.normal(size=(length, 20))
    for name, width in (("ee_states", 6), ("gripper_states", 2), ("joint_states", 7)):
        group[f"obs/{name}"] = rng.normal(size=(length, width))
    for camera, blue in (("agentview_rgb", 1), ("eye_in_hand_rgb", 2)):
        images = np.zeros((length, size, size, 3), np.uint8)
        images[..., 0], images[..., 1], images[..., 2] = np.arange(length)[:, None, None], seed, blue
        group.create_dataset(f"obs/{camera}", data=images, **storage)


def task(path: Path, demos: int = 2, said: str | None = "open the top drawer", hz: float | None = 20, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if said is not None:
            data.attrs["problem_info"] = json.dumps({"problem_name": "kitchen", "language_instruction": said})
        if hz is not None:
            data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": hz}})
        for number in range(demos):
            demo(data.create_group(f"demo_{number}"), length=5 + number, seed=number, **kwargs)
    return path


def change(path: Path, edit) -> None:
    with h5py.File(path, "r+") as file:
        edit(file["data"])


def replace(key: str, value):
    def edit(data: h5py.Group) -> None:
        del data[key]
        if value is not None:
            data[key] = value

    return edit


@pytest.mark.shared
def test_the_sample_is_read_as_its_readme_says(shared):
    source = open_source(shared / "formats" / "libero_hdf5_sample")
    assert (source.format, source.kind, source.name, source.fps) == ("libero_hdf5", "demonstrations", "libero_hdf5_sample", 20.0)
    assert source.lengths.tolist() == [12, 9] and source.lengths.dtype == np.int64
    assert source.cameras == ("agentview_rgb", "eye_in_hand_rgb") and (source.state_dim, source.action_dim) == (8, 7)
    assert source.tasks == ("put the black bowl on the plate",) and source.skipped == () and source.recording == {}
    assert source.extras == {
        "dones": (), "rewards": (), "robot_states": (9,), "states": (20,), "ee_pos": (3,), "ee_ori": (3,), "joint_states": (7,),
    }  # fmt: skip
    assert source.episode_info(1) == {
        "file": SAMPLE, "demo": "demo_1", "suite": "libero_90", "problem": "libero_kitchen_tabletop_manipulation",
    }  # fmt: skip
    assert list(source.damaged()) == []


@pytest.mark.shared
def test_the_sample_holds_the_numbers_and_pixels_that_are_in_the_file(shared):
    folder = shared / "formats" / "libero_hdf5_sample"
    source = open_source(folder)
    with h5py.File(folder / SAMPLE) as file:
        for episode, length in enumerate((12, 9)):
            stored = file[f"data/demo_{episode}"]
            np.testing.assert_array_equal(source.actions(episode), stored["actions"])
            state = np.concatenate([stored["obs/ee_states"], stored["obs/gripper_states"]], axis=1)
            np.testing.assert_array_equal(source.states(episode), state)
            assert source.actions(episode).dtype == source.states(episode).dtype == np.float64
            front, wrist = (source.frames(episode, range(length), camera) for camera in source.cameras)
            np.testing.assert_array_equal(front, stored["obs/agentview_rgb"])
            np.testing.assert_array_equal(wrist, 255 - front)
            assert (front[:, :8, :, 2] == 200).all() and (front[:, 8:, :, 2] == 0).all()  # the top rows: nothing was turned
            assert (front[..., 0] == 40 * episode + 20).all()
            actions = source.actions(episode)
            assert not actions[3, :6].any() and actions[3, 6] == actions[2, 6]
            np.testing.assert_array_equal(source.extra("dones", episode), np.arange(length) == length - 1)
            np.testing.assert_array_equal(source.extra("joint_states", episode), stored["obs/joint_states"])
            assert source.task_indices(episode).tolist() == [0] * length


def test_the_format_is_recognised_by_contents(tmp_path):
    task(tmp_path / "a" / NAME)
    assert libero_hdf5.detect(tmp_path / "a") and not libero_hdf5.detect(tmp_path)
    task(tmp_path / "b" / "episode_0.hdf5")  # named like ALOHA's
    assert open_source(tmp_path / "b").format == "libero_hdf5"


def test_demonstrations_and_files_come_in_numeric_order(tmp_path):
    task(tmp_path / "task_10_demo.hdf5", demos=1)
    task(tmp_path / "task_9_demo.hdf5", demos=12)
    with h5py.File(tmp_path / "task_9_demo.hdf5", "r+") as file:
        file["mask/train"] = [b"demo_0"]  # robomimic's filters
    source = open_source(tmp_path)
    demos = [source.episode_info(episode) for episode in range(len(source))]
    assert [info["demo"] for info in demos] == [f"demo_{n}" for n in range(12)] + ["demo_0"]
    assert [info["file"] for info in demos][-2:] == ["task_9_demo.hdf5", "task_10_demo.hdf5"]
    assert source.frames(10, [0], "agentview_rgb")[0, 0, 0, 1] == 10


@pytest.mark.parametrize(
    "storage", [{}, {"chunks": (1, 8, 16, 3)}, {"chunks": (4, 8, 8, 1), "compression": "gzip"}], ids=["whole", "steps", "blocks"]
)
def test_frames_come_in_the_order_asked_for(tmp_path, storage):
    task(tmp_path / NAME, demos=12, **storage)
    source = open_source(tmp_path)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 15), max_size=12))
    def check(steps):
        frames = source.frames(11, steps, "eye_in_hand_rgb")
        assert frames.shape == (len(steps), 16, 16, 3) and frames.dtype == np.uint8
        np.testing.assert_array_equal(frames[:, 3, 5, 0], steps)

    check()


def test_a_block_is_read_once_however_many_of_its_steps_are_asked_for():
    slices = hdf5._slices(np.array([8, 3, 5, 2, 7, 3]), 4)
    assert [(first, last, slots.tolist()) for first, last, slots in slices] == [(2, 3, [3, 1, 5]), (5, 8, [2, 4, 0])]
    assert [(first, last) for first, last, _ in hdf5._slices(np.array([0, 3, 9]), 1)] == [(0, 0), (3, 3), (9, 9)]


def test_unknown_steps_and_cameras_are_refused(tmp_path):
    task(tmp_path / NAME)
    source = open_source(tmp_path)
    for steps in ([5], [-1]):
        with pytest.raises(IndexError, match=r"steps 0\.\.4"):
            source.frames(0, steps, "agentview_rgb")
    with pytest.raises(ValueError, match="no camera 'front'"):
        source.frames(0, [0], "front")
    with pytest.raises(ValueError, match="no camera front; it has agentview_rgb"):
        open_source(tmp_path, ReadOptions(cameras=(("a", "front"),)))


def test_cameras_can_be_chosen_and_renamed(tmp_path):
    task(tmp_path / NAME)
    source = open_source(tmp_path, ReadOptions(cameras=(("wrist", "eye_in_hand_rgb"),)))
    assert source.cameras == ("wrist",) and (source.frames(0, [1], "wrist")[..., 2] == 2).all()
    assert "agentview_rgb" not in source.extras


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("KITCHEN_SCENE1_open_the_drawer_demo.hdf5", "open the drawer"),
        ("KITCHEN_SCENE10_put_the_bowl_in_the_drawer_demo.hdf5", "put the bowl in the drawer"),
        ("LIVING_ROOM_SCENE2_put_both_the_cans_in_the_basket_demo.hdf5", "put both the cans in the basket"),
        ("pick_up_the_black_bowl_next_to_the_plate_demo.hdf5", "pick up the black bowl next to the plate"),
        ("image_v141.hdf5", None),
        ("demo.hdf5", None),
    ],
)
def test_the_file_name_is_read_as_libero_reads_it(name, words):
    assert words_of(name) == words


def test_the_instruction_is_the_files_name_or_its_own_or_what_the_user_says(tmp_path):
    task(tmp_path / "a" / NAME, said='"Open the top drawer"')
    task(tmp_path / "b" / "image.hdf5", said='"Open the top drawer"')
    task(tmp_path / "c" / "image.hdf5", said=None)
    own = open_source(tmp_path / "a")
    assert instruction(own, 1) == "open the drawer" and own.episode_info(0)["problem_says"] == "Open the top drawer"
    assert open_source(tmp_path / "b").tasks == ("Open the top drawer",)
    assert open_source(tmp_path / "a", ReadOptions(instruction="tidy up")).tasks == ("tidy up",)
    with pytest.raises(ValueError, match=r"image\.hdf5: no instruction.*--instruction"):
        open_source(tmp_path / "c")
    task(tmp_path / "c" / NAME)
    assert "image.hdf5" in open_source(tmp_path / "c", ReadOptions(skip_bad=True)).skipped[0]


def test_the_frame_rate_is_the_files_own(tmp_path):
    task(tmp_path / "a" / NAME)
    assert open_source(tmp_path / "a", ReadOptions(fps=20)).fps == 20.0
    with pytest.raises(ValueError, match=r"20 frames a second, but fps=10 was given"):
        open_source(tmp_path / "a", ReadOptions(fps=10))
    task(tmp_path / "b" / NAME, hz=None)
    assert open_source(tmp_path / "b").fps is None and open_source(tmp_path / "b", ReadOptions(fps=10)).fps == 10.0
    task(tmp_path / "a" / "other_demo.hdf5", hz=10, demos=1)
    with pytest.raises(ValueError, match=r"other_demo\.hdf5, episode demo_0: frames a second: 10.*20.*KITCHEN"):
        open_source(tmp_path / "a")


def test_arrays_that_differ_in_width_between_files_are_no_extras(tmp_path):
    task(tmp_path / NAME)
    path = task(tmp_path / "other_demo.hdf5")
    for number in range(2):
        change(path, replace(f"demo_{number}/states", np.zeros((5 + number, 31))))
        change(path, lambda data, n=number: data[f"demo_{n}"].create_dataset("obs/depth", data=np.zeros((5 + n, 80, 80), np.float32)))
    source = open_source(tmp_path)
    assert "states" not in source.extras and "depth" not in source.extras and source.extras["robot_states"] == (9,)
    with pytest.raises(ValueError, match="no extra 'states'"):
        source.extra("states", 0)


def test_robosuites_own_names_are_read(tmp_path):
    path = tmp_path / "lift_demo.hdf5"
    with h5py.File(path, "w") as file:
        group = file.create_group("data/demo_0")
        group["actions"] = np.zeros((4, 7), np.float32)
        for name, width in (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)):
            group[f"obs/{name}"] = np.ones((4, width))
        group["obs/agentview_image"] = np.zeros((4, 8, 8, 3), np.uint8)
        group["next_obs/agentview_image"] = np.zeros((4, 8, 8, 3), np.uint8)
    source = open_source(tmp_path)
    assert source.cameras == ("agentview_image",) and source.states(0).shape == (4, 9) and source.actions(0).dtype == np.float32


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (replace("demo_1/actions", None), "'actions' is missing"),
        (replace("demo_1/obs", None), "group 'obs' is missing"),
        (replace("demo_1/obs/gripper_states", None), "'obs/gripper_states' is missing"),
        (replace("demo_1/obs/agentview_rgb", np.zeros((6, 16, 16), np.uint8)), "cameras: eye_in_hand_rgb, but agentview_rgb, eye"),
        (replace("demo_1/actions", np.zeros((0, 7))), "empty"),
        (replace("demo_1/actions", np.zeros((4, 7))), "has 6 steps, but 'actions' has 4"),
        (replace("demo_1/rewards", np.zeros(3)), "'rewards' has 3 steps, but 'actions' has 6"),
        (replace("demo_1/obs/ee_states", np.zeros((9, 6))), "'obs/ee_states' has 9 steps"),
        (replace("demo_1/actions", np.full((6, 7), b"x")), "not numbers"),
        (replace("demo_1/actions", np.zeros(6)), "not numbers (steps, dimensions)"),
        (replace("demo_1/obs/ee_states", np.full((6, 6), b"x")), "not numbers"),
        (replace("demo_1/obs/ee_states", np.zeros((6, 2, 3))), "not (dimensions,)"),
        (replace("demo_1/actions", np.zeros((6, 8))), "action dimensions: 8, but 7"),
        (replace("demo_1/obs/ee_states", np.zeros((6, 3))), "state dimensions: 5, but 8"),
    ],
)
def test_a_bad_demonstration_is_named_and_can_be_skipped(tmp_path, edit, complaint):
    path = task(tmp_path / NAME, demos=3)
    change(path, edit)
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{path}, episode demo_1: ") and complaint in str(caught.value) and "\n" not in str(caught.value)
    source = open_source(tmp_path, ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [5, 7] and len(source.skipped) == 1 and complaint in source.skipped[0]
    assert source.frames(1, [6], "eye_in_hand_rgb")[0, 0, 0].tolist() == [6, 2, 2]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_demos(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("data")


def no_group(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["action"] = 1


def many_values(path: Path) -> None:
    change(path, lambda data: data.attrs.__setitem__("problem_info", ["{}", "{}"]))


def no_json(path: Path) -> None:
    change(path, lambda data: data.attrs.__setitem__("env_args", "{"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (empty, "not a readable HDF5 file"),
        (truncate, ": truncated ("),
        (no_group, "group 'data' is missing"),
        (no_demos, "no demonstrations"),
        (many_values, "'problem_info' holds several values"),
        (no_json, "'env_args' of 'data' is not JSON"),
    ],
)
def test_a_bad_file_is_named_and_can_be_skipped(tmp_path, damage, complaint):
    task(tmp_path / "a_demo.hdf5")
    path = task(tmp_path / "b_demo.hdf5")
    damage(path)
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and complaint in str(caught.value) and "\n" not in str(caught.value)
    source = open_source(tmp_path, ReadOptions(skip_bad=True))
    assert len(source) == 2 and len(source.skipped) == 1 and str(path) in source.skipped[0]


def test_a_folder_with_nothing_but_a_truncated_file_says_so(tmp_path):
    truncate(task(tmp_path / NAME))
    with pytest.raises(ValueError, match="truncated"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)is empty.*were skipped.*truncated"):
        open_source(tmp_path, ReadOptions(skip_bad=True))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = task(tmp_path / NAME)
    path.chmod(0)
    with pytest.raises(ValueError, match="no permission"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("raised", "complaint"),
    [
        (PermissionError(13, "x"), "no permission to read it"),
        (BlockingIOError(11, "x"), "another program is writing to it"),
        (OSError("Unable (file signature\nnot found)"), r"not a readable HDF5 file \(file signature not found\)"),
    ],
)
def test_what_the_system_says_becomes_a_clear_error(tmp_path, monkeypatch, raised, complaint):
    path = task(tmp_path / NAME)

    def refuse(*args, **kwargs):
        raise raised

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(ValueError, match=complaint):
        hdf5.open_file(path)


def test_sizes_that_no_recording_has_are_refused_before_memory_is_taken(tmp_path):
    path = task(tmp_path / NAME)
    for key, shape, chunks in (("actions", (1 << 40, 7), (16, 7)), ("obs/agentview_rgb", (6, 1 << 20, 1 << 20, 3), (1, 8, 8, 3))):
        with h5py.File(path, "r+") as file:
            group = file["data/demo_1"]
            kept = group[key][()]
            del group[key]
            group.create_dataset(key, shape, np.uint8 if "rgb" in key else np.float64, chunks=chunks)
        with pytest.raises(ValueError, match=r"demo_1.*(at most|steps)"):
            open_source(tmp_path)
        change(path, replace(f"demo_1/{key}", kept))


def test_options_that_make_no_sense_here_are_refused(tmp_path):
    task(tmp_path / NAME)
    with pytest.raises(ValueError, match="LIBERO's images are RGB"):
        open_source(tmp_path, ReadOptions(colour_order="bgr"))
    with pytest.raises(ValueError, match="no splits"):
        open_source(tmp_path, ReadOptions(split="train"))


def test_damage_inside_a_file_is_found(tmp_path):
    path = task(tmp_path / NAME, size=64, chunks=(1, 64, 64, 3), compression="gzip")
    with h5py.File(path) as file:
        stored = file["data/demo_1/obs/eye_in_hand_rgb"].id.get_chunk_info(5)
    source = open_source(tmp_path)
    assert list(source.damaged()) == []
    with path.open("r+b") as raw:
        raw.seek(stored.byte_offset)
        raw.write(b"\xff" * stored.size)
    source = open_source(tmp_path)
    ((episode, reason),) = source.damaged()
    assert episode == 1 and str(path) in reason and "episode 1 (demo_1)" in reason and "copy or record the file again" in reason
    with pytest.raises(ValueError, match=r"episode 1 \(demo_1\).*damaged"):
        source.frames(1, [5], "eye_in_hand_rgb")
    assert len(source.frames(1, [4], "eye_in_hand_rgb")) == 1


def test_a_file_that_was_replaced_after_opening_is_noticed(tmp_path):
    path = task(tmp_path / NAME)
    source = open_source(tmp_path)
    path.unlink()
    task(path, demos=1, size=8)
    assert [episode for episode, _ in source.damaged()] == [0, 1]
    path.unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        source.actions(0)


def test_the_fingerprint_follows_contents_and_reading_but_not_the_place(tmp_path):
    path = task(tmp_path / "a" / NAME)
    first = open_source(tmp_path / "a").fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / NAME, (0, 0))
    assert open_source(tmp_path / "b").fingerprint() == first
    others = [
        ReadOptions(cameras=(("agentview_rgb", "agentview_rgb"),)),
        ReadOptions(cameras=(("front", "agentview_rgb"),)),
        ReadOptions(instruction="tidy up"),
    ]
    found = {open_source(tmp_path / "a", options).fingerprint() for options in others}
    change(path, lambda data: data["demo_0/actions"].__setitem__((2, 3), 0.25))  # nothing but a value: no size changes
    found.add(open_source(tmp_path / "a").fingerprint())
    assert len(found) == 4 and first not in found


def _read(source, pipe) -> None:
    pipe.send(int(source.frames(1, [3], "agentview_rgb")[0, 0, 0, 0]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_can_read_a_source(tmp_path, method):
    task(tmp_path / NAME)
    source = open_source(tmp_path)
    source.frames(0, [0], "agentview_rgb")  # a handle is open here
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(source, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == 3
    process.join()
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint() and again.frames(1, [2], "agentview_rgb")[0, 0, 0, 0] == 2


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "MAX_OPEN", 2)
    for number in range(5):
        task(tmp_path / f"task_{number}_demo.hdf5", demos=1)
    source = open_source(tmp_path)
    for episode in (0, 1, 2, 3, 4, 0):
        assert source.frames(episode, [1], "agentview_rgb").shape == (1, 16, 16, 3)
        assert len(hdf5._files) <= 2


def test_an_index_is_kept_where_there_are_many_files_and_renewed_when_one_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_index, "FEW_FILES", 1)
    folder, options = tmp_path / "set", ReadOptions(cache_dir=tmp_path / "cache")
    for number in range(3):
        path = task(folder / f"task_{number}_demo.hdf5", demos=1)
    fresh = open_source(folder, options)
    monkeypatch.setattr(hdf5_index, "examine", None)  # from the index alone
    again = open_source(folder, options)
    assert again.fingerprint() == fresh.fingerprint() and again.extras == fresh.extras and again.episode_info(2) == fresh.episode_info(2)
    monkeypatch.undo()
    monkeypatch.setattr(hdf5_index, "FEW_FILES", 1)
    task(path, demos=2)
    assert len(open_source(folder, options)) == 4
    truncate(path)
    with pytest.raises(ValueError, match="truncated"):
        open_source(folder, options)
    for _ in range(2):
        assert len(open_source(folder, ReadOptions(cache_dir=tmp_path / "cache", skip_bad=True)).skipped) == 1


def test_a_file_that_may_be_read_again_is_no_longer_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_index, "FEW_FILES", 1)
    folder, options = tmp_path / "set", ReadOptions(cache_dir=tmp_path / "cache", skip_bad=True)
    task(folder / "a_demo.hdf5")
    path = task(folder / "b_demo.hdf5")
    open_it, may = h5py.File, os.access

    def refuse(name, *args, **kwargs):
        if Path(name) == path:
            raise PermissionError(13, "x")
        return open_it(name, *args, **kwargs)

    with monkeypatch.context() as locked:
        locked.setattr(h5py, "File", refuse)
        locked.setattr(os, "access", lambda name, mode: Path(name) != path and may(name, mode))
        assert [line.partition(": ")[0] for line in open_source(folder, options).skipped] == [str(path)]
    assert open_source(folder, options).skipped == ()


def test_not_finite_actions_are_left_to_the_check(tmp_path):
    from vla_oft import robots
    from vla_oft.data.adapt import for_robot

    path = task(tmp_path / NAME)
    change(path, lambda data: data["demo_1/actions"].__setitem__((2, 3), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        check_source(for_robot(open_source(tmp_path), robots.load("libero"), layout="hdf5"), robots.load("libero"))
