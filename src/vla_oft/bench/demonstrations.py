"""The same made-up demonstrations in every format, for measuring how fast they are read.

Pictures are smooth blotches with a moving block and sensor noise, so that JPEG and video have as much to do as with a camera: about 17 kB a
frame of 224 pixels at quality 95. The writers are minimal and only promise what this package's readers need.
"""

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vla_oft.atomic import atomic_directory

CAMERAS = ("front", "wrist")
STATE_DIM, ACTION_DIM, FPS = 8, 7, 20
INSTRUCTION = "put the black bowl on the plate"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much: episodes of `length` steps, square frames of `size` pixels."""

    episodes: int = 16
    length: int = 120
    size: int = 224
    seed: int = 0


@dataclass(frozen=True)
class Demonstration:
    """frames: camera -> uint8 (T, H, W, 3); states float32 (T, 8); actions float32 (T, 7)."""

    frames: dict[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray


def write(folder: Path, kind: str, shape: Shape) -> Path:
    """Write the dataset of `kind` into `folder`/KIND, unless it is there; return its folder. Raises ValueError for an unknown kind."""
    if kind not in WRITERS:
        raise ValueError(f"unknown kind of dataset '{kind}'; choose from {', '.join(WRITERS)}")
    out = folder / f"{kind}-{shape.episodes}x{shape.length}-{shape.size}px-{shape.seed}"
    if not out.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(out) as temporary:
            WRITERS[kind](temporary, shape)
    return out


def demonstrations(shape: Shape) -> Iterator[Demonstration]:
    """The episodes, one at a time: the same for the same `shape`."""
    for episode in range(shape.episodes):
        rng = np.random.default_rng([shape.seed, episode])
        frames = {camera: _film(rng, shape) for camera in CAMERAS}
        walk = np.cumsum(rng.normal(0, 0.01, (shape.length, STATE_DIM)), axis=0)
        actions = np.clip(rng.normal(0, 0.3, (shape.length, ACTION_DIM)), -1, 1)
        actions[:, -1] = np.where(np.arange(shape.length) < shape.length // 2, -1, 1)
        yield Demonstration(frames, walk.astype(np.float32), actions.astype(np.float32))


def jpeg(image: np.ndarray) -> bytes:
    """One frame at quality 95, 4:2:0, as published datasets are."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _film(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(40, 216, (12, 12, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((shape.size, shape.size), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.normal(0, 2.5, (4, shape.size, shape.size, 3)).astype(np.int16)
    block, film = shape.size // 6, np.empty((shape.length, shape.size, shape.size, 3), np.uint8)
    for step in range(shape.length):
        frame = scene + noise[step % 4]
        at = int((shape.size - block) * (0.5 + 0.45 * np.sin(0.1 * step)))
        frame[at : at + block, at : at + block] = (200, 60, 40)
        film[step] = np.clip(frame, 0, 255)
    return film


def _lerobot(folder: Path, shape: Shape, images: bool = False) -> None:
    from vla_oft.data.lerobot_writer import LeRobotWriter
    from vla_oft.data.recording import Episode, Schema

    schema = Schema(cameras=CAMERAS, state_dim=STATE_DIM, action_dim=ACTION_DIM)
    with LeRobotWriter(folder / "set", schema, fps=FPS, images=images) as writer:
        for demo in demonstrations(shape):
            writer.append_episode(Episode(images=demo.frames, states=demo.states, actions=demo.actions, instructions=INSTRUCTION))
    for part in (folder / "set").iterdir():
        part.rename(folder / part.name)
    (folder / "set").rmdir()


def _lerobot_images(folder: Path, shape: Shape) -> None:
    _lerobot(folder, shape, images=True)


