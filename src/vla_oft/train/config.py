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
from vla_oft.train.guard import Guard
from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW, Muon
from vla_oft.train.parallel import Parallel
from vla_oft.train.schedule import Cosine, MultiStep, Reference
from vla_oft.train.sinks import TensorBoard, Trackio, Wandb
from vla_oft.train.stopping import EarlyStop
from vla_oft.train.validation import Validation
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

    What is learned
        batch_size: samples of one optimizer step, over all processes. The same run on one GPU or on eight, bar rounding: a process takes
        its share in passes of at most `micro_batch` samples (None: in one), whose gradients are added. Steps, rows and checkpoints count
        optimizer steps. lr: the peak learning rate. clip_norm: largest gradient norm, or None.
        lora: train low-rank updates of the backbone instead of all of it. freeze: parts of the backbone that do not train at all, not even
        by LoRA; all three leave action head, state projector and FiLM, which always train.
        neighbours: samples are drawn in runs of so many successive steps of an episode (1, 2, 4, ...), which reads video with few keyframes
        faster and makes a batch tell less (docs/data.md).
        augment: its random crop decides the central crop at inference. ema_decay: averaged weights are what checkpoints hold.
        chunk_len: actions per chunk; num_cameras: the first so many of the robot's cameras; None for what the robot's file says.
        use_state: False leaves the robot's state unread. state_normalization: of the state, None for the robot's, which the actions have.
        parity: data and policy behave as the reference's where this package
        deliberately differs (docs/parity.md).
    How it is computed
        precision: "bf16" computes in bfloat16, "auto" in the faster of both on the machine at hand. weights: what trained weights are kept
        in. With `float32`, bfloat16 is autocast. `bfloat16` halves their memory, but small updates are lost to rounding;
        `bfloat16+master` computes with bfloat16 copies of float32 weights that only the optimizer sees.
        recompute: activations that are computed again in the backward pass instead of kept: `selective` keeps the results of matrix
        products and attention, `full` keeps only what enters each block. compile: torch.compile, block by block.
        parallel: how several processes share the work.
    What is written
        save_every: optimizer steps between checkpoints. keep_last: how many of them stay; keep_every: those of multiples of so many steps
        stay as well, keep_best: and the one with the smallest validation error, both without what only a resumed run needs.
        save_dtype: of the weights in checkpoints; resuming is exact either way.
        log_every: steps between rows of metrics.jsonl. sink: where they also go. validation, stop, guard: see there.
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
    micro_batch: int | None = None
    lora: Lora | None = None
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    clip_norm: float | None = 1.0
    augment: AugmentConfig | None = None
    ema_decay: float | None = None
    chunk_len: int | None = None
    num_cameras: int | None = None
    use_state: bool = True
    state_normalization: Literal["bounds_q99", "bounds", "zscore"] | None = None
    parity: bool = False
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Literal["float32", "bfloat16", "bfloat16+master"] = "float32"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    parallel: Parallel = field(default_factory=Parallel)
    frame_cache: Literal["none", "ram", "disk"] = "none"
    num_workers: int = 0
    neighbours: int = 1
    log_every: int = 20
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    validation: Validation | None = None
    stop: EarlyStop | None = None
    guard: Guard = field(default_factory=Guard)
    sink: TensorBoard | Wandb | Trackio | None = None

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
        need(math.isfinite(self.lr) and self.lr > 0, "lr", "must be positive: nothing would be learned")
        need(self.num_workers >= 0, "num_workers", "must be 0 (one thread) or more")
        need(0 < self.neighbours <= 64 and not self.neighbours & (self.neighbours - 1), "neighbours", "must be 1, 2, 4, 8, 16, 32 or 64")
        need(self.micro_batch is None or self.micro_batch > 0, "micro_batch", "must be positive, or None")
        need(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive, or None")
        need(self.log_every > 0 and self.save_every > 0 and self.keep_last > 0, "save_every", "and log_every, keep_last must be positive")
        milestone = self.keep_every is None or (self.keep_every > 0 and self.keep_every % self.save_every == 0)
        need(milestone, "keep_every", f"must be a multiple of save_every={self.save_every}")
        need(
            not self.keep_best or (self.validation is not None and self.save_every % self.validation.every == 0),
            "keep_best",
            f"needs validation of every checkpoint: set it, with an `every` that divides save_every={self.save_every}",
        )
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

    def passes(self, world_size: int) -> int:
        """Passes of one process in one optimizer step. Raises ValueError when the batch cannot be divided equally."""
        share, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ValueError(f"batch_size={self.batch_size} cannot be divided among {world_size} processes; make it a multiple of them")
        size = min(self.micro_batch or share, share)
        if share % size:
            raise ValueError(
                f"a process's share of batch_size={self.batch_size}, {share} samples, is no multiple of micro_batch={size}; "
                f"use micro_batch={max(n for n in range(1, size + 1) if share % n == 0)}"
            )
        if size % self.neighbours:
            raise ValueError(f"neighbours={self.neighbours} does not divide the {size} samples of a pass; use 1, or a larger micro_batch")
        return share // size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(p.steps for p in self.phases)


def _is_mixture(shares: tuple[float, ...]) -> bool:
    return all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0
