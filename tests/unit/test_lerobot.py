"""LeRobot v3.0: the ecosystem's own files, a round trip through ours, and damaged datasets."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demonstrations import LENGTHS, SPEC, bar_width, episode, write

import vla_oft.data
from vla_oft.data.base import check_source, formats, instruction, open_source, source_statistics
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import encode
from vla_oft.data.video import encode_clip, num_frames, read_frames
from vla_oft.statistics import load_statistics

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "formats"
TASKS = ("pick up the black bowl and place it on the plate", "open the middle drawer of the cabinet")


def sample(name: str) -> Path:
    if not (SAMPLES / name).is_dir():
        pytest.skip(f"recorded samples are not beside the checkout: {SAMPLES / name}")
    return SAMPLES / name


@pytest.mark.shared
@pytest.mark.parametrize(("name", "tolerance"), [("lerobot_v3_sample", 16), ("lerobot_v3_images_sample", 0)])
def test_lerobots_own_datasets_are_read(name, tolerance):
    source = open_source(sample(name))
    source.check()
    assert source.lengths.tolist() == [12, 9, 15] and source.fps == 10 and source.tasks == TASKS
    assert source.cameras == ("image", "wrist_image") and (source.state_dim, source.action_dim) == (8, 7)
    for e in range(3):
        steps = np.arange(source.lengths[e])
        np.testing.assert_allclose(source.states(e), np.arange(8) * 0.1 + e + 0.01 * steps[:, None], atol=1e-6)
        np.testing.assert_array_equal(source.actions(e)[:, 6], np.where(steps % 2, 1, -1))
        assert instruction(source, e) == TASKS[e % 2]
        image, wrist = source.frames(e, steps, "image").astype(int), source.frames(e, steps[::-1], "wrist_image")[::-1]
        assert np.abs(image[..., 0] - (40 * e + 20)).max() <= tolerance
        assert np.abs(image[:, :, :, 0] + wrist[:, :, :, 0] - 255).mean() <= tolerance / 4
        widths = [bar_width(frame) for frame in image]
        assert np.abs(np.array(widths) - (4 + 5 * steps)).max() <= (3 if tolerance else 0) and (np.diff(widths) > 0).all()


@pytest.mark.shared
def test_quantiles_are_recomputed_not_believed():
    source = open_source(sample("lerobot_v3_sample"))
    state = source_statistics(source, [True] * 7).state
    assert state is not None
    np.testing.assert_allclose((state.q01[0], state.q99[0]), (0.0035, 2.1365), atol=1e-4)


@pytest.mark.shared
def test_our_files_have_the_columns_and_types_of_lerobots(tmp_path):
    write(tmp_path / "ours")
    theirs = sample("lerobot_v3_sample")
    for file in ("meta/tasks.parquet", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        expected, got = pq.read_schema(theirs / file), pq.read_schema(tmp_path / "ours" / file)
        for name in expected.names:
            ours = name.replace("wrist_image", "wrist").replace("images.image", "images.front")
            found, wanted = got.field(ours).type, expected.field(name).type
            assert found == wanted or pa.types.is_fixed_size_list(wanted), name
    assert b"index_columns" in pq.read_schema(tmp_path / "ours/meta/tasks.parquet").metadata[b"pandas"]
    expected, got = (json.loads((root / "meta/info.json").read_text()) for root in (theirs, tmp_path / "ours"))
    assert set(got) == set(expected)
    stats = json.loads((tmp_path / "ours/meta/stats.json").read_text())
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1) and stats["action"]["count"] == [sum(LENGTHS)]


def test_a_round_trip_keeps_every_number(tmp_path):
    episodes = write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert check_source(source, SPEC) == []
    assert source.lengths.tolist() == list(LENGTHS) and source.extras == {"grounding": (2, 2, 4, 4)}
    for number, e in enumerate(episodes):
        np.testing.assert_array_equal(source.states(number), e.states)
        np.testing.assert_array_equal(source.actions(number), e.actions)
        np.testing.assert_array_equal(source.extra("grounding", number), e.extras["grounding"])
        assert instruction(source, number) == e.instructions and source.episode_info(number) == {"seed": number}
        for camera in SPEC.cameras:
            frames = source.frames(number, range(len(e)), camera)
            assert frames.dtype == np.uint8 and np.abs(frames.astype(int) - e.images[camera]).mean() < 4
    written = load_statistics(tmp_path / "set/meta/dataset_statistics.json")["set"]
    assert written.to_dict() == source_statistics(source, SPEC.normalize_mask).to_dict()


def test_frames_come_in_the_order_asked_for(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    for order in ([13, 0, 7, 7, 12], range(13, -1, -1)):
        assert [bar_width(f) for f in source.frames(2, order, "front")] == [2 * step + 2 for step in order]
    assert source.frames(0, [], "front").shape == (0, 32, 32, 3)


def test_large_recordings_are_split_into_files_without_splitting_an_episode(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_oft.data.lerobot_writer.MEGABYTE", 4096)
    episodes = write(tmp_path / "set", (20, 20, 20, 20), data_files_size_in_mb=2, video_files_size_in_mb=1, chunks_size=2)
    names = {str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("file-*")}
    assert "data/chunk-000/file-001.parquet" in names and "videos/observation.images.front/chunk-000/file-001.mp4" in names
    source = open_source(tmp_path / "set")
    assert check_source(source, SPEC) == []
    for number, e in enumerate(episodes):
        np.testing.assert_array_equal(source.actions(number), e.actions)
        assert bar_width(source.frames(number, [5], "front")[0]) == 12
        assert abs(int(source.frames(number, [5], "front")[0, 0, -1, 0]) - (40 * number + 20)) < 8


def test_one_instruction_per_step_is_kept(tmp_path):
    steps = dataclasses.replace(episode(0, 4), instructions=["a", "b", "a", "c"])
    with LeRobotWriter(tmp_path / "set", SPEC) as writer:
        writer.append_episode(steps)
    source = open_source(tmp_path / "set")
    assert [instruction(source, 0, t) for t in range(4)] == ["a", "b", "a", "c"]


def test_cameras_can_be_renamed_and_left_out(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set", {"main": "front"})
    assert source.cameras == ("main",) and bar_width(source.frames(0, [3], "main")[0]) == 8
    with pytest.raises(ValueError, match="no camera top; it has front, wrist"):
        open_source(tmp_path / "set", {"main": "top"})
    assert source.fingerprint() != open_source(tmp_path / "set").fingerprint()


def test_the_fingerprint_follows_the_contents_not_the_place(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", (11, 5))
    prints = [open_source(tmp_path / name).fingerprint() for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_source_survives_pickling(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    source.actions(0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.actions(2), source.actions(2))


def test_video_is_read_after_a_fork(tmp_path):
    clip = encode_clip(episode(0, 12).images["front"], 10.0)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip.data)
    assert num_frames(path, 10.0) == 12
    read_frames(path, [3], 10.0)
    child = os.fork()
    if not child:
        os._exit(0 if [bar_width(f) for f in read_frames(path, [9, 1], 10.0)] == [20, 4] else 1)
    widths = [bar_width(f) for f in read_frames(path, [4, 11], 10.0)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and widths == [10, 24]


def test_a_dataset_of_another_robot_is_refused(tmp_path):
    write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    for change, message in (
        ({"cameras": ("front", "left")}, "no camera left that robot 'pair' needs; it has front, wrist"),
        ({"state_dim": 4}, "3 state dimensions, robot 'pair' has 4"),
        ({"action_dim": 1, "absolute_mask": (False,), "normalize_mask": (True,), "action_limits": ((0, 1),)}, "2 action dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            check_source(source, dataclasses.replace(SPEC, **change))
    slow = dataclasses.replace(SPEC, control_hz=20.0)
    assert check_source(source, slow) == ["recorded at 10 frames per second, but robot 'pair' runs at 20 Hz"]


def test_a_new_helper_module_is_not_a_format_and_a_new_format_is_found(tmp_path, monkeypatch):
    assert "lerobot" in formats()
    (tmp_path / "a_helper_of_formats.py").write_text("")
    (tmp_path / "a_new_format.py").write_text("def detect(path): return False\ndef open_source(path, cameras): ...\n")
    before = set(formats())
    monkeypatch.setattr(vla_oft.data, "__path__", [*vla_oft.data.__path__, str(tmp_path)])
    assert set(formats()) - before == {"a_new_format"}


def test_what_is_not_a_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="not a dataset in a known format"):
        open_source(tmp_path)
    write(tmp_path / "set")
    info = tmp_path / "set/meta/info.json"
    info.write_text(info.read_text().replace('"v3.0"', '"v2.1"'))
    with pytest.raises(ValueError, match=r"is LeRobot v2\.1; convert it"):
        open_source(tmp_path / "set")
    info.write_text("{")
    with pytest.raises(ValueError, match=r"info.json: cannot read"):
        open_source(tmp_path / "set")


def test_an_empty_dataset_is_refused(tmp_path):
    write(tmp_path / "set")
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match="is empty"):
        open_source(tmp_path / "set")


def test_tasks_of_lerobots_converter_have_an_unnamed_index(tmp_path):
    write(tmp_path / "set")
    file = tmp_path / "set/meta/tasks.parquet"
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
        {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]
    table = pq.read_table(file).rename_columns(["task_index", "__index_level_0__"])
    pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.3"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), file)
    assert open_source(tmp_path / "set").tasks == ("first task", "second task")


def test_tasks_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "set")
    file = tmp_path / "set/meta/tasks.parquet"
    table = pq.read_table(file).replace_schema_metadata(None)
    pq.write_table(table.rename_columns(["task_index", "label"]), file)
    with pytest.raises(ValueError, match=r"tasks.parquet: needs the columns 'task' .* found \['task_index', 'label'\]"):
        open_source(tmp_path / "set")
    pq.write_table(table.set_column(0, "task_index", pa.array([0, 5])), file)
    with pytest.raises(ValueError, match=r"tasks.parquet: column 'task' must hold one text for each task_index 0..1"):
        open_source(tmp_path / "set")


VIDEO, DATA = "videos/observation.images.wrist/chunk-000/file-000.mp4", "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (VIDEO, "remove", "file-000.mp4: the video is missing; copy the dataset again"),
        (VIDEO, "cut", "file-000.mp4: not a readable video"),
        (DATA, "remove", "file-000.parquet: the file is missing"),
        (DATA, "cut", "file-000.parquet: not a readable parquet file"),
        (DATA, "shorten", "file-000.parquet has 25 rows, episodes 0..2 need 30"),
        ("meta/tasks.parquet", "remove", "tasks.parquet: the file is missing"),
    ],
)
def test_damage_is_found_before_training_and_named(tmp_path, file, damage, message):
    write(tmp_path / "set")
    path = tmp_path / "set" / file
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        pq.write_table(pq.read_table(path).slice(0, 25), path)
    with pytest.raises(ValueError, match=message):
        check_source(open_source(tmp_path / "set"), SPEC)


def test_a_video_that_is_too_short_is_found(tmp_path):
    write(tmp_path / "set")
    (tmp_path / "set" / VIDEO).write_bytes(encode_clip(episode(0, 20).images["wrist"], 10.0).data)
    with pytest.raises(ValueError, match=r"episode 2: .*20 frames, 30 needed"):
        check_source(open_source(tmp_path / "set"), SPEC)


def test_a_nan_in_a_dataset_is_named(tmp_path):
    write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / DATA)
    values = np.concatenate([episode(n, length).actions for n, length in enumerate(LENGTHS)])
    values[13, 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), tmp_path / "set" / DATA)
    with pytest.raises(ValueError, match="action is not finite in episode 1, step 2, dimension 1"):
        check_source(open_source(tmp_path / "set"), SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros((6, 3), np.float32)}, r"actions must be \(T, 2\)"),
        ({"states": np.zeros((6, 2), np.float32)}, r"states must be \(6, 3\)"),
        ({"states": np.full((6, 3), np.nan, np.float32)}, "state is not finite in step 0, dimension 0"),
        ({"instructions": ["one"]}, "'instructions': 1"),
        ({"extras": {"grounding": np.zeros((5, 1), np.uint8)}}, "'grounding': 5"),
        ({"images": {"front": np.zeros((6, 8, 8, 3), np.uint8)}}, r"has cameras \['front', 'wrist'\]"),
        ({"images": {c: np.zeros((5, 8, 8, 3), np.uint8) for c in ("front", "wrist")}}, "'front': 5"),
    ],
)
def test_a_broken_episode_is_not_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message), LeRobotWriter(tmp_path / "set", SPEC) as writer:
        writer.append(encode([dataclasses.replace(episode(0, 6), **change)], 10.0))
    assert list(tmp_path.iterdir()) == []


def test_images_of_two_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one size and one encoding, got 16 x 16"), LeRobotWriter(tmp_path / "set", SPEC) as writer:
        writer.append_episode(episode(0, 6))
        writer.append_episode(episode(1, 6, size=16))
