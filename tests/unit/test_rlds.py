"""RLDS datasets: contents, places, roles of features, the index, and what happens to damaged ones."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit import tfds
from vla_oft.data import pictures
from vla_oft.data.base import ReadOptions, instruction, open_source
from vla_oft.data.rlds_index import Index

SHARDS = [[tfds.episode(0, 5), tfds.episode(2, 3)], [tfds.episode(1, 4)]]
LENGTHS = [5, 3, 4]
ORDER = [0, 2, 1]


@pytest.fixture
def version(tmp_path):
    """.../demos/1.0.0, whose shards are called after another name."""
    folder = tmp_path / "data" / "demos" / "1.0.0"
    tfds.write(folder, SHARDS)
    return folder


def rewrite(path: Path, damage) -> None:
    """Change a file's bytes; its time of change moves on even where the clock is coarse."""
    data = bytearray(path.read_bytes())
    stat = path.stat()
    path.write_bytes(damage(data) or data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def shard(version: Path, number: int) -> Path:
    return sorted(version.glob("*.tfrecord*"))[number]


def indices(version: Path) -> list[str]:
    return sorted(path.name for path in (version.parent.parent / ".cache").iterdir() if path.is_dir())


def write_one(tmp_path: Path, *episodes, **kwargs) -> Path:
    folder = tmp_path / "demos" / "1.0.0"
    tfds.write(folder, [list(episodes)], **kwargs)
    return folder


# Contents


def test_everything_that_was_written_is_read(version):
    source = open_source(version)
    assert (source.name, source.format, source.kind, source.fps, source.path) == ("demos", "rlds", "demonstrations", None, version)
    assert (source.state_dim, source.action_dim, source.cameras) == (2, 3, ("image", "wrist_image"))
    assert (source.extras, source.recording, source.skipped) == ({"is_last": ()}, {}, ())
    assert source.lengths.tolist() == LENGTHS and source.lengths.dtype == np.int64 and len(source) == 3
    assert source.tasks == ("task 0", "task 1")
    for episode, (number, steps) in enumerate(zip(ORDER, LENGTHS, strict=True)):
        written = tfds.episode(number, steps)
        np.testing.assert_array_equal(source.states(episode), written["steps/observation/state"])
        np.testing.assert_array_equal(source.actions(episode), written["steps/action"])
        assert source.actions(episode).dtype == source.states(episode).dtype == np.float32
        last = source.extra("is_last", episode)
        np.testing.assert_array_equal(last, written["steps/is_last"])
        assert last.dtype == bool
        assert source.task_indices(episode).tolist() == [number % 2] * steps and source.task_indices(episode).dtype == np.int64
        assert instruction(source, episode) == f"task {number % 2}"
        images = [tfds.image(number, step) for step in range(steps)]
        np.testing.assert_array_equal(source.frames(episode, range(steps), "image"), images)
        np.testing.assert_array_equal(source.frames(episode, [2, 0, 2], "wrist_image"), [255 - images[step] for step in (2, 0, 2)])
    assert source.frames(0, [], "image").shape == (0, 8, 8, 3)
    assert source.episode_info(1) == {"file_path": "/data/2.hdf5", "shard": "inner_name-train.tfrecord-00000-of-00002", "record": 1}
    assert source.episode_info(2)["record"] == 0 and "00001-of" in source.episode_info(2)["shard"]
    assert list(source.damaged()) == []


def test_unknown_steps_cameras_and_arrays_are_refused(version):
    source = open_source(version)
    with pytest.raises(IndexError, match=r"steps 0\.\.4, asked for 5\.\.5"):
        source.frames(0, [5], "image")
    with pytest.raises(ValueError, match="no camera 'front'; it has image, wrist_image"):
        source.frames(0, [0], "front")
    with pytest.raises(ValueError, match=r"no extra 'reward'; it has \['is_last'\]"):
        source.extra("reward", 0)
    with pytest.raises(ValueError, match="no camera top"):
        open_source(version, ReadOptions(cameras=(("front", "top"),)))


def test_options_choose_cameras_fps_and_instruction(version):
    options = ReadOptions(cameras=(("front", "wrist_image"),), fps=20.0, instruction="do as told")
    source = open_source(version, options)
    assert (source.cameras, source.fps, source.tasks) == (("front",), 20.0, ("do as told",))
    np.testing.assert_array_equal(source.frames(0, [1], "front")[0], 255 - tfds.image(0, 1))
    assert source.task_indices(1).tolist() == [0] * 3
    assert source.fingerprint() != open_source(version).fingerprint()


def test_jpeg_pictures_are_tensorflows_to_the_bit(tmp_path):
    simplejpeg = pytest.importorskip("simplejpeg")
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    data = tfds.encode(smooth, "JPEG")
    version = write_one(tmp_path, tfds.episode(0, 2, image=[data, data]))
    expected = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False)
    np.testing.assert_array_equal(open_source(version).frames(0, [1], "image")[0], expected)
    assert np.abs(expected.astype(int) - smooth).max() < 12


