"""Rotary positions, in place in the output of the merged query-key-value product: two of its three parts are read and written once."""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from vla_oft.engine.kernels.quantization import require_rows

HEADS_PER_PROGRAM = 16
"""16 heads of 128 are 2 KB in and out for each half. 343 rows of 32 + 32 heads then make 1372 programs: enough loads in flight on 132
multiprocessors. Estimated, not measured."""


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    """As `ops.rope_`: qkv (M, (num_heads + 2 num_kv_heads) d), cos and sin float32 (T, d / 2), row m has those of m % T.

    In float32 with one rounding; halves convention: dimension i turns with i + d / 2.
    """
    require_rows(qkv=qkv, cos=cos, sin=sin)
    half, heads = cos.shape[1], num_heads + num_kv_heads
    if qkv.shape[1] != (heads + num_kv_heads) * 2 * half or cos.stride(0) != sin.stride(0) or cos.shape != sin.shape:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, cos and sin are {tuple(cos.shape)} for {num_heads} + 2 x {num_kv_heads} heads")
    block_heads = min(HEADS_PER_PROGRAM, triton.next_power_of_2(heads))
    grid = (len(qkv), triton.cdiv(heads, block_heads))
    _rope[grid](
        qkv,
        cos,
        sin,
        len(cos),
        heads,
        half,
        qkv.stride(0),
        cos.stride(0),
        HEADS=block_heads,
        HALF=triton.next_power_of_2(half),
        num_warps=4,
    )


@triton.jit
def _rope(qkv_ptr, cos_ptr, sin_ptr, num_positions, num_heads, half, row_stride, table_stride, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    table = (row % num_positions) * table_stride + columns
    cos = tl.load(cos_ptr + table, mask=columns < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + table, mask=columns < half, other=0.0)[None, :]
    first_ptr = qkv_ptr + row.to(tl.int64) * row_stride + heads[:, None] * (2 * half) + columns[None, :]
    mask = (heads < num_heads)[:, None] & (columns < half)[None, :]
    stored = tl.load(first_ptr, mask=mask, other=0.0)
    first, second = stored.to(tl.float32), tl.load(first_ptr + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(stored.dtype), mask=mask)
    tl.store(first_ptr + half, (second * cos + first * sin).to(stored.dtype), mask=mask)
