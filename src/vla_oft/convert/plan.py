"""What a dataset will become, and what of it cannot be kept: known before anything is written."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_oft.data.base import Source

RESERVED = ("state", "action", "images")
"""Names that mean something else in the format."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is written.

    extras: names of the additional arrays. infos: for each episode of the source, what its recorder noted, the same names everywhere (None
    where an episode lacks one). remarks: one line for everything that is left out.
    """

    fps: float
    extras: tuple[str, ...]
    infos: tuple[dict[str, Any], ...]
    remarks: tuple[str, ...]


def make_plan(source: Source) -> Plan:
    """Raises ValueError when the frame rate is unknown."""
    if source.fps is None:
        raise ValueError(f"dataset {source.path} ({source.format}) does not note its frame rate: give fps, on the command line --fps 20")
    extras, lost_extras = _extras(source)
    infos, lost_infos = _infos(source)
    return Plan(fps=source.fps, extras=extras, infos=infos, remarks=(*lost_extras, *lost_infos))


def common_size(sizes: Iterable[dict[str, tuple[int, int]] | None]) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) of most episodes; None stands for an unreadable one."""
    counts: dict[str, Counter[tuple[int, int]]] = {}
    for episode in sizes:
        for camera, size in (episode or {}).items():
            counts.setdefault(camera, Counter())[size] += 1
    return {camera: found.most_common(1)[0][0] for camera, found in counts.items()}


def check_size(found: dict[str, tuple[int, int]], common: dict[str, tuple[int, int]], where: str) -> None:
    """Raise ValueError unless an episode's pictures are as large as all others."""
    for camera, size in found.items():
        if size != common[camera]:
            here, there = (f"{height} x {width}" for height, width in (size, common[camera]))
            raise ValueError(f"{where}: camera {camera} has {here} pixels, elsewhere {there}; convert such episodes apart, with episodes")


def check_even(common: dict[str, tuple[int, int]], where: str) -> None:
    """Raise ValueError when video cannot hold pictures of this size."""
    for camera, (height, width) in common.items():
        if height % 2 or width % 2:
            raise ValueError(f"{where}: camera {camera} has {height} x {width} pixels, but video needs even numbers: give images instead")


def _extras(source: Source) -> tuple[tuple[str, ...], list[str]]:
    kept, lost = [], []
    for name, shape in source.extras.items():
        dtype = source.extra(name, 0).dtype
        if name in RESERVED or name.startswith("images."):
            lost.append(f"extra '{name}' is left out: its name means something else in LeRobot's format")
        elif dtype.kind not in "biuf" or dtype.itemsize > 8 or not np.prod(shape, dtype=int):
            lost.append(f"extra '{name}' is left out: {dtype} {shape} is not an array of numbers")
        else:
            kept.append(name)
    return tuple(kept), lost


def _infos(source: Source) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Values of one type in each column, None allowed; other columns are left out."""
    found = [{name: _plain(value) for name, value in source.episode_info(e).items()} for e in range(len(source))]
    types: dict[str, set[type]] = {}
    for info in found:
        for name, value in info.items():
            types.setdefault(name, set()).update(() if value is None else (type(value),))
    lost = {}
    for name, kinds in types.items():
        if len(kinds) > 1 and kinds != {int, float}:
            lost[name] = f"is {' and '.join(sorted(kind.__name__ for kind in kinds))}"
        elif not kinds <= {bool, int, float, str}:
            lost[name] = f"is a {next(iter(kinds)).__name__}"
        elif not kinds:
            lost[name] = "is empty"
    kept = [name for name in types if name not in lost]
    remarks = [f"episode_info '{name}' is left out: it {why}, not one number or text" for name, why in lost.items()]
    mixed = {name for name in kept if types[name] == {int, float}}
    return tuple({name: _value(info.get(name), name in mixed) for name in kept} for info in found), remarks


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _value(value: Any, as_float: bool) -> Any:
    return float(value) if as_float and value is not None else value
