"""How fast and in how much memory a policy trains: `vla-oft bench train`. Random weights, random batches from the host, the real step.

    samples/s     of all steps after the warm-up, from uint8 images on the host to updated weights
    TFLOP/s       operations that the step cannot do without (no recomputation counted), times samples/s
    MFU           the same over what the device reaches in large products of bfloat16, or of the numbers that it computes in
    peak          of memory handed out, from before the weights are loaded

On a CPU the step that is usually written (`bench.plain`) is timed in the same run.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_oft.atomic import replace_file
from vla_oft.bench import ceilings, timing, workloads
from vla_oft.bench.environment import environment
from vla_oft.bench.plain import PlainLoop
from vla_oft.bench.report import Table, markdown, percent, print_table, show
from vla_oft.bench.rows import choose_device, free, note
from vla_oft.bench.workloads import Workload
from vla_oft.data.augment import AugmentConfig
from vla_oft.policy import Policy
from vla_oft.train import assemble
from vla_oft.train.batches import Examples, Finish, to_device
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.guard import Guard, StepGuard
from vla_oft.train.lora import Lora
from vla_oft.train.parallel import Ranks
from vla_oft.train.precision import faster_precision
from vla_oft.train.schedule import Cosine
from vla_oft.train.step import Stepper
from vla_oft.weights import LazyTensor

Tuning = Literal["lora", "qlora", "full", "heads"]
Recompute = Literal["none", "selective", "full"]
BATCHES = 4
"""Different batches, in rotation."""
FROZEN: tuple[Literal["vision", "projector", "language"], ...] = ("vision", "projector", "language")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row. tuning: what trains. plain: the step as it is usually written."""

    workload: str
    tuning: Tuning = "lora"
    batch: int = 8
    recompute: Recompute = "none"
    compile: bool = False
    plain: bool = False

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.workload, self.tuning, f"batch {self.batch}"]
        parts += [f"recompute {self.recompute}"] * (self.recompute != "none") + ["compiled"] * self.compile + ["plain loop"] * self.plain
        return ", ".join(parts)


ON_GPU = (
    Setting(workload="B", batch=1),
    Setting(workload="B", batch=1, recompute="full"),
    Setting(workload="B", compile=True),
    Setting(workload="B"),
    Setting(workload="B", compile=True, recompute="selective"),
    Setting(workload="B", compile=True, recompute="full"),
    Setting(workload="B", compile=True, batch=16),
    Setting(workload="B", tuning="qlora", batch=1, recompute="full"),
    Setting(workload="B", tuning="qlora", recompute="full"),
    Setting(workload="B", tuning="full", recompute="selective", compile=True),
    Setting(workload="A", compile=True),
    Setting(workload="C", compile=True, recompute="selective"),
    Setting(workload="B", plain=True),
)
ON_CPU = (
    Setting(workload="nano", tuning="full", batch=32),
    Setting(workload="nano", tuning="full", batch=32, plain=True),
    Setting(workload="cpu", batch=2),
    Setting(workload="cpu", batch=2, recompute="full"),
    Setting(workload="cpu", batch=2, plain=True),
)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to measure. settings: rows; those of the device by default. steps: timed, after `warmup`; fewer when `budget_s` is over."""

    settings: tuple[Setting, ...] | None = None
    steps: int = 20
    warmup: int = 5
    budget_s: float = 30.0
    device: str | None = None
    out: Path | None = None
    name: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1 or self.budget_s <= 0:
            raise ValueError("steps, warmup and budget_s must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One setting, measured. tflop: of one sample, forward and backward, without recomputation. failure: instead of numbers."""

    setting: Setting
    samples_per_s: float | None = None
    step_ms: float | None = None
    tflop: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    first_step_s: float | None = None
    steps: int = 0
    step_times_ms: list[float] = field(default_factory=list)
    failure: str | None = None


