"""Recorded frames that cannot be decoded: what is known of one, and how many are too many."""

from dataclasses import dataclass

SHARE = 0.01
"""Of a dataset's steps, as many of which may be damaged as `skip_bad` passes over ..."""

FEW, FEW_SHARE = 32, 0.1
"""... or this many, if they are no more than this share of a small dataset."""

GO_ON = "or go on without such frames, with skip_bad (--skip-bad)"


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """One frame. source: number of its dataset among those that are read together. row: its step, counted over all episodes.

    reason: one line that names file, episode, step and camera, and says what is wrong with it.
    """

    source: int = 0
    row: int
    camera: str
    reason: str


def too_many(damaged: int, seen: int, size: int) -> bool:
    """Whether so many damaged steps among `seen` different ones, of a dataset of `size`, mean that the dataset is broken."""
    return damaged > max(SHARE * min(seen, size), min(FEW, FEW_SHARE * size))
