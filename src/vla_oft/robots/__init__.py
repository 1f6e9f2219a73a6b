"""One file per robot, each exporting `SPEC`. The file name is the registry: `load("tabletop")` reads `robots/tabletop.py`.

A robot whose demonstrations are found in other people's layouts also exports `FEATURES` (see `vla_oft.features`).
"""

import importlib
import pkgutil
from types import ModuleType

from vla_oft.features import Features
from vla_oft_client import RobotSpec


def names() -> list[str]:
    """Names of all robots, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> RobotSpec:
    """The spec of robot `name`. Raises ValueError listing the known robots."""
    return _module(name).SPEC


def features(name: str) -> tuple[Features, ...]:
    """The layouts in which demonstrations of robot `name` are found, those to try first in front; none for an unknown robot."""
    return getattr(_module(name), "FEATURES", ()) if name in names() else ()


def _module(name: str) -> ModuleType:
    if name not in names():
        raise ValueError(f"unknown robot '{name}'; known: {', '.join(names())}; add src/vla_oft/robots/{name}.py to define it")
    return importlib.import_module(f"{__name__}.{name}")
