"""LeRobot: lerobot's own files of every version, and v3.0 as we write and read it: a round trip, and damaged datasets."""

import dataclasses
import json
import pickle
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demonstrations import LENGTHS, SPEC, bar_width, episode, write

from vla_oft.data import formats
from vla_oft.data.base import ReadOptions, instruction, open_source
from vla_oft.data.check import check_source, source_statistics
from vla_oft.data.clips import encode_clip
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Episode, Schema, encode
from vla_oft.statistics import load_statistics

TASKS = ("pick up the black bowl and place it on the plate", "open the middle drawer of the cabinet")
JOINTS, AXES = ("x", "y", "z", "ax", "ay", "az", "g1", "g2"), ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "tolerance", "widening", "names"),
    [
        ("lerobot_v3_sample", 18, 5, (JOINTS, AXES)),
        ("lerobot_v3_images_sample", 0, 5, (JOINTS, AXES)),
        ("lerobot_v21_sample", 18, 5, (JOINTS, AXES)),
        ("lerobot_v21_openpi_sample", 0, 3, ((), ())),
    ],
)
def test_lerobots_own_datasets_are_read(shared, name, tolerance, widening, names):
    source = open_source(shared / "formats" / name)
    assert list(source.damaged()) == [] and source.format == "lerobot" and source.recording == {} and source.skipped == ()
    assert source.lengths.tolist() == [12, 9, 15] and source.fps == 10 and source.tasks == TASKS and source.kind == "demonstrations"
    assert source.cameras == ("image", "wrist_image") and (source.state_dim, source.action_dim) == (8, 7)
    assert (source.state_names, source.action_names) == names and source.extras == {}
    for e in range(3):
        steps = np.arange(source.lengths[e])
        np.testing.assert_allclose(source.states(e), np.arange(8) * 0.1 + e + 0.01 * steps[:, None], atol=1e-6)
        np.testing.assert_array_equal(source.actions(e)[:, 6], np.where(steps % 2, 1, -1))
        assert instruction(source, e) == TASKS[e % 2] and source.actions(e).dtype == np.float32
        image, wrist = source.frames(e, steps, "image").astype(int), source.frames(e, steps[::-1], "wrist_image")[::-1].astype(int)
        assert np.abs(image[..., 0] - (40 * e + 20)).max() <= tolerance
        assert np.abs(image[..., 0] + wrist[..., 0] - 255).mean() <= tolerance / 4
        for step in steps:
            width = 4 + widening * step
            assert abs(bar_width(image[step]) - width) <= (3 if tolerance else 0)
            if not tolerance:
                np.testing.assert_array_equal(wrist[step], 255 - image[step])
                assert (image[step, :, :width, 2] == 200).all() and not (image[step, :, width:, 2] == 200).any()


