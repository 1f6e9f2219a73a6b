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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reference does, for comparisons: times 0.1 at step `decay_at`, but ONLY without warm-up.

    Its warm-up starts at 10 % (of which step 0 already leaves one part) and rewrites the learning rate in every step for good: with
    `warmup_steps` > 0 the decay never takes effect, although its log shows it.
    """

    decay_at: int
    warmup_steps: int = 0

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the peak learning rate for optimizer step `step` (from 0)."""
        if self.warmup_steps:
            return 0.1 + 0.9 * min(1.0, (step + 1) / self.warmup_steps)
        return 0.1 if step >= self.decay_at else 1.0


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
