"""LIBERO's own recordings, and others that robosuite or robomimic wrote: one HDF5 file per task, many demonstrations in each.

KITCHEN_SCENE1_put_the_black_bowl_on_the_plate_demo.hdf5
    data/demo_0/actions, dones, rewards, states, obs/{agentview_rgb, eye_in_hand_rgb, ee_states, gripper_states, ...}
    data/demo_1/...
"""

from pathlib import Path

from vla_oft.data.base import ReadOptions, Source
from vla_oft.data.files import Files


def detect(root: Path) -> bool:
    """Whether the folder holds HDF5 files with a group `data`; where none can be read, whether their names are not ALOHA's."""
    paths = sorted(path for path in root.iterdir() if path.suffix in (".hdf5", ".h5"))
    if not paths:
        return False
    try:
        from vla_oft.data import hdf5
    except ImportError:
        names = None
    else:
        names = hdf5.contents(paths)
    return "data" in names if names is not None else not any("episode_" in path.name for path in paths)


def open_source(files: Files, options: ReadOptions) -> Source:
    """Open the folder; see `data.base.open_source`."""
    from vla_oft.data import libero_files

    return libero_files.open_source(files, options)
