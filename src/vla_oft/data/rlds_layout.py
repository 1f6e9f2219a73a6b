"""What an RLDS / TFDS folder says about itself, before any record is read.

    NAME/1.0.0/dataset_info.json                        name, splits, how many records in which shard
    NAME/1.0.0/features.json                            what a record holds: a tree of features
    NAME/1.0.0/libero_spatial-train.tfrecord-00000-of-00016

Shards are named after the dataset's name inside `dataset_info.json`, which need not be the folder's.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_VALUES = 1024
"""Arrays with more values a step are no low-dimensional data, and are left out: point clouds, maps, pictures without compression."""

_INFO, _FEATURES = "dataset_info.json", "features.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_MAX_JSON_BYTES = 1 << 26
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_STORED_AS = {**dict.fromkeys(_FLOATS, "float32"), **{name: name for name in _INTEGERS}}
"""A record has no other floats. Integers are cast back to what they were."""
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Feature:
    """One feature of a record.

    key: its name in the record ("steps/observation/image"). shape: of one value; -1 for sizes that vary. dtype: as it is read.
    per_step: else one an episode.
    """

    key: str
    kind: Literal["image", "array", "text"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    per_step: bool = True

    @property
    def name(self) -> str:
        """The key without what all keys have in common: "image", "reward"."""
        return self.key.removeprefix("steps/").removeprefix("observation/").removeprefix("episode_metadata/")


@dataclass(frozen=True)
class Layout:
    """One split. shards: file name and number of records of each. version: the folder's name below the dataset's, or "" if it is that."""

    version: str
    split: str
    shards: tuple[tuple[str, int], ...]
    features: tuple[Feature, ...]


def find_version(root: Path) -> Path | None:
    """The folder that holds `dataset_info.json`: `root` or the one version below it. None if this is no such dataset.

    Raises ValueError when there are several versions.
    """
    if _is_version(root):
        return root
    found = sorted(folder for folder in root.iterdir() if _VERSION.fullmatch(folder.name) and _is_version(folder))
    if len(found) > 1:
        raise ValueError(f"dataset {root} holds the versions {', '.join(folder.name for folder in found)}; give the folder of one of them")
    return found[0] if found else None


def is_dataset(root: Path) -> bool:
    """Whether `root` looks like a TFDS dataset, of one version or several."""
    return _is_version(root) or any(_VERSION.fullmatch(folder.name) and _is_version(folder) for folder in root.iterdir())


def dataset_folder(version: Path) -> Path:
    """The folder that carries the dataset's name: above the version's, unless a version was renamed."""
    folder = version.resolve()
    return folder.parent if _VERSION.fullmatch(folder.name) else folder


def read_layout(root: Path, wanted: str | None) -> Layout:
    """Read both files. `wanted`: which split; None for the training split, or the only one.

    Raises ValueError when a file is missing or damaged, or when there is no such split.
    """
    folder = find_version(root)
    assert folder is not None, "detect said so"
    info, tree = _read_json(folder / _INFO), _read_json(folder / _FEATURES)
    try:
        kind = str(info.get("fileFormat") or "tfrecord")
        splits = {str(split["name"]): split for split in info["splits"]}
    except _MALFORMED as error:
        raise _malformed(folder / _INFO, error) from None
    if kind != "tfrecord":
        raise ValueError(f"{folder / _INFO}: files in the format '{kind}'; only tfrecord can be read: prepare the dataset with that")
    split = _choose_split(folder / _INFO, list(splits), wanted)
    try:
        shards = tuple(_shards(str(info["name"]), splits[split]))
    except _MALFORMED as error:
        raise _malformed(folder / _INFO, error) from None
    try:
        features = tuple(_walk(tree, "", False))
    except _MALFORMED as error:
        raise _malformed(folder / _FEATURES, error) from None
    return Layout("" if folder == root else folder.name, split, shards, features)


def _is_version(folder: Path) -> bool:
    try:
        return (folder / _INFO).is_file() and ((folder / _FEATURES).is_file() or any(folder.glob("*.tfrecord*")))
    except PermissionError:
        raise ValueError(f"dataset {folder} cannot be read: no permission; change its owner or mode (chmod -R u+rX)") from None


def _choose_split(path: Path, names: list[str], wanted: str | None) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if (wanted or "train") not in names:
        what = f"no split '{wanted}'" if wanted else "several splits and none called 'train'"
        raise ValueError(f"{path}: {what}; choose one of {', '.join(names) or '(none)'}")
    return wanted or "train"


def _shards(dataset: str, split: dict[str, Any]) -> Iterator[tuple[str, int]]:
    template = str(split.get("filepathTemplate") or _DEFAULT_TEMPLATE)
    counts = [int(count) for count in split["shardLengths"]]
    for index, count in enumerate(counts):
        x, y = f"{index:05d}", f"{len(counts):05d}"
        values = {"DATASET": dataset, "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_INDEX": x, "NUM_SHARDS": y}
        name = template.replace("{SHARD_X_OF_Y}", f"{x}-of-{y}")
        for key, value in values.items():
            name = name.replace(f"{{{key}}}", str(value))
        if Path(name).name != name or "{" in name or count < 0:
            raise ValueError(f"a shard is called '{name}', with {count} records")
        yield name, count


def _walk(node: dict[str, Any], path: str, per_step: bool) -> Iterator[Feature]:
    """The features of a tree that are read: pictures, texts, arrays of fixed size. The rest (audio, ragged, embeddings) is left out."""
    if "featuresDict" in node:
        for name, child in (node["featuresDict"].get("features") or {}).items():
            yield from _walk(child, f"{path}/{name}" if path else name, per_step)
    elif "sequence" in node and path == "steps":
        yield from _walk(node["sequence"]["feature"], path, True)
    elif "image" in node:
        image = node["image"]
        yield Feature(path, "image", _shape(image), str(image.get("dtype") or "uint8"), per_step)
    elif "text" in node:
        yield Feature(path, "text", per_step=per_step)
    elif "classLabel" in node:
        yield Feature(path, "array", (), "int64", per_step)
    elif "tensor" in node:
        yield from _walk_tensor(node["tensor"], path, per_step)


def _walk_tensor(tensor: dict[str, Any], path: str, per_step: bool) -> Iterator[Feature]:
    shape, dtype, num_values = _shape(tensor), str(tensor["dtype"]), 1
    for size in shape:
        num_values *= size
    if (tensor.get("encoding") or "none").lower() != "none":
        return
    if dtype == "string" and not shape:
        yield Feature(path, "text", per_step=per_step)
    elif "embedding" not in path and dtype in _STORED_AS and min(shape, default=1) > 0 and num_values <= MAX_VALUES:
        yield Feature(path, "array", shape, _STORED_AS[dtype], per_step)


def _shape(node: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in (node.get("shape") or {}).get("dimensions") or [])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; copy the dataset again") from None
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod -R u+rX)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the dataset again") from None


def _malformed(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not as TFDS writes it ({type(error).__name__}: {error}); copy the dataset again")
