"""Matrix products x @ weight.T for few rows (300-1200) and wide weights, in one kernel.

```
                     weight (N, K), read once from memory
                     tile 0      tile 1      tile 2
    x (M, K)  rows  +-----------+-----------+-----
              0     | program 0 | program 3 |        programs that share columns run at the same time: their weights come from memory
              1     | program 1 | program 4 | ...    once and from L2 after that; x (at most 26 MB here) stays in L2 throughout.
              2     | program 2 | program 5 |
```

Each operand is row by row along the inner dimension, which is what wgmma reads without a transposition. Accumulation is float32 (int32
for int8). The result is rounded once to the output's dtype, where the plain layer rounds; an activation is applied to the rounded value.
A split product returns float32 parts that `norms` sums: without atomics, so that the same input always gives the same output.
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vla_oft.engine.kernels.activations import exact_gelu, silu
from vla_oft.engine.kernels.quantization import require_rows
from vla_oft.engine.kernels.tiles import Tiles

ACTIVATIONS = (None, "gelu")


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    tiles: Tiles,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias): (M, K), (N, K), (N,) -> (M, N) of `dtype` (default: that of x), or float32 parts (splits, M, N).

    x and weight are both bf16, fp16 or fp32; or both float8_e4m3fn or int8 with x_scale (M, 1) and weight_scale (N,), float32.
    The bias is in the first part of a split product. Raises ValueError for what does not fit together.
    """
    _require_fitting(x, [weight], [weight_scale], x_scale, dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {ACTIVATIONS}")
    if activation is not None and tiles.splits > 1:
        raise ValueError(f"splits={tiles.splits} with activation={activation!r}: only the sum of the parts can be activated; use splits=1")
    second = "columns" if tiles.extra_n else "none"
    return _launch(x, weight, weight, bias, activation, tiles, (x_scale, weight_scale, None), dtype, second)


def gated_matmul(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    tiles: Tiles,
    x_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T): (M, K), twice (F, K) -> (M, F). Both products, silu and the result are rounded, as in `llama.Mlp`."""
    _require_fitting(x, [gate, up], [gate_scale, up_scale], x_scale, dtype)
    if gate.shape != up.shape or gate.stride() != up.stride():
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape and strides")
    if tiles.splits > 1 or tiles.extra_n:
        raise ValueError(f"tiles={tiles}: a gated product has two accumulators already; use splits=1 and extra_n=0")
    return _launch(x, gate, up, None, None, tiles, (x_scale, gate_scale, up_scale), dtype, "gate")


def tma_fits(*operands: Tensor) -> bool:
    """Whether the copy engine can read these matrices: addresses and row strides of 16-byte multiples."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in operands)


def _require_fitting(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], x_scale: Tensor | None, dtype: torch.dtype | None
) -> None:
    for weight, scale in zip(weights, scales, strict=True):
        require_rows(x=x, weight=weight)
        if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}; pass (M, K) and (N, K) of one dtype"
            )
        if x.element_size() == 1 and (x_scale is None or scale is None or dtype is None):
            raise ValueError(f"x is {x.dtype}: pass x_scale, the scale of each weight, and the output's dtype")


