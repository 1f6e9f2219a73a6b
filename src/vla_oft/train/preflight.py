"""Everything that can be refused before a model is built or a picture decoded: a mistake costs seconds, not a night of GPU time.

    check(config, out, ...)         needs no data      settings, processes, base policy, folder, disk, compiler
    check_data(config, sources)     data are open      enough samples, demonstrations to learn from

What one field says about itself alone is refused by its own dataclass; whether a dataset fits the robot by `data/check.py`.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vla_oft.config import to_dict
from vla_oft.data.base import Source
from vla_oft.heads import diffusion
from vla_oft.policy import PolicyConfig, checkpoint_folder, load_config, some_dataset
from vla_oft.train import anatomy, plan
from vla_oft.train.config import Fresh, Pretrained, TrainConfig
from vla_oft.train.optimizer import Muon
from vla_oft.vlm import tokens
from vla_oft.weights import weight_files

BFLOAT16_STEP = 2.0**-8
"""Smallest relative change that bfloat16 holds."""


def check(config: TrainConfig, out: Path, *, world_size: int = 1, device: str = "cpu", resume: bool = False) -> list[str]:
    """Raise ValueError for the first thing that cannot work; returns warnings, one line each. Takes a second for a 7 B policy.

    config: with its precision decided. out: the run folder, which may be absent. world_size: number of processes.
    """
    check_processes(config, world_size)
    check_numbers(config)
    if config.compile:
        check_compiler(device)
    saved = _saved_policy(out) if resume else None
    policy = anatomy.trained_policy(config, saved or _base(config))
    if saved:
        check_architecture(config, saved)
    check_stop(config, policy)
    parts = anatomy.parts(config, policy)
    check_writable(out)
    check_disk(config, parts, out)
    return warnings(config, device)


def check_processes(config: TrainConfig, world_size: int) -> None:
    """Whether the batch can be shared, and the weights divided, by so many processes."""
    plan.batches(config, world_size)
    if config.parallel.strategy != "fsdp":
        return
    if world_size == 1:
        raise ValueError(
            "parallel.strategy='fsdp' divides weights among processes, and there is one: start it with `torchrun --nproc-per-node N -m "
            "vla_oft train ...`, or set parallel.strategy=ddp"
        )
    size = config.parallel.shard_size
    if size is not None and world_size % size:
        fits = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(f"parallel.shard_size={size} does not divide the {world_size} processes: use one of {fits}")


def check_numbers(config: TrainConfig) -> None:
    """Whether types of weights, arithmetic and optimizer go together."""
    if config.weights != "float32" and config.precision == "fp32":
        raise ValueError(f"weights='{config.weights}' needs precision='bf16', not 'fp32'; or keep weights='float32'")
    if config.weights == "bfloat16" and config.ema_decay is not None and 1 - config.ema_decay < BFLOAT16_STEP:
        raise ValueError(
            f"ema_decay={config.ema_decay} stands still with weights='bfloat16', which cannot hold changes of {1 - config.ema_decay:.1g}: "
            "use weights='float32', or ema_decay=null"
        )
    if config.lora and config.lora.dora:
        for wrong, why, fix in (
            (config.weights != "float32", f"weights='{config.weights}' rounds its row lengths by up to 0.4 %", "weights=float32"),
            (config.parallel.strategy == "fsdp", "FSDP gathers its row lengths in bfloat16", "parallel.strategy=ddp"),
            (config.compile, "every layer would become many graphs", "compile=false"),
        ):
            if wrong:
                raise ValueError(f"lora.dora=True does not go with it: {why}; set {fix}, or lora.dora=false")
    if isinstance(config.optimizer, Muon) and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' needs torch 2.9 or newer, this is {torch.__version__}; upgrade, or use adamw")


def check_stop(config: TrainConfig, policy: PolicyConfig) -> None:
    """Whether the metric that ends the run early is one that the run measures."""
    if config.stop is None:
        return
    metric = config.stop.metric
    if metric.startswith("validation_") and config.validation is None:
        raise ValueError(f"stop.metric='{metric}' is never measured: set validation, or stop.metric=action_l1")
    if metric.startswith("action_l1") and isinstance(policy.head, diffusion.Config):
        raise ValueError(
            f"stop.metric='{metric}' is not measured by the diffusion head, whose loss is that of noise: "
            "set validation and stop.metric=validation_action_l1, or stop=null"
        )


def check_compiler(device: str) -> None:
    """Whether `compile` finds what it compiles with."""
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        raise ValueError("compile=true needs triton on a GPU: pip install triton, or set compile=false")
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.startswith("cuda") else ("CXX", ("g++", "clang++"))
    candidates = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in candidates):
        raise ValueError(f"compile=true needs a compiler ({', '.join(candidates)}): install one (Debian: g++), or set compile=false")


def check_base(config: TrainConfig, model: Pretrained) -> PolicyConfig:
    """The policy that is fine-tuned, if it is whole and fits the robot."""
    base, spec = anatomy.base_config(model), config.robot_spec()
    folder = checkpoint_folder(anatomy.hub.resolve(model.path))
    weight_files(folder)
    tokens.load_tokenizer(folder)
    if model.statistics == "own":
        return base
    for what in ("action_dim", "action_kind", "normalization"):
        there, here = getattr(base.robot, what), getattr(spec, what)
        if there != here:
            raise ValueError(
                f"model.statistics='base' keeps the normalisation of {model.path}, whose robot '{base.robot.name}' has {what}={there!r}; "
                f"robot '{spec.name}' has {here!r}: use model.statistics=own"
            )
    if spec.state_dim not in (0, base.robot.state_dim):
        raise ValueError(
            f"model.statistics='base' keeps the normalisation of {model.path}, which reads {base.robot.state_dim} state dimensions; "
            f"robot '{spec.name}' has {spec.state_dim}: use model.statistics=own, or use_state=false"
        )
    return base


def check_architecture(config: TrainConfig, saved: PolicyConfig) -> None:
    """Whether a run whose newest checkpoint holds policy `saved` can go on as `config` says."""
    now = anatomy.trained_policy(config, None if isinstance(config.model, Fresh) else saved)
    before, after = (_flat(to_dict(_shapes(policy))) for policy in (saved, now))
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {after.get(name)!r}" for name in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(f"cannot resume, the policy would be another one: {listed}{more}; undo that, or start a new run in another folder")


def check_writable(out: Path) -> None:
    """Whether the run folder exists or can be made, and can be written to."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; choose a folder")
    place = _existing(out)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"out={out} cannot be written: no permission in {place}; choose another folder, or change its owner or mode")


