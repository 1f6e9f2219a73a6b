"""What a training run will do, in words: `vla-oft show`."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from vla_oft.policy import PolicyConfig
from vla_oft.train import anatomy, plan
from vla_oft.train.config import Fresh, Pretrained, TrainConfig
from vla_oft.train.optimizer import AdamW

WIDTH, LEVELS = 48, " .:-=+*#"
_LABEL = 12


def lines(
    config: TrainConfig,
    policy: PolicyConfig,
    *,
    gpus: int,
    out: Path,
    start: str,
    missing: Mapping[str, str],
    assumed: bool = False,
    memory: Iterable[str] = (),
) -> list[str]:
    """The whole run. policy: see `anatomy.trained_policy`; assumed: its base is not here, its sizes are taken for granted.

    gpus: processes. start: what is typed after `vla-oft `. missing: folders that are not here, and how to get each. memory: what else is
    known of the memory that it needs.
    """
    parts = anatomy.parts(config, policy)
    blocks = {
        "model": _model(config, policy, assumed),
        "robot": _robot(config, policy),
        "learns": _learns(config, parts),
        "data": _data(config, missing),
        "batch": _batch(config, gpus),
        "rate": _rate(config),
        "computes": _computes(config, gpus),
        "checks": _checks(config),
        "writes": _writes(config, parts, out),
        "memory": list(memory),
        "missing": [f"{path}: {how}" for path, how in missing.items()],
        "start": _start(start, gpus),
    }
    return [f"{label if number == 0 else '':<{_LABEL}}{line}" for label, block in blocks.items() for number, line in enumerate(block)]


def _model(config: TrainConfig, policy: PolicyConfig, assumed: bool) -> list[str]:
    vlm, head, model = policy.vlm, policy.head, config.model
    kind = type(head).__module__.rpartition(".")[2]
    loss = f" with {loss} loss" if (loss := getattr(head, "loss", None)) and loss != kind else ""
    if isinstance(model, Pretrained):
        origin = f"fine-tunes {model.path}" + (" (not here yet: OpenVLA-7B is assumed)" if assumed else "")
        new = "a new head" if model.head is not None else "its head"
    else:
        origin, new = f"a new model of size {model.size}, random weights", "head"
    return [
        origin,
        f"{new} {kind}{loss}, FiLM {'on' if vlm.film else 'off'}, prompts '{policy.prompt_style}'",
        f"towers {vlm.dino.width} and {vlm.siglip.width} wide, {vlm.dino.image_size}-px images, decoder {vlm.llm.depth} x {vlm.llm.width}",
    ]


def _robot(config: TrainConfig, policy: PolicyConfig) -> list[str]:
    robot = policy.robot
    state = f" (state {policy.state_normalization})" if policy.use_state and policy.state_normalization else ""
    own = isinstance(config.model, Fresh) or config.model.statistics == "own"
    return [
        f"{robot.name}: cameras {', '.join(robot.cameras)}; {f'state {robot.state_dim}' if policy.use_state else 'no state'}; chunks of "
        f"{policy.chunk_len} x {robot.action_dim} actions, {policy.chunk_len / robot.control_hz:.2f} s at {robot.control_hz:g} Hz",
        f"{robot.normalization}{state} by the {'data' if own else 'base policy'}'s statistics; {_augmentation(config)}",
    ]


def _augmentation(config: TrainConfig) -> str:
    a = config.augment
    if a is None:
        return "images as they are"
    crop = f"random crops of {a.crop_area:.0%} of the area" if a.crop_area < 1 else "no crops"
    return f"{crop}, brightness {a.brightness:g}, contrast {a.contrast:g}, saturation {a.saturation:g}, hue {a.hue:g}"


def _learns(config: TrainConfig, parts: list[anatomy.Part]) -> list[str]:
    total, trained = sum(p.total for p in parts), sum(p.trained + p.adapter for p in parts)
    lora = config.lora
    how = "everything"
    if lora:
        extra = "".join(f", {name}" for name in ("rslora", "dora") if getattr(lora, name))
        how = f"LoRA of rank {lora.rank}, alpha {lora.scale:g}{extra}, on {lora.base_dtype} weights; new parts in full"
    elif config.freeze:
        how = "in full, what is not frozen"
    out = [f"{trained / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters: {how}"]
    for part in parts:
        state = f"LoRA {part.adapter / 1e6:,.1f} M" if part.adapter else "in full" if part.trained else "frozen"
        out.append(f"  {part.name:<16}{part.total / 1e6:>9,.1f} M   {state}")
    o = config.optimizer
    decay = f"weight decay {o.weight_decay:g}" + (" on all" if isinstance(o, AdamW) and o.decay == "all" else " on matrices")
    clip = f"gradients clipped at {config.clip_norm:g}" if config.clip_norm else "gradients as they are"
    average = f", weights averaged ({config.ema_decay:g})" if config.ema_decay else ""
    return [*out, f"{type(o).__name__}, betas {o.betas[0]:g} and {o.betas[1]:g}, {decay}; {clip}{average}"]


def _data(config: TrainConfig, missing: Mapping[str, str]) -> list[str]:
    out = []
    for number, dataset in enumerate(config.datasets):
        mixtures = [phase.mixture for phase in config.phases]
        shares = " then ".join(f"{m[number] / sum(m):.0%}" for m in mixtures) if len(config.datasets) > 1 else ""
        there = "not here" if dataset.path in missing else "here" if Path(dataset.path).exists() else "recorded or downloaded first"
        out.append(f"{dataset.path}{f' ({shares})' if shares else ''}: {there}")
    held = f"; {config.validation.share:.0%} of the episodes are held out" if config.validation else ""
    cache = {"none": "decoded when needed", "ram": "decoded once, kept in memory", "disk": "decoded once, kept on disk"}[config.frame_cache]
    workers = f"{config.num_workers} loader processes for each GPU" if config.num_workers else "one loader thread"
    return [*out, f"pictures {cache}, {workers}{held}"]


def _batch(config: TrainConfig, gpus: int) -> list[str]:
    out = []
    for processes in dict.fromkeys((gpus, 1)):
        try:
            b = plan.batches(config, processes)
        except ValueError as error:
            out.append(str(error))
            continue
        gpu, passes = f"{processes} GPU{'s' * (processes > 1)}", f"{b.passes} pass{'es' * (b.passes > 1)}"
        out.append(f"{config.batch_size} samples = {gpu} x {b.share}, in {passes} of {b.micro_batch}")
    phases = f" in {len(config.phases)} phases of {', '.join(f'{p.steps:,}' for p in config.phases)}" if len(config.phases) > 1 else ""
    return [*out, f"{config.total_steps:,} steps{phases}, {config.total_steps * config.batch_size:,} samples"]


def _rate(config: TrainConfig) -> list[str]:
    schedule, total = config.schedule, config.total_steps
    rates = plan.rates(config)
    factors = [schedule.factor(min(total - 1, round((column + 0.5) * total / WIDTH)), total) for column in range(WIDTH)]
    top = max(*factors, 1e-12)
    plot = "".join(LEVELS[max(1, math.ceil(f / top * (len(LEVELS) - 1)))] if f > 0 else LEVELS[0] for f in factors)
    late = [step for step in plan.falls(schedule) if step >= total]
    never = [f"  (never falls: step {late[0]:,} comes after the end)"] if late else []
    return [f"|{plot}|  {type(schedule).__name__}", *(f"step {step:>9,}  {rate:.3g}" for step, rate in rates), *never]


def _computes(config: TrainConfig, gpus: int) -> list[str]:
    precision = {"auto": "bfloat16 where it is faster", "bf16": "bfloat16", "fp32": "float32"}[config.precision]
    recompute = {"none": "kept", "selective": "kept in part", "full": "recomputed"}[config.recompute]
    parallel = config.parallel
    size = f", shards of {parallel.shard_size}" if parallel.shard_size else ""
    spread = f"; {parallel.strategy}{size} over {gpus} processes" if gpus > 1 else ""
    compiled = ", compiled block by block" if config.compile else ""
    return [f"in {precision}, trained weights in {config.weights}, activations {recompute}{compiled}{spread}"]


def _checks(config: TrainConfig) -> list[str]:
    out = []
    if config.validation:
        out.append(f"every {config.validation.every:,} steps on {config.validation.samples} held-out samples")
    if config.stop:
        s = config.stop
        below = f"is below {s.below:g} and " if s.below is not None else ""
        out.append(f"ends early when {s.metric} {below}has not fallen by {s.min_drop:.0%} for {s.patience_steps:,} steps")
    spike = f", or above {config.guard.spike:g} times the usual," if config.guard.spike else ""
    return [*out, f"skips steps whose gradient is not finite{spike} and gives up after {config.guard.stop_after} in a row"]


def _writes(config: TrainConfig, parts: list[anatomy.Part], out: Path) -> list[str]:
    disk = plan.disk(config, parts)
    kept = [f"the newest {config.keep_last}"]
    kept += [f"every {config.keep_every:,}th"] if config.keep_every else []
    kept += ["the best"] if config.keep_best else []
    sink = f"; also {type(config.sink).__name__}" if config.sink else ""
    return [
        f"{out}/metrics.jsonl every {config.log_every:,} steps{sink}",
        f"{out}/checkpoints every {config.save_every:,} steps; kept: {', '.join(kept)}; up to {plan.size(disk.total)}",
    ]


def _start(start: str, gpus: int) -> list[str]:
    out = [f"vla-oft {start}"]
    if gpus > 1:
        out.append(f"torchrun --nproc-per-node {gpus} -m vla_oft {start}")
    return [*out, f"vla-oft {start.replace('train', 'show', 1)} --json    (every field)"]
