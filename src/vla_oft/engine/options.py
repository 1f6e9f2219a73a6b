"""What may be chosen when a policy is compiled: the numbers of its weights, and optimisations to leave out in order to measure them."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16", "fp8", "fp8-llm", "int8", "int4", "int8-dynamic"]
"""Of the big weights and their products. Norms, embeddings, the patch embedding and the action head are never below bf16.

fp32           everything in float32
bf16           everything in bfloat16, sums in float32
fp8            weights and inputs of the decoder's and the towers' products in float8 e4m3, one scale for each row of either
fp8-llm        as fp8, with the towers in bf16
int8           weights in int8, one scale for each output; products in bf16: half the memory, for small GPUs
int4           weights of the decoder in int4, one scale for 128 inputs, those of the towers in int8: a third of the memory
int8-dynamic   weights and inputs in int8, one scale for each row of either: fastest on CPUs, and on GPUs without float8
"""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WeightKind = Literal["dense", "fp8", "int8", "int4", "int8-dynamic"]
_KINDS: dict[Precision, tuple[WeightKind, WeightKind]] = {
    "fp32": ("dense", "dense"),
    "bf16": ("dense", "dense"),
    "fp8": ("fp8", "fp8"),
    "fp8-llm": ("fp8", "dense"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int8-dynamic": ("int8-dynamic", "int8-dynamic"),
}


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """A precision, spelled out. dtype: of everything that flows between products."""

    dtype: torch.dtype
    llm: WeightKind
    vision: WeightKind


def numerics(precision: Precision) -> Numerics:
    """Raises ValueError for an unknown name."""
    if precision not in _KINDS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    llm, vision = _KINDS[precision]
    return Numerics(dtype=torch.float32 if precision == "fp32" else torch.bfloat16, llm=llm, vision=vision)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Optimisations, all on; `vla-oft bench ablation` turns them off one at a time. None of them changes answers beyond rounding.

    On a GPU: graph: replay one captured CUDA graph per shape. streams: both vision towers at the same time. triton: fused kernels. tune:
    measure which matrix product is fastest for each shape. device_images: resize and crop on the device.
    On a CPU: pack: weights in the layout of its library, activations inside its products.
    On both: zero_row: one row stands for all empty action slots in the first layer.
    """

    graph: bool = True
    streams: bool = True
    zero_row: bool = True
    triton: bool = True
    tune: bool = True
    device_images: bool = True
    pack: bool = True

    @classmethod
    def names(cls, device_type: str | None = None) -> tuple[str, ...]:
        """Of all optimisations, or of those that do anything on "cpu" or "cuda"."""
        idle = {None: (), "cpu": ("graph", "streams", "triton", "tune", "device_images"), "cuda": ("pack",)}[device_type]
        return tuple(f.name for f in fields(cls) if f.name not in idle)