@pytest.mark.shared
def test_quantiles_are_recomputed_not_believed(shared):
    source = open_source(shared / "formats" / "lerobot_v3_sample")
    state = source_statistics(source, [True] * 7).state
    assert state is not None
    np.testing.assert_allclose((state.q01[0], state.q99[0]), (0.0035, 2.1365), atol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("images", [False, True])
def test_our_files_have_the_columns_and_types_of_lerobots(shared, tmp_path, images):
    write(tmp_path / "ours", images=images)
    theirs = shared / "formats" / ("lerobot_v3_images_sample" if images else "lerobot_v3_sample")
    for file in ("meta/tasks.parquet", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        expected, got = pq.read_schema(theirs / file), pq.read_schema(tmp_path / "ours" / file)
        for name in expected.names:
            ours = name.replace("wrist_image", "wrist").replace("images.image", "images.front")
            found, wanted = got.field(ours).type, expected.field(name).type
            assert found == wanted or pa.types.is_fixed_size_list(wanted), name
    assert b"index_columns" in pq.read_schema(tmp_path / "ours/meta/tasks.parquet").metadata[b"pandas"]
    expected, got = (json.loads((root / "meta/info.json").read_text()) for root in (theirs, tmp_path / "ours"))
    assert set(got) == set(expected) and (got["video_path"] is None) == images
    features = [
        json.loads(pq.read_schema(root / "data/chunk-000/file-000.parquet").metadata[b"huggingface"])["info"]["features"]
        for root in (theirs, tmp_path / "ours")
    ]
    assert (
        features[0].get("observation.images.image")
        == features[1].get("observation.images.front")
        == ({"_type": "Image"} if images else None)
    )
    stats = json.loads((tmp_path / "ours/meta/stats.json").read_text())
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1) and stats["action"]["count"] == [sum(LENGTHS)]


def test_a_round_trip_keeps_every_number(tmp_path):
    episodes = write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert list(source.damaged()) == []
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
    monkeypatch.setattr("vla_oft.data.lerobot_files.MEGABYTE", 4096)
    episodes = write(tmp_path / "set", (20, 20, 20, 20), data_files_size_in_mb=2, video_files_size_in_mb=1, chunks_size=2)
    names = {str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("file-*")}
    assert "data/chunk-000/file-001.parquet" in names and "videos/observation.images.front/chunk-000/file-001.mp4" in names
    source = open_source(tmp_path / "set")
    assert list(source.damaged()) == []
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
    source = open_source(tmp_path / "set", ReadOptions(cameras=(("main", "front"),)))
    assert source.cameras == ("main",) and bar_width(source.frames(0, [3], "main")[0]) == 8
    with pytest.raises(ValueError, match="no camera top; it has front, wrist"):
        open_source(tmp_path / "set", ReadOptions(cameras=(("main", "top"),)))
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


def test_what_is_not_a_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="not a dataset in a known format"):
        open_source(tmp_path)
    write(tmp_path / "set")
    info = tmp_path / "set/meta/info.json"
    info.write_text(info.read_text().replace('"v3.0"', '"v1.6"'))
    with pytest.raises(ValueError, match=r"is LeRobot v1\.6; v2\.0, v2\.1 and v3\.0 are read: convert it"):
        open_source(tmp_path / "set")
    info.write_text("{")
    with pytest.raises(ValueError, match=r"info.json: cannot read"):
        open_source(tmp_path / "set")
    (tmp_path / "old/meta_data").mkdir(parents=True)
    (tmp_path / "old/meta_data/info.json").write_text("{}")
    with pytest.raises(ValueError, match="is LeRobot v1 .*; convert it"):
        open_source(tmp_path / "old")


def test_an_empty_dataset_is_refused(tmp_path):
    write(tmp_path / "set")
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match="total_episodes=3, but meta/ lists 0 episodes"):
        open_source(tmp_path / "set")
    change(tmp_path / "set", total_episodes=0)
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
    assert open_source(tmp_path / "set").tasks == ("first task", "second task")
    with pytest.raises(ValueError, match=r"file-000.parquet, episode 1: task_index 1 is not in the table of tasks"):
        open_source(tmp_path / "set").task_indices(1)
    pq.write_table(table.set_column(0, "task_index", pa.array([1, 1])), file)
    with pytest.raises(ValueError, match=r"tasks.parquet: every task needs its own number and a text"):
        open_source(tmp_path / "set")


def change(root: Path, **values) -> None:
    """Change entries of info.json."""
    info = root / "meta/info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), **values}))


VIDEO, DATA = "videos/observation.images.wrist/chunk-000/file-000.mp4", "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (VIDEO, "remove", "file-000.mp4, episode 0: the video is missing; copy the dataset again"),
        (VIDEO, "cut", "file-000.mp4, episode 0: not a readable video"),
        (DATA, "remove", "file-000.parquet, episode 0: the file is missing"),
        (DATA, "cut", "file-000.parquet, episode 0: not a readable parquet file"),
        (DATA, "shorten", "file-000.parquet, episode 0: 25 rows, meta/ lists 30"),
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
    with pytest.raises(ValueError, match=r"file-000.mp4, episode 2: 20 frames, 30 needed"):
        check_source(open_source(tmp_path / "set"), SPEC)


def test_a_nan_in_a_dataset_is_named(tmp_path):
    write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / DATA)
    values = np.concatenate([episode(n, length).actions for n, length in enumerate(LENGTHS)])
    values[13, 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), tmp_path / "set" / DATA)
    with pytest.raises(ValueError, match="episode 1: action is not finite in step 2, dimension 1; leave the episode out"):
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
    with (
        pytest.raises(ValueError, match="images of one camera must have one size: 'front' is 32 x 32, got 16 x 16"),
        LeRobotWriter(tmp_path / "set", SPEC) as writer,
    ):
        writer.append_episode(episode(0, 6))
        writer.append_episode(episode(1, 6, size=16))