def settings(
    names: Sequence[str] | None, tunings: Sequence[str], batches: Sequence[int], recomputes: Sequence[str], *, compile: bool, plain: bool
) -> tuple[Setting, ...] | None:
    """Every combination; None, which is the device's own set, without names of workloads. Raises ValueError for what there is not."""
    if names is None:
        return None
    for what, chosen, known in (("tuning", tunings, get_args(Tuning)), ("recompute", recomputes, get_args(Recompute))):
        for value in chosen:
            if value not in known:
                raise ValueError(f"{what}={value!r} is unknown; known: {', '.join(known)}")
    for name in names:
        workloads.load(name)
    if any(batch < 1 for batch in batches):
        raise ValueError(f"batch={tuple(batches)} must be positive")
    made = [
        Setting(workload=name, tuning=cast(Tuning, tuning), batch=batch, recompute=cast(Recompute, recompute), compile=compile)
        for name, tuning, batch, recompute in itertools.product(names, tunings, batches, recomputes)
    ]
    return (*made, *(dataclasses.replace(m, compile=False, recompute="none", plain=True) for m in made if plain))


def run(request: TrainRequest, quiet: bool = False) -> dict[str, Any]:
    """Measure, print a table unless `quiet`, write files if `request.out`; the document has `rows`, `request`, `environment`."""
    device = choose_device(request.device)
    settings = request.settings or (ON_GPU if device.type == "cuda" else ON_CPU)
    rows = [_row(setting, request, device) for setting in settings]
    facts = environment(device)
    document = {
        "benchmark": "train",
        "rows": [dataclasses.asdict(row) | {"name": row.setting.name} for row in rows],
        "request": {"steps": request.steps, "warmup": request.warmup, "seed": request.seed, "device": device.type},
        "environment": facts,
        "failures": sum(row.failure is not None for row in rows),
    }
    table = _table(rows, device, facts)
    if not quiet:
        print_table(table)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        stem = f"{request.name}-{device.type}"
        replace_file(request.out / f"{stem}.json", json.dumps(document, indent=1) + "\n")
        replace_file(request.out / f"{stem}.md", markdown(table))
    return document


def config_of(setting: Setting, device: torch.device) -> TrainConfig:
    """The training configuration that a setting stands for; its data is never read."""
    workload = workloads.load(setting.workload)
    gpu, adapted = device.type == "cuda", setting.tuning in ("lora", "qlora")
    precision = _precision(device.type)
    base: Literal["nf4", "bfloat16", "float32"] = "nf4" if setting.tuning == "qlora" else "bfloat16" if gpu else "float32"
    return TrainConfig(
        name="bench",
        robot=workload.config.robot.name,
        model=Pretrained(path="random"),
        datasets=(Dataset(name="random", path="random"),),
        phases=(Phase(steps=1, mixture=(1.0,)),),
        batch_size=setting.batch,
        lr=5e-4,
        schedule=Cosine(),
        lora=Lora(rank=32, base_dtype=base, targets="reference" if setting.plain else "default") if adapted else None,
        freeze=FROZEN if setting.tuning == "heads" else (),
        precision="bf16" if setting.tuning == "qlora" else precision,
        weights="bfloat16+master" if gpu and not setting.plain else "float32",
        recompute=setting.recompute,
        compile=setting.compile,
        augment=AugmentConfig(crop_area=workload.config.preprocess.crop_area),
    )


_precision = functools.cache(faster_precision)
"""Of all rows of a process: measured once, or a busy moment would set one row back."""


def _row(setting: Setting, request: TrainRequest, device: torch.device) -> TrainRow:
    try:
        row = _measured(setting, request, device)
    except (RuntimeError, ValueError, ImportError) as error:  # out of memory is a RuntimeError
        row = TrainRow(setting=setting, failure=(str(error).strip() or type(error).__name__).splitlines()[0][:200])
        note(f"{setting.name}: {row.failure}")
    free(device)
    return row


