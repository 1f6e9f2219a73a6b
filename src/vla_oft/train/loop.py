"""The training loop: reads top to bottom, saves and resumes exactly."""

import dataclasses
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vla_oft import __version__, hub
from vla_oft.atomic import replace_file, require_empty
from vla_oft.config import from_dict, to_dict
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.heads.base import Metrics
from vla_oft.merge import load_unmerged
from vla_oft.policy import Batch, Policy, checkpoint_folder
from vla_oft.train import checkpoint, lora, setup
from vla_oft.train.config import Pretrained, TrainConfig
from vla_oft.train.ema import Ema
from vla_oft.train.precision import faster_precision
from vla_oft.train.tracking import Tracker


def train(config: TrainConfig, out: Path, *, resume: bool = False, device: str = "cpu") -> Path:
    """Run (or continue) training in folder `out`; returns the last checkpoint.

    Raises ValueError before any work for data that does not fit, for an `out` that is not empty without `resume`, and for a resumed run
    whose configuration has changed; FloatingPointError when the loss stops being finite (the last good checkpoint stays).
    """
    config = check(config, out, resume=resume, device=device)
    sources = setup.open_datasets(config)
    state = checkpoint.load_trainer(out) if resume else None
    datasets = setup.dataset_facts(config, sources)
    if state is None:
        policy = setup.build_policy(config, sources)
    else:
        policy = load_unmerged(checkpoint_folder(out), config.lora.dtype) if config.lora else Policy.load(out, dtype=torch.float32)
        checkpoint.same_data(out, datasets)
    if config.lora:
        lora.inject(policy, config.lora, config.seed)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "train.json", json.dumps(to_dict(config), indent=2) + "\n")
    dataset = setup.build_dataset(config, policy, sources)
    setup.report_constant_dims(policy)
    policy.to(device).train()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = config.optimizer.build(policy, config.lr)
    ema = Ema(policy, config.ema_decay) if config.ema_decay is not None else None
    facts = _facts(config, datasets)
    if state is not None:
        checkpoint.restore(state, policy, ema, optimizer)
    step = state["step"] if state else 0
    tracker = Tracker(
        out / "metrics.jsonl",
        log_every=config.log_every,
        total_steps=config.total_steps,
        batch_size=config.batch_size * config.accumulate,
        start_step=step,
    )
    _announce(config, policy, dataset, step)

    waiting_since = time.monotonic()
    for phase, loader, batches in _steps(config, dataset, setup.Collate(policy, config.augment), step, state):
        passes, wait_s = [], 0.0
        for batch in batches:
            batch = _to_device(batch, device)
            wait_s += time.monotonic() - waiting_since
            passes.append(backward(policy, batch, share=1 / config.accumulate, bf16=config.precision == "bf16"))
            waiting_since = time.monotonic()
        metrics = mean_metrics(passes)
        lr = config.lr * config.schedule.factor(step, config.total_steps)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
        optimizer.step(lr)
        if ema:
            ema.update()
        step += 1
        saving = step % config.save_every == 0 or step == config.total_steps
        if (saving or step % config.log_every == 0) and not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"loss {metrics['loss'].item()}, gradient norm {grad_norm.item()} at step {step}: not finite; "
                f"the last good checkpoint is {out}/checkpoints/last; lower lr={config.lr}"
            )
        tracker.add(step, {**metrics, "grad_norm": grad_norm}, lr, wait_s)
        if saving:
            trainer = checkpoint.trainer_state(step, phase, loader.state_dict(), optimizer, policy, ema)
            checkpoint.save(out, policy, ema, trainer, {**facts, "step": step}, config.keep_last)
        waiting_since = time.monotonic()
    return (out / "checkpoints" / "last").resolve()


def backward(policy: Policy, batch: Batch, *, share: float = 1.0, bf16: bool = False) -> Metrics:
    """Add `share` of the gradients of one batch's loss to those that are there; its loss and metrics, detached."""
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=bf16):
        loss, metrics = policy(batch)
    (loss * share).backward()
    return {"loss": loss.detach(), **metrics}


def mean_metrics(passes: Sequence[Metrics]) -> Metrics:
    """Each metric's mean over the passes of one step that know it; NaN where none does."""
    names = dict.fromkeys(name for metrics in passes for name in metrics)
    return {name: torch.stack([metrics[name].float() for metrics in passes if name in metrics]).nanmean() for name in names}


