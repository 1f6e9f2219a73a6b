"""The final result on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vla_oft.evaluate.reading import latency_line, reading, success_rows
from vla_oft.evaluate.report import SuccessRow
from vla_oft.evaluate.results import Results
from vla_oft.evaluate.success import interval


def print_results(results: Results, console: Console | None = None) -> None:
    """The table, and below it the latency and what the numbers say."""
    console = console or Console()
    print_table(success_rows(results), console)
    speed = latency_line(results)
    if speed is not None:
        console.print(speed, highlight=False, markup=False)
    for line in reading(results):
        console.print(f"- {line}", highlight=False, markup=False)


def print_table(rows: Sequence[SuccessRow], console: Console | None = None) -> None:
    """The bars of a report, as a table."""
    drawn = Table(title="Closed-loop evaluation", caption="intervals: Wilson, 95 %", title_justify="left", caption_justify="left")
    drawn.add_column("")
    for name in ("success", "interval"):
        drawn.add_column(name, no_wrap=True)
    for name in ("right object", "steps"):
        drawn.add_column(name, justify="right", no_wrap=True)
    group = None
    for row in rows:
        if row.group != group:
            drawn.add_section()
            drawn.add_row(f"[bold]{row.group}")
            group = row.group
        rate, correct = row.success, row.correct
        drawn.add_row(
            f"  {row.label}",
            "-" if rate.value is None else f"{100 * rate.value:.0f} % ({rate.successes}/{rate.episodes})",
            interval(rate) if rate.episodes else "-",
            f"{correct.successes}/{correct.episodes}" if correct and correct.episodes else "-",
            "-" if row.mean_steps is None else f"{row.mean_steps:.0f}",
            style="bold" if row.total else None,
        )
        if row.sim_errors:
            worst = row.worst_case
            share = "-" if worst.value is None else f"{100 * worst.value:.0f} % ({worst.successes}/{worst.episodes})"
            drawn.add_row(f"    + {row.sim_errors} simulator errors as failures", share, interval(worst), "", "")
    (console or Console()).print(drawn)