def _measured(setting: Setting, request: TrainRequest, device: torch.device) -> TrainRow:
    timing.reset_peak(device)
    workload, config, ranks = workloads.load(setting.workload), config_of(setting, device), Ranks(device=device)
    batches = [examples(workload, setting.batch, seed=request.seed + i) for i in range(BATCHES)]
    trainee = assemble.assemble(assemble.prepare(random_blueprint(workload, device, unread=setting.plain), config), config, ranks)
    learn = _loop(trainee, config, ranks, plain=setting.plain)
    start = time.perf_counter()
    learn(batches[0])
    timing.synchronize(device)
    first_s = time.perf_counter() - start
    for number in range(1, request.warmup):
        learn(batches[number % BATCHES])
    times = _timed(learn, batches, request, device)
    peak = timing.peak(device)
    step_s = float(np.sum(times)) / len(times)
    tflop = training_flops(workload, config) / 1e12
    rates = ceilings.measure_ceilings(device, (4096, 4096, 4096) if device.type == "cuda" else (512, 160, 448))
    rate = rates.flops.get(config.precision)
    row = TrainRow(
        setting=setting,
        samples_per_s=setting.batch / step_s,
        step_ms=1e3 * step_s,
        tflop=tflop,
        tflops=tflop * setting.batch / step_s,
        mfu=None if rate is None else tflop * 1e12 * setting.batch / step_s / rate,
        peak_gb=None if peak is None else peak / 1e9,
        first_step_s=first_s,
        steps=len(times),
        step_times_ms=[round(1e3 * t, 3) for t in times],
    )
    note(f"{setting.name}: {row.samples_per_s:.2f} samples/s, peak {show(row.peak_gb)} GB")
    return row


def _loop(trainee: assemble.Trainee, config: TrainConfig, ranks: Ranks, *, plain: bool) -> Callable[[Examples], Any]:
    """What makes one step of a batch."""
    if plain:
        return PlainLoop(trainee.policy, config.lr, config.augment, bf16=trainee.autocast)
    optimizer = config.optimizer.build(trainee.policy, config.lr, masters=config.weights == "bfloat16+master")
    guard, finish = StepGuard(Guard(), ranks.device), Finish(trainee.policy, config.augment)
    stepper = Stepper(trainee, optimizer, guard, None, finish, ranks, config.clip_norm)
    return lambda given: stepper([given], [given.num_valid], given.num_valid, config.lr)


def _timed(learn: Callable[[Examples], Any], batches: Sequence[Examples], request: TrainRequest, device: torch.device) -> list[float]:
    """Seconds of each step. A GPU is only waited for at the end: its steps are equal parts of the whole time."""
    timing.synchronize(device)
    begun, times = time.perf_counter(), []
    for number in range(request.steps):
        start = time.perf_counter()
        learn(batches[number % len(batches)])
        times.append(time.perf_counter() - start)
        if device.type == "cuda" and number % 8 == 7:
            timing.synchronize(device)
        if time.perf_counter() - begun > request.budget_s:
            break
    timing.synchronize(device)
    whole = time.perf_counter() - begun
    return times if device.type == "cpu" else [whole / len(times)] * len(times)


def random_blueprint(workload: Workload, device: torch.device, *, unread: bool = False) -> Blueprint:
    """A policy of the workload's shape, with weights that are drawn on the device when loaded. unread: also what nothing reads."""
    vlm = workload.config.vlm
    if unread:
        vlm = dataclasses.replace(
            vlm, dino=dataclasses.replace(vlm.dino, unread_weights=True), siglip=dataclasses.replace(vlm.siglip, unread_weights=True)
        )
    with torch.device("meta"):
        policy = Policy(dataclasses.replace(workload.config, vlm=vlm), workload.statistics(), workload.tokenizer())
    return Blueprint(policy, {name: _random(tuple(p.shape), device) for name, p in policy.named_parameters()})


