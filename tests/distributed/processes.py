"""Real processes for tests: forked from one that has imported everything, so that each starts in a moment."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vla_oft.train.loop", "tests.training", "vla_oft.data.formats.lerobot"])
PATIENCE_S = 240


def run_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in `world_size` processes that find each other as torchrun's do; raise what any of them raises."""
    port = _free_port()
    processes = [_start(_rank, rank, world_size, port, function, arguments) for rank in range(world_size)]
    deadline = time.monotonic() + PATIENCE_S
    errors: list[str] = []
    for process, pipe in processes:
        while process.is_alive() and not pipe.poll(0.05) and time.monotonic() < deadline and not errors:
            pass
        if pipe.poll():
            errors.append(pipe.recv())
    for process, _ in processes:
        if errors or time.monotonic() > deadline:
            process.kill()
        process.join(10)
    if errors:
        raise AssertionError(errors[0])
    assert all(process.exitcode == 0 for process, _ in processes), [process.exitcode for process, _ in processes]


def run_and_kill(after_s: float, function: Callable[..., None], *arguments: Any) -> bool:
    """Call `function(*arguments)` in a process of its own and kill it (SIGKILL) after that time, if it has not killed itself before.

    True when it has come to its end.
    """
    process, pipe = _start(_alone, function, arguments)
    process.join(after_s)
    if process.is_alive() and process.pid:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if pipe.poll():
        raise AssertionError(pipe.recv())
    return process.exitcode == 0


def _start(target: Callable[..., None], *arguments: Any) -> Any:
    receiving, sending = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(sending, *arguments))
    process.start()
    sending.close()
    return process, _Quiet(receiving)


class _Quiet:
    """A pipe whose end is no news."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.message = pipe, None

    def poll(self, timeout_s: float = 0.0) -> bool:
        if self.message is None and self.pipe.poll(timeout_s):
            try:
                self.message = self.pipe.recv()
            except EOFError:
                time.sleep(timeout_s)
        return self.message is not None

    def recv(self) -> str:
        assert self.message is not None
        return self.message


def _rank(errors: Any, rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _alone(errors, function, arguments)


def _alone(errors: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        errors.send(traceback.format_exc())
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
