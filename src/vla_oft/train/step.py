"""One optimizer step: passes of a few samples forward and backward, gradients averaged, checked, applied. Nothing in it waits for a GPU."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_oft.heads.base import Metrics
from vla_oft.policy import Batch
from vla_oft.train import parallel
from vla_oft.train.assemble import Trainee
from vla_oft.train.batches import Examples, Finish, to_device
from vla_oft.train.ema import Ema
from vla_oft.train.guard import StepGuard
from vla_oft.train.optimizer import Optimizers
from vla_oft.train.parallel import Ranks
from vla_oft.transfer import sent


@dataclass(frozen=True)
class Outcome:
    """metrics: of the whole step, over all processes; grad_norm: before clipping, among them. bad: the guard has left the step out."""

    metrics: Metrics
    bad: Tensor


class Stepper:
    """Everything that a step changes. finish: from `Examples` to a `Batch`, on the device. clip_norm: largest gradient norm, or None."""

    def __init__(
        self,
        trainee: Trainee,
        optimizer: Optimizers,
        guard: StepGuard,
        ema: Ema | None,
        finish: Finish,
        ranks: Ranks,
        clip_norm: float | None,
    ) -> None:
        self.trainee, self.optimizer, self.guard, self.ema = trainee, optimizer, guard, ema
        self.finish, self.ranks, self.clip_norm = finish, ranks, math.inf if clip_norm is None else clip_norm
        self.trained = [p for p in trainee.policy.parameters() if p.requires_grad]

    def __call__(self, passes: Sequence[Examples | Batch], counts: Sequence[int], total: int, lr: float) -> Outcome:
        """Learn from this process's share of a step.

        counts: what each pass weighs (`ActionHead.weight`, the valid actions in it); total: all passes of all processes. So the loss is
        the mean over all of them, however they are divided.
        """
        known: list[tuple[Metrics, float]] = []
        for number, (given, count) in enumerate(zip(passes, counts, strict=True)):
            share = count * len(passes) * self.ranks.world_size / total if total else 1.0
            batch = self._batch(given, share)
            with parallel.averaged(self.trainee.module, now=number == len(passes) - 1):
                metrics = backward(self.trainee.module, batch, share=1 / len(passes), bf16=self.trainee.autocast)
            known.append((metrics, share))
        metrics = mean_metrics(known, self.ranks)
        grad_norm = parallel.whole(nn.utils.clip_grad_norm_(self.trained, self.clip_norm))
        bad = self.guard.check(metrics["loss"], grad_norm)
        self.optimizer.step(lr, skip=bad)
        if self.ema:
            self.ema.update(skip=bad)
        return Outcome({**metrics, "grad_norm": grad_norm}, bad)

    def _batch(self, given: Examples | Batch, share: float) -> Batch:
        moved = to_device(given, self.ranks.device)
        return dataclasses.replace(self.finish(moved) if isinstance(moved, Examples) else moved, share=share)


def backward(module: nn.Module, batch: Batch, *, share: float = 1.0, bf16: bool = False) -> Metrics:
    """Add `share` of the gradients of one batch's loss to those that are there; its loss and metrics, detached."""
    with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=bf16):
        loss, metrics = module(batch)
    (loss * share).backward()
    return {"loss": loss.detach(), **metrics}


def mean_metrics(passes: Sequence[tuple[Metrics, float]], ranks: Ranks | None = None) -> Metrics:
    """Each metric's mean over the passes of one step, in all processes, that know it; NaN where none does.

    Passes count by their weight, the share of the step's valid actions that they hold; the loss has that share in it already, and is not
    finite when that of any pass is not.
    """
    names = sorted({name for metrics, _ in passes for name in metrics}, key=lambda name: (name != "loss", name))
    nothing = torch.full((), math.nan, device=next(iter(passes[0][0].values())).device)
    values = torch.stack([torch.stack([metrics.get(name, nothing).float() for name in names]) for metrics, _ in passes])
    weights = torch.tensor([[1.0 if name == "loss" else weight for name in names] for _, weight in passes])
    always = torch.tensor([name == "loss" for name in names])
    weights, always = sent(weights, values.device), sent(always, values.device)
    known = ~torch.isnan(values) | always
    sums = torch.stack([torch.where(known, values * weights, 0).sum(0), (known * weights).sum(0)])
    total, weight = sums if ranks is None else ranks.sum(sums)
    return dict(zip(names, total / weight, strict=True))
