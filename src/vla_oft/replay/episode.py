"""One recorded episode, executed again in its scene.

recorded    s0 --a0--> s1 --a1--> s2 --a2-->         the dataset's states and actions
replayed    r0 --a0--> r1 --a1--> r2 --a2--> verdict reset(seed), then the same actions

|s - r| is the deviation. It is nothing at all where simulator, machine and executed actions are the same. After a push that the recording
does not contain (`disturbed`) the two part: such an episode says nothing about the dataset.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_oft.data.base import Source, instruction
from vla_oft.data.table import DISTURBED
from vla_oft.evaluate.episode import blamed_on_simulator, describe
from vla_oft.replay.video import SideBySide
from vla_oft.sims.base import Simulator

NEEDED = "replay needs the simulator's seed and suite, as `vla-oft data collect` notes them for every episode"


@dataclass(frozen=True)
class Scene:
    """Where an episode was recorded: `seed` of a suite such as "tabletop/touch"."""

    suite: str
    seed: int

    def __str__(self) -> str:
        return f"{self.suite}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far the reached states are from the recorded ones, in the state's units; of each step, its worst dimension.

    max, median: over the steps. step, dimension: where the maximum is. diverged_at: first step beyond the tolerance, None if there is none.
    """

    max: float
    median: float
    step: int
    dimension: int
    diverged_at: int | None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came of one episode.

    success: whether the task was done after the last recorded action; success_step: after which one it first was.
    success, chosen and correct are None when the simulator broke (`sim_error`).
    disturbed: something else was executed than recorded, so that the replay must differ.
    deviation: None without recorded states. picture_difference: mean difference between first recorded and first rendered pictures,
    in levels of 255; None when they have different sizes. remarks: why this may not be the recorded scene.
    """

    episode: int
    scene: Scene
    instruction: str
    num_steps: int
    disturbed: bool
    success: bool | None = None
    success_step: int | None = None
    chosen: str | None = None
    correct: bool | None = None
    deviation: Deviation | None = None
    picture_difference: float | None = None
    sim_error: str | None = None
    video: str | None = None
    remarks: tuple[str, ...] = ()


def scene_of(source: Source, episode: int, suite: str | None) -> Scene:
    """Where `episode` was recorded. suite: where the dataset does not say it; must agree where it does. Raises ValueError."""
    info = source.episode_info(episode)
    where, recorded, seed = f"dataset {source.path}, episode {episode}", info.get("suite"), info.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"{where}: no seed of a scene is recorded (found {sorted(info) or 'nothing'}); {NEEDED}")
    if not isinstance(recorded, str) and suite is None:
        raise ValueError(f"{where}: no suite is recorded; {NEEDED}; name it with suite, for example tabletop/touch")
    if isinstance(recorded, str) and suite not in (None, recorded):
        raise ValueError(f"{where} was recorded in {recorded}, not in suite='{suite}'; leave suite out")
    return Scene(recorded if isinstance(recorded, str) else str(suite), int(seed))


def is_disturbed(source: Source, episode: int) -> bool:
    """Whether something else was executed in some step than is recorded."""
    return DISTURBED in source.extras and bool(source.extra(DISTURBED, episode).any())


def replay_episode(
    source: Source, episode: int, simulator: Simulator, scene: Scene, *, tolerance: float, video: SideBySide | None
) -> dict[str, Any]:
    """The measured fields of `Replayed`. Raises SimulatorError when the simulator broke, ValueError for unusable actions."""
    actions = source.actions(episode)
    _check_numbers(source, episode, actions, simulator)
    with blamed_on_simulator():
        simulator.reset(scene.seed)
        first = simulator.observe()
    spoken, difference = instruction(source, episode), picture_difference(source, episode, first.images)
    if video is not None:
        video.begin(source, episode, spoken)
    reached, success_step = [], None
    for step, action in enumerate(actions):
        with blamed_on_simulator():
            observation = first if step == 0 else simulator.observe()
            reached.append(observation.state)
            if video is not None:
                video.add(step, observation.images)
            simulator.step(action)
            outcome = simulator.outcome()
        if outcome.success and success_step is None:
            success_step = step
    if video is not None:
        video.finish(describe(outcome), outcome.success)
    compared = bool(source.state_dim) and reached[0] is not None and len(reached[0]) == source.state_dim
    return {
        "success": outcome.success,
        "success_step": success_step,
        "chosen": outcome.chosen,
        "correct": outcome.correct,
        "deviation": deviation(source.states(episode), np.stack(reached), tolerance) if compared else None,
        "picture_difference": difference,
        "remarks": _remarks(spoken, simulator.instruction, difference),
    }


def deviation(recorded: np.ndarray, reached: np.ndarray, tolerance: float) -> Deviation:
    """Of states (T, S)."""
    apart = np.abs(np.asarray(recorded, np.float64) - np.asarray(reached, np.float64))
    worst = apart.max(axis=1)
    step = int(worst.argmax())
    beyond = np.flatnonzero(worst > tolerance)
    return Deviation(
        max=float(worst[step]),
        median=float(np.median(worst)),
        step=step,
        dimension=int(apart[step].argmax()),
        diverged_at=int(beyond[0]) if beyond.size else None,
    )


OTHER_SCENE = 12.0
"""Compression changes pictures by about 2 levels on average, another scene by far more."""


def picture_difference(source: Source, episode: int, images: dict[str, np.ndarray]) -> float | None:
    """Mean over the cameras that both have; None when there are none, or of other sizes."""
    found = []
    for camera in (camera for camera in source.cameras if camera in images):
        recorded = source.frames(episode, [0], camera)[0]
        if recorded.shape != images[camera].shape:
            return None
        found.append(np.abs(recorded.astype(np.float32) - images[camera]).mean())
    return float(np.mean(found)) if found else None


def _remarks(recorded: str, simulated: str, difference: float | None) -> tuple[str, ...]:
    remarks = [] if recorded == simulated else [f"the recording says '{recorded}', the simulator '{simulated}'"]
    if difference is not None and difference > OTHER_SCENE:
        remarks.append(f"the first pictures differ by {difference:.0f} levels on average")
    return tuple(remarks)


def _check_numbers(source: Source, episode: int, actions: np.ndarray, simulator: Simulator) -> None:
    where, spec = f"dataset {source.path}, episode {episode}", simulator.spec
    if actions.shape[1] != spec.action_dim:
        raise ValueError(f"{where}: actions have {actions.shape[1]} dimensions, robot '{spec.name}' has {spec.action_dim}")
    for what, values in (("action", actions), ("state", source.states(episode) if source.state_dim else actions)):
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{where}: {what} is not finite in step {bad[0][0]}, dimension {bad[0][1]}; leave it out, with episodes")