@pytest.mark.parametrize("size", [32, 33])
def test_images_are_stored_without_loss_and_of_any_size(tmp_path, size):
    episodes = [episode(number, length, size) for number, length in enumerate(LENGTHS)]
    with LeRobotWriter(tmp_path / "set", SPEC, images=True) as writer:
        for e in episodes[:1]:
            writer.append_episode(e)
        writer.append(encode(episodes[1:], 10.0, images=True))
    source = open_source(tmp_path / "set")
    assert list(source.damaged()) == [] and not (tmp_path / "set/videos").exists()
    for number, e in enumerate(episodes):
        order = np.random.default_rng(0).permutation(len(e))
        for camera in SPEC.cameras:
            np.testing.assert_array_equal(source.frames(number, order, camera), e.images[camera][order])
    assert source.frames(0, [], "front").shape == (0, size, size, 3)


def test_a_picture_is_read_with_few_others(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_oft.data.lerobot_files.GROUP_BYTES", 2048)
    noise = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3)).astype(np.uint8)
    e = dataclasses.replace(episode(0, 40), images={"front": noise, "wrist": noise})
    with LeRobotWriter(tmp_path / "set", SPEC, images=True) as writer:
        writer.append_episode(e)
    groups = pq.ParquetFile(tmp_path / "set" / DATA).metadata
    assert max(groups.row_group(g).num_rows for g in range(groups.num_row_groups)) <= 2
    np.testing.assert_array_equal(open_source(tmp_path / "set").frames(0, [39, 0, 17], "front"), noise[[39, 0, 17]])


def test_a_block_must_be_encoded_as_the_writer_stores_it(tmp_path):
    message = "is written with images=True: give `encode` the same"
    with pytest.raises(ValueError, match=message), LeRobotWriter(tmp_path / "set", SPEC, images=True) as writer:
        writer.append(encode([episode(0, 6)], 10.0))
    assert list(tmp_path.iterdir()) == []


def test_any_dataset_can_be_written_without_a_robot(tmp_path):
    schema = Schema(cameras=(), state_dim=2, action_dim=3, state_names=("a", "b"), action_names=("x", "y", "z"), robot_type="arm")
    numbers = np.random.default_rng(0).normal(size=(9, 5))
    e = Episode(images={}, states=numbers[:, :2], actions=numbers[:, 2:], instructions="do it")
    with LeRobotWriter(tmp_path / "set", schema, fps=12.5) as writer:
        writer.append_episode(e)
    source = open_source(tmp_path / "set")
    assert source.fps == 12.5 and (source.state_names, source.action_names) == (("a", "b"), ("x", "y", "z"))
    assert source.states(0).dtype == source.actions(0).dtype == np.float64
    np.testing.assert_array_equal(np.concatenate([source.states(0), source.actions(0)], axis=1), numbers)
    assert "robot" not in source.recording and not (tmp_path / "set/meta/dataset_statistics.json").exists()
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "arm"
    with pytest.raises(ValueError, match="fps is needed"):
        LeRobotWriter(tmp_path / "other", schema)
    message = "'action' is float32, in earlier episodes float64"
    with pytest.raises(ValueError, match=message), LeRobotWriter(tmp_path / "other", schema, fps=10) as writer:
        writer.append_episode(e)
        writer.append_episode(dataclasses.replace(e, actions=e.actions.astype(np.float32)))
    with pytest.raises(ValueError, match="state_names has 1 entries for 2 dimensions"):
        dataclasses.replace(schema, state_names=("a",))


def test_one_number_a_step_is_stored_bare_as_lerobot_wants_it(tmp_path):
    schema, rng = Schema(cameras=(), state_dim=1, action_dim=1), np.random.default_rng(0)
    extras = {
        "reward": rng.normal(size=6).astype(np.float32),
        "done": np.arange(6) == 5,
        "count": rng.integers(0, 9, (6, 1)),
        "mask": rng.integers(0, 2, (6, 1, 1)).astype(np.uint8),
        "flags": rng.integers(0, 2, (6, 3)).astype(bool),
    }
    numbers = rng.normal(size=(2, 6, 1))
    e = Episode(images={}, states=numbers[0], actions=numbers[1].astype(np.float32), instructions="do it", extras=extras)
    with LeRobotWriter(tmp_path / "set", schema, fps=10) as writer:
        writer.append_episode(e)
    stored = pq.read_schema(tmp_path / "set" / DATA)
    noted = json.loads(stored.metadata[b"huggingface"])["info"]["features"]
    for name, feature in json.loads((tmp_path / "set/meta/info.json").read_text())["features"].items():
        bare = feature["shape"] == [1]
        assert pa.types.is_nested(stored.field(name).type) != bare and noted[name]["_type"] == ("Value" if bare else "List"), name
    assert pa.types.is_boolean(stored.field("observation.done").type)
    source = open_source(tmp_path / "set")
    assert list(source.damaged()) == [] and source.extras == {name: values.shape[1:] for name, values in extras.items()}
    np.testing.assert_array_equal(source.states(0), e.states)
    np.testing.assert_array_equal(source.actions(0), e.actions)
    for name, values in extras.items():
        found = source.extra(name, 0)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)


