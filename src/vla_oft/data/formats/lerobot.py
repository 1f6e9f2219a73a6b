"""LeRobotDataset v2.0, v2.1 and v3.0, read without lerobot: video, or images inside parquet. See `data/lerobot_source.py`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla_oft.data.base import ReadOptions
    from vla_oft.data.files import Files
    from vla_oft.data.lerobot_source import LeRobotSource

_OLD = Path("meta_data") / "info.json"


def detect(root: Path) -> bool:
    """Whether `root` looks like a LeRobot dataset, of whatever version."""
    return (root / "meta" / "info.json").is_file() or (root / _OLD).is_file()


def open_source(files: "Files", options: "ReadOptions") -> "LeRobotSource":
    """Open the dataset; see `data.base.open_source`."""
    if not (files.root / "meta" / "info.json").is_file():
        raise ValueError(f"{files.root} is LeRobot v1 ({_OLD}); convert it to v2.1 or v3.0 with lerobot's own scripts")
    try:
        from vla_oft.data.lerobot_source import LeRobotSource
    except ModuleNotFoundError as error:
        raise ValueError(f"LeRobot datasets need {error.name}: pip install 'vla-oft[data]'") from None
    return LeRobotSource(files, options)
