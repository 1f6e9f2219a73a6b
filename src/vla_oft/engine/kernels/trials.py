"""Times candidates on the GPU: replays of a captured graph of several calls, each with other weights, so that none are in the cache.

In the model a layer's weights are read once in a pass, from memory; timing one product over and over would read them from L2. Inputs are
random numbers: a product of zeros runs faster than real ones (less power, higher clocks).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_oft.engine.kernels.attention import Attention, attend_with
from vla_oft.engine.kernels.candidates import Machine
from vla_oft.engine.kernels.packing import pack_int4
from vla_oft.engine.kernels.products import EIGHT_BITS, Candidate, Product, Stored, compute
from vla_oft.engine.ops import Ops, Rows, quantize_rows

MIN_CALLS, WARM_REPLAYS, TIMED_REPLAYS = 20, 3, 15
CACHES_FULL, MAX_COPIES = 3, 64
"""Weights of one graph fill the L2 cache three times, with at most 64 copies."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """time_ms: of one call, with what must follow it; error: `distance` from the baseline's answer."""

    time_ms: float
    error: float


Run = Callable[[Candidate, int], Rows]
"""Computes a candidate with the i-th set of operands."""


def machine_of(device: torch.device) -> Machine:
    """What the tuner needs to know about a CUDA device."""
    p = torch.cuda.get_device_properties(device)
    shared = p.shared_memory_per_block_optin
    return Machine(name=p.name, capability=10 * p.major + p.minor, multiprocessors=p.multi_processor_count, shared_bytes=shared)


def bench(
    task: Product | Attention,
    device: torch.device,
    ops: Ops,
    cache_bytes: int,
    timer: "Callable[[Run, Candidate, int], float] | None" = None,
) -> Callable[[Candidate], Trial]:
    """Prepare operands; the result compiles, checks and times one candidate. It raises whatever the candidate raises.

    cache_bytes: size of the L2 cache. timer: time in ms of one call, given how to run, what, and the number of operand sets.
    """
    timer = timer or graph_time_ms
    run, answer, copies = _product(task, device, ops, cache_bytes) if isinstance(task, Product) else _attention(task, device)
    reference = answer(run(Candidate(way="torch"), 0))

    def trial(candidate: Candidate) -> Trial:
        torch.full_like(reference, torch.nan)  # freed at once: what the candidate fails to write stays NaN, not an earlier right answer
        found = answer(run(candidate, 0))
        return Trial(time_ms=timer(run, candidate, copies), error=distance(found, reference))

    return trial


def distance(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference in the worst row or column, relative to the average norm of such: one wrong value is enough to be seen."""
    found, reference = found.flatten(0, -2), reference.flatten(0, -2)
    errors = [((found - reference).norm(dim=i) / reference.norm(dim=i).mean()).max() for i in (0, 1)]
    return torch.stack(errors).max().item()


def graph_time_ms(run: Run, candidate: Candidate, copies: int) -> float:
    """Median time of one call, by replays of a CUDA graph."""
    calls = -(-MIN_CALLS // copies) * copies
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(candidate, i % copies)
    for _ in range(WARM_REPLAYS):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(TIMED_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def _product(task: Product, device: torch.device, ops: Ops, cache_bytes: int) -> tuple[Run, Callable[[Rows], Tensor], int]:
    generator = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    bytes_each = task.columns * task.inner * (1 if task.kind in EIGHT_BITS else 2)
    copies = min(MAX_COPIES, max(2, -(-CACHES_FULL * cache_bytes // bytes_each)))
    weights = [stored(task, random(task.columns, task.inner) * task.inner**-0.5) for _ in range(copies)]
    rows = random(task.rows, task.inner).to(task.dtype)
    x: Rows = quantize_rows(rows, EIGHT_BITS[task.kind]) if task.kind in EIGHT_BITS else rows
    residual, norm = random(task.rows, task.columns).to(task.dtype), torch.ones(task.columns, dtype=task.dtype, device=device)

    def run(candidate: Candidate, i: int) -> Rows:
        out = compute(task, candidate, x, weights[i], ops)
        return ops.add_rms_norm(residual, out, norm, 1e-6, None)[0] if task.parts else out  # whoever splits pays for the sum

    def answer(out: Rows) -> Tensor:
        out = out.float() if isinstance(out, Tensor) else out.values.float() * out.scale
        return out - residual.float() if task.parts else out

    return run, answer, copies


def stored(task: Product, weight: Tensor) -> Stored:
    """A weight (columns, inner) in the form that the task's kind has, with a random-looking bias if it has one."""
    bias = weight[:, 0].to(task.dtype) if task.bias else None
    if task.kind == "dense":
        return Stored(kind="dense", values=weight.to(task.dtype), bias=bias)
    if task.kind == "int4":
        values, scale = pack_int4(weight)
        return Stored(kind="int4", values=values, scale=scale, bias=bias)
    values, scale = quantize_rows(weight, EIGHT_BITS.get(task.kind, torch.int8))
    return Stored(kind=task.kind, values=values, scale=scale[:, 0], bias=bias)


def _attention(task: Attention, device: torch.device) -> tuple[Run, Callable[[Rows], Tensor], int]:
    generator = torch.Generator(device).manual_seed(0)

    def heads(rows: int, count: int) -> Tensor:
        """(batch, count, rows, head_dim), lying in memory as a product leaves it: row by row."""
        shape = (task.batch, rows, count, task.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(task.dtype).transpose(1, 2)

    if task.rows == task.keys:  # parts of one product, or queries from one and keys and values from another
        q, k, v = heads(task.keys, task.heads + 2 * task.kv_heads).split([task.heads, task.kv_heads, task.kv_heads], dim=1)
    else:
        q, (k, v) = heads(task.rows, task.heads), heads(task.keys, 2 * task.kv_heads).chunk(2, dim=1)
    mask = torch.arange(task.keys, device=device).ge(task.keys // 8).expand(task.batch, 1, 1, -1) if task.masked else None

    def answer(out: Rows) -> Tensor:
        assert isinstance(out, Tensor)
        return out.float()

    return lambda candidate, i: attend_with(candidate.way, q, k, v, mask, task.causal), answer, 1
