"""What a run says while it works: `metrics.jsonl` for programs, one aligned line for people, and a sink if there is one.

    step           1     2     3     4     5     6            log_every=3, validated at step 5
    row                        x           x     x            means of steps 1-3; of 4-5, with validation errors; of 6

Every process has a tracker, which is given the same numbers and returns the same rows; only the first process writes and speaks.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_oft.atomic import replace_file
from vla_oft.heads.base import Metrics
from vla_oft.train.sinks import Sink

Row = dict[str, Any]
"""One line of metrics.jsonl: `step`, `loss` and further numbers; None for what is not finite; lists of numbers from validation."""


class Tracker:
    """Collects metrics on the device and reads them back once every `log_every` steps, so that no step waits for the host.

    path: of metrics.jsonl; None in all processes but the first, which then write and say nothing. batch_size: samples of one optimizer
    step, over all processes. start_step: where the run continues; rows beyond it are discarded. device: where the metrics are.
    names: what the entries of lists are called, for sinks: {"validation_l1_by_dim": ("x", "y", ...)}.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        log_every: int,
        total_steps: int,
        batch_size: int,
        start_step: int,
        device: torch.device | str = "cpu",
        sink: Sink | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.log_every, self.total_steps, self.batch_size = path, log_every, total_steps, batch_size
        self.device, self.sink, self.names, self.clock = torch.device(device), sink, names or {}, clock
        if path is not None:
            discard_after(path, start_step)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._wait_s, self._before_s, self._idle_s = 0.0, 0.0, 0.0
        self._since = self._started = clock()
        self._last_step = self._first_step = start_step
        self._live = False

    def add(
        self,
        step: int,
        metrics: Metrics,
        *,
        lr: float,
        wait_s: float,
        skipped: Tensor | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> Row | None:
        """Record optimizer step `step` (1 = the first). Returns the row that was written, or None; in every process, alike but for times.

        There is one every `log_every` steps, after the last step, and for every step that has `validation`: values of that step, which
        join the row as they are.
        metrics: scalars, means over the samples of the step; one that is not finite (the action error of a batch without actions) is left
        out of the row's mean. wait_s: how long the step waited for data. skipped: bool (), whether the guard left this step out; rows
        count them. Raises OSError naming the file when it cannot be written.
        """
        for name, value in metrics.items():
            value = value.detach().float()
            known = value.isfinite()
            nothing = torch.zeros((), device=value.device)
            self._sums[name] = self._sums.get(name, nothing) + torch.where(known, value, 0)
            self._counts[name] = self._counts.get(name, nothing) + known
        self._wait_s += wait_s
        if skipped is not None:
            self._skipped += skipped
        if step % self.log_every and step != self.total_steps and validation is None:
            return None
        return self._write(step, lr, validation or {})

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error is not None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time passes that is no training: it does not count in samples a second, but in the run's duration."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self.clock()
        try:
            yield
        finally:
            self._idle_s += self.clock() - start

    def say(self, text: str) -> None:
        """Print a line of its own; only the first process does."""
        if self.path is not None:
            sys.stderr.write(("\r\x1b[2K" if self._live else "") + text + "\n")
            sys.stderr.flush()
            self._live = False

    def close(self, *, failed: bool = False) -> None:
        """End the line and the sink. Safe to call twice; leaving `with` calls it."""
        if self._live:
            sys.stderr.write("\n")
            self._live = False
        if self.sink is not None:
            self.sink.close(failed=failed)
            self.sink = None

    def state_dict(self) -> dict[str, Tensor]:
        """For exact resume: what was added since the last row, and how long the run has taken."""
        now = self._before_s + self.clock() - self._started
        scalars = {"time_s": torch.tensor(now, dtype=torch.float64), "skipped": self._skipped}
        sums = {f"{kind}.{name}": value for kind, parts in self._parts().items() for name, value in parts.items()}
        return {name: value.clone() for name, value in {**scalars, **sums}.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._before_s = float(state["time_s"])
        self._skipped.copy_(state["skipped"])
        for kind, parts in self._parts().items():
            found = {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}
            parts.update({name: value.to(self.device) for name, value in found.items()})

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"sum": self._sums, "count": self._counts}

    def _write(self, step: int, lr: float, validation: Mapping[str, Any]) -> Row:
        means = self._means()  # waits for the device
        now = self.clock()
        elapsed = max(now - self._since - self._idle_s, 1e-9)
        row: Row = {"step": step, **means, "lr": lr, "samples_per_s": (step - self._last_step) * self.batch_size / elapsed}
        row |= {"data_wait": self._wait_s / elapsed, "time_s": self._before_s + now - self._started, "skipped": int(self._skipped)}
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        row = {name: _finite(value) for name, value in {**row, **validation}.items()}
        self._sums.clear()
        self._counts.clear()
        self._skipped.zero_()
        eta_s = (self.total_steps - step) * (now - self._started) / max(step - self._first_step, 1)
        self._wait_s, self._idle_s, self._since, self._last_step = 0.0, 0.0, now, step
        if self.path is not None:
            append_row(self.path, row)
            self._print(row, eta_s)
            if self.sink is not None:
                self.sink.write(step, flat(row, self.names))
        return row

    def _means(self) -> dict[str, float]:
        """Of everything since the last row. A metric that was never finite is left out, but for the loss."""
        totals = torch.stack([torch.stack([self._sums[name], self._counts[name]]).to(self.device) for name in self._sums]).tolist()
        means = {name: total / count if count else math.nan for name, (total, count) in zip(self._sums, totals, strict=True)}
        return {name: mean for name, mean in means.items() if name == "loss" or not math.isnan(mean)}

    def _print(self, row: Row, eta_s: float) -> None:
        final = row["step"] == self.total_steps
        text = progress_line(row, self.total_steps, eta_s)
        terminal = sys.stderr.isatty()
        self._live = terminal and not final
        if self._live:
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be overwritten
        sys.stderr.write(("\r\x1b[2K" if terminal else "") + text + ("" if self._live else "\n"))
        sys.stderr.flush()
        if "validation_action_l1" in row:
            self.say(validation_line(row))


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a line that a kill or a full disk has cut off is left out."""
    return parse_rows(path.read_text().splitlines())


def parse_rows(lines: Iterable[str]) -> list[Row]:
    """The same of some of its lines."""
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a line. Raises OSError naming the file when that fails, for example because the disk is full."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:  # writing does not say to what
        raise OSError(error.errno, error.strerror, str(path)) from None


def discard_after(path: Path, step: int) -> None:
    """On resume, forget rows of steps that will be trained again."""
    if path.exists():
        replace_file(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


def flat(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Every number of a row under a name of its own: entries of lists as `list/name`, numbered where they have no names."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list):
            labels = names.get(key) or [str(i) for i in range(len(value))]
            found |= {f"{key}/{label}": entry for label, entry in zip(labels, value, strict=True) if entry is not None}
        elif value is not None and key != "step":
            found[key] = value
    return found


def progress_line(row: Row, total_steps: int, eta_s: float) -> str:
    """One line about a row for people."""
    width = len(str(total_steps))
    parts = [f"step {row['step']:>{width}}/{total_steps}", f"loss {_shown(row['loss'])}"]
    if "action_l1" in row:
        parts.append(f"action L1 {row['action_l1']:.4f}")
    if "grounding_hit" in row:
        parts.append(f"grounded {row['grounding_hit']:4.0%}")
    parts += [
        f"grad {row['grad_norm']:6.2f}" if row.get("grad_norm") is not None else "",
        f"lr {row['lr']:.1e}",
        f"{row['samples_per_s']:6.1f} samples/s",
        f"data wait {row['data_wait']:4.0%}",
        f"skipped {row['skipped']}" if row["skipped"] else "",
        f"ETA {duration(eta_s)}",
    ]
    return "  ".join(part for part in parts if part)


def validation_line(row: Row) -> str:
    """One line about the validation of a row."""
    return f"validation at step {row['step']}: action L1 {_shown(row['validation_action_l1'])}, first step of a chunk " + _shown(
        row["validation_action_l1_first"]
    )


def duration(seconds: float) -> str:
    """1:02:03, or 02:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
