"""What a run says while it works: `metrics.jsonl` for programs, one aligned line for people."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vla_oft.atomic import replace_file


class Tracker:
    """Collects metrics on the device and reads them back once every `log_every` steps, so that no step waits for the host.

    A metric that is NaN in a step (the action error of a batch without actions) is left out of the mean.
    """

    def __init__(self, path: Path, *, log_every: int, total_steps: int, batch_size: int, start_step: int) -> None:
        self.path, self.log_every, self.total_steps, self.batch_size = path, log_every, total_steps, batch_size
        self._discard_after(start_step)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._wait_s = 0.0
        self._since = self._started = time.monotonic()
        self._last_step = self._first_step = start_step

    def add(self, step: int, metrics: dict[str, Tensor], lr: float, wait_s: float) -> None:
        """Record optimizer step `step` (1 = the first); print and write every `log_every` steps and at the end."""
        for name, value in metrics.items():
            known = ~torch.isnan(value)
            nothing = torch.zeros((), device=value.device)
            self._sums[name] = self._sums.get(name, nothing) + torch.where(known, value.float(), 0)
            self._counts[name] = self._counts.get(name, nothing) + known
        self._wait_s += wait_s
        if step % self.log_every == 0 or step == self.total_steps:
            self._flush(step, lr)

    def _flush(self, step: int, lr: float) -> None:
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        means = {name: float(total / self._counts[name]) for name, total in self._sums.items() if self._counts[name] > 0}
        rate = (step - self._last_step) * self.batch_size / elapsed
        row = {"step": step, **means, "lr": lr, "samples_per_s": rate, "data_wait": self._wait_s / elapsed, "time_s": now - self._started}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        eta_s = (self.total_steps - step) * (now - self._started) / max(step - self._first_step, 1)
        self._print(row, rate, eta_s, final=step == self.total_steps)
        self._sums, self._counts, self._wait_s, self._since, self._last_step = {}, {}, 0.0, now, step

    def _print(self, row: dict[str, float], rate: float, eta_s: float, *, final: bool) -> None:
        width = len(str(self.total_steps))
        parts = [f"step {int(row['step']):>{width}}/{self.total_steps}", f"loss {row['loss']:.4f}"]
        if "action_l1" in row:
            parts.append(f"action L1 {row['action_l1']:.4f}")
        if "grounding_hit" in row:
            parts.append(f"grounded {row['grounding_hit']:4.0%}")
        parts += [
            f"grad {row['grad_norm']:6.2f}",
            f"lr {row['lr']:.1e}",
            f"{rate:6.1f} samples/s",
            f"data wait {row['data_wait']:4.0%}",
            f"ETA {_clock(eta_s)}",
        ]
        live = sys.stderr.isatty() and not final
        sys.stderr.write(("\r\x1b[2K" if sys.stderr.isatty() else "") + "  ".join(parts) + ("" if live else "\n"))
        sys.stderr.flush()

    def _discard_after(self, step: int) -> None:
        """On resume, forget rows of steps that will be trained again."""
        if self.path.exists():
            complete = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            replace_file(self.path, "".join(line for line in complete if json.loads(line)["step"] <= step))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
