"""Chooses, for each matrix product and attention of a model, the fastest way to compute it on this GPU, and remembers it on disk.

A candidate must agree with torch's answer within rounding and be at least 2 % faster than torch to be chosen; what was refused is recorded
with the reason. On an H200 a model has about 17 different products with up to 15 candidates each. A kernel compiles in about a second,
many are shared between products, and a timing takes milliseconds: about three minutes the first time (estimated), nothing afterwards.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vla_oft.atomic import replace_file
from vla_oft.engine.kernels.attention import Attention
from vla_oft.engine.kernels.candidates import Machine
from vla_oft.engine.kernels.products import Candidate, Product
from vla_oft.engine.kernels.tiles import Tiles
from vla_oft.progress import progress

if TYPE_CHECKING:
    from vla_oft.engine.kernels.trials import Trial

FORMAT = 1
"""Of the file, and of the kernels: raise it when a kernel changes, and old times are forgotten."""
MARGIN = 0.02
"""A smaller gain is within the noise of two runs of the same kernel."""
Task = Product | Attention
Bench = Callable[[Task], Callable[[Candidate], "Trial"]]
"""Prepares a task's operands, then times one candidate; raises what the candidate raises."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to compute. way and tiles: see `products`; times of one call in ms, None where nothing was measured.

    refused: candidates that failed or were wrong, and why; times_ms: of all that were right. Both by the candidate's description.
    """

    way: str = "torch"
    tiles: Tiles | None = None
    time_ms: float | None = None
    torch_ms: float | None = None
    refused: dict[str, str] = field(default_factory=dict, compare=False)
    times_ms: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def candidate(self) -> Candidate:
        """What `products.compute` takes."""
        return Candidate(way=self.way, tiles=self.tiles)

    def to_json(self) -> dict[str, Any]:
        """For the cache."""
        tiles = None if self.tiles is None else self.tiles.as_dict()
        times = {"time_ms": self.time_ms, "torch_ms": self.torch_ms, "times_ms": self.times_ms}
        return {"way": self.way, "tiles": tiles, **times, "refused": self.refused}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Choice":
        """Raises TypeError or ValueError for what `to_json` did not write."""
        tiles = stored["tiles"]
        return cls(**{**stored, "tiles": None if tiles is None else Tiles(**tiles)})


class Tuner:
    """Choices for one machine. Without one (no GPU, or tuning turned off) everything is torch's."""

    def __init__(self, machine: Machine | None, bench: Bench | None, cache_path: Path | None = None) -> None:
        """bench None: nothing is measured, but what the cache holds is used."""
        self.machine, self.bench = machine, bench
        self.path = cache_path or (default_path(machine) if machine else None)
        self._known: dict[str, Choice] | None = None

    @classmethod
    def for_device(cls, device: torch.device, enabled: bool = True, cache_path: Path | None = None) -> "Tuner":
        """Measures on a CUDA device with triton; never elsewhere, nor when not enabled."""
        if device.type != "cuda" or not enabled or not has_triton():
            return cls(None, None)
        from vla_oft.engine import ops
        from vla_oft.engine.kernels import trials

        fused, cache_bytes = ops.fused(), torch.cuda.get_device_properties(device).L2_cache_size
        return cls(trials.machine_of(device), lambda task: trials.bench(task, device, fused, cache_bytes), cache_path)

    def choose(self, task: Task) -> Choice:
        """From the cache, or measured now and stored."""
        return self.choose_all([task])[0]

    def choose_all(self, tasks: Iterable[Task]) -> list[Choice]:
        """A choice for each task; shows progress where something is measured."""
        tasks = list(tasks)
        if self.machine is None:
            return [Choice() for _ in tasks]
        missing = {task.key: task for task in tasks if task.key not in self.known}
        if missing and self.bench is not None:
            total = sum(len(task.candidates(self.machine)) for task in missing.values())
            with progress("timing kernels", total, "candidates") as advance:
                for key, task in missing.items():
                    self._store(key, self._measure(task, advance))
        return [self.known.get(task.key, Choice()) for task in tasks]

    @property
    def known(self) -> dict[str, Choice]:
        """What the cache holds, by key."""
        if self._known is None:
            self._known = _read(self.path)
        return self._known

    def _measure(self, task: Task, advance: Callable[..., None]) -> Choice:
        assert self.machine is not None and self.bench is not None
        first, *others = task.candidates(self.machine)
        if not others:
            return Choice(way=first.way)
        trial = self.bench(task)
        torch_ms = trial(first).time_ms
        advance(1, task.key)
        times, refused = {}, {}
        for candidate in others:
            try:
                result = trial(candidate)
            except Exception as e:
                refused[str(candidate)] = _first_line(e)
            else:
                if result.error <= task.tolerance:  # not so for NaN
                    times[candidate] = result.time_ms
                else:
                    refused[str(candidate)] = f"differs from torch by {result.error:.2g}, more than {task.tolerance:g}"
            advance(1, task.key)
        best = min(times, key=times.__getitem__, default=first)
        if best is not first:  # clocks change while a card warms up: torch has a second chance
            torch_ms = min(torch_ms, trial(first).time_ms)
        best = best if times.get(best, torch_ms) < torch_ms * (1 - MARGIN) else first
        records = {"refused": refused, "times_ms": {first.way: torch_ms} | {str(c): t for c, t in times.items()}}
        return Choice(way=best.way, tiles=best.tiles, time_ms=times.get(best, torch_ms), torch_ms=torch_ms, **records)

    def _store(self, key: str, choice: Choice) -> None:
        """Add to the file what other processes may have added to meanwhile."""
        assert self.path is not None
        self._known = {**_read(self.path), **self.known, key: choice}
        choices = {k: c.to_json() for k, c in sorted(self._known.items())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps({"format": FORMAT, "choices": choices}, indent=1) + "\n")
        except OSError as e:  # a policy that can act must not fail for want of a cache
            warnings.warn(
                f"the kernel times cannot be kept in {self.path} ({_first_line(e)}): they are measured anew next time", stacklevel=2
            )


def default_path(machine: Machine) -> Path:
    """$XDG_CACHE_HOME/vla_oft/gemm-<device>-torch<version>-triton<version>.json; ~/.cache without that variable."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_oft"
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", machine.name)
    triton = metadata.version("triton") if has_triton() else "none"
    return folder / f"gemm-{name}-torch{torch.__version__}-triton{triton}.json"


def _read(path: Path | None) -> dict[str, Choice]:
    """Choices of a cache file; none if there is no file, it is of another format, or (with a warning) it cannot be read."""
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {key: Choice.from_json(c) for key, c in stored["choices"].items()} if stored["format"] == FORMAT else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        warnings.warn(f"the kernel times in {path} cannot be read ({_first_line(e)}); measuring again", stacklevel=2)
        return {}


def has_triton() -> bool:
    """Whether fused kernels can be had. torch's CUDA builds for Linux bring triton."""
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
