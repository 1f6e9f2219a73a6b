"""Demonstrations as every format offers them: episodes with cheap low-dimensional arrays and lazily decoded frames.

`open_source(path)` finds the format by asking the modules of `data/formats`. What comes back speaks the dataset's own language: its camera
names, its units. `data.adapt.for_robot` turns it into a robot's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vla_oft import hub
from vla_oft.data import formats
from vla_oft.data.files import Files, Folder, HubFiles

ColourOrder = Literal["rgb", "bgr"]
DISTURBED = "disturbed"
"""Name of the extra that marks steps in which something else was executed than recorded."""

SUCCESS = ("next.success", "success", "is_success")
REWARD = ("next.reward", "reward", "rewards")
"""Names under which recorders note, for every step, whether the task is done."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a folder does not say about itself.

    cameras: pairs (name wanted, dataset's own name): only these cameras, renamed; empty keeps all of them as they are.
    colour_order: of images whose format leaves it open (ALOHA's compressed recordings); None where the format settles it.
    instruction: for recordings without language; replaces every instruction where given.
    fps: frames a second, for formats that do not note it; must agree with those that do.
    split: which split, for formats with several; None reads the training split, or the only one.
    skip_bad: leave out what cannot be read, and list it in `Source.skipped`, instead of raising.
    cache_dir: folder for indices of formats without one; None for `.cache` beside the dataset, or the user's cache where that is read-only.
    """

    cameras: tuple[tuple[str, str], ...] = ()
    colour_order: ColourOrder | None = None
    instruction: str | None = None
    fps: float | None = None
    split: str | None = None
    skip_bad: bool = False
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps={self.fps} must be a positive number of frames a second")
        if self.instruction is not None and not self.instruction.strip():
            raise ValueError("instruction must not be empty")
        if len({name for name, _ in self.cameras}) != len(self.cameras):
            raise ValueError(f"cameras={self.cameras} names a camera twice")


class Source(Protocol):
    """One dataset. Safe to pickle and to use after a fork; memory does not grow with the number of frames.

    path: its folder. name: key of its statistics. format: name of the module that reads it.
    kind: "demonstrations", or "scenes" (single frames without meaningful actions, for grounding).
    fps: frames a second, None where neither the format nor the options say it.
    cameras: camera names; tasks: distinct instructions. state_dim is 0 when there is no state.
    state_names, action_names: one name for each dimension, or empty where the format has none.
    extras: name -> shape of additional per-step arrays. lengths: int64 (E,) steps of each episode.
    recording: what our own writer noted (`meta/vla_oft.json`); empty for other people's datasets.
    skipped: one line for everything that `skip_bad` left out.
    """

    path: Path
    name: str
    format: str
    kind: str
    fps: float | None
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    lengths: np.ndarray
    tasks: tuple[str, ...]
    extras: dict[str, tuple[int, ...]]
    recording: dict[str, Any]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        """Number of episodes E."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the contents, or how they are read, may have changed; independent of where the dataset lies."""
        ...

    def frames(self, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
        """Frames of one camera, uint8 (N, H, W, 3) RGB, in the order of `indices` (steps within the episode).

        Raises ValueError naming file and episode when they cannot be read, IndexError for steps that do not exist.
        """
        ...

    def states(self, episode: int) -> np.ndarray:
        """(T, S), float32 or float64 as stored, in the dataset's units."""
        ...

    def actions(self, episode: int) -> np.ndarray:
        """(T, D), float32 or float64 as stored, in the dataset's units."""
        ...

    def task_indices(self, episode: int) -> np.ndarray:
        """int64 (T,): which of `tasks` each step belongs to."""
        ...

    def extra(self, name: str, episode: int) -> np.ndarray:
        """Additional array (T, *extras[name]), dtype as stored."""
        ...

    def episode_info(self, episode: int) -> dict[str, Any]:
        """What the recorder noted: the simulator's seed, the file it came from; empty where nothing is known."""
        ...

    def damaged(self) -> Iterator[tuple[int, str]]:
        """(episode, what is wrong with which file and how to mend it), for every episode that cannot be read whole.

        Opens every file once and reads headers and low-dimensional data, but decodes only a frame here and there.
        """
        ...


class Direct(Protocol):
    """`frame_into`, which a `Source` may have: decoding to where a frame is needed is an eighth faster than by way of other memory."""

    def __call__(self, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
        """Decode one existing frame into `out`, uint8 (H, W, 3) contiguous; False, and nothing done, where it has another shape."""
        ...


def open_source(path: str | Path, options: ReadOptions | None = None) -> Source:
    """Open the dataset in folder `path`, or in hub repository `owner/name` or `owner/name@revision`, whatever its format.

    Raises ValueError when there is none, when it is empty, or when its index is damaged (unless `options.skip_bad`).
    """
    files, options = locate(path), options or ReadOptions()
    known = formats.load_all()
    for module in known.values():
        if module.detect(files.root):
            source: Source = module.open_source(files, options)
            if not len(source) or not int(source.lengths.sum()):
                count = len(source.skipped)
                skipped = f"; {count} were skipped, the first: {source.skipped[0]}" if count else ""
                raise ValueError(f"dataset {path} is empty: {len(source)} episodes, no frames; record or download it again{skipped}")
            return source
    found = sorted(p.name for p in files.root.iterdir())[:10]
    raise ValueError(f"{path} is not a dataset in a known format ({', '.join(known)}); it holds {found}")


def locate(path: str | Path) -> Files:
    """The files of a dataset. Raises ValueError when `path` is neither a readable folder nor a hub id."""
    folder = Path(path)
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)
            return Folder(folder)
        exists = folder.exists()
    except PermissionError:
        raise ValueError(f"dataset {path} cannot be read: no permission; change its owner or mode (chmod -R u+rX)") from None
    if not exists and hub.is_id(str(path)):
        return HubFiles(str(path))
    raise ValueError(f"dataset {path} {'is not a folder' if exists else 'does not exist'}; give the folder of a dataset, or owner/name")


def instruction(source: Source, episode: int, step: int = 0) -> str:
    """The instruction of one step."""
    return source.tasks[int(source.task_indices(episode)[step])]


def camera_names(found: dict[str, str], options: ReadOptions, where: str) -> dict[str, str]:
    """Camera name -> the format's own name, as `options.cameras` wants it. `found`: the same, for everything there is."""
    if not options.cameras:
        return found
    known = {**{feature: feature for feature in found.values()}, **found}
    missing = [name for _, name in options.cameras if name not in known]
    if missing:
        raise ValueError(f"dataset {where} has no camera {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    return {wanted: known[name] for wanted, name in options.cameras}


def check_steps(source: Source, episode: int, indices: Sequence[int] | np.ndarray, camera: str) -> np.ndarray:
    """The arguments of `Source.frames`, checked: int64 steps. Raises ValueError for an unknown camera, IndexError for unknown steps."""
    if camera not in source.cameras:
        raise ValueError(f"dataset {source.path} has no camera '{camera}'; it has {', '.join(source.cameras) or 'none'}")
    wanted = np.asarray(indices, np.int64)
    first, last = (wanted[0], wanted[0]) if wanted.size == 1 else (wanted.min(), wanted.max()) if wanted.size else (0, 0)
    if wanted.size and not 0 <= first <= last < source.lengths[episode]:
        end = source.lengths[episode] - 1
        raise IndexError(f"episode {episode} of {source.path} has steps 0..{end}, asked for {first}..{last}")
    return wanted
