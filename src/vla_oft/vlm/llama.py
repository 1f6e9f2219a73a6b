"""A Llama-family decoder whose attention mask is an explicit argument.

OFT needs FULL (bidirectional) attention: each action slot must see every other slot. Here nothing depends on which attention
implementation some library picks: `causal` is a required argument of `forward`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.vlm.attention import Padding, attend


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of the decoder."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"width={self.width}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}: each must divide the one before"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


class RMSNorm(nn.Module):
    """Root-mean-square normalisation. PyTorch computes it in float32 whatever it is given, and keeps what it was given for backward."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> same shape and dtype."""
        return self.weight.to(x.dtype) * F.rms_norm(x, (x.shape[-1],), eps=self.eps).to(x.dtype)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, S, head_dim), float32, for integer positions (B, S) or (1, S)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, heads, S, head_dim); halves convention: dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class LayerCache:
    """Keys and values that one layer has seen so far, (B, kv heads, S, head_dim); for decoding token by token."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new rows; returns all rows."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], padding: Padding | None, causal: bool, rows: slice, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, S, width); padding: where some keys are none, else None. Returns the outputs of `rows` only, which come last.

        With a cache the keys are those of all earlier calls and then those of x.
        """
        c, (cos, sin) = self.config, rope
        B, S, _ = x.shape
        split = lambda t, heads: t.view(B, -1, heads, c.head_dim).transpose(1, 2)  # noqa: E731
        q = apply_rope(split(self.q_proj(x[:, rows]), c.num_heads), cos[:, :, rows], sin[:, :, rows])
        k = apply_rope(split(self.k_proj(x), c.num_kv_heads), cos, sin)
        v = split(self.v_proj(x), c.num_kv_heads)
        if cache is not None:
            k, v = cache.extend(k, v)
        mask: Tensor | Padding | None = padding
        if causal and S > 1:
            keys = k.shape[2]
            mask = torch.ones(S, keys, dtype=torch.bool, device=x.device).tril(keys - S)
            if padding is not None:  # a padded row sees itself: it must see something, or its NaN would spread
                mask = (mask & padding.mask) | (mask & ~mask.tril(keys - S - 1))
            mask = mask[..., rows, :]
        out = attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, -1, c.width))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_eps)
        self.mlp = Mlp(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], padding: Padding | None, causal: bool, rows: slice, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, S, width) -> the outputs of `rows`; all of S are keys."""
        h = x[:, rows] + self.self_attn(self.input_layernorm(x), rope, padding, causal, rows, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Body(nn.Module):
    """Token embeddings, layers and final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.rms_eps)


class Llama(nn.Module):
    """The decoder of a VLA, fed with embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def new_cache(self) -> list[LayerCache]:
        """An empty cache for `forward`."""
        return [LayerCache() for _ in self.model.layers]

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        *,
        key_mask: Tensor | None,
        causal: bool,
        rows: slice | None = None,
        cache: list[LayerCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states of the wanted rows, and all hidden states that enter the last layer.

        embeds (B, S, width); position_ids (B, S) or (1, S); key_mask (B, keys) False at padding, all of which comes first, or None when
        nothing is padded; causal False = every row sees every unpadded key. `rows` selects the rows whose final state is
        read: the last layer computes queries and MLP for those alone. `cache` holds the keys of earlier calls and takes in those of
        this one. Returns (B, R, width) after the final norm, and (B, S, width).
        """
        everything = slice(None)
        caches = cache or [None] * len(self.model.layers)
        padding = None if key_mask is None else Padding.of(key_mask)
        rope = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        h = embeds
        for layer, layer_cache in zip(self.model.layers[:-1], caches[:-1], strict=True):
            h = layer(h, rope, padding, causal, everything, layer_cache)
        last = self.model.layers[-1](h, rope, padding, causal, rows or everything, caches[-1])
        return self.model.norm(last), h

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02)-style initialisation scaled by width; norms at one."""
        for p in self.parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5 / 2, generator=generator)
