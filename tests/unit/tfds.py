"""RLDS datasets as TFDS lays them out, written from scratch: the other side of the reader's coin."""

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_oft.data.tfrecord import masked_crc

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: Any) -> bytes:
    """A serialised Feature: of texts (list of bytes), floats, or integers and booleans."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, text) for text in values))
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return field(2, field(1, array.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in array.ravel())))


def example(features: Mapping[str, Any]) -> bytes:
    """A serialised tf.train.Example; values as `feature` takes them, or bytes of a serialised Feature."""
    parts = {name: values if isinstance(values, bytes) else feature(values) for name, values in features.items()}
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in parts.items()))


def frame(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"tensor": {"dtype": dtype, "encoding": "none", "shape": {"dimensions": [str(size) for size in shape]} if shape else {}}}


def picture(channels: int = 3, dtype: str = "uint8", encoding: str = "png") -> dict[str, Any]:
    return {"image": {"dtype": dtype, "encodingFormat": encoding, "shape": {"dimensions": ["8", "8", str(channels)]}}}


def tree(features: Mapping[str, Any]) -> dict[str, Any]:
    return {"featuresDict": {"features": dict(features)}}


TEXT = {"text": {}}
OBSERVATION = {"image": picture(), "wrist_image": picture(encoding=""), "state": tensor("float32", 2)}
STEPS = {"action": tensor("float32", 3), "is_last": tensor("bool"), "language_instruction": TEXT}


def features_json(observation: Mapping[str, Any] = OBSERVATION, steps: Mapping[str, Any] = STEPS, episode: Any = None) -> dict[str, Any]:
    inner = tree({**steps, "observation": tree(observation)})
    top = {"episode_metadata": tree({"file_path": TEXT})} if episode is None else episode
    return tree({**top, "steps": {"sequence": {"feature": inner, "length": "-1"}}})


def image(episode: int, step: int) -> np.ndarray:
    """uint8 (8, 8, 3): red says which episode, green which step."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., 0], picture[..., 1] = 40 * episode + 20, 10 * step
    return picture


def episode(number: int, steps: int, **changes: Any) -> dict[str, Any]:
    """An episode of `steps` steps, by feature key; `changes` by the key's last part, None leaves a feature out."""
    step = np.arange(steps)
    found: dict[str, Any] = {
        "steps/observation/image": [encode(image(number, t)) for t in range(steps)],
        "steps/observation/wrist_image": [encode(255 - image(number, t)) for t in range(steps)],
        "steps/observation/state": np.stack([step + 0.5, step * 0 + number], axis=1).astype("f"),
        "steps/action": np.stack([step * 0.1, -step * 0.1, step % 2 * 2 - 1], axis=1).astype("f"),
        "steps/is_last": step == steps - 1,
        "steps/language_instruction": [f"task {number % 2}".encode()] * steps,
        "episode_metadata/file_path": [f"/data/{number}.hdf5".encode()],
    }
    for key in list(found):
        if key.split("/")[-1] in changes:
            found[key] = changes[key.split("/")[-1]]
    return {key: values for key, values in found.items() if values is not None}


def write(
    folder: Path,
    shards: Sequence[Sequence[Mapping[str, Any]]],
    *,
    name: str = "inner_name",
    features: Mapping[str, Any] | None = None,
    splits: Iterable[str] = ("train",),
    **info: Any,
) -> list[Path]:
    """A version folder with every split holding the same shards of episodes; returns the shards' paths."""
    folder.mkdir(parents=True)
    paths = []
    for split in splits:
        for number, episodes in enumerate(shards):
            paths.append(folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}")
            paths[-1].write_bytes(b"".join(frame(example(features)) for features in episodes))
    lengths = [str(len(episodes)) for episodes in shards]
    listed = [{"name": split, "filepathTemplate": TEMPLATE, "shardLengths": lengths} for split in splits]
    facts = {"fileFormat": "tfrecord", "name": name, "splits": listed, "version": folder.name, **info}
    (folder / "dataset_info.json").write_text(json.dumps(facts))
    (folder / "features.json").write_text(json.dumps(features_json() if features is None else features))
    return paths
