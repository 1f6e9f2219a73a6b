"""A table of errors as shades, as inline SVG in the style of `plots.py`: who is how wrong, and since when."""

import html
from collections.abc import Sequence

import numpy as np

from vla_oft.plots import BOTTOM, RIGHT, TOP, WIDTH, number

MAX_COLUMNS, ROW = 48, 15
"""Columns of a strip; units of height of a row."""

CHARACTER = 6.2
"""Units of width that a letter of a label takes, about."""

PALEST = 0.06


def heat(values: np.ndarray, columns: Sequence[float], names: Sequence[str], *, label: str) -> str:
    """Rows of shades, the darker the larger, on a logarithmic scale over the whole table.

    values: (R, C), positive; what is not finite or not positive stays empty. columns: what each column is (steps, rising).
    names: R, at the left. `label` is read to people who cannot see it.
    """
    values, columns = np.asarray(values, float), list(columns)
    shown = np.unique(np.linspace(0, len(columns) - 1, min(len(columns), MAX_COLUMNS)).round().astype(int))
    values, columns = values[:, shown], [columns[i] for i in shown]
    good = np.isfinite(values) & (values > 0)
    if not good.any():
        return f'<p class="quiet">{html.escape(label)}: no values</p>'
    low, high = values[good].min(), values[good].max()
    span = np.log(high / low) or 1.0
    left = 8 + CHARACTER * min(16, max(map(len, names)))
    wide, bottom = (WIDTH - left - RIGHT) / len(columns), TOP + ROW * len(values)
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{html.escape(label, quote=True)}">']
    for r, name in enumerate(names):
        text = name if len(name) <= 16 else name[:15] + "\N{HORIZONTAL ELLIPSIS}"
        parts.append(
            f'<text class="tick" x="{left - 6:.1f}" y="{TOP + ROW * r + 11}" text-anchor="end">'
            f"{html.escape(text)}<title>{html.escape(name)}</title></text>"
        )
        for c in np.flatnonzero(good[r]):
            shade = PALEST + (1 - PALEST) * np.log(values[r, c] / low) / span
            parts.append(
                f'<rect class="bar" x="{left + wide * c:.1f}" y="{TOP + ROW * r}" width="{max(wide - 0.5, 0.5):.1f}" height="{ROW - 1}" '
                f'fill-opacity="{shade:.2f}"><title>{html.escape(name)}, {number(columns[c])}: {number(values[r, c])}</title></rect>'
            )
    ends = [(0, "start"), (len(columns) - 1, "end")] if len(columns) > 1 else [(0, "start")]
    for c, anchor in ends:
        across = left + wide * (c + (anchor == "end"))
        parts.append(f'<text class="tick" x="{across:.1f}" y="{bottom + BOTTOM - 7}" text-anchor="{anchor}">{number(columns[c])}</text>')
    note = f'<p class="quiet">palest {number(low)}, darkest {number(high)}</p>'
    return "".join([*parts, "</svg>", note])
