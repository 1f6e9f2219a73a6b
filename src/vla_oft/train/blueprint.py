"""A policy before it has any memory: its modules on the meta device, and where each weight will come from.

    build_policy -> Blueprint -> LoRA, dtypes, sharding: all without a byte of weights -> fill -> every process reads just its share

So a 7-billion-parameter policy is loaded straight onto the GPU, once, in the type it is kept in, and with FSDP no process ever holds
more than its part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vla_oft.policy import Policy
from vla_oft.weights import LazyTensor


@dataclass(frozen=True)
class Blueprint:
    """policy: modules, whatever device their parameters are on. weights: each parameter's values, by its name in `policy`, full size.

    A policy has no buffers; `requires_grad` of the parameters says what will be trained.
    """

    policy: Policy
    weights: Mapping[str, LazyTensor]

    @classmethod
    def of(cls, policy: Policy) -> "Blueprint":
        """One whose weights are in memory; `policy` itself ends on the meta device."""
        weights = {name: LazyTensor.of(parameter.detach()) for name, parameter in policy.named_parameters()}
        return cls(policy.to("meta"), weights)

    def with_dtypes(self, trained: torch.dtype, frozen: torch.dtype) -> "Blueprint":
        """The same, to be kept in these types; packed integers stay as they are."""
        weights = dict(self.weights)
        for name, parameter in self.policy.named_parameters():
            if not parameter.is_floating_point():
                continue
            dtype = trained if parameter.requires_grad else frozen
            parameter.data = parameter.data.to(dtype)
            weights[name] = weights[name].to(dtype)
        return replace(self, weights=weights)

    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(weight.num_bytes for weight in self.weights.values())


def fill(blueprint: Blueprint, device: torch.device) -> None:
    """Give the blueprint's policy its weights on `device`. Where FSDP has sharded a parameter, only this process's part is kept."""
    if any(isinstance(p, DTensor) for p in blueprint.policy.parameters()):
        blueprint.policy.to_empty(device=device)
    for name, parameter in list(blueprint.policy.named_parameters()):
        values = blueprint.weights[name].read()
        if isinstance(parameter, DTensor):
            _fill_shard(parameter, values)
        else:
            module, _, leaf = name.rpartition(".")
            new = nn.Parameter(_owned(values, device), requires_grad=parameter.requires_grad)
            setattr(blueprint.policy.get_submodule(module), leaf, new)


def _owned(values: Tensor, device: torch.device) -> Tensor:
    """On the device, contiguous, in memory of its own: a file that is mapped, or the values of another policy, must not be trained."""
    moved = values.to(device)
    return moved.clone(memory_format=torch.contiguous_format) if moved is values else moved.contiguous()


@torch.no_grad()
def _fill_shard(parameter: DTensor, values: Tensor) -> None:
    for chunk in parameter.__create_chunk_list__():  # none where there are more processes than rows
        parameter.to_local().copy_(values[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))])
