"""An inspection on a terminal: a table of facts, one of numbers, one of instructions, and the problems."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vla_oft.inspection import words
from vla_oft.inspection.facts import Dimension, Histogram, Inspection, Problem

MAX_ROWS = 20
"""Dimensions of one kind, and instructions, beyond which the page is the better place."""

PLAIN_WIDTH = 140
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
LEVELS = " ▁▂▃▄▅▆▇█"
COLUMNS = 16


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Everything that fits. Without a terminal: no colours, no frames, a fixed width."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, color_system=None)
    framed = console.is_terminal
    graphic = console.encoding.lower().startswith("utf")
    parts = [_facts(found, framed)]
    parts += [_numbers(title, dims, framed, graphic) for title, dims in (("State", found.state), ("Action", found.action)) if dims]
    parts += [_instructions(found, framed)] if found.instructions else []
    for part in (*parts, _problems(found.problems)):
        console.print(part)
        console.print()


def _table(title: str, framed: bool, headers: bool = True) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=headers)
    if not framed:
        table.box = None
    return table


def _facts(found: Inspection, framed: bool) -> Table:
    table = _table(f"Dataset {words.printable(found.name)}", framed, headers=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for name, value in words.facts(found).items():
        table.add_row(Text(name), Text(value))
    return table


def _numbers(title: str, dimensions: Sequence[Dimension], framed: bool, graphic: bool) -> Table:
    table = _table(title, framed)
    table.add_column("dimension")
    for name in ("min", "q01", "mean", "q99", "max", "std"):
        table.add_column(name, justify="right", no_wrap=True)
    if graphic:
        table.add_column("min to max", no_wrap=True)
    for d in dimensions[:MAX_ROWS]:
        numbers = [Text(words.number(v)) for v in (d.min, d.q01, d.mean, d.q99, d.max, d.std)]
        table.add_row(Text(words.printable(words.label(d))), *numbers, *([Text(sparkline(d.histogram))] if graphic else []))
    if len(dimensions) > MAX_ROWS:
        table.caption = Text(f"and {len(dimensions) - MAX_ROWS} more, see the page or the JSON")
    return table


def _instructions(found: Inspection, framed: bool) -> Table:
    table = _table("Instructions", framed)
    table.add_column("instruction", overflow="fold")
    table.add_column("episodes", justify="right")
    table.add_column("frames", justify="right")
    ordered = sorted(found.instructions, key=lambda i: -i.episodes)
    for i in ordered[:MAX_ROWS]:
        table.add_row(Text(words.printable(i.text) or "(empty)"), str(i.episodes), str(i.frames))
    if len(ordered) > MAX_ROWS:
        table.caption = Text(f"and {len(ordered) - MAX_ROWS} more, see the page or the JSON")
    return table


def _problems(problems: Sequence[Problem]) -> RenderableType:
    if not problems:
        return Text("No problems found.", style="green")
    lines = [Text("Problems", style="bold")]
    for p in problems:
        head = Text.assemble((f"{p.severity}: ", STYLES[p.severity]), (words.printable(p.title), "bold"), f" ({words.counted(p)})")
        lines.append(head)
        lines.extend(Text(f"  {words.printable(line)}") for line in (p.where, p.effect, p.fix) if line)
    return Group(*lines)


def sparkline(histogram: Histogram | None) -> str:
    """A histogram in `COLUMNS` characters at most; bins that hold something are never blank."""
    if histogram is None or not sum(histogram.counts):
        return ""
    stride = -(-len(histogram.counts) // COLUMNS)
    sums = [sum(histogram.counts[i : i + stride]) for i in range(0, len(histogram.counts), stride)]
    top = max(sums)
    return "".join(LEVELS[-(-value * (len(LEVELS) - 1) // top)] for value in sums)
