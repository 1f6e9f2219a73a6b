"""Learning-rate schedules as pure functions of the step. Warm-up multiplies: it never cancels the decay (the reference's does)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up over `warmup_steps`, then half a cosine down to `floor` times the peak at the last step."""

    warmup_steps: int = 0
    floor: float = 0.1

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the peak learning rate for optimizer step `step` (from 0)."""
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return _warmup(step, self.warmup_steps) * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, then times `gamma` at each of `milestones` (paper: 0.1 at 100,000)."""

    milestones: tuple[int, ...]
    warmup_steps: int = 0
    gamma: float = 0.1

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the peak learning rate for optimizer step `step` (from 0)."""
        return _warmup(step, self.warmup_steps) * self.gamma ** sum(step >= m for m in self.milestones)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