def check_disk(config: TrainConfig, parts: list[anatomy.Part], out: Path) -> None:
    """Whether the checkpoints fit beside what is there. Those of a run that is resumed count as free: they are replaced."""
    need = plan.disk(config, parts)
    place = _existing(out)
    free = shutil.disk_usage(place).free + _size(out / "checkpoints")
    if need.total <= free:
        return
    shared = f"{plan.size(need.shared)} once, " if need.shared else ""
    without = f" and {need.num_policy} x {plan.size(need.policy)} without what a resumed run needs" if need.num_policy else ""
    reduce = [f"keep_last={config.keep_last}"] + (["save_dtype=bfloat16"] if not config.lora and config.save_dtype == "float32" else [])
    raise ValueError(
        f"out={out}: checkpoints need {plan.size(need.total)} ({shared}{need.num_resumable} x {plan.size(need.resumable)}{without}), "
        f"{plan.size(free)} are free in {place}: choose another disk with --out, or lower {', '.join(reduce)}"
    )


def check_data(config: TrainConfig, sources: list[Source]) -> None:
    """Whether there is something to learn in every phase. sources: what is trained on, without what validation holds out."""
    chunk_len = config.robot_spec().chunk_len
    lost = chunk_len - 1 if config.parity else 0  # the reference leaves out windows that reach past the end
    counts = [int((source.lengths - lost).clip(min=0).sum()) for source in sources]
    for number, phase in enumerate(config.phases):
        used = [(source, count) for source, count, share in zip(sources, counts, phase.mixture, strict=True) if share > 0]
        total = sum(count for _, count in used)
        if total < config.batch_size:
            where = ", ".join(str(source.path) for source, _ in used)
            fix = f"--batch-size {1 << (total.bit_length() - 1)}" if total else "longer episodes or shorter chunks"
            raise ValueError(
                f"batch_size={config.batch_size} is more than all {total} samples of phase {number} ({where}): a step would repeat them; "
                f"record more demonstrations, or use {fix}"
            )
    last = [source for source, share in zip(sources, config.phases[-1].mixture, strict=True) if share > 0]
    if all(source.kind != "demonstrations" for source in last):
        raise ValueError(f"phases.{len(config.phases) - 1}.mixture mixes in no demonstrations: there are no actions to learn")


