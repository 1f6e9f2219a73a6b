"""What accompanies a run: the checks before it, its records, its validation; see the files that they come from."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from vla_oft.config import to_dict
from vla_oft.data.base import Source
from vla_oft.policy import Policy
from vla_oft.train import curves, folder, preflight, provenance, sinks, validation
from vla_oft.train.batches import Collate, Finish, to_device
from vla_oft.train.config import TrainConfig
from vla_oft.train.parallel import Ranks
from vla_oft.train.precision import faster_precision
from vla_oft.train.stopping import Plateau
from vla_oft.train.tracking import Tracker
from vla_oft.train.validation import Validator


def check(config: TrainConfig, out: Path, *, resume: bool, device: str, world_size: int = 1) -> TrainConfig:
    """Everything that can be refused before any data is read or recorded; returns the configuration with its precision decided."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but this torch ({torch.__version__}) finds no CUDA GPU; use --device cpu")
    config.robot_spec()
    if config.precision == "auto":
        config = dataclasses.replace(config, precision=_decide_precision(config, out, resume, device))
    if config.lora:
        config.lora.check(config.precision)
    if config.sink:
        sinks.check(config.sink)
    folder.check(config, out, resume=resume)
    for warning in preflight.check(config, out, world_size=world_size, device=device, resume=resume):
        print(f"warning: {warning}")
    return config


def begin(config: TrainConfig, out: Path, facts: dict[str, Any]) -> None:
    """Say in the run's folder what is about to happen there."""
    folder.write(config, out)
    provenance.write(out, facts)


def tracker(config: TrainConfig, out: Path, ranks: Ranks, step: int, sources: list[Source]) -> Tracker:
    """Of a run that continues at `step`; only the first process writes."""
    names = dimensions(config, sources)
    opened: list[sinks.Sink | None] = [None]
    if config.sink:
        ranks.on_main(lambda: opened.append(sinks.open_sink(config.sink, out, to_dict(config), step)))
    return Tracker(
        out / "metrics.jsonl" if ranks.is_main else None,
        log_every=config.log_every,
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        start_step=step,
        device=ranks.device,
        sink=opened[-1],
        names={validation.BY_DIM: names, validation.BY_DIM_ROBOT: names},
    )


def dimensions(config: TrainConfig, sources: list[Source]) -> tuple[str, ...]:
    """Names of the action's dimensions."""
    return validation.dimension_names(config.robot_spec(), sources)


def draw(config: TrainConfig, out: Path, sources: list[Source]) -> None:
    """The run's page of curves, anew. A picture that cannot be written ends no run."""
    try:
        curves.refresh(out, dimensions=dimensions(config, sources))
    except OSError as error:
        print(f"warning: {out}/training.html could not be written ({error})", file=sys.stderr)


def plateau(config: TrainConfig) -> Plateau | None:
    """What ends a run early, if anything does."""
    return Plateau(config.stop) if config.stop else None


def validator(config: TrainConfig, policy: Policy, held_out: list[Source], ranks: Ranks, collate: Collate) -> Validator | None:
    """Measures `policy` on the demonstrations that were held out, if any were."""
    if config.validation is None:
        return None
    finish = Finish(policy, None)
    return Validator(
        config.validation,
        validation.held_out_dataset(policy, held_out, skip_bad=any(d.read.skip_bad for d in config.datasets)),
        lambda samples: finish(to_device(collate(samples), ranks.device)),
        batch_size=config.batch_size // (config.passes(ranks.world_size) * ranks.world_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        reduce=ranks.sum,
    )


def _decide_precision(config: TrainConfig, out: Path, resume: bool, device: str) -> Literal["fp32", "bf16"]:
    """A resumed run keeps what it began with: on a busy machine the measurement can come out either way."""
    if config.weights != "float32" or (config.lora is not None and config.lora.dtype == torch.bfloat16):
        return "bf16"
    before = folder.read(out).precision if resume and (out / folder.CONFIG).is_file() else "auto"
    return before if before != "auto" else faster_precision(device)
