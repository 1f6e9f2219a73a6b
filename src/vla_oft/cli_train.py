"""`vla-oft train` and `vla-oft show`: part of the command line, see `cli.py`."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from vla_oft.recipes.base import Recipe
    from vla_oft.train.config import TrainConfig
    from vla_oft.train.parallel import Ranks

Settings = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE"), UseAppendAction]


def train(
    recipe: Positional[str | None] = None,
    *,
    config: Path | None = None,
    out: Path | None = None,
    steps: int | None = None,
    save_every: int | None = None,
    log_every: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    resume: bool = False,
    device: str | None = None,
    set: Settings = (),
) -> None:
    """Train a policy by a named recipe; `vla-oft show RECIPE` says what will happen.

    On several GPUs: torchrun --nproc-per-node N -m vla_oft train RECIPE. The same run, sooner: the batch is shared.

    Args:
        recipe: name of a recipe; see `vla-oft show`.
        config: instead of a recipe, the train.json of an earlier run, or that run's folder.
        out: run folder; runs/RECIPE by default. Must be empty or absent, unless --resume.
        steps: optimizer steps in total; phases, and the steps at which the learning rate falls, keep their shares.
        save_every: steps between checkpoints.
        log_every: steps between rows of metrics.jsonl.
        batch_size: samples per step, over all GPUs.
        micro_batch: samples of one pass on one GPU; changes memory and speed, not what is learned.
        lr: peak learning rate.
        seed: of initialisation, order and augmentation.
        resume: continue the run in --out (or --config) where its last checkpoint left off; begins it where there is none.
        device: "cpu" or "cuda"; the GPU if there is one.
        set: any other field of the recipe, for example model.path=runs/base or 'lora={"rank": 16}'; may be given several times.
    """
    direct = {
        "save_every": save_every,
        "log_every": log_every,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "seed": seed,
    }
    chosen, settings = _choose(recipe, config, steps, direct, set)

    import torch  # after the cheap mistakes

    from vla_oft.recipes import base
    from vla_oft.train import companions, loop, parallel

    out = out or (config if config is not None and resume and config.is_dir() else Path("runs") / (recipe or settings.name))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def before_training() -> None:
        base.require(chosen, settings)
        companions.check(settings, out, resume=resume, device=device, world_size=ranks.world_size)
        base.generate(chosen, settings)

    with parallel.start(device) as ranks:
        with _said_once(ranks):
            ranks.on_main(before_training)
        folder = loop.train(settings, out, resume=resume, device=device)
        if ranks.is_main:
            print(f"checkpoint: {folder}")


def show(
    recipe: Positional[str | None] = None,
    *,
    config: Path | None = None,
    steps: int | None = None,
    gpus: int | None = None,
    json: bool = False,
    set: Settings = (),
) -> None:
    """Print everything a recipe will do; without a recipe, list them.

    Args:
        recipe: name of a recipe.
        config: instead of a recipe, the train.json of an earlier run, or that run's folder.
        steps: optimizer steps in total, as in `vla-oft train`.
        gpus: how many will share the work; those of this machine by default.
        json: print one JSON object on stdout and nothing else: every field.
        set: change fields, as in `vla-oft train`.
    """
    from vla_oft.recipes import base

    if recipe is None and config is None:
        width = max(map(len, base.names()))
        print("\n".join(f"{name:<{width}}  {base.summary(name)}" for name in base.names()))
        return
    chosen, settings = _choose(recipe, config, steps, {}, set)
    if json:
        _print_json(replace(chosen, train=settings))
        return
    import torch

    from vla_oft.train import anatomy, outline, preflight
    from vla_oft.train.config import Pretrained

    gpus = max(1, torch.cuda.device_count()) if gpus is None else gpus
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be positive")
    missing, model = base.missing(chosen, settings), settings.model
    assumed = isinstance(model, Pretrained) and model.path in missing
    before = None if not isinstance(model, Pretrained) else anatomy.published_base(settings) if assumed else anatomy.base_config(model)
    policy, name = anatomy.trained_policy(settings, before), recipe or settings.name
    options = [*(["--config", str(config)] if recipe is None else [name]), *([f"--steps={steps}"] if steps else [])]
    typed = shlex.join(["train", *options, *(f"--set={change}" for change in set)])
    out = Path("runs") / name
    print(f"{name}: {base.summary(recipe)}\n" if recipe else f"{name}\n")
    print("\n".join(outline.lines(settings, policy, gpus=gpus, out=out, start=typed, missing=missing, assumed=assumed)))
    device = "cuda" if gpus > 1 or torch.cuda.is_available() else "cpu"
    notes = [f"refused: {line}" for line in preflight.refusals(settings, policy, gpus)]
    notes += [f"warning: {line}" for line in preflight.warnings(settings, device)]
    print("\n".join(["", *notes]) if notes else "", end="\n" if notes else "")


def _choose(
    recipe: str | None, config: Path | None, steps: int | None, direct: dict[str, Any], changes: tuple[str, ...]
) -> "tuple[Recipe, TrainConfig]":
    """The recipe as it is written, and the run that is asked for. Raises ValueError."""
    from vla_oft.recipes import base

    if recipe is not None and config is None:
        chosen = base.load(recipe)
    elif config is not None and recipe is None:
        chosen = base.of_run(config)
    else:
        raise ValueError(f"name a recipe, or give --config FILE (not both); recipes: {', '.join(base.names())}")
    named = base.parse_changes(list(changes))
    twice = sorted(name for name, value in direct.items() if value is not None and name in named)
    if twice:
        raise ValueError(f"{twice[0]} is given twice: as --{twice[0].replace('_', '-')} and with --set")
    if steps is not None and any(name.startswith("phases") for name in named):
        raise ValueError(f"--steps {steps} divides the phases' steps anew, and --set changes them: give one of both")
    settings = chosen.train if steps is None else base.with_total_steps(chosen.train, steps)
    return chosen, base.override(settings, {**{name: value for name, value in direct.items() if value is not None}, **named})


@contextmanager
def _said_once(ranks: "Ranks") -> Iterator[None]:
    """Inside, an error that all processes share ends the others without a word: the first one says it."""
    try:
        yield
    except (ValueError, OSError):
        if ranks.is_main:
            raise
        sys.exit(2)


def _print_json(document: Any) -> None:
    import json

    from vla_oft.config import to_dict

    print(json.dumps(to_dict(document), indent=2, default=str))
