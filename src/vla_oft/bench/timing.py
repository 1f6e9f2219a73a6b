"""Time calls, one after another: warm up, rotate the inputs, wait for the device, keep every single time.

model        everything on the device; inputs were prepared and copied before the clock starts
end to end   raw uint8 images, state and instruction in, robot actions out, as a robot waits for them
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vla_oft.policy import Policy
from vla_oft_client import ActionChunk, Observation

MIN_CALLS = 2


class Subject(Protocol):
    """What is timed: the eager policy, or a compiled one."""

    def act(self, observations: Sequence[Observation], noise: Tensor | None = None) -> list[ActionChunk]:
        """See `Policy.act`."""
        ...

    def prepare(self, observations: Sequence[Observation], noise: Tensor | None = None) -> Callable[[], Tensor]:
        """Everything up to the device -> what remains: normalised actions (B, K, D), float32."""
        ...


@dataclass(frozen=True)
class Eager:
    """A policy as it is, behind the interface of a compiled one."""

    policy: Policy

    def act(self, observations: Sequence[Observation], noise: Tensor | None = None) -> list[ActionChunk]:
        """See `Policy.act`."""
        return self.policy.act(observations, noise=noise)

    def prepare(self, observations: Sequence[Observation], noise: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Subject.prepare`."""
        inputs = self.policy.prepare(observations)
        given = None if noise is None else noise.to(self.policy.device, torch.float32).expand(len(observations), -1, -1)

        def call() -> Tensor:
            with torch.inference_mode():
                return self.policy.predict(inputs, noise=given)

        return call


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of every timed call. peak_bytes: of device memory, or of the process on a CPU; None where it cannot be read.

    others: share of the machine's CPU time that went to other processes meanwhile; None where it cannot be read.
    """

    model_ms: list[float]
    end_to_end_ms: list[float]
    peak_bytes: int | None
    others: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """calls: of each kind, after `warmup` untimed ones. budget_s: fewer calls where they would take longer, but at least `MIN_CALLS`."""

    calls: int = 200
    warmup: int = 20
    budget_s: float | None = None

    def __post_init__(self) -> None:
        if self.calls < 1 or self.warmup < 0:
            raise ValueError(f"calls={self.calls} must be at least 1 and warmup={self.warmup} at least 0")


def measure(subject: Subject, batches: Sequence[list[Observation]], noise: Tensor | None, plan: Plan, device: torch.device) -> Times:
    """Time both kinds of call over rotating inputs. noise: (K, D), given to every call."""
    reset_peak(device)
    before = _cpu_seconds()

    def end_to_end(index: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        subject.act(batches[index % len(batches)], noise=noise)
        synchronize(device)
        return 1000 * (time.perf_counter() - start)

    def model(index: int) -> float:
        call = subject.prepare(batches[index % len(batches)], noise=noise)
        synchronize(device)
        with torch.inference_mode():
            start = time.perf_counter()
            call()
            synchronize(device)
            return 1000 * (time.perf_counter() - start)

    budget_s = float("inf") if plan.budget_s is None else plan.budget_s
    _repeat(end_to_end, plan.warmup, min(plan.warmup, 1), budget_s / 4)
    least = plan.calls if plan.budget_s is None else min(plan.calls, MIN_CALLS)
    model_ms, end_to_end_ms = (_repeat(once, plan.calls, least, budget_s / 2) for once in (model, end_to_end))
    others = _others(before, _cpu_seconds())
    return Times(model_ms=model_ms, end_to_end_ms=end_to_end_ms, peak_bytes=peak(device), others=others)


def _repeat(once: Callable[[int], float], most: int, least: int, budget_s: float) -> list[float]:
    """Call until the time is over, but at least and at most so often."""
    start, times = time.perf_counter(), []
    while len(times) < least or (len(times) < most and time.perf_counter() - start < budget_s):
        times.append(once(len(times)))
    return times


@torch.inference_mode()
def answers(subject: Subject, batches: Sequence[list[Observation]], noise: Tensor | None) -> Tensor:
    """Normalised actions for every batch, on the CPU: float64 (number of batches, B, K, D)."""
    return torch.stack([subject.prepare(batch, noise=noise)().double().cpu().clone() for batch in batches])


def relative_error(found: Tensor, true: Tensor) -> float:
    """||found - true|| / ||true||."""
    return float((found - true).norm() / true.norm())


def percentiles(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """P50, P95 and P99, linearly interpolated."""
    p50, p95, p99 = np.percentile(np.asarray(times_ms, float), [50, 95, 99])
    return float(p50), float(p95), float(p99)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin to watch the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident set
    except OSError:
        return


def peak(device: torch.device) -> int | None:
    """Bytes: of device memory handed out at most since `reset_peak`; on a CPU, of the whole process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Of the machine: busy and idle; of this process: busy."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, idle, waiting, *rest = (int(v) / os.sysconf("SC_CLK_TCK") for v in stat.read_text().split("\n", 1)[0].split()[1:9])
    return user + nice + system + sum(rest), idle + waiting, time.process_time()


def _others(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    if before is None or after is None:
        return None
    busy, idle, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / (busy + idle)) if busy + idle > 0 else 0.0


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")]
    return found[0] if found else None
