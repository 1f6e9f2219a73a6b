"""How long the policy took to answer, as the caller saw it: observations in, chunks of actions out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Query:
    """One call of `act`: how many observations it answered, and in how many milliseconds."""

    batch: int
    ms: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Percentiles over queries, in milliseconds for the WHOLE batch.

    first_ms: the first query, which pays for allocation and compilation; kept out of the percentiles when there are others.
    """

    queries: int
    mean_batch: float
    max_batch: int
    first_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    total_s: float


def summarize(queries: Sequence[Query]) -> Latency | None:
    """None when nothing was asked."""
    if not queries:
        return None
    times = np.array([q.ms for q in queries])
    p50, p95, p99 = np.percentile(times[1:] if len(times) > 1 else times, [50, 95, 99])
    return Latency(
        queries=len(queries),
        mean_batch=float(np.mean([q.batch for q in queries])),
        max_batch=max(q.batch for q in queries),
        first_ms=float(times[0]),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        total_s=float(times.sum() / 1000),
    )
