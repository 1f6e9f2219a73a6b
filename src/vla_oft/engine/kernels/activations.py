"""SwiGLU and GELU, optionally to 8 bits in the same pass, and rows to 8 bits alone.

Without quantisation a program takes 1024 columns of a row; with it, a whole row (its largest value is needed first; 11008 values are 32 for
each of 512 threads).
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vla_oft.engine.kernels.quantization import new_rows, range_arguments, require_rows, row_launch, store_quantized

Rows = Tensor | tuple[Tensor, Tensor]
COLUMNS_PER_PROGRAM = 1024


def swiglu(gate_up: Tensor, quantize: torch.dtype | None) -> Rows:
    """silu(gate) * up of (M, 2 F), gate first -> (M, F), or values (M, F) and scale (M, 1). Rounded after silu and after the product."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns; pass gate and up side by side, an even number")
    return _apply("swiglu", gate_up, gate_up.shape[-1] // 2, quantize)


def gelu(x: Tensor, quantize: torch.dtype | None) -> Rows:
    """Exact (erf) GELU of (M, F), or its values and scale; rounded before it is quantised."""
    return _apply("gelu", x, x.shape[-1], quantize)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M, W) -> values (M, W) of dtype float8_e4m3fn or int8, scale float32 (M, 1)."""
    values, scale = _apply("none", x, x.shape[-1], dtype)
    return values, scale


def _apply(activation: str, x: Tensor, width: int, quantize: torch.dtype | None) -> Rows:
    require_rows(x=x)
    values, scale = new_rows(x, width, quantize)
    launch = row_launch(width) if quantize else {"BLOCK": COLUMNS_PER_PROGRAM, "num_warps": 4}
    grid = (len(x), triton.cdiv(width, launch["BLOCK"]))
    _activation[grid](x, values, scale, width, x.stride(0), ACTIVATION=activation, **range_arguments(quantize), **launch)
    return values if scale is None else (values, scale)


@triton.jit
def silu(x):
    """x * sigmoid(x) of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def exact_gelu(x):
    """GELU of float32 with the error function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activation(
    x_ptr,
    values_ptr,
    scale_ptr,
    width,
    x_stride,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_ptr += row.to(tl.int64) * x_stride + columns
    x = tl.load(x_ptr, mask=mask, other=0.0)
    out = x.to(tl.float32)
    if ACTIVATION == "swiglu":
        up = tl.load(x_ptr + width, mask=mask, other=0.0).to(tl.float32)
        out = silu(out).to(x.dtype).to(tl.float32) * up
    elif ACTIVATION == "gelu":
        out = exact_gelu(out)
    out = out.to(x.dtype)
    if LARGEST > 0:
        store_quantized(values_ptr, scale_ptr, row, width, columns, mask, out.to(tl.float32), LARGEST, SMALLEST)
    else:
        tl.store(values_ptr + row * width + columns, out, mask=mask)
