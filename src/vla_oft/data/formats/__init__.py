"""The formats that can be read. A module of this folder with `detect` and `open_source` is one; its file name is its name."""

import importlib
import pkgutil
from types import ModuleType


def load_all() -> dict[str, ModuleType]:
    """Every format, by name, in alphabetical order: `detect(root) -> bool` and `open_source(files, options) -> Source`."""
    return {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(m.name for m in pkgutil.iter_modules(__path__))}
