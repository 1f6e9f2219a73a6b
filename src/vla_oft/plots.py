"""Small charts as inline SVG: no plotting library, no external resource; colours come from the page's style sheet.

Every chart is WIDTH x HEIGHT units and scales with its container. Classes `a`, `b` colour the series, `grid` and `tick` the axes, `bar` the
columns of a histogram, `band` and `mark` what happened when.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 320, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line through (x, y). style: "a" or "b" by colour, "a faint" for raw values behind a smoothed line."""

    x: np.ndarray
    y: np.ndarray
    style: str = "a"


def chart(
    series: Sequence[Series],
    *,
    label: str,
    log: bool = False,
    marks: Sequence[float] = (),
    bands: Sequence[tuple[float, float]] = (),
) -> str:
    """Lines over common axes. `label` is read to people who cannot see it. Values that are not finite leave a gap.

    marks: x of vertical lines. bands: (from, to) in x, shaded over the whole height.
    """
    series = [thin(s) for s in series]
    x = np.concatenate([s.x for s in series])
    y = np.concatenate([s.y[np.isfinite(s.y)] for s in series])
    if not y.size:
        return f'<p class="quiet">{html.escape(label)}: no finite values</p>'
    x_low, x_high = _range(float(x.min()), float(x.max()), margin=0)
    scale = np.log10 if log else (lambda v: v)
    y_low, y_high = _range(float(scale(y.min())), float(scale(y.max())), margin=0.06)

    def place(px: float, py: float) -> tuple[float, float]:
        across = LEFT + (px - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (py - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [_head(label)]
    for first, last in bands:
        (left, _), (right, _) = place(max(first, x_low), y_low), place(min(last, x_high), y_low)
        if right > left:
            parts.append(f'<rect class="band" x="{left}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>')
    for mark in marks:
        across, _ = place(mark, y_low)
        parts.append(f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for tick in log_ticks(y_low, y_high) if log else ticks(y_low, y_high, 4):
        _, down = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number(10**tick if log else tick)}</text>')
    for tick in ticks(x_low, x_high, 5):
        across, _ = place(tick, y_low)
        parts.append(_below(across, number(tick)))
    for s in series:
        for run in _finite_runs(s):
            points = " ".join("{},{}".format(*place(px, float(scale(py)))) for px, py in run)
            parts.append(f'<polyline class="{s.style}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def histogram(edges: Sequence[float], counts: Sequence[int], *, label: str) -> str:
    """Columns between len(counts) + 1 rising `edges`. A column that is not empty is at least a pixel high, so that outliers are seen."""
    if not counts or max(counts) <= 0:
        return f'<p class="quiet">{html.escape(label)}: no values</p>'
    low, high, most = float(edges[0]), float(edges[-1]), max(counts)
    room = HEIGHT - TOP - BOTTOM

    def across(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    parts = [_head(label)]
    for tick in ticks(0, most, 3):
        down = round(HEIGHT - BOTTOM - tick / most * room, 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(low, high, 5):
        parts.append(_below(across(tick), number(tick)))
    for first, last, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            tall = max(1.0, round(count / most * room, 1))
            left, wide = across(first), max(0.6, across(last) - across(first) - 0.6)
            parts.append(f'<rect class="bar" x="{left}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
    return "".join([*parts, "</svg>"])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average that shrinks at the ends instead of inventing values."""
    values = np.asarray(values, float)
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def thin(series: Series) -> Series:
    """At most `MAX_POINTS` points, so that a long run does not make a large page."""
    stride = -(-len(series.x) // MAX_POINTS)
    return Series(x=np.asarray(series.x, float)[::stride], y=np.asarray(series.y, float)[::stride], style=series.style)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decades and their 2 and 5 between 10**low and 10**high, as exponents; decades alone when those are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [p + math.log10(m) for p in powers for m in ((1,) if high - low > 2.5 else (1, 2, 5))]
    return [f for f in found if low <= f <= high]


def number(value: float) -> str:
    """A short number for an axis."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _below(across: float, text: str) -> str:
    """A tick of the horizontal axis; the last one ends at the edge, where half of it would be cut off."""
    edge = across > WIDTH - 14
    return f'<text class="tick" x="{WIDTH if edge else across}" y="{HEIGHT - 7}" text-anchor="{"end" if edge else "middle"}">{text}</text>'


def _head(label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label, quote=True)}">'


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low <= 1e-12 * max(1.0, abs(low)):
        spread = abs(low) * 0.1 or 1e-3
        return low - spread, high + spread
    spread = (high - low) * margin
    return low - spread, high + spread


def _finite_runs(series: Series) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if np.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [r for r in runs if r]
