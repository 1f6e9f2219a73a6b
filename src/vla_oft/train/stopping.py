"""When to end a run early: the paper trains until the training L1 loss is below 0.01 and no longer falls (appendix on training).

step        100   200   300   400    500    600    700    800       below=0.01, min_drop=0.05, patience_steps=400
value       .04   .02   .012  .0098  .0096  .0097  .0095  .0096     (smoothed)
best        .04   .02   .012  .0098  .0098  .0098  .0098  .0098     nothing since is 5 % below it
                              |------------ 400 ----------| stop
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMOOTHING = 10
"""The running mean looks back over the patience divided by this."""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Ends the run when `metric`, averaged between two rows of metrics.jsonl, is below `below` (None: whatever it is) and has not fallen by
    `min_drop` (a share of its best value) for `patience_steps` optimizer steps.

    metric: a name of metrics.jsonl; `action_l1` of training, or `validation_action_l1`. Rows are noisy, and the lowest of many is low by
    chance: what is compared is their running mean over about the last tenth of `patience_steps`. after: never before this step, for
    example the last one at which the learning rate falls.
    """

    metric: str = "action_l1"
    below: float | None = 0.01
    patience_steps: int = 5000
    min_drop: float = 0.02
    after: int = 0

    def __post_init__(self) -> None:
        if self.patience_steps < 1 or self.after < 0:
            raise ValueError(f"stop.patience_steps={self.patience_steps} must be positive, stop.after={self.after} not negative")
        if not 0 <= self.min_drop < 1:
            raise ValueError(f"stop.min_drop={self.min_drop!r} must lie in [0, 1)")
        if self.below is not None and not self.below > 0:
            raise ValueError(f"stop.below={self.below!r} must be positive, or None")


class Plateau:
    """Watches one metric over the rows of metrics.jsonl."""

    def __init__(self, config: EarlyStop) -> None:
        self.config = config
        self.best, self.best_step = math.inf, 0
        self.mean, self.rows, self.first_step, self.step = 0.0, 0, 0, 0

    def should_stop(self, row: Mapping[str, Any]) -> str | None:
        """Why to stop after this row, in words, or None. A row without a finite value of the metric says nothing."""
        value = row.get(self.config.metric)
        if value is None or not math.isfinite(value):
            return None
        c, step = self.config, row["step"]
        self._average(step, value)
        if step - self.first_step < c.patience_steps / SMOOTHING:  # the mean of a few rows is low by chance
            return None
        if self.mean < self.best * (1 - c.min_drop):
            self.best, self.best_step = self.mean, step
            return None
        if step < c.after or step - self.best_step < c.patience_steps or (c.below is not None and self.mean >= c.below):
            return None
        value = self.mean
        low = f"{c.metric} {value:.4g} is below {c.below:g} and" if c.below is not None else f"{c.metric} {value:.4g}"
        drop = f"fallen by {c.min_drop:.3g} of its value" if c.min_drop else "fallen"
        return f"{low} has not {drop} since step {self.best_step:,} ({self.best:.4g})"

    def state_dict(self) -> dict[str, Tensor]:
        """For exact resume: scalars."""
        real = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("best", "mean")}
        return real | {name: torch.tensor(getattr(self, name)) for name in ("best_step", "rows", "first_step", "step")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name in self.state_dict():
            setattr(self, name, state[name].item())

    def _average(self, step: int, value: float) -> None:
        """Fold a value into the running mean: a plain mean at first."""
        if not self.rows:
            self.first_step = step
        self.rows += 1
        kept = min(1 - 1 / self.rows, math.exp(-SMOOTHING * (step - self.step) / self.config.patience_steps))
        self.mean, self.step = self.mean * kept + value * (1 - kept), step
