"""The final result on a terminal."""

from rich.console import Console
from rich.table import Table

from vla_oft.evaluate.reading import condition_rows, interval, reading
from vla_oft.evaluate.results import Results


def print_results(results: Results, console: Console | None = None) -> None:
    """The table, and below it what the numbers say."""
    console = console or Console()
    console.print(table(results))
    for line in reading(results):
        console.print(f"- {line}", highlight=False, markup=False)


def table(results: Results) -> Table:
    """The final result for a terminal."""
    drawn = Table(title="Closed-loop evaluation", caption="intervals: Wilson, 95 %", title_justify="left", caption_justify="left")
    for name in ("condition", "task", "success", "interval"):
        drawn.add_column(name, no_wrap=True)
    for name in ("right object", "mean steps"):
        drawn.add_column(name, justify="right")
    for condition in results.conditions():
        drawn.add_section()
        for row in condition_rows(results, condition):
            rate, correct = row.success, row.correct
            drawn.add_row(
                condition,
                row.label,
                "-" if rate.value is None else f"{100 * rate.value:.0f} % ({rate.successes}/{rate.episodes})",
                interval(rate) if rate.episodes else "-",
                f"{correct.successes}/{correct.episodes}" if correct and correct.episodes else "-",
                "-" if row.mean_steps is None else f"{row.mean_steps:.0f}",
                style="bold" if row.total else None,
            )
    return drawn
