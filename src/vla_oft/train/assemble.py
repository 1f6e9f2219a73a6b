"""From a blueprint to the module that trains, in the only order in which the parts fit together.

LoRA, frozen parts -> types -> recomputation -> torch.compile -> FSDP2 -> weights -> DDP
"""

from dataclasses import dataclass

import torch
from torch import nn

from vla_oft.policy import Policy
from vla_oft.train import lora, parallel
from vla_oft.train.blueprint import Blueprint, fill
from vla_oft.train.config import TrainConfig
from vla_oft.train.freeze import freeze_parts
from vla_oft.train.parallel import Ranks
from vla_oft.train.recompute import apply_recompute, compile_blocks


@dataclass(frozen=True)
class Trainee:
    """policy: with its weights, on this process's device. module: what is called in training: the policy, or DDP around it.

    autocast: whether the pass runs under bfloat16 autocast.
    """

    policy: Policy
    module: nn.Module
    autocast: bool

    def autocasting(self, device: torch.device) -> torch.autocast:
        """Around what the policy does outside training."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)


def prepare(blueprint: Blueprint, config: TrainConfig) -> Blueprint:
    """What trains, and in which types; still without weights."""
    if config.lora:
        blueprint = lora.inject(blueprint, config.lora, config.freeze, config.seed)
    else:
        freeze_parts(blueprint.policy, config.freeze)
    return blueprint.with_dtypes(*kept_in(config))


def kept_in(config: TrainConfig) -> tuple[torch.dtype, torch.dtype]:
    """Types of the trained and of the frozen weights."""
    trained = torch.float32 if config.weights == "float32" else torch.bfloat16
    return trained, config.lora.dtype if config.lora else trained


def assemble(blueprint: Blueprint, config: TrainConfig, ranks: Ranks) -> Trainee:
    """Load a blueprint from `prepare` onto this process's device, ready to train."""
    policy = blueprint.policy
    apply_recompute(policy, config.recompute)
    if config.compile:
        compile_blocks(policy)
    sharded = ranks.world_size > 1 and config.parallel.strategy == "fsdp"
    if sharded:
        parallel.shard(policy, config.parallel, ranks, torch.bfloat16 if config.precision == "bf16" else None)
    fill(blueprint, ranks.device)
    policy.train()
    module = policy if sharded or ranks.world_size == 1 else parallel.replicate(policy, ranks)
    all_bfloat16 = all(p.dtype == torch.bfloat16 for p in policy.parameters() if p.is_floating_point())
    return Trainee(policy, module, autocast=config.precision == "bf16" and not all_bfloat16)
