"""Every kernel, as it will be launched, compiles for GPUs that are not here; and what the compiler made of it is what was meant."""

import pytest
import torch

pytest.importorskip("triton")

from compiling import Compiled, compiled_for

from vla_oft.engine import ops
from vla_oft.engine.kernels import activations, gemm, norms, rotary, weight_only
from vla_oft.engine.kernels.candidates import Machine
from vla_oft.engine.kernels.products import EIGHT_BITS, Product, Stored, compute
from vla_oft.engine.kernels.tiles import Tiles

H200 = Machine(name="NVIDIA H200", capability=90, multiprocessors=132, shared_bytes=232448)
A100 = Machine(name="NVIDIA A100-SXM4-40GB", capability=80, multiprocessors=108, shared_bytes=166912)
RTX = Machine(name="NVIDIA GeForce RTX 4090", capability=89, multiprocessors=128, shared_bytes=101376)
MACHINES = {"sm_90": H200, "sm_80": A100, "sm_89": RTX}
KINDS = {"sm_90": ("dense", "fp8", "int8-dynamic"), "sm_80": ("dense", "int8", "int8-dynamic"), "sm_89": ("fp8", "int4")}
"""What is meant to run on which: all of it would take a quarter of an hour to compile."""
ROWS = 343
SHAPES = [
    {"columns": 12288, "inner": 4096},
    {"columns": 22016, "inner": 4096, "activation": "swiglu"},
    {"columns": 4096, "inner": 11008, "parts": True},
    {"columns": 4096, "inner": 1024, "bias": True, "activation": "gelu"},
    {"columns": 1152, "inner": 4304, "bias": True, "parts": True},
]
WGMMA, TMA = "wgmma.mma_async", "cp.async.bulk.tensor"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fits(kernel: Compiled, machine: Machine) -> bool:
    return kernel.shared <= machine.shared_bytes and kernel.registers <= 255


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_between_products_compile_without_spills(capability):
    x, w, d = meta(ROWS, 4096), meta(4096), meta(3, ROWS, 4096, dtype=torch.float32)
    v, vw, film = meta(522, 1024), meta(1024), (meta(2, 1024), meta(2, 1024))
    with compiled_for(capability) as kernels:
        for quantize in (None, torch.int8, *([torch.float8_e4m3fn] if capability >= 89 else [])):
            norms.add_rms_norm(x, d, w, 1e-6, quantize)
            norms.add_layer_norm(v, v, vw, vw, 1e-6, film, 261, quantize)
            activations.swiglu(meta(ROWS, 2 * 11008), quantize)
            activations.gelu(meta(512, 4304), quantize)
        norms.add_rms_norm(x, None, w, 1e-6, None)
        activations.quantize_rows(x, torch.int8)
        rotary.rope_(meta(ROWS, 12288), meta(ROWS, 64, dtype=torch.float32), meta(ROWS, 64, dtype=torch.float32), 32, 32)
    assert len(kernels) == (15 if capability == 90 else 11)
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.registers <= 128, kernel.name
        assert kernel.has("ld.global.v4"), f"{kernel.name} reads 16 bytes at a time"


def product(tiles: Tiles, capability: int = 90, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    x, weight = meta(600, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype)
    scales = {"x_scale": meta(600, 1, dtype=torch.float32), "weight_scale": meta(4096, dtype=torch.float32)} if dtype.itemsize == 1 else {}
    with compiled_for(capability) as kernels:
        gemm.matmul(x, weight, tiles=tiles, dtype=torch.bfloat16, **scales)
    return kernels[0]


LARGE = {"block_m": 128, "block_n": 256, "block_k": 64, "warps": 8}


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(**LARGE, tma=True, stages=4),
        Tiles(**LARGE, tma=True, stages=3, programs=132),
        Tiles(**LARGE, tma=True, stages=4, extra_n=32),
        Tiles(**LARGE),
    ],
    ids=str,
)
def test_products_on_sm_90_keep_tensor_cores_and_copies_going(tiles):
    kernel = product(tiles)
    assert kernel.has(WGMMA) and not kernel.has("mma.sync") and kernel.spills == 0 and fits(kernel, H200)
    assert kernel.has(TMA) == tiles.tma
    waits = {line.split()[-1] for line in kernel.ptx.splitlines() if "wgmma.wait_group" in line}
    assert waits - {"0;"}, "the loop does not wait for the products that it has just started"


