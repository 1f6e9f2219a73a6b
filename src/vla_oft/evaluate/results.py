"""What an evaluation leaves behind: one row a trial, and the numbers drawn from them.

OUT/results.jsonl   one `Trial` a line, written as trials end: an interrupted evaluation keeps what it measured
OUT/summary.json    `Results.to_json()`
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vla_oft.evaluate import latency
from vla_oft.evaluate.latency import Query
from vla_oft.evaluate.success import Rate, count, separated


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One episode.

    suite, family: the simulator and the task family. condition: "normal" or the name of a control.
    task: the instruction that the simulator judges by; instruction: the words that the policy was given.
    success, chosen, correct: the verdict; all None when the simulator broke.
    chose_original: with a swapped instruction, whether the policy went for the object of the original one; otherwise None.
    steps: control steps until success began, or until the end.
    attempts: 2 when the simulator broke once and the trial was repeated. sim_error: the last error, also of a repaired trial.
    latency_ms: of each query that answered this trial, for the whole batch.
    video: path below the output folder.
    """

    suite: str
    family: str
    condition: str
    seed: int
    task: str
    instruction: str
    success: bool | None
    chosen: str | None
    correct: bool | None
    chose_original: bool | None
    steps: int
    attempts: int
    sim_error: str | None
    latency_ms: tuple[float, ...] = ()
    video: str | None = None

    @property
    def key(self) -> str:
        """ "suite/family", as on the command line."""
        return f"{self.suite}/{self.family}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Rates over a group of trials of one condition; trials that the simulator broke only appear in `sim_errors`."""

    success: Rate
    correct: Rate
    chose_original: Rate | None
    sim_errors: int
    mean_steps: float | None

    @property
    def worst_case(self) -> Rate:
        """The success if every trial that the simulator broke had failed."""
        return self.success.with_failures(self.sim_errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. `correct` counts only the episodes with a chosen object; `worst_case`, simulator errors as failures."""
        document: dict[str, Any] = {
            "success": self.success.to_dict(),
            "worst_case": self.worst_case.to_dict(),
            "correct_among_chosen": self.correct.to_dict(),
        }
        if self.chose_original is not None:
            document["chose_original"] = self.chose_original.to_dict()
        return {**document, "sim_errors": self.sim_errors, "mean_steps": self.mean_steps}


def score(trials: list[Trial]) -> Score:
    """The rates of `trials`."""
    valid = [t for t in trials if t.success is not None]
    original = [t.chose_original for t in valid if t.chose_original is not None]
    return Score(
        success=count([bool(t.success) for t in valid]),
        correct=count([t.correct for t in valid if t.correct is not None]),
        chose_original=count(original) if original else None,
        sim_errors=len(trials) - len(valid),
        mean_steps=sum(t.steps for t in valid) / len(valid) if valid else None,
    )


@dataclass(frozen=True, kw_only=True)
class Results:
    """A finished or stopped evaluation.

    config: the `EvalConfig` as plain values. queries: every call of the policy, in order.
    checkpoint: fingerprint or path of what was evaluated, if the caller gave one.
    stopped: why the evaluation ended early, or None.
    """

    config: dict[str, Any]
    trials: tuple[Trial, ...]
    queries: tuple[Query, ...]
    versions: dict[str, str]
    wall_s: float
    checkpoint: str | None = None
    stopped: str | None = None

    def conditions(self) -> list[str]:
        """Names of the conditions that were run, in order of appearance."""
        return list(dict.fromkeys(t.condition for t in self.trials))

    def families(self) -> list[str]:
        """ "suite/family" of every task that was run."""
        return list(dict.fromkeys(t.key for t in self.trials))

    def score(self, condition: str = "normal", family: str | None = None) -> Score:
        """Rates of one condition, over one "suite/family" or over all."""
        return score([t for t in self.trials if t.condition == condition and family in (None, t.key)])

    @property
    def success(self) -> Rate:
        """The headline: overall success under the normal condition."""
        return self.score().success

    def to_json(self) -> dict[str, Any]:
        """The summary, in plain JSON types."""
        speed = latency.summarize(self.queries)
        return {
            "success": self.success.to_dict(),
            "worst_case": self.score().worst_case.to_dict(),
            "conditions": {c: self._condition(c) for c in self.conditions()},
            "separated_from_normal": {c: separated(self.success, self.score(c).success) for c in self.conditions() if c != "normal"},
            "episodes": sum(t.success is not None for t in self.trials),
            "sim_errors": sum(t.success is None for t in self.trials),
            "sim_errors_repaired": sum(t.success is not None and t.attempts > 1 for t in self.trials),
            "latency": None if speed is None else dataclasses.asdict(speed),
            "seeds": sorted({t.seed for t in self.trials}),
            "wall_s": round(self.wall_s, 3),
            "stopped": self.stopped,
            "checkpoint": self.checkpoint,
            "config": self.config,
            "versions": self.versions,
        }

    def _condition(self, condition: str) -> dict[str, Any]:
        families = [f for f in self.families() if any(t.key == f and t.condition == condition for t in self.trials)]
        return {
            "overall": self.score(condition).to_dict(),
            "families": {f: self.score(condition, f).to_dict() for f in families},
        }


class ResultsWriter:
    """Appends rows to OUT/results.jsonl; with `out=None` nothing is written."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._rows: IO[str] | None = None
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / "results.jsonl"
        if path.exists() and path.stat().st_size:
            raise ValueError(f"out={out} already holds an evaluation ({path.name}); choose another folder or remove it")
        self._rows = path.open("w")

    def add(self, trial: Trial) -> None:
        """One line, on disk when this returns."""
        if self._rows is not None:
            self._rows.write(json.dumps(dataclasses.asdict(trial)) + "\n")
            self._rows.flush()

    def close(self, results: Results) -> None:
        """Write the summary."""
        if self._rows is not None and self.out is not None:
            self._rows.close()
            (self.out / "summary.json").write_text(json.dumps(results.to_json(), indent=2) + "\n")
