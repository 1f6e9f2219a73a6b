"""`vla-oft data replay`: many episodes, how many succeed again, and how far each strays from its recording.

Episodes with pushes that the dataset does not contain are counted apart, those that the simulator broke as neither success nor failure.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.atomic import atomic_directory, replace_file, require_empty
from vla_oft.data.adapt import for_robot
from vla_oft.data.base import Source
from vla_oft.data.select import Filters, episode_numbers
from vla_oft.evaluate.suite import resolve
from vla_oft.evaluate.versions import versions
from vla_oft.progress import progress
from vla_oft.replay.episode import Replayed, Scene, is_disturbed, replay_episode, scene_of
from vla_oft.replay.report import Replay
from vla_oft.replay.video import SideBySide
from vla_oft.sims.base import Simulator, SimulatorError, make
from vla_oft_client import RobotSpec

MakeSimulator = Callable[[str, int], Simulator]
DEFAULT_CAMERA_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What to replay.

    episodes: numbers, in this order; None for all. suite: where the dataset does not say it.
    robot: the simulated robot's name, if it is to be checked. layout: see `data.adapt.for_robot`.
    out: folder for replay.json and videos, empty or absent. record: film the first so many episodes; needs `out`.
    tolerance: from which deviation on, in the state's units, an episode counts as diverged.
    """

    episodes: tuple[int, ...] | None = None
    suite: str | None = None
    robot: str | None = None
    layout: str | None = None
    out: Path | None = None
    record: int = 0
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.record < 0 or (self.record and self.out is None):
            raise ValueError(f"record={self.record} films the first episodes into a folder: give out, and a number of at least 0")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance} must be a number of at least 0, in the units of the state")


def which_episodes(source: Source, filters: Filters) -> tuple[int, ...]:
    """The numbers of the episodes that `filters` leave. Raises ValueError for filters that leave out steps: a replay needs them all."""
    if filters.drop_noops or filters.every > 1:
        raise ValueError("a replay needs every step that was recorded: leave drop_noops and every out")
    left = tuple(episode_numbers(source, filters).tolist())
    if not left:
        raise ValueError(f"dataset {source.path}: nothing is left of {len(source)} episodes after {filters}; loosen the filters")
    return left


def replay(source: Source, config: ReplayConfig, make: MakeSimulator = make) -> Replay:
    """Execute the recorded actions. `source`: the dataset as it is, not in a robot's language.

    Raises ValueError, before anything is executed, when scenes are missing or belong to another robot.
    """
    if config.out is not None:
        require_empty(config.out)
    if source.kind != "demonstrations":
        raise ValueError(f"dataset {source.path} holds single {source.kind}, whose actions mean nothing: there is nothing to replay")
    chosen = tuple(range(len(source))) if config.episodes is None else config.episodes
    scenes = {episode: scene_of(source, episode, config.suite) for episode in chosen}
    suites = list(dict.fromkeys(scene.suite for scene in scenes.values()))
    for suite in suites:
        resolve(suite)
    start = time.monotonic()
    size, notes = _camera_size(source)
    with _Simulators(make, size) as simulators, atomic_directory(config.out) if config.out else nullcontext() as folder:
        specs = {suite: simulators[suite].spec for suite in suites}
        for suite, spec in specs.items():
            if config.robot not in (None, spec.name):
                raise ValueError(f"{suite} simulates robot '{spec.name}', not robot='{config.robot}'; leave robot out")
        sources = {suite: _adapted(source, spec, config.layout) for suite, spec in specs.items()}
        notes += dict.fromkeys(note for spec in specs.values() for note in _differences(source, spec))
        done = []
        with progress("replaying", len(chosen), "episodes") as advance:
            for number, episode in enumerate(chosen):
                path = None if folder is None or number >= config.record else folder / "videos" / f"episode-{episode:05d}.mp4"
                done.append(_one(sources[scenes[episode].suite], episode, simulators, scenes[episode], config.tolerance, path))
                advance(1)
        found = Replay(
            source=source,
            episodes=tuple(done),
            tolerance=config.tolerance,
            out=config.out,
            notes=tuple(notes),
            versions=versions(),
            duration_s=time.monotonic() - start,
        )
        if folder is not None:
            replace_file(folder / "replay.json", json.dumps(found.to_json(), indent=2))
    return found


