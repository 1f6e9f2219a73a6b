"""Episodes as they are recorded, and their encoding, which may run in other processes than the writer's."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from vla_oft.data.clips import KEYINT, Clip, encode_clip
from vla_oft.data.lerobot_meta import image_stats
from vla_oft_client import RobotSpec


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What every episode of a dataset has.

    cameras: camera names. state_dim: S, 0 without a state; action_dim: D. state_names, action_names: one for each dimension, or empty.
    robot_type: a word for the robot. normalize_mask: per action dimension, whether statistics normalise it; None: nobody said so yet,
    and no statistics are written.
    """

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    robot_type: str = "unknown"
    normalize_mask: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.action_dim < 1 or self.state_dim < 0:
            raise ValueError(f"a dataset needs actions: action_dim={self.action_dim}, state_dim={self.state_dim}")
        for name, size in (("state_names", self.state_dim), ("action_names", self.action_dim), ("normalize_mask", self.action_dim)):
            values = getattr(self, name)
            if values and len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries for {size} dimensions: {values}")

    @classmethod
    def of(cls, spec: RobotSpec) -> "Schema":
        """That of a robot's own recordings."""
        return cls(
            cameras=spec.cameras,
            state_dim=spec.state_dim,
            action_dim=spec.action_dim,
            robot_type=spec.name,
            normalize_mask=spec.normalize_mask,
        )


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One recorded episode of T steps.

    images: camera -> uint8 (T, H, W, 3); states: float32 or float64 (T, S), or None; actions: the same (T, D), robot units.
    instructions: one for the whole episode, or one per step. extras: name -> (T, ...). info: what to remember, e.g. {"seed": 7}.
    """

    images: dict[str, np.ndarray]
    states: np.ndarray | None
    actions: np.ndarray
    instructions: str | Sequence[str]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, int | float | str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Pictures:
    """The frames of one camera as PNG files, without loss; what `Clip` is for video."""

    data: tuple[bytes, ...]
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        """Pictures there are."""
        return len(self.data)


@dataclass(frozen=True)
class Block:
    """Encoded episodes: what travels from a recording process to the writer. Episode images are empty; image_stats are (E, stats, 3)."""

    episodes: tuple[Episode, ...]
    clips: dict[str, Clip] | dict[str, Pictures]
    image_stats: dict[str, np.ndarray]


def encode(episodes: Sequence[Episode], fps: float, crf: int = 18, keyint: int = KEYINT, images: bool = False) -> Block:
    """Encode the images of `episodes` into one clip per camera, each episode starting at a keyframe.

    crf: quality of the video, 0 lossless to 51. images: PNG pictures instead of video: lossless, of any size, and 10 to 50 times as large.
    """
    starts = np.cumsum([0] + [len(e) for e in episodes[:-1]]).tolist()
    clips, stats = {}, {}
    for camera in episodes[0].images:
        frames = [image for e in episodes for image in e.images[camera]]
        clips[camera] = _encode_pictures(frames) if images else encode_clip(frames, fps, starts, crf, keyint)
        stats[camera] = np.stack([image_stats(e.images[camera]) for e in episodes])
    return Block(tuple(replace(e, images={}) for e in episodes), clips, stats)


def check_episode(episode: Episode, schema: Schema, block: Block) -> None:
    """Raise ValueError unless every part of `episode` fits the dataset and has the same number of steps."""
    length, robot = len(episode), schema.robot_type
    if not length:
        raise ValueError("an episode has no steps; record at least one")
    if episode.actions.shape != (length, schema.action_dim):
        raise ValueError(f"actions must be (T, {schema.action_dim}) for robot '{robot}', got {episode.actions.shape}")
    expected = (length, schema.state_dim) if schema.state_dim else None
    found = None if episode.states is None else episode.states.shape
    if found != expected:
        raise ValueError(f"states must be {expected} for robot '{robot}', got {found}")
    if set(block.clips) != set(schema.cameras):
        raise ValueError(f"robot '{robot}' has cameras {list(schema.cameras)}, the episode has {sorted(block.clips)}")
    bad = {camera: clip.num_frames for camera, clip in block.clips.items() if clip.num_frames != sum(len(e) for e in block.episodes)}
    lists = {} if isinstance(episode.instructions, str) else {"instructions": len(episode.instructions)}
    lists |= {name: len(values) for name, values in episode.extras.items()}
    bad |= {name: found for name, found in lists.items() if found != length}
    if bad:
        raise ValueError(f"everything in an episode must have its {length} steps, got {bad}")
    for name, values in (("action", episode.actions), ("state", episode.states)):
        if values is not None and not np.isfinite(values).all():
            step, dim = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(f"{name} is not finite in step {step}, dimension {dim}: {values[step, dim]}; do not record broken episodes")


def _encode_pictures(frames: Sequence[np.ndarray]) -> Pictures:
    height, width = frames[0].shape[:2]
    encoded = []
    for frame in frames:
        if frame.shape[:2] != (height, width):
            raise ValueError(f"images of one camera must have one size, got {frame.shape[:2]} after {(height, width)}")
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())
    return Pictures(tuple(encoded), height, width)
