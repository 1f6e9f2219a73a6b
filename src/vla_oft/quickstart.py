"""The main job in one command on a CPU: demonstrations -> OFT fine-tuning of a pretrained policy -> closed-loop evaluation -> report.

out/demos/       50 demonstrations (LeRobot v3.0), by default of a task family that the shipped base policy has never seen
out/run/         the fine-tuning run and its checkpoint
out/eval/        every rollout, with videos; out/eval-base/, out/eval-untrained/: the same scenes for comparison
out/report.html  all of it on one page
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from vla_oft.atomic import require_empty
from vla_oft.evaluate.command import fingerprint
from vla_oft.evaluate.plan import FIRST_SEED, SEEDS_A_RUN, EvalConfig
from vla_oft.evaluate.reading import MEDIA_NOTE, condition_rows, facts, interval, media, reading, success_rows, tiles
from vla_oft.evaluate.report import ActionPlot, Report, SuccessRow, Tile, read_metrics, write_report
from vla_oft.evaluate.results import Results
from vla_oft.evaluate.runner import evaluate
from vla_oft.evaluate.success import separated
from vla_oft.evaluate.table import print_table
from vla_oft.policy import Policy
from vla_oft.recipes import base as recipes
from vla_oft.recipes import nano_finetune
from vla_oft.recipes.nano_base import HELD_OUT
from vla_oft.sims.experts.tabletop import Expert
from vla_oft.sims.rendering import check_renderer
from vla_oft.sims.tabletop import FAMILIES, TabletopEnv
from vla_oft.train.loop import train

ACTION_NAMES = ("x", "y", "z", "gripper")
ACTION_DIMS = (0, 1, 2, 6)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """out: folder for everything. task: family of the tabletop simulator. trials: evaluation episodes per condition.

    seed: block of evaluation scenes. episodes: demonstrations. steps: of fine-tuning.
    """

    out: Path
    task: str = nano_finetune.HELD_OUT
    trials: int = 100
    seed: int = 7
    episodes: int = nano_finetune.EPISODES
    steps: int = nano_finetune.STEPS


def run(config: QuickstartConfig) -> Path:
    """Do everything; returns the report. Raises ValueError before any work when something is missing."""
    require_empty(config.out)
    if config.task not in FAMILIES:
        raise ValueError(f"task '{config.task}' is unknown; choose one of {', '.join(FAMILIES)}")
    check_renderer()
    if not (nano_finetune.BASE / "policy.json").is_file():
        raise ValueError(
            f"the pretrained base policy is missing at {nano_finetune.BASE}; train it with `vla-oft train nano_base` and copy it there"
        )
    console, timing = Console(stderr=True), {}

    recipe = nano_finetune.recipe(config.task, config.out / "demos", episodes=config.episodes, steps=config.steps)
    with _stage(console, timing, "demonstrations"):
        recipes.generate(recipe, recipe.train)
    with _stage(console, timing, "fine-tuning"):
        checkpoint = train(recipe.train, config.out / "run")
    with _stage(console, timing, "evaluation"):
        tuned = Policy.load(checkpoint)
        results = evaluate(
            tuned, _eval_config(config, "eval", ("swapped", "blind", "expert"), record=4), checkpoint=fingerprint(checkpoint)
        )
        base = evaluate(Policy.load(nano_finetune.BASE, dtype=torch.float32), _eval_config(config, "eval-base", (), record=0))
        untrained_policy = Policy.create(tuned.config, tuned.statistics, tuned.tokenizer, seed=0).eval()
        untrained = evaluate(untrained_policy, _eval_config(config, "eval-untrained", (), record=0))
    with _stage(console, timing, "report"):
        rows = _rows(results, base, untrained)
        report = write_report(config.out / "report.html", _report(config, rows, results, tuned, timing))
    print_table(rows, console=console)
    console.print(f"{sum(timing.values()):.0f} s in all: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timing.items()))
    print(report)
    return report


def _eval_config(config: QuickstartConfig, folder: str, controls: tuple[str, ...], *, record: int) -> EvalConfig:
    return EvalConfig(
        suite=f"tabletop/{config.task}", trials=config.trials, seed=config.seed, controls=controls, record=record, out=config.out / folder
    )


def _rows(results: Results, base: Results, untrained: Results) -> tuple[SuccessRow, ...]:
    def control(label: str, run: Results) -> SuccessRow:
        (row,) = condition_rows(run, "normal")
        return dataclasses.replace(row, group="Same scenes, other policies", label=label, role="control")

    return (*success_rows(results), control("base policy, not fine-tuned", base), control("untrained policy", untrained))


def _report(config: QuickstartConfig, rows: tuple[SuccessRow, ...], results: Results, policy: Policy, timing: dict[str, float]) -> Report:
    parameters = sum(p.numel() for p in policy.parameters())
    untrained = rows[-1].success
    past = "other task families" if config.task == HELD_OUT else "this and other task families"
    return Report(
        title=f"{config.task}: from demonstrations to a policy",
        lead=(
            f"A vision-language-action policy of {parameters / 1e6:.1f} M parameters, pretrained on {past}, fine-tuned with OFT on "
            f"{config.episodes} demonstrations of {config.task}, then tested in scenes that it had never seen."
        ),
        tiles=(*tiles(results), Tile(value=f"{sum(timing.values()) / 60:.1f} min", label="for everything on this page")),
        reading=(
            *reading(results),
            f"An untrained policy succeeded in {untrained.successes} of {untrained.episodes} ({interval(untrained)}); "
            + ("the intervals do not overlap." if separated(results.success, untrained) else "the intervals overlap: nothing was shown."),
        ),
        success=rows,
        metrics=read_metrics(config.out / "run" / "metrics.jsonl"),
        actions=(_action_plot(config, policy),),
        media=media(results, config.out / "eval"),
        media_note=MEDIA_NOTE,
        timing=timing,
        facts=facts(results),
        command=(
            f"vla-oft quickstart --task {config.task} --trials {config.trials} --seed {config.seed} "
            f"--episodes {config.episodes} --steps {config.steps}"
        ),
    )


def _action_plot(config: QuickstartConfig, policy: Policy) -> ActionPlot:
    """The policy's chunks beside the expert's actions, on an episode that the expert drives."""
    seed = FIRST_SEED + config.seed * SEEDS_A_RUN
    env = TabletopEnv(config.task)
    env.reset(seed)
    expert, predicted, wanted = Expert(env), [], []
    chunk_len = policy.config.chunk_len
    while not env.outcome().success and len(wanted) < env.max_steps:
        if len(wanted) % chunk_len == 0:
            predicted.append(policy.act([env.observe()])[0].actions)
        wanted.append(expert())
        env.step(wanted[-1])
    env.close()
    dims = list(ACTION_DIMS)
    return ActionPlot(
        title=f"scene {seed}: each chunk of {chunk_len} predicted from one observation",
        names=ACTION_NAMES,
        predicted=np.concatenate(predicted)[: len(wanted), dims],
        expert=np.stack(wanted)[:, dims],
    )


@contextmanager
def _stage(console: Console, timing: dict[str, float], name: str) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold]")
    start = time.monotonic()
    yield
    timing[name] = time.monotonic() - start
