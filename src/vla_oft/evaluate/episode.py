"""One trial in one simulator, from reset to verdict.

observe()   o        o        o              the policy looks once a chunk
execute()   |aaaaaaaa|aaaaaaaa|aaaaSSS|      and its actions run open loop; a success must hold for `hold_steps` S

A success that begins by `max_steps` is given the steps beyond that it needs to be confirmed:

            |aaaaaaaa|aaaaaaaS|SS|           max_steps = 16, hold_steps = 3
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.evaluate.controls import chose_original
from vla_oft.evaluate.plan import Plan
from vla_oft.evaluate.results import Trial
from vla_oft.evaluate.video import HEIGHT, WIDTH, Recorder
from vla_oft.sims.base import Outcome, Simulator, SimulatorError
from vla_oft_client import Observation, RobotSpec


class Episode:
    """Runs a `Plan`. Every method raises SimulatorError when the simulator broke, whatever it raised itself."""

    def __init__(self, plan: Plan, env: Simulator, *, hold_steps: int, recorder: Recorder | None) -> None:
        self.plan, self.env, self.recorder = plan, env, recorder
        self.hold_steps = hold_steps
        self.steps = self.held = 0
        self.latency_ms: list[float] = []
        with blamed_on_simulator():
            env.reset(plan.seed)
            self.original = env.instruction
            if plan.condition.swap:
                env.reset(plan.seed, swap=plan.condition.swap)
            self.task = env.instruction
            self.outcome: Outcome = env.outcome()
        listen = plan.condition.listen
        self.instruction = listen(self.task) if listen else self.task
        self._cameras: dict[str, np.ndarray] = {}

    @property
    def done(self) -> bool:
        """Whether the verdict is final."""
        return self.held >= self.hold_steps or (self.steps >= self.env.max_steps and not self.held)

    def observe(self) -> Observation:
        """What the policy sees and hears now."""
        with blamed_on_simulator():
            observation = self.env.observe().check(self.env.spec)
        self._cameras = observation.images
        if self.steps == 0:
            self._record()
        return replace(observation, instruction=self.instruction)

    def execute(self, actions: np.ndarray) -> bool:
        """Run actions (n, D) in robot units until they are used up or the trial is over; returns `done`."""
        for action in executable(self.env.spec, actions):
            with blamed_on_simulator():
                self.env.step(action)
                self.outcome = self.env.outcome()
            self.steps += 1
            self.held = self.held + 1 if self.outcome.success else 0
            self._record()
            if self.done:
                break
        return self.done

    def trial(self, out: Path | None) -> Trial:
        """The finished row; closes the recording."""
        outcome, chosen = self.outcome, self.outcome.chosen
        if self.recorder is not None:
            self.recorder.finish(describe(outcome), outcome.success)
        original = chosen is not None and chose_original(chosen, self.original, self.task)
        return trial_row(
            self.plan,
            task=self.task,
            instruction=self.instruction,
            success=outcome.success,
            chosen=chosen,
            correct=outcome.correct,
            chose_original=original if self.plan.condition.swap else None,
            steps=self.steps - self.held + 1 if outcome.success else min(self.steps, self.env.max_steps),
            latency_ms=tuple(round(ms, 3) for ms in self.latency_ms),
            video=str(self.recorder.sink.path.relative_to(out)) if self.recorder is not None and out is not None else None,
        )

    def abandon(self) -> None:
        """Close the recording of an episode that the simulator broke."""
        if self.recorder is not None:
            self.recorder.sink.close()
            self.recorder.sink.path.unlink(missing_ok=True)

    def _record(self) -> None:
        if self.recorder is not None:
            with blamed_on_simulator():
                picture = self.env.frame(HEIGHT, WIDTH)
            self.recorder.add(picture, self.instruction, self._cameras, self.steps * self.env.spec.period_s)


def trial_row(plan: Plan, *, sim_error: str | None = None, **measured: Any) -> Trial:
    """The row of `plan`; without measurements, that of a trial which the simulator broke for good."""
    unknown = {"task": "", "instruction": "", "success": None, "chosen": None, "correct": None, "chose_original": None, "steps": 0}
    return Trial(
        suite=plan.task.simulator,
        family=plan.task.family,
        condition=plan.condition.name,
        seed=plan.seed,
        attempts=plan.attempt,
        sim_error=sim_error or plan.sim_error,
        **{**unknown, **measured},
    )


def executable(spec: RobotSpec, actions: np.ndarray) -> np.ndarray:
    """Actions as a robot would execute them: binary grippers snapped to their nearer command, everything within limits."""
    low, high = np.array(spec.action_limits, np.float32).T
    actions = np.clip(actions, low, high)
    for gripper in spec.gripper:
        if gripper.binary:
            value = actions[:, gripper.index]
            actions[:, gripper.index] = np.where(abs(value - gripper.open) < abs(value - gripper.closed), gripper.open, gripper.closed)
    return actions


def describe(outcome: Outcome) -> str:
    """The verdict in a few words."""
    if outcome.success:
        return "success"
    if outcome.correct is False:
        return f"failed: chose {outcome.chosen}"
    return "failed"


@contextlib.contextmanager
def blamed_on_simulator() -> Iterator[None]:
    """Turn whatever a simulator raises into a SimulatorError, so that it is never counted against the policy."""
    try:
        yield
    except SimulatorError:
        raise
    except Exception as error:
        raise SimulatorError(f"{type(error).__name__}: {error}") from error
