"""What an evaluation is asked to do, and the list of trials that follows from it.

Scene t of block `seed` has simulator seed FIRST_SEED + seed * SEEDS_A_RUN + t, in every family and under every condition.
Demonstrations are recorded with seeds below FIRST_SEED (`data collect` refuses others), so no evaluation scene was ever trained on.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vla_oft.evaluate.controls import CONTROLS, Condition, InstructionFilter, conditions
from vla_oft.evaluate.suite import Task, resolve

FIRST_SEED = 1_000_000_000
SEEDS_A_RUN = 100_000


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate on.

    suite: "tabletop/touch", "tabletop", or a comma-separated list. trials: episodes for each family and condition.
    seed: which block of scenes; scene t has seed FIRST_SEED + seed * SEEDS_A_RUN + t.
    num_envs: environments side by side, hence the largest batch.
    execute_steps: actions executed of each chunk; None executes all of it.
    hold_steps: control steps for which success must hold before it counts and ends the episode.
    controls: any of "swapped", "blind", "expert". record: film the first N trials of each family and condition.
    record_cameras: show beside the picture what the policy saw. precision: what the policy computes in, for the record.
    out: folder for results.jsonl, summary.json and videos/; None keeps everything in memory.
    """

    suite: str
    trials: int = 50
    seed: int = 0
    num_envs: int = 8
    execute_steps: int | None = None
    hold_steps: int = 3
    controls: tuple[str, ...] = ()
    camera_size: int = 128
    record: int = 0
    record_cameras: bool = True
    precision: str = "eager"
    out: Path | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, fix: str) -> None:
            if not ok:
                raise ValueError(f"EvalConfig: {field}={getattr(self, field)!r} {fix}")

        need(1 <= self.trials <= SEEDS_A_RUN, "trials", f"must be between 1 and {SEEDS_A_RUN}")
        need(0 <= self.seed < 10_000, "seed", "must be between 0 and 9999")
        need(self.num_envs >= 1, "num_envs", "must be positive")
        need(self.execute_steps is None or self.execute_steps >= 1, "execute_steps", "must be positive, or None for the whole chunk")
        need(self.hold_steps >= 1, "hold_steps", "must be positive")
        need(set(self.controls) <= set(CONTROLS), "controls", f"must be among {', '.join(CONTROLS)}")
        need(len(set(self.controls)) == len(self.controls), "controls", "must not repeat a name")
        need(self.camera_size >= 1, "camera_size", "must be positive")
        need(self.record >= 0, "record", "must not be negative")
        need(not self.record or self.out is not None, "record", "needs a folder for the videos: set out")
        need(not self.record or find_spec("av") is not None, "record", "needs PyAV: pip install 'vla-oft[data]'")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One trial to run. attempt: 1, or 2 when the simulator broke before; sim_error: how it broke then."""

    task: Task
    condition: Condition
    seed: int
    record: bool
    attempt: int = 1
    sim_error: str | None = None


def plan_trials(config: EvalConfig, instruction_filter: InstructionFilter | None = None) -> list[Plan]:
    """Every trial of an evaluation: condition by condition, family by family, seed by seed."""
    tasks = resolve(config.suite)
    first = FIRST_SEED + config.seed * SEEDS_A_RUN
    by_task = {task: conditions(task, config.controls, instruction_filter) for task in tasks}
    return [
        Plan(task=task, condition=by_task[task][c], seed=first + t, record=t < config.record and not by_task[task][c].expert)
        for c in range(1 + len(config.controls))
        for task in tasks
        for t in range(config.trials)
    ]
