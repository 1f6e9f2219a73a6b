"""Episodes in parallel processes, each of which is given the job once.

Processes rather than threads: a `Source` may be pickled, but says nothing about threads, and HDF5 lets only one of them read.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from vla_oft import processes

AHEAD = 2
"""Results that may wait beyond those in work."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """Runs `function(job, task)`."""

    def __init__(self, count: int, job: Any, pool: ProcessPoolExecutor | None) -> None:
        self._count, self._job, self._pool = count, job, pool

    def in_order(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Results in the order of `tasks`. Raises what `function` raises, and ChildProcessError when a process dies."""
        run = partial(function, self._job) if self._pool is None else partial(_run, function)
        yield from processes.in_order(self._pool, run, tasks, self._count + AHEAD)


@contextmanager
def open_workers(count: int, job: Any) -> Iterator[Workers]:
    """count: processes; 0 works in this one."""
    with processes.open_pool(count, _begin, (job,)) as pool:
        yield Workers(count, job, pool)


_job: Any = None


def _begin(job: Any) -> None:
    global _job
    _job = job


def _run(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_job, task)
