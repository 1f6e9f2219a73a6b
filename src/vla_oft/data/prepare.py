"""From a path to what a robot trains on: read, without what is damaged if so wished, in the robot's language, without what is left out."""

from pathlib import Path

from vla_oft.data.adapt import for_robot
from vla_oft.data.base import ReadOptions, Source, open_source
from vla_oft.data.check import without_damaged
from vla_oft.data.select import Filters, select_episodes, select_steps
from vla_oft_client import RobotSpec


def open_for(
    spec: RobotSpec,
    path: str | Path,
    read: ReadOptions | None = None,
    filters: Filters | None = None,
    layout: str | None = None,
) -> Source:
    """The dataset at `path` as robot `spec` sees it. Raises ValueError when it cannot be, naming the field to change.

    Whole episodes are chosen first, by the recording as it is; pauses last, by the robot's own actions.
    """
    filters = filters or Filters()
    if filters.every > 1 and spec.action_kind.startswith("delta"):
        raise ValueError(f"every={filters.every} would lose motion: the actions of robot '{spec.name}' are increments, not targets")
    chosen = select_episodes(open_checked(path, read), filters)
    return select_steps(for_robot(chosen, spec, layout=layout), filters)


def open_checked(path: str | Path, read: ReadOptions | None = None) -> Source:
    """The dataset at `path`; with `read.skip_bad`, without its damaged episodes."""
    source = open_source(path, read)
    return without_damaged(source) if read is not None and read.skip_bad else source
