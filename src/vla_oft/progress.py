"""Progress of long jobs: a live bar on a terminal, one plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL_S = 15.0


class Advance(Protocol):
    """Reports `amount` more units of work, and an optional remark."""

    def __call__(self, amount: int, remark: str = "") -> None:
        """Report."""
        ...


@contextmanager
def progress(
    title: str, total: int, unit: str, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Yield the function that reports progress. Everything goes to stderr: stdout belongs to `--json`. Only a live bar needs rich."""
    start = clock()
    if console.is_terminal if console else sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = console or Console(stderr=True)
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(amount: int, remark: str = "") -> None:
                bar.update(task, advance=amount)
                done = bar.tasks[task].completed
                bar.update(task, note=f"{done / max(clock() - start, 1e-9):.1f} {unit}/s {remark}")

            yield advance
        return
    done, printed = 0, start

    def advance(amount: int, remark: str = "") -> None:
        nonlocal done, printed
        done += amount
        now = clock()
        if done < total and now - printed < PLAIN_INTERVAL_S:
            return
        printed = now
        rate = done / max(now - start, 1e-9)
        left_s = max(0, total - done) / rate if rate else 0.0
        text = f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {left_s:.0f} s left {remark}"
        print(text.rstrip(), file=console.file if console else sys.stderr, flush=True)

    yield advance
