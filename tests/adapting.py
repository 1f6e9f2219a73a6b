"""Policies with LoRA, made as a training run makes them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vla_oft.policy import Policy
from vla_oft.train import lora
from vla_oft.train.blueprint import Blueprint, fill
from vla_oft.train.lora import Lora


def adapted(policy: Policy, settings: Lora, *, seed: int = 0, trained: torch.dtype = torch.float32) -> Policy:
    """`policy` with fresh updates and its frozen weights in the type that they are kept in."""
    training = policy.training
    blueprint = lora.inject(Blueprint.of(policy), settings, (), seed).with_dtypes(trained, settings.dtype)
    fill(blueprint, torch.device("cpu"))
    return blueprint.policy.train(training)


def shake(policy: Policy, size: float = 0.3) -> Policy:
    """Give B, which starts at zero, something to say, and DoRA's magnitudes too."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=size, generator=generator)
        if ".lora_magnitude_vector." in name:
            parameter.data *= 1 + size * torch.rand(parameter.shape, generator=generator)
    return policy


def everything(policy: Policy) -> dict[str, Tensor]:
    """All parameters by name."""
    return {name: p.detach() for name, p in policy.named_parameters()}


def write(policy: Policy, folder: Path) -> None:
    """The policy's checkpoint, from its trained parameters."""
    lora.write(policy, {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}, folder, previous=None)