def _launch(x, first, second, bias, activation, tiles: Tiles, scales, dtype, kind: str) -> Tensor:
    (M, K), N = x.shape, len(first)
    if tiles.tma and not tma_fits(x, first, second):
        raise ValueError(f"tiles={tiles}: tma needs rows of 16-byte multiples, x has {K} values of {x.element_size()} bytes")
    shape, dtype = ((M, N), dtype or x.dtype) if tiles.splits == 1 else ((tiles.splits, M, N), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    second_n = {"none": 0, "gate": tiles.block_n, "columns": tiles.extra_n}[kind]
    num_tiles = triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.width) * tiles.splits
    block_k = min(tiles.block_k, max(32, triton.next_power_of_2(K)))
    operands = (
        _operand(x, tiles.block_m, block_k, tiles.tma),
        _operand(first, tiles.block_n, block_k, tiles.tma),
        _operand(second, second_n, block_k, tiles.tma) if second_n else None,
    )
    _matmul[(min(tiles.programs, num_tiles) or num_tiles,)](
        *operands,
        out,
        bias,
        *scales,
        M,
        N,
        K,
        x.stride(0),
        first.stride(0),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        SECOND_N=second_n,
        SPLITS=tiles.splits,
        KIND=kind,
        ACTIVATION=activation or "none",
        INTEGER=x.dtype == torch.int8,
        TMA=tiles.tma,
        EVEN_K=tiles.tma or K % (block_k * tiles.splits) == 0,
        FLATTEN=tiles.programs > 0 and not tiles.specialized,
        SPECIALIZED=tiles.specialized,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _operand(matrix: Tensor, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if tma else matrix


@triton.jit
def load_block(
    matrix, row, column, num_rows, num_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr
):
    """ROWS x COLUMNS of a matrix from (row, column) on; zero beyond its columns, anything beyond its rows."""
    if TMA:
        block = matrix.load([row, column])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1)
        columns = column + tl.arange(0, COLUMNS)
        pointers = matrix + rows[:, None].to(tl.int64) * stride + columns[None, :]
        block = tl.load(pointers) if EVEN else tl.load(pointers, mask=columns[None, :] < num_columns, other=0.0)
    return block


@triton.jit
def finished(acc, bias_ptr, x_scale_ptr, scale_ptr, rows, columns, M, N, first_part):
    """Accumulated products in float32: scaled, and with the bias in the first part."""
    acc = acc.to(tl.float32)
    if scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
        acc *= x_scale[:, None] * tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.where(first_part, tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32), 0.0)[None, :]
    return acc


@triton.jit
def gated(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up of float32, with the roundings of the plain MLP."""
    silu_gate = silu(gate.to(DTYPE).to(tl.float32)).to(DTYPE)
    return silu_gate.to(tl.float32) * up.to(DTYPE).to(tl.float32)


@triton.jit
def store_block(out_ptr, acc, rows, columns, M, N, ACTIVATION: tl.constexpr):
    """Round, activate, store the part that lies inside (M, N)."""
    out = acc.to(out_ptr.dtype.element_ty)
    if ACTIVATION == "gelu":
        out = exact_gelu(out.to(tl.float32)).to(out.dtype)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["M"])  # one compilation for all numbers of rows
def _matmul(
    x,
    first,
    second,
    out_ptr,
    bias_ptr,
    x_scale_ptr,
    first_scale_ptr,
    second_scale_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SECOND_N: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTEGER: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N + SECOND_N if KIND == "columns" else BLOCK_N
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    # One iteration where each program has one tile. Written as a loop for both: a second copy of the body would have to be kept equal.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZED):
        row = (tile % tiles_m) * BLOCK_M
        column = (tile // tiles_m % tiles_n) * WIDTH
        part = tile // (tiles_m * tiles_n)
        second_column = column + BLOCK_N if KIND == "columns" else column
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if SECOND_N > 0:
            second_acc = tl.zeros((BLOCK_M, SECOND_N), ACC)
        for step in tl.range(steps):
            k = (part * steps + step) * BLOCK_K
            a = load_block(x, row, k, M, K, x_stride, BLOCK_M, BLOCK_K, TMA, EVEN_K)
            b = load_block(first, column, k, N, K, weight_stride, BLOCK_N, BLOCK_K, TMA, EVEN_K)
            acc = tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=ACC)
            if SECOND_N > 0:
                b = load_block(second, second_column, k, N, K, weight_stride, SECOND_N, BLOCK_K, TMA, EVEN_K)
                second_acc = tl.dot(a, b.T, second_acc, input_precision="ieee", out_dtype=ACC)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        result = finished(acc, bias_ptr, x_scale_ptr, first_scale_ptr, rows, columns, M, N, part == 0)
        out_part_ptr = out_ptr + part.to(tl.int64) * M * N
        if KIND == "gate":
            up = finished(second_acc, bias_ptr, x_scale_ptr, second_scale_ptr, rows, columns, M, N, part == 0)
            store_block(out_part_ptr, gated(result, up, out_ptr.dtype.element_ty), rows, columns, M, N, "none")
        else:
            store_block(out_part_ptr, result, rows, columns, M, N, ACTIVATION)
            if KIND == "columns":
                columns = second_column + tl.arange(0, SECOND_N)
                result = finished(second_acc, bias_ptr, x_scale_ptr, first_scale_ptr, rows, columns, M, N, part == 0)
                store_block(out_part_ptr, result, rows, columns, M, N, ACTIVATION)
