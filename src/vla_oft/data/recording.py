"""Episodes as they are recorded, and their encoding, which may run in other processes than the writer's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vla_oft.data.lerobot_meta import image_stats
from vla_oft.data.video import Clip, encode_clip
from vla_oft_client import RobotSpec


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One recorded episode of T steps.

    images: camera -> uint8 (T, H, W, 3); states: float32 (T, S) or None; actions: float32 (T, D), robot units.
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
class Block:
    """Encoded episodes: what travels from a recording process to the writer. Episode images are empty; image_stats are (E, stats, 3)."""

    episodes: tuple[Episode, ...]
    clips: dict[str, Clip]
    image_stats: dict[str, np.ndarray]


def encode(episodes: Sequence[Episode], fps: float, crf: int = 18, keyint: int = 10) -> Block:
    """Encode the images of `episodes` into one clip per camera, each episode starting at a keyframe."""
    starts = np.cumsum([0] + [len(e) for e in episodes[:-1]]).tolist()
    clips, stats = {}, {}
    for camera in episodes[0].images:
        frames = [image for e in episodes for image in e.images[camera]]
        clips[camera] = encode_clip(frames, fps, starts, crf, keyint)
        stats[camera] = np.stack([image_stats(e.images[camera]) for e in episodes])
    return Block(tuple(replace(e, images={}) for e in episodes), clips, stats)


def check_episode(episode: Episode, spec: RobotSpec, block: Block) -> None:
    """Raise ValueError unless every part of `episode` fits the robot and has the same number of steps."""
    length = len(episode)
    if not length:
        raise ValueError("an episode has no steps; record at least one")
    if episode.actions.shape != (length, spec.action_dim):
        raise ValueError(f"actions must be (T, {spec.action_dim}) for robot '{spec.name}', got {episode.actions.shape}")
    expected = (length, spec.state_dim) if spec.state_dim else None
    found = None if episode.states is None else episode.states.shape
    if found != expected:
        raise ValueError(f"states must be {expected} for robot '{spec.name}', got {found}")
    if set(block.clips) != set(spec.cameras):
        raise ValueError(f"robot '{spec.name}' has cameras {list(spec.cameras)}, the episode has {sorted(block.clips)}")
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
