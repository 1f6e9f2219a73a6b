"""Rows to 8 bits inside a kernel: one symmetric scale for each row, as `ops.quantize_rows`."""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from vla_oft.engine.ops import LARGEST, SMALLEST_SCALE


@triton.jit
def round_half_even(x):
    """Nearest integer of a float32 below 2^22, ties to even: adding 1.5 * 2^23 leaves no bits below one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def store_quantized(values_ptr, scale_ptr, row, row_stride, columns, mask, x, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """Scale one row x (BLOCK), float32 and 0 where masked, to the range of the values' dtype, and store both.

    Divisions are correctly rounded (plain `/` is not), so that values equal those of torch.
    """
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), SMALLEST), tl.full([], LARGEST, tl.float32))
    scale += tl.sum(x * 0.0, 0)  # a maximum forgets NaN, and int8 has none: the scale must carry it
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    if values_ptr.dtype.element_ty == tl.int8:
        x = round_half_even(x)
    tl.store(values_ptr + row * row_stride + columns, x.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


def new_rows(x: torch.Tensor, width: int, quantize: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Uninitialised outputs for the rows of x: values (M, width), and the scales (M, 1) float32 of quantised ones.

    Raises ValueError for a dtype that rows are not quantised to.
    """
    if quantize is not None and quantize not in LARGEST:
        raise ValueError(f"quantize={quantize} is not supported; choose one of {', '.join(map(str, LARGEST))} or None")
    values = torch.empty((len(x), width), dtype=quantize or x.dtype, device=x.device)
    return values, torch.empty((len(x), 1), dtype=torch.float32, device=x.device) if quantize else None


def range_arguments(quantize: torch.dtype | None) -> dict[str, float]:
    """The constants LARGEST and SMALLEST of a kernel; LARGEST 0 = not quantised."""
    return {"LARGEST": LARGEST[quantize] if quantize else 0.0, "SMALLEST": SMALLEST_SCALE}


def row_launch(width: int) -> dict[str, int]:
    """BLOCK and num_warps of a program that holds one row: 8 values a thread (16 bytes of bfloat16), at most 16 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def require_rows(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless every tensor's last dimension is contiguous and all but the last two are absent."""
    for name, x in tensors.items():
        if x.ndim != 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
            raise ValueError(f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; pass (M, width) with contiguous rows")
