"""From `Results` to what a person reads: rows, headline numbers and sentences that claim no more than was measured."""

from pathlib import Path

from vla_oft.evaluate import latency
from vla_oft.evaluate.plan import FIRST_SEED
from vla_oft.evaluate.report import Media, Report, SuccessRow, Tile
from vla_oft.evaluate.results import Results, Trial
from vla_oft.evaluate.success import interval, separated

HEADINGS = {
    "normal": "As instructed",
    "swapped": "Another object named (swapped)",
    "blind": "Its words removed at test time (blind)",
    "expert": "Scripted expert (reads the simulator's state)",
}
ROLES = {"normal": "policy", "expert": "ceiling"}


MEDIA_NOTE = "The first scenes of each task, not a selection. On the right, what the policy saw when it last looked."


def success_rows(results: Results) -> tuple[SuccessRow, ...]:
    """The bars of every condition."""
    return tuple(row for condition in results.conditions() for row in condition_rows(results, condition))


def condition_rows(results: Results, condition: str) -> list[SuccessRow]:
    """One bar for each family, and one for all of them where there are several."""
    families = list(dict.fromkeys(t.key for t in results.trials if t.condition == condition))
    rows = []
    for family in [*families, *([None] if len(families) > 1 else [])]:
        score = results.score(condition, family)
        rows.append(
            SuccessRow(
                group=HEADINGS[condition],
                label=family or "all tasks",
                success=score.success,
                correct=score.correct,
                mean_steps=score.mean_steps,
                sim_errors=score.sim_errors,
                role=ROLES.get(condition, "control"),
                total=family is None,
            )
        )
    return rows


def tiles(results: Results) -> tuple[Tile, ...]:
    """Headline numbers."""
    rate, speed = results.success, latency.summarize(results.queries)
    found = []
    if rate.value is not None:
        label = f"success, {rate.successes} of {rate.episodes} episodes; 95 % interval {interval(rate)}"
        found.append(Tile(value=f"{100 * rate.value:.0f} %", label=label))
    correct = results.score().correct
    if correct.value is not None:
        label = f"right object among the {correct.episodes} chosen; 95 % interval {interval(correct)}"
        found.append(Tile(value=f"{100 * correct.value:.0f} %", label=label))
    if speed is not None:
        found.append(
            Tile(
                value=f"{speed.p50_ms:.0f} ms",
                label=f"median query, batches of {speed.mean_batch:.1f} on average; 99th percentile {speed.p99_ms:.0f} ms",
            )
        )
    return tuple(found)


def reading(results: Results) -> tuple[str, ...]:
    """What the numbers mean, and what they do not."""
    normal, lines = results.success, []
    if normal.episodes:
        lines.append(
            f"The policy succeeded in {normal.successes} of {normal.episodes} episodes. "
            f"Over scenes drawn anew, the 95 % interval is {interval(normal)}."
        )
    if "swapped" in results.conditions():
        lines.append(_swapped(results))
    if "blind" in results.conditions():
        lines.append(_blind(results))
    if "expert" in results.conditions():
        expert = results.score("expert").success
        lines.append(
            f"The scripted expert, which reads the simulator's state instead of looking, "
            f"succeeded in {expert.successes} of {expert.episodes} ({interval(expert)})."
        )
    broken = sum(t.success is None for t in results.trials)
    if broken:
        lines.append(_broken(results, broken))
    seeds = [t.seed for t in results.trials]
    if seeds:
        lines.append(
            f"Scenes have seeds {min(seeds)} to {max(seeds)}, the same under every condition; "
            f"demonstrations with seeds below {FIRST_SEED} share none of them."
        )
    lines.append("One trained policy was measured: how much another training run would differ is not part of any interval.")
    if results.stopped:
        lines.append(f"The evaluation stopped early: {results.stopped}.")
    return tuple(lines)


def media(results: Results, out: Path) -> tuple[Media, ...]:
    """The recordings of an evaluation whose output folder is `out`."""
    return tuple(Media(path=out / t.video, caption=t.instruction, verdict=_verdict(t), good=t.success) for t in results.trials if t.video)


def facts(results: Results) -> dict[str, dict[str, str]]:
    """Configuration and versions, as tables."""
    config = {k: ", ".join(v) if isinstance(v, tuple | list) else str(v) for k, v in results.config.items() if v is not None}
    if results.checkpoint:
        config = {"checkpoint": results.checkpoint, **config}
    return {"Evaluation": config, "Versions": results.versions}


def latency_line(results: Results) -> str | None:
    """How long the policy took to answer, with the batch size; None when it was never asked."""
    speed = latency.summarize(results.queries)
    if speed is None:
        return None
    batch = f"batch of {speed.max_batch}"
    if speed.mean_batch < speed.max_batch:
        batch = f"batches of up to {speed.max_batch}, {speed.mean_batch:.1f} on average"
    return (
        f"latency of a query, {batch}: P50 {speed.p50_ms:.1f} ms, P95 {speed.p95_ms:.1f} ms, P99 {speed.p99_ms:.1f} ms "
        f"({speed.queries} queries; the first took {speed.first_ms:.0f} ms)"
    )


def evaluation_report(results: Results, out: Path, command: str) -> Report:
    """The page of one evaluation whose output folder is `out`."""
    return Report(
        title=f"Closed-loop evaluation: {results.config['suite']}",
        lead=latency_line(results) or "",
        tiles=tiles(results),
        reading=reading(results),
        success=success_rows(results),
        media=media(results, out),
        media_note=MEDIA_NOTE,
        facts=facts(results),
        command=command,
    )


def _broken(results: Results, broken: int) -> str:
    words = f"The simulator broke in {broken} trials, twice each; they count neither as success nor as failure."
    normal = results.score()
    if normal.sim_errors:
        worst = normal.worst_case
        words += f" Counted as failures, the success as instructed would be {worst.successes} of {worst.episodes} ({interval(worst)})."
    return words


def _swapped(results: Results) -> str:
    score = results.score("swapped")
    words = f"With another object named in the same scenes it succeeded in {score.success.successes} of {score.success.episodes}"
    words += f" ({interval(score.success)})"
    if score.chose_original is not None:
        words += f" and went for the original object in {score.chose_original.successes}"
    if score.correct.episodes == 0:
        return words + "; it chose no object at all, so this says nothing about listening."
    if score.chose_original is not None and separated(score.success, score.chose_original):
        return words + (
            ": it follows the words." if score.success.low > score.chose_original.high else ": it follows its habit, not the words."
        )
    return words + "; too few or too even to tell listening from habit."


def _blind(results: Results) -> str:
    normal, blind = results.success, results.score("blind").success
    words = f"With the object's words removed at test time, it succeeded in {blind.successes} of {blind.episodes} ({interval(blind)})"
    if not separated(normal, blind):
        return words + ": the intervals overlap, so this does not show that it uses the words."
    caution = " The policy had never heard sentences without them; how well one trained without words would do is another question."
    if blind.low > normal.high:
        return words + ", more than with them: the intervals do not overlap." + caution
    return words + ": less than with them (the intervals do not overlap), so its success hangs on the words." + caution


def _verdict(trial: Trial) -> str:
    names = {"normal": "", "swapped": "another object named, ", "blind": "words removed, "}
    verdict = "success" if trial.success else f"failed, chose {trial.chosen}" if trial.correct is False else "failed"
    return f"{trial.key}, seed {trial.seed}, {names.get(trial.condition, '')}{verdict}"