def test_instructions_may_change_within_an_episode_and_hold_any_text(tmp_path):
    texts = [b" pick  up ", "öffne die Schublade".encode(), b"", b" pick  up "]
    version = write_one(tmp_path, tfds.episode(0, 4, language_instruction=texts))
    source = open_source(version)
    assert source.tasks == (" pick  up ", "öffne die Schublade", "")
    assert source.task_indices(0).tolist() == [0, 1, 2, 0]


def test_other_layouts_of_features(tmp_path):
    """Language of the whole episode, EEF_state, arrays that are no state, depth and embeddings that are left out, a nested camera."""
    observation = {
        "EEF_state": tfds.tensor("float64", 3),
        "images": tfds.tree({"top": tfds.picture(encoding="")}),
        "depth": tfds.picture(1, "uint16"),
        "joints": tfds.tensor("float32", 2, 2),
        "map": tfds.tensor("float32", 64, 64),
        "natural_language_embedding": tfds.tensor("float32", 512),
    }
    steps = {
        "action": tfds.tensor("float32", 3),
        "reward": tfds.tensor("float32"),
        "count": tfds.tensor("uint8"),
        "joints": tfds.tensor("int32"),
    }
    features = tfds.features_json(observation, steps, {"language_instruction": tfds.TEXT, "success": tfds.tensor("bool")})
    episode = {
        "language_instruction": [b"go"],
        "success": np.array([True]),
        "steps/action": np.zeros((2, 3), "f"),
        "steps/reward": np.array([0.5, 1.5], "f"),
        "steps/count": np.array([7, 200]),
        "steps/joints": np.array([-3, 4]),
        "steps/observation/EEF_state": np.arange(6, dtype="f"),
        "steps/observation/images/top": [tfds.encode(tfds.image(0, step)) for step in range(2)],
        "steps/observation/depth": [b"depth"] * 2,
        "steps/observation/joints": np.arange(8, dtype="f"),
        "steps/observation/map": np.zeros((2, 64, 64), "f"),
        "steps/observation/natural_language_embedding": np.zeros((2, 512), "f"),
    }
    source = open_source(write_one(tmp_path, episode, features=features))
    assert source.cameras == ("images.top",) and source.frames(0, [0, 1], "images.top").shape == (2, 8, 8, 3)
    assert source.extras == {"reward": (), "count": (), "joints": (), "observation/joints": (2, 2)}
    assert source.states(0).tolist() == [[0, 1, 2], [3, 4, 5]] and source.states(0).dtype == np.float32
    assert source.extra("count", 0).tolist() == [7, 200] and source.extra("count", 0).dtype == np.uint8
    assert source.extra("joints", 0).tolist() == [-3, 4] and source.extra("joints", 0).dtype == np.int32
    assert source.extra("observation/joints", 0)[1].tolist() == [[4, 5], [6, 7]]
    assert source.tasks == ("go",) and source.task_indices(0).tolist() == [0, 0]
    assert source.episode_info(0)["success"] is True


def test_without_a_state(tmp_path):
    observation = {"image": tfds.picture()}
    source = open_source(write_one(tmp_path, tfds.episode(0, 2), features=tfds.features_json(observation)))
    assert source.state_dim == 0
    with pytest.raises(ValueError, match="has no state"):
        source.states(0)


def test_without_instructions_one_must_be_given(tmp_path):
    steps = {"action": tfds.tensor("float32", 3)}
    version = write_one(tmp_path, tfds.episode(0, 2, language_instruction=None), features=tfds.features_json(steps=steps))
    with pytest.raises(ValueError, match="has no instructions; give one"):
        open_source(version)
    assert open_source(version, ReadOptions(instruction="go")).tasks == ("go",)


