"""Results of a benchmark as files and as a table on a terminal: JSON (everything), CSV (each call), Markdown and SVG."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_oft.atomic import replace_file
from vla_oft.bench.rows import Measured

CALL_FIELDS = ("row", "subject", "precision", "kind", "index", "ms")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in columns; the first column is a name, the others are numbers. notes: lines below it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def show(value: float | None, digits: int = 3) -> str:
    """A number with about `digits` significant digits and no exponent, - for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else f"{value:.1e}" if abs(value) < 1e-3 else text


def percent(share: float | None) -> str:
    """Of 1, - for None."""
    return "-" if share is None else f"{100 * share:.0f} %"


def print_table(table: Table) -> None:
    """On standard output, as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table as Drawn

    cells = zip(table.columns, *table.rows, strict=True)
    needed = sum(max(map(len, column)) for column in cells) + 3 * len(table.columns) + 1
    console = Console(width=max(needed, Console().width))
    drawn = Drawn(title=table.title, title_justify="left")
    for index, name in enumerate(table.columns):
        drawn.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn, crop=False, highlight=False, markup=False)
    for line in table.notes:
        console.print(f"- {line}", highlight=False, markup=False)


def markdown(table: Table) -> str:
    """The same as a page."""
    lines = [f"# {table.title}", "", _line(table.columns), _line("---" if i == 0 else "---:" for i, _ in enumerate(table.columns))]
    lines += [_line(row) for row in table.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def calls_csv(measured: Sequence[Measured]) -> str:
    """Every timed call."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CALL_FIELDS)
    for m in measured:
        if m.times is None:
            continue
        for kind, times in (("model", m.times.model_ms), ("end-to-end", m.times.end_to_end_ms)):
            writer.writerows((m.row.name, m.row.subject, m.row.precision, kind, i, f"{ms:.4f}") for i, ms in enumerate(times))
    return text.getvalue()


def write(out: Path, stem: str, document: dict[str, Any], measured: Sequence[Measured], table: Table, chart: str | None) -> None:
    """Write STEM.json, STEM-calls.csv, STEM.md and STEM.svg into the folder `out`; results of the same name are replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{stem}.json", json.dumps(document, indent=1, default=str) + "\n")
    replace_file(out / f"{stem}-calls.csv", calls_csv(measured))
    picture = f"\n![{table.title}]({stem}.svg)\n" if chart else ""
    replace_file(out / f"{stem}.md", markdown(table) + picture)
    if chart:
        replace_file(out / f"{stem}.svg", chart)
