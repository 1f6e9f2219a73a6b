"""Simulators in parallel processes whose results arrive in a fixed order, so that the worker count never changes a dataset."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vla_oft import processes
from vla_oft.sims.base import Simulator, SimulatorError, expert_class
from vla_oft_client import RobotSpec

AHEAD = 16
"""Tasks submitted before the oldest has been used."""
SEED_LIMIT = 1_000_000_000
"""Evaluation scenes have the seeds from here on (`evaluate.plan.FIRST_SEED`): none of them is ever recorded."""

Task = TypeVar("Task")
Result = TypeVar("Result")
MakeSimulator = Callable[[str, int], Any]
MakeExpert = Callable[[str, Any], Callable[[], np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was written: num_failed counts the expert's failures, which are not in the dataset."""

    out: Path
    num_episodes: int
    num_frames: int
    num_failed: int
    duration_s: float


def check_seeds(first: int, last: int) -> None:
    """Raise ValueError unless the scene seeds `first` .. `last` may be recorded."""
    if first < 0 or last >= SEED_LIMIT:
        raise ValueError(f"seed={first} would use the seeds {first}..{last}; recordings use 0..{SEED_LIMIT - 1}, evaluations those above")


def provenance(config: Any) -> dict[str, Any]:
    """What determines the contents of a recorded dataset, as it is written into it."""
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name not in ("out", "workers")}))


def try_out(suites: Sequence[str], camera_size: int, seed: int, make: MakeSimulator) -> RobotSpec:
    """Draw one picture of every suite before processes start: what is missing here is missing there. Returns the suites' robot."""
    specs: list[RobotSpec] = []
    try:
        for suite in suites:
            simulator = simulator_of(suite, camera_size, make)
            simulator.reset(seed)
            simulator.observe()
            specs.append(simulator.spec)
    finally:
        close_simulator()
    for suite, spec in zip(suites, specs, strict=True):
        if spec != specs[0]:
            raise ValueError(f"{suites[0]} and {suite} are of different robots: {'; '.join(specs[0].differences(spec))}; record them apart")
    return specs[0]


def make_expert(suite: str, simulator: Simulator) -> Callable[[], np.ndarray]:
    """The scripted expert of a suite, for one episode of `simulator`."""
    return expert_class(suite.partition("/")[0])(simulator)


_current: tuple[Any, Simulator] | None = None


def simulator_of(suite: str, camera_size: int, make: MakeSimulator) -> Simulator:
    """This process's simulator: built once, replaced when another suite's turn comes."""
    global _current
    key = (suite, camera_size, make)
    if _current is None or _current[0] != key:
        close_simulator()
        _current = (key, make(suite, camera_size))
    return _current[1]


def close_simulator() -> None:
    """Free this process's renderer."""
    global _current
    if _current is not None:
        _current[1].close()
        _current = None


@contextmanager
def open_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `in_order`; None, for workers=0, means this process."""
    try:
        with processes.open_pool(workers, _close_at_exit) as pool:
            yield pool
    finally:
        close_simulator()


def _close_at_exit() -> None:
    """Renderers must be freed before the libraries they use: at interpreter exit it is too late."""
    Finalize(None, close_simulator, exitpriority=100)


def in_order(pool: ProcessPoolExecutor | None, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
    """Results of `function` over (possibly endless) `tasks`, in their order. Closing the iterator abandons what is under way."""
    try:
        yield from processes.in_order(pool, function, tasks, AHEAD)
    except ChildProcessError:
        raise SimulatorError("a recording process died: its renderer crashed or memory ran out; use fewer workers") from None