def _lerobot_v21_av1(folder: Path, shape: Shape) -> None:
    """As lerobot records by default: AV1, a keyframe every second frame, one file for each episode and camera."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "meta").mkdir()
    features = {f"observation.images.{c}": {"dtype": "video", "shape": [shape.size, shape.size, 3], "names": None} for c in CAMERAS}
    features |= {
        n: {"dtype": "float32", "shape": [d], "names": None} for n, d in (("observation.state", STATE_DIM), ("action", ACTION_DIM))
    }
    features |= {n: {"dtype": "int64", "shape": [1], "names": None} for n in ("frame_index", "episode_index", "index", "task_index")}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    info = {
        "codebase_version": "v2.1", "fps": FPS, "features": features, "chunks_size": 1000, "total_episodes": shape.episodes,
        "total_frames": shape.episodes * shape.length, "splits": {"train": f"0:{shape.episodes}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": INSTRUCTION}) + "\n")
    lines = [json.dumps({"episode_index": e, "tasks": [INSTRUCTION], "length": shape.length}) for e in range(shape.episodes)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data" / "chunk-000").mkdir(parents=True)
    steps = np.arange(shape.length)
    for episode, demo in enumerate(demonstrations(shape)):
        columns = {"observation.state": list(demo.states), "action": list(demo.actions), "timestamp": (steps / FPS).astype(np.float32)}
        index = {
            "frame_index": steps,
            "episode_index": steps * 0 + episode,
            "index": steps + episode * shape.length,
            "task_index": steps * 0,
        }
        pq.write_table(pa.table({**columns, **index}), folder / f"data/chunk-000/episode_{episode:06d}.parquet")
        for camera, frames in demo.frames.items():
            _av1(folder / f"videos/chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4", frames)


def _av1(path: Path, frames: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options={"g": "2", "crf": "30", "preset": "12"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _libero_hdf5(folder: Path, shape: Shape) -> None:
    import h5py

    with h5py.File(folder / f"{INSTRUCTION.replace(' ', '_')}_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": INSTRUCTION})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": FPS}})
        for episode, demo in enumerate(demonstrations(shape)):
            group = data.create_group(f"demo_{episode}")
            group["actions"] = demo.actions.astype(np.float64)
            group["obs/ee_states"], group["obs/gripper_states"] = demo.states[:, :6], demo.states[:, 6:]
            group["obs/agentview_rgb"], group["obs/eye_in_hand_rgb"] = demo.frames["front"], demo.frames["wrist"]


def _aloha_hdf5(folder: Path, shape: Shape) -> None:
    """Compressed, as the recorder pads it."""
    import h5py

    for episode, demo in enumerate(demonstrations(shape)):
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            file.attrs["compress"], file.attrs["sim"] = True, False
            file["action"], file["observations/qpos"] = demo.actions, demo.states
            for camera, frames in demo.frames.items():
                encoded = [jpeg(frame) for frame in frames]
                padded = np.zeros((len(encoded), max(map(len, encoded))), np.uint8)
                for row, data in zip(padded, encoded, strict=True):
                    row[: len(data)] = np.frombuffer(data, np.uint8)
                file.create_dataset(f"observations/images/{camera}", data=padded, chunks=(1, padded.shape[1]))


def _rlds(folder: Path, shape: Shape) -> None:
    import google_crc32c

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    names = {"front": "image", "wrist": "wrist_image"}
    with open(folder / "demos-train.tfrecord-00000-of-00001", "wb") as file:
        for demo in demonstrations(shape):
            steps = np.arange(shape.length)
            features: dict[str, bytes] = {
                **{f"steps/observation/{names[c]}": _bytes_list([jpeg(f) for f in frames]) for c, frames in demo.frames.items()},
                "steps/observation/state": _float_list(demo.states),
                "steps/action": _float_list(demo.actions),
                "steps/language_instruction": _bytes_list([INSTRUCTION.encode()] * shape.length),
                **{f"steps/{name}": _int_list(steps == at) for name, at in (("is_first", 0), ("is_last", shape.length - 1))},
                "steps/is_terminal": _int_list(steps == shape.length - 1),
                **{f"steps/{name}": _float_list(steps == shape.length - 1) for name in ("reward", "discount")},
                "episode_metadata/file_path": _bytes_list([b"made up"]),
            }
            record = _example(features)
            header = struct.pack("<Q", len(record))
            file.write(header + masked(header) + record + masked(record))
    split = {"name": "train", "shardLengths": [str(shape.episodes)], "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    info = {"fileFormat": "tfrecord", "name": "demos", "version": "1.0.0", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_rlds_features(shape)))


def _rlds_features(shape: Shape) -> dict:
    def tensor(dtype: str, *dims: int) -> dict:
        return {"tensor": {"dtype": dtype, "encoding": "none", "shape": {"dimensions": [str(d) for d in dims]} if dims else {}}}

    def group(**features: dict) -> dict:
        return {"featuresDict": {"features": features}}

    image = {"image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": [str(shape.size)] * 2 + ["3"]}}}
    step = group(
        observation=group(image=image, wrist_image=image, state=tensor("float32", STATE_DIM)),
        action=tensor("float32", ACTION_DIM),
        language_instruction={"text": {}},
        **{name: tensor("bool") for name in ("is_first", "is_last", "is_terminal")},
        **{name: tensor("float32") for name in ("reward", "discount")},
    )
    return group(steps={"sequence": {"feature": step, "length": "-1"}}, episode_metadata=group(file_path={"text": {}}))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _bytes_list(values: list[bytes]) -> bytes:
    return _field(1, b"".join(_field(1, value) for value in values))


def _float_list(values: np.ndarray) -> bytes:
    return _field(2, _field(1, np.asarray(values, "<f4").tobytes()))


def _int_list(values: np.ndarray) -> bytes:
    return _field(3, _field(1, b"".join(_varint(int(value)) for value in values)))


def _example(features: dict[str, bytes]) -> bytes:
    entries = (_field(1, _field(1, name.encode()) + _field(2, feature)) for name, feature in sorted(features.items()))
    return _field(1, b"".join(entries))


WRITERS: dict[str, Callable[[Path, Shape], None]] = {
    "rlds": _rlds,
    "lerobot": _lerobot,
    "lerobot-images": _lerobot_images,
    "lerobot-v2.1-av1": _lerobot_v21_av1,
    "libero_hdf5": _libero_hdf5,
    "aloha_hdf5": _aloha_hdf5,
}
