"""Short measurements of a machine: disk, processor, clock, renderer."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WRITTEN = 64 << 20
PERIOD_S, TICKS = 0.02, 75
RENDER_TIMEOUT_S = 120
_PRODUCT = 1024
_RENDER = "import os; from vla_oft.sims import rendering; rendering.check_renderer(); print(os.environ.get('MUJOCO_GL', 'native'))"


def disk(folder: Path) -> dict[str, Any]:
    """Free bytes of the disk that `folder` lies on, or would, and how fast 64 MiB are written to it (with fsync), in bytes per second."""
    import shutil

    place = folder.resolve()
    while not place.is_dir():
        place = place.parent
    found: dict[str, Any] = {"folder": str(place), "free": shutil.disk_usage(place).free, "writable": os.access(place, os.W_OK | os.X_OK)}
    if not found["writable"] or found["free"] < 2 * WRITTEN:
        return {**found, "write_bytes_per_s": None}
    block = np.random.default_rng(0).bytes(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        for _ in range(WRITTEN >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        found["write_bytes_per_s"] = WRITTEN / (time.perf_counter() - start)
    return found


def products() -> dict[str, float]:
    """Operations per second of matrix products on the CPU, with all its cores, in float32 and bfloat16."""
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.ones(_PRODUCT, _PRODUCT, dtype=dtype), torch.ones(_PRODUCT, _PRODUCT, dtype=dtype)
        found[name] = 2 * _PRODUCT**3 / min(_seconds(lambda a=a, b=b: torch.mm(a, b)) for _ in range(4))
    return found


def lateness(
    sleep: Callable[[float], None] = time.sleep, now: Callable[[], float] = time.perf_counter, ticks: int = TICKS
) -> dict[str, float]:
    """How late a loop of 50 Hz wakes up, in seconds: median, 99th percentile and worst of `ticks` periods."""
    start, late = now(), []
    for tick in range(1, ticks + 1):
        due = start + tick * PERIOD_S
        sleep(max(0.0, due - now()))
        late.append(max(0.0, now() - due))
    return {"median": float(np.median(late)), "p99": float(np.percentile(late, 99)), "worst": max(late)}


def renderer() -> tuple[str | None, str]:
    """What simulators draw with, or None and the reason. In a process of its own: a graphics driver may take it down."""
    try:
        done = subprocess.run([sys.executable, "-c", _RENDER], capture_output=True, text=True, timeout=RENDER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"drawing took longer than {RENDER_TIMEOUT_S} s"
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1], ""
    lines = [line for line in done.stderr.strip().splitlines() if "Error: " in line]
    return None, lines[-1].partition("Error: ")[2] if lines else f"the graphics driver ended the process (code {done.returncode})"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