def test_options_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "set")
    for options, message in (
        (ReadOptions(fps=20), "says fps=10, the options fps=20; leave it out"),
        (ReadOptions(colour_order="bgr"), "colour_order='bgr' is for formats that leave the order open; .* always RGB"),
        (ReadOptions(split="test"), "no split 'test'; choose one of train"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "set", options)
    source = open_source(tmp_path / "set", ReadOptions(fps=10, instruction="tidy up"))
    assert source.tasks == ("tidy up",) and instruction(source, 1, 3) == "tidy up"
    assert source.fingerprint() != open_source(tmp_path / "set").fingerprint()


def test_a_split_is_a_range_of_episodes(tmp_path):
    episodes = write(tmp_path / "set", (11, 5, 14, 4))
    change(tmp_path / "set", splits={"train": "0:2", "test": "2:4"})
    train, test = open_source(tmp_path / "set"), open_source(tmp_path / "set", ReadOptions(split="test"))
    assert train.lengths.tolist() == [11, 5] and test.lengths.tolist() == [14, 4] and train.fingerprint() != test.fingerprint()
    np.testing.assert_array_equal(test.actions(1), episodes[3].actions)
    assert bar_width(test.frames(0, [5], "front")[0]) == 12 and test.episode_info(0) == {"seed": 2}
    assert list(test.damaged()) == []
    for splits, message in (
        ({"train": "0-2"}, "split 'train' is '0-2', not a range"),
        ({"a": "0:1", "b": "1:2"}, "no split 'train'; .* a, b"),
    ):
        change(tmp_path / "set", splits=splits)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "set")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_path": "data/{chunk}/file.parquet"}, r"data_path has the placeholder '\{chunk\}'; known in v3: chunk_index, file_index"),
        ({"data_path": "data/{chunk_index.__class__}"}, "has the placeholder"),
        ({"data_path": "data/{chunk_index:0999999999d}"}, "has the placeholder"),
        ({"data_path": "data/{chunk_index"}, "is no path template"),
        ({"data_path": "../../etc/passwd"}, "leads out of the dataset; refused"),
        ({"data_path": "/etc/{file_index}"}, "leads out of the dataset; refused"),
        ({"video_path": "videos/{video_key}/../../../x"}, "leads out of the dataset; refused"),
        ({"video_path": None}, "video_path=None must be the path of a file"),
        ({"fps": "ten"}, "fps='ten' must be a positive number"),
        ({"fps": 0}, "fps=0 must be a positive number"),
        ({"features": []}, "'features' is missing"),
        ({"features": {"action": {"dtype": "float32"}}}, "feature 'action' needs a dtype and a shape"),
        ({"features": {"observation.state": {"dtype": "float32", "shape": [2]}}}, "no feature action or actions"),
        ({"total_episodes": "3"}, "total_episodes='3' must be a number"),
    ],
)
def test_impossible_metadata_is_refused_when_opened(tmp_path, values, message):
    write(tmp_path / "set")
    change(tmp_path / "set", **values)
    with pytest.raises(ValueError, match=message) as error:
        open_source(tmp_path / "set")
    assert "info.json" in str(error.value) and "\n" not in str(error.value)


def test_a_camera_cannot_lead_out_of_the_dataset(tmp_path):
    write(tmp_path / "set")
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    info["features"]["../../../etc"] = info["features"].pop("observation.images.front")
    change(tmp_path / "set", **info)
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.rename_columns([name.replace("observation.images.front", "../../../etc") for name in table.column_names]), file)
    source = open_source(tmp_path / "set")
    with pytest.raises(ValueError, match="leads out of the dataset; refused"):
        source.frames(0, [0], source.cameras[-1])


