"""What a run leaves out: each damaged frame listed once, counted, and too many of them refused.

skipped.txt     demos/videos/front/file-000.mp4, episode 3, step 17, camera 'front': cannot decode (...); copy or record the file again
                ...                                         one line each, of all processes; a resumed run adds what is new
"""

import contextlib
import fcntl
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vla_oft.data.damage import Damaged, too_many

if TYPE_CHECKING:
    from vla_oft.data.chunks import ChunkDataset


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What became of one batch. drawn: samples of each source; replaced: of all of them; damaged: frames that were met."""

    drawn: tuple[int, ...]
    replaced: int
    damaged: tuple[Damaged, ...]


class SkippedFrames:
    """The list of one run, for all of its loaders.

    dataset: whose sources' own `skipped` and whose caches' damaged frames are listed at once. path: the file; without one, stderr alone.
    Several processes may share the file. Counts are of this process, since it started.
    """

    def __init__(self, dataset: "ChunkDataset", path: Path | None = None) -> None:
        self.path, self.replaced = path, 0
        self._sources = [source.path for source in dataset.sources]
        self._sizes = dataset.sizes
        self._drawn = [0] * len(self._sizes)
        self._met: list[set[int]] = [set() for _ in self._sizes]  # damaged steps that were drawn: caches know of others, too
        self._frames: set[tuple[int, int, str]] = set()
        self._lines: set[str] = set()
        self._list((line for source in dataset.sources for line in source.skipped), say=False)  # said when they were opened
        self._note(dataset.damaged)

    def add(self, draw: Draw) -> None:
        """Count a batch, and list what is new. Raises ValueError when too many of a dataset's steps are damaged."""
        self._drawn = [before + more for before, more in zip(self._drawn, draw.drawn, strict=True)]
        self.replaced += draw.replaced
        self._note(draw.damaged)
        for frame in draw.damaged:
            self._met[frame.source].add(frame.row)
            self._refuse_too_many(frame)

    def summary(self) -> str:
        """What was skipped, in one line; empty when nothing was."""
        if not self._frames:
            return ""
        place = "" if self.path is None else f", listed in {self.path}"
        return (
            f"skipped: {len(self._frames):,} frames that cannot be decoded{place}; "
            f"in {self.replaced:,} of {sum(self._drawn):,} samples others took their place"
        )

    def _note(self, damaged: Iterable[Damaged]) -> None:
        new = {(frame.source, frame.row, frame.camera): frame.reason for frame in damaged}
        new = {key: reason for key, reason in new.items() if key not in self._frames}
        self._frames |= new.keys()
        self._list(new.values(), say=True)

    def _list(self, lines: Iterable[str], *, say: bool) -> None:
        """Add what is new to the file, and say it unless the file already has it."""
        new = [line for line in dict.fromkeys(lines) if line not in self._lines]
        if not new:
            return
        self._lines.update(new)
        if self.path is not None:
            with self.path.open("a+") as file:
                with contextlib.suppress(OSError):  # a file system without locks: at worst, two processes list the same frame
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                text = file.read()
                known = set(text.splitlines())
                new = [line for line in new if line not in known]
                torn = "\n" if text and not text.endswith("\n") else ""
                file.write(torn + "".join(f"{line}\n" for line in new))
        for line in new if say else ():
            print(f"skipped {line}", file=sys.stderr, flush=True)

    def _refuse_too_many(self, latest: Damaged) -> None:
        count, drawn, size = len(self._met[latest.source]), self._drawn[latest.source], self._sizes[latest.source]
        if too_many(count, drawn, size):
            listed = "" if self.path is None else f"; {self.path} lists them all"
            raise ValueError(
                f"dataset {self._sources[latest.source]}: {count} of its {size} steps cannot be decoded, and only {drawn} were drawn: "
                f"too many to leave out; copy or record them again, or choose others with episodes (--episodes){listed}; "
                f"for example {latest.reason}"
            )
