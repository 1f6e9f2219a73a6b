"""One file per robot, each exporting `SPEC`. The file name is the registry: `load("tabletop")` reads `robots/tabletop.py`."""

import importlib
import pkgutil

from vla_oft_client import RobotSpec


def names() -> list[str]:
    """Names of all robots, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> RobotSpec:
    """The spec of robot `name`. Raises ValueError listing the known robots."""
    if name not in names():
        raise ValueError(f"unknown robot '{name}'; known: {', '.join(names())}; add src/vla_oft/robots/{name}.py to define it")
    return importlib.import_module(f"{__name__}.{name}").SPEC
