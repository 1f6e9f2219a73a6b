"""A run's folder: one process (or one group of them) at a time, one configuration for good."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vla_oft.atomic import replace_file
from vla_oft.config import from_dict, to_dict
from vla_oft.train.config import TrainConfig

CONFIG, LOCK = "train.json", ".lock"
FREE = {
    *("log_every", "save_every", "keep_last", "keep_every", "keep_best", "save_dtype", "sink", "stop", "guard"),
    *("num_workers", "frame_cache", "micro_batch", "parallel", "recompute", "compile"),
}
"""Fields that a resumed run may change: what it learns stays the same, bar rounding."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder, which is made, until the end of the block or of the process. Raises ValueError when another process has it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is training in {out}; choose another folder, or end it first (`fuser {out / LOCK}`)") from None
    except PermissionError:
        raise ValueError(f"{out} cannot be written to: change its owner or mode, or choose another folder with --out") from None
    try:
        yield
    finally:
        if [entry.name for entry in out.iterdir()] == [LOCK]:  # nothing has come of it
            (out / LOCK).unlink()
            out.rmdir()
        lock.release()


def check(config: TrainConfig, out: Path, *, resume: bool) -> None:
    """Raise ValueError for a folder that is in use for something else, or for a resumed run whose configuration has changed."""
    if not (resume and (out / CONFIG).is_file()):
        if out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
            raise ValueError(f"output {out} exists and is not empty; choose another folder, remove it, or go on with its run by --resume")
        if resume:
            print(f"note: there is nothing to resume in {out}; starting from the beginning")
        return
    before = read(out)
    changed = _changed(*(to_dict(_as_learned(c)) for c in (before, config)))
    if changed:
        raise ValueError(f"cannot resume {out}: the configuration has changed in {', '.join(changed)}; use the same one, or another folder")


def read(out: Path) -> TrainConfig:
    """The configuration of the run in `out`; fields that are new since then have their defaults. Raises ValueError if it is damaged."""
    path = out / CONFIG
    try:
        document = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not JSON: restore it from a checkpoint's run.json (its `train`), or start a new run") from None
    return from_dict(TrainConfig, document, str(path))


def write(config: TrainConfig, out: Path) -> None:
    """What `read` reads."""
    replace_file(out / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def _as_learned(config: TrainConfig) -> TrainConfig:
    """Where caches lie changes nothing, and damaged frames that now are left out ended the run before."""
    read = [dataclasses.replace(d.read, cache_dir=None, skip_bad=False) for d in config.datasets]
    return dataclasses.replace(config, datasets=tuple(dataclasses.replace(d, read=r) for d, r in zip(config.datasets, read, strict=True)))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(k for k in before.keys() | after.keys() if k not in FREE and before.get(k) != after.get(k))
    return [f"{k} ({before.get(k)!r} then, {after.get(k)!r} now)" for k in names]
