"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write into; rename it to `path` at the end, remove it on any error.

    Raises ValueError when `path` exists and is not empty: nothing is ever overwritten.
    """
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in (f for f in temporary.rglob("*") if f.is_file()):
            _sync(file)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_empty(path: Path) -> None:
    """Raise ValueError unless `path` is absent or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {path} exists and is not empty; choose another folder, or remove it first")


def replace_file(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
