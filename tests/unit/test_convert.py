"""Datasets written anew as LeRobot v3.0: what must stay stays, bit for bit, and what cannot be kept is said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.unit.demonstrations import SPEC, bar_width, write
from vla_oft.convert import ConvertConfig, convert, encoding
from vla_oft.convert.compare import compare
from vla_oft.convert.plan import make_plan
from vla_oft.data.base import ReadOptions, Source, open_source
from vla_oft.data.prepare import open_for
from vla_oft.data.select import Filters, select


class Made:
    """A `Source` that makes up its frames: whatever a format could hold. sizes: (height, width) of each episode."""

    format, kind, state_dim, action_dim, name = "made", "demonstrations", 3, 2, "made"
    state_names, action_names, tasks, cameras = ("x", "y", "z"), ("left", "right"), ("do it", "do not"), ("front",)
    path, recording, skipped = Path("/nowhere/made"), {}, ()

    def __init__(self, lengths=(5, 3), sizes=((16, 24),) * 2, *, fps: float | None = 12.5, extras=None, infos=None, bad=(), nan=()):
        self.lengths, self.sizes, self.fps, self.bad, self.nan = np.array(lengths), sizes, fps, bad, nan
        self._extras, self._infos = extras or {}, infos or [{}] * len(lengths)
        self.extras = {name: values.shape[1:] for name, values in self._extras.items()}
        self.largest = 0

    def __len__(self):
        return len(self.lengths)

    def fingerprint(self):
        return "0123"

    def frames(self, episode, indices, camera):
        if episode in self.bad:
            raise ValueError(f"made.bin, episode {episode}: unreadable; copy it again")
        self.largest = max(self.largest, len(indices))
        rng = np.random.default_rng(episode)
        picture = np.kron(rng.integers(0, 255, (2, 2, 3)), np.ones((1, 1, 1)))
        height, width = self.sizes[episode]
        tall = picture.repeat(-(-height // 2), 0).repeat(-(-width // 2), 1)[:height, :width]
        return np.stack([np.roll(tall, int(index), axis=1) for index in indices]).astype(np.uint8)

    def states(self, episode):
        return np.random.default_rng(episode).normal(size=(self.lengths[episode], 3))  # float64

    def actions(self, episode):
        actions = np.random.default_rng(100 + episode).normal(size=(self.lengths[episode], 2)).astype(np.float32)
        actions[-1, -1] = np.nan if episode in self.nan else -0.0
        return actions

    def task_indices(self, episode):
        return (np.arange(self.lengths[episode]) >= 2).astype(np.int64)

    def extra(self, name, episode):
        return self._extras[name][: self.lengths[episode]]

    def episode_info(self, episode):
        return self._infos[episode]

    def damaged(self):
        return iter(())


def config(tmp_path: Path, **options) -> ConvertConfig:
    return ConvertConfig(out=tmp_path / "out", **options)


def assert_same(source: Source, written: Source) -> None:
    assert written.lengths.tolist() == source.lengths.tolist()
    assert (written.cameras, written.fps) == (source.cameras, source.fps)
    for episode in range(len(source)):
        assert written.actions(episode).dtype == source.actions(episode).dtype
        assert written.actions(episode).tobytes() == source.actions(episode).tobytes()
        if source.state_dim:
            assert written.states(episode).dtype == source.states(episode).dtype
            assert written.states(episode).tobytes() == source.states(episode).tobytes()
        words = [[s.tasks[i] for i in s.task_indices(episode)] for s in (source, written)]
        assert words[0] == words[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_everything_but_pixels_stays_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    extras = {"reward": rng.normal(size=5), "grid": rng.integers(0, 9, (5, 2, 3)).astype(np.uint8), "done": rng.random((5, 1)) > 0.5}
    source = Made(extras=extras, infos=[{"seed": 3, "file": "a.bin", "score": 0.5}, {"seed": 4, "file": "b.bin", "score": 1}])
    done = convert(source, config(tmp_path))
    written = open_source(tmp_path / "out")
    assert_same(source, written)
    assert written.extras == {"reward": (), "grid": (2, 3), "done": (1,)}
    for name, values in extras.items():
        assert written.extra(name, 1).dtype == values.dtype
        np.testing.assert_array_equal(written.extra(name, 1), values[:3])
    assert [written.episode_info(e) for e in range(2)] == [
        {"seed": 3, "file": "a.bin", "score": 0.5},
        {"seed": 4, "file": "b.bin", "score": 1.0},
    ]
    assert (written.state_names, written.action_names) == (source.state_names, source.action_names)
    assert done.remarks == () and done.comparison.num_frames == 4
    origin = written.recording["provenance"]["converted_from"]
    assert (origin["name"], origin["format"], origin["fingerprint"]) == ("made", "made", "0123")


def test_png_pictures_are_equal_and_video_is_near(tmp_path):
    write(tmp_path / "demos")
    source = open_source(tmp_path / "demos")
    lossless = convert(source, ConvertConfig(out=tmp_path / "png", images=True))
    video = convert(source, ConvertConfig(out=tmp_path / "mp4", crf=30))
    assert lossless.comparison.min_psnr_db is None and lossless.comparison.max_error == 0
    assert video.comparison.min_psnr_db is not None and 20 < video.comparison.min_psnr_db < 60
    png, mp4 = open_source(tmp_path / "png"), open_source(tmp_path / "mp4")
    for episode in range(3):
        steps = range(int(source.lengths[episode]))
        np.testing.assert_array_equal(png.frames(episode, steps, "wrist"), source.frames(episode, steps, "wrist"))
        assert [bar_width(image) for image in mp4.frames(episode, steps, "front")] == [2 * step + 2 for step in steps]
    assert_same(source, png)
    assert png.recording["robot"]["name"] == "pair", "our own recording stays the robot's"
    assert (tmp_path / "png" / "meta" / "dataset_statistics.json").is_file()


def test_the_result_is_the_same_for_any_number_of_workers(tmp_path):
    write(tmp_path / "demos", (6, 4, 5, 3))
    source = open_source(tmp_path / "demos")
    for workers in (0, 3):
        (tmp_path / str(workers)).mkdir()
        convert(source, ConvertConfig(out=tmp_path / str(workers) / "out", workers=workers))
    one, other = contents(tmp_path / "0"), contents(tmp_path / "3")
    assert [name for name in one | other if one.get(name) != other.get(name)] == []


def test_a_selection_in_a_robots_language_is_written_as_it_is_seen(tmp_path):
    write(tmp_path / "demos")
    source = select(open_for(SPEC, tmp_path / "demos", ReadOptions()), Filters(episodes="2,0", every=2))
    done = convert(source, config(tmp_path, options={"episodes": "2,0", "every": 2}), SPEC)
    written = open_source(tmp_path / "out")
    assert (done.num_episodes, written.fps, written.lengths.tolist()) == (2, 5.0, [7, 6])
    assert [bar_width(image) for image in written.frames(0, range(7), "front")] == [2, 6, 10, 14, 18, 22, 26]
    assert [written.episode_info(e)["seed"] for e in range(2)] == [2, 0]
    assert written.recording["provenance"]["converted_from"]["options"] == {"episodes": "2,0", "every": 2}


def test_what_the_format_cannot_hold_is_said(tmp_path):
    extras = {"state": np.zeros((5, 2)), "words": np.array(["a"] * 5), "kept": np.arange(5)}
    infos = [{"seed": 1, "mixed": 1, "list": [1, 2], "some": 2}, {"seed": 2, "mixed": "one", "list": [3]}]
    done = convert(Made(extras=extras, infos=infos), config(tmp_path))
    written = open_source(tmp_path / "out")
    assert list(written.extras) == ["kept"]
    assert written.episode_info(0)["seed"] == 1 and written.episode_info(0)["some"] == 2
    assert {remark.split("'")[1] for remark in done.remarks} == {"state", "words", "mixed", "list"}


def test_an_episode_of_any_length_passes_through_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_BYTES", 10 * 16 * 24 * 3)
    source = Made((47, 1), ((16, 24),) * 2)
    convert(source, config(tmp_path))
    assert source.largest == 10
    assert open_source(tmp_path / "out").lengths.tolist() == [47, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Made(fps=None), "does not note its frame rate: give fps, on the command line --fps 20"),
        (Made((3, 3, 3), ((16, 24), (16, 24), (24, 16))), "episode 2: camera front has 24 x 16 pixels, elsewhere 16 x 24"),
        (Made(sizes=((15, 24),) * 2), "camera front has 15 x 24 pixels, but video needs even numbers: give images instead"),
        (Made(nan=(1,)), "episode 1: action is not finite in step 2, dimension 1"),
        (Made(bad=(0,)), "made.bin, episode 0: unreadable; copy it again"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path, source, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        convert(source, config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_damaged_episodes_are_skipped_and_listed(tmp_path):
    source = Made((4, 3, 5, 2), ((16, 24),) * 4, bad=(0,), nan=(2,), infos=[{"seed": e} for e in range(4)])
    done = convert(source, config(tmp_path, skip_bad=True))
    written = open_source(tmp_path / "out")
    assert [written.episode_info(e)["seed"] for e in range(len(written))] == [1, 3]
    assert len(done.skipped) == 2 and "episode 0: unreadable" in done.skipped[0] and "not finite in step 4" in done.skipped[1]
    with pytest.raises(ValueError, match="every episode is damaged|of every episode are unreadable"):
        convert(Made(bad=(0, 1)), ConvertConfig(out=tmp_path / "none", skip_bad=True))


def test_odd_sizes_can_be_kept_as_images(tmp_path):
    done = convert(Made(sizes=((15, 23),) * 2), config(tmp_path, images=True))
    assert done.comparison.max_error == 0
    assert open_source(tmp_path / "out").frames(0, [4], "front").shape == (1, 15, 23, 3)


def test_a_full_folder_and_the_dataset_itself_are_refused(tmp_path):
    write(tmp_path / "demos", (3,))
    source = open_source(tmp_path / "demos")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(source, ConvertConfig(out=tmp_path))
    with pytest.raises(ValueError, match="lies inside of the dataset"):
        convert(source, ConvertConfig(out=tmp_path / "demos" / "again"))
    assert not (tmp_path / "demos" / "again").exists()


def test_a_difference_is_found(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    a, b = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    plan = make_plan(a)
    assert compare(a, b, range(3), plan, lambda *_: None).max_error == 0
    with pytest.raises(ValueError, match="3 episodes were written instead of 2"):
        compare(a, b, [0, 1], plan, lambda *_: None)
    with pytest.raises(ValueError, match="b, episode 0 differs from episode 2 of .*: actions, states, extra 'grounding', length, instr"):
        compare(a, b, [2, 1, 0], plan, lambda *_: None)


def test_a_kill_while_converting_leaves_no_dataset_and_no_processes(tmp_path):
    write(tmp_path / "demos", (500,) * 5)
    command = [sys.executable, "-m", "vla_oft", "data", "convert", "demos", "out", "--workers", "2"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (found := list(tmp_path.glob(".out.*.writing/.out.*.writing/videos"))) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert found, "it was too fast to be killed"
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(running.pid, signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    assert not (tmp_path / "out").exists()
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline, "its processes outlive it"
        time.sleep(0.02)
    convert(select(open_source(tmp_path / "demos"), Filters(episodes="0:2")), config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "out"], "the next one cleans up"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


SAMPLES = {
    "lerobot_v3_sample": ReadOptions(),
    "lerobot_v3_images_sample": ReadOptions(),
    "lerobot_v21_sample": ReadOptions(),
    "lerobot_v21_openpi_sample": ReadOptions(),
    "rlds_sample/libero_spatial_no_noops/1.0.0": ReadOptions(fps=20),
    "libero_hdf5_sample": ReadOptions(fps=20),
    "aloha_hdf5_sample": ReadOptions(fps=50, instruction="fold the shirt"),
    "aloha_hdf5_sample/compressed": ReadOptions(fps=50, instruction="fold the shirt", colour_order="bgr"),
    "aloha_hdf5_sample/preprocessed/fold_shirt": ReadOptions(fps=25, instruction="fold the shirt"),
}


@pytest.mark.shared
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_format_can_be_converted(shared, tmp_path, sample):
    read = ReadOptions(**{**SAMPLES[sample].__dict__, "cache_dir": tmp_path / "cache"})
    source = open_source(shared / "formats" / sample, read)
    done = convert(source, config(tmp_path, images=True))
    written = open_source(tmp_path / "out")
    assert_same(source, written)
    assert done.comparison.max_error == 0 and set(written.extras) == set(source.extras), done.remarks
    for name in source.extras:
        np.testing.assert_array_equal(written.extra(name, 0), source.extra(name, 0))
    assert json.loads(json.dumps(done.to_json(), default=str))["num_frames"] == int(source.lengths.sum())
