"""What every simulator offers, in process: a robot with a `RobotSpec`, seeded scenes, an instruction and a verdict.

Rendering is separate from stepping because a policy that executes a chunk of K actions looks at the cameras only once every K steps.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol

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
