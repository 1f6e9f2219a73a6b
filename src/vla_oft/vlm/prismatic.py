"""The Prismatic VLM of OpenVLA: two vision towers fused on channels, a three-layer projector, a Llama-family decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.vlm import llama, tokens, vit


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shapes of all parts. `dino` reads channels 0-2 of the pixels, `siglip` channels 3-5."""

    dino: vit.Config
    siglip: vit.Config
    llm: llama.Config
    tokens: tokens.Config
    film: bool

    def __post_init__(self) -> None:
        if (self.dino.image_size, self.dino.num_patches) != (self.siglip.image_size, self.siglip.num_patches):
            raise ValueError("both towers must read the same image size and give the same number of patches")


class VisionBackbone(nn.Module):
    """DINOv2-style and SigLIP-style towers side by side."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        film_dim = config.llm.width if config.film else None
        self.featurizer = vit.VisionTower(config.dino, film_dim)
        self.fused_featurizer = vit.VisionTower(config.siglip, film_dim)

    def forward(self, pixels: Tensor, language: Tensor | None) -> Tensor:
        """pixels (B, V, 6, H, W), language (B, llm width) or None -> (B, V * P, dino width + siglip width)."""
        B, V = pixels.shape[:2]
        flat = pixels.flatten(0, 1)
        language = None if language is None else language.repeat_interleave(V, dim=0)
        features = torch.cat([self.featurizer(flat[:, :3], language), self.fused_featurizer(flat[:, 3:], language)], dim=-1)
        return features.reshape(B, -1, features.shape[-1])


class Projector(nn.Module):
    """Vision features to token embeddings; exact GELU."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., vision width) -> (..., llm width)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class Prismatic(nn.Module):
    """The pretrained part of a policy. The policy assembles the sequence; this module embeds and decodes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config.dino.width + config.siglip.width, config.llm.width)
        self.language_model = llama.Llama(config.llm)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """int64 (...) -> (..., width)."""
        return self.language_model.model.embed_tokens(ids)

    def embed_images(self, pixels: Tensor, language: Tensor | None) -> Tensor:
        """pixels (B, V, 6, H, W) normalised per tower -> patch embeddings (B, V * P, width)."""
        return self.projector(self.vision_backbone(pixels, language if self.config.film else None))

    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights for a model that is trained from nothing (the small sizes) or measured (the large ones)."""
        self.vision_backbone.featurizer.init_weights(generator)
        self.vision_backbone.fused_featurizer.init_weights(generator)
        self.language_model.init_weights(generator)
        for layer in (self.projector.fc1, self.projector.fc2, self.projector.fc3):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
