"""A tiny real dataset and a training run on it that takes a second."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vla_oft.heads import grounding, l1
from vla_oft.robots.tabletop import SPEC
from vla_oft.train.config import Dataset, Fresh, Phase, TrainConfig
from vla_oft.train.schedule import Cosine

LENGTH = 12


def write_demos(
    out: Path, *, cameras: tuple[str, ...] = SPEC.cameras, state_dim: int = 8, masks: bool = True, kind: str = "demonstrations"
) -> Path:
    """Two episodes in which a bright image means "forward" and a dark one "back"."""
    from vla_oft.data.lerobot_writer import Episode, LeRobotWriter  # needs pyarrow and FFmpeg, which machines with a GPU may lack

    spec = dataclasses.replace(SPEC, cameras=cameras, state_dim=state_dim)
    rng = np.random.default_rng(0)
    with LeRobotWriter(out, spec, kind=kind) as writer:
        for number in range(2):
            level = 200 if number else 40
            images = {camera: np.full((LENGTH, 64, 64, 3), level, np.uint8) for camera in cameras}
            actions = rng.normal(0, 0.05, (LENGTH, 7)).astype(np.float32)
            actions[:, 0] += 0.5 if number else -0.5
            actions[:, 6] = 1 if number else -1
            extras = {
                "grounding": rng.integers(0, 2, (LENGTH, len(cameras), 2, 8, 8)).astype(np.uint8),
                "landmarks": rng.normal(size=(LENGTH, 2, 3)).astype(np.float32),
            }
            writer.append_episode(
                Episode(
                    images=images,
                    states=rng.normal(size=(LENGTH, state_dim)).astype(np.float32),
                    actions=actions,
                    instructions="touch the red block",
                    extras=extras if masks else {},
                )
            )
    return out


def config(demos: Path, **changes) -> TrainConfig:
    defaults = TrainConfig(
        name="test",
        robot="tabletop",
        model=Fresh(size="nano", head=l1.Config(), grounding=grounding.Config()),
        datasets=(Dataset(name="demos", path=str(demos)),),
        phases=(Phase(steps=6, mixture=(1.0,)),),
        batch_size=4,
        lr=1e-3,
        schedule=Cosine(warmup_steps=2),
        precision="fp32",
        frame_cache="ram",
        log_every=1,
        save_every=3,
        ema_decay=0.9,
    )
    return dataclasses.replace(defaults, **changes)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
