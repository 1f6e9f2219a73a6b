"""A vision transformer tower (DINOv2 with registers, or SigLIP), with FiLM built into its blocks.

Parameter names are those of the published checkpoints. What is read is the output of the LAST BUT ONE block without a final norm,
patch tokens only; blocks and norms behind it are created only with `unread_weights`, to write such a checkpoint back bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.vlm.attention import attend


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of one tower. `depth` counts the last, unread block as the published configurations do."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_registers: int = 0
    class_token: bool = False
    layer_scale: bool = False
    attention_pool: bool = False
    unread_weights: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.depth < 2:
            raise ValueError(f"depth={self.depth} must be at least 2: the last but one block is read")

    @property
    def num_patches(self) -> int:
        """Patch tokens per image."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, as one matrix product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, width), patches row by row."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Full self-attention without a mask."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Learned gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm transformer block. FiLM (Perez et al. 2018) acts between attention and MLP, on all tokens; identity at initialisation."""

    def __init__(self, config: Config, film_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.num_heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_dim)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        if film_dim is not None:
            self.scale = nn.Linear(film_dim, config.width)
            self.shift = nn.Linear(film_dim, config.width)

    def forward(self, x: Tensor, language: Tensor | None) -> Tensor:
        """x (B, N, width), language (B, film_dim): the mean language embedding, only with FiLM."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        if language is not None:
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head. Nothing reads it; it exists so that published weights survive a round trip."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_dim)


class VisionTower(nn.Module):
    """One ViT. `film_dim` is the width of the language embedding, None without FiLM."""

    def __init__(self, config: Config, film_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.width))
        num_blocks = config.depth if config.unread_weights else config.depth - 1
        self.blocks = nn.ModuleList(Block(config, film_dim) for _ in range(num_blocks))
        if config.unread_weights:
            self.norm = nn.LayerNorm(config.width, eps=1e-6)
            if config.attention_pool:
                self.attn_pool = AttentionPool(config)

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """pixels (B, 3, H, W) normalised, language (B, film_dim) or None -> patch features (B, P, width)."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [t.expand(len(x), -1, -1) for t in (getattr(self, "cls_token", None), getattr(self, "reg_token", None)) if t is not None]
        x = torch.cat([*prefix, x], dim=1)
        for block in self.blocks[: self.config.depth - 1]:
            x = block(x, language)
        return x[:, x.shape[1] - self.config.num_patches :]

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on (empty without `unread_weights`)."""
        unread: list[nn.Parameter] = []
        if self.config.unread_weights:
            unread += list(self.blocks[-1].parameters()) + list(self.norm.parameters())
            if self.config.attention_pool:
                unread += list(self.attn_pool.parameters())
        return unread

    def init_weights(self, generator: torch.Generator) -> None:
        """Truncated-normal linear layers, zero biases, FiLM at the identity."""
        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 2)[-2:]
            if name.endswith("bias") or leaf[0] in ("scale", "shift"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif p.ndim == 4:  # patch embedding: unit-variance output for unit-variance pixels
                nn.init.trunc_normal_(p, std=p[0].numel() ** -0.5, generator=generator)
            else:
                nn.init.trunc_normal_(p, std=0.02 if p.ndim == 3 else p.shape[-1] ** -0.5 / 2, generator=generator)
