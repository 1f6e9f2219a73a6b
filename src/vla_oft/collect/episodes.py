"""Demonstrations of a scripted expert, disturbed so that the policy also sees how to recover (DART, Laskey et al. 2017).

the arm executes   expert's action + noise      -> it drifts to where a learned policy also will
the dataset holds  expert's action              -> what would have been right there
and `disturbed`, 1 where the two differ: later actions of a chunk answer a disturbance that nobody could foresee, and do not train.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from zlib import crc32

import numpy as np

from vla_oft.atomic import require_empty
from vla_oft.collect.workers import (
    Collected,
    MakeExpert,
    MakeSimulator,
    check_seeds,
    in_order,
    make_expert,
    open_pool,
    provenance,
    simulator_of,
    try_out,
)
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Block, Episode, encode
from vla_oft.data.table import DISTURBED
from vla_oft.progress import progress
from vla_oft.sims.base import Simulator
from vla_oft.sims.base import make as make_simulator
from vla_oft_client import RobotSpec


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Disturbance of the executed action, in action units, on the position dimensions.

    std: white noise on every step. hold_probability: chance per step that a push of standard deviation hold_std begins;
    it lasts 1..hold_steps steps.
    """

    std: float = 0.0
    hold_probability: float = 0.0
    hold_std: float = 0.5
    hold_steps: int = 6

    def __post_init__(self) -> None:
        if self.std < 0 or self.hold_std < 0 or not 0 <= self.hold_probability <= 1 or self.hold_steps < 1:
            raise ValueError(f"noise needs std, hold_std >= 0, hold_probability in [0, 1], hold_steps >= 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to record.

    suite: SIMULATOR/FAMILY, one or several. episodes: successful episodes of each. seed: attempt i of every suite uses the scene seed + i;
    seeds from SEED_LIMIT on are kept for evaluation.
    camera_size: pixels (square). grounding_patches: also record which of P x P patches show the named object and the destination.
    settle_steps: steps recorded after success, so that a policy learns to stop calmly. workers: processes, 0 for none.
    """

    suite: tuple[str, ...]
    episodes: int
    seed: int
    out: Path
    camera_size: int = 128
    noise: Noise = field(default_factory=Noise)
    grounding_patches: int | None = None
    settle_steps: int = 3
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.suite or self.episodes < 1:
            raise ValueError(f"nothing to record: suite={self.suite!r}, episodes={self.episodes}; name a suite and at least one episode")
        check_seeds(self.seed, self.seed + self.episodes + self.max_failures - 1)

    @property
    def max_failures(self) -> int:
        """Attempts of one suite that may fail: more mean a broken expert."""
        return 20 + self.episodes


def collect(config: CollectConfig, make: MakeSimulator = make_simulator, expert: MakeExpert = make_expert) -> Collected:
    """Record `config.episodes` successful episodes of every suite into the dataset `config.out`.

    `make` and `expert` build what runs in the recording processes; both must be importable from there.
    """
    require_empty(config.out)
    spec = try_out(config.suite, config.camera_size, config.seed, make)
    start, num_failed, num_frames = time.monotonic(), 0, 0
    with ExitStack() as stack:
        writer = stack.enter_context(LeRobotWriter(config.out, spec, provenance=provenance(config)))
        advance = stack.enter_context(progress("recording", config.episodes * len(config.suite), "episodes"))
        pool = stack.enter_context(open_pool(config.workers))
        for suite in config.suite:
            for block in _attempts(config, suite, partial(_attempt, config, suite, make, expert), pool):
                if block is None:
                    num_failed += 1
                    continue
                writer.append(block)
                num_frames += len(block.episodes[0])
                advance(1, f"({num_failed} failed)")
        num_episodes = writer.num_episodes
    duration_s = time.monotonic() - start
    return Collected(out=config.out, num_episodes=num_episodes, num_frames=num_frames, num_failed=num_failed, duration_s=duration_s)


def _attempts(
    config: CollectConfig, suite: str, attempt: Callable[[int], Block | None], pool: ProcessPoolExecutor | None
) -> Iterator[Block | None]:
    """All attempts, in the order of their seeds, until enough succeeded; None where the expert failed."""
    missing, failed = config.episodes, 0
    attempts = in_order(pool, attempt, (config.seed + i for i in count()))
    try:
        for block in attempts:
            yield block
            failed, missing = failed + (block is None), missing - (block is not None)
            if not missing:
                return
            if failed >= config.max_failures:
                raise ValueError(f"the expert of {suite} failed {failed} times: lower noise.std={config.noise.std}, or fix the expert")
    finally:
        attempts.close()


def _attempt(config: CollectConfig, suite: str, make: MakeSimulator, expert: MakeExpert, seed: int) -> Block | None:
    simulator = simulator_of(suite, config.camera_size, make)
    episode = record_episode(config, suite, simulator, expert, seed)
    return None if episode is None else encode([episode], simulator.spec.control_hz)


def record_episode(config: CollectConfig, suite: str, simulator: Simulator, make_expert: MakeExpert, seed: int) -> Episode | None:
    """One attempt of the expert; None when it does not end in success."""
    simulator.reset(seed)
    act = make_expert(suite, simulator)
    spec = simulator.spec
    disturb = Disturbance(config.noise, spec, np.random.default_rng([seed, crc32(suite.encode())]))
    observations, actions, answers, disturbed = [], [], [], []
    calm_steps = 0
    for _ in range(simulator.max_steps + config.settle_steps):
        succeeded = simulator.outcome().success
        if (succeeded and calm_steps == config.settle_steps) or (not succeeded and len(actions) >= simulator.max_steps):
            break
        calm_steps += succeeded
        observations.append(simulator.observe())
        if config.grounding_patches is not None:
            answers.append(grounding(simulator, config.grounding_patches))
        action = np.asarray(act(), np.float32)
        actions.append(action)
        executed = action if succeeded else disturb(action)
        disturbed.append([not np.array_equal(executed, action)])
        simulator.step(executed)
    if not simulator.outcome().success:
        return None
    return Episode(
        images={camera: np.stack([o.images[camera] for o in observations]) for camera in spec.cameras},
        states=np.stack([o.state for o in observations]) if spec.state_dim else None,  # type: ignore[misc]
        actions=np.stack(actions),
        instructions=simulator.instruction,
        extras={**stack_answers(answers), DISTURBED: np.array(disturbed, np.uint8)},
        info={"suite": suite, "seed": seed},
    )


def grounding(simulator: Simulator, patches: int) -> dict[str, np.ndarray]:
    """What the named object and its destination look like and where they are.

    grounding: uint8 (V, 2, P, P), the patches of each camera that show them; landmarks: float32 (2, 3), their positions in metres.
    """
    masks = simulator.patch_masks(patches)  # type: ignore[attr-defined]
    shown = np.stack([masks[camera] for camera in simulator.spec.cameras]).astype(np.uint8)
    return {"grounding": shown, "landmarks": simulator.landmarks()}  # type: ignore[attr-defined]


def stack_answers(answers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One array per name from one dict per step."""
    return {name: np.stack([answer[name] for answer in answers]) for name in (answers[0] if answers else {})}


class Disturbance:
    """Adds noise to actions, never beyond the robot's limits."""

    def __init__(self, noise: Noise, spec: RobotSpec, rng: np.random.Generator) -> None:
        grippers = {g.index for g in spec.gripper}
        arm = [dim for dim in range(spec.action_dim) if dim not in grippers]
        self.dims = arm[:3] if spec.action_kind.endswith("_ee") else arm
        self.limits = np.asarray(spec.action_limits, np.float32)
        self.noise, self.rng = noise, rng
        self.push, self.steps_left = np.zeros(len(self.dims)), 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        noise, size = self.noise, len(self.dims)
        if self.steps_left == 0 and self.rng.random() < noise.hold_probability:
            self.push, self.steps_left = self.rng.normal(0, noise.hold_std, size), int(self.rng.integers(1, noise.hold_steps + 1))
        executed = action.copy()
        executed[self.dims] += self.rng.normal(0, noise.std, size) if noise.std else 0
        if self.steps_left:
            executed[self.dims] += self.push
            self.steps_left -= 1
        return np.clip(executed, self.limits[:, 0], self.limits[:, 1])
