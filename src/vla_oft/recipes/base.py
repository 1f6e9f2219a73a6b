"""What a recipe is, how it is found, and how the command line changes it."""

import dataclasses
import difflib
import importlib
import json
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla_oft import hub
from vla_oft.collect import CollectConfig, SceneConfig, collect, collect_scenes, provenance
from vla_oft.config import from_dict, to_dict
from vla_oft.train.config import Phase, Pretrained, TrainConfig
from vla_oft.train.schedule import MultiStep, Reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, and the simulated demonstrations that it generates first when they are not there yet.

    get: for folders that the recipe reads and does not make, how to get them: a command, or words.
    """

    train: TrainConfig
    collect: tuple[CollectConfig | SceneConfig, ...] = ()
    get: dict[str, str] = dataclasses.field(default_factory=dict)


def names() -> list[str]:
    """All recipes, sorted."""
    package = importlib.import_module("vla_oft.recipes")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base" and not m.name.startswith("_"))


def load(name: str) -> Recipe:
    """Recipe `name`. Raises ValueError listing the known ones."""
    if name not in names():
        raise ValueError(f"unknown recipe '{name}'{did_you_mean(name, names())}; known: {', '.join(names())}")
    return importlib.import_module(f"vla_oft.recipes.{name}").recipe()


def of_run(path: Path) -> Recipe:
    """The run whose `train.json`, or whose folder, is `path`; with what the recipe of its name knows of datasets."""
    file = path / "train.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: give the train.json of a run, or its folder") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON: give the train.json of a run, or its folder") from None
    train = from_dict(TrainConfig, document, str(file))
    known = load(train.name) if train.name in names() else Recipe(train=train)
    return dataclasses.replace(known, train=train)


def summary(name: str) -> str:
    """The first sentence of the recipe's file."""
    text = importlib.import_module(f"vla_oft.recipes.{name}").__doc__ or ""
    return text.strip().partition("\n")[0].rstrip(".:")


def missing(recipe: Recipe, config: TrainConfig) -> dict[str, str]:
    """Folders that `config` (the recipe's, or a changed one) reads, that are not here and that nothing will make; and how to get each."""
    read = [*([config.model.path] if isinstance(config.model, Pretrained) else []), *(d.path for d in config.datasets)]
    made = {str(request.out) for request in recipe.collect}
    unknown = "no such folder, and not a hub id (owner/name)"
    return {
        path: recipe.get.get(path, unknown)
        for path in dict.fromkeys(read)
        if not Path(path).exists() and path not in made and (path in recipe.get or not hub.is_id(path))
    }


def require(recipe: Recipe, config: TrainConfig) -> None:
    """Raise ValueError naming everything in `missing` for which the recipe knows where it comes from."""
    known = {path: how for path, how in missing(recipe, config).items() if path in recipe.get}
    if known:
        raise ValueError("; ".join(f"{path} is not here, {how}" for path, how in known.items()))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


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
    """The same run in `steps` optimizer steps: phases keep their shares, each at least one step, and the learning rate falls at the same
    share of the run.
    """
    if steps < len(config.phases):
        raise ValueError(f"steps={steps}: recipe '{config.name}' has {len(config.phases)} phases and needs at least one step for each")
    scaled = [max(1, round(p.steps * steps / config.total_steps)) for p in config.phases]
    scaled[-1] += steps - sum(scaled)
    if scaled[-1] < 1:
        scaled = [1] * (len(scaled) - 1) + [steps - len(scaled) + 1]
    phases = tuple(Phase(steps=n, mixture=p.mixture) for n, p in zip(scaled, config.phases, strict=True))
    return dataclasses.replace(config, phases=phases, schedule=_stretched(config.schedule, steps / config.total_steps))


def _stretched(schedule: Any, factor: float) -> Any:
    if isinstance(schedule, MultiStep):
        return dataclasses.replace(schedule, milestones=tuple(max(1, round(m * factor)) for m in schedule.milestones))
    if isinstance(schedule, Reference):
        return dataclasses.replace(schedule, decay_at=max(1, round(schedule.decay_at * factor)))
    return schedule


def _child(owner: Any, part: str, name: str) -> Any:
    if isinstance(owner, dict) and part in owner:
        return owner[part]
    if isinstance(owner, list) and part.isdigit() and int(part) < len(owner):
        return owner[int(part)]
    above = name.removesuffix(f".{part}") if name.endswith(f".{part}") else name.partition(f".{part}.")[0]
    if owner is None:
        raise ValueError(f"--set {name}: {above} is null here, it has no '{part}'; set it as a whole: --set '{above}={{\"{part}\": ...}}'")
    if not isinstance(owner, dict | list):
        raise ValueError(f"--set {name}: {above} is {owner!r}, it has no '{part}'")
    known = sorted(owner) if isinstance(owner, dict) else f"0..{len(owner) - 1}"
    guess = did_you_mean(part, owner) if isinstance(owner, dict) else ""
    raise ValueError(f"--set {name}: there is no '{part}'{guess}; there is {known}")
