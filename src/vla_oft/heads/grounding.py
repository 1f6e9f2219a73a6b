"""Auxiliary supervision for language grounding: which parts of the image show the object that the instruction names, and where is it?

Not an action head. Two read-outs, trained with answers that a simulator renders for free; unused at inference, silent without masks:

    masks      each patch token, where it enters the decoder's last layer: which of its cells x cells parts show the object (channel 0) and
               the destination (channel 1)?
    landmarks  the row that predicts the first action: where are the two, in metres?

Measured on a 3 M-parameter model: coordinates alone stay at chance after 7 minutes on 2 cores, the dense question is answered after one;
a landmark loss ten times as strong as the mask loss drowns it (LOG.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.heads.base import Metrics


@dataclass(frozen=True, kw_only=True)
class Config:
    """cells: parts per patch side that the masks resolve. mask_weight, landmark_weight: factors of the two losses in the total.

    positive_weight: weight of the few parts that show something. landmark_scale_m: unit of the mean L1 distance, in metres.
    """

    cells: int = 1
    mask_weight: float = 1.0
    positive_weight: float = 4.0
    landmark_weight: float = 0.3
    landmark_scale_m: float = 0.1


class Head(nn.Module):
    """Both read-outs."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 2 * config.cells**2)
        self.locate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 6))

    def forward(self, patches: Tensor, num_cameras: int) -> Tensor:
        """Patch hidden states (B, V * P, W) -> mask logits (B, V, 2, S, S); S = patches per side times cells."""
        c = self.config.cells
        side = round((patches.shape[1] // num_cameras) ** 0.5)
        logits = self.read(self.norm(patches)).view(-1, num_cameras, side, side, 2, c, c)
        return logits.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, num_cameras, 2, side * c, side * c)

    def mask_loss(self, patches: Tensor, masks: Tensor) -> tuple[Tensor, Metrics]:
        """masks (B, V, 2, S, S) in {0, 1}. Metric: share of images with the object in view whose likeliest part shows it."""
        logits, target = self(patches, masks.shape[1]).float(), masks.float()
        weight = torch.full((), self.config.positive_weight, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        shown = target[:, :, 0].flatten(0, 1).flatten(1)
        best = logits.detach()[:, :, 0].flatten(0, 1).flatten(1).argmax(-1, keepdim=True)
        in_view = shown.any(-1).float()
        hit = (shown.gather(1, best)[:, 0] * in_view).sum() / in_view.sum().clamp(min=1)
        return self.config.mask_weight * loss, {"grounding_loss": loss.detach(), "grounding_hit": hit}

    def landmark_loss(self, hidden: Tensor, landmarks: Tensor) -> tuple[Tensor, Metrics]:
        """hidden (B, W); landmarks (B, 2, 3) in metres, NaN where there is none. Metric: the object's mean error per coordinate."""
        c = self.config
        predicted = self.locate(hidden).float().view(-1, 2, 3)
        known = torch.isfinite(landmarks)
        error = (predicted - torch.nan_to_num(landmarks) / c.landmark_scale_m).abs() * known
        object_error_m = error[:, 0].detach().sum() / known[:, 0].sum().clamp(min=1) * c.landmark_scale_m
        return c.landmark_weight * error.sum() / known.sum().clamp(min=1), {"landmark_error_m": object_error_m}
