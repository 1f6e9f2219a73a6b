"""Random scenes with grounding masks: single pictures, each with several instructions, to learn where the named things are.

One scene is one short episode whose frames show the same picture under different instructions, so that video compression stores the
picture once. Actions are zero and, in a dataset of kind "scenes", never valid.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_oft.atomic import require_empty
from vla_oft.collect.episodes import grounding, stack_answers
from vla_oft.collect.workers import (
    Collected,
    MakeSimulator,
    check_seeds,
    in_order,
    open_pool,
    provenance,
    simulator_of,
    try_out,
)
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Block, Episode, encode
from vla_oft.progress import progress
from vla_oft.sims.base import Simulator
from vla_oft.sims.base import make as make_simulator

SCENES_PER_BLOCK = 64
"""Encoded together: starting an encoder costs as much as several frames."""


class SceneSimulator(Simulator, Protocol):
    """A simulator whose scene can be looked at from any pose and under any instruction."""

    @property
    def objects(self) -> Sequence[object]:
        """Whatever an instruction can name."""
        ...

    def randomize_pose(self, rng: np.random.Generator) -> None:
        """Put the robot somewhere plausible."""
        ...

    def set_instruction(self, family: str, target: int, other: int) -> None:
        """Name another object (and destination) of the present scene."""
        ...


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What to render: `scenes` scenes, spread over the families of `suite`, each with up to `instructions` different instructions."""

    suite: tuple[str, ...]
    scenes: int
    seed: int
    out: Path
    grounding_patches: int
    instructions: int = 4
    camera_size: int = 128
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.suite or self.scenes < 1 or self.instructions < 1:
            raise ValueError(f"nothing to render: suite={self.suite!r}, scenes={self.scenes}, instructions={self.instructions}")
        if len({name.partition("/")[0] for name in self.suite}) > 1:
            raise ValueError(f"scenes of different simulators cannot share a dataset: {self.suite}")
        check_seeds(self.seed, self.seed + self.scenes - 1)


def collect_scenes(config: SceneConfig, make: MakeSimulator = make_simulator) -> Collected:
    """Render the scenes into the dataset `config.out`."""
    require_empty(config.out)
    spec = try_out(config.suite[:1], config.camera_size, config.seed, make)
    start, num_frames = time.monotonic(), 0
    blocks = [range(first, min(first + SCENES_PER_BLOCK, config.scenes)) for first in range(0, config.scenes, SCENES_PER_BLOCK)]
    with ExitStack() as stack:
        writer = stack.enter_context(LeRobotWriter(config.out, spec, kind="scenes", provenance=provenance(config)))
        advance = stack.enter_context(progress("rendering", config.scenes, "scenes"))
        pool = stack.enter_context(open_pool(config.workers))
        for block in in_order(pool, partial(_render, config, make), blocks):
            writer.append(block)
            num_frames += sum(len(episode) for episode in block.episodes)
            advance(len(block.episodes))
    duration_s = time.monotonic() - start
    return Collected(out=config.out, num_episodes=config.scenes, num_frames=num_frames, num_failed=0, duration_s=duration_s)


def _render(config: SceneConfig, make: MakeSimulator, scenes: range) -> Block:
    simulator: SceneSimulator = simulator_of(config.suite[0], config.camera_size, make)  # type: ignore[assignment]
    families = [name.partition("/")[2] for name in config.suite]
    episodes = [_scene(config, simulator, families, scene) for scene in scenes]
    return encode(episodes, simulator.spec.control_hz, keyint=config.instructions)  # the same picture again costs nothing


def _scene(config: SceneConfig, simulator: SceneSimulator, families: list[str], scene: int) -> Episode:
    rng = np.random.default_rng([config.seed, scene])
    simulator.reset(config.seed + scene)
    simulator.randomize_pose(rng)
    observation = simulator.observe()
    found: dict[str, dict[str, np.ndarray]] = {}
    for family, target, other in _combinations(rng, families, len(simulator.objects), config.instructions):
        simulator.set_instruction(family, target, other)
        if simulator.instruction not in found:
            found[simulator.instruction] = grounding(simulator, config.grounding_patches)
    count = len(found)
    return Episode(
        images={camera: np.repeat(observation.images[camera][None], count, axis=0) for camera in simulator.spec.cameras},
        states=None if observation.state is None else np.repeat(observation.state[None], count, axis=0),
        actions=np.zeros((count, simulator.spec.action_dim), np.float32),
        instructions=list(found),
        extras=stack_answers(list(found.values())),
        info={"suite": config.suite[0].partition("/")[0], "seed": config.seed + scene},
    )


def _combinations(rng: np.random.Generator, families: list[str], num_objects: int, count: int) -> Iterator[tuple[str, int, int]]:
    """Random (family, target, other object): different targets first, so that the same picture asks for different things."""
    targets = rng.permutation(num_objects)
    for i in range(count):
        target = int(targets[i % num_objects])
        other = int(rng.choice([j for j in range(num_objects) if j != target])) if num_objects > 1 else target
        yield families[int(rng.integers(len(families)))], target, other
