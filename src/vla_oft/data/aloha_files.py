"""ALOHA's and ACT's recordings as a `Source`: one file per episode, in numeric order.

TASK/episode_0.hdf5         as recorded, raw or compressed: `instruction` has to be given
TASK/train/episode_0.hdf5   split and shrunk for training: `split` chooses, and the folder's name is the instruction

Colours. The recorder stores what the camera's driver delivers, RGB; its own viewer takes it for that. To compress, it hands these
images to OpenCV, which expects BGR: a JPEG made so decodes with red and blue exchanged. Other recorders convert first. Nothing in the
file tells them apart, so compressed recordings need `colour_order`: what their JPEGs decode to. Raw ones are RGB unless it says otherwise.

Compressed images are rows of bytes, padded with zeros behind the JPEG's end marker, where decoders stop: `compress_len` adds nothing,
and its rows follow an order of cameras that the file does not hold. Depth images (not uint8) are left out.
"""

from pathlib import Path

import h5py

from vla_oft.data import hdf5
from vla_oft.data.base import ReadOptions, Source
from vla_oft.data.files import Files
from vla_oft.data.hdf5_index import JPEG, Facts, Index, Scheme, cameras, index_of
from vla_oft.data.hdf5_source import NO_INSTRUCTION, Hdf5Source

SCHEME = Scheme(
    action="action",
    required=("observations/qpos",),
    states=(("observations/qpos",),),
    images="observations/images",
    jpeg=True,
    groups=("observations", "observations/images"),
    top=("action", "relative_action", "base_action"),
)

SPLITS = ("train", "val")


def open_source(files: Files, options: ReadOptions) -> Source:
    """The recordings of a folder. See `data.base.open_source`."""
    task, paths = _find(files, options.split)
    index = index_of(files.root, paths, SCHEME, _look, kind="aloha_hdf5", skip_bad=options.skip_bad, cache_dir=options.cache_dir)
    words = " ".join(task.split("_")).strip() if task else None
    _require(files.root, index, options, words)
    return Hdf5Source(files.root, task or files.name, "aloha_hdf5", SCHEME, index, options, words)


def _find(files: Files, split: str | None) -> tuple[str | None, list[Path]]:
    """(the task that the folders name, if they do; the files to read)"""
    for pattern in ("*.hdf5", "*.h5", f"{split or 'train'}/*.hdf5", f"{split or 'train'}/*.h5"):
        files.fetch(pattern)
    here, own = files.root.resolve(), hdf5.listing(files.root)
    splits = {name: found for name in SPLITS if (found := hdf5.listing(files.root / name))}
    if split is not None and split not in splits and not (own and split == here.name):
        raise ValueError(f"{files.root} has no split '{split}'; it has {', '.join(splits) or 'none: leave split out (--split)'}")
    if own and (split is None or split not in splits):
        return (here.parent.name if here.name in SPLITS else None), own
    chosen = split or ("train" if "train" in splits else next(iter(splits), None))
    return files.name.rpartition("/")[2], splits[chosen] if chosen else []


def _require(root: Path, index: Index, options: ReadOptions, words: str | None) -> None:
    """Raise one ValueError for everything that the recordings do not say about themselves, and the options do not either."""
    wanted = {own for _, own in options.cameras}
    compressed = {
        name
        for layout in index.layouts
        for name, key in cameras(layout, SCHEME).items()
        if layout[key][1] == JPEG and (not wanted or wanted & {name, key})
    }
    lacking: list[str] = []
    if compressed and options.colour_order is None:
        lacking.append(
            f"the images of {', '.join(sorted(compressed))} are JPEG-compressed, and their colours may be exchanged: "
            "say what they decode to with colour_order='bgr' (ALOHA's own compression) or 'rgb', on the command line --colour-order bgr"
        )
    if words is None and options.instruction is None:
        lacking.append(NO_INSTRUCTION)
    if lacking and index.episodes:
        raise ValueError(f"{root / index.episodes[0].file}: {'; '.join(lacking)}")


def _look(file: h5py.File, path: Path) -> Facts:
    with hdf5.damage_named(str(path)):
        names = set(file)
    for name in ("action", "observations"):
        if name not in names:
            raise ValueError(f"{path}: '{name}' is missing; this is no ALOHA recording: move it elsewhere")
    sim = hdf5.attribute(file, "sim", str(path))
    return Facts(groups=("/",), info={} if sim is None else {"sim": bool(sim)})
