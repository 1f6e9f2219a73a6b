"""Continuous actions by regression from ONE slot: 55 tokens fewer per pass than `l1` for a chunk of 8 x 7 actions, 349 for 25 x 14.

slot (B, 1, W) -> decode -> hidden (B, W) -> W / 4 -> W / 8 -> actions (B, K, D)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_oft.heads.base import ActionHead, Decode, Metrics
from vla_oft.heads.l1 import regression_loss

LAST_GAIN = 0.01


@dataclass(frozen=True, kw_only=True)
class Config:
    """loss: `l1`, or `huber`: quadratic below `delta` (normalised action units), linear above. dropout: probability, while training."""

    loss: Literal["l1", "huber"] = "l1"
    delta: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"huber delta must be positive, got {self.delta}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class Head(ActionHead):
    """L1 (or Huber) regression. Starts close to zero, the middle of every action's range."""

    def __init__(self, config: Config, width: int, chunk_len: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.chunk_len, self.action_dim = config, chunk_len, action_dim
        self.model = nn.Sequential(
            nn.Linear(width, width // 4),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width // 4, width // 8),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width // 8, chunk_len * action_dim),
        )
        for index, gain in ((0, 1.0), (3, 1.0), (6, LAST_GAIN)):
            layer = self.model.get_submodule(str(index))
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def _predict(self, decode: Decode) -> Tensor:
        hidden = decode(decode.zeros(1))[:, 0]
        return self.model(hidden).view(len(hidden), self.chunk_len, self.action_dim).float()

    def loss(self, decode: Decode, actions: Tensor, valid: Tensor) -> tuple[Tensor, Metrics]:
        """See `ActionHead.loss`. Metrics as in `heads/l1.py`."""
        return regression_loss(self._predict(decode), actions, valid, self.config.loss, self.config.delta)

    def sample(self, decode: Decode, generator: torch.Generator | None, noise: Tensor | None = None) -> Tensor:
        """See `ActionHead.sample`; deterministic."""
        return self._predict(decode)
