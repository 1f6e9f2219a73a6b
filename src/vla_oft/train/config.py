"""What a training run is: one frozen value, written into the run folder, compared on resume."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_oft import robots
from vla_oft.config import PLUGIN
from vla_oft.data.augment import AugmentConfig
from vla_oft.data.base import ReadOptions
from vla_oft.data.select import Filters
from vla_oft.heads import grounding
from vla_oft.policy import HeadConfig
from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW, Muon
from vla_oft.train.schedule import Cosine, MultiStep, Reference
from vla_oft.vlm import tokens
from vla_oft_client import RobotSpec


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset.

    path: its folder, or `owner/name[@revision]` on the hub. read: what the folder does not say about itself, for example
    `read.cameras=[["front", "top"]]` where the names differ. layout: how it becomes the robot's, where that is not found out by itself:
    a layout's name, or "as-is". filters: what to leave out.
    """

    name: str
    path: str
    read: ReadOptions = field(default_factory=ReadOptions)
    layout: str | None = None
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training. mixture: share of draws per dataset, in the order of `TrainConfig.datasets`."""

    steps: int
    mixture: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A model with random weights. The tokenizer, of `vocab_size`, is trained on the datasets' instructions and on `corpus`."""

    size: Literal["nano"]
    head: Annotated[HeadConfig, PLUGIN]
    grounding: grounding.Config | None
    prompt_style: tokens.PromptStyle = "plain"
    vocab_size: int = 768
    corpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Fine-tune the policy in folder `path`.

    statistics: `own` normalises with the new data's statistics; `base` keeps those of the pretrained policy, which keeps its action head
    and state projector calibrated when robot and task family are the same. prompt_style: None keeps the pretrained one; `blind` trains a
    policy that never sees the instruction, the control for language grounding. head: None keeps the pretrained one; another is new: OFT
    replaces OpenVLA's tokens by `l1`. film: None keeps what the pretrained one does; True adds FiLM at the identity (OFT+).
    """

    path: str
    statistics: Literal["own", "base"] = "own"
    prompt_style: tokens.PromptStyle | None = None
    head: Annotated[HeadConfig | None, PLUGIN] = None
    film: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run.

    batch_size: samples in one pass; accumulate: passes in one optimizer step, whose gradients are averaged (steps, rows and checkpoints
    count optimizer steps). lr: the peak learning rate. clip_norm: largest gradient norm, or None. precision: "bf16" is autocast over
    float32 weights, "auto" the faster of both on the machine at hand. lora: train low-rank updates of the backbone instead of all of it.
    augment: its random crop decides the central crop at inference. ema_decay: averaged weights are what checkpoints hold.
    chunk_len: actions per chunk; num_cameras: the first so many of the robot's cameras; None for what the robot's file says. use_state:
    False leaves the robot's state unread. parity: data and policy behave as the reference's where this package deliberately differs
    (docs/parity.md).
    """

    name: str
    robot: str
    model: Fresh | Pretrained
    datasets: tuple[Dataset, ...]
    phases: tuple[Phase, ...]
    batch_size: int
    lr: float
    schedule: Cosine | MultiStep | Reference
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    lora: Lora | None = None
    accumulate: int = 1
    clip_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    augment: AugmentConfig | None = None
    ema_decay: float | None = None
    frame_cache: Literal["none", "ram", "disk"] = "none"
    num_workers: int = 0
    chunk_len: int | None = None
    num_cameras: int | None = None
    use_state: bool = True
    parity: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000
    keep_last: int = 2

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, fix: str) -> None:
            if not ok:
                raise ValueError(f"TrainConfig.{field}={getattr(self, field)!r} {fix}")

        need(len(self.datasets) > 0, "datasets", "is empty: name at least one dataset folder")
        need(len(self.phases) > 0 and all(p.steps > 0 for p in self.phases), "phases", "needs at least one phase, each with positive steps")
        need(
            all(len(p.mixture) == len(self.datasets) for p in self.phases),
            "phases",
            f"needs one mixture weight for each of {len(self.datasets)} datasets",
        )
        need(all(_is_mixture(p.mixture) for p in self.phases), "phases", "needs finite mixture shares, none negative, one above 0")
        need(self.seed >= 0, "seed", "must not be negative")
        need(self.batch_size > 0, "batch_size", "must be positive")
        need(self.chunk_len is None or self.chunk_len > 0, "chunk_len", "must be positive, or None for the robot's")
        need(self.lr > 0, "lr", "must be positive")
        need(self.num_workers >= 0, "num_workers", "must be 0 (one thread) or more")
        need(self.accumulate > 0, "accumulate", "must be positive")
        need(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive, or None")
        need(self.log_every > 0 and self.save_every > 0 and self.keep_last > 0, "save_every", "and log_every, keep_last must be positive")
        need(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "must lie between 0 and 1, or be None")

    def robot_spec(self) -> RobotSpec:
        """The robot as this run's policy sees it. Raises ValueError for an unknown robot or more cameras than it has."""
        spec = robots.load(self.robot)
        count = len(spec.cameras) if self.num_cameras is None else self.num_cameras
        if not 1 <= count <= len(spec.cameras):
            raise ValueError(f"num_cameras={count}: robot '{spec.name}' has {len(spec.cameras)}: {', '.join(spec.cameras)}")
        return dataclasses.replace(
            spec,
            cameras=spec.cameras[:count],
            state_dim=spec.state_dim if self.use_state else 0,
            chunk_len=self.chunk_len or spec.chunk_len,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(p.steps for p in self.phases)


def _is_mixture(shares: tuple[float, ...]) -> bool:
    return all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0
