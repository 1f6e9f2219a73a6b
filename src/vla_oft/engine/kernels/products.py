"""A matrix product with everything that may be fused to it, computed one of several ways. What is timed is what runs.

way      what it does
torch    the product of torch (cuBLAS and its kin), then the activation's own kernel
matmul   the Triton kernel; GELU inside it, SwiGLU behind it
gated    the Triton kernel with gate and up in one program; weights (2 F, K), gate first, as for the others
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.kernels.candidates import Machine, Shape, matmul_tiles, narrow_tiles
from vla_oft.engine.kernels.packing import unpack_int4
from vla_oft.engine.kernels.tiles import Tiles
from vla_oft.engine.ops import Ops, Quantized, Rows
from vla_oft.engine.options import WeightKind

Way = Literal["torch", "matmul", "gated"]
Activation = Literal["gelu", "swiglu"]
_TOO_FEW_ROWS, _FP8_ROWS = 16, 256
EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8-dynamic": torch.int8}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute. tiles: of the Triton kernel, None for torch's; way: of a `Product`, or a backend of attention."""

    way: str
    tiles: Tiles | None = None

    def __str__(self) -> str:
        return self.way if self.tiles is None else f"{self.way} {self.tiles}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight (N, K), or packed, and its scale: (N,) float32 for 8 bits, (N, groups) for int4, None for dense; bias (N,) or None."""

    kind: WeightKind
    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """What to compute. rows x inner times columns x inner; columns counts gate and up both.

    activation and quantize are applied to the result; parts: its consumer is a norm, which sums the parts of a split product.
    """

    rows: int
    columns: int
    inner: int
    kind: WeightKind = "dense"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    activation: Activation | None = None
    quantize: torch.dtype | None = None
    parts: bool = False

    def __post_init__(self) -> None:
        if self.activation == "swiglu" and (self.bias or self.columns % 2):
            raise ValueError(f"activation='swiglu' with bias={self.bias}, columns={self.columns}: pass gate and up of equal size, no bias")
        if self.parts and (self.activation or self.quantize):
            raise ValueError(
                f"parts={self.parts} with activation={self.activation!r}, quantize={self.quantize}: a norm takes plain sums only"
            )

    @property
    def key(self) -> str:
        """Names this product in the cache."""
        marks = [self.kind, _short(self.dtype)] + ["bias"] * self.bias + [self.activation or ""] + ["parts"] * self.parts
        marks += [f"to {_short(self.quantize)}"] if self.quantize else []
        return f"{self.rows}x{self.columns}x{self.inner} {' '.join(mark for mark in marks if mark)}"

    @property
    def tolerance(self) -> float:
        """Largest `trials.distance` from torch's answer: a few roundings of the result, or 8-bit steps here and there."""
        return 8e-2 if self.quantize else {torch.float32: 1e-4, torch.float16: 3e-3}.get(self.dtype, 2e-2)

    def candidates(self, machine: Machine) -> list[Candidate]:
        """All ways worth timing; torch's is the first."""
        found = [Candidate(way="torch")]
        exact = self.kind == "dense" and self.dtype == torch.float32  # without tensor cores in Triton
        if machine.capability < (89 if self.kind == "fp8" else 80) or exact:
            return found
        item_bytes = 1 if self.kind in EIGHT_BITS else 2
        shape = Shape(rows=self.rows, columns=self.columns, inner=self.inner, item_bytes=item_bytes, split=self.parts)
        if self.kind in ("int8", "int4"):
            tiles = narrow_tiles(shape, machine, bits=4 if self.kind == "int4" else 8)
        else:
            tiles = matmul_tiles(shape, machine)
        if self.activation == "swiglu" and self.kind not in ("int8", "int4"):
            halves = Shape(rows=self.rows, columns=self.columns // 2, inner=self.inner, item_bytes=item_bytes, gated=True)
            gated = matmul_tiles(halves, machine)
            return found + [Candidate(way="gated", tiles=t) for t in gated[:8]] + [Candidate(way="matmul", tiles=t) for t in tiles[:8]]
        return found + [Candidate(way="matmul", tiles=t) for t in tiles]


def compute(product: Product, candidate: Candidate, x: Rows, weight: Stored, ops: Ops) -> Rows:
    """x (rows, inner), in 8 bits if the kind wants that -> (rows, columns), or parts (splits, rows, columns) float32 if tiles are split."""
    after: dict[str | None, Callable[..., Rows]] = {"gelu": ops.gelu, "swiglu": ops.swiglu}
    activation = product.activation
    if candidate.way == "torch":
        out: Rows = torch_product(x, weight, product)
    elif candidate.way == "gated":
        out, activation = _gated(product, candidate, x, weight), None
    else:
        fused = activation == "gelu" and weight.kind not in ("int8", "int4")
        out = _matmul(product, candidate, x, weight, "gelu" if fused else None)
        activation = None if fused else activation
    if activation is not None:
        return after[activation](out, product.quantize)
    return out if product.quantize is None else ops.quantize_rows(out, product.quantize)


def torch_product(x: Rows, weight: Stored, product: Product) -> Tensor:
    """x @ weight.T + bias through torch's libraries."""
    if weight.kind == "dense":
        assert isinstance(x, Tensor)
        return F.linear(x, weight.values, weight.bias)
    assert weight.scale is not None
    if isinstance(x, Tensor):
        if weight.kind == "int4":
            return F.linear(x, unpack_int4(weight.values, weight.scale, product.inner, x.dtype), weight.bias)
        out = (x @ weight.values.to(x.dtype).t()).mul_(weight.scale.to(x.dtype))
        return out if weight.bias is None else out.add_(weight.bias)
    if weight.kind == "fp8":
        return _fp8_product(x, weight, weight.scale, product.dtype)
    sums = _int8_sums(x.values, weight.values).float().mul_(x.scale)
    sums = sums.mul_(weight.scale) if weight.bias is None else torch.addcmul(weight.bias.float(), sums, weight.scale)
    return sums.to(product.dtype)


def _fp8_product(x: Quantized, weight: Stored, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """On CUDA, cuBLAS has no row-wise product of few rows and many inputs (9216 inputs fail up to 256 rows, on an H100)."""
    rows, (values, x_scale) = len(x.values), x
    if values.device.type == "cuda" and rows <= _FP8_ROWS:
        missing = _FP8_ROWS + 16 - rows
        values, x_scale = (
            F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(values.dtype),
            F.pad(x_scale, (0, 0, 0, missing), value=1.0),
        )
    scales = {"scale_a": x_scale, "scale_b": scale.view(1, -1)}
    return torch._scaled_mm(values, weight.values.t(), **scales, bias=weight.bias, out_dtype=dtype, use_fast_accum=True)[:rows]


def _int8_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of int8, in int32. On CUDA torch wants more than 16 rows."""
    if x.device.type == "cuda" and len(x) <= _TOO_FEW_ROWS:
        return torch._int_mm(F.pad(x, (0, 0, 0, 2 * _TOO_FEW_ROWS - len(x))), weight.t())[: len(x)]
    return torch._int_mm(x, weight.t())


def _matmul(product: Product, candidate: Candidate, x: Rows, weight: Stored, activation: str | None) -> Tensor:
    from vla_oft.engine.kernels import gemm, weight_only

    assert candidate.tiles is not None
    if weight.kind in ("int8", "int4"):
        assert isinstance(x, Tensor) and weight.scale is not None
        narrow = weight_only.int8_matmul if weight.kind == "int8" else weight_only.int4_matmul
        return narrow(x, weight.values, weight.scale, weight.bias, tiles=candidate.tiles)
    values, x_scale = (x, None) if isinstance(x, Tensor) else x
    scales = {"x_scale": x_scale, "weight_scale": weight.scale}
    return gemm.matmul(values, weight.values, weight.bias, activation, tiles=candidate.tiles, dtype=product.dtype, **scales)


def _gated(product: Product, candidate: Candidate, x: Rows, weight: Stored) -> Tensor:
    from vla_oft.engine.kernels import gemm

    assert candidate.tiles is not None
    gate, up = weight.values.chunk(2)
    if isinstance(x, Tensor):
        return gemm.gated_matmul(x, gate, up, tiles=candidate.tiles)
    assert weight.scale is not None
    gate_scale, up_scale = weight.scale.chunk(2)
    scales = {"x_scale": x.scale, "gate_scale": gate_scale, "up_scale": up_scale}
    return gemm.gated_matmul(x.values, gate, up, tiles=candidate.tiles, **scales, dtype=product.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
