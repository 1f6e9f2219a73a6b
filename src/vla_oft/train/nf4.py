"""Frozen linear layers in 4.13 bits per weight (QLoRA, Dettmers et al. 2023): 7 billion weights in 3.6 GB.

    weights, row by row    | block of 64      | block of 64      | ...       w = CODEBOOK[code] * scale
    codes                  | 64 x 4 bits      | 64 x 4 bits      | ...       the nearest of 16 quantiles of a normal distribution
    scales                 | 8 bits           | 8 bits           | ...       scale = group scale * (level + 1) / 256: the block's largest
    group scales           | bfloat16, one for 256 blocks ...                 "double quantisation"

A layer's weights exist as bfloat16 only while it computes, forward or backward.

Why not a library: bitsandbytes 0.50 and torchao 0.18 pack the same 16 values with the same error (9.2 % of normal weights, root mean
square), but packing what they unpacked changes 3 % of the weights. Here it changes none: a block's largest weight unpacks to exactly
`scale`, which is a level again, and only products are rounded, which every device does alike. So a checkpoint of plain bfloat16 weights
holds all there is to know about the 4-bit base: a resumed run continues on exactly the same weights, and the saved policy acts like the
trained one. And three tensors of plain integers and numbers are no special case for DDP, FSDP, torch.compile and fake tensors.
"""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.policy import Policy
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.freeze import PREFIXES
from vla_oft.transfer import sent
from vla_oft.weights import LazyTensor

BLOCK, GROUP, LEVELS = 64, 256, 256
_CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_ZERO = 7  # the code of 0
_HAS_TRITON = importlib.util.find_spec("triton") is not None
PARTS = ("codes", "scales", "group_scales")


def stored_bytes(num_weights: int) -> int:
    """Bytes that a layer of so many weights is kept in, its bias not counted."""
    return num_weights // 2 + num_weights // BLOCK + 2 * -(-num_weights // (BLOCK * GROUP))


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (...), a multiple of 64 of them -> codes uint8 (n / 2,), scales uint8 (n / 64,), group scales bfloat16 (n / 16384 up,)."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    groups = F.pad(largest, (0, -len(largest) % GROUP)).view(-1, GROUP).amax(1).bfloat16()
    levels = _levels(largest, groups)
    scale = _scales(levels, groups).float()[:, None]
    book = torch.tensor(_CODEBOOK, device=weight.device).bfloat16().float()
    codes = torch.bucketize(blocks / scale, (book[1:] + book[:-1]) / 2, out_int32=True)
    codes = codes.masked_fill(scale == 0, _ZERO).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], levels, groups


