"""Options that all commands have that read a dataset: part of the command line, see `cli.py`."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes

if TYPE_CHECKING:
    from vla_oft.data.base import ReadOptions, Source
    from vla_oft.data.select import Filters
    from vla_oft_client import RobotSpec


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a folder does not say about itself, and what to leave out of it: the same for all commands that read a dataset.

    Attributes:
        robot: read the dataset in the language of this robot: its cameras, its state, its units. As it is by default.
        layout: which of the layouts of robots/ROBOT.py it has, or "as-is"; found out by default.
        cameras: only these cameras, renamed: NAME=DATASET'S NAME,... for example front=agentview_rgb,wrist=eye_in_hand_rgb.
        colour_order: of compressed images whose format leaves it open (ALOHA).
        instruction: for recordings without language; replaces every instruction.
        fps: frames a second, where the format does not note it.
        split: for formats with several; the training split by default.
        episodes: ranges as in Python, joined by commas: 0:40 or 3,7,20:30.
        drop_failed: leave out the episodes that the dataset itself calls failed.
        drop_unlabelled: leave out the episodes without an instruction.
        drop_noops: leave out the steps in which nothing moves, as the paper does.
        every: keep one step of so many; only for absolute actions.
        skip_bad: leave out what is damaged and list it, instead of stopping.
        cache_dir: folder for indices of formats without one; .cache beside the dataset by default.
    """

    robot: str | None = None
    layout: str | None = None
    cameras: str | None = None
    colour_order: Literal["rgb", "bgr"] | None = None
    instruction: str | None = None
    fps: float | None = None
    split: str | None = None
    episodes: str | None = None
    drop_failed: bool = False
    drop_unlabelled: bool = False
    drop_noops: bool = False
    every: int = 1
    skip_bad: bool = False
    cache_dir: Path | None = None

    def options(self) -> "ReadOptions":
        """How the files are read. Raises ValueError."""
        from vla_oft.data.base import ReadOptions

        return ReadOptions(
            cameras=() if self.cameras is None else _pairs(self.cameras),
            colour_order=self.colour_order,
            instruction=self.instruction,
            fps=self.fps,
            split=self.split,
            skip_bad=self.skip_bad,
            cache_dir=self.cache_dir,
        )

    def filters(self) -> "Filters":
        """What is left out. Raises ValueError."""
        from vla_oft.data.select import Filters

        return Filters(
            episodes=self.episodes,
            drop_failed=self.drop_failed,
            drop_unlabelled=self.drop_unlabelled,
            drop_noops=self.drop_noops,
            every=self.every,
        )

    def open(self, path: str) -> "tuple[Source, RobotSpec | None]":
        """The dataset as asked for, and the robot in whose language it speaks. Lists what was skipped on stderr. Raises ValueError."""
        from vla_oft import robots
        from vla_oft.data.prepare import open_checked, open_for
        from vla_oft.data.select import select

        if self.robot is None:
            if self.layout is not None:
                raise ValueError(f"layout='{self.layout}' is one of a robot's: name the robot, too")
            spec, source = None, select(open_checked(path, self.options()), self.filters())
        else:
            spec = robots.load(self.robot)
            source = open_for(spec, path, self.options(), self.filters(), self.layout)
            if source.action_dim != spec.action_dim or source.state_dim not in (0, spec.state_dim):
                found, needed = (f"{x.state_dim} state and {x.action_dim} action dimensions" for x in (source, spec))
                raise ValueError(f"dataset {path} has {found}, robot '{spec.name}' has {needed}: choose another robot")
        list_skipped(source.skipped)
        return source, spec

    def named(self) -> dict[str, Any]:
        """The options that were given, as JSON types."""
        given = {name: value for name, value in asdict(self).items() if value != getattr(Reading, name)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if name != "cache_dir"}


ReadingOptions = OmitArgPrefixes[Reading]
AS_IT_IS = Reading()


def list_skipped(skipped: Iterable[str]) -> None:
    """What was left out, on stderr."""
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "front=image,wrist=wrist_image" -> pairs."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if not all(wanted.strip() and name.strip() for wanted, _, name in pairs):
        raise ValueError(f"cameras='{text}': write NAME=DATASET'S NAME, for example front=image,wrist=wrist_image")
    return tuple((wanted.strip(), name.strip()) for wanted, _, name in pairs)
