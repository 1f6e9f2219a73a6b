"""Steps whose loss or gradient is not finite, or far above what is usual, are skipped, reported, and in the end stop the run.

    step            1     2     3     4     5     6     7     8          spike=10, warmup_steps=3
    gradient norm   1.1   0.9   1.0   30    1.0   nan   nan   0.9
    usual           1.1   1.0   1.0   1.0   1.0   1.0   1.0   1.0        geometric mean; skipped steps do not move it
    skipped                           x           x     x                4: 30 times the usual; then two in a row

Everything is decided on the device: no step waits for the host, which only hears of it when it asks for a report. Loss and gradient norm
are those of the whole step, the same in every process, so all processes decide alike.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NOT_SKIPPED, BAD_LOSS, BAD_NORM, SPIKE = range(4)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """spike: a step whose gradient norm exceeds the usual one this many times is skipped; None skips only what is not finite.
    warmup_steps: how many steps it takes to know what is usual, and how many it looks back. stop_after: so many skipped steps in a row end
    the run.
    """

    spike: float | None = None
    warmup_steps: int = 100
    stop_after: int = 10

    def __post_init__(self) -> None:
        if self.spike is not None and not 1 < self.spike < math.inf:
            raise ValueError(f"guard.spike={self.spike!r} must be above 1, or None")
        if self.warmup_steps < 1 or self.stop_after < 1:
            raise ValueError(f"guard.warmup_steps={self.warmup_steps} and guard.stop_after={self.stop_after} must be positive")


@dataclass(frozen=True, kw_only=True)
class GuardReport:
    """What was skipped since the report before.

    skipped: steps; total: of the whole run; in_a_row: the most of them that followed one another. Of the last of them: step, loss,
    grad_norm and reason. largest: the largest finite gradient norm among them, 0 where none was finite.
    """

    skipped: int
    total: int
    in_a_row: int
    step: int
    loss: float
    grad_norm: float
    reason: str
    largest: float

    @property
    def line(self) -> str:
        """One line for people."""
        many = f"{self.skipped} steps, the last of them step {self.step:,}" if self.skipped > 1 else f"step {self.step:,}"
        return f"skipped {many}: {self.reason} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}); {self.total} in this run"


class StepGuard:
    """Judges every optimizer step. Ask it once for each step, in order: it counts them."""

    def __init__(self, config: Guard, device: torch.device | str) -> None:
        self.config = config
        whole = {name: torch.zeros((), dtype=torch.int64, device=device) for name in _WHOLE}
        self._state = whole | {name: torch.zeros((), device=device) for name in _REAL}

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip the step with this loss and this gradient norm (before clipping), both scalars: bool (), on the device."""
        s, c = self._state, self.config
        loss, norm = loss.detach().float(), grad_norm.detach().float()
        finite_loss, finite_norm = loss.isfinite(), norm.isfinite()
        reason = torch.where(finite_loss, torch.where(finite_norm, NOT_SKIPPED, BAD_NORM), BAD_LOSS)
        if c.spike is not None:
            above = finite_loss & finite_norm & (s["known"] >= c.warmup_steps) & (norm > c.spike * s["usual"].exp())
            reason = torch.where(above, SPIKE, reason)
        bad = reason != NOT_SKIPPED
        s["steps"] += 1
        s["total"] += bad
        s["skipped"] += bad
        s["in_a_row"] = (s["in_a_row"] + 1) * bad
        s["most"] = torch.maximum(s["most"], s["in_a_row"])
        s["largest"] = torch.where(bad & finite_norm, torch.maximum(s["largest"], norm), s["largest"])
        latest = {"step": s["steps"], "reason": reason, "loss": loss, "norm": norm, "usual_then": s["usual"]}
        for name, value in latest.items():
            s[name] = torch.where(bad, value, s[name])
        self._learn(norm, ~bad & (norm > 0))
        return bad

    def report(self, last_checkpoint: Path | None = None) -> GuardReport | None:
        """What was skipped since the last call, or None. Waits for the device; the same in every process.

        Raises FloatingPointError when `stop_after` steps in a row were skipped since then. last_checkpoint: named in that error.
        """
        if not self._state["skipped"]:
            return None
        s = {name: value.item() for name, value in self._state.items()}
        for name in ("skipped", "most", "largest"):
            self._state[name].zero_()
        found = GuardReport(
            skipped=int(s["skipped"]),
            total=int(s["total"]),
            in_a_row=int(s["most"]),
            step=int(s["step"]),
            loss=s["loss"],
            grad_norm=s["norm"],
            reason=_words(int(s["reason"]), s["norm"], math.exp(s["usual_then"])),
            largest=s["largest"],
        )
        if found.in_a_row >= self.config.stop_after:
            raise FloatingPointError(_verdict(found, last_checkpoint))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """For exact resume: scalars."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, mine in self._state.items():
            mine.copy_(state[name])

    def _learn(self, norm: Tensor, fair: Tensor) -> None:
        """Fold a norm into the usual one: their mean at first, later an average that looks back `warmup_steps`. Of logarithms, because
        norms vary by factors; a norm of 0 (nothing to learn in the batch) has none.
        """
        s = self._state
        s["known"] += fair
        share = 1 / s["known"].clamp(1, self.config.warmup_steps)
        s["usual"] = torch.where(fair, s["usual"].lerp(norm.log(), share), s["usual"])


_WHOLE = ("steps", "known", "total", "skipped", "in_a_row", "most", "step", "reason")
_REAL = ("usual", "usual_then", "loss", "norm", "largest")
"""What a guard remembers. steps: checked so far; known: of these, in `usual`, the logarithm of the usual norm. in_a_row: skipped up to now;
most: its largest value since the last report. step, reason, loss, norm, usual_then: of the last skipped step.
"""


def _words(reason: int, norm: float, usual: float) -> str:
    return {
        BAD_LOSS: "the loss is not finite",
        BAD_NORM: "the gradient is not finite",
        SPIKE: f"the gradient norm is {norm / usual:.3g} times the usual {usual:.3g}",
    }[reason]


def _verdict(found: GuardReport, last_checkpoint: Path | None) -> str:
    kept = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    return (
        f"{found.in_a_row} steps in a row were skipped, up to step {found.step:,}: {found.reason} "
        f"(loss {found.loss:.4g}, gradient norm {found.grad_norm:.4g}); {kept}; "
        "lower lr, look for broken data with `vla-oft data inspect`, or raise guard.stop_after or guard.spike"
    )
