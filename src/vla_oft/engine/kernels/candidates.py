"""Which tiles are worth timing for a product: those that leave few multiprocessors idle in the last wave.

A product of few rows has few tiles, and all multiprocessors take equally long for one, so its time is the number of waves times the time
of a tile. With M = 600, N = K = 4096 on 132 multiprocessors:

    tile       tiles          waves   busy
    128 x 256  5 x 16 =  80   1       61 %
    128 x 128  5 x 32 = 160   2       61 %
    128 x 160  5 x 26 = 130   1       98 %     a tile of two accumulators, 128 + 32 columns

Large tiles read less shared memory for each multiplication, so the rate of a busy multiprocessor falls with the tile's size. `RATE` holds
estimates of it, relative to the peak; they only order the candidates, and the tuner measures the first of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vla_oft.engine.kernels.packing import GROUP
from vla_oft.engine.kernels.tiles import Tiles

RATE = {
    (128, 256, 0): 0.80,
    (256, 128, 0): 0.80,
    (128, 256, 64): 0.80,
    (128, 256, 32): 0.79,
    (128, 128, 64): 0.76,
    (128, 128, 32): 0.72,
    (128, 128, 0): 0.68,
    (64, 256, 0): 0.64,
    (128, 64, 32): 0.58,
    (64, 128, 64): 0.56,
    (64, 128, 0): 0.50,
    (128, 64, 0): 0.50,
    (64, 64, 0): 0.36,
}
"""(block_m, block_n, extra_n): estimated share of the peak that one multiprocessor reaches. Not measured."""
SPLITS = (1, 2, 3, 4, 6)
PEAK_FLOPS, MEMORY_BYTES_PER_S, CACHE_BYTES_PER_S = 990e12, 4.3e12, 5e12
"""Of an H200 in bf16 (datasheet), its memory (measured), and its L2 (guessed). Only their ratios matter here."""
SPECIALIZED = False
"""Whether tiles with specialised warps are tried. They compile, and answer right in the interpreter, but have not run on a GPU yet, and a
kernel that waits for itself for ever cannot be stopped from within the process that times it."""
GEOMETRIES, MAX_TILES = 5, 14


ROWS_STEP = 64


def usual_rows(rows: int) -> int:
    """What a number of rows (tokens) is tuned as: prompts of similar length then share what was measured, as they share the tiles."""
    return 16 if rows <= 16 else -(-rows // ROWS_STEP) * ROWS_STEP


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU. capability: 90 for sm_90; shared_bytes: the most shared memory that one program may have."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides about tiles. item_bytes: of an operand; gated: two accumulators of one shape; split: parts may be left to the norm."""

    rows: int
    columns: int
    inner: int
    item_bytes: int = 2
    gated: bool = False
    split: bool = False


def matmul_tiles(shape: Shape, machine: Machine) -> list[Tiles]:
    """For `gemm.matmul` and, with gated, `gemm.gated_matmul` (columns are those of one weight); the most promising first."""
    has_tma = machine.capability >= 90 and shape.inner * shape.item_bytes % 16 == 0
    geometries = [g for g in RATE if machine.capability >= 90 or g[1] + g[2] <= 256]
    if shape.gated:
        geometries = [g for g in geometries if g[0] * g[1] <= 128 * 128 and not g[2]]
    cuts = ((g, s) for g in geometries for s in (SPLITS if shape.split else (1,)) if s == 1 or shape.inner // s >= 512)
    ranked = sorted(cuts, key=lambda cut: estimated_seconds(shape, machine, *cut))[: GEOMETRIES if has_tma else MAX_TILES // 2]
    found = [variant for geometry, splits in ranked for variant in _variants(shape, machine, geometry, splits, has_tma)][:MAX_TILES]
    # One without the copy engine: should its descriptors fail on some machine, there is still something to compare torch with.
    return [*found[: MAX_TILES - 1], replace(found[0], tma=False)] if has_tma else found


def narrow_tiles(shape: Shape, machine: Machine, bits: int) -> list[Tiles]:
    """For the products of `weight_only` with weights of 8 or 4 bits: one accumulator, plain tiles."""
    block_k = 64 if bits == 8 else GROUP
    found = []
    cuts = (
        (g, s) for g in RATE if not g[2] and g[1] <= 256 for s in (SPLITS if shape.split else (1,)) if s == 1 or shape.inner // s >= 512
    )
    for (m, n, _), splits in sorted(cuts, key=lambda cut: estimated_seconds(shape, machine, *cut)):
        stages = _stages(block_k * (2 * m + n * bits // 8), machine, limit=3)
        if stages >= 2:
            warps = 8 if m * n > 64 * 128 else 4
            found.append(Tiles(block_m=m, block_n=n, block_k=block_k, splits=splits, stages=stages, warps=warps))
    return found[: MAX_TILES // 2]


def estimated_seconds(shape: Shape, machine: Machine, geometry: tuple[int, int, int], splits: int) -> float:
    """Waves times the time of a tile, plus the traffic of parts; at least the time to read the weight."""
    block_m, block_n, extra_n = geometry
    accumulators = 2 if shape.gated else 1
    width = block_n + extra_n
    tiles = -(-shape.rows // block_m) * -(-shape.columns // width) * splits
    waves = -(-tiles // machine.multiprocessors)
    rate = RATE[geometry if not shape.gated else (block_m, min(256, 2 * block_n), 0)]
    peak = PEAK_FLOPS / 132 * (2 / shape.item_bytes)
    products = waves * 2 * block_m * width * accumulators * (shape.inner / splits) / (peak * rate)
    parts = (splits > 1) * 8 * splits * shape.rows * shape.columns / CACHE_BYTES_PER_S
    return max(products, accumulators * shape.columns * shape.inner * shape.item_bytes / MEMORY_BYTES_PER_S) + parts


def _variants(shape: Shape, machine: Machine, geometry: tuple[int, int, int], splits: int, has_tma: bool) -> Iterator[Tiles]:
    """One geometry as a program for each tile, as a persistent one where there are several waves, and with specialised warps."""
    block_m, block_n, extra_n = geometry
    columns = block_n * (2 if shape.gated else 1) + extra_n
    block_k = (64 if machine.capability >= 90 else 32) * 2 // shape.item_bytes
    stage = (block_m + columns) * block_k * shape.item_bytes
    plain = Tiles(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        extra_n=extra_n,
        splits=splits,
        stages=_stages(stage, machine, limit=4),
        warps=8 if block_m * columns > 128 * 128 or (block_m == 128 and extra_n) else 4,
        tma=has_tma,
    )
    if plain.stages < 2:
        return
    yield plain
    if not has_tma:
        return
    # The next tile's first operands are loaded while a result is stored, so the buffers of both must fit: bytes of a result as compiled.
    result = block_m * block_n * (4 if splits > 1 else 2 if shape.gated else 1)
    persistent = replace(plain, programs=machine.multiprocessors, stages=_stages(stage, machine, limit=4, reserved=result))
    tiles = -(-shape.rows // block_m) * -(-shape.columns // plain.width) * splits
    if tiles > machine.multiprocessors and persistent.stages >= 2:
        yield persistent
    if SPECIALIZED and machine.capability == 90 and block_m >= 128 and not extra_n and not shape.gated and persistent.stages >= 2:
        yield replace(persistent, warps=4, specialized=True)


def _stages(stage_bytes: int, machine: Machine, limit: int, reserved: int = 0) -> int:
    """How many steps of operands fit into shared memory; 1 KB is left for barriers."""
    return min(limit, (machine.shared_bytes - reserved - 1024) // stage_bytes)
