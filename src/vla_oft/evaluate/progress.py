"""Progress on standard error: a bar on a terminal, a plain line every few seconds elsewhere. Standard output stays clean for `--json`."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla_oft.evaluate.results import Trial

LINE_EVERY_S = 10.0


class EpisodeProgress:
    """Counts finished trials; shows rate, time left and the running success of the normal condition."""

    def __init__(self, total: int, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.console = console or Console(file=sys.stderr)
        self.done = self.successes = self.judged = self.broken = 0
        self.start_s = self.last_line_s = clock()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("evaluating", total=total, news="")

    def __enter__(self) -> "EpisodeProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, trial: Trial) -> None:
        """One more finished trial."""
        self.done += 1
        self.broken += trial.success is None
        if trial.condition == "normal" and trial.success is not None:
            self.judged += 1
            self.successes += trial.success
        self._bar.update(self._task, completed=self.done, news=self.news())
        now_s = self.clock()
        if not self.console.is_terminal and (self.done == self.total or now_s - self.last_line_s >= LINE_EVERY_S):
            self.last_line_s = now_s
            left_s = (now_s - self.start_s) / self.done * (self.total - self.done)
            self.console.print(f"evaluated {self.done}/{self.total} episodes, {self.news()}, {left_s:.0f} s left", highlight=False)

    def news(self) -> str:
        """Rate, running success, simulator errors."""
        rate = self.done / max(self.clock() - self.start_s, 1e-9)
        parts = [f"{rate:.1f}/s"]
        if self.judged:
            parts.append(f"success {self.successes}/{self.judged}")
        if self.broken:
            parts.append(f"{self.broken} simulator errors")
        return ", ".join(parts)
