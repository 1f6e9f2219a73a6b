"""The training loop: reads top to bottom, saves and resumes exactly."""

import dataclasses
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_oft import __version__
from vla_oft.atomic import replace_file, require_empty
from vla_oft.config import to_dict
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.policy import Batch
from vla_oft.train import checkpoint, setup
from vla_oft.train.config import TrainConfig
from vla_oft.train.ema import Ema
from vla_oft.train.tracking import Tracker


def train(config: TrainConfig, out: Path, *, resume: bool = False, device: str = "cpu") -> Path:
    """Run (or continue) training in folder `out`; returns the last checkpoint.

    Raises ValueError before any work for data that does not fit, for an `out` that is not empty without `resume`, and for a resumed run
    whose configuration has changed; FloatingPointError when the loss stops being finite (the last good checkpoint stays).
    """
    _check_folder(config, out, resume)
    sources = setup.open_datasets(config)
    policy = setup.build_policy(config, sources)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "train.json", json.dumps(to_dict(config), indent=2) + "\n")
    dataset = setup.build_dataset(config, policy, sources)
    policy.to(device).train()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = build_optimizer(config, policy)
    ema = Ema(policy, config.ema_decay) if config.ema_decay is not None else None
    facts = _facts(config, setup.dataset_facts(config, sources))

    step, phase, loader_state = 0, 0, None
    state = checkpoint.load_trainer(out) if resume else None
    if state is not None:
        step, phase, loader_state = state["step"], state["phase"], state["loader"]
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        policy.load_state_dict(state["weights"]) if ema else policy.load_state_dict(_saved_weights(out, step))
        if ema:
            ema.load_state_dict(state["ema"])
    tracker = Tracker(out / "metrics.jsonl", log_every=config.log_every, total_steps=config.total_steps, batch_size=config.batch_size, start_step=step)
    _announce(config, policy, dataset, step)

    collate = setup.Collate(policy, config.augment)
    ends = [sum(p.steps for p in config.phases[: i + 1]) for i in range(len(config.phases))]
    for phase in range(phase, len(config.phases)):
        loader = _phase_loader(config, dataset, phase, collate)
        if loader_state is not None:
            loader.load_state_dict(loader_state)
            loader_state = None
        batches = iter(loader)
        while step < ends[phase]:
            waiting = time.monotonic()
            batch = _to_device(next(batches), device)
            wait_s = time.monotonic() - waiting
            lr = config.lr * config.schedule.factor(step, config.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config.precision == "bf16"):
                loss, metrics = policy(batch)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update()
            step += 1
            tracker.add(step, {"loss": loss.detach(), **metrics, "grad_norm": grad_norm}, lr, wait_s)
            if step % config.log_every == 0 and not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}; the last good checkpoint is {out}/checkpoints/last; lower lr={config.lr}")
            if step % config.save_every == 0 or step == config.total_steps:
                trainer = {"step": step, "phase": phase, "loader": loader.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
                checkpoint.save(out, step, policy, ema, trainer, {**facts, "step": step}, config.keep_last)
        batches.close()
    return (out / "checkpoints" / "last").resolve()


def build_optimizer(config: TrainConfig, policy: nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only (not on norms, biases, embeddings of single tokens)."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    saved = out / "train.json"
    if not (resume and saved.is_file()):
        require_empty(out)
        return
    changed = _changed_fields(json.loads(saved.read_text()), json.loads(json.dumps(to_dict(config))))
    if changed:
        raise ValueError(f"cannot resume {out}: the configuration has changed in {', '.join(changed)}; use the same one, or another folder")


def _changed_fields(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    ignored = {"log_every", "save_every", "keep_last", "num_workers"}
    return [f"{k} ({before.get(k)!r} then, {after.get(k)!r} now)" for k in sorted(before.keys() | after.keys()) if k not in ignored and before.get(k) != after.get(k)]


def _phase_loader(config: TrainConfig, dataset: ChunkDataset, phase: int, collate: setup.Collate) -> BatchLoader[Batch]:
    weights = [float(w) for w in config.phases[phase].mixture]
    order = MixtureOrder(dataset.sizes, seed=config.seed + 7919 * phase, weights=weights)
    return BatchLoader(dataset, order, config.batch_size, collate, num_workers=config.num_workers)


def _saved_weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = out / "checkpoints" / f"step-{step:06d}"
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(str(file)).items()}


def _to_device(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{k: v if v is None else v.to(device, non_blocking=True) for k, v in moved.items()})


def _facts(config: TrainConfig, datasets: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": config.name,
        "command": " ".join(["vla-oft", *sys.argv[1:]]),
        "versions": {"vla-oft": __version__, "python": platform.python_version(), **{p: version(p) for p in ("torch", "numpy", "tokenizers", "safetensors")}},
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