def test_an_action_in_parts_is_refused_by_name(tmp_path):
    steps = {"action": tfds.tree({"world_vector": tfds.tensor("float32", 3), "gripper": tfds.tensor("float32", 1)})}
    version = write_one(tmp_path, tfds.episode(0, 2), features=tfds.features_json(steps=steps))
    with pytest.raises(ValueError, match=r"found steps/action/world_vector, steps/action/gripper.*one action vector"):
        open_source(version)


# Places


def test_the_folder_above_the_version_will_do(version):
    source = open_source(version.parent)
    assert (source.name, source.path, len(source)) == ("demos", version.parent, 3)
    assert source.fingerprint() == open_source(version).fingerprint()
    assert len(indices(version)) == 1


def test_of_two_versions_one_must_be_chosen(version):
    tfds.write(version.parent / "2.0.0", [[tfds.episode(0, 2)]])
    with pytest.raises(ValueError, match=r"versions 1\.0\.0, 2\.0\.0; give the folder of one"):
        open_source(version.parent)
    assert len(open_source(version.parent / "2.0.0")) == 1


def test_splits(tmp_path):
    two = tmp_path / "two" / "1.0.0"
    paths = tfds.write(two, SHARDS, splits=("val", "train"))
    paths[0].write_bytes(b"".join(map(tfds.frame, map(tfds.example, [tfds.episode(3, 6), tfds.episode(4, 7)]))))
    assert open_source(two).lengths.tolist() == LENGTHS
    assert open_source(two, ReadOptions(split="val")).lengths.tolist() == [6, 7, 4]
    with pytest.raises(ValueError, match="no split 'test'; choose one of val, train"):
        open_source(two, ReadOptions(split="test"))
    other = tmp_path / "other" / "1.0.0"
    tfds.write(other, SHARDS, splits=("demos",))
    assert len(open_source(other)) == 3
    without = tmp_path / "without" / "1.0.0"
    tfds.write(without, SHARDS, splits=("val", "test"))
    with pytest.raises(ValueError, match="none called 'train'; choose one of val, test"):
        open_source(without)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dataset_info.json", "{", "dataset_info.json: cannot be read"),
        ("dataset_info.json", "[" * 100_000, "dataset_info.json: cannot be read"),
        ("dataset_info.json", "[1]", "not a JSON object"),
        ("dataset_info.json", "{}", "dataset_info.json: not as TFDS writes it"),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": []}', "format 'array_record'; only tfrecord"),
        ("dataset_info.json", '{"name": "x", "splits": [{"name": "train", "shardLengths": ["x"]}]}', "dataset_info.json: not as TFDS"),
        (
            "dataset_info.json",
            '{"name": "x", "splits": [{"name": "train", "shardLengths": [1], "filepathTemplate": "../{DATASET}"}]}',
            "a shard is called '../x'",
        ),
        ("features.json", '{"featuresDict": 5}', "features.json: not as TFDS writes it"),
        ("features.json", "{}", "no 'steps/action'"),
        ("features.json", None, "features.json: the file is missing; copy the dataset again"),
    ],
)
def test_damaged_descriptions_are_named(version, file, text, message):
    (version / file).unlink() if text is None else (version / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(version)


def test_empty_shards_are_fine_but_not_an_empty_dataset(tmp_path):
    tfds.write(tmp_path / "some" / "1.0.0", [[], [tfds.episode(0, 2)], []])
    source = open_source(tmp_path / "some")
    assert source.lengths.tolist() == [2] and source.frames(0, [1], "image").shape == (1, 8, 8, 3)
    tfds.write(tmp_path / "none" / "1.0.0", [[], []])
    with pytest.raises(ValueError, match="is empty: 0 episodes"):
        open_source(tmp_path / "none")


# Damage


def damaged(version: Path, message: str) -> tuple[str, ...]:
    """Opening raises `message`; with skip_bad the rest opens, and what was skipped comes back."""
    with pytest.raises(ValueError, match=message) as caught:
        open_source(version)
    assert "\n" not in str(caught.value)
    source = open_source(version, ReadOptions(skip_bad=True))
    for episode in range(len(source)):
        source.frames(episode, range(source.lengths[episode]), "image")
    return source.skipped


def test_a_changed_byte_costs_one_episode(version):
    rewrite(shard(version, 0), lambda data: data.__setitem__(500, data[500] ^ 1))
    skipped = damaged(version, r"00000-of-00002: record 0 at byte 0: the checksum of its \d+ bytes is wrong; copy the file again.*skip_bad")
    assert len(skipped) == 1 and str(shard(version, 0)) in skipped[0]
    source = open_source(version, ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [3, 4]
    np.testing.assert_array_equal(source.frames(1, [2], "image")[0], tfds.image(1, 2))


def test_a_truncated_shard_costs_its_last_episodes(version):
    rewrite(shard(version, 0), lambda data: data[:-100])
    assert "record 1" in damaged(version, r"record 1 at byte \d+: it needs \d+ more bytes")[0]
    whole = len(tfds.frame(tfds.example(SHARDS[0][0])))
    rewrite(shard(version, 0), lambda data: data[:whole])  # between two records
    assert "holds 1 records, dataset_info.json lists 2" in damaged(version, "holds 1 records, dataset_info.json lists 2")[0]


def test_a_missing_shard_is_named(version):
    shard(version, 1).unlink()
    skipped = damaged(version, r"00001-of-00002: the shard is missing \(dataset_info.json lists 2\); copy the dataset again")
    assert len(skipped) == 1
    shutil.rmtree(version.parent.parent / ".cache")
    shard(version, 0).unlink()
    with pytest.raises(ValueError, match=r"is empty: 0 episodes.*2 were skipped, the first: .*00000-of-00002"):
        open_source(version, ReadOptions(skip_bad=True))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_description_that_may_not_be_read_is_not_called_damaged(version, monkeypatch, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fix = (
        "no permission to read it; change its owner"
        if isinstance(error, PermissionError)
        else "the file is missing; copy the dataset again"
    )
    with pytest.raises(ValueError, match=rf"\.json: {fix}"):
        open_source(version)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_without_permission_is_named(version):
    shard(version, 1).chmod(0)
    assert "no permission" in damaged(version, "00001-of-00002: no permission to read it")[0]
    shard(version, 1).chmod(0o644)
    assert len(open_source(version)) == 3


BROKEN = {
    "different numbers of steps": {"state": np.zeros((4, 2), "f")},
    "an empty episode": {"image": [], "wrist_image": [], "language_instruction": []}
    | {"state": np.zeros((0, 2), "f"), "action": np.zeros((0, 3), "f"), "is_last": np.zeros(0, bool)},
    "it has no 'steps/action'": {"action": None},
    "it has no 'steps/is_last'": {"is_last": b""},
    "it has no 'steps/language_instruction'": {"language_instruction": None},
    "'steps/action' has 16 values, not a multiple of 3": {"action": np.zeros(16, "f")},
    "'steps/action' holds int64, features.json says float32": {"action": np.zeros(15, int)},
    "'steps/is_last' holds float32, features.json says bool": {"is_last": np.zeros(5, "f")},
    "'steps/observation/state' holds texts": {"state": [b"x"] * 5},
    "'steps/observation/image' holds numbers": {"image": np.zeros(5, int)},
    "4 instructions in 'steps/language_instruction' for 5 steps": {"language_instruction": [b"x"] * 4},
    "'steps/language_instruction' is not UTF-8": {"language_instruction": [b"x"] * 4 + [b"\xff"]},
    "'episode_metadata/file_path' holds something else": {"file_path": [b"a", b"b"]},
    "at byte 36 of its data, a field of 127 bytes, 0 are left": {"image": tfds.field(1, b"\x0a\x7f")},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_episode_is_refused_or_skipped(tmp_path, message):
    version = write_one(tmp_path, tfds.episode(0, 5), tfds.episode(1, 5, **BROKEN[message]), tfds.episode(2, 3))
    skipped = damaged(version, rf"record 1 at byte \d+: .*{message}")
    assert len(skipped) == 1
    source = open_source(version, ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [5, 3] and source.tasks == ("task 0",)
    np.testing.assert_array_equal(source.actions(1), tfds.episode(2, 3)["steps/action"])
    np.testing.assert_array_equal(source.frames(1, [2], "wrist_image")[0], 255 - tfds.image(2, 2))
    assert source.episode_info(1)["record"] == 2


def test_several_problems_are_counted_and_listed(tmp_path):
    version = write_one(tmp_path, tfds.episode(0, 5, action=None), tfds.episode(1, 2), tfds.episode(2, 3, state=None))
    skipped = damaged(version, r"record 0 .*\(and 1 more problems\)")
    assert ["record 0" in skipped[0], "record 2" in skipped[1], len(skipped)] == [True, True, 2]


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path):
    good = tfds.encode(tfds.image(0, 0))
    large = tfds.encode(np.zeros((9, 8, 3), np.uint8))
    version = write_one(tmp_path, tfds.episode(0, 3, image=[good, b"", good[:-30]]), tfds.episode(1, 2, image=[good, large]))
    source = open_source(version)
    assert source.frames(0, [0], "image").shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"00000-of-00001: episode 0, camera 'image', step 1: unreadable picture .*copy the dataset again"):
        source.frames(0, [0, 1], "image")
    with pytest.raises(ValueError, match="episode 1, camera 'image', step 1: a picture of another size"):
        source.frames(1, [0, 1], "image")
    found = dict(source.damaged())
    assert found.keys() == {0} and "step 2" in found[0]


def test_shards_that_change_after_opening_are_noticed(version):
    source = open_source(version)
    source.frames(2, [0], "image")
    rewrite(shard(version, 0), lambda data: data[:200])
    shard(version, 1).unlink()
    fresh = pickle.loads(pickle.dumps(source))
    found = dict(fresh.damaged())
    assert found.keys() == {0, 1, 2}
    assert "shorter than when it was indexed" in found[1] and "cannot be read" in found[2]


# Pictures


def test_pictures_of_other_kinds():
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 204  # one of the colours of Pillow's own palette
    for mode in ("RGB", "RGBA", "P"):
        buffer = io.BytesIO()
        Image.fromarray(red).convert(mode).save(buffer, "PNG")
        np.testing.assert_array_equal(pictures.decode(memoryview(buffer.getvalue()), "x"), red)
    grey = tfds.encode(red[..., 0])
    np.testing.assert_array_equal(pictures.decode(grey, "x"), np.full((4, 6, 3), 204))
    assert pictures.decode(tfds.encode(red[..., 0], "JPEG"), "x").shape == (4, 6, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_pictures_raise_only_valueerror(kind, rng):
    data = tfds.encode(rng.integers(0, 255, (16, 16, 3), np.uint8), kind)
    for length in range(0, len(data) - 40, 7):
        with pytest.raises(ValueError, match=r"where: unreadable picture \(.+\); copy the dataset again"):
            pictures.decode(data[:length], "where")
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            assert pictures.decode(bytes(damaged), "where").dtype == np.uint8
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_small_file_cannot_claim_a_huge_picture():
    png = bytearray(tfds.encode(np.zeros((4, 4, 3), np.uint8)))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="60000 x 60000 pixels, at most"):
        pictures.decode(bytes(png), "x")
    jpeg = tfds.encode(np.zeros((4, 4, 3), np.uint8), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    with pytest.raises(ValueError, match="60000 x 60000 pixels, at most"):
        pictures.decode(jpeg[:at] + (60_000).to_bytes(2, "big") * 2 + jpeg[at + 4 :], "x")
    sixteen = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(sixteen, "PNG")
    with pytest.raises(ValueError, match="16 bits a channel: depth, not colour"):
        pictures.decode(sixteen.getvalue(), "x")


# The index


def count_builds(monkeypatch) -> list[Path]:
    from vla_oft.data import rlds_index

    built: list[Path] = []
    build = rlds_index.build_index
    monkeypatch.setattr(rlds_index, "build_index", lambda folder, *rest: (built.append(folder), build(folder, *rest)))
    return built


def test_the_index_is_built_once_and_again_when_a_file_changes(version, monkeypatch):
    built = count_builds(monkeypatch)
    first = open_source(version).fingerprint()
    assert open_source(version, ReadOptions(fps=5.0, cameras=(("front", "image"),))).lengths.tolist() == LENGTHS
    assert len(built) == 1
    changed = [tfds.episode(1, 4, action=np.ones((4, 3), "f"))]
    rewrite(shard(version, 1), lambda data: b"".join(map(tfds.frame, map(tfds.example, changed))))
    source = open_source(version)
    assert len(built) == 2 and (source.actions(2) == 1).all() and source.fingerprint() != first


def test_other_features_need_another_index(version):
    assert open_source(version).extras == {"is_last": ()}
    steps = {**tfds.STEPS, "is_last": tfds.tensor("int32", 1)}
    rewrite(version / "features.json", lambda data: json.dumps(tfds.features_json({"image": tfds.picture()}, steps)).encode())
    source = open_source(version)
    assert (source.extras, source.state_dim, source.cameras) == ({"is_last": (1,)}, 0, ("image",))
    assert source.extra("is_last", 1).tolist() == [[0], [0], [1]]


def test_the_index_lies_beside_the_dataset_or_where_it_is_told_to(version, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    open_source(version, ReadOptions(cache_dir=tmp_path / "told"))
    assert len(list((tmp_path / "told").glob("rlds*-demos-*"))) == 1 and not (tmp_path / "data" / ".cache").exists()
    open_source(version)
    assert len(indices(version)) == 1 and not (tmp_path / "user").exists()


def test_a_folder_that_is_locked_stays_as_it_is(version, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "data").chmod(0o555)
    try:
        source = open_source(version)
        assert len(list((tmp_path / "user" / "vla-oft").glob("rlds*-demos-*"))) == 1
        (tmp_path / "user" / "vla-oft").chmod(0o555)
        assert open_source(version).fingerprint() == source.fingerprint()  # an index that is there needs no writing
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(ValueError, match=r"needs a cache, but .*locked cannot be written; name a folder with cache_dir"):
            open_source(version, ReadOptions(cache_dir=tmp_path / "locked"))
    finally:
        (tmp_path / "data").chmod(0o755)
        (tmp_path / "user" / "vla-oft").chmod(0o755)


def test_a_copy_elsewhere_has_the_same_fingerprint(version, tmp_path):
    copy = tmp_path / "elsewhere" / "demos" / "1.0.0"
    shutil.copytree(version, copy)
    assert open_source(copy).fingerprint() == open_source(version).fingerprint()


def test_a_failed_build_leaves_nothing_behind(version, monkeypatch):
    monkeypatch.setattr("vla_oft.data.rlds_index.parse_example", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_source(version)
    assert indices(version) == []
    monkeypatch.undo()
    assert len(open_source(version)) == 3


@pytest.mark.parametrize("file", ["index.json", "records.npy", "0.npy", "tasks.npy"])
def test_a_damaged_index_says_what_to_delete(version, file):
    open_source(version)
    folder = version.parent.parent / ".cache" / indices(version)[0]
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"index {folder} is damaged .*delete this folder"):
        open_source(version)
    shutil.rmtree(folder)
    assert len(open_source(version)) == 3


def _open_and_note(version: Path, notes: Path, number: int) -> None:
    from vla_oft.data import rlds_index

    build = rlds_index.build_index

    def noted(folder: Path, *rest) -> None:
        (notes / str(number)).touch()
        build(folder, *rest)

    rlds_index.build_index = noted
    source = open_source(version)
    (notes / f"{number}-{source.fingerprint()}").touch()


def test_of_many_processes_one_builds(version, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_open_and_note, args=(version, notes, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    names = sorted(path.name for path in notes.iterdir())
    assert len([name for name in names if "-" not in name]) == 1
    assert len({name.split("-")[1] for name in names if "-" in name}) == 1 and len(names) == 5


def _sum(source, results) -> None:
    results.put(int(source.frames(0, [1, 2], "image").sum()) + int(source.actions(2).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_sources_travel_to_other_processes(version, method):
    source = open_source(version)
    here = int(source.frames(0, [1, 2], "image").sum()) + int(source.actions(2).sum())  # the files are open now
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=_sum, args=(source, results))
    worker.start()
    assert results.get(timeout=60) == here
    worker.join(60)


def test_many_shards_need_few_open_files(tmp_path):
    tfds.write(tmp_path / "many" / "1.0.0", [[tfds.episode(number % 3, 1)] for number in range(90)])
    source = open_source(tmp_path / "many")
    before = len(os.listdir("/proc/self/fd"))
    for episode in range(90):
        np.testing.assert_array_equal(source.frames(episode, [0], "image")[0], tfds.image(episode % 3, 0))
    assert len(os.listdir("/proc/self/fd")) - before <= 70


def test_an_index_is_small_and_whole(version):
    open_source(version)
    index = Index(version.parent.parent / ".cache" / indices(version)[0])
    assert index.records[:, :3].tolist() == [[0, 0, 5], [0, 1, 3], [1, 0, 4]] and index.starts.tolist() == [0, 5, 8, 12]
    data = shard(version, 1).read_bytes()
    for step, (offset, size) in enumerate(index.rows("steps/observation/image", 2).tolist()):
        assert data[offset : offset + size] == tfds.encode(tfds.image(1, step))


# The sample that TensorFlow Datasets wrote


@pytest.fixture(scope="module")
def sample(shared, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_source(shared / "formats" / "rlds_sample" / "libero_spatial_no_noops", ReadOptions(cache_dir=cache))


@pytest.mark.shared
def test_the_sample_holds_what_it_is_known_to_hold(sample):
    tasks = ("pick up the black bowl and place it on the plate", "open the middle drawer of the cabinet")
    assert (sample.name, sample.tasks, sample.cameras) == ("libero_spatial_no_noops", tasks, ("image", "wrist_image"))
    assert (sample.state_dim, sample.action_dim) == (8, 7)
    assert sample.extras == {"discount": (), "is_first": (), "is_last": (), "is_terminal": (), "joint_state": (7,), "reward": ()}
    assert sample.lengths.tolist() == [12, 15, 9, 7]  # on disk in the order 0, 2, 1, 3
    for episode, number in enumerate([0, 2, 1, 3]):
        steps = np.arange(sample.lengths[episode])
        state = np.arange(8) * 0.1 + number + 0.01 * steps[:, None]
        np.testing.assert_allclose(sample.states(episode), state, atol=1e-6)
        np.testing.assert_allclose(sample.extra("joint_state", episode)[:, 0], -number, atol=1e-6)
        np.testing.assert_array_equal(sample.actions(episode)[:, 6], np.where(steps % 2, 1, -1))
        assert sample.task_indices(episode).tolist() == [number % 2] * len(steps)
        ends = steps == steps[-1]
        np.testing.assert_array_equal(sample.extra("is_first", episode), steps == 0)
        np.testing.assert_array_equal(sample.extra("is_last", episode), ends)
        assert f"_{number}." in sample.episode_info(episode)["file_path"]
    assert list(sample.damaged()) == []


@pytest.mark.shared
def test_the_samples_pictures_are_the_known_ones(sample):
    for episode, number in enumerate([0, 2, 1, 3]):
        steps = range(int(sample.lengths[episode]))
        front, wrist = (sample.frames(episode, steps, camera).astype(int) for camera in sample.cameras)
        assert front.shape == (len(steps), 64, 64, 3)
        for step in steps:
            assert abs(np.median(front[step, ..., 0]) - (40 * number + 20)) <= 3
            edge = 4 + 3 * step
            assert abs(np.median(front[step, :, :edge, 2]) - 200) <= 6 and np.median(front[step, :, edge + 8 :, 2]) <= 40
            assert np.abs(wrist[step] - (255 - front[step])).mean() < 6


@pytest.mark.shared
def test_the_samples_pictures_are_decoded_as_tensorflow_does(sample, shared):
    """The bytes of each picture are found by looking for them in the shard, without the index."""
    simplejpeg = pytest.importorskip("simplejpeg")
    for number, path in enumerate(sorted((shared / "formats" / "rlds_sample").glob("*/1.0.0/*.tfrecord*"))):
        data = path.read_bytes()
        starts = [at for at in range(len(data)) if data[at : at + 4] == b"\xff\xd8\xff\xe0"]
        stored = [data[at : data.index(b"\xff\xd9", at) + 2] for at in starts]
        decoded = sorted(simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=True, fastupsample=False).tobytes() for jpeg in stored)
        episodes = [episode for episode in range(4) if sample.episode_info(episode)["shard"] == path.name]
        frames = [sample.frames(e, range(sample.lengths[e]), camera) for e in episodes for camera in sample.cameras]
        assert decoded == sorted(frame.tobytes() for frame in np.concatenate(frames)) and len(decoded) > 30, number


@pytest.mark.shared
def test_the_sample_is_left_as_it_was(sample, shared):
    assert sample.fingerprint()
    assert {path.name for path in (shared / "formats" / "rlds_sample").iterdir()} == {"libero_spatial_no_noops"}
    assert json.loads((sample.path / "1.0.0" / "dataset_info.json").read_text())["name"] == "libero_spatial"
