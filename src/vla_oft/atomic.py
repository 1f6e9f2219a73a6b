"""Folders and files that appear whole or not at all."""

import os
import platform
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
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in (f for f in temporary.rglob("*") if f.is_file()):
            sync(file)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_empty(path: Path) -> None:
    """Raise ValueError unless `path` is absent or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {path} exists and is not empty; choose another folder, or remove it first")


def replace_file(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old contents or the new, never a part."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there when the disk is full


def temporary_beside(path: Path) -> Path:
    """This process's name for what will be renamed to `path`; nothing is there. Removes what killed processes of this machine left."""
    prefix, suffix = f".{path.name}.{platform.node()}.", ".writing"
    for found in path.parent.iterdir():
        pid = found.name[len(prefix) : -len(suffix)]
        if found.name == f"{prefix}{pid}{suffix}" and pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}{suffix}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
