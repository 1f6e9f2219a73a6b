"""The gate for less precise policies: how far their actions are from those of the same weights in float32. `vla-oft eval --gate` asks.

error = || actions - exact || / || exact ||, over all observations, normalised actions
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vla_oft.engine.compiled import CompiledPolicy
from vla_oft.engine.options import Precision
from vla_oft.policy import Policy
from vla_oft_client import Observation

LIMITS: dict[Precision, float] = {
    "fp32": 1e-5,
    "bf16": 0.01,
    "int8": 0.015,
    "int8-dynamic": 0.015,
    "fp8-llm": 0.05,
    "fp8": 0.05,
    "int4": 0.12,
}
"""Largest error that passes: about three times that of the shipped base policy, see benchmarks/precision.md. Policies with random weights
are many times more sensitive than trained ones and do not pass."""


def relative_error(actions: Tensor, exact: Tensor) -> float:
    """Of tensors of one shape, in the Euclidean norm. NaN when either is not finite."""
    difference, size = (actions.double() - exact.double()).norm(), exact.double().norm()
    return (difference / size).item()


def action_error(compiled: CompiledPolicy, policy: Policy, observations: Sequence[Observation]) -> float:
    """`relative_error` of a compiled policy against the policy itself, one observation at a time. policy: in float32, on any device."""
    if policy.dtype != torch.float32:
        raise ValueError(f"the policy is in {policy.dtype}: load it with dtype=torch.float32, which is what others are measured against")
    c = policy.config
    noise = torch.randn(c.chunk_len, c.robot.action_dim, generator=torch.Generator().manual_seed(0))
    answers = [compiled.predict([o], noise) for o in observations]
    with torch.inference_mode():
        exact = [policy.predict(policy.prepare([o]), noise=noise[None].to(policy.device)).cpu() for o in observations]
    return relative_error(torch.cat(answers), torch.cat(exact))


def check_accuracy(compiled: CompiledPolicy, policy: Policy, observations: Sequence[Observation], limit: float | None = None) -> float:
    """`action_error`, which must stay within `limit`, by default that of the precision in `LIMITS`. Raises ValueError otherwise."""
    error = action_error(compiled, policy, observations)
    allowed = LIMITS[compiled.precision] if limit is None else limit
    if not error <= allowed:  # NaN is refused too
        raise ValueError(
            f"precision={compiled.precision!r}: actions are {error:.1e} from those in float32 (relative, {len(observations)} cases), "
            f"more than {allowed:.1e}: choose a more precise one"
        )
    return error
