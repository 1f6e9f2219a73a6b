"""`training.html` in a run's folder: how the training goes, to be opened in a browser at any time, also while it runs.

Drawn from metrics.jsonl alone, at every checkpoint and at the end; one file without external resources.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.atomic import replace_file
from vla_oft.html import escape, grid, page, section, tile
from vla_oft.plots import Series, chart, number, smooth
from vla_oft.train.heat import heat
from vla_oft.train.tracking import Row, duration, parse_rows
from vla_oft.train.validation import BY_DIM, BY_DIM_ROBOT, BY_STEP

NAME = "training.html"
MAX_ROWS = 4000
"""Rows that are read in full; of longer runs a part, but every validation and every skipped step."""

RELOAD_S = 60
MARKS = 100

TITLES = {
    "loss": "Loss",
    "action_l1": "Action L1, policy units",
    "action_l1_first": "Action L1 of a chunk's first step",
    "action_l1_rest": "Action L1 of a chunk's other steps",
    "validation_action_l1": "Validation action L1",
    "validation_action_l1_first": "Validation L1 of a chunk's first step",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "samples_per_s": "Samples a second",
    "data_wait": "Share of time spent waiting for data",
    "memory_gb": "Most GPU memory so far, GB",
}
LEARNING = ("loss", "action_l1", "action_l1_first", "action_l1_rest", "validation_action_l1", "validation_action_l1_first")
COURSE = ("lr", "grad_norm", "samples_per_s", "data_wait", "memory_gb")
UNDRAWN = ("step", "time_s", "skipped")
PLAIN = ("lr", "data_wait", "memory_gb", "samples_per_s")
"""Drawn on a linear scale, as they are."""


def refresh(run: Path, *, dimensions: Sequence[str] = ()) -> Path:
    """Write the page of the run in folder `run` anew, in one step; returns its path. dimensions: names of the action's dimensions."""
    metrics, config = run / "metrics.jsonl", run / "train.json"
    rows = _read(metrics) if metrics.is_file() else []
    train = json.loads(config.read_text()) if config.is_file() else {}
    total = sum(phase["steps"] for phase in train.get("phases", []))
    path = run / NAME
    replace_file(path, render(rows, title=train.get("name") or run.resolve().name, total_steps=total, dimensions=dimensions))
    return path


def render(rows: Sequence[Row], *, title: str, total_steps: int = 0, dimensions: Sequence[str] = ()) -> str:
    """The page as text. total_steps: of the whole run; 0 where that is not known. While it is not done, the page reloads itself."""
    if not rows:
        return page(title, f'<h1>{escape(title)}</h1><p class="lead">No step has been recorded yet.</p>')
    unit = 1000 if rows[-1]["step"] >= 10_000 else 1  # long numbers crowd an axis
    over = f"Over {'thousands of ' if unit > 1 else ''}optimizer steps."
    done = total_steps and rows[-1]["step"] >= total_steps
    others = sorted({k for row in rows for k, v in row.items() if _is_number(v)} - {*LEARNING, *COURSE, *UNDRAWN})
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(rows[-1], total_steps))}</p>',
        f'<div class="tiles">{"".join(tile(value, label) for value, label in _tiles(rows))}</div>',
        section("Learning", grid(_cards(rows, (*LEARNING, *others), unit)), over),
        _validation(rows, dimensions, unit),
        section("Course", grid(_cards(rows, COURSE, unit)), f"{over} {_skipped_note(rows)}".strip()),
        "" if done else f"<script>setTimeout(() => location.reload(), {1000 * RELOAD_S})</script>",
    ]
    return page(title, "\n".join(part for part in parts if part))


def _lead(last: Row, total_steps: int) -> str:
    of = f" of {total_steps:,}" if total_steps else ""
    took = f", after {duration(last['time_s'])} of training" if _is_number(last.get("time_s")) else ""
    return f"Step {last['step']:,}{of}{took}. Drawn on {time.strftime('%Y-%m-%d at %H:%M:%S')}."