def _steps(
    config: TrainConfig, dataset: ChunkDataset, collate: setup.Collate, step: int, state: dict[str, Any] | None
) -> Iterator[tuple[int, BatchLoader[Batch], Iterator[Batch]]]:
    """All remaining steps, phase by phase, each with its phase, the loader whose position it advances, and its batches."""
    loader_state = state["loader"] if state else None
    for phase in range(state["phase"] if state else 0, len(config.phases)):
        weights = [float(w) for w in config.phases[phase].mixture]
        order = MixtureOrder(dataset.sizes, seed=config.seed + 7919 * phase, weights=weights)
        loader = BatchLoader(dataset, order, config.batch_size, collate, num_workers=config.num_workers)
        if loader_state is not None:
            loader.load_state_dict(loader_state)
            loader_state = None
        end = sum(p.steps for p in config.phases[: phase + 1])
        batches = iter(loader)
        for _ in range(end - step):
            yield phase, loader, itertools.islice(batches, config.accumulate)
        step = end


def check(config: TrainConfig, out: Path, *, resume: bool, device: str) -> TrainConfig:
    """Everything that can be refused before any data is read or recorded; returns the configuration with its precision decided."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but this torch ({torch.__version__}) finds no CUDA GPU; use --device cpu")
    if isinstance(config.model, Pretrained):
        checkpoint_folder(hub.resolve(config.model.path))
    config.robot_spec()
    if config.precision == "auto":
        config = dataclasses.replace(config, precision=_decide_precision(config, out, resume, device))
    if config.lora:
        config.lora.check(config.precision)
    _check_folder(config, out, resume)
    return config


def _decide_precision(config: TrainConfig, out: Path, resume: bool, device: str) -> Literal["fp32", "bf16"]:
    """A resumed run keeps what it began with: on a busy machine the measurement can come out either way."""
    if config.lora is not None and config.lora.base_dtype == "bfloat16":
        return "bf16"
    before = json.loads((out / "train.json").read_text()).get("precision") if resume and (out / "train.json").is_file() else None
    return before if before in ("fp32", "bf16") else faster_precision(device)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    saved = out / "train.json"
    if not (resume and saved.is_file()):
        require_empty(out)
        if resume:
            print(f"note: there is nothing to resume in {out}; starting from the beginning")
        return
    before = from_dict(TrainConfig, json.loads(saved.read_text()), str(saved))  # fields that are new since then get their defaults
    changed = _changed_fields(*(to_dict(_without_cache_dirs(c)) for c in (before, config)))
    if changed:
        raise ValueError(f"cannot resume {out}: the configuration has changed in {', '.join(changed)}; use the same one, or another folder")


def _without_cache_dirs(config: TrainConfig) -> TrainConfig:
    """Where caches lie changes nothing."""
    datasets = [dataclasses.replace(d, read=dataclasses.replace(d.read, cache_dir=None)) for d in config.datasets]
    return dataclasses.replace(config, datasets=tuple(datasets))


def _changed_fields(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    ignored = {"log_every", "save_every", "keep_last", "num_workers", "frame_cache"}
    changed = [k for k in sorted(before.keys() | after.keys()) if k not in ignored and before.get(k) != after.get(k)]
    return [f"{k} ({before.get(k)!r} then, {after.get(k)!r} now)" for k in changed]


def _to_device(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    present = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None}
    return dataclasses.replace(batch, **{name: tensor.to(device, non_blocking=True) for name, tensor in present.items()})


def _facts(config: TrainConfig, datasets: list[dict[str, Any]]) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "numpy", "tokenizers", "safetensors", *(["peft"] if config.lora else []))}
    return {
        "name": config.name,
        "command": " ".join(["vla-oft", *sys.argv[1:]]),
        "versions": {"vla-oft": __version__, "python": platform.python_version(), **packages},
        "datasets": datasets,
        "train": to_dict(config),
    }


def _announce(config: TrainConfig, policy: nn.Module, dataset: ChunkDataset, step: int) -> None:
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    print(
        f"{config.name}: {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters trained on {len(dataset):,} frames, "
        f"steps {step} to {config.total_steps:,}, batch {config.batch_size}, {config.precision}"
    )
