"""How much memory a run needs, before anything is loaded; and what to change when it is too much.

One step of the real training code (LoRA, types, recomputation, forward, backward, clipping, optimizer, averages) runs on fake tensors while
every allocation is followed, see `memory_trace.py`. Nothing is estimated by a formula but

    context       what the CUDA driver and the kernels take outside of PyTorch's allocator       CONTEXT
    libraries     workspaces of cuBLAS, inside of it                                              LIBRARIES
    fragments     room that the allocator holds but cannot use                                    FRAGMENTS of the peak
    FSDP          weights, gradients and optimizer state divided by the number of processes, two whole blocks at a time
    DDP           gradients never freed: they live in the buckets

torch.compile is simulated as not compiled: it needs no more than that.
"""

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vla_oft.heads import diffusion
from vla_oft.policy import Batch, Policy, PolicyConfig
from vla_oft.train import anatomy, assemble
from vla_oft.train.batches import Finish
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import TrainConfig
from vla_oft.train.ema import Ema
from vla_oft.train.guard import StepGuard
from vla_oft.train.memory_trace import ANY_BATCH, Recorder, Trace
from vla_oft.train.parallel import Ranks, blocks
from vla_oft.train.step import Stepper
from vla_oft.weights import LazyTensor

CONTEXT = {"cuda": 600_000_000, "cpu": 400_000_000}
"""On a CPU: the interpreter with its libraries."""
LIBRARIES = {"cuda": 64 << 20, "cpu": 0}
FRAGMENTS = {"cuda": 0.03, "cpu": 0.05}
PROMPT_LEN = 30
"""Tokens of a prompt with BOS where the data is not at hand: an instruction of about eight words in OpenVLA's template."""
GATHERED_BLOCKS = 2
"""Whole blocks that FSDP2 holds at a time: one computes, the next is on its way."""
RECOMPUTES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
REMEMBERED = 16
"""Simulations that a process keeps: advice asks again for what a table has shown."""
KINDS = {
    "weights": "weights",
    "casts": "weights in bfloat16, kept by autocast",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "averaged weights",
    "batch": "inputs",
    "activations": "activations kept for the backward pass",
    "temporaries": "passing",
    "sharding": "blocks gathered by FSDP",
    "libraries": "workspaces of libraries",
}
"""What memory is used for, in words."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Memory of one process. parts: bytes at the worst moment, by the names in `KINDS`. device: "cuda" or "cpu"."""

    device: str
    micro_batch: int
    world_size: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the worst moment: what `torch.cuda.max_memory_allocated` tells after a step."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that the device must have free before the process starts."""
        return int(self.peak * (1 + FRAGMENTS[self.device])) + CONTEXT[self.device]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "peak": self.peak, "needed": self.needed}


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One step of a run, followed byte by byte, for every batch size. Sizes in bytes, of what one process without sharding holds."""

    config: TrainConfig
    policy: PolicyConfig
    device: str
    trace: Trace
    gradients: int
    largest_gradient: int
    gathered: int

    def predict(self, micro_batch: int | None = None, world_size: int = 1) -> Prediction:
        """For passes of `micro_batch` samples (the configuration's by default) in each of `world_size` processes."""
        share = max(1, self.config.batch_size // world_size)
        micro = min(micro_batch or self.config.micro_batch or share, share)
        sharded = world_size > 1 and self.config.parallel.strategy == "fsdp"
        part = 1 / (self.config.parallel.shard_size or world_size) if sharded else 1.0
        shares = {"weights": part, "gradients": part, "optimizer": part, "average": part}
        if sharded:
            shares["casts"] = 0.0  # blocks are gathered in the type they compute in
        kept = share > micro or (world_size > 1 and not sharded)  # gradients of earlier passes, or DDP's buckets
        if kept:
            shares["gradients"] = 0.0
        parts = self.trace.peak(micro, shares)
        if kept:
            parts["gradients"] = int(self.gradients * part) + self.largest_gradient
        if sharded:
            parts["sharding"] = self.gathered
        parts["libraries"] = LIBRARIES[self.device]
        return Prediction(device=self.device, micro_batch=micro, world_size=world_size, parts={k: v for k, v in parts.items() if v})


@functools.lru_cache(maxsize=REMEMBERED)
def simulate(config: TrainConfig, policy: PolicyConfig, *, device: str = "cuda", prompt_len: int = PROMPT_LEN) -> Simulation:
    """Run one step of `config` on a policy like `policy` in fake memory. Takes seconds; no GPU is needed to ask about one.

    device: "cuda" or "cpu". prompt_len: tokens of the longest prompt, with BOS. precision "auto" counts as bf16 on a GPU, fp32 on a CPU.
    """
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16" if device == "cuda" else "fp32")
    plain = dataclasses.replace(config, compile=False)
    if isinstance(policy.head, diffusion.Config):
        diffusion.alphas_cumprod(policy.head.train_steps)  # computed once and kept, so not on fake tensors
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        blueprint = assemble.prepare(_blueprint(policy), plain)
        with Recorder(cuda=device == "cuda") as recorder:
            sizes = _step(plain, blueprint, ANY_BATCH, prompt_len, recorder)
            trace = recorder.trace(ANY_BATCH)
    return Simulation(config=config, policy=policy, device=device, trace=trace, **sizes)


def free_bytes(device: torch.device) -> int | None:
    """What a process could still take of the device; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def gigabytes(count: float) -> str:
    """In units of 1e9 bytes."""
    return f"{count / 1e9:.1f} GB"


def _step(config: TrainConfig, blueprint: Blueprint, batch: int, prompt_len: int, recorder: Recorder) -> dict[str, int]:
    """Everything that one step allocates, on whatever tensors `recorder` makes. Returns the sizes that `Simulation` names."""
    ranks, finish, count = Ranks(), Finish(blueprint.policy, config.augment), batch * blueprint.policy.config.chunk_len
    with recorder.phase("weights"):
        trainee = assemble.assemble(blueprint, config, ranks)
    trained = {name: p for name, p in trainee.policy.named_parameters() if p.requires_grad}
    with recorder.phase("optimizer"):
        optimizer = config.optimizer.build(trainee.policy, config.lr, masters=config.weights == "bfloat16+master")
    with recorder.phase("average"):
        ema = Ema(trained, optimizer.weights(), config.ema_decay) if config.ema_decay is not None else None
    with recorder.phase("batch"):
        inputs = sample_batch(blueprint.policy.config, batch, prompt_len)
    recorder.follow_gradients(trained.values())
    with recorder.phase("activations"):
        stepper = Stepper(trainee, optimizer, _Guard(config.guard, ranks.device), ema, finish, ranks, config.clip_norm)
        stepper([inputs], [count], count, config.lr)
    if ema and config.validation:
        with recorder.phase("average"), ema.applied():
            pass
    sizes = [_bytes(p.shape, p.dtype) for p in trained.values()]
    return {"gradients": sum(sizes), "largest_gradient": max(sizes), "gathered": _gathered(trainee.policy, config)}


class _Guard(StepGuard):
    """Some optimizers read what a guard decides; fake tensors have nothing to read."""

    def check(self, *args: Any, **kwargs: Any) -> Any:
        """Never skip a step."""
        super().check(*args, **kwargs)


def _blueprint(policy: PolicyConfig) -> Blueprint:
    """A policy whose weights are nothing but memory."""
    skeleton = anatomy.without_memory(policy)
    return Blueprint(skeleton, {name: _memory(p.shape) for name, p in skeleton.named_parameters()})


def _memory(shape: torch.Size) -> LazyTensor:
    return LazyTensor(tuple(shape), torch.float32, lambda: torch.zeros(shape))


def sample_batch(policy: PolicyConfig, batch: int, prompt_len: int) -> Batch:
    """Inputs of the right shapes. prompt_len: with BOS."""
    dino, robot = policy.vlm.dino, policy.robot
    side, cells = dino.image_size, policy.grounding.cells * dino.image_size // dino.patch_size if policy.grounding else 0
    cameras = policy.num_cameras
    return Batch(
        pixels=torch.zeros(batch, cameras, 6, side, side),
        prompt_ids=torch.zeros(batch, prompt_len - 1, dtype=torch.int64),
        prompt_mask=None,
        state=torch.zeros(batch, robot.state_dim) if policy.use_state else None,
        actions=torch.zeros(batch, policy.chunk_len, robot.action_dim),
        valid=torch.ones(batch, policy.chunk_len, dtype=torch.bool),
        grounding=torch.zeros(batch, cameras, 2, cells, cells, dtype=torch.uint8) if cells else None,
        landmarks=torch.zeros(batch, 2, 3) if cells else None,
    )


def _gathered(policy: Policy, config: TrainConfig) -> int:
    """What FSDP2 needs beside its shards: two whole blocks, the gradients of one, and what belongs to no block, whole all the time."""
    width = torch.bfloat16 if config.precision == "bf16" else torch.float32
    inside = [list(block.parameters()) for block in blocks(policy)]
    in_blocks = {id(p) for block in inside for p in block}
    root = [p for p in policy.parameters() if id(p) not in in_blocks]

    def whole(parameters: list[nn.Parameter]) -> int:
        return sum(_bytes(p.shape, width if p.is_floating_point() else p.dtype) for p in parameters)

    def reduced(parameters: list[nn.Parameter]) -> int:
        """Gradients as they are computed, and in float32 as they are averaged."""
        return sum(_bytes(p.shape, width) + _bytes(p.shape, torch.float32) for p in parameters if p.requires_grad)

    return GATHERED_BLOCKS * max(map(whole, inside)) + whole(root) + max(reduced(block) for block in [*inside, root])


def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def real_step(config: TrainConfig, policy: PolicyConfig, batch: int, prompt_len: int = PROMPT_LEN) -> Trace:
    """The same step on real tensors on the CPU, followed in the same way: what the simulation must agree with."""
    blueprint = assemble.prepare(_blueprint(policy), config)
    with Recorder(fake=False) as recorder:
        _step(config, blueprint, batch, prompt_len, recorder)
        return recorder.trace()