def test_specialized_warps_have_registers_of_their_own():
    kernel = product(Tiles(**{**LARGE, "warps": 4}, tma=True, stages=3, programs=132, specialized=True))
    assert kernel.has(WGMMA) and kernel.has(TMA) and kernel.has("setmaxnreg") and fits(kernel, H200)


def test_8_bit_products_use_8_bit_tensor_cores():
    tiles = Tiles(block_m=128, block_n=256, block_k=128, warps=8, tma=True)
    assert product(tiles, dtype=torch.float8_e4m3fn).has(".f32.e4m3.e4m3")
    assert product(tiles, dtype=torch.int8).has(".s32.s8.s8")
    assert product(Tiles(block_m=128, block_n=128, block_k=64), capability=80, dtype=torch.int8).has("mma.sync.aligned.m16n8k32")


@pytest.mark.parametrize("bits", [8, 4])
def test_narrow_weights_are_widened_in_registers(bits):
    tiles = Tiles(block_m=64, block_n=128, block_k=128, stages=2)
    with compiled_for(90) as kernels:
        if bits == 8:
            weight, scale = meta(4096, 4096, dtype=torch.int8), meta(4096, dtype=torch.float32)
            weight_only.int8_matmul(meta(600, 4096), weight, scale, tiles=tiles)
        else:
            weight, scale = meta(4096, 2048, dtype=torch.uint8), meta(4096, 32, dtype=torch.float32)
            weight_only.int4_matmul(meta(600, 4096), weight, scale, tiles=tiles)
    loop = kernels[0].ptx.split(WGMMA)[1]
    assert "%r" in loop.split(";")[0].split("}")[1], "the first operand comes from registers"
    assert kernels[0].spills == 0 and fits(kernels[0], H200)


def operands(task: Product) -> tuple[ops.Rows, Stored]:
    K, N = task.inner, task.columns
    bias = meta(N) if task.bias else None
    if task.kind == "int4":
        groups = -(-K // 128)
        weight = Stored(kind="int4", values=meta(N, 64 * groups, dtype=torch.uint8), scale=meta(N, groups, dtype=torch.float32), bias=bias)
        return meta(ROWS, K), weight
    if task.kind == "dense":
        return meta(ROWS, K), Stored(kind="dense", values=meta(N, K), bias=bias)
    dtype = EIGHT_BITS.get(task.kind, torch.int8)
    weight = Stored(kind=task.kind, values=meta(N, K, dtype=dtype), scale=meta(N, dtype=torch.float32), bias=bias)
    rows = meta(ROWS, K) if task.kind == "int8" else ops.Quantized(meta(ROWS, K, dtype=dtype), meta(ROWS, 1, dtype=torch.float32))
    return rows, weight


@pytest.mark.slow
@pytest.mark.parametrize("machine,kind", [(machine, kind) for machine, kinds in KINDS.items() for kind in kinds])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['columns']}x{s['inner']}")
def test_everything_that_the_tuner_may_try_compiles_and_fits(shape, kind, machine):
    gpu = MACHINES[machine]
    task = Product(rows=ROWS, kind=kind, **shape, quantize=None if shape.get("parts") else EIGHT_BITS.get(kind))
    rows, weight = operands(task)
    for candidate in task.candidates(gpu)[1:]:
        with compiled_for(gpu.capability) as kernels:
            compute(task, candidate, rows, weight, ops.fused())
        multiply = kernels[0]
        assert fits(multiply, gpu), f"{candidate}: {multiply.shared} bytes of shared memory"
        assert multiply.has(WGMMA if gpu.capability == 90 else "mma.sync"), candidate
        assert multiply.spills <= 640, f"{candidate} spills {multiply.spills} bytes"


def test_a_product_that_does_not_fit_is_seen_by_these_tests():
    assert not fits(product(Tiles(**{**LARGE, "block_k": 128}, tma=True, stages=4)), H200)
    assert product(Tiles(**{**LARGE, "warps": 4}, tma=True, stages=2)).spills > 0