def refusals(config: TrainConfig, policy: PolicyConfig, world_size: int) -> list[str]:
    """What `check` would say of the settings alone, without looking at folders: every one of them, one line each."""
    found = []
    for settle in (
        lambda: check_processes(config, world_size),
        lambda: check_numbers(config),
        lambda: check_stop(config, policy),
    ):
        try:
            settle()
        except ValueError as error:
            found.append(str(error))
    return found


def warnings(config: TrainConfig, device: str) -> list[str]:
    """What can run, and is probably not what was meant."""
    found = []
    late = [step for step in plan.falls(config.schedule) if step >= config.total_steps]
    if late:
        steps = ", ".join(f"{step:,}" for step in late)
        found.append(
            f"the learning rate falls at step {steps}, but the run ends at step {config.total_steps:,}: --set schedule.milestones=..."
        )
    if getattr(config.schedule, "warmup_steps", 0) >= config.total_steps:
        found.append(f"schedule.warmup_steps={config.schedule.warmup_steps} is as long as the run: the peak learning rate is never reached")
    if isinstance(config.model, Fresh) and (config.lora or config.freeze):
        found.append("model is fresh: lora and freeze leave random weights as they are")
    if device.startswith("cuda") and config.num_workers == 0 and config.frame_cache == "none":
        found.append(
            "frame_cache='none' decodes every picture anew, with num_workers=0 in one thread: num_workers=4 or frame_cache=disk is faster"
        )
    return found


def _base(config: TrainConfig) -> PolicyConfig | None:
    return check_base(config, config.model) if isinstance(config.model, Pretrained) else None


def _saved_policy(out: Path) -> PolicyConfig | None:
    """Of the newest checkpoint of the run in `out`, if it has one."""
    if not (out / "checkpoints" / "last" / "policy.json").is_file():
        return None
    folder = checkpoint_folder(out)
    return load_config(folder, some_dataset(folder))


def _shapes(policy: PolicyConfig) -> Any:
    """Without what a name, a crop or a vocabulary's order decides."""
    return {
        "robot": policy.robot.to_dict(),
        "head": to_dict(policy)["head"],
        "chunk_len": policy.chunk_len,
        "use_state": policy.use_state,
        "prompt_style": policy.prompt_style,
        "grounding": policy.grounding,
        "parity": policy.parity,
        "state_normalization": policy.state_normalization,
        "vlm": {"dino": policy.vlm.dino, "siglip": policy.vlm.siglip, "llm": policy.vlm.llm, "film": policy.vlm.film},
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: list(value) if isinstance(value, tuple) else value}
    return {path: leaf for key, child in value.items() for path, leaf in _flat(child, f"{name}.{key}" if name else key).items()}


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _size(folder: Path) -> int:
    """Bytes of all files below; hard links count once."""
    files = [os.stat(Path(root) / name, follow_symlinks=False) for root, _, names in os.walk(folder) for name in names]
    return sum({(found.st_dev, found.st_ino): found.st_size for found in files}.values())
