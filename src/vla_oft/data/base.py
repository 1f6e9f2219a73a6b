"""Demonstrations as every format offers them: episodes with cheap low-dimensional arrays and lazily decoded frames.

`open_source(path)` finds the format by asking the modules of this folder: a module with `detect(path) -> bool` and
`open_source(path, cameras) -> Source` is a format.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

import vla_oft.data
from vla_oft.statistics import DatasetStatistics, compute_statistics
from vla_oft_client import RobotSpec


class Source(Protocol):
    """One dataset. Everything but `frames` is small and kept in memory once read.

    name: the folder's name, the key of its statistics.
    kind: "demonstrations", or "scenes" (single frames without meaningful actions, for grounding).
    cameras: camera names; tasks: distinct instructions; extras: name -> shape of additional per-frame arrays.
    state_dim is 0 when there is no state. lengths: int64 (E,) steps of each episode.
    """

    path: Path
    name: str
    kind: str
    fps: float
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    lengths: np.ndarray
    tasks: tuple[str, ...]
    extras: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        """Number of episodes E."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the contents may have changed; independent of where the dataset lies."""
        ...

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        """Frames of one camera, uint8 (N, H, W, 3) RGB, in the order of `indices` (steps within the episode)."""
        ...

    def states(self, episode: int) -> np.ndarray:
        """float32 (T, S) in robot units."""
        ...

    def actions(self, episode: int) -> np.ndarray:
        """float32 (T, D) in robot units."""
        ...

    def task_indices(self, episode: int) -> np.ndarray:
        """int64 (T,): which of `tasks` each step belongs to."""
        ...

    def extra(self, name: str, episode: int) -> np.ndarray:
        """Additional array (T, *extras[name])."""
        ...

    def episode_info(self, episode: int) -> dict[str, Any]:
        """What the recorder noted, for example the simulator's seed; empty for other people's datasets."""
        ...

    def check(self) -> None:
        """Raise ValueError naming the file, the episode and the fix if anything is missing or damaged."""
        ...


def formats() -> dict[str, ModuleType]:
    """The formats that can be read, by name: the modules of this folder with `detect` and `open_source`."""
    names = sorted(m.name for m in pkgutil.iter_modules(vla_oft.data.__path__) if f"vla_oft.data.{m.name}" != __name__)
    modules = {name: importlib.import_module(f"vla_oft.data.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "detect") and hasattr(module, "open_source")}


def open_source(path: str | Path, cameras: Mapping[str, str] | None = None) -> Source:
    """Open the dataset in folder `path`, whatever its format.

    cameras: camera name -> the dataset's own feature name, for datasets that name their cameras differently; None keeps the dataset's.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"dataset {path} {'is not a folder' if path.exists() else 'does not exist'}; give the folder of a dataset")
    for module in formats().values():
        if module.detect(path):
            source: Source = module.open_source(path, cameras)
            if not len(source) or not int(source.lengths.sum()):
                raise ValueError(f"dataset {path} is empty: {len(source)} episodes, no frames; record or download it again")
            return source
    found = sorted(p.name for p in path.iterdir())[:10]
    raise ValueError(f"{path} is not a dataset in a known format ({', '.join(formats())}); it holds {found}")


def instruction(source: Source, episode: int, step: int = 0) -> str:
    """The instruction of one step."""
    return source.tasks[int(source.task_indices(episode)[step])]


def check_source(source: Source, spec: RobotSpec) -> list[str]:
    """Raise ValueError unless `source` can train a policy for robot `spec`; return warnings about what looks odd.

    Reads all low-dimensional data and opens every file: seconds now instead of a crash hours into a run.
    """
    missing = [camera for camera in spec.cameras if camera not in source.cameras]
    if missing:
        raise ValueError(
            f"dataset {source.path} has no camera {', '.join(missing)} that robot '{spec.name}' needs; "
            f"it has {', '.join(source.cameras) or 'none'}; map them with cameras={{robot's name: dataset's name}}"
        )
    for what, found, needed in (("action", source.action_dim, spec.action_dim), ("state", source.state_dim, spec.state_dim)):
        if needed and found != needed:
            raise ValueError(f"dataset {source.path} has {found} {what} dimensions, robot '{spec.name}' has {needed}: choose another robot")
    source.check()
    for episode in range(len(source)):
        for what, values in (("action", source.actions(episode)), ("state", source.states(episode) if spec.state_dim else None)):
            if values is not None and not np.isfinite(values).all():
                step, dim = np.argwhere(~np.isfinite(values))[0]
                where = f"episode {episode}, step {step}, dimension {dim}"
                raise ValueError(f"dataset {source.path}: {what} is not finite in {where}; drop that episode")
    empty = [task for task in source.tasks if not task.strip()]
    warnings = [f"{len(empty)} empty instructions"] if empty else []
    if abs(source.fps - spec.control_hz) > 1e-3 and source.kind == "demonstrations":
        warnings.append(f"recorded at {source.fps:g} frames per second, but robot '{spec.name}' runs at {spec.control_hz:g} Hz")
    return warnings


def source_statistics(source: Source, normalize_mask: Sequence[bool] | np.ndarray) -> DatasetStatistics:
    """Exact statistics of the actions and states of one dataset (its own statistics files are not trusted: see docs/data.md)."""
    episodes = range(len(source))
    states = [source.states(e) for e in episodes] if source.state_dim else None
    return compute_statistics([source.actions(e) for e in episodes], states, normalize_mask)
