"""Residual sum and norm in one pass over memory: the kernels between a block's products.

One program holds one row (at most 4096 values in the models here) in registers, so every input is read once and every output written
once. Sums and norms are float32; results are rounded to the storage dtype where the plain model rounds.
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vla_oft.engine.kernels.quantization import new_rows, range_arguments, require_rows, row_launch, store_quantized

Rows = Tensor | tuple[Tensor, Tensor]


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, quantize: torch.dtype | None) -> tuple[Tensor, Rows]:
    """As `ops.add_rms_norm`. x (M, W); delta (M, W), or partial sums (parts, M, W) of a split product, or None; weight (W,).

    Returns x + delta (x itself when delta is None), and its norm (M, W), or values (M, W) and scale (M, 1).
    """
    require_rows(x=x)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed, scale = new_rows(x, x.shape[1], quantize)
    _add_rms_norm[(len(x),)](
        x,
        *_partial_sums(x, delta),
        weight,
        total,
        normed,
        scale,
        x.shape[1],
        x.stride(0),
        eps,
        PARTS=_num_parts(delta),
        **range_arguments(quantize),
        **row_launch(x.shape[1]),
    )
    return total, normed if scale is None else (normed, scale)


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    film: tuple[Tensor, Tensor] | None,
    rows_per_image: int,
    quantize: torch.dtype | None,
) -> tuple[Tensor, Rows]:
    """As `ops.add_layer_norm`. x (M, W); delta as in `add_rms_norm`; weight and bias (W,); film: gain and shift (images, W).

    Returns x + delta, modulated (x itself when there is neither), and its norm (M, W), or values (M, W) and scale (M, 1).
    """
    require_rows(x=x)
    gain, shift = film or (None, None)
    if gain is not None and shift is not None:
        require_rows(gain=gain, shift=shift)
        if len(x) > len(gain) * rows_per_image or (len(gain) > 1 and gain.stride(0) != shift.stride(0)):
            raise ValueError(f"film of {len(gain)} images with rows_per_image={rows_per_image} does not cover {len(x)} rows of one stride")
    unchanged = delta is None and film is None
    total = x if unchanged else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed, scale = new_rows(x, x.shape[1], quantize)
    _add_layer_norm[(len(x),)](
        x,
        *_partial_sums(x, delta),
        gain,
        shift,
        weight,
        bias,
        total,
        normed,
        scale,
        x.shape[1],
        x.stride(0),
        0 if gain is None else gain.stride(0),
        rows_per_image,
        eps,
        PARTS=_num_parts(delta),
        HAS_FILM=film is not None,
        **range_arguments(quantize),
        **row_launch(x.shape[1]),
    )
    return total, normed if scale is None else (normed, scale)


def _num_parts(delta: Tensor | None) -> int:
    return 0 if delta is None else 1 if delta.ndim == 2 else len(delta)


def _partial_sums(x: Tensor, delta: Tensor | None) -> tuple[Tensor | None, int, int]:
    """delta, the stride between its parts, and between rows."""
    if delta is None:
        return None, 0, 0
    parts = delta[None] if delta.ndim == 2 else delta
    if parts.shape[1:] != x.shape or parts.stride(-1) != 1:
        raise ValueError(
            f"delta has shape {tuple(delta.shape)}, strides {delta.stride()}; pass {tuple(x.shape)} or parts of it, rows contiguous"
        )
    return delta, parts.stride(0), parts.stride(1)


@triton.jit
def _sum_of(x, delta_ptr, part_stride, row_stride, row, columns, mask, PARTS: tl.constexpr):
    """x + the sum of the parts of delta, as float32 with the roundings of x's dtype: one after summing, one after adding."""
    total = x.to(tl.float32)
    if PARTS > 0:
        delta_ptr += row.to(tl.int64) * row_stride + columns
        delta = tl.load(delta_ptr, mask=mask, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, PARTS):
            delta_ptr += part_stride
            delta += tl.load(delta_ptr, mask=mask, other=0.0).to(tl.float32)
        total = (total + delta.to(x.dtype).to(tl.float32)).to(x.dtype).to(tl.float32)
    return total


@triton.jit
def _add_rms_norm(
    x_ptr,
    delta_ptr,
    part_stride,
    delta_stride,
    weight_ptr,
    total_ptr,
    normed_ptr,
    scale_ptr,
    width,
    x_stride,
    eps,
    PARTS: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    total = _sum_of(x, delta_ptr, part_stride, delta_stride, row, columns, mask, PARTS)
    if PARTS > 0:
        tl.store(total_ptr + row * width + columns, total.to(x.dtype), mask=mask)
    normed = total * tl.rsqrt(tl.sum(total * total, 0) / width + eps)
    if LARGEST > 0:
        store_quantized(normed_ptr, scale_ptr, row, width, columns, mask, weight.to(tl.float32) * normed, LARGEST, SMALLEST)
    else:
        out = weight.to(x.dtype).to(tl.float32) * normed.to(x.dtype).to(tl.float32)
        tl.store(normed_ptr + row * width + columns, out.to(x.dtype), mask=mask)


@triton.jit
def _add_layer_norm(
    x_ptr,
    delta_ptr,
    part_stride,
    delta_stride,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    scale_ptr,
    width,
    x_stride,
    film_stride,
    rows_per_image,
    eps,
    PARTS: tl.constexpr,
    HAS_FILM: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    total = _sum_of(x, delta_ptr, part_stride, delta_stride, row, columns, mask, PARTS)
    if HAS_FILM:
        film = (row // rows_per_image) * film_stride + columns
        gain = tl.load(gain_ptr + film, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + film, mask=mask, other=0.0).to(tl.float32)
        total = (total * gain).to(x.dtype).to(tl.float32)
        total = (total + shift).to(x.dtype).to(tl.float32)
    if PARTS > 0 or HAS_FILM:
        tl.store(total_ptr + row * width + columns, total.to(x.dtype), mask=mask)
    centred = tl.where(mask, total - tl.sum(total, 0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps) * weight + bias
    if LARGEST > 0:
        store_quantized(normed_ptr, scale_ptr, row, width, columns, mask, normed, LARGEST, SMALLEST)
    else:
        tl.store(normed_ptr + row * width + columns, normed.to(x.dtype), mask=mask)
