"""Progress of long jobs."""

import io

from rich.console import Console

from vla_oft.progress import progress


def test_off_a_terminal_progress_is_a_plain_line_now_and_then():
    screen, now_s = Console(file=io.StringIO(), width=20), iter(range(0, 1000, 6))
    with progress("recording", 6, "episodes", screen, clock=lambda: float(next(now_s))) as advance:
        for step in range(6):
            advance(1, f"({step} failed)")
    assert screen.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "recording: 3/6 episodes, 0.2/s, 18 s left (2 failed)",
        "recording: 6/6 episodes, 0.2/s, 0 s left (5 failed)",
    ]


def test_on_a_terminal_progress_is_a_bar():
    screen = Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress("recording", 2, "episodes", screen) as advance:
        advance(2, "(1 failed)")
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "recording" in shown and "2/2" in shown and "(1 failed)" in shown
