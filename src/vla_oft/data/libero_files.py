"""LIBERO's recordings, and those of robosuite and robomimic, as a `Source`: files sorted by name, demonstrations by number.

Everything is as stored, in the simulator's conventions: images are upside down (`macros_image_convention` is "opengl"), the gripper's
command is -1 to open and +1 to close, and pauses are still there. The robot's layout (`robots/libero.py`) turns them, not this file.

state     ee_states (position, axis-angle) and gripper_states: 8 numbers; robosuite's own names: position, quaternion, fingers: 9
extras    whatever else has one row per step and the same width in all files; the simulator's `states` often have not
language  the words of the file's name, as the benchmark and the converted demonstrations have it; without any, `problem_info`

The two differ in LIBERO-Spatial, where `problem_info` says "Pick the akita black bowl ..." and the name "pick up the black bowl ...": a
policy trained on the former would be asked the latter. `episode_info["problem_says"]` holds the former where they differ.
"""

import json
import re
from pathlib import Path
from typing import Any

import h5py

from vla_oft.data import hdf5
from vla_oft.data.base import ReadOptions, Source
from vla_oft.data.files import Files
from vla_oft.data.hdf5_index import Facts, Scheme, index_of
from vla_oft.data.hdf5_source import Hdf5Source

SCHEME = Scheme(
    action="actions",
    required=(),
    states=(("obs/ee_states", "obs/gripper_states"), ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos")),
    images="obs",
    jpeg=False,
    groups=("obs",),
    top=("actions", "dones", "rewards", "robot_states", "states"),
)

_DEMO = re.compile(r"demo_\d+")
_NAME = re.compile(r"(?:[A-Z_]+_SCENE\d+_)?(?P<words>.+)_demo")


def open_source(files: Files, options: ReadOptions) -> Source:
    """The recordings of a folder. See `data.base.open_source`; the colours are RGB and there are no splits."""
    if options.colour_order == "bgr":
        raise ValueError(f"{files.root}: LIBERO's images are RGB; leave colour_order out (--colour-order)")
    if options.split is not None:
        raise ValueError(f"{files.root}: LIBERO's recordings have no splits, but split='{options.split}' was given; leave it out (--split)")
    for pattern in ("*.hdf5", "*.h5"):
        files.fetch(pattern)
    paths = hdf5.listing(files.root)
    index = index_of(files.root, paths, SCHEME, _look, kind="libero_hdf5", skip_bad=options.skip_bad, cache_dir=options.cache_dir)
    return Hdf5Source(files.root, files.name, "libero_hdf5", SCHEME, index, options)


def words_of(name: str) -> str | None:
    """The instruction in a file's name, None where it has none: KITCHEN_SCENE1_open_the_drawer_demo.hdf5 -> "open the drawer"."""
    found = _NAME.fullmatch(Path(name).stem)
    return " ".join(found["words"].split("_")).strip() or None if found else None


def _look(file: h5py.File, path: Path) -> Facts:
    where = str(path)
    data = hdf5.group(file, "data", where)
    with hdf5.damage_named(where):
        names = [str(name) for name in data if _DEMO.fullmatch(str(name))]
    if not names:
        raise ValueError(f"{where}: no demonstrations (data/demo_0, ...); record it again, or remove it")
    problem = _json(data, "problem_info", where)
    control_hz = _json(data, "env_args", where).get("env_kwargs", {}).get("control_freq")
    folder = str(hdf5.attribute(data, "bddl_file_name", where) or "").rpartition("/")[0]
    said, named = _language(problem), words_of(path.name)
    info = {"suite": folder.rpartition("/")[2], "problem": problem.get("problem_name")}
    if named and said != named:
        info["problem_says"] = said
    return Facts(
        groups=tuple(f"/data/{name}" for name in sorted(names, key=hdf5.numeric)),
        instruction=named or said,
        fps=float(control_hz) if isinstance(control_hz, int | float) and control_hz > 0 else None,
        info={key: value for key, value in info.items() if value},
    )


def _language(problem: dict[str, Any]) -> str | None:
    said = problem.get("language_instruction")
    return "".join(said).strip().strip('"').strip() or None if isinstance(said, str | list) else None


def _json(data: h5py.Group, name: str, where: str) -> dict[str, Any]:
    text = hdf5.attribute(data, name, where)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: attribute '{name}' of 'data' is not JSON; record or copy the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: attribute '{name}' of 'data' is no JSON object; record or copy the file again")
    return found
