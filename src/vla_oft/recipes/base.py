"""What a recipe is, how it is found, and how the command line changes it."""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from vla_oft.collect import CollectConfig, SceneConfig, collect, collect_scenes, provenance
from vla_oft.config import from_dict, to_dict
from vla_oft.train.config import Phase, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, and the simulated demonstrations that it generates first when they are not there yet."""

    train: TrainConfig
    collect: tuple[CollectConfig | SceneConfig, ...] = ()


def names() -> list[str]:
    """All recipes, sorted."""
    package = importlib.import_module("vla_oft.recipes")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def load(name: str) -> Recipe:
    """Recipe `name`. Raises ValueError listing the known ones."""
    if name not in names():
        raise ValueError(f"unknown recipe '{name}'; known: {', '.join(names())}")
    return importlib.import_module(f"vla_oft.recipes.{name}").recipe()


def generate(recipe: Recipe, config: TrainConfig) -> None:
    """Record the simulated datasets that `config` (the recipe's, or a changed one) reads and that do not exist yet.

    Raises ValueError, before anything is recorded, when a dataset is there that the recipe would have recorded differently.
    """
    places = [Path(d.path) for d in config.datasets]
    requests = [request for request in recipe.collect if request.out in places]
    missing = [request for request in requests if not request.out.exists()]
    for request in requests:
        if request not in missing:
            _check_recorded(request, places.index(request.out))
    for request in missing:
        done = collect_scenes(request) if isinstance(request, SceneConfig) else collect(request)
        print(f"{done.out}: {done.num_episodes} episodes, {done.num_frames} frames in {done.duration_s:.0f} s")


def _check_recorded(request: CollectConfig | SceneConfig, number: int) -> None:
    note = request.out / "meta" / "vla_oft.json"
    fix = f"delete it to record anew, or keep your own data in another folder and train on it with --set datasets.{number}.path=FOLDER"
    if not note.is_file():
        raise ValueError(f"{request.out} exists, but this recipe did not record it: {fix}")
    there, here = json.loads(note.read_text()).get("provenance", {}), provenance(request)
    differences = [
        f"{name}: {there.get(name, 'nothing')!r} there, {here.get(name, 'nothing')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, "nothing") != here.get(name, "nothing")
    ]
    if differences:
        raise ValueError(f"{request.out} was not recorded as this recipe asks ({'; '.join(differences)}): {fix}")


def override(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Replace fields by dotted name (`lr`, `model.path`, `datasets.0.path`). Unknown names and wrong types raise ValueError."""
    document = to_dict(config)
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        owner: Any = document
        for part in parents:
            owner = _child(owner, part, name)
        _child(owner, leaf, name)
        owner[int(leaf) if isinstance(owner, list) else leaf] = value
    return from_dict(TrainConfig, document)


def parse_changes(assignments: list[str]) -> dict[str, Any]:
    """`["lr=1e-4", "model.path=runs/base"]` to values: JSON where it parses as such, text otherwise."""
    changes = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set {assignment}: write NAME=VALUE, for example lr=1e-4")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
    return changes


def with_total_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The same run in `steps` optimizer steps: phases keep their shares, each at least one step."""
    if steps < len(config.phases):
        raise ValueError(f"steps={steps}: recipe '{config.name}' has {len(config.phases)} phases and needs at least one step for each")
    scaled = [max(1, round(p.steps * steps / config.total_steps)) for p in config.phases]
    scaled[-1] += steps - sum(scaled)
    if scaled[-1] < 1:
        scaled = [1] * (len(scaled) - 1) + [steps - len(scaled) + 1]
    phases = tuple(Phase(steps=n, mixture=p.mixture) for n, p in zip(scaled, config.phases, strict=True))
    return dataclasses.replace(config, phases=phases)


def _child(owner: Any, part: str, name: str) -> Any:
    if isinstance(owner, dict) and part in owner:
        return owner[part]
    if isinstance(owner, list) and part.isdigit() and int(part) < len(owner):
        return owner[int(part)]
    known = sorted(owner) if isinstance(owner, dict) else f"0..{len(owner) - 1}" if isinstance(owner, list) else "nothing"
    raise ValueError(f"--set {name}: there is no '{part}'; there is {known}")
