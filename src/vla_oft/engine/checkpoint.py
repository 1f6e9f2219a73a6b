"""A checkpoint's weights, one at a time: nothing is in memory twice, and a LoRA adapter is added in float32 before anything is rounded."""

from pathlib import Path

import torch
from torch import Tensor

from vla_oft.adapter import load_adapter
from vla_oft.engine.linear import Read
from vla_oft.interface import Interface
from vla_oft.policy import Policy
from vla_oft.policy_config import PolicyConfig, load_config
from vla_oft.statistics import load_statistics
from vla_oft.vlm import tokens
from vla_oft.weights import check_fit, open_weights


def load_interface(folder: Path, dataset: str | None) -> Interface:
    """What a checkpoint folder says of its robot, statistics and prompts. dataset: whose statistics, None for its own choice."""
    config = load_config(folder, dataset)
    return Interface(config, load_statistics(folder / "statistics.json")[config.dataset], tokens.load_tokenizer(folder))


def checkpoint_weights(folder: Path, config: PolicyConfig, device: torch.device) -> Read:
    """Its parameters by name, float32 where an adapter changes them. Raises ValueError when they do not fit `config`."""
    stored = open_weights(folder)
    with torch.device("meta"):
        policy = Policy(config, load_statistics(folder / "statistics.json")[config.dataset], tokens.load_tokenizer(folder))
    expected = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    check_fit(expected, {name: tensor.shape for name, tensor in stored.items()}, f"{folder}: the weights do not fit policy.json")
    adapter = load_adapter(folder / "adapter") if (folder / "adapter").is_dir() else None
    if adapter:
        adapter.check(expected)

    def read(name: str) -> Tensor:
        weight, module = stored[name].read(), name.removesuffix(".weight")
        return adapter.merged(module, weight.to(device)) if adapter and module in adapter.factors else weight

    return read