class _Simulators:
    """One simulator for each suite, built when first asked for."""

    def __init__(self, make: MakeSimulator, camera_size: int) -> None:
        self._make, self._size = make, camera_size
        self._running: dict[str, Simulator] = {}

    def __enter__(self) -> "_Simulators":
        return self

    def __exit__(self, *error: object) -> None:
        for suite in list(self._running):
            self.drop(suite)

    def __getitem__(self, suite: str) -> Simulator:
        if suite not in self._running:
            self._running[suite] = self._make(suite, self._size)
        return self._running[suite]

    def drop(self, suite: str) -> None:
        self._running.pop(suite).close()


def _one(source: Source, episode: int, simulators: _Simulators, scene: Scene, tolerance: float, path: Path | None) -> Replayed:
    simulator = simulators[scene.suite]
    video = None if path is None else SideBySide(path, simulator.spec.control_hz)
    facts: dict[str, Any] = {
        "episode": episode,
        "scene": scene,
        "instruction": source.tasks[int(source.task_indices(episode)[0])],
        "num_steps": int(source.lengths[episode]),
        "disturbed": is_disturbed(source, episode),
    }
    try:
        measured = replay_episode(source, episode, simulator, scene, tolerance=tolerance, video=video)
    except SimulatorError as error:
        simulators.drop(scene.suite)  # the next episode gets a new one
        if video is not None:
            video.abandon()
        return Replayed(**facts, sim_error=str(error))
    return Replayed(**facts, **measured, video=f"videos/{path.name}" if path is not None else None)


def _adapted(source: Source, spec: RobotSpec, layout: str | None) -> Source:
    """`source` in the language of the simulated robot, with every step that was recorded."""
    where = f"dataset {source.path}"
    if source.fps is not None and abs(source.fps - spec.control_hz) > 1e-3:
        raise ValueError(f"{where} has {source.fps:g} steps a second, robot '{spec.name}' {spec.control_hz:g}; replay the recording itself")
    adapted = for_robot(source, spec, layout=layout)
    if not np.array_equal(adapted.lengths, source.lengths):
        raise ValueError(f"{where}: its layout for robot '{spec.name}' drops steps, but a replay needs all of them; give layout='as-is'")
    return adapted


def _camera_size(source: Source) -> tuple[int, list[str]]:
    """Pixels of the recorded cameras, which the simulator shall have too, and a note where it cannot."""
    sizes = {camera: source.frames(0, [0], camera).shape[1:3] for camera in source.cameras}
    sides = {side for size in sizes.values() for side in size}
    if len(sides) == 1:
        return int(sides.pop()), []
    recorded = ", ".join(f"{camera} {height} x {width}" for camera, (height, width) in sizes.items()) or "no cameras"
    size = DEFAULT_CAMERA_SIZE
    return size, [f"recorded with {recorded}, replayed with {size} x {size}: pictures are not compared"]


def _differences(source: Source, spec: RobotSpec) -> list[str]:
    """How the recording's robot and programs differ from those here."""
    recording, notes, here = source.recording, [], versions()
    if recording.get("robot"):
        differences = RobotSpec.from_dict(recording["robot"]).differences(spec)
        notes += [f"robot '{spec.name}' was another when this was recorded: {'; '.join(differences)}"] if differences else []
    for name, was in recording.get("versions", {}).items():
        now = here.get(name) or here.get(name.replace("_", "-"))
        if now is not None and now != was and name in ("vla_oft", "mujoco", "robosuite"):
            notes.append(f"recorded with {name} {was}, replayed with {now}")
    return notes
