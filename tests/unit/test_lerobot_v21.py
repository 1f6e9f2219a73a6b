"""LeRobot v2.0 and v2.1: one data file, and one video file a camera, for each episode; features as other recorders name them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_oft.data.base import ReadOptions, instruction, open_source
from vla_oft.data.clips import encode_clip

DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
LENGTHS = (6, 4, 9)
CAMERA = {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channel"]}


def picture(episode: int, step: int) -> np.ndarray:
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0], image[:, : 3 * step + 2] = 40 * episode + 20, 200
    return image


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def lists(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist(), pa.list_(pa.from_numpy_dtype(values.dtype)))


def write(
    root: Path,
    *,
    version: str = "v2.1",
    state: str | None = "observation.state",
    action: str = "action",
    video=(),
    images=(),
    features=None,
    columns=None,
    chunks_size: int = 2,
    data_path: str = DATA,
    video_path: str = VIDEO,
    dtype=np.float32,
) -> Path:
    """A dataset as lerobot's old recorder leaves it. images: camera -> how a picture is stored, given (bytes, episode, step)."""
    (root / "meta").mkdir(parents=True)
    number = {"dtype": "int64", "shape": [1], "names": None}
    described = dict.fromkeys(video, CAMERA) | {name: {**CAMERA, "dtype": "image"} for name in images}
    described |= {state: {"dtype": np.dtype(dtype).name, "shape": [3], "names": ["a", "b", "c"]}} if state else {}
    described |= {action: {"dtype": np.dtype(dtype).name, "shape": [2], "names": {"motors": ["left", "right"]}}}
    described |= {"episode_index": number, "task_index": number, **(features or {})}
    for e, length in enumerate(LENGTHS):
        steps = np.arange(length)
        table = {action: lists(np.stack([steps + 0.1, 10 * e + steps], 1).astype(dtype)), "episode_index": np.full(length, e)}
        table |= {state: lists(np.stack([steps, steps + e, -steps], 1).astype(dtype))} if state else {}
        table |= {"task_index": np.full(length, 5 if e == 1 else 0), **{name: make(e, length) for name, make in (columns or {}).items()}}
        for name, store in dict(images).items():
            table[name] = pa.array([store(png(picture(e, t)), e, t) for t in steps])
        place = {"episode_chunk": e // chunks_size, "episode_index": e}
        for name in video:
            path = root / video_path.format(video_key=name, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_clip([picture(e, t) for t in steps], 10.0).data)
        path = root / data_path.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    info = {"codebase_version": version, "fps": 10, "features": described, "total_episodes": 3, "chunks_size": chunks_size}
    info |= {"data_path": data_path, "video_path": video_path if video else None, "splits": {"train": "0:3"}}
    (root / "meta/info.json").write_text(json.dumps(info))
    episodes = [{"episode_index": e, "tasks": ["x"], "length": length} for e, length in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    tasks = [{"task_index": 5, "task": "open it"}, {"task_index": 0, "task": "close it"}]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    return root


def inline(data: bytes, episode: int, step: int) -> dict:
    return {"bytes": data, "path": f"frame_{step:06d}.png"}


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
@pytest.mark.parametrize("names", [(DATA, VIDEO), ("d/{episode_index}.parquet", "v/{episode_chunk}/{video_key}-{episode_index:02d}.mp4")])
def test_every_episode_has_its_own_files_wherever_the_templates_say(tmp_path, version, names):
    video = ("observation.images.top", "observation.image")
    source = open_source(write(tmp_path / "set", version=version, video=video, data_path=names[0], video_path=names[1]))
    assert list(source.damaged()) == [] and source.cameras == ("top", "image") and source.lengths.tolist() == list(LENGTHS)
    assert source.tasks == ("close it", "open it") and instruction(source, 1, 3) == "open it" and instruction(source, 2) == "close it"
    assert source.state_names == ("a", "b", "c") and source.action_names == ("left", "right") and source.episode_info(0) == {}
    for e, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(source.actions(e)[:, 1], 10 * e + np.arange(length))
        for camera in source.cameras:
            for step in (length - 1, 0):
                found = source.frames(e, [step], camera)[0].astype(int)
                assert np.abs(found - picture(e, step)).mean() < 12 and abs((found[..., 1] > 100).sum() / 32 - (3 * step + 2)) < 1.1


def test_openpis_names_and_pictures_in_the_data_files(tmp_path):
    root = write(tmp_path / "set", state="state", action="actions", images={"image": inline, "wrist_image": inline}, dtype=np.float64)
    source = open_source(root)
    assert source.cameras == ("image", "wrist_image") and list(source.damaged()) == []
    assert source.actions(1).dtype == source.states(1).dtype == np.float64 and source.actions(1)[2, 0] == 2.1
    for e, length in enumerate(LENGTHS):
        order = np.arange(length)[::-1]
        np.testing.assert_array_equal(source.frames(e, order, "image"), np.stack([picture(e, t) for t in order]))
    renamed = open_source(root, ReadOptions(cameras=(("front", "image"),)))
    assert renamed.cameras == ("front",) and renamed.frames(0, [1], "front").shape == (1, 32, 32, 3)


def test_pictures_may_lie_beside_the_data_but_not_outside(tmp_path):
    def beside(data: bytes, episode: int, step: int) -> dict:
        path = tmp_path / f"set/images/{episode}/{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"bytes": None, "path": {0: f"images/{episode}/{step}.png", 1: "../../../etc/passwd", 2: f"images/{step + 50}.png"}[episode]}

    source = open_source(write(tmp_path / "set", images={"observation.image": beside}))
    np.testing.assert_array_equal(source.frames(0, [2], "image")[0], picture(0, 2))
    with pytest.raises(ValueError, match=r"episode 1, step 2 of 'observation.image': the path '../../../etc/passwd' leads out"):
        source.frames(1, [2], "image")
    with pytest.raises(ValueError, match=r"episode 2, step 2 of 'observation.image': its image .*52.png cannot be read"):
        source.frames(2, [2], "image")


def test_a_picture_that_is_none_is_named(tmp_path):
    odd = {0: png(picture(0, 0))[:-30], 1: b"", 2: b"GIF89a"}
    store = {"image": lambda data, e, t: {"bytes": odd[e] if t == 3 else data, "path": None}}
    source = open_source(write(tmp_path / "set", images=store))
    for e, message in ((0, "step 3 of 'image': unreadable picture"), (1, "step 3 of 'image': holds no image"), (2, "neither JPEG nor PNG")):
        with pytest.raises(ValueError, match=rf"episode_00000{e}.parquet, episode {e}.*{message}"):
            source.frames(e, [0, 3], "image")


def test_what_is_no_camera_and_what_else_there_is(tmp_path):
    depth = {"dtype": "video", "shape": [32, 32, 1], "names": ["height", "width", "channels"]}
    features = {
        "observation.images.depth": depth,
        "observation.images.range": {**CAMERA, "info": {"video.is_depth_map": True}},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "observation.effort": {"dtype": "float32", "shape": [2], "names": {"axes": {"y": 1, "x": 0}}},
        "language": {"dtype": "string", "shape": [1], "names": None},
        "observation.images.left": {"dtype": "image", "shape": [3, 32, 32], "names": ["channels", "height", "width"]},
    }
    columns = {
        "next.reward": lambda e, n: np.arange(n, dtype=np.float32),
        "observation.effort": lambda e, n: lists(np.full((n, 2), e, np.float32)),
    }
    source = open_source(write(tmp_path / "set", state=None, features=features, columns=columns))
    assert source.cameras == ("left",) and source.extras == {"next.reward": (1,), "effort": (2,)}
    assert source.frames(0, [], "left").shape == (0, 32, 32, 3)
    assert source.state_dim == 0 and source.state_names == () and source.actions(1).shape == (4, 2)
    np.testing.assert_array_equal(source.extra("effort", 2), np.full((9, 2), 2))
    np.testing.assert_array_equal(source.extra("next.reward", 1)[:, 0], np.arange(4))
    with pytest.raises(ValueError, match="has no state"):
        source.states(0)
    with pytest.raises(ValueError, match="no extra 'force'; it has"):
        source.extra("force", 0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"y": 1, "x": 0}, ("x", "y")),
        ([["x"], ["y"]], ("x", "y")),
        ({"arm": {"motors": ["x"]}, "hand": ["y"]}, ("x", "y")),
        (["actions"], ()),
        (None, ()),
        ({"x": "y", "z": ["w", "v"]}, ()),
    ],
)
def test_names_of_dimensions_in_every_spelling(tmp_path, names, expected):
    root = write(tmp_path / "set", features={"action": {"dtype": "float32", "shape": [2], "names": names}})
    assert open_source(root).action_names == expected


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("data/chunk-000/episode_000001.parquet", "remove", "episode_000001.parquet, episode 1: the file is missing"),
        ("data/chunk-000/episode_000001.parquet", "cut", "episode_000001.parquet, episode 1: not a readable parquet file"),
        ("data/chunk-000/episode_000001.parquet", "shorten", "episode_000001.parquet, episode 1: 3 rows, meta/ lists 4"),
        ("videos/chunk-000/observation.images.top/episode_000001.mp4", "remove", "episode_000001.mp4, episode 1: the video is missing"),
        ("videos/chunk-000/observation.images.top/episode_000001.mp4", "cut", "episode_000001.mp4, episode 1: not a readable video"),
        ("videos/chunk-000/observation.images.top/episode_000001.mp4", "shorten", "episode_000001.mp4, episode 1: 2 frames, 4 needed"),
        (
            "videos/chunk-000/observation.images.top/episode_000001.mp4",
            "faster",
            "recorded at 30 frames a second, but meta/info.json says 10",
        ),
    ],
)
def test_one_bad_file_costs_one_episode(tmp_path, file, damage, message):
    root = write(tmp_path / "set", video=("observation.images.top",))
    path = root / file
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "faster":
        path.write_bytes(encode_clip([picture(0, t) for t in range(60)], 30.0).data)
    elif path.suffix == ".mp4":
        path.write_bytes(encode_clip([picture(0, t) for t in range(2)], 10.0).data)
    else:
        pq.write_table(pq.read_table(path).slice(0, 3), path)
    found = list(open_source(root).damaged())
    assert [episode for episode, _ in found] == [1] and message in found[0][1] and "\n" not in found[0][1]
    source = open_source(root, ReadOptions(skip_bad=True))
    assert source.lengths.tolist() == [6, 9] and source.skipped == (found[0][1],)
    np.testing.assert_array_equal(source.actions(1)[:, 1], 20 + np.arange(9))
    assert np.abs(source.frames(1, [2], "top")[0].astype(int) - picture(2, 2)).mean() < 12


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("episodes.jsonl", '{"episode_index": 0, "length": 6}\n{"episode', "episodes.jsonl, line 2: cannot read"),
        ("episodes.jsonl", '{"episode_index": 0}\n', "episodes.jsonl, line 1: needs episode_index, length"),
        ("episodes.jsonl", '{"episode_index": 0, "length": "6"}\n', "episode_index and length must be whole numbers"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 6}\n' * 3, "episodes.jsonl: episode 0 is listed twice"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 6}\n', "total_episodes=3, but meta/ lists 1 episodes; copy the dataset again"),
        ("tasks.jsonl", '{"task_index": 0, "task": 5}', "tasks.jsonl: every task needs its own number and a text"),
        ("tasks.jsonl", "[]", "tasks.jsonl, line 1: holds a list, not an object"),
        ("info.json", "\xff", "info.json: cannot read"),
        ("info.json", "[" * 100_000, "info.json: cannot read"),
        ("tasks.jsonl", None, "tasks.jsonl: the file is missing"),
    ],
)
def test_broken_metadata_is_named(tmp_path, file, text, message):
    path = write(tmp_path / "set") / "meta" / file
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        open_source(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_metadata_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path / "set")

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ValueError, match=r"info\.json: no permission to read it; change its owner or mode"):
        open_source(tmp_path / "set")