def unpack(codes: Tensor, scales: Tensor, group_scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`, bar what the rounding lost: bfloat16 of `shape`."""
    book = _book(codes.device)
    if codes.device.type == "cuda" and _HAS_TRITON:
        from vla_oft.train import nf4_kernel

        return nf4_kernel.unpack(codes, scales, group_scales, book).view(shape)
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)  # both weights of every byte: one look-up
    return (pairs[codes.int()].view(-1, BLOCK) * _scales(scales, group_scales)[:, None]).view(shape)


def _book(device: torch.device) -> Tensor:
    """The 16 values, bfloat16. Every layer asks for them in every pass: none must wait for a GPU. A compiled layer keeps them."""
    if torch.compiler.is_compiling():
        return torch.tensor(_CODEBOOK, device=device).bfloat16()
    return sent(torch.tensor(_CODEBOOK), device).bfloat16()


def rounded(weight: Tensor) -> Tensor:
    """The weights that are left of `weight` after packing, float32 of the same shape."""
    return unpack(*pack(weight), tuple(weight.shape)).float()


class Nf4Linear(nn.Module):
    """A frozen linear layer. Made on the meta device; its tensors come from `quantise`."""

    codes: nn.Parameter
    scales: nn.Parameter
    group_scales: nn.Parameter

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        count = layer.weight.numel()
        for part, size, dtype in (
            ("codes", count // 2, torch.uint8),
            ("scales", count // BLOCK, torch.uint8),
            ("group_scales", -(-count // (BLOCK * GROUP)), torch.bfloat16),
        ):
            setattr(self, part, nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """bfloat16 (out, in), unpacked now."""
        return unpack(self.codes, self.scales, self.group_scales, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Any = _Product.apply(x, self.codes, self.scales, self.group_scales, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W': keeps the packed weights for the backward pass, where an ordinary product would keep W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, group_scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales, group_scales)
        ctx.shape = shape
        return F.linear(x.bfloat16(), unpack(codes, scales, group_scales, shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, group_scales = ctx.saved_tensors
        return (grads[0] @ unpack(codes, scales, group_scales, ctx.shape), None, None, None, None)


def layers(policy: Policy) -> list[str]:
    """Names of the layers to keep in 4 bits: frozen and read linear layers of the towers and the decoder.

    Embeddings, norms, projector and vocabulary projection are small, and errors there cost more.
    """
    unread = {id(parameter) for parameter in policy.unread_parameters()}
    return [
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith((PREFIXES["vision"], f"{PREFIXES['language']}model."))
        and not module.weight.requires_grad
        and id(module.weight) not in unread
        and module.weight.numel() % BLOCK == 0
    ]


def quantise(blueprint: Blueprint, names: Collection[str]) -> Blueprint:
    """Put `Nf4Linear` in the place of these linear layers; each is packed when its first tensor is read."""
    weights = dict(blueprint.weights)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = Nf4Linear(blueprint.policy.get_submodule(name))  # type: ignore[arg-type]
        setattr(blueprint.policy.get_submodule(parent), leaf, layer)
        packed = _Packed(weights.pop(f"{name}.weight"))
        for index, part in enumerate(PARTS):
            parameter = getattr(layer, part)
            weights[f"{name}.{part}"] = LazyTensor(tuple(parameter.shape), parameter.dtype, packed.reader(index))
    return replace(blueprint, weights=weights)


def packed_parameters(policy: nn.Module) -> set[nn.Parameter]:
    """The parameters of all `Nf4Linear`: to be kept whole by every process, FSDP shards floating-point weights only."""
    return {getattr(module, part) for module in policy.modules() if isinstance(module, Nf4Linear) for part in PARTS}


def unpacked(policy: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The policy's parameters `tensors` by name, with `NAME.weight` in bfloat16 instead of the packed parts of each `Nf4Linear`."""
    values = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    for name, module in policy.named_modules():
        if isinstance(module, Nf4Linear):
            for part in PARTS:
                values.pop(f"{name}.{part}", None)
            shape = (module.out_features, module.in_features)
            values[f"{name}.weight"] = LazyTensor(shape, torch.bfloat16, lambda module=module: module.weight.detach())
    return values


class _Packed:
    """One layer's packed weights, kept until all three parts were read."""

    def __init__(self, weight: LazyTensor) -> None:
        self.weight = weight
        self.parts: dict[int, Tensor] = {}

    def reader(self, index: int) -> Any:
        def read() -> Tensor:
            if index not in self.parts:
                self.parts = dict(enumerate(pack(self.weight.read())))
            return self.parts.pop(index)

        return read


def _levels(largest: Tensor, groups: Tensor) -> Tensor:
    """Level of each block, uint8: of the two nearest the one whose scale, rounded to bfloat16, comes closest to the largest weight.

    But no scale so far above it that no code but smaller ones is nearest: then the block would have another scale when packed again.
    """
    wide = groups.float().repeat_interleave(GROUP)[: len(largest)]
    below = ((LEVELS * largest / wide).nan_to_num(0).floor() - 1).clamp(0, LEVELS - 2)
    low, high = (_scales(level, groups).float() for level in (below, below + 1))
    rise = ((high - largest).abs() < (low - largest).abs()) & (high < 1.14 * largest)
    return (below + rise).to(torch.uint8)


def _scales(levels: Tensor, groups: Tensor) -> Tensor:
    """bfloat16 (blocks,)."""
    wide = groups.float().repeat_interleave(GROUP)[: len(levels)]
    return (wide * ((levels.float() + 1) / LEVELS)).bfloat16()