def _random(shape: tuple[int, ...], device: torch.device) -> LazyTensor:
    """Matrices of unit gain, so that activations neither vanish nor overflow; vectors of ones: norms and gains."""
    scale = shape[-1] ** -0.5 if len(shape) == 2 else (shape[1] * shape[2] * shape[3]) ** -0.5 if len(shape) == 4 else 0.02
    draw = (lambda: torch.ones(shape, device=device)) if len(shape) == 1 else (lambda: torch.randn(shape, device=device) * scale)
    return LazyTensor(shape, torch.float32, draw)


def examples(workload: Workload, batch: int, seed: int) -> Examples:
    """A batch of smooth random images and of random actions, as the loader would hand it over, on the host."""
    config, rng = workload.config, np.random.default_rng(seed)
    size = config.preprocess.image_size
    seen = workloads.observations(config.robot, workload.instruction, (size, size), min(batch, 4), seed)
    images = np.stack([np.stack([seen[i % len(seen)].images[camera] for camera in config.robot.cameras]) for i in range(batch)])
    with torch.device("meta"):
        encode = Policy(config, workload.statistics(), workload.tokenizer()).encode_prompts
    ids, _ = encode([workload.instruction] * batch)
    shape = (batch, config.chunk_len, config.robot.action_dim)
    return Examples(
        images=torch.from_numpy(images),
        prompt_ids=torch.from_numpy(ids),
        prompt_mask=None,
        state=torch.from_numpy(rng.uniform(-1, 1, (batch, config.robot.state_dim)).astype(np.float32)) if config.use_state else None,
        actions=torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)),
        valid=torch.ones(shape[:2], dtype=torch.bool),
        grounding=None,
        landmarks=None,
        seeds=rng.integers(0, 2**63, batch, np.uint64),
    )


def training_flops(workload: Workload, config: TrainConfig) -> float:
    """Operations of one sample, forward and backward, counted on the meta device: what trains decides how much the backward pass is."""
    plain = dataclasses.replace(config, compile=False, recompute="none")
    if plain.lora:
        plain = dataclasses.replace(plain, lora=dataclasses.replace(plain.lora, targets="default", base_dtype="bfloat16"))
    blueprint = assemble.prepare(random_blueprint(workload, torch.device("meta")), plain)
    policy = blueprint.policy.train()
    dtype = next(p.dtype for p in policy.parameters() if p.requires_grad)
    for parameter in policy.parameters():  # one type for all: operations are the same, and nothing needs autocast
        parameter.data = parameter.data.to(dtype)
    size, cameras = workload.config.preprocess.image_size, workload.config.num_cameras
    given = to_device(examples(workload, 1, 0), torch.device("meta"))
    batch = given.seen(torch.empty(1, cameras, 6, size, size, device="meta"))
    with FlopCounterMode(display=False) as counter:
        policy(batch)[0].backward()
    return float(counter.get_total_flops())


def _table(rows: list[TrainRow], device: torch.device, facts: dict[str, Any]) -> Table:
    return Table(
        title=f"Training steps on {facts.get('gpu') or facts.get('cpu', device.type)}",
        columns=("workload, what trains", "samples/s", "ms a step", "TFLOP a sample", "TFLOP/s", "MFU", "peak GB", "steps", "first step s"),
        rows=[
            (
                row.setting.name,
                show(row.samples_per_s) if row.failure is None else row.failure,
                show(row.step_ms),
                show(row.tflop),
                show(row.tflops),
                percent(row.mfu),
                show(row.peak_gb),
                str(row.steps),
                show(row.first_step_s),
            )
            for row in rows
        ],
        notes=[
            f"computed in {_precision(device.type)}",
            "random weights, random batches that travel from the host in every step, augmentation and normalisation included",
            "TFLOP a sample: forward and backward without recomputation; MFU: over the device's own rate for large products",
            f"peak: {'memory handed out by the allocator' if device.type == 'cuda' else 'of the process'}, loading included",
            ", ".join(f"{name} {facts[name]}" for name in ("torch", "python", "commit", "load_1min_at_start") if name in facts),
        ],
    )
