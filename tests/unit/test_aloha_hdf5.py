"""ALOHA's and ACT's HDF5 recordings: the recorded samples, and small files of every kind, good and bad."""

import io
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from vla_oft import robots
from vla_oft.data import hdf5_index
from vla_oft.data.adapt import for_robot
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.data.check import check_source
from vla_oft.data.formats import aloha_hdf5

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
FOLD = ReadOptions(instruction="fold the shirt")
RED = (200, 30, 10)


def jpeg(colour: tuple[int, int, int], size: int = 32) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "JPEG", quality=95)
    return out.getvalue()


def episode(path: Path, length: int = 6, seed: int = 0, width: int = 14, cameras=CAMERAS, compressed: bool = False, relative=False) -> Path:
    """One recording of something red; in raw images, the first pixel's green says which step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, compressed
        file["action"] = rng.normal(size=(length, width))
        if relative:
            file["relative_action"] = rng.normal(size=(length, width)).astype(np.float32)
        for name in ("qpos", "qvel", "effort"):
            file[f"observations/{name}"] = rng.normal(size=(length, width))
        for number, camera in enumerate(cameras):
            if compressed:  # rows are as long as the longest, and differ between cameras
                data = jpeg(RED)
                rows = np.zeros((length, len(data) + 7 * number), np.uint8)
                rows[:, : len(data)] = np.frombuffer(data, np.uint8)
            else:
                rows = np.empty((length, 8, 10, 3), np.uint8)
                rows[:] = RED
                rows[:, 0, 0, 1] = np.arange(length)
            file[f"observations/images/{camera}"] = rows
        if compressed:
            file["compress_len"] = np.zeros((len(cameras), length))  # not needed, so not looked at
    return path


@pytest.mark.shared
def test_the_raw_sample_is_read_as_its_readme_says(shared):
    folder = shared / "formats" / "aloha_hdf5_sample"
    source = open_source(folder, FOLD)
    assert (source.format, source.kind, source.name, source.fps) == ("aloha_hdf5", "demonstrations", "aloha_hdf5_sample", None)
    assert source.lengths.tolist() == [14, 10]  # and not what lies in folders below
    assert source.cameras == CAMERAS and (source.state_dim, source.action_dim) == (14, 14)
    assert source.extras == {"base_action": (2,), "effort": (14,), "qvel": (14,)} and source.tasks == ("fold the shirt",)
    assert source.episode_info(1) == {"file": "episode_1.hdf5", "sim": False} and list(source.damaged()) == []
    for number in range(2):
        with h5py.File(folder / f"episode_{number}.hdf5") as file:
            np.testing.assert_array_equal(source.actions(number), file["action"])
            np.testing.assert_array_equal(source.states(number), file["observations/qpos"])
            np.testing.assert_array_equal(source.extra("effort", number), file["observations/effort"])
            for camera in CAMERAS:
                images = file[f"observations/images/{camera}"][()]
                np.testing.assert_array_equal(source.frames(number, range(len(images)), camera), images)


@pytest.mark.shared
def test_the_compressed_sample_decodes_to_exchanged_colours(shared):
    """It holds the same pictures as the raw episode of that length, through OpenCV, and blue is what tells red from blue in them."""
    folder = shared / "formats" / "aloha_hdf5_sample"
    raw = open_source(folder, FOLD)
    exchanged, plain = (
        open_source(folder / "compressed", ReadOptions(instruction="fold the shirt", colour_order=order)) for order in ("bgr", "rgb")
    )
    assert exchanged.lengths.tolist() == [10] and exchanged.fingerprint() != plain.fingerprint() and list(exchanged.damaged()) == []
    for camera in CAMERAS:
        stored, right, wrong = (s.frames(e, [0, 9, 4], camera).astype(int) for s, e in ((raw, 1), (exchanged, 0), (plain, 0)))
        assert np.abs(right - stored).mean() < 5 < np.abs(wrong - stored).mean()
        np.testing.assert_array_equal(right, wrong[..., ::-1])


@pytest.mark.shared
def test_the_preprocessed_sample_has_splits_and_relative_actions(shared):
    folder = shared / "formats" / "aloha_hdf5_sample" / "preprocessed" / "fold_shirt"
    train, val, inside = open_source(folder), open_source(folder, ReadOptions(split="val")), open_source(folder / "val")
    assert train.lengths.tolist() == [14] and val.lengths.tolist() == inside.lengths.tolist() == [10]
    for source in (train, val, inside):
        assert source.tasks == ("fold shirt",) and source.name == "fold_shirt" and source.frames(0, [2], "cam_high").shape == (1, 48, 48, 3)
        actions, relative = source.actions(0), source.extra("relative_action", 0)
        assert actions.dtype == relative.dtype == np.float32 and source.extras["relative_action"] == (14,)
        np.testing.assert_allclose(relative[:-1], np.diff(actions, axis=0), atol=1e-6)
        np.testing.assert_array_equal(relative[-1], relative[-2])
    raw = open_source(folder.parent.parent, FOLD)
    np.testing.assert_allclose(train.actions(0), raw.actions(0), atol=1e-6)
    np.testing.assert_allclose(val.states(0), raw.states(1), atol=1e-6)


@pytest.mark.shared
def test_the_sample_fits_the_robot(shared):
    folder = shared / "formats" / "aloha_hdf5_sample" / "preprocessed" / "fold_shirt"
    spec = robots.load("aloha")
    source = for_robot(open_source(folder), spec)
    assert source.cameras == spec.cameras and isinstance(check_source(source, spec), list)


def test_episodes_come_in_numeric_order_and_nothing_below_is_read(tmp_path):
    for number in (10, 9, 100):
        episode(tmp_path / f"episode_{number}.hdf5", seed=number, length=number)
    episode(tmp_path / "compressed" / "episode_0.hdf5", compressed=True)
    episode(tmp_path / "train" / "episode_0.hdf5")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".episode_3.hdf5").write_bytes(b"half a copy")
    assert aloha_hdf5.detect(tmp_path)
    assert open_source(tmp_path, FOLD).lengths.tolist() == [9, 10, 100]


def test_frames_are_the_steps_asked_for(tmp_path):
    episode(tmp_path / "episode_0.hdf5")
    source = open_source(tmp_path, FOLD)
    frames = source.frames(0, [5, 0, 5], "cam_high")
    assert frames.dtype == np.uint8 and frames[:, 0, 0, 1].tolist() == [5, 0, 5] and tuple(frames[0, 4, 4]) == RED
    assert source.frames(0, [], "cam_high").shape == (0, 8, 10, 3)
    with pytest.raises(IndexError):
        source.frames(0, [6], "cam_high")


def test_raw_recordings_are_rgb_unless_the_user_says_otherwise(tmp_path):
    episode(tmp_path / "episode_0.hdf5")
    frames = open_source(tmp_path, ReadOptions(instruction="x", colour_order="bgr")).frames(0, [1], "cam_high")
    assert tuple(frames[0, 4, 4]) == RED[::-1] and frames.flags.c_contiguous


def test_compressed_recordings_need_a_colour_order(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5", compressed=True)
    with pytest.raises(ValueError, match=r"colour_order='bgr'.*--colour-order bgr") as caught:
        open_source(tmp_path, FOLD)
    assert str(path) in str(caught.value) and "cam_high" in str(caught.value)
    for order, expected in (("rgb", RED), ("bgr", RED[::-1])):
        source = open_source(tmp_path, ReadOptions(instruction="x", colour_order=order))
        for camera in CAMERAS:
            frames = source.frames(0, [3, 0, 3], camera)
            assert frames.shape == (3, 32, 32, 3) and np.abs(frames[1, 9, 9].astype(int) - expected).max() <= 3
        assert source.frames(0, [], "cam_high").shape == (0, 32, 32, 3) and "compress_len" not in source.extras


def test_everything_that_is_left_unsaid_is_asked_for_at_once(tmp_path):
    episode(tmp_path / "episode_0.hdf5", compressed=True)
    with pytest.raises(ValueError, match=r"--colour-order.*--instruction"):
        open_source(tmp_path)


def test_a_recording_without_an_instruction_is_refused(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5")
    with pytest.raises(ValueError, match=r"no instruction.*instruction='fold the shirt'.*--instruction") as caught:
        open_source(tmp_path)
    assert str(path) in str(caught.value)


def test_splits_are_chosen_by_name(tmp_path):
    task = tmp_path / "open_the_pot"
    episode(task / "train" / "episode_0.hdf5", length=4)
    episode(task / "val" / "episode_0.hdf5", length=3)
    assert open_source(task).lengths.tolist() == [4] and open_source(task).tasks == ("open the pot",)
    assert open_source(task, ReadOptions(split="val")).lengths.tolist() == [3]
    assert open_source(task / "val", ReadOptions(split="val", instruction="lift the lid")).tasks == ("lift the lid",)
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        open_source(task, ReadOptions(split="test"))
    with pytest.raises(ValueError, match="no split 'train'"):
        open_source(task / "val", ReadOptions(split="train"))
    shutil.rmtree(task / "train")
    assert open_source(task).lengths.tolist() == [3]
    episode(tmp_path / "raw" / "episode_0.hdf5")
    with pytest.raises(ValueError, match=r"no split 'train'.*leave split out"):
        open_source(tmp_path / "raw", ReadOptions(split="train", instruction="x"))


def test_the_rate_is_the_users(tmp_path):
    episode(tmp_path / "episode_0.hdf5")
    assert open_source(tmp_path, FOLD).fps is None
    assert open_source(tmp_path, ReadOptions(instruction="x", fps=50)).fps == 50


def test_depth_is_no_camera(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5")
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_high_depth"] = np.zeros((6, 80, 80), np.uint16)
    source = open_source(tmp_path, FOLD)
    assert source.cameras == CAMERAS and set(source.extras) == {"qvel", "effort"}


def test_arrays_of_no_known_name_are_extras_if_they_have_a_row_per_step(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5")
    with h5py.File(path, "r+") as file:
        file["timestamps"], file["camera_matrix"], file["note"] = np.arange(6.0), np.eye(3), "wet cloth"
    source = open_source(tmp_path, FOLD)
    assert source.extras == {"qvel": (14,), "effort": (14,), "timestamps": ()}
    np.testing.assert_array_equal(source.extra("timestamps", 0), np.arange(6))


def test_extras_are_what_all_episodes_have(tmp_path):
    episode(tmp_path / "episode_0.hdf5", relative=True)
    episode(tmp_path / "episode_1.hdf5")
    assert set(open_source(tmp_path, FOLD).extras) == {"qvel", "effort"}


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"width": 7}, "action dimensions: 7, but 14"),
        ({"cameras": CAMERAS[:2]}, "cameras: cam_high, cam_left_wrist, but cam_high, cam_left_wrist, cam_right_wrist"),
        ({"compressed": True}, "cameras: cam_high (JPEG)"),
    ],
)
def test_recordings_of_another_kind_are_named_and_can_be_skipped(tmp_path, other, complaint):
    """The rule is what most of them are, even where the odd one comes first."""
    odd = episode(tmp_path / "episode_0.hdf5", length=3, **other)
    usual = [episode(tmp_path / f"episode_{number}.hdf5") for number in (1, 2)]
    options = {"instruction": "x", "colour_order": "rgb"}
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path, ReadOptions(**options))
    assert str(caught.value).startswith(f"{odd}: ") and complaint in str(caught.value) and str(usual[0]) in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    source = open_source(tmp_path, ReadOptions(**options, skip_bad=True))
    assert source.lengths.tolist() == [6, 6] and len(source.skipped) == 1 and source.skipped[0].startswith(f"{odd}: ")
    assert source.episode_info(0)["file"] == "episode_1.hdf5"


def test_cameras_that_are_not_wanted_may_differ(tmp_path):
    episode(tmp_path / "episode_0.hdf5", cameras=(*CAMERAS, "cam_low"))
    episode(tmp_path / "episode_1.hdf5")
    source = open_source(tmp_path, ReadOptions(instruction="x", cameras=(("top", "cam_high"),)))
    assert len(source) == 2 and source.cameras == ("top",)
    with pytest.raises(ValueError, match="no camera cam_rear; it has cam_high"):
        open_source(tmp_path, ReadOptions(instruction="x", cameras=(("top", "cam_rear"),)))


def edit(key: str, value):
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[key]
            if value is not None:
                file[key] = value

    return change


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, ": truncated ("),
        (lambda path: path.write_bytes(b"not HDF5 at all"), "not a readable HDF5 file"),
        (edit("action", None), "'action' is missing"),
        (edit("observations", None), "'observations' is missing"),
        (edit("observations/qpos", None), "'observations/qpos' is missing"),
        (edit("observations/images", None), "group 'observations/images' is missing"),
        (edit("observations/images/cam_high", np.zeros((6, 8, 8), np.uint8)), "images are (steps, height, width, 3)"),
        (edit("observations/images/cam_high", np.zeros((5, 8, 8, 3), np.uint8)), "has 5 steps, but 'action' has 6"),
        (edit("observations/effort", np.zeros((7, 14))), "has 7 steps, but 'action' has 6"),
        (edit("action", np.zeros((0, 14))), "empty"),
        (edit("action", np.full((6, 14), b"x")), "not numbers"),
        (edit("observations/qpos", np.full((6, 14), b"x")), "not numbers"),
    ],
)
def test_a_bad_file_is_named_and_can_be_skipped(tmp_path, damage, complaint):
    episode(tmp_path / "episode_0.hdf5")
    path = episode(tmp_path / "episode_1.hdf5")
    damage(path)
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path, FOLD)
    assert str(caught.value).startswith(f"{path}: ") and complaint in str(caught.value) and "\n" not in str(caught.value)
    source = open_source(tmp_path, ReadOptions(instruction="x", skip_bad=True))
    assert len(source) == 1 and len(source.skipped) == 1 and complaint in source.skipped[0]


def test_recordings_without_any_camera_are_refused(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5", cameras=())
    with h5py.File(path, "r+") as file:
        file.create_group("observations/images")
    with pytest.raises(ValueError, match="no images"):
        open_source(tmp_path, FOLD)


@pytest.mark.parametrize("found", ["first", "middle", "last"])
def test_a_damaged_picture_is_named(tmp_path, found):
    path = episode(tmp_path / "episode_0.hdf5", compressed=True)
    step = {"first": 0, "middle": 3, "last": 5}[found]
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_left_wrist"][step, 2:] = 0
    source = open_source(tmp_path, ReadOptions(instruction="x", colour_order="rgb"))
    ((number, reason),) = source.damaged()
    assert number == 0 and f"{path}, episode 0, step {step}, camera cam_left_wrist" in reason
    with pytest.raises(ValueError, match=f"step {step}, camera cam_left_wrist"):
        source.frames(0, range(6), "cam_left_wrist")


def test_pictures_that_differ_in_size_are_refused(tmp_path):
    path = episode(tmp_path / "episode_0.hdf5", compressed=True)
    with h5py.File(path, "r+") as file:
        small = np.frombuffer(jpeg(RED, 16), np.uint8)
        rows = file["observations/images/cam_high"]
        rows[2] = np.pad(small, (0, rows.shape[1] - len(small)))
    source = open_source(tmp_path, ReadOptions(instruction="x", colour_order="rgb"))
    with pytest.raises(ValueError, match=r"episode_0\.hdf5, episode 0: the images of camera cam_high differ in size"):
        source.frames(0, [1, 2], "cam_high")


def test_many_recordings_open_from_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_index, "FEW_FILES", 2)
    for number in range(4):
        episode(tmp_path / "pour" / "train" / f"episode_{number}.hdf5", length=3 + number, compressed=True)
    episode(tmp_path / "pour" / "val" / "episode_0.hdf5", length=2)
    options = ReadOptions(cache_dir=tmp_path / "cache", colour_order="bgr")
    fresh = open_source(tmp_path / "pour", options)
    monkeypatch.setattr(hdf5_index, "examine", None)
    again = open_source(tmp_path / "pour", options)
    assert again.fingerprint() == fresh.fingerprint() and again.lengths.tolist() == [3, 4, 5, 6]
    np.testing.assert_array_equal(again.frames(3, [5], "cam_high"), fresh.frames(3, [5], "cam_high"))
