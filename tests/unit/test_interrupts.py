"""Signals that ask a run to end."""

import signal
import sys

from vla_oft.train.interrupts import Interrupts


class Busy:
    """A stream that is in the middle of a write."""

    def write(self, text: str) -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    def flush(self) -> None:
        pass


def test_a_signal_in_the_middle_of_a_print_is_noted_all_the_same(monkeypatch):
    interrupts = Interrupts()
    monkeypatch.setattr(sys, "stderr", Busy())
    interrupts(signal.SIGTERM, None)
    assert interrupts.received == signal.SIGTERM
