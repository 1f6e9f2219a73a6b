"""A LoRA adapter on disk, and its sum with the weights that it adapts (Hu et al. 2022); reading one needs no peft.

Folder in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with `base_model.model.MODULE.lora_A.weight` (r, in) and
`.lora_B.weight` (out, r). An adapted weight is W + alpha / r * B A, summed in float32 and rounded once: the reference rounds each merge to
bfloat16, which moves normalised actions by 1e-2. With DoRA (Liu et al. 2024) the sum's rows are then brought to the lengths
`.lora_magnitude_vector` (out,).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_MUST_BE_OFF = (
    *("fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias"),
    *("trainable_token_indices", "target_parameters", "use_qalora"),
)


class Factors(NamedTuple):
    """The update of one layer: scaling * B A.

    a: (rank, in); b: (out, rank); of a convolution (rank, in, k, k) and (out, rank, 1, 1). scaling: alpha / rank, or alpha / sqrt(rank)
    with rank-stabilised LoRA. magnitude: (out,) with DoRA, the length of each row of the sum; None without.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """The update of every adapted module, by module name. rslora: how a `scaling` is written down, as alpha / sqrt(rank)."""

    factors: Mapping[str, Factors]
    rslora: bool = False

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """float32 sum of `weight` of `module` and its update, shape of `weight`; `weight` itself where nothing is adapted."""
        if module not in self.factors:
            return weight
        a, b, scaling, magnitude = self.factors[module]
        update = b.to(weight.device, torch.float32).flatten(1) @ a.to(weight.device, torch.float32).flatten(1)
        total = torch.add(weight.float(), update.view(weight.shape), alpha=scaling)
        if magnitude is None:
            return total
        lengths = magnitude.to(weight.device, torch.float32) / row_norms(total)
        return total * lengths.view(-1, *[1] * (total.ndim - 1))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every adapted module exists with fitting shapes. shapes: parameter name -> shape."""
        wrong = []
        for module, (a, b, _, magnitude) in self.factors.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                wrong.append(f"{module}: the model has no such layer")
            elif (b.shape[0], *a.shape[1:]) != tuple(shape) or a.shape[0] != b.shape[1]:
                wrong.append(f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {tuple(shape)}")
            elif magnitude is not None and tuple(magnitude.shape) != (shape[0],):
                wrong.append(f"{module}: the magnitude vector {tuple(magnitude.shape)} does not fit {tuple(shape)}")
        if wrong:
            raise ValueError(f"the LoRA adapter does not fit the model: {shortened(wrong)}")

    def save(self, folder: Path) -> None:
        """Write PEFT's layout into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        modules = sorted(self.factors)
        ranks = {module: self.factors[module].rank for module in modules}
        alphas = {module: self.factors[module].scaling * (ranks[module] ** 0.5 if self.rslora else ranks[module]) for module in modules}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        document = {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
            "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": self.rslora,
            "use_dora": any(factors.magnitude is not None for factors in self.factors.values()),
            "target_modules": modules,
            "task_type": None,
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        tensors = {
            f"{PREFIX}{module}.lora_{side}.weight": factor.contiguous()
            for module in modules
            for side, factor in zip("AB", self.factors[module][:2], strict=True)
        }
        for module, (a, _, _, magnitude) in self.factors.items():
            if magnitude is not None:  # of a convolution, peft wants (1, out, 1, 1)
                shape = (-1,) if a.ndim == 2 else (1, -1, *[1] * (a.ndim - 2))
                tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude.reshape(shape).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder. Raises ValueError for kinds of adapters other than LoRA, rsLoRA and DoRA, and for unknown keys."""
    adapter, others = read_adapter(folder)
    if others:
        raise ValueError(f"{folder / WEIGHTS} has tensors that belong to no LoRA layer: {shortened(sorted(others))}")
    return adapter


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter, and whatever else its file holds, by name without PEFT's prefix."""
    config = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: not a complete LoRA adapter")
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}): copy or download it again") from None
    adapter, others = split_factors(tensors, str(folder / WEIGHTS), lambda module, rank: _scaling(config, module, rank))
    wrong = [module for module, factors in adapter.factors.items() if (factors.magnitude is not None) != bool(config.get("use_dora"))]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: use_dora={config.get('use_dora')!r} contradicts the tensors of {shortened(wrong)}")
    return replace(adapter, rslora=bool(config.get("use_rslora"))), others


def split_factors(tensors: Mapping[str, Tensor], where: str, scaling: Callable[[str, int], float]) -> tuple[Adapter, dict[str, Tensor]]:
    """Tensors by name -> the adapter of all `MODULE.lora_A[.default].weight`, `.lora_B` and DoRA's magnitudes, and the other tensors.

    scaling: of a module with a rank. Raises ValueError for half an update, naming `where`.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            sides.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[name] = tensor
    lone = sorted(module for module, parts in sides.items() if not {"A", "B"} <= parts.keys())
    if lone:
        raise ValueError(f"{where}: only one of lora_A and lora_B for {shortened(lone)}")

    def factors(module: str, parts: dict[str, Tensor]) -> Factors:
        magnitude = parts.get("magnitude_vector")
        return Factors(parts["A"], parts["B"], scaling(module, parts["A"].shape[0]), None if magnitude is None else magnitude.flatten())

    return Adapter({module: factors(module, parts) for module, parts in sides.items()}), others


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked: LoRA, with rsLoRA or DoRA or neither, without options that change its meaning."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: not a LoRA adapter")
    config = json.loads(path.read_text())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: only adapters of peft_type LORA are supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise ValueError(f"{path}: {name}={config.get(name)!r} must be a positive number")
    unsupported = {name: config[name] for name in _MUST_BE_OFF if config.get(name)}
    if unsupported or config.get("bias", "none") != "none":
        raise ValueError(f"{path}: {unsupported or {'bias': config['bias']}} is not supported; merge the adapter with what trained it")
    return config


def row_norms(weight: Tensor) -> Tensor:
    """Lengths of the rows of a matrix, or of the filters of a convolution: (out, ...) -> float32 (out,)."""
    return torch.linalg.vector_norm(weight.float().flatten(1), dim=1)


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """As peft does it: a pattern is the end of a module's name, or a regular expression for it."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
    alpha = fitting[0] if fitting else config["lora_alpha"]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
