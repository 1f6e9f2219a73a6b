"""Signals that ask a run to end: it finishes the step, saves, and says how to go on.

SIGTERM, SIGUSR1    a cluster takes the machine back: exit code 128 + signal
SIGINT              Ctrl-C: once to save and stop, twice to stop at once
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupts:
    """What has been asked for so far. received: the first signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        with contextlib.suppress(RuntimeError):  # the signal has come in the middle of another print
            print(f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)

    def leave(self) -> NoReturn:
        """End the program as the signal asked, after everything has been saved; where only another process had one, as by SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.received or signal.SIGTERM))


@contextmanager
def watch() -> Iterator[Interrupts]:
    """Inside, signals are noted instead of obeyed. Outside the main thread, where Python has none, nothing changes."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
