"""Auxiliary supervision for language grounding: which image patches show the object that the instruction names?

Not an action head. A linear read-out of the patch tokens where they enter the decoder's last layer, trained with masks that a simulator
renders for free. Measured on a 3 M-parameter model: regression of coordinates alone stays at chance after 7 minutes on 2 cores, the dense
question is answered after one. A second read-out, from the row that predicts the first action, says where the object and its destination
are. Unused at inference, and silent when a batch has no masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.heads.base import Metrics


@dataclass(frozen=True, kw_only=True)
class Config:
    """mask_weight: factor of the patch loss in the total; positive_weight: weight of the few patches that show the object.

    landmark_weight: factor of the mean L1 distance, in units of `landmark_scale_m` metres, to the two positions.
    """

    mask_weight: float = 1.0
    positive_weight: float = 4.0
    landmark_weight: float = 0.3
    landmark_scale_m: float = 0.1


class Head(nn.Module):
    """Two questions per patch: is it the object to act on (channel 0), is it the destination (channel 1)?"""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 2)
        self.locate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 6))

    def forward(self, patches: Tensor) -> Tensor:
        """Patch hidden states (B, V * P, W) -> logits (B, V * P, 2)."""
        return self.read(self.norm(patches))

    def loss(self, patches: Tensor, masks: Tensor) -> tuple[Tensor, Metrics]:
        """masks (B, V, 2, side, side) in {0, 1}. Metric: share of images with the object in view whose best patch shows it."""
        B, V = masks.shape[:2]
        target = masks.flatten(3).transpose(2, 3).reshape(B, -1, 2).float()
        logits = self(patches).float()
        weight = torch.full((2,), self.config.positive_weight, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        best = logits.detach()[..., 0].view(B * V, -1).argmax(-1, keepdim=True)
        shown = target[..., 0].view(B * V, -1)
        in_view = shown.any(-1).float()
        hit = (shown.gather(1, best)[:, 0] * in_view).sum() / in_view.sum().clamp(min=1)
        return self.config.mask_weight * loss, {"grounding_loss": loss.detach(), "grounding_hit": hit}

    def landmark_loss(self, hidden: Tensor, landmarks: Tensor) -> tuple[Tensor, Metrics]:
        """hidden (B, W) of the row that predicts the first action; landmarks (B, 2, 3) in metres, NaN where there is none."""
        c = self.config
        predicted = self.locate(hidden).float().view(-1, 2, 3)
        known = torch.isfinite(landmarks)
        error = (predicted - torch.nan_to_num(landmarks) / c.landmark_scale_m).abs() * known
        object_error_m = error[:, 0].detach().sum() / known[:, 0].sum().clamp(min=1) * c.landmark_scale_m
        return c.landmark_weight * error.sum() / known.sum().clamp(min=1), {"landmark_error_m": object_error_m}
