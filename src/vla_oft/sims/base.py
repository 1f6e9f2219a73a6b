"""What every simulator offers, in process: a robot with a `RobotSpec`, seeded scenes, an instruction and a verdict.

Rendering is separate from stepping because a policy that executes a chunk of K actions looks at the cameras only once every K steps.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from vla_oft_client import Observation, RobotSpec


class SimulatorError(RuntimeError):
    """The simulator broke (renderer lost, unstable physics): never counted as a failure of the policy."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The state of a task right now.

    success: the instruction has been carried out.
    chosen: name of the object that was acted on (touched, pushed, placed, stacked), right or wrong; None while nothing was.
    correct: whether `chosen` is the object that the instruction names; None while nothing was chosen.
    """

    success: bool
    chosen: str | None
    correct: bool | None


class Simulator(Protocol):
    """One task family of one simulated robot. Same seed, same scene, same instruction, on every machine."""

    spec: RobotSpec
    family: str
    max_steps: int
    instruction: str

    def reset(self, seed: int, *, swap: int = 0) -> None:
        """Build the scene of `seed`. `swap` > 0 keeps the scene but names another object: the control for language grounding."""
        ...

    def observe(self) -> Observation:
        """Render all cameras and read the state."""
        ...

    def step(self, action: np.ndarray) -> None:
        """Execute one action (D,) for one control period."""
        ...

    def outcome(self) -> Outcome:
        """The verdict so far."""
        ...

    def frame(self, height: int, width: int) -> np.ndarray:
        """A picture for people, uint8 (height, width, 3)."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


def make(suite: str, camera_size: int) -> Simulator:
    """A fresh simulator of a suite such as "tabletop/touch", whose cameras render `camera_size` x `camera_size` pixels."""
    name, _, family = suite.partition("/")
    if name not in simulators() or not family:
        raise ValueError(f"unknown suite '{suite}'; write SIMULATOR/FAMILY, with one of the simulators {', '.join(simulators())}")
    return load(name).make(family, camera_size=camera_size)


def expert_class(simulator: str) -> Callable[[Any], Callable[[], np.ndarray]]:
    """The scripted expert of a simulator: `Expert(env)()` is the action (D,) for now. Raises ValueError when it has none."""
    module = f"vla_oft.sims.experts.{simulator}"
    try:
        return importlib.import_module(module).Expert
    except ModuleNotFoundError as error:
        if error.name != module:  # the expert exists, but what it needs does not
            raise
        raise ValueError(f"simulator '{simulator}' has no scripted expert: there is no sims/experts/{simulator}.py") from error


def load(simulator: str) -> ModuleType:
    """The module of a simulator. Raises ValueError when it is not one, ImportError when its dependencies are missing."""
    module = importlib.import_module(f"vla_oft.sims.{simulator}")
    if not (hasattr(module, "FAMILIES") and hasattr(module, "make")):
        raise ValueError(f"sims/{simulator}.py exports no FAMILIES and make(family, camera_size)")
    return module


def simulators() -> list[str]:
    """Names of the simulators in this folder that run tasks: the modules with `FAMILIES` and `make`, whether or not they can run here."""
    folder = [str(p) for p in importlib.import_module("vla_oft.sims").__path__]
    return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.ispkg and _runs_tasks(m.name))


def _runs_tasks(name: str) -> bool:
    try:
        module = importlib.import_module(f"vla_oft.sims.{name}")
    except ImportError:  # its own dependencies are missing: whoever asks for it learns which
        return True
    return hasattr(module, "FAMILIES") and hasattr(module, "make")
