"""Both vision towers of a compiled policy: all cameras in one batch, everything constant folded into weights.

    u8 image - 128 -> patches (I P, 3 p p) -> ONE product for both towers -> + table -> blocks -> both towers' features side by side

mean, std        into the patch embedding: (u - 255 mean) / (255 std) W' = (u - 128) (W / 255 std)' + constant; u - 128 is exact in bfloat16
constant, bias   into the table of positions
layer scale      into the products before it
FiLM             gain and shift of every block depend on the instruction alone: `Tower.film` computes them once for an instruction
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.factory import Factory
from vla_oft.engine.linear import Linear, Read, put, quantized_for
from vla_oft.engine.ops import Film, Rows, add
from vla_oft.preprocess import Triple
from vla_oft.vlm import vit

_MIDDLE = 128
_ALIGNMENT = 16
"""Inputs of a product are padded to a multiple of so many: 588 bfloat16 values of a 14-px patch are no multiple of 16 bytes."""
_EPS = 1e-6


class Block:
    """One transformer block; see `vlm/vit.py`."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor

    def __init__(self, config: vit.Config, factory: Factory) -> None:
        self.config, self.dtype, self.device = config, factory.dtype, factory.device
        self.qkv, self.proj, self.fc1, self.fc2 = (factory.vision() for _ in range(4))

    def fill(self, read: Read, name: str) -> None:
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                put(self, f"{norm}_{part}", read(f"{name}.{norm}.{part}").to(self.device, self.dtype))
        for layer, path, scale in (
            (self.qkv, "attn.qkv", None),
            (self.proj, "attn.proj", "ls1"),
            (self.fc1, "mlp.fc1", None),
            (self.fc2, "mlp.fc2", "ls2"),
        ):
            weight, bias = read(f"{name}.{path}.weight"), read(f"{name}.{path}.bias")
            if scale and self.config.layer_scale:
                gain = read(f"{name}.{scale}.scale_factor").float()
                weight, bias = gain[:, None] * weight.float(), gain * bias.float()
            layer.fill(weight, bias)

    def linears(self) -> list[Linear]:
        return [self.qkv, self.proj, self.fc1, self.fc2]


