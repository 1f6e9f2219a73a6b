"""How well does the policy act on demonstrations that it does not learn from? Mean action error by dimension and by chunk step.

    episodes of a dataset    0  1  2  3  4  5  6  7  8  9        share=0.2, by lot
    trained on               x  x     x  x  x  x     x  x        their statistics normalise the policy
    held out                       v              v              `samples` of their steps, evenly spread, always the same

Which episodes are held out depends on the seed, the dataset's name and their numbers. An episode's lot does not change when others are
appended.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_oft import preprocess
from vla_oft.data.base import Source
from vla_oft.data.chunks import ChunkDataset, Samples
from vla_oft.data.select import Filters, select_episodes
from vla_oft.policy import Batch, Policy
from vla_oft_client import RobotSpec

BY_DIM, BY_DIM_ROBOT, BY_STEP = "validation_l1_by_dim", "validation_l1_by_dim_robot", "validation_l1_by_step"
"""Names of the lists in metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """every: optimizer steps between two measurements. share: of each dataset's episodes, held out from training (at least one).
    samples: how many of their steps are predicted, always the same ones.
    """

    every: int = 1000
    share: float = 0.05
    samples: int = 256

    def __post_init__(self) -> None:
        if self.every < 1 or self.samples < 1:
            raise ValueError(f"validation.every={self.every} and validation.samples={self.samples} must be positive")
        if not 0 < self.share < 1:
            raise ValueError(f"validation.share={self.share!r} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Mean absolute errors of predicted actions, over the steps that are valid.

    action_l1: of all; first: of the first step of each chunk; by_dim (D), by_step (K): all in policy units, as in training. by_dim_robot
    (D): in the robot's units. Targets are what training aims at: with `bounds_q99`, clipped to the middle 98 % of the data.
    """

    action_l1: float
    first: float
    by_dim: tuple[float, ...]
    by_dim_robot: tuple[float, ...]
    by_step: tuple[float, ...]

    def row(self) -> dict[str, float | list[float]]:
        """As metrics.jsonl names them."""
        scalars: dict[str, float | list[float]] = {"validation_action_l1": self.action_l1, "validation_action_l1_first": self.first}
        return {**scalars, BY_DIM: [*self.by_dim], BY_DIM_ROBOT: [*self.by_dim_robot], BY_STEP: [*self.by_step]}


def split(sources: Sequence[Source], config: Validation, seed: int) -> tuple[list[Source], list[Source]]:
    """(what to train on, one for each of `sources`; what to validate on, without datasets that hold no demonstrations).

    Raises ValueError for a dataset of a single episode, and when there is nothing to validate on.
    """
    training, held_out = [], []
    for source in sources:
        if source.kind != "demonstrations":
            training.append(source)
            continue
        kept, out = split_episodes(len(source), config.share, seed, source)
        training.append(_only(source, kept))
        held_out.append(_only(source, out))
    if not held_out:
        raise ValueError("validation needs demonstrations, and no dataset holds any: set validation=null")
    return training, held_out


def split_episodes(count: int, share: float, seed: int, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(trained on, held out): numbers of `count` episodes, each ascending, int64. Raises ValueError when count < 2."""
    if count < 2:
        raise ValueError(f"dataset {source.path} has {count} episode: validation holds out one and needs another; set validation=null")
    lots = np.random.default_rng([seed, zlib.crc32(source.name.encode())]).random(count)
    num_out = min(max(1, round(share * count)), count - 1)
    out = np.sort(np.argsort(lots, kind="stable")[:num_out])
    return np.setdiff1d(np.arange(count), out), out


def dimension_names(spec: RobotSpec, sources: Sequence[Source]) -> tuple[str, ...]:
    """A name for each action dimension: the datasets' own where they have any, otherwise numbers and `gripper`."""
    for source in sources:
        if len(source.action_names) == spec.action_dim == len(set(source.action_names)):
            return tuple(source.action_names)
    grippers = [g.index for g in spec.gripper]
    return tuple(f"{d} gripper" if d in grippers else str(d) for d in range(spec.action_dim))


def held_out_dataset(policy: Policy, sources: Sequence[Source], *, skip_bad: bool = False) -> ChunkDataset:
    """The held-out demonstrations as `policy` sees them at inference: the central crop, no augmentation."""
    return ChunkDataset(
        sources,
        policy.config.robot,
        prepare=preprocess.Preparation(policy.config.preprocess, fast=not policy.config.parity),
        action_normalizer=policy.action_normalizer,
        state_normalizer=policy.state_normalizer,
        chunk_len=policy.config.chunk_len,
        parity=policy.config.parity,
        skip_bad=skip_bad,
    )


class Validator:
    """Predicts the same samples at every call and compares.

    dataset: held-out demonstrations. prepare: from samples to a batch on the policy's device, without augmentation.
    batch_size: samples in one pass of one process. rank, world_size: which share of the samples is this process's; every process makes the
    same number of passes, because sharded weights are gathered together. reduce: sums a vector over all processes.
    """

    def __init__(
        self,
        config: Validation,
        dataset: ChunkDataset,
        prepare: Callable[[Samples], Batch],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.dataset, self.prepare, self.batch_size, self.reduce = dataset, prepare, batch_size, reduce
        chosen = spread(len(dataset), config.samples)
        self.num_samples = len(chosen)
        mine = np.arange(-(-len(chosen) // world_size)) * world_size + rank
        self._counts = mine < len(chosen)  # the last share may be short: what fills it up is predicted, and not counted
        self._slots = np.minimum(mine, len(chosen) - 1)
        self._indices = chosen[self._slots]
        # diffusion starts from the same noise every time, whatever the size of batches and the number of processes
        shape = (len(chosen), dataset.chunk_len, dataset.spec.action_dim)
        self._noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")

    def measure(
        self,
        policy: Policy,
        *,
        weights: AbstractContextManager[object] | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Errors:
        """The errors now, the same in every process. Leaves training mode and torch's random state as they were.

        weights: inside it the policy has the weights that are to be judged (an EMA). autocast: as in training.
        """
        modes = [(module, module.training) for module in policy.modules()]
        devices = [policy.device] if policy.device.type == "cuda" else []
        policy.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), weights or nullcontext():
                sums = self._sums(policy, autocast)
        finally:
            for module, training in modes:
                module.training = training
        return self._errors(sums if self.reduce is None else self.reduce(sums))

    def _sums(self, policy: Policy, autocast: Callable[[], AbstractContextManager[object]]) -> Tensor:
        """Sums of absolute errors in policy units and in the robot's (K, D), and of valid steps (K), of this process: (K, D + D + 1)."""
        total: Tensor | None = None
        for start in range(0, len(self._indices), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self.prepare(self.dataset.batch(self._indices[part]))
            noise = self._noise[self._slots[part]].to(batch.actions.device)
            with autocast():
                predicted = policy.predict(batch, noise=noise)
            counted = torch.from_numpy(self._counts[part]).to(batch.valid.device)
            new = _sums(policy, predicted.float(), batch.actions.float(), batch.valid & counted[:, None])
            total = new if total is None else total + new
        assert total is not None
        return total

    def _errors(self, sums: Tensor) -> Errors:
        values = sums.double().cpu()
        ours, robot, count = values.split([(values.shape[1] - 1) // 2, (values.shape[1] - 1) // 2, 1], dim=1)
        dims = ours.shape[1]
        return Errors(
            action_l1=float(ours.sum() / (count.sum() * dims)),
            first=float(ours[0].sum() / (count[0, 0] * dims)),
            by_dim=tuple((ours.sum(0) / count.sum()).tolist()),
            by_dim_robot=tuple((robot.sum(0) / count.sum()).tolist()),
            by_step=tuple((ours.sum(1) / (count[:, 0] * dims)).tolist()),
        )


def spread(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` numbers, evenly spread, or all of them: int64, ascending."""
    wanted = min(wanted, count)
    return (np.arange(wanted) * 2 + 1) * count // (2 * wanted)


def _sums(policy: Policy, predicted: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
    """See `Validator._sums`; of one batch. What is not valid does not count even where it is not a number."""
    units = policy.action_normalizer.unnormalize
    errors = torch.cat([(predicted - actions).abs(), (units(predicted) - units(actions)).abs()], dim=-1)
    precision = torch.float32 if errors.device.type == "mps" else torch.float64  # so that the order of the passes does not matter
    kept = torch.where(valid[..., None], errors, 0).to(precision).sum(0)
    return torch.cat([kept, valid.sum(0)[:, None].to(precision)], dim=1)


def _only(source: Source, episodes: np.ndarray) -> Source:
    return select_episodes(source, Filters(episodes=",".join(map(str, episodes))))
