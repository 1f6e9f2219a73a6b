"""Continuous actions by regression: all K D slots decoded in one pass, an MLP-ResNet per chunk step (paper section IV-B)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.heads.base import ActionHead, Decode, Metrics, masked_mean


@dataclass(frozen=True, kw_only=True)
class Config:
    """loss: `l1` (the paper), or `huber`: quadratic below `delta` (normalised action units), linear above. num_blocks: residual blocks."""

    loss: Literal["l1", "huber"] = "l1"
    delta: float = 0.1
    num_blocks: int = 2

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"huber delta must be positive, got {self.delta}")


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x + self.ffn(x)


class MlpResNet(nn.Module):
    """LayerNorm, linear, ReLU, residual blocks, LayerNorm, linear: the reference's head."""

    def __init__(self, in_dim: int, width: int, out_dim: int, num_blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def regression_loss(
    predicted: Tensor, actions: Tensor, valid: Tensor, kind: Literal["l1", "huber"], delta: float
) -> tuple[Tensor, Metrics]:
    """Predicted and true actions float32 (B, K, D), valid bool (B, K) -> mean loss over the valid steps, and `l1_metrics`.

    `huber` is divided by delta, so that large errors count as much as with `l1`.
    """
    if kind == "l1":
        loss = masked_mean((predicted - actions).abs(), valid)
    else:
        loss = masked_mean(F.huber_loss(predicted, actions, reduction="none", delta=delta), valid) / delta
    return loss, l1_metrics(predicted.detach(), actions, valid)


def l1_metrics(predicted: Tensor, actions: Tensor, valid: Tensor) -> Metrics:
    """Mean absolute error of the whole chunk, of its first step and of the rest, in normalised units; NaN where no step is valid."""
    error = (predicted - actions).abs()
    return {
        "action_l1": masked_mean(error, valid, empty=math.nan),
        "action_l1_first": masked_mean(error[:, :1], valid[:, :1], empty=math.nan),
        "action_l1_rest": masked_mean(error[:, 1:], valid[:, 1:], empty=math.nan),
    }


class Head(ActionHead):
    """L1 (or Huber) regression."""

    def __init__(self, config: Config, width: int, chunk_len: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.chunk_len, self.action_dim = config, chunk_len, action_dim
        self.model = MlpResNet(action_dim * width, width, action_dim, config.num_blocks)

    def _predict(self, decode: Decode) -> Tensor:
        hidden = decode(decode.zeros(self.chunk_len * self.action_dim))
        return self.model(hidden.reshape(len(hidden), self.chunk_len, -1))

    def loss(self, decode: Decode, actions: Tensor, valid: Tensor) -> tuple[Tensor, Metrics]:
        """See `ActionHead.loss`. Metrics: L1 of the whole chunk, of its first step and of the rest, in normalised units."""
        return regression_loss(self._predict(decode).float(), actions, valid, self.config.loss, self.config.delta)

    def sample(self, decode: Decode, generator: torch.Generator | None, noise: Tensor | None = None) -> Tensor:
        """See `ActionHead.sample`; deterministic."""
        return self._predict(decode).float()