def test_an_empty_episode_is_named_or_left_out(tmp_path):
    episodes = write(tmp_path / "set")
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    more = pa.concat_tables([table.slice(0, 1), table.slice(0, 1), table.slice(1)])
    for name, values in {"length": [11, 0, 5, 14], "episode_index": [0, 7, 1, 2]}.items():
        more = more.set_column(more.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(more, file)
    change(tmp_path / "set", total_episodes=4, splits={"train": "0:8"})
    with pytest.raises(ValueError, match="meta, episode 7: it has no steps"):
        open_source(tmp_path / "set")
    source = open_source(tmp_path / "set", ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [11, 5, 14] and len(source.skipped) == 1
    np.testing.assert_array_equal(source.actions(2), episodes[2].actions)


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_oft.data.lerobot_files.MEGABYTE", 512)
    episodes = write(tmp_path / "set", data_files_size_in_mb=1)
    files = sorted((tmp_path / "set/data").rglob("*.parquet"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-300])
    source = open_source(tmp_path / "set")
    assert [number for number, _ in source.damaged()] == [1]
    source = open_source(tmp_path / "set", ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [11, 14] and list(source.damaged()) == []
    assert len(source.skipped) == 1 and source.skipped[0].startswith(f"{files[1]}, episode 1: not a readable parquet file")
    np.testing.assert_array_equal(source.actions(1), episodes[2].actions)
    assert bar_width(source.frames(1, [5], "front")[0]) == 12


def test_a_wrong_frame_rate_is_named_with_both_rates(tmp_path):
    write(tmp_path / "set")
    change(tmp_path / "set", fps=30)
    with pytest.raises(ValueError, match=r"file-000.mp4, episode 1: recorded at 10 frames a second, but meta/info.json says 30"):
        open_source(tmp_path / "set").frames(1, [0], "front")


def test_frames_of_another_episode_are_not_taken_for_this_one(tmp_path):
    write(tmp_path / "set")
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index("length"), "length", pa.array([10, 6, 14])), file)
    with pytest.raises(ValueError, match="file-000.parquet, episode 1: frames of episode 0 lie where meta/ says that this one lies"):
        open_source(tmp_path / "set").actions(1)


def test_actions_of_another_size_are_named(tmp_path):
    write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / DATA)
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(90, np.float32)), 3)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), tmp_path / "set" / DATA)
    with pytest.raises(ValueError, match="file-000.parquet, episode 0: 'action' has 3 numbers a step, meta/info.json says 2"):
        open_source(tmp_path / "set").actions(0)
    ragged = pa.array([[0.0] * (2 + row % 2) for row in range(30)], pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", ragged), tmp_path / "set" / DATA)
    with pytest.raises(ValueError, match="file-000.parquet, episode 0: 'action' has missing values or rows of different sizes"):
        open_source(tmp_path / "set").actions(0)


def test_rows_are_found_in_whatever_groups_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_oft.data.parquet.BLOCK_ROWS", 8)
    episodes = write(tmp_path / "set")
    table = pq.read_table(tmp_path / "set" / DATA)
    for rows in (1, 3, 7, 30):
        pq.write_table(table, tmp_path / "set" / DATA, row_group_size=rows)
        source = open_source(tmp_path / "set")
        for number in (2, 0, 1):
            np.testing.assert_array_equal(source.actions(number), episodes[number].actions)


def test_what_is_returned_may_be_changed(tmp_path):
    episodes = write(tmp_path / "set")
    source = open_source(tmp_path / "set")
    for values in (source.actions(0), source.states(0), source.extra("grounding", 0), source.frames(0, [1], "front")):
        values[:] = 1
    np.testing.assert_array_equal(source.actions(0), episodes[0].actions)
    np.testing.assert_array_equal(source.extra("grounding", 0), episodes[0].extras["grounding"])


def test_memory_is_bounded_by_its_budget():
    from vla_oft.data.recent import Recent

    store, made = Recent(100), []
    for key in (1, 2, 1, 3, 4, 1, 2):
        assert store.get(key, lambda key=key: (made.append(key) or key, 40)) == key
    assert made == [1, 2, 3, 4, 1, 2] and store.total <= 100
    assert store.get("large", lambda: ("x", 1000)) == "x" and store.total == 1000
    store.get("small", lambda: ("y", 1))
    assert store.total == 1


def test_a_format_module_is_cheap_to_ask(tmp_path):
    assert isinstance(formats.load_all()["lerobot"], types.ModuleType)
    source = Path(formats.load_all()["lerobot"].__file__).read_text()
    assert "import pyarrow" not in source and "import av" not in source
