"""Collecting demonstrations: a tiny real simulator (a dot that must reach a coloured square), real processes, real videos."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from vla_oft.collect import CollectConfig, Noise, SceneConfig, collect, collect_scenes
from vla_oft.collect.episodes import Disturbance
from vla_oft.collect.workers import SEED_LIMIT
from vla_oft.data.base import instruction, open_source
from vla_oft.data.check import check_source
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.evaluate.plan import FIRST_SEED
from vla_oft.preprocess import Config, Preparation
from vla_oft.recipes import debug
from vla_oft.recipes.base import Recipe, generate
from vla_oft.sims.base import Outcome, SimulatorError
from vla_oft.statistics import Normalizer, load_statistics
from vla_oft.train.config import Dataset
from vla_oft_client import Gripper, Observation, RobotSpec

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SPEC = RobotSpec(
    name="dot",
    cameras=("front", "wrist"),
    state_dim=2,
    action_dim=4,
    control_hz=10.0,
    chunk_len=4,
    action_kind="delta_ee",
    absolute_mask=(False, False, False, True),
    normalize_mask=(True, True, True, False),
    normalization="bounds_q99",
    action_limits=((-1.0, 1.0),) * 4,
    gripper=(Gripper(index=3, open=-1.0, closed=1.0),),
)


class DotSimulator:
    """A white dot on a board of coloured squares; actions move it by up to 5 % of the board."""

    spec, max_steps = SPEC, 60

    def __init__(self, family: str, camera_size: int) -> None:
        self.family, self.size, self.objects = family, camera_size, list(COLOURS)
        self.executed: list[np.ndarray] = []

    def reset(self, seed: int, *, swap: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.executed = seed, []
        self.dot = rng.uniform(0.1, 0.9, 2)
        self.squares = rng.permutation([[0.2, 0.2], [0.8, 0.2], [0.5, 0.8]])
        self.set_instruction(self.family, int(rng.integers(3)) + swap, 0)

    def set_instruction(self, family: str, target_index: int, other_index: int) -> None:
        self.target = target_index % 3
        self.instruction = f"{family} the {self.objects[self.target]} square"

    def randomize_pose(self, rng: np.random.Generator) -> None:
        self.dot = rng.uniform(0, 1, 2)

    def observe(self) -> Observation:
        board = np.zeros((self.size, self.size, 3), np.uint8)
        for (x, y), colour in zip(self.squares, COLOURS.values(), strict=True):
            self._paint(board, x, y, 0.12, colour)
        self._paint(board, *self.dot, 0.04, (255, 255, 255))
        return Observation({"wrist": board[::-1].copy(), "front": board}, self.dot.astype(np.float32), self.instruction)

    def _paint(self, board: np.ndarray, x: float, y: float, half: float, colour: tuple[int, ...]) -> None:
        low, high = (np.clip((np.array([y, x]) + d) * self.size, 0, self.size).astype(int) for d in (-half, half))
        board[low[0] : high[0], low[1] : high[1]] = colour

    def patch_masks(self, patches: int) -> dict[str, np.ndarray]:
        mask = np.zeros((2, patches, patches), np.uint8)
        x, y = self.squares[self.target]
        mask[0, int(y * patches), int(x * patches)] = 1
        return {"wrist": mask[:, ::-1].copy(), "front": mask}

    def landmarks(self) -> np.ndarray:
        nowhere = np.full(3, np.nan)
        return np.stack([np.append(self.squares[self.target], 0.0), nowhere]).astype(np.float32)

    def step(self, action: np.ndarray) -> None:
        self.executed.append(action)
        self.dot = np.clip(self.dot + 0.05 * action[:2], 0, 1)

    def outcome(self) -> Outcome:
        near = bool(np.abs(self.dot - self.squares[self.target]).max() < 0.05)
        return Outcome(success=near, chosen=self.objects[self.target] if near else None, correct=near or None)

    def close(self) -> None:
        pass


def make_dot(suite: str, camera_size: int) -> DotSimulator:
    return DotSimulator(suite.partition("/")[2], camera_size)


def dot_expert(suite: str, simulator: DotSimulator):
    def act() -> np.ndarray:
        if simulator.seed % 4 == 3:  # this expert gives up on every fourth scene
            return np.array([0, 0, 0, -1.0])
        away = simulator.squares[simulator.target] - simulator.dot
        return np.array([*np.clip(away / 0.05, -1, 1), 0, -1.0])

    return act


def run(tmp_path: Path, name: str = "dots", **changes):
    values = {"suite": ("dot/touch",), "episodes": 6, "seed": 0, "camera_size": 32, "grounding_patches": 4, "out": tmp_path / name}
    return collect(CollectConfig(**{**values, **changes}), make_dot, dot_expert)


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "dataset_statistics.json")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_failed_episodes_are_dropped_and_counted_and_seeds_are_recorded(tmp_path):
    result = run(tmp_path)
    source = open_source(result.out)
    assert (result.num_episodes, result.num_failed) == (6, 1)
    assert [source.episode_info(e)["seed"] for e in range(6)] == [0, 1, 2, 4, 5, 6]
    assert check_source(source, SPEC) == []
    assert load_statistics(result.out / "meta" / "dataset_statistics.json")["dots"].num_transitions == result.num_frames


def test_a_recorded_episode_is_what_the_simulator_did(tmp_path):
    source = open_source(run(tmp_path, settle_steps=0).out)
    simulator = DotSimulator("touch", 32)
    simulator.reset(2)
    act = dot_expert("", simulator)
    assert instruction(source, 2) == simulator.instruction
    for step in range(int(source.lengths[2])):
        observation = simulator.observe()
        np.testing.assert_array_equal(source.states(2)[step], observation.state)
        action = act().astype(np.float32)
        np.testing.assert_array_equal(source.actions(2)[step], action)
        for view, camera in enumerate(SPEC.cameras):
            seen = source.frames(2, [step], camera)[0].astype(int)
            assert np.abs(seen - observation.images[camera]).mean() < 12  # chroma of tiny squares is halved in resolution
            np.testing.assert_array_equal(source.extra("grounding", 2)[step, view], simulator.patch_masks(4)[camera])
        np.testing.assert_array_equal(source.extra("landmarks", 2)[step], simulator.landmarks())
        simulator.step(action)
    assert simulator.outcome().success


def test_the_dataset_does_not_depend_on_the_number_of_workers(tmp_path):
    noise = Noise(std=0.3, hold_probability=0.1)
    first = run(tmp_path, "a", noise=noise)
    second = run(tmp_path, "b", noise=noise, workers=2)
    assert contents(first.out) == contents(second.out)
    assert open_source(first.out).fingerprint() == open_source(second.out).fingerprint()


def test_noise_disturbs_what_is_executed_but_not_what_is_recorded(tmp_path):
    calm, noisy = open_source(run(tmp_path, "a").out), open_source(run(tmp_path, "b", noise=Noise(std=0.5)).out)
    assert not np.array_equal(calm.states(0), noisy.states(0)[: len(calm.states(0))])
    for step in range(int(noisy.lengths[0]) - 3):
        simulator = DotSimulator("touch", 32)
        simulator.reset(0)
        simulator.dot = noisy.states(0)[step].astype(np.float64)
        np.testing.assert_allclose(noisy.actions(0)[step], dot_expert("", simulator)(), atol=1e-5)


def test_noise_spares_the_gripper_and_respects_the_limits():
    disturb = Disturbance(Noise(std=2.0, hold_probability=0.5), SPEC, np.random.default_rng(0))
    executed = np.stack([disturb(np.array([0.9, 0, 0, -1], np.float32)) for _ in range(100)])
    assert (executed[:, 3] == -1).all() and np.abs(executed).max() <= 1 and executed[:, :3].std() > 0.5
    assert disturb.dims == [0, 1, 2]


def test_steps_after_success_are_recorded(tmp_path):
    short, long = open_source(run(tmp_path, "a", settle_steps=0).out), open_source(run(tmp_path, "b", settle_steps=3).out)
    assert (long.lengths - short.lengths == 3).all()


def test_several_suites_share_a_dataset(tmp_path):
    source = open_source(run(tmp_path, suite=("dot/touch", "dot/push"), episodes=2).out)
    assert [source.episode_info(e)["suite"] for e in range(4)] == ["dot/touch"] * 2 + ["dot/push"] * 2
    assert instruction(source, 3).startswith("push the")


def test_scenes_hold_one_picture_under_several_instructions(tmp_path):
    out = tmp_path / "scenes"
    config = SceneConfig(suite=("dot/touch",), scenes=70, seed=0, out=out, grounding_patches=4, instructions=3, camera_size=32)
    assert collect_scenes(config, make_dot).num_frames == 210
    source = open_source(config.out)
    assert source.kind == "scenes" and (source.lengths == 3).all() and check_source(source, SPEC) == []
    frames, masks = source.frames(66, [0, 1, 2], "front").astype(int), source.extra("grounding", 66)
    assert np.abs(frames - frames[0]).max() < 16
    assert len({source.tasks[i] for i in source.task_indices(66)}) == 3 and len(np.unique(masks, axis=0)) == 3
    for step in range(3):
        row, column = np.argwhere(masks[step, 0, 0])[0] * 8 + 4
        colour = source.tasks[source.task_indices(66)[step]].split()[2]
        assert np.argmax(frames[step, row - 3 : row + 4, column - 3 : column + 4].mean((0, 1))) == list(COLOURS).index(colour)


def test_scenes_never_train_actions(tmp_path):
    config = SceneConfig(suite=("dot/touch",), scenes=4, seed=0, out=tmp_path / "scenes", grounding_patches=4, camera_size=32, workers=2)
    collect_scenes(config, make_dot)
    statistics = next(iter(load_statistics(run(tmp_path).out / "meta" / "dataset_statistics.json").values()))
    data = ChunkDataset(
        [open_source(config.out)],
        SPEC,
        prepare=Preparation(Config(image_size=16, resize="box", crop_area=1.0)),
        action_normalizer=Normalizer(statistics.action, statistics.normalize_mask, SPEC.normalization),
        grounding="grounding",
        landmarks="landmarks",
    )
    samples = data.batch([0, 3])
    assert not samples.valid.any() and samples.landmarks is not None and np.isfinite(samples.landmarks[:, 0]).all()
    assert samples.grounding is not None and samples.grounding.shape == (2, 2, 2, 4, 4)


def test_an_expert_that_never_succeeds_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="expert of dot/touch failed 21 times"):
        collect(
            CollectConfig(suite=("dot/touch",), episodes=1, seed=3, out=tmp_path / "out", camera_size=32),
            make_dot,
            lambda suite, simulator: lambda: np.array([0, 0, 0, -1.0]),
        )
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_before_work_starts(tmp_path):
    with pytest.raises(ValueError, match="nothing to record"):
        CollectConfig(suite=(), episodes=1, seed=0, out=tmp_path)
    with pytest.raises(ValueError, match="unknown suite 'nowhere/touch'"):
        collect(CollectConfig(suite=("nowhere/touch",), episodes=1, seed=0, out=tmp_path / "out"))
    with pytest.raises(ValueError, match="even height and width"):
        run(tmp_path, camera_size=33)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(tmp_path, "full")


def test_scenes_of_evaluations_are_never_recorded(tmp_path):
    assert SEED_LIMIT == FIRST_SEED
    demos = {"suite": ("dot/touch",), "episodes": 10, "out": tmp_path}
    scenes = {"suite": ("dot/touch",), "scenes": 10, "out": tmp_path, "grounding_patches": 4}
    SceneConfig(**scenes, seed=SEED_LIMIT - 10)
    last = SEED_LIMIT - 10 - CollectConfig(**demos, seed=0).max_failures
    CollectConfig(**demos, seed=last)
    for make, seed in ((CollectConfig, last + 1), (CollectConfig, -1), (SceneConfig, SEED_LIMIT - 9), (SceneConfig, -1)):
        with pytest.raises(ValueError, match=f"seed={seed} would use the seeds .*; recordings use 0..999999999, evaluations those above"):
            make(**(demos if make is CollectConfig else scenes), seed=seed)


class BlindSimulator(DotSimulator):
    def observe(self) -> Observation:
        raise SimulatorError("no renderer")


class OtherSimulator(DotSimulator):
    spec = dataclasses.replace(SPEC, control_hz=5.0)


@pytest.mark.parametrize("module", ["episodes", "scenes"])
def test_a_missing_renderer_is_found_before_processes_start(tmp_path, monkeypatch, module):
    monkeypatch.setattr(f"vla_oft.collect.{module}.open_pool", lambda workers: pytest.fail("processes were started"))
    common = {"suite": ("dot/touch",), "seed": 0, "out": tmp_path / "out", "grounding_patches": 4, "workers": 2}
    with pytest.raises(SimulatorError, match="no renderer"):
        if module == "episodes":
            collect(CollectConfig(**common, episodes=1), lambda suite, size: BlindSimulator("touch", size), dot_expert)
        else:
            collect_scenes(SceneConfig(**common, scenes=1), lambda suite, size: BlindSimulator("touch", size))
    assert list(tmp_path.iterdir()) == []


def test_suites_of_two_robots_are_refused_before_recording(tmp_path):
    def make(suite: str, camera_size: int) -> DotSimulator:
        return (OtherSimulator if suite.endswith("push") else DotSimulator)("touch", camera_size)

    config = CollectConfig(suite=("dot/touch", "dot/push"), episodes=1, seed=0, out=tmp_path / "out", camera_size=32)
    with pytest.raises(ValueError, match="dot/touch and dot/push are of different robots: control_hz: 10.0 here, 5.0 there"):
        collect(config, make, dot_expert)


def test_a_recipe_uses_a_dataset_only_if_it_would_have_recorded_the_same(tmp_path):
    out = run(tmp_path).out
    asked = CollectConfig(suite=("dot/touch",), episodes=6, seed=0, camera_size=32, grounding_patches=4, out=out, workers=3)
    train = debug.recipe().train
    config = dataclasses.replace(train, datasets=(Dataset(name="touch", path=str(out)),))
    generate(Recipe(train=train, collect=(asked,)), config)  # would fail to record: there is no simulator "dot"
    other = Recipe(train=train, collect=(dataclasses.replace(asked, episodes=7, noise=Noise(std=0.1)),))
    message = "episodes: 6 there, 7 here; noise: .*0.0.* there, .*0.1.* here.*: delete it to record anew.*--set datasets.0.path=FOLDER"
    with pytest.raises(ValueError, match=message):
        generate(other, config)
    moved = out.rename(tmp_path / "mine")
    generate(other, dataclasses.replace(train, datasets=(Dataset(name="touch", path=str(moved)),)))
    out.mkdir()
    with pytest.raises(ValueError, match="exists, but this recipe did not record it"):
        generate(other, config)


def test_a_dying_writer_leaves_no_dataset(tmp_path):
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(tmp_path / "out", SPEC):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="nothing was recorded"), LeRobotWriter(tmp_path / "out", SPEC):
        pass
    assert list(tmp_path.iterdir()) == []
