"""Horizontal bars on a logarithmic axis, as an SVG file that stands alone: it carries its colours and needs no library to be seen."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vla_oft.plots import log_ticks, number

WIDTH, LABELS, RIGHT, BAR, GAP, TOP, AXIS = 760, 250, 76, 13, 10, 46, 34
COLOURS = ("#8a8f98", "#c9822b", "#2b6cb0", "#2f855a", "#805ad5", "#b83280", "#319795", "#975a16")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One line of the chart. values: one for each name in the legend, None where there is none."""

    label: str
    values: tuple[float | None, ...]


def bars(groups: Sequence[Group], legend: Sequence[str], *, title: str, unit: str) -> str:
    """The chart; `legend` names the values of each group, in order. Values must be positive. Raises ValueError when there are none."""
    values = [v for group in groups for v in group.values if v is not None]
    if not values or min(values) <= 0:
        raise ValueError("a chart needs at least one value, and all must be positive")
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.02
    low, high = (low, high) if high - low > 0.5 else (low - 0.3, high + 0.1)
    heights = [GAP + BAR * sum(v is not None for v in group.values) for group in groups]
    height = TOP + sum(heights) + GAP + AXIS

    def across(value: float) -> float:
        return round(LABELS + (math.log10(value) - low) / (high - low) * (WIDTH - LABELS - RIGHT), 1)

    parts = [_head(height, title), *_legend(legend)]
    for tick in log_ticks(low, high):
        x = across(10**tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - AXIS}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height - AXIS + 15}" text-anchor="middle">{number(10**tick)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{html.escape(unit)}</text>')
    y = float(TOP + GAP)
    for group, used in zip(groups, heights, strict=True):
        middle = y + (used - GAP) / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end">{html.escape(group.label)}</text>')
        for colour, value in enumerate(group.values):
            if value is None:
                continue
            x = across(value)
            fill = COLOURS[colour % len(COLOURS)]
            parts.append(f'<rect x="{LABELS}" y="{y}" width="{round(x - LABELS, 1)}" height="{BAR - 2}" fill="{fill}"/>')
            parts.append(f'<text class="tick" x="{x + 4}" y="{y + BAR - 3}">{number(value)}</text>')
            y += BAR
        y += GAP
    return "\n".join([*parts, "</svg>\n"])


def _head(height: int, title: str) -> str:
    name = html.escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">\n'
        "<style>text{font:12px system-ui,sans-serif;fill:#222}.tick{font-size:10px;fill:#555}"
        ".grid{stroke:#ddd}.title{font-weight:600}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n<text class="title" x="10" y="18">{html.escape(title)}</text>'
    )


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], LABELS
    for index, name in enumerate(names):
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text class="tick" x="{x + 14}" y="35">{html.escape(name)}</text>')
        x += 26 + 6 * len(name)
    return parts
