"""Recorded actions, executed again: the same simulator gives the same states and the same verdict; anything else is said."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from vla_oft.collect import CollectConfig, Noise, collect
from vla_oft.convert import ConvertConfig, convert
from vla_oft.data.base import open_source
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Episode
from vla_oft.data.select import Filters
from vla_oft.replay import ReplayConfig, replay, which_episodes
from vla_oft.robots import tabletop as robot
from vla_oft.sims.base import SimulatorError, make

pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """Three episodes in which exactly the recorded actions were executed."""
    out = tmp_path_factory.mktemp("calm") / "demos"
    collect(CollectConfig(suite=("tabletop/touch",), episodes=3, seed=0, out=out, camera_size=64))
    return out


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Path:
    """Four episodes, some of them with pushes that the recorded actions do not contain."""
    out = tmp_path_factory.mktemp("pushed") / "demos"
    noise = Noise(hold_probability=0.1, hold_std=0.5, hold_steps=4)
    collect(CollectConfig(suite=("tabletop/touch",), episodes=4, seed=0, out=out, camera_size=64, noise=noise))
    return out


def rewrite(source_path: Path, out: Path, change=lambda episode: episode) -> Path:
    """The recording with other contents."""
    source = open_source(source_path)
    with LeRobotWriter(out, robot.SPEC, provenance=source.recording["provenance"]) as writer:
        for number in range(len(source)):
            episode = Episode(
                images={camera: source.frames(number, range(int(source.lengths[number])), camera) for camera in source.cameras},
                states=source.states(number),
                actions=source.actions(number),
                instructions=source.tasks[source.task_indices(number)[0]],
                info=source.episode_info(number),
            )
            writer.append_episode(change(episode))
    return out


def tampered(episode: Episode) -> Episode:
    actions = episode.actions.copy()
    actions[:, :2] *= -1
    return dataclasses.replace(episode, actions=actions)


def test_undisturbed_recordings_succeed_again_in_the_very_same_states(calm):
    found = replay(open_source(calm), ReplayConfig())
    assert str(found.rate()).startswith("100.0 % (3/3, 95 % interval 43.9-100.0 %)")
    assert [e.deviation.max for e in found.episodes if e.deviation] == [0.0] * 3
    assert all(not e.disturbed and not e.remarks and e.success_step is not None for e in found.episodes)
    assert all(e.picture_difference is not None and e.picture_difference < 4 for e in found.episodes)
    assert found.notes == () and found.sim_errors == 0


def test_tampered_actions_neither_succeed_nor_stay_on_the_recorded_path(calm, tmp_path):
    found = replay(open_source(rewrite(calm, tmp_path / "tampered", tampered)), ReplayConfig())
    assert found.rate().successes == 0 and found.rate().episodes == 3
    assert found.diverged(disturbed=False) == [0, 1, 2]
    assert all(e.deviation and e.deviation.max > 0.05 and e.deviation.diverged_at for e in found.episodes)


def test_pushed_episodes_are_counted_apart(pushed):
    source = open_source(pushed)
    found = replay(source, ReplayConfig())
    disturbed = [e for e in range(4) if source.extra("disturbed", e).any()]
    assert 0 < len(disturbed) < 4, "the recording has both"
    assert [e.episode for e in found.episodes if e.disturbed] == disturbed == found.diverged(disturbed=True)
    calm_rate = found.rate(disturbed=False)
    assert (calm_rate.successes, calm_rate.episodes) == (4 - len(disturbed), 4 - len(disturbed))
    assert found.rate(disturbed=True).episodes == len(disturbed) and found.diverged(disturbed=False) == []
    text = "\n".join(found.lines())
    assert "must differ" in text and "  disturbed" in text


def test_a_converted_recording_can_be_replayed_too(calm, tmp_path):
    convert(open_source(calm), ConvertConfig(out=tmp_path / "converted", images=True))
    found = replay(open_source(tmp_path / "converted"), ReplayConfig(episodes=(2,)))
    assert found.rate().successes == 1 and found.episodes[0].episode == 2 and found.episodes[0].scene.seed == 2


def test_rows_and_videos_are_written(calm, tmp_path):
    found = replay(open_source(calm), ReplayConfig(episodes=(1, 0), out=tmp_path / "out", record=1))
    document = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert document == json.loads(json.dumps(found.to_json()))
    assert document["success"]["successes"] == 2 and document["versions"]["mujoco"]
    assert [row["scene"]["seed"] for row in document["episodes"]] == [1, 0]
    assert document["recorded_with"]["provenance"]["suite"] == ["tabletop/touch"]
    assert [row["video"] for row in document["episodes"]] == ["videos/episode-00001.mp4", None]
    with av.open(str(tmp_path / "out" / "videos" / "episode-00001.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == found.episodes[0].num_steps + 20, "and a second with the verdict"
    left, right = frames[5][:480, :240].astype(int), frames[5][:480, 240:].astype(int)
    assert abs(left - right).mean() < 5 and left.std() > 20, "recorded and replayed look alike"


class Broken:
    """A simulator that breaks in one scene."""

    def __init__(self, suite: str, camera_size: int) -> None:
        self._inner = make(suite, camera_size)
        self._seed = 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def reset(self, seed: int, *, swap: int = 0) -> None:
        self._seed = seed
        self._inner.reset(seed, swap=swap)

    def step(self, action: np.ndarray) -> None:
        if self._seed == 1:
            raise SimulatorError("the physics became unstable")
        self._inner.step(action)


def test_what_the_simulator_breaks_is_no_failure(calm, tmp_path):
    found = replay(open_source(calm), ReplayConfig(out=tmp_path / "out", record=3), make=Broken)
    assert (found.rate().successes, found.rate().episodes, found.sim_errors) == (2, 2, 1)
    assert found.episodes[1].success is None and found.episodes[1].sim_error == "the physics became unstable"
    assert sorted(path.name for path in (tmp_path / "out" / "videos").iterdir()) == ["episode-00000.mp4", "episode-00002.mp4"]


def test_another_scene_is_noticed(calm, tmp_path):
    moved = rewrite(calm, tmp_path / "moved", lambda e: dataclasses.replace(e, info={**e.info, "seed": e.info["seed"] + 50}))
    found = replay(open_source(moved), ReplayConfig())
    said = [remark for e in found.episodes for remark in e.remarks]
    assert any("the recording says 'touch the" in remark for remark in said)
    assert any("the first pictures differ by" in remark for remark in said)


def without(*names: str):
    def change(episode: Episode) -> Episode:
        return dataclasses.replace(episode, info={name: value for name, value in episode.info.items() if name not in names})

    return change


def test_recordings_without_a_scene_say_what_is_missing(calm, tmp_path):
    nowhere = open_source(rewrite(calm, tmp_path / "nowhere", without("seed", "suite")))
    with pytest.raises(ValueError, match="episode 0: no seed of a scene is recorded .*; replay needs the simulator's seed and suite"):
        replay(nowhere, ReplayConfig())
    seeds = open_source(rewrite(calm, tmp_path / "seeds", without("suite")))
    with pytest.raises(ValueError, match="no suite is recorded; .* name it with suite, for example tabletop/touch"):
        replay(seeds, ReplayConfig())
    assert replay(seeds, ReplayConfig(suite="tabletop/touch")).rate().successes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "tabletop/push"}, "was recorded in tabletop/touch, not in suite='tabletop/push'"),
        ({"robot": "libero"}, "simulates robot 'tabletop', not robot='libero'"),
        ({"layout": "rlds"}, "layout 'rlds' is unknown for robot 'tabletop'"),
    ],
)
def test_what_does_not_fit_is_refused(calm, change, message):
    with pytest.raises(ValueError, match=message):
        replay(open_source(calm), ReplayConfig(**change))


def test_a_video_needs_a_folder():
    with pytest.raises(ValueError, match="record=2 films the first episodes into a folder: give out"):
        ReplayConfig(record=2)


def test_filters_choose_episodes_but_never_steps(calm):
    source = open_source(calm)
    assert which_episodes(source, Filters(episodes="2,0")) == (2, 0)
    assert which_episodes(source, Filters()) == (0, 1, 2)
    for filters in (Filters(every=2), Filters(drop_noops=True)):
        with pytest.raises(ValueError, match="a replay needs every step"):
            which_episodes(source, filters)
    with pytest.raises(ValueError, match="does not say which episodes failed"):
        which_episodes(source, Filters(drop_failed=True))


def test_a_difference_in_rate_and_picture_size_is_noticed(calm, tmp_path):
    source = open_source(calm)
    source.fps = 10.0
    with pytest.raises(ValueError, match="has 10 steps a second, robot 'tabletop' 20"):
        replay(source, ReplayConfig())
    wide = rewrite(calm, tmp_path / "wide", lambda e: dataclasses.replace(e, images={c: v[:, :32] for c, v in e.images.items()}))
    found = replay(open_source(wide), ReplayConfig(episodes=(0,)))
    assert found.rate().successes == 1 and found.episodes[0].picture_difference is None
    assert found.notes[0].startswith("recorded with front 32 x 64, wrist 32 x 64, replayed with 128 x 128")


def test_scenes_cannot_be_replayed(calm):
    source = open_source(calm)
    source.kind = "scenes"
    with pytest.raises(ValueError, match="there is nothing to replay"):
        replay(source, ReplayConfig())


def test_every_filter_of_episodes_counts(tmp_path):
    with LeRobotWriter(tmp_path / "set", robot.SPEC) as writer:
        for label in ("touch it", " ", "touch it"):
            images = {camera: np.zeros((4, 16, 16, 3), np.uint8) for camera in robot.SPEC.cameras}
            states, actions = np.zeros((4, 8), np.float32), np.zeros((4, 7), np.float32)
            writer.append_episode(Episode(images=images, states=states, actions=actions, instructions=label))
    assert which_episodes(open_source(tmp_path / "set"), Filters(drop_unlabelled=True)) == (0, 2)
