"""`report.html`: what was trained, how well it works and how sure that is, in one file that can be mailed.

Built from plain inputs, so that training, evaluation and the quick start can all fill in what they know:

    write_report(path, Report(title="...", success=success_rows(results), metrics=read_metrics(run / "metrics.jsonl"), ...))
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.evaluate.success import Rate, interval
from vla_oft.html import bullets, embedded, escape, grid, key_values, page, section, tile
from vla_oft.plots import Series, chart, smooth

MEDIA_LIMIT_BYTES = 5_500_000  # base64 makes 7.3 MB of it: the page stays below 8 MB
CURVES = ("loss", "action_l1", "lr", "grounding", "grad_norm", "validation_action_l1")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    value: str
    label: str


@dataclass(frozen=True, kw_only=True)
class SuccessRow:
    """One bar. group: heading above it ("As instructed"). role: "policy", "control" or "ceiling" sets the colour.

    correct: rate of the right object among the chosen ones. total: whether the row sums up its group.
    """

    group: str
    label: str
    success: Rate
    correct: Rate | None = None
    mean_steps: float | None = None
    sim_errors: int = 0
    role: str = "policy"
    total: bool = False

    @property
    def worst_case(self) -> Rate:
        """The success if every trial that the simulator broke had failed."""
        return self.success.with_failures(self.sim_errors)


@dataclass(frozen=True, kw_only=True)
class ActionPlot:
    """Predicted and expert actions of one episode, each (T, D) in robot units. names: one for each dimension."""

    title: str
    names: tuple[str, ...]
    predicted: np.ndarray
    expert: np.ndarray

    def __post_init__(self) -> None:
        if self.predicted.shape != self.expert.shape or self.predicted.shape[1:] != (len(self.names),):
            raise ValueError(f"ActionPlot: predicted {self.predicted.shape} and expert {self.expert.shape} must be (T, {len(self.names)})")


@dataclass(frozen=True, kw_only=True)
class Media:
    """A recording (.mp4) or picture (.png, .jpg). good: its verdict, or None when it has none."""

    path: Path
    caption: str
    verdict: str = ""
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page; what is empty is left out.

    reading: sentences that say what the numbers mean and what they do not. metrics: rows of metrics.jsonl.
    media_note: how the recordings were picked. timing: seconds of each stage.
    facts: heading -> table of names and values. command: what reproduces this page.
    """

    title: str
    lead: str = ""
    tiles: tuple[Tile, ...] = ()
    reading: tuple[str, ...] = ()
    success: tuple[SuccessRow, ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()
    actions: tuple[ActionPlot, ...] = ()
    media: tuple[Media, ...] = ()
    media_note: str = ""
    timing: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    command: str = ""


def write_report(path: Path, report: Report) -> Path:
    """Write the page; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
    return path


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is ignored."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return tuple(rows)


def render(report: Report) -> str:
    """The page as text."""
    tiles = "".join(tile(t.value, t.label) for t in report.tiles)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.lead)}</p>' if report.lead else "",
        f'<div class="tiles">{tiles}</div>' if tiles else "",
        section("What this says", f'<div class="card">{bullets(report.reading)}</div>' if report.reading else ""),
        section("Success", _success(report.success), "Share of episodes; the whisker is the Wilson 95 % interval."),
        section("Recordings", _media(report.media), report.media_note),
        section("Training", _training(report.metrics)),
        section("Predicted and expert actions", "".join(_actions(a) for a in report.actions)),
        section("Time", _timing(report.timing)),
        *(section(heading, _fact_card(values)) for heading, values in report.facts.items()),
        section("Reproduce", f'<div class="card"><code>{escape(report.command)}</code></div>' if report.command else ""),
    ]
    return page(report.title, "\n".join(p for p in parts if p))


def _success(rows: tuple[SuccessRow, ...]) -> str:
    if not rows:
        return ""
    lines, group = [], None
    for row in rows:
        if row.group != group:
            lines.append(f'<tr class="group{" first" if group is None else ""}"><td colspan="5">{escape(row.group)}</td></tr>')
            group = row.group
        lines.append(_success_line(row))
    head = "<tr><th>Task</th><th>Success</th><th></th><th>Right object, of those chosen</th><th>Mean steps</th></tr>"
    return f'<div class="card scroll"><table>{head}{"".join(lines)}</table></div>'


def _success_line(row: SuccessRow) -> str:
    rate = row.success
    low, high = 100 * rate.low, 100 * rate.high
    fill = f'<div class="fill" style="width:{100 * rate.value:.1f}%"></div>' if rate.value is not None else ""
    whisker = f'<div class="whisker" style="left:{low:.1f}%;width:{high - low:.1f}%"></div>' if rate.episodes else ""
    text = "no episodes" if rate.value is None else f"{100 * rate.value:.0f} % ({rate.successes}/{rate.episodes}), {interval(rate)}"
    if row.sim_errors:
        worst = row.worst_case
        text += f"<br>{row.sim_errors} broken by the simulator; as failures {worst.successes}/{worst.episodes}, {interval(worst)}"
    correct = row.correct
    chosen = f"{correct.successes}/{correct.episodes}, {interval(correct)}" if correct and correct.episodes else "-"
    steps = "-" if row.mean_steps is None else f"{row.mean_steps:.0f}"
    return (
        f'<tr class="{row.role}{" total" if row.total else ""}"><td>{escape(row.label)}</td>'
        f'<td class="bar"><div class="track">{fill}{whisker}</div></td>'
        f"<td>{text}</td><td>{chosen}</td><td>{steps}</td></tr>"
    )


def _training(metrics: tuple[Mapping[str, Any], ...]) -> str:
    cards = []
    for name in CURVES:
        points = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float) and "step" in row]
        if len(points) < 2:
            continue
        x, y = np.array(points, float).T
        positive = np.isfinite(y).all() and y.min() > 0
        lines = [Series(x=x, y=y)]
        if len(y) >= 20 and name != "lr" and np.isfinite(y).all():
            lines = [Series(x=x, y=y, style="a faint"), Series(x=x, y=smooth(y, max(3, len(y) // 25)))]
        drawing = chart(lines, label=f"{name} over training steps", log=bool(positive and y.max() / y.min() > 30 and name != "lr"))
        cards.append(f'<div class="card"><h3>{escape(name)}</h3>{drawing}</div>')
    return grid(cards)


def _actions(plot: ActionPlot) -> str:
    x = np.arange(len(plot.expert))
    cards = [
        f"<div><h3>{escape(name)}</h3>{chart(lines, label=f'{name}: predicted and expert')}</div>"
        for d, name in enumerate(plot.names)
        for lines in [[Series(x=x, y=plot.expert[:, d], style="b"), Series(x=x, y=plot.predicted[:, d])]]
    ]
    error = float(np.abs(plot.predicted - plot.expert).mean())
    words = f"expert; mean absolute difference {error:.3f}"
    legend = f'<p class="legend"><i class="a"></i><span>predicted</span><i class="b"></i><span>{words}</span></p>'
    return f'<div class="card"><h3>{escape(plot.title)}</h3>{legend}{grid(cards)}</div>'


def _media(media: tuple[Media, ...]) -> str:
    figures, used, left_out = [], 0, []
    for item in media:
        size = item.path.stat().st_size
        if used + size > MEDIA_LIMIT_BYTES:
            left_out.append(item.path.name)
            continue
        used += size
        figures.append(_figure(item))
    note = f'<p class="quiet">Left out to keep this page small: {escape(", ".join(left_out))}.</p>' if left_out else ""
    return grid(figures) + note


def _figure(item: Media) -> str:
    kind = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}.get(item.path.suffix)
    if kind is None:
        raise ValueError(f"{item.path}: a report shows .mp4, .png and .jpg")
    data = embedded(item.path.read_bytes(), kind)
    video = kind == "video/mp4"
    shown = f'<video src="{data}" controls muted loop playsinline></video>' if video else f'<img src="{data}" alt="{escape(item.caption)}">'
    tone = "" if item.good is None else "good" if item.good else "bad"
    verdict = f'<br><span class="{tone}">{escape(item.verdict)}</span>' if item.verdict else ""
    return f'<figure class="card">{shown}<figcaption>{escape(item.caption)}{verdict}</figcaption></figure>'


def _timing(timing: Mapping[str, float]) -> str:
    total = sum(timing.values())
    if not total:
        return ""
    bars = "".join(f'<div class="c{i % 6}" style="width:{100 * s / total:.2f}%"></div>' for i, s in enumerate(timing.values()))
    rows = "".join(
        f'<tr><td><span class="dot c{i % 6}"></span>{escape(name)}</td>'
        f'<td class="num">{seconds:.1f} s</td><td class="num">{100 * seconds / total:.0f} %</td></tr>'
        for i, (name, seconds) in enumerate(timing.items())
    )
    last = f'<tr class="total"><td>total</td><td class="num">{total:.1f} s</td><td></td></tr>'
    return f'<div class="card"><div class="stack">{bars}</div><table>{rows}{last}</table></div>'


def _fact_card(values: Mapping[str, str]) -> str:
    table = key_values(values)
    return f'<div class="card">{table}</div>' if table else ""
