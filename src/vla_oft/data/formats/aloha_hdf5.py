"""ALOHA's and ACT's recordings: one HDF5 file per episode, as recorded or as split and shrunk for training.

TASK/episode_0.hdf5         action, observations/{qpos, qvel, effort, images/{cam_high, ...}}
TASK/train/episode_0.hdf5   likewise; there is a TASK/val beside it
"""

from pathlib import Path

from vla_oft.data.base import ReadOptions, Source
from vla_oft.data.files import Files


def detect(root: Path) -> bool:
    """Whether the folder, or its `train` or `val`, holds HDF5 files with observations; where none can be read, their names decide."""
    for folder in (root, root / "train", root / "val"):
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".hdf5", ".h5")) if folder.is_dir() else []
        if paths:
            return _holds_episodes(paths)
    return False


def open_source(files: Files, options: ReadOptions) -> Source:
    """Open the folder; see `data.base.open_source`."""
    from vla_oft.data import aloha_files

    return aloha_files.open_source(files, options)


def _holds_episodes(paths: list[Path]) -> bool:
    try:
        from vla_oft.data import hdf5
    except ImportError:
        names = None
    else:
        names = hdf5.contents(paths)
    if names is not None:
        return not names.isdisjoint({"action", "observations"})
    return any("episode_" in path.name for path in paths)
