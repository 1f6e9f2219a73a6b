"""What has happened so far in an evaluation, on standard error: standard output stays clean for `--json`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from vla_oft.evaluate.results import Trial
from vla_oft.progress import progress

Count = Callable[[Trial], None]


@contextmanager
def tally(total: int, console: Console | None = None, **options: Callable[[], float]) -> Iterator[Count]:
    """Yield the function that counts a finished trial; shows rate, time left and the running success of the normal condition."""
    judged = successes = broken = 0

    with progress("evaluating", total, "episodes", console, **options) as advance:

        def count(trial: Trial) -> None:
            nonlocal judged, successes, broken
            broken += trial.success is None
            if trial.condition == "normal" and trial.success is not None:
                judged += 1
                successes += trial.success
            news = [f"success {successes}/{judged}"] * bool(judged) + [f"{broken} simulator errors"] * bool(broken)
            advance(1, ", ".join(news))

        yield count
