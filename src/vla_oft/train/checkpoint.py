"""Checkpoints of a run, written while the training goes on, whole or not at all.

    checkpoints/step-000500/    the policy, run.json, README.md, checksums.json
        trainer/                what a resumed run also needs: state.json, and each process's part of the optimizer state in shards
    checkpoints/last, best      links to the newest one, and to the one with the smallest validation error

    training    step 500 | copy to the host | step 501 ...              step 1000
    background                              | write, hash, rename, move `last`, prune |

A kill at any instant, also in the middle of writing, leaves the last good checkpoint: what is being written has another name
until all of it is on the disk.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vla_oft import checksums
from vla_oft.atomic import sync
from vla_oft.train import shards

TRAINER, STATE = "trainer", "state.json"
SCORE = "validation_action_l1"
"""In `run.json`: what `best` goes by."""
PATIENCE_S = 1800.0
"""How long the first process waits for the parts of the others, on whatever disk they share."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay: the `last` ones, and for good every one whose step is a multiple of `every`, and the `best` one."""

    last: int
    every: int | None = None
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one step, copied to the host.

    write_policy: writes the policy into a folder, given the previous checkpoint's or None; called in the background, of the first process
    alone. parts: what this process writes of the optimizer's state. state: the rest, plain JSON. facts: `run.json`. card: `README.md`.
    error: of the validation at this step, or None.
    """

    step: int
    write_policy: Callable[[Path, Path | None], None]
    parts: Mapping[str, shards.Part]
    state: dict[str, Any]
    facts: dict[str, Any]
    card: str
    error: float | None = None


class Checkpoints:
    """Writes the snapshots of one process of a run, one at a time, in the background.

    rank, world_size: of this process. barrier: waits for all of them. Every process calls every method at the same steps.
    """

    def __init__(self, run: Path, keep: Keep, *, rank: int = 0, world_size: int = 1, barrier: Callable[[], None] = lambda: None) -> None:
        self.folder, self.keep = run / "checkpoints", keep
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def last(self) -> Path | None:
        """The newest checkpoint of the run, or None. (A damaged one that a resumed run has passed over may have a higher number.)"""
        link = self.folder / "last"
        return self.folder / link.readlink().name if link.is_symlink() else None

    def settle(self, step: int) -> None:
        """Links and pruning as they are due after checkpoint `step`; once more when a run is resumed: a kill may have come before them."""
        point(self.folder / "last", _name(step))
        best = self._best(step) if self.keep.best else None
        if best is not None:
            point(self.folder / "best", _name(best))
        self._prune(step)

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; waits for the previous one first. Raises OSError when that has failed."""
        self.wait()
        writing = self._writing(snapshot.step)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            (writing / TRAINER).mkdir(parents=True)
        self.barrier()
        self._thread = threading.Thread(target=self._work, args=(snapshot, writing), name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether something has gone wrong in the background, here."""
        return self._error is not None

    def check(self, *, elsewhere: bool = False) -> None:
        """Raise what has gone wrong in the background, if anything has: OSError for a full disk, or for a failure `elsewhere`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if elsewhere:
            raise OSError("another process could not write its part of a checkpoint and says why; the last good one stays")

    def wait(self) -> None:
        """Until all is written. Raises what has gone wrong."""
        self.join()
        self.check()

    def join(self) -> None:
        """The same, but silent about what has gone wrong: on the way out with another error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _writing(self, step: int) -> Path:
        return self.folder / f".{_name(step)}.writing"

    def _work(self, snapshot: Snapshot, writing: Path) -> None:
        try:
            shards.write(snapshot.parts, writing / TRAINER / f"rank-{self.rank:05d}.safetensors")
            if self.rank:
                (writing / f"rank-{self.rank:05d}.done").touch()
                return
            previous = self._before(snapshot.step)
            self._write_whole(snapshot, writing, previous)
            _wait_for(writing, self.world_size)
            checksums.write(writing, _linked_sums(writing, previous))
            self._publish(writing, self.folder / _name(snapshot.step))
            self.settle(snapshot.step)
        except BaseException as error:  # raised again in the main thread
            if self.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    (writing / f"rank-{self.rank:05d}.failed").touch()
            self._error = _explained(error, self.folder)

    def _before(self, step: int) -> Path | None:
        """The newest checkpoint before `step`."""
        known = [s for s in steps(self.folder.parent) if s < step]
        return self.folder / _name(known[-1]) if known else None

    def _write_whole(self, snapshot: Snapshot, writing: Path, previous: Path | None) -> None:
        """What the first process writes for all."""
        snapshot.write_policy(writing, previous)
        (writing / TRAINER / STATE).write_text(json.dumps(snapshot.state) + "\n")
        (writing / "run.json").write_text(json.dumps({**snapshot.facts, SCORE: snapshot.error}, indent=2) + "\n")
        (writing / "README.md").write_text(snapshot.card)

    def _publish(self, writing: Path, final: Path) -> None:
        for file in (f for f in writing.rglob("*") if f.is_file()):
            sync(file)
        if final.exists():  # left behind by a run that was resumed from an earlier step
            shutil.rmtree(final)
        writing.rename(final)
        sync(self.folder)

    def _best(self, step: int) -> int | None:
        """Of the checkpoints up to `step` that of the smallest validation error, of equal ones the first; None where none was measured."""
        files = {s: self.folder / _name(s) / "run.json" for s in steps(self.folder.parent) if s <= step}
        errors = {s: json.loads(file.read_text()).get(SCORE) for s, file in files.items() if file.is_file()}
        return min((s for s in errors if errors[s] is not None), key=lambda s: errors[s], default=None)

    def _prune(self, step: int) -> None:
        """What lies beyond `step` is left alone: damaged ones that a resumed run has passed over, and will write again."""
        self._clear()
        known = [s for s in steps(self.folder.parent) if s <= step]
        best = (self.folder / "best").resolve().name
        for old in known[: -self.keep.last]:
            place = self.folder / _name(old)
            kept = place.name == best or (self.keep.every and old % self.keep.every == 0)
            doomed = place / TRAINER if kept else place
            if doomed.is_dir():
                if kept:
                    checksums.forget(place, TRAINER)
                doomed.rename(self._writing(old))  # in one step: a kill leaves no half of a checkpoint
                shutil.rmtree(self._writing(old))

    def _clear(self) -> None:
        """Remove what a killed run has left half written or half removed; one run at a time has the folder."""
        for left in self.folder.glob(".step-*.writing"):
            shutil.rmtree(left)


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending. Copies by other names, `step-000500-backup`, are none."""
    found = {p.name.removeprefix("step-"): p for p in (run / "checkpoints").glob("step-*") if (p / "policy.json").is_file()}
    return sorted(int(number) for number in found if number.isdecimal())


def newest(run: Path) -> Path | None:
    """The newest checkpoint that a run can be resumed from and that is as it was written; None when there is none at all.

    Damaged ones are reported and passed over. Raises ValueError when there are checkpoints, but none that can be resumed from.
    """
    found = [run / "checkpoints" / _name(step) for step in reversed(steps(run))]
    problem = ""
    for folder in found:
        try:
            if not (folder / TRAINER / STATE).is_file():
                old = (folder / TRAINER / "state.pt").is_file()
                raise ValueError(f"{folder} was saved by an earlier version of vla-oft" if old else f"{folder} has no {TRAINER}/")
            if not (folder / checksums.NAME).is_file():
                raise ValueError(f"{folder / checksums.NAME} is missing")
            checksums.verify(folder)
        except (ValueError, OSError) as error:  # a disk that cannot read what it holds says so itself
            problem = str(error)
            print(f"warning: {problem}; trying the checkpoint before it")
            continue
        point(folder.parent / "last", folder.name)  # a kill may have come between a checkpoint and its pointer
        return folder
    if found:
        raise ValueError(f"{run} has no checkpoint to resume from ({problem}); start a new run with --set model.path={found[0]}")
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `trainer/` says beside tensors."""
    return json.loads((folder / TRAINER / STATE).read_text())


def load_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill these from a checkpoint's `trainer/`; see `shards.read`."""
    shards.read(folder / TRAINER, into)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _linked_sums(writing: Path, previous: Path | None) -> dict[str, str]:
    """Sums of the files that are hard links to those of checkpoint `previous`: many gigabytes that need not be read again."""
    known = {} if previous is None else checksums.read(previous)
    pairs = {name: (previous / name, writing / name) for name in known} if previous is not None else {}
    return {name: known[name] for name, (old, new) in pairs.items() if old.is_file() and new.is_file() and old.samefile(new)}


def _wait_for(writing: Path, world_size: int) -> None:
    """Until all processes but this one have written their part; removes what they say so with.

    Raises OSError when one says that it could not, or says nothing for too long.
    """
    deadline = time.monotonic() + PATIENCE_S
    while missing := [rank for rank in range(1, world_size) if not (writing / f"rank-{rank:05d}.done").is_file()]:
        if failed := [rank for rank in missing if (writing / f"rank-{rank:05d}.failed").is_file()]:
            raise OSError(f"process {failed[0]} could not write its part, and says why")
        if time.monotonic() > deadline:
            raise OSError(
                f"{writing.parent}: {len(missing)} of {world_size} processes wrote nothing in {PATIENCE_S:.0f} s; "
                "the run folder must lie on a disk that all of them share"
            )
        time.sleep(0.05)
    for marker in writing.glob("rank-*.done"):
        marker.unlink()


def _explained(error: BaseException, folder: Path) -> BaseException:
    if not isinstance(error, OSError) and "No space left" not in str(error):  # safetensors has its own error
        return error
    return OSError(
        f"a checkpoint could not be written to {folder} ({error}); the last good one stays: free some space or choose another disk, "
        "then go on with --resume"
    )
