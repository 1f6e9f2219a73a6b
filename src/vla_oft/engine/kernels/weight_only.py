"""Products of bf16 rows with weights in 8 or 4 bits: half or a quarter of the memory, for small GPUs.

The kernel computes the transposed product, weight @ x.T: the first operand of a tensor core instruction may come from registers, so the
weights are widened there and never go back to shared memory.
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vla_oft.engine.kernels.gemm import load_block
from vla_oft.engine.kernels.packing import GROUP
from vla_oft.engine.kernels.quantization import require_rows
from vla_oft.engine.kernels.tiles import Tiles


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, tiles: Tiles) -> Tensor:
    """x (M, K) @ weight.T + bias -> (M, N) in x's dtype. weight int8 (N, K), scale float32 (N,): they stand for weight * scale.

    The scale multiplies the float32 sums, so nothing is rounded but the result. A split product returns float32 parts (splits, M, N).
    """
    require_rows(x=x, weight=weight)
    if weight.dtype != torch.int8 or weight.shape[1] != x.shape[1] or scale.shape != weight.shape[:1]:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} and scale {tuple(scale.shape)} do not fit x {tuple(x.shape)}")
    return _launch(x, weight, scale, bias, tiles, bits=8)


def int4_matmul(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, *, tiles: Tiles) -> Tensor:
    """x (M, K) @ weight.T + bias -> (M, N) in x's dtype, with the weight of `packing.unpack_int4(packed, scales, K, x.dtype)`.

    block_k is 128, a group. A split product returns float32 parts (splits, M, N).
    """
    require_rows(x=x, packed=packed, scales=scales)
    groups = triton.cdiv(x.shape[1], GROUP)
    if packed.dtype != torch.uint8 or packed.shape[1] != groups * GROUP // 2 or scales.shape != (len(packed), groups):
        raise ValueError(f"packed {tuple(packed.shape)} {packed.dtype} and scales {tuple(scales.shape)} do not fit x {tuple(x.shape)}")
    if tiles.block_k != GROUP:
        raise ValueError(f"block_k={tiles.block_k} must be {GROUP}: one group of int4 weights a step")
    return _launch(x, packed, scales, bias, tiles, bits=4)


def _launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiles: Tiles, bits: int) -> Tensor:
    (M, K), N = x.shape, len(weight)
    if tiles.tma or tiles.extra_n or tiles.programs:
        raise ValueError(f"tiles={tiles}: products with narrow weights take plain tiles only; leave tma, extra_n and programs out")
    shape, dtype = ((M, N), x.dtype) if tiles.splits == 1 else ((tiles.splits, M, N), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    _narrow_matmul[(triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.block_n), tiles.splits)](
        x,
        weight,
        scale,
        out,
        bias,
        M,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        scale.stride(0),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        SPLITS=tiles.splits,
        BITS=bits,
        EVEN_K=K % (tiles.block_k * tiles.splits) == 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


@triton.jit(do_not_specialize=["M"])
def _narrow_matmul(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    bias_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_K // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    row, column, part = (tl.program_id(0) % tiles_m) * BLOCK_M, (tl.program_id(0) // tiles_m) * BLOCK_N, tl.program_id(1)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(steps):
        group = part * steps + step
        k = group * BLOCK_K
        if BITS == 8:
            weight = load_block(weight_ptr, column, k, N, K, weight_stride, BLOCK_N, BLOCK_K, False, EVEN_K).to(dtype)
            x = load_block(x_ptr, row, k, M, K, x_stride, BLOCK_M, BLOCK_K, False, EVEN_K)
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        else:
            num_bytes = tl.cdiv(K, BLOCK_K) * HALF
            pair = load_block(weight_ptr, column, group * HALF, N, num_bytes, weight_stride, BLOCK_N, HALF, False, EVEN_K)
            in_range = (columns < N) & (k < K)
            scale = tl.load(scale_ptr + columns * scale_stride + group, mask=in_range, other=0.0)[:, None]
            low = (((pair & 15).to(tl.float32) - 8.0) * scale).to(dtype)
            high = (((pair >> 4).to(tl.float32) - 8.0) * scale).to(dtype)
            x = load_block(x_ptr, row, k, M, K, x_stride, BLOCK_M, HALF, False, EVEN_K)
            acc = tl.dot(low, x.T, acc, input_precision="ieee")
            x = load_block(x_ptr, row, k + HALF, M, K, x_stride, BLOCK_M, HALF, False, EVEN_K)
            acc = tl.dot(high, x.T, acc, input_precision="ieee")
    if BITS == 8:
        acc *= tl.load(scale_ptr + columns * scale_stride, mask=columns < N, other=0.0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        acc += tl.where(part == 0, bias, 0.0)[:, None]
    mask = (rows < M)[None, :] & (columns < N)[:, None]
    out_ptr += part.to(tl.int64) * M * N + rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)
