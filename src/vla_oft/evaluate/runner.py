"""Closed-loop evaluation: one policy, many seeded scenes, queried in batches.

    round     1            2            3
    env 0   o|aaaaaaaa|  o|aaaaS|     o|aaaaaaaa|     a finished environment takes the next trial
    env 1   o|aaaaaaaa|  o|aaaaaaaa|  o|aaaa...
            ^ one call of `act` with `num_envs` observations a round

One process: rendering once a chunk is cheap, and a batch costs a policy little more than one observation.
Every trial depends on its seed alone, so the number of environments changes the speed, not the outcome.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from rich.console import Console

from vla_oft.evaluate.controls import InstructionFilter
from vla_oft.evaluate.episode import Episode, blamed_on_simulator, trial_row
from vla_oft.evaluate.latency import Query
from vla_oft.evaluate.plan import EvalConfig, Plan, plan_trials
from vla_oft.evaluate.results import Results, ResultsWriter, Trial
from vla_oft.evaluate.suite import Task
from vla_oft.evaluate.tally import Count, tally
from vla_oft.evaluate.versions import versions
from vla_oft.evaluate.video import Mp4, Recorder
from vla_oft.sims.base import Simulator, SimulatorError
from vla_oft_client import ActionChunk, Observation, RobotSpec

TOLERATED_LOSSES = 2  # lost trials are chance ...
TOLERATED_SHARE = 0.05  # ... up to this part of all; beyond, what is left may be the easy scenes


class Actor(Protocol):
    """Whatever answers observations with chunks of actions: a `Policy`, a client of a server, a script."""

    def act(self, observations: Sequence[Observation], /) -> list[ActionChunk]:
        """One chunk for each observation."""
        ...


def evaluate(
    actor: Actor,
    config: EvalConfig,
    *,
    instruction_filter: InstructionFilter | None = None,
    checkpoint: str | None = None,
    console: Console | None = None,
) -> Results:
    """Run every trial and return the results.

    instruction_filter: changes what the policy hears, never what it is judged by. checkpoint: fingerprint for the record.
    Raises ValueError for an impossible request, SimulatorError when the simulator loses more than 5 % of the trials (at least
    3) or every one of the first 3, and whatever `actor` raises; what was measured until then is in `config.out`.
    """
    plans = plan_trials(config, instruction_filter)
    run = _Run(actor, config, len(plans))
    start_s, stopped = time.perf_counter(), None
    try:
        with tally(len(plans), console) as run.count:
            run.policy_trials(p for p in plans if not p.condition.expert)
            run.expert_trials(p for p in plans if p.condition.expert)
    except BaseException as error:
        stopped = f"{type(error).__name__}: {error}"
        raise
    finally:
        run.close()
        results = Results(
            config={**dataclasses.asdict(config), "out": str(config.out) if config.out else None},
            trials=in_order(run.trials, plans),
            queries=tuple(run.queries),
            versions=versions(),
            wall_s=time.perf_counter() - start_s,
            checkpoint=checkpoint,
            stopped=stopped,
        )
        run.writer.close(results)
    return results


def in_order(trials: Iterable[Trial], plans: Sequence[Plan]) -> tuple[Trial, ...]:
    """`trials` as planned rather than as they ended, so that results do not depend on the number of environments."""
    place = {(p.task, p.condition.name, p.seed): i for i, p in enumerate(plans)}
    return tuple(sorted(trials, key=lambda t: place[Task(t.suite, t.family), t.condition, t.seed]))


class _Slot:
    """One place in the batch: a simulator, and the episode that runs in it."""

    def __init__(self) -> None:
        self.env: Simulator | None = None
        self.task: Task | None = None
        self.plan: Plan | None = None
        self.episode: Episode | None = None

    def begin(self, plan: Plan, config: EvalConfig) -> Episode:
        self.plan = plan
        if self.env is None or self.task != plan.task:
            self.close()
            with blamed_on_simulator():
                self.env, self.task = plan.task.make(config.camera_size), plan.task
        assert self.env is not None
        recorder = None
        if plan.record and config.out is not None:
            path = config.out / "videos" / f"{plan.task.simulator}-{plan.task.family}-{plan.condition.name}-{plan.seed}.mp4"
            control_hz = self.env.spec.control_hz
            recorder = Recorder(Mp4(path, control_hz), control_hz=control_hz, show_cameras=config.record_cameras)
        self.episode = Episode(plan, self.env, hold_steps=config.hold_steps, recorder=recorder)
        return self.episode

    def close(self) -> None:
        """Free the simulator; a broken one may not even manage that."""
        env, self.env = self.env, None
        if self.episode is not None:
            self.episode.abandon()
            self.episode = None
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


class _Run:
    """The state of an evaluation while it runs."""

    def __init__(self, actor: Actor, config: EvalConfig, total: int) -> None:
        self.actor, self.config, self.total = actor, config, total
        self.writer = ResultsWriter(config.out)
        self.count: Count = lambda trial: None
        self.trials: list[Trial] = []
        self.queries: list[Query] = []
        self.queue: deque[Plan] = deque()
        self.slots = [_Slot() for _ in range(min(config.num_envs, total))]

    def policy_trials(self, plans: Iterable[Plan]) -> None:
        """Rounds of observe, act and execute until every trial has ended."""
        self.queue.extend(plans)
        while True:
            asked = []
            for slot in self.slots:
                with self._repaired(slot):
                    if slot.episode is None and self.queue:
                        slot.begin(self.queue.popleft(), self.config)
                    if slot.episode is not None:
                        asked.append((slot, slot.episode, slot.episode.observe()))
            if asked:
                chunks = self._ask([o for _, _, o in asked], [e.env.spec for _, e, _ in asked])
                for (slot, episode, _), actions in zip(asked, chunks, strict=True):
                    episode.latency_ms.append(self.queries[-1].ms)
                    with self._repaired(slot):
                        if episode.execute(actions):
                            self._finish(slot, episode)
            elif not self.queue:
                return

    def expert_trials(self, plans: Iterable[Plan]) -> None:
        """The scripted expert sees the simulator itself and acts one step at a time."""
        self.queue.extend(plans)
        slot = self.slots[0]
        while self.queue:
            with self._repaired(slot):
                episode = slot.begin(self.queue.popleft(), self.config)
                make_expert = episode.plan.condition.expert
                assert make_expert is not None
                with blamed_on_simulator():
                    expert = make_expert(episode.env)
                while not episode.done:
                    with blamed_on_simulator():
                        action = expert()
                    episode.execute(np.asarray(action, np.float32)[None])
                self._finish(slot, episode)

    def close(self) -> None:
        for slot in self.slots:
            slot.close()

    def _ask(self, observations: list[Observation], specs: list[RobotSpec]) -> list[np.ndarray]:
        """One call of the policy; each answer checked and cut to the actions that will be executed, (n, D)."""
        start_s = time.perf_counter()
        chunks = self.actor.act(observations)
        self.queries.append(Query(len(observations), 1000 * (time.perf_counter() - start_s)))
        if len(chunks) != len(observations):
            raise ValueError(f"the policy answered {len(observations)} observations with {len(chunks)} chunks")
        steps = self.config.execute_steps
        shortest = min(len(c) for c in chunks)
        if steps is not None and steps > shortest:
            raise ValueError(f"execute_steps={steps}, but the policy's chunks have {shortest} actions")
        return [c.check(spec).actions[:steps] for c, spec in zip(chunks, specs, strict=True)]

    def _finish(self, slot: _Slot, episode: Episode) -> None:
        slot.episode = None
        self._add(episode.trial(self.config.out))

    @contextlib.contextmanager
    def _repaired(self, slot: _Slot) -> Iterator[None]:
        """When the simulator breaks, repeat the trial once with a fresh one; after that, report it as broken."""
        try:
            yield
        except SimulatorError as error:
            slot.close()
            plan = slot.plan
            assert plan is not None
            if plan.attempt == 1:
                self.queue.appendleft(replace(plan, attempt=2, sim_error=str(error)))
                return
            self._add(trial_row(plan, sim_error=str(error)))
            self._stop_if_hopeless(error)

    def _stop_if_hopeless(self, error: SimulatorError) -> None:
        lost = sum(t.success is None for t in self.trials)
        if lost <= TOLERATED_LOSSES:
            return
        if lost == len(self.trials):
            raise SimulatorError(f"no trial could be run, the last one failed with: {error}") from error
        if lost > TOLERATED_SHARE * self.total:
            kept = f"; what was measured is in {self.config.out}" if self.config.out else ""
            raise SimulatorError(f"the simulator broke in {lost} of {self.total} trials, twice each, lastly with: {error}{kept}") from error

    def _add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.writer.add(trial)
        self.count(trial)
