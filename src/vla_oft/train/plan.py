"""What a `TrainConfig` comes to in numbers: passes of a step, learning rates, bytes of checkpoints.

batch_size 64 = 8 processes x 8 samples = 8 x (1 pass of 8)       micro_batch 8
              = 1 process x 64 samples  = 1 x (8 passes of 8)
"""

from dataclasses import dataclass

from vla_oft.train.anatomy import Part
from vla_oft.train.config import TrainConfig
from vla_oft.train.optimizer import Muon
from vla_oft.train.schedule import Cosine, MultiStep, Reference

MARGIN = 1.05
"""What files take beyond their tensors: headers, tokenizer, optimizer state of small layers."""
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How a step's samples are shared. share: samples of each process, in `passes` passes of `micro_batch` samples."""

    processes: int
    share: int
    passes: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of a run's checkpoints when they are most. shared: weights that no step changes, stored once for all. resumable: of a
    checkpoint with what a resumed run needs, `num_resumable` of which lie there; policy, num_policy: of those without.
    """

    shared: int
    resumable: int
    num_resumable: int
    policy: int
    num_policy: int

    @property
    def total(self) -> float:
        """Of all files."""
        return MARGIN * (self.shared + self.num_resumable * self.resumable + self.num_policy * self.policy)


def batches(config: TrainConfig, processes: int) -> Batches:
    """Of one optimizer step. Raises ValueError when the samples cannot be shared evenly."""
    passes, share = config.passes(processes), config.batch_size // processes
    return Batches(processes=processes, share=share, passes=passes, micro_batch=share // passes)


def rates(config: TrainConfig) -> list[tuple[int, float]]:
    """(step, learning rate) wherever its slope changes: the first and the last step, the end of the warm-up, every fall."""
    schedule, total = config.schedule, config.total_steps
    steps = {0, schedule.warmup_steps, *falls(schedule), total - 1}
    return [(step, config.lr * schedule.factor(step, total)) for step in sorted(steps) if step < total]


def falls(schedule: Cosine | MultiStep | Reference) -> tuple[int, ...]:
    """Steps at which the learning rate falls at once."""
    if isinstance(schedule, MultiStep):
        return schedule.milestones
    return (schedule.decay_at,) if isinstance(schedule, Reference) and not schedule.warmup_steps else ()


def disk(config: TrainConfig, parts: list[Part]) -> Disk:
    """What the checkpoints of a run take. An estimate: a few per cent above the truth."""
    trained, total = sum(p.trained + p.adapter for p in parts), sum(p.total for p in parts)
    if config.lora:
        shared = (total - sum(p.trained for p in parts)) * _BYTES["float32" if config.lora.base_dtype == "float32" else "bfloat16"]
        policy = trained * _BYTES["float32"]
    else:
        shared, policy = 0, total * _BYTES[config.save_dtype]
    moments = 1 if isinstance(config.optimizer, Muon) else 2
    each = {"float32": 4 + 4 * moments, "bfloat16": 2 + 2 * moments, "bfloat16+master": 2 + 4 + 4 * moments}[config.weights]
    resumable = policy + trained * (each + (4 if config.ema_decay is not None else 0))
    written = config.total_steps // config.save_every + 1
    every = 0 if config.keep_every is None else config.total_steps // config.keep_every
    return Disk(
        shared=shared,
        resumable=resumable,
        num_resumable=min(config.keep_last + 1, written),  # a new one is whole before the oldest goes
        policy=policy,
        num_policy=max(0, every - 1) + config.keep_best,
    )


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
