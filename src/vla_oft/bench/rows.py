"""One row of a benchmark: the eager policy, or the engine at one precision, timed and checked against the float32 answers."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_oft import engine
from vla_oft.bench import cost, timing
from vla_oft.bench.ceilings import Ceilings
from vla_oft.heads import diffusion
from vla_oft.policy import Policy
from vla_oft_client import Observation

ACCURACY_BATCHES = 4
EAGER_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times in milliseconds; p50_ms, p95_ms, p99_ms: end to end (uint8 images in, robot actions out); model_*: on the device alone.

    ratio: model_p50_ms over floor_ms. error: of normalised actions against float32 with the same weights, ||difference|| / ||answer||.
    setup_s: compiling and capturing. actions_per_s: actions of all chunks of a batch over the end-to-end time. others: share of the CPUs
    that other processes used meanwhile. failure: instead of numbers.
    """

    name: str
    subject: str
    precision: str
    batch: int
    calls: int = 0
    model_p50_ms: float | None = None
    model_p95_ms: float | None = None
    model_p99_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    floor_ms: float | None = None
    ratio: float | None = None
    actions_per_s: float | None = None
    error: float | None = None
    peak_gb: float | None = None
    setup_s: float = 0.0
    others: float | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of one policy have in common.

    batches: different observations, as lists of the batch's size. noise: (K, D), where a diffusion policy starts. prompt_len: L with BOS.
    true: (some batches, B, K, D), what every row's answers to the first batches are compared with.
    """

    name: str
    policy: Policy
    batches: Sequence[list[Observation]]
    prompt_len: int
    device: torch.device
    ceilings: Ceilings
    plan: timing.Plan
    noise: Tensor | None
    true: Tensor

    @property
    def batch(self) -> int:
        """Observations per call."""
        return len(self.batches[0])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row and the times behind it."""

    row: Row
    times: timing.Times | None


def start_noise(policy: Policy) -> Tensor | None:
    """(K, D) standard normal for a diffusion policy; the others need none."""
    if not isinstance(policy.config.head, diffusion.Config):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(policy.config.chunk_len, policy.config.robot.action_dim, generator=generator)


def float32_answers(policy: Policy, batches: Sequence[list[Observation]], noise: Tensor | None) -> Tensor:
    """What the same weights answer in float32: (batches, B, K, D). The policy is cast up and back, which changes no bfloat16 number."""
    dtype, allowed = policy.dtype, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default: the patch embedding would be rounded to ten bits
    policy.float()
    try:
        return timing.answers(timing.Eager(policy), batches[:ACCURACY_BATCHES], noise)
    finally:
        policy.to(dtype)
        torch.backends.cudnn.allow_tf32 = allowed


def eager_row(setting: Setting) -> Measured:
    """The policy as it is."""
    return _measure(
        setting, "eager", EAGER_PRECISION.get(setting.policy.dtype, str(setting.policy.dtype)), lambda: timing.Eager(setting.policy)
    )


def engine_row(setting: Setting, precision: engine.Precision, options: engine.Options | None = None, name: str = "engine") -> Measured:
    """The engine. Whatever it raises becomes the row's `failure`: one precision that fails must not lose the others' times."""

    try:
        return _measure(setting, name, precision, lambda: compile_subject(setting, precision, options))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        note(f"{setting.name}, {name} {precision}: failed: {reason}")
        row = Row(name=setting.name, subject=name, precision=precision, batch=setting.batch, failure=reason)
        return Measured(row=row, times=None)
    finally:
        free(setting.device)


def compile_subject(setting: Setting, precision: engine.Precision, options: engine.Options | None = None) -> timing.Subject:
    """The engine for these cameras and this instruction."""
    first = setting.batches[0][0]
    return engine.compile_policy(
        setting.policy,
        precision=precision,
        device=setting.device,
        cameras={camera: first.images[camera].shape[:2] for camera in setting.policy.config.robot.cameras},
        instruction=first.instruction,
        options=options or engine.Options(),
    )


def _measure(setting: Setting, subject_name: str, precision: str, make: Callable[[], timing.Subject]) -> Measured:
    start = time.perf_counter()
    subject = make()
    timing.synchronize(setting.device)
    setup_s, config = round(time.perf_counter() - start, 3), setting.policy.config
    error = timing.relative_error(timing.answers(subject, setting.batches[: len(setting.true)], setting.noise), setting.true)
    times = timing.measure(subject, setting.batches, setting.noise, setting.plan, setting.device)
    floor = cost.floor_s(cost.stages(config, setting.prompt_len, setting.batch), setting.ceilings, precision)
    (m50, m95, m99), (e50, e95, e99) = timing.percentiles(times.model_ms), timing.percentiles(times.end_to_end_ms)
    row = Row(
        name=setting.name,
        subject=subject_name,
        precision=precision,
        batch=setting.batch,
        calls=len(times.end_to_end_ms),
        model_p50_ms=m50,
        model_p95_ms=m95,
        model_p99_ms=m99,
        p50_ms=e50,
        p95_ms=e95,
        p99_ms=e99,
        floor_ms=None if floor is None else 1000 * floor,
        ratio=None if floor is None else m50 / (1000 * floor),
        actions_per_s=setting.batch * config.chunk_len / e50 * 1000,
        error=error,
        peak_gb=None if times.peak_bytes is None else times.peak_bytes / 1e9,
        setup_s=setup_s,
        others=times.others,
    )
    summary = f"model {m50:.2f} ms, end to end {e50:.2f} ms, {row.calls} calls, set up in {setup_s:.1f} s"
    note(f"{setting.name}, {subject_name} {precision}: {summary}")
    return Measured(row=row, times=times)


def free(device: torch.device) -> None:
    """Return what the last subject held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def note(line: str) -> None:
    """Progress, on stderr: stdout belongs to the result."""
    print(line, file=sys.stderr, flush=True)


def choose_device(name: str | None) -> torch.device:
    """The GPU if there is one. Raises ValueError for a device that this machine or this torch does not have."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device='{name}' is not supported; choose cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device='{name}': no usable GPU here (none found, or a torch built for CPUs); choose --device cpu")
    return torch.device(name)
