"""Work in parallel processes whose results arrive in the order of the tasks, so that the number of processes never changes a result.

At most `ahead` tasks are under way or wait to be used: memory does not grow with their number. Processes end with the one that started
them, even if that one is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def open_pool(
    workers: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `in_order`, spawned, in which `begin(*arguments)` has run; None, for workers=0, means this process."""
    if workers < 0:
        raise ValueError(f"workers must be 0 (this process) or more, got {workers}")
    if not workers:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(begin, arguments)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: ProcessPoolExecutor | None, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Generator[Result, None, None]:
    """Results of `function` over (possibly endless) `tasks`, in their order. Closing the iterator abandons what is under way.

    Raises what `function` raises, and ChildProcessError when a process has died.
    """
    if pool is None:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    waiting: deque[Future[Result]] = deque(pool.submit(function, task) for task in islice(remaining, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, task) for task in islice(remaining, 1))
            yield result
    except BrokenProcessPool:
        raise ChildProcessError("a worker process has died: it crashed, or memory ran out; use fewer workers") from None
    finally:
        for future in waiting:
            future.cancel()


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _die_with_parent() -> None:
    """The executor's own processes would wait for ever for the next task of one that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
