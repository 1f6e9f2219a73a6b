"""Which tasks to run: "tabletop/touch", "tabletop" (all its families), or several of them separated by commas.

The file name is the registry: every module of `vla_oft/sims/` that exports `FAMILIES` and `make` is a simulator.
"""

from dataclasses import dataclass

from vla_oft.sims.base import Simulator, load, make, simulators


@dataclass(frozen=True)
class Task:
    """One task family of one simulator."""

    simulator: str
    family: str

    def __str__(self) -> str:
        return f"{self.simulator}/{self.family}"

    def make(self, camera_size: int) -> Simulator:
        """A fresh simulator whose cameras render `camera_size` x `camera_size` pixels."""
        return make(str(self), camera_size)


def resolve(suite: str) -> tuple[Task, ...]:
    """The tasks of `suite`, in the order given, without repetitions. Raises ValueError listing what exists."""
    tasks: list[Task] = []
    for part in (p.strip() for p in suite.split(",")):
        simulator, slash, family = part.partition("/")
        if simulator not in simulators():
            raise ValueError(f"suite '{suite}': no simulator '{simulator}'; there are {', '.join(available()) or 'none'}")
        families = tuple(load(simulator).FAMILIES)
        if slash and family not in families:
            raise ValueError(f"suite '{suite}': simulator '{simulator}' has no family '{family}'; it has {', '.join(families)}")
        tasks.extend(Task(simulator, name) for name in ((family,) if slash else families))
    return tuple(dict.fromkeys(tasks))


def available() -> list[str]:
    """Every suite that this installation can name; simulators whose dependencies are missing are listed by name alone."""
    names = []
    for simulator in simulators():
        try:
            names += [f"{simulator}/{family}" for family in load(simulator).FAMILIES]
        except (ImportError, ValueError) as error:
            names.append(f"{simulator} ({error})")
    return names
