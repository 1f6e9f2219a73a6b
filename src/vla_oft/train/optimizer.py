"""Optimizers: AdamW for everything (fine-tuning, the paper's choice), or Muon for the matrices of a model that is trained from nothing.

Muon (Jordan et al. 2024) orthogonalises the update of every weight matrix. Training the nano model from scratch it needed half the samples
of AdamW for the same action error (LOG.md); each step costs a few matrix products per weight more.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """weight_decay: on the matrices of linear and convolution layers only, not on norms, biases and embeddings; with `decay` `all` on
    every trained weight. The reference uses `all` and betas (0.9, 0.999).
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Literal["matrices", "all"] = "matrices"

    def build(self, model: nn.Module, lr: float) -> "Optimizers":
        """Optimizers for the trained parameters of `model`."""
        decayed, spared = split(model, nn.Linear | nn.Conv2d)
        spared_decay = self.weight_decay if self.decay == "all" else 0.0
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": spared, "weight_decay": spared_decay}]
        return Optimizers([torch.optim.AdamW(groups, lr=lr, betas=self.betas, fused=True)])


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the matrices of linear layers, scaled to AdamW's learning rates; AdamW without weight decay on everything else."""

    weight_decay: float = 0.01
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)

    def build(self, model: nn.Module, lr: float) -> "Optimizers":
        """Optimizers for the trained parameters of `model`. Raises ValueError where torch has no Muon (before 2.9)."""
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}; upgrade, or use adamw")
        matrices, others = split(model, nn.Linear)
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=self.weight_decay, momentum=self.momentum, adjust_lr_fn="match_rms_adamw")
        return Optimizers([muon, torch.optim.AdamW(others, lr=lr, betas=self.betas, weight_decay=0.0, fused=True)])


class Optimizers:
    """Several optimizers that step as one."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; gradients are dropped afterwards."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """For exact resume."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def split(model: nn.Module, kinds: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters: weights of modules of `kinds`, and all others."""
    chosen = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in chosen], [p for p in trained if id(p) not in chosen]