class Tower:
    """One ViT without its unread last block."""

    prefix: Tensor | None
    positions: Tensor
    film_weight: Tensor
    film_bias: Tensor

    def __init__(self, config: vit.Config, factory: Factory, film_dim: int | None) -> None:
        self.config, self.film_dim = config, film_dim
        self.ops, self.dtype, self.device = factory.ops, factory.dtype, factory.device
        self.blocks = [Block(config, factory) for _ in range(config.depth - 1)]

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.config.class_token + self.config.num_registers

    def fill(self, read: Read, name: str, offset: Tensor) -> None:
        """offset: float32 (width), the constant part of the patch embedding."""
        prefix = [read(f"{name}.{token}")[0] for token in self._prefix_names()]
        put(self, "prefix", torch.cat([p.to(self.device, self.dtype) for p in prefix]) if prefix else None)
        put(self, "positions", (read(f"{name}.pos_embed")[0].to(self.device).float() + offset).to(self.dtype))
        for i, block in enumerate(self.blocks):
            block.fill(read, f"{name}.blocks.{i}")
        if self.film_dim is not None:
            for part in ("weight", "bias"):
                rows = [read(f"{name}.blocks.{i}.{kind}.{part}") for i in range(len(self.blocks)) for kind in ("scale", "shift")]
                put(self, f"film_{part}", torch.cat([r.to(self.device, self.dtype) for r in rows]))

    def film(self, language: Tensor) -> Tensor:
        """Mean language embeddings (B, film_dim) -> gain and shift of every block (blocks, 2, B, width)."""
        table = F.linear(language, self.film_weight, self.film_bias).view(len(language), len(self.blocks), 2, -1)
        return (table + torch.tensor([1, 0], dtype=table.dtype).view(2, 1).to(table.device)).permute(1, 2, 0, 3).contiguous()

    def __call__(self, patches: Tensor, film: Tensor | None) -> Tensor:
        """Embedded patches (I, P, width), film (blocks, 2, I, width) or None -> features (I, P, width)."""
        images, width = len(patches), self.config.width
        x = patches + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(images, -1, -1), x], dim=1)
        tokens = x.shape[1]
        x, delta = x.view(-1, width), None
        for i, block in enumerate(self.blocks):
            x, normed = self._norm(x, delta, block, "norm1", tokens, None, block.qkv.quantize)
            delta = self._attention(block, normed, images)
            modulation = None if film is None else (film[i, 0], film[i, 1])
            x, normed = self._norm(x, delta, block, "norm2", tokens, modulation, block.fc1.quantize)
            delta = block.fc2(block.fc1.gelu(normed, block.fc2.quantize), parts=True)
        return add(x, delta).view(images, tokens, width)[:, self.num_prefix :]

    def _norm(
        self, x: Tensor, delta: Tensor | None, block: Block, norm: str, tokens: int, film: Film | None, quantize: torch.dtype | None
    ) -> tuple[Tensor, Rows]:
        weight, bias = getattr(block, f"{norm}_weight"), getattr(block, f"{norm}_bias")
        return self.ops.add_layer_norm(x, delta, weight, bias, _EPS, film, tokens, quantize)

    def _attention(self, block: Block, normed: Rows, images: int) -> Tensor:
        heads, width = self.config.num_heads, self.config.width
        q, k, v = block.qkv(normed).view(images, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        return block.proj(quantized_for(block.proj, self.ops, self.ops.attend(q, k, v).reshape(-1, width)), parts=True)

    def _prefix_names(self) -> list[str]:
        return ["cls_token"] * self.config.class_token + ["reg_token"] * bool(self.config.num_registers)

    def linears(self) -> list[Linear]:
        """All big layers."""
        return [layer for block in self.blocks for layer in block.linears()]


class Towers:
    """Images to fused patch features."""

    NAMES = ("featurizer", "fused_featurizer")

    def __init__(self, configs: tuple[vit.Config, vit.Config], factory: Factory, film_dim: int | None, *, streams: bool) -> None:
        self.towers = [Tower(config, factory, film_dim) for config in configs]
        self.dtype, self.device, self.patch = factory.dtype, factory.device, factory.dense()
        self.side = torch.cuda.Stream(factory.device) if streams else None

    def fill(self, read: Read, statistics: tuple[tuple[Triple, Triple], tuple[Triple, Triple]]) -> None:
        """statistics: mean and standard deviation of each tower's pixels, in 0..1 units."""
        weights = []
        for tower, name, (mean, std) in zip(self.towers, self.NAMES, statistics, strict=True):
            path = f"vlm.vision_backbone.{name}"
            kernel = read(f"{path}.patch_embed.proj.weight").to(self.device).float()
            shape = (1, 3, 1, 1)
            kernel = kernel / (255 * torch.tensor(std, device=self.device)).view(shape)
            constant = (_MIDDLE - 255 * torch.tensor(mean, device=self.device)).view(shape) * kernel
            bias = read(f"{path}.patch_embed.proj.bias").to(self.device).float()
            tower.fill(read, path, bias + constant.sum((1, 2, 3)))
            weights.append(kernel.permute(0, 2, 3, 1).flatten(1))
        merged = torch.cat(weights)
        self.padding = -merged.shape[1] % _ALIGNMENT
        self.patch.fill(F.pad(merged, (0, self.padding)), None)

    def film(self, language: Tensor) -> list[Tensor]:
        """Each tower's `Tower.film`."""
        return [tower.film(language) for tower in self.towers]

    def __call__(self, images: Tensor, film: list[Tensor] | None) -> Tensor:
        """uint8 (B, V, S, S, 3), film of each tower (blocks, 2, B, width) or None -> (B, V P, sum of widths)."""
        B, V = images.shape[:2]
        embedded = self.patch(self._patches(images.flatten(0, 1))).view(B * V, -1, sum(t.config.width for t in self.towers))
        parts = embedded.split([t.config.width for t in self.towers], dim=-1)
        films = [None, None] if film is None else [f.repeat_interleave(V, dim=2) for f in film]
        first, second = ((tower, part, f) for tower, part, f in zip(self.towers, parts, films, strict=True))
        return torch.cat(self._both(first, second), dim=-1).view(B, -1, embedded.shape[-1])

    def _both(self, first: tuple[Tower, Tensor, Tensor | None], second: tuple[Tower, Tensor, Tensor | None]) -> list[Tensor]:
        """Run both towers, on two streams if there are two: the smaller one then fills what the larger one leaves idle."""
        if self.side is None:
            return [tower(part, film) for tower, part, film in (first, second)]
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            tower, part, film = second
            aside = tower(part, film)
        tower, part, film = first
        here = tower(part, film)
        main.wait_stream(self.side)
        return [here, aside]  # freed memory of one stream is reused by that stream only, which waits for the other before the next call

    def _patches(self, images: Tensor) -> Tensor:
        """uint8 (I, S, S, 3) -> (I P, 3 p p + padding), centred; a patch's values ordered by row, column, channel."""
        p, side = self.towers[0].config.patch_size, images.shape[1]
        tiles = images.view(-1, side // p, p, side // p, p, 3).transpose(2, 3).reshape(-1, 3 * p * p)
        return F.pad(tiles.to(self.dtype) - _MIDDLE, (0, self.padding))

    def linears(self) -> list[Linear]:
        """All big layers."""
        return [layer for tower in self.towers for layer in tower.linears()]
