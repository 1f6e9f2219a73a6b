"""SHA-256 of every file of a checkpoint, in `checksums.json` beside them: a bit that a disk or a copy has turned is found in time."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from vla_oft.atomic import replace_file

NAME = "checksums.json"
_BLOCK = 2**22


def write(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write the sums of all files below `folder`; returns them by relative path. known: sums that need not be computed again."""
    known = known or {}
    sums = {name: known.get(name) or _sha256(folder / name) for name in _files(folder)}
    replace_file(folder / NAME, json.dumps(sums, indent=2) + "\n")
    return sums


def read(folder: Path) -> dict[str, str]:
    """The sums that were written, by relative path; empty where there are none. Raises ValueError for a file that holds something else."""
    if not (folder / NAME).is_file():
        return {}
    try:
        sums = json.loads((folder / NAME).read_text())
    except ValueError:
        sums = None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"{folder / NAME} is damaged: copy the checkpoint again, or use an earlier one")
    return sums


def forget(folder: Path, inner: str) -> None:
    """Take the files of sub-folder `inner` out of the list, before they are deleted."""
    sums = {name: value for name, value in read(folder).items() if not name.startswith(f"{inner}/")}
    replace_file(folder / NAME, json.dumps(sums, indent=2) + "\n")


def verify(folder: Path) -> None:
    """Raise ValueError naming the first file that is missing or not as it was written. A folder without sums passes."""
    for name, expected in read(folder).items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / NAME} names {name}, which lies elsewhere: not a checkpoint of this package")
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the checkpoint again, or use an earlier one")
        if _sha256(path) != expected:
            raise ValueError(f"{path} is damaged (its checksum differs from {NAME}): copy the checkpoint again, or use an earlier one")


def _files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != NAME)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
