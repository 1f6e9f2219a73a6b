"""`vla-oft doctor`: what is asked about, and the answer."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_oft import hub


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """target: a recipe, a train.json, a checkpoint or a run folder, a hub id, or None for this machine. gpu: see `gpus.find`; None for what
    is here. gpus: how many. changes: of the recipe's fields, as in `vla-oft train --set`. out: run folder; runs/RECIPE where it is None.
    """

    target: str | None = None
    gpu: str | None = None
    gpus: int | None = None
    changes: tuple[str, ...] = ()
    out: Path | None = None
    device: str | None = None
    dataset: str | None = None


def run(request: DoctorRequest) -> tuple[dict[str, Any], list[str], bool]:
    """The findings as JSON types and as lines, and whether all is well. Raises ValueError for a target that is nothing of the kind."""
    from vla_oft.recipes import base

    target, names = request.target, base.names()
    if target is None:
        return _machine(request)
    if target in names or target.endswith(".json"):
        return _recipe(request, target)
    if Path(target).exists() or hub.is_id(target):
        return _checkpoint(request, target)
    raise ValueError(f"'{target}' is neither a recipe nor a folder here{base.did_you_mean(target, names)}; recipes: {', '.join(names)}")


def _machine(request: DoctorRequest) -> tuple[dict[str, Any], list[str], bool]:
    from vla_oft.doctor import machine

    _refuse(request, ("gpu", "gpus", "changes", "dataset", "device"), "needs a recipe")
    document = machine.examine(request.out or Path("runs"))
    return document, machine.lines(document), True


def _recipe(request: DoctorRequest, target: str) -> tuple[dict[str, Any], list[str], bool]:
    from vla_oft.doctor import gpus, recipe
    from vla_oft.recipes import base

    _refuse(request, ("dataset", "device"), "is about checkpoints")
    chosen = base.of_run(Path(target)) if target.endswith(".json") else base.load(target)
    config = base.override(chosen.train, base.parse_changes(list(request.changes)))
    gpu = gpus.find(request.gpu) if request.gpu else gpus.here()
    count = request.gpus or _count(config.batch_size, here=request.gpu is None)
    if count < 1:
        raise ValueError(f"--gpus {count} must be positive")
    out = request.out or Path("runs") / config.name
    document = recipe.examine(chosen, config, gpu, gpus=count, out=out, say=lambda text: print(text, file=sys.stderr))
    return document, recipe.lines(document), recipe.is_healthy(document)


def _checkpoint(request: DoctorRequest, target: str) -> tuple[dict[str, Any], list[str], bool]:
    import torch

    from vla_oft.doctor import checkpoint

    _refuse(request, ("gpu", "gpus", "changes", "out"), "needs a recipe")
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    document = checkpoint.examine(target, device=device, dataset=request.dataset)
    return document, checkpoint.lines(document), checkpoint.is_healthy(document)


def _count(batch_size: int, *, here: bool) -> int:
    """GPUs of this machine, one where others are asked about."""
    import torch

    return max(1, torch.cuda.device_count()) if here and torch.cuda.is_available() else 1


def _refuse(request: DoctorRequest, names: tuple[str, ...], why: str) -> None:
    """Raise ValueError for an option that would be ignored."""
    flags = {"changes": "set"}
    for name in names:
        if getattr(request, name):
            raise ValueError(f"--{flags.get(name, name)} {why}; target here: {request.target or 'this machine'}")
