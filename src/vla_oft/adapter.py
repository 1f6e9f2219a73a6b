"""A LoRA adapter on disk, and its sum with the weights that it adapts (Hu et al. 2022); reading one needs no peft.

Folder in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with `base_model.model.MODULE.lora_A.weight` (r, in) and
`.lora_B.weight` (out, r). An adapted weight is W + alpha / r * B A, summed in float32 and rounded once: the reference rounds each merge to
bfloat16, which moves normalised actions by 1e-2.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_MUST_BE_OFF = (
    *("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias"),
    *("trainable_token_indices", "target_parameters", "use_qalora"),
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """factors: module name -> (A (r, in), B (out, r)), with convolution kernels as (r, in, k, k) and (out, r, 1, 1).

    scaling: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    rank_stabilised: bool = False

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """float32 sum of `weight` of `module` and its update, shape of `weight`; `weight` itself where nothing is adapted."""
        if module not in self.factors:
            return weight
        a, b = (factor.to(weight.device, torch.float32).flatten(1) for factor in self.factors[module])
        return torch.add(weight.float(), (b @ a).view(weight.shape), alpha=self.scaling)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise ValueError unless every adapted module exists with fitting shapes. shapes: parameter name -> shape."""
        wrong = []
        for module, (a, b) in self.factors.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                wrong.append(f"{module}: the model has no such layer")
            elif (b.shape[0], *a.shape[1:]) != tuple(shape) or not a.shape[0] == b.shape[1] == self.rank:
                wrong.append(f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} of rank {self.rank} do not fit {tuple(shape)}")
        if wrong:
            raise ValueError(f"the LoRA adapter does not fit the model: {'; '.join(wrong)}")

    def save(self, folder: Path) -> None:
        """Write PEFT's layout into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        modules = sorted(self.factors)
        document = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.rank_stabilised,
            "bias": "none",
            "target_modules": modules,
            "task_type": None,
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        tensors = {
            f"{PREFIX}{module}.lora_{side}.weight": factor.contiguous()
            for module in modules
            for side, factor in zip("AB", self.factors[module], strict=True)
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder. Raises ValueError for kinds of adapters other than plain LoRA and for keys that are not understood."""
    adapter, others = read_adapter(folder)
    if others:
        raise ValueError(f"{folder / WEIGHTS} has tensors that belong to no LoRA layer: {sorted(others)}")
    return adapter


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter, and whatever else its file holds, by name without PEFT's prefix."""
    config = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: not a complete LoRA adapter")
    halves: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name = key.removeprefix(PREFIX)
            module, _, side = name.removesuffix(".weight").rpartition(".lora_")
            if module and side in ("A", "B") and name.endswith(".weight"):
                halves.setdefault(module, {})[side] = file.get_tensor(key)
            else:
                others[name] = file.get_tensor(key)
    lone = sorted(module for module, sides in halves.items() if len(sides) < 2)
    if lone:
        raise ValueError(f"{folder / WEIGHTS}: only one of lora_A and lora_B for {lone}")
    factors = {module: (sides["A"], sides["B"]) for module, sides in halves.items()}
    return Adapter(factors=factors, rank=config["r"], alpha=config["lora_alpha"], rank_stabilised=bool(config.get("use_rslora"))), others


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked: plain LoRA without options that change its meaning."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: not a LoRA adapter")
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    odd = {name: config[name] for name in _MUST_BE_OFF if config.get(name)}
    if odd or config.get("bias", "none") != "none":
        raise ValueError(f"{path}: {odd or {'bias': config['bias']}} is not supported; merge the adapter with the tool that trained it")
    return config