def _tiles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Headline numbers: of the latest row, and the best validation."""
    last, found = rows[-1], []
    for name, label in (("loss", "loss"), ("action_l1", "action L1 in training")):
        if _is_number(last.get(name)):
            found.append((number(last[name]), label))
    judged = [row for row in rows if _is_number(row.get("validation_action_l1"))]
    if judged:
        best = min(judged, key=lambda row: row["validation_action_l1"])
        found.append((number(judged[-1]["validation_action_l1"]), "action L1 in validation"))
        if best is not judged[-1]:
            found.append((number(best["validation_action_l1"]), f"the best of it, at step {best['step']:,}"))
    if _is_number(last.get("samples_per_s")):
        found.append((number(round(last["samples_per_s"], 1)), "samples a second"))
    return found


def _cards(rows: Sequence[Row], names: Sequence[str], unit: int) -> list[str]:
    cards = []
    for name in names:
        points = [(row["step"] / unit, row[name]) for row in rows if _is_number(row.get(name))]
        if points:
            x, y = np.array(points, float).T
            drawn = _curve(name, x, y, _skipped(rows, unit) if name == "grad_norm" else [])
            cards.append(f'<div class="card"><h3>{escape(_title(name))}</h3>{drawn}</div>')
    return cards


def _curve(name: str, x: np.ndarray, y: np.ndarray, marks: Sequence[float]) -> str:
    label = f"{_title(name)} over optimizer steps"
    if len(y) == 1:
        return f'<p class="quiet">{number(y[0])}, in one row only</p>'
    log = name not in PLAIN and y.min() > 0 and y.max() > 3 * y.min()
    if len(y) < 20 or name in PLAIN:
        return chart([Series(x=x, y=y)], label=label, log=log, marks=marks)
    window = max(3, len(y) // 25)
    smoothed = np.exp(smooth(np.log(y), window)) if log else smooth(y, window)
    return chart([Series(x=x, y=y, style="a faint"), Series(x=x, y=smoothed)], label=label, log=log, marks=marks)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " ").capitalize())


def _validation(rows: Sequence[Row], dimensions: Sequence[str], unit: int) -> str:
    judged = [row for row in rows if row.get(BY_DIM)]
    if not judged:
        return ""
    last, when = judged[-1], f"at step {judged[-1]['step']:,}"
    names = list(dimensions) if len(dimensions) == len(last[BY_DIM]) else [str(d) for d in range(len(last[BY_DIM]))]
    places = np.arange(1, len(last[BY_STEP]) + 1)
    cards = []
    if len(places) > 1:
        drawn = chart([Series(x=places, y=np.array(_floats(last[BY_STEP])))], label=f"Validation L1 by step of the chunk, {when}")
        cards.append((f"By step of the chunk, {when}", drawn))
    for key, labels, heading in ((BY_STEP, [str(p) for p in places], "By step of the chunk"), (BY_DIM, names, "By dimension")):
        table = np.array([_floats(row[key]) for row in judged]).T
        drawn = heat(table, [row["step"] / unit for row in judged], labels, label=f"Validation L1 {heading.lower()} over optimizer steps")
        cards.append((f"{heading}, over time", drawn))
    bars = f'<div class="card scroll" style="margin-bottom:14px"><h3>By dimension of the action, {when}</h3>{_bars(last, names)}</div>'
    note = "Mean absolute error on episodes that are not trained on."
    return section("Validation", bars + grid([f'<div class="card"><h3>{escape(title)}</h3>{drawn}</div>' for title, drawn in cards]), note)


def _bars(row: Mapping[str, Any], names: Sequence[str]) -> str:
    values = [0.0 if v is None else v for v in row[BY_DIM]]
    robot = row.get(BY_DIM_ROBOT) or [None] * len(values)
    most = max(values) or 1.0
    lines = []
    for name, value, unit in zip(names, values, robot, strict=True):
        bar = f'<div class="track"><div class="fill" style="width:{100 * value / most:.1f}%"></div></div>'
        numbers = f'<td class="num">{_rounded(value)}</td><td class="num">{"-" if unit is None else _rounded(unit)}</td>'
        lines.append(f'<tr><td>{escape(name)}</td><td class="bar">{bar}</td>{numbers}</tr>')
    head = '<tr><th>Dimension</th><th></th><th style="text-align:right">policy units</th><th style="text-align:right">robot units</th></tr>'
    return f"<table>{head}{''.join(lines)}</table>"


def _skipped(rows: Sequence[Row], unit: int) -> list[float]:
    found = [row["step"] / unit for row in rows if row.get("skipped")]
    return found[:: -(-len(found) // MARKS)] if found else []


def _skipped_note(rows: Sequence[Row]) -> str:
    count = sum(row.get("skipped") or 0 for row in rows)
    return f"Dashed lines: rows with skipped steps, {count} in all." if count else ""


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _rounded(value: float) -> str:
    return f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> list[Row]:
    """Enough rows to draw."""
    lines = path.read_text().splitlines()
    stride = -(-len(lines) // MAX_ROWS) or 1
    wanted = [
        line
        for i, line in enumerate(lines)
        if i % stride == 0 or i == len(lines) - 1 or '"validation_' in line or ('"skipped": ' in line and '"skipped": 0' not in line)
    ]
    return parse_rows(wanted)
