"""LoRA fine-tuning (Hu et al. 2022) through peft: low-rank updates of a frozen backbone, everything new trained in full.

    y = W x + alpha / rank * B A x      W frozen, A (rank, in) random, B (out, rank) zero: step 0 is the base policy

rsLoRA (Kalajdzievski 2023) divides alpha by sqrt(rank): high ranks learn as fast as low ones. DoRA (Liu et al. 2024) also learns the
length of each row: y = m / |W + s B A| (W + s B A) x, with m = |W| at step 0.

A run's checkpoint keeps W and the update apart, in files that change and files that do not:

    adapter/                               A, B (and m) of every adapted layer, PEFT's layout: Policy.load adds them to W in float32
    model-trained.safetensors              action head, state projector, FiLM, grounding head
    model-frozen[-0000i-of-0000n].safetensors    everything else; hard links to the previous checkpoint's, since nothing changes them
"""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vla_oft.adapter import Adapter, Factors, row_norms
from vla_oft.policy import Policy
from vla_oft.train import nf4
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.freeze import Part, is_in, is_new
from vla_oft.weights import LazyTensor, write_shards

REFERENCE_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("qkv", "proj", "fc1", "fc2", "fc3", "q", "kv"),
)
"""What peft's "all-linear" comes to on OpenVLA. `proj` is also the patch embedding, a convolution."""
FROZEN, TRAINED, INDEX = "model-frozen", "model-trained.safetensors", "model.safetensors.index.json"
_NAME = "default"  # peft's own name for the only adapter of a model


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation of the backbone; action head, state projector, FiLM and grounding head are trained in full.

    rank: of each update. alpha: its strength, alpha / rank; None is min(rank, 16), the reference's rule. dropout: on the input of A.
    rslora: the strength is alpha / sqrt(rank). dora: rows also learn their length. Every pass then sums each adapted weight with its update
    to measure it, in the type that the pass computes in: with trained weights in float32 the merged policy is the trained one, in bfloat16
    its rows differ by up to 0.4 %.
    init: of A: `gaussian` (standard deviation 1 / rank, the reference's), or peft's `default` (uniform as in a linear layer). B is zero.
    targets: which layers of the backbone.
        `default`    every linear layer that the policy reads, the patch embeddings included: they are linear maps of a patch, the published
                     results adapt them too, and they are 0.1 % of the adapter. Same function as `reference`, 3 % fewer parameters.
        `reference`  the same and what nothing reads: the towers' last blocks, SigLIP's pooling head, `lm_head`; they keep B = 0.
        names        ends of module names, for example q_proj, v_proj.
    base_dtype: what the frozen weights are kept in; `bfloat16` halves the memory of a large model, `nf4` (QLoRA, see `nf4.py`) keeps the
    adapted linear layers in 4.13 bits per weight and the rest in bfloat16. Both compute in bfloat16.
    """

    rank: int = 32
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: Literal["gaussian", "default"] = "gaussian"
    targets: Literal["default", "reference"] | tuple[str, ...] = "default"
    base_dtype: Literal["float32", "bfloat16", "nf4"] = "float32"

    def __post_init__(self) -> None:
        for field, ok, fix in (
            ("rank", self.rank > 0, "must be positive"),
            ("alpha", self.alpha is None or self.alpha > 0, "must be positive, or None for min(rank, 16)"),
            ("dropout", 0 <= self.dropout < 1, "must lie in [0, 1)"),
            ("targets", len(self.targets) > 0, "names no layers; use 'default'"),
            ("dora", not (self.dora and self.dropout and self.base_dtype == "nf4"), "with dropout would keep 16-bit weights beside nf4"),
        ):
            if not ok:
                raise ValueError(f"Lora.{field}={getattr(self, field)!r} {fix}")

    @property
    def scale(self) -> float:
        """alpha."""
        return float(min(self.rank, 16) if self.alpha is None else self.alpha)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights that are not quantised."""
        return torch.float32 if self.base_dtype == "float32" else torch.bfloat16

    def check(self, precision: str) -> None:
        """Raise ValueError when this cannot run: peft is missing, or bfloat16 weights meet float32 arithmetic."""
        if importlib.util.find_spec("peft") is None:
            raise ValueError("TrainConfig.lora needs the peft package: pip install 'vla-oft[train]'")
        if self.base_dtype != "float32" and precision != "bf16":
            raise ValueError(
                f"lora.base_dtype='{self.base_dtype}' needs precision='bf16', not '{precision}'; or keep the base in 'float32'"
            )


def target_modules(policy: Policy, lora: Lora, freeze: Sequence[Part] = ()) -> list[str]:
    """Names of the layers of `policy` that `lora` adapts: none in the parts that are frozen.

    Raises ValueError for a target that matches none, and when no layer is left.
    """
    unread = {id(p) for p in policy.unread_parameters()}
    layers = {
        name: module
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not is_new(f"{name}.weight") and not is_in(name, freeze)
    }
    read = [name for name, layer in layers.items() if id(layer.weight) not in unread]
    if not read:
        raise ValueError(f"lora: freeze={tuple(freeze)} leaves no layer to adapt; set lora=null to train the heads only")
    if lora.targets == "reference":
        return [name for name in layers if name.rpartition(".")[2] in REFERENCE_TARGETS]
    if lora.targets == "default":
        return read
    lacking = [end for end in lora.targets if not any(_ends(name, end) for name in read)]
    if lacking:
        known, where = sorted({name.rpartition(".")[2] for name in read}), " outside the frozen parts" if freeze else ""
        raise ValueError(
            f"lora.targets: no layer that the policy reads{where} is called {', '.join(lacking)}; there are {', '.join(known)}"
        )
    return [name for name in read if any(_ends(name, end) for end in lora.targets)]


def inject(blueprint: Blueprint, lora: Lora, freeze: Sequence[Part], seed: int) -> Blueprint:
    """Adapt the blueprint's policy in place; returns where the weights of all its parameters, old and new, will come from.

    Afterwards the updates and all that is new are trained and the rest is frozen. What an update starts from depends on `seed` and the
    layer's name alone: the same for any number of processes and for any choice of other layers. Raises ValueError as `target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from vla_oft.train.lora_layer import lighten

    policy = blueprint.policy
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=target_modules(policy, lora, freeze),
        bias="none",
    )
    holder = nn.ModuleDict({"vlm": policy.vlm})  # older peft stumbles over the policy's own `config`
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, holder, adapter_name=_NAME, low_cpu_mem_usage=True)
    for layer in _adapted(policy).values():
        lighten(layer)
    unread = {id(parameter) for parameter in policy.unread_parameters()}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_((".lora_" in name or is_new(name)) and id(parameter) not in unread)
    quantised = set(nf4.layers(policy)) if lora.base_dtype == "nf4" else set()
    weights = {name: _source(blueprint, name, p.shape, lora, quantised, seed) for name, p in policy.named_parameters()}
    return nf4.quantise(replace(blueprint, weights=weights), quantised)


def is_adapted(policy: nn.Module) -> bool:
    """Whether `inject` was applied."""
    return any(".lora_" in name for name, _ in policy.named_parameters())


def adapter(policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    """The updates, under the plain names of the layers they belong to; with the values of `tensors`, by parameter name, if it has them."""
    given = tensors or {}
    live = {name: parameter.detach() for name, parameter in policy.named_parameters() if ".lora_" in name}

    def value(layer: str, part: str) -> Tensor | None:
        name = f"{layer}.{part}.{_NAME}.weight"
        return given[name] if name in given else live.get(name)

    def factors(layer: str, module: Any) -> Factors:
        a, b, magnitude = (value(layer, part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
        assert a is not None and b is not None
        return Factors(a, b, module.scaling[_NAME], None if magnitude is None else magnitude.flatten())

    layers = _adapted(policy)
    rslora = any(module.use_rslora[_NAME] for module in layers.values())
    return Adapter({layer: factors(layer, module) for layer, module in layers.items()}, rslora)


def write(policy: Policy, tensors: Mapping[str, Tensor | LazyTensor], folder: Path, previous: Path | None) -> None:
    """Write an adapted policy into checkpoint `folder`; the frozen files are hard links to those of checkpoint `previous`, if given.

    tensors: by parameter name, the whole tensors to write instead of the policy's own: those that are trained, so that training can go on
    meanwhile (they may be averages), and frozen ones that are sharded over processes. A weight in 4 bits is written as the bfloat16 values
    that training saw, so that the loaded policy acts like the trained one. `previous` must be of the same run: its frozen weights are
    taken to be equal.
    """
    policy.write_facts(folder)
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in _values(policy, tensors).items()}
    adapter(policy, {name: t.read() if isinstance(t, LazyTensor) else t for name, t in tensors.items() if ".lora_" in name}).save(
        folder / "adapter"
    )
    trained = {name: tensor for name, tensor in plain.items() if is_new(name)}
    frozen = {name: tensor for name, tensor in plain.items() if name not in trained}
    save_file({name: t.read().cpu().contiguous() for name, t in trained.items()}, folder / TRAINED, metadata={"format": "pt"})
    if previous is None or not _link_frozen(previous, folder):
        _write_frozen(frozen, folder)
    _write_index(folder)


def _adapted(policy: nn.Module) -> dict[str, Any]:
    """The layers that peft put in place of the adapted ones, by the plain names of these."""
    return {name: module for name, module in policy.named_modules() if _NAME in getattr(module, "lora_A", {})}


def _source(blueprint: Blueprint, name: str, shape: tuple[int, ...], lora: Lora, quantised: set[str], seed: int) -> LazyTensor:
    """Where a parameter of the adapted policy starts."""
    layer, _, part = name.partition(".lora_")
    if not part:
        return blueprint.weights[name.replace(".base_layer.", ".")]
    if part.startswith("A"):
        return LazyTensor(tuple(shape), torch.float32, lambda: _draw(tuple(shape), lora, seed, layer))
    if part.startswith("B"):
        return LazyTensor(tuple(shape), torch.float32, lambda: torch.zeros(shape))
    base = blueprint.weights[f"{layer}.weight"]
    kept = nf4.rounded if f"{layer}.base_layer" in quantised else lambda weight: weight.to(lora.dtype)
    return LazyTensor(tuple(shape), torch.float32, lambda: row_norms(kept(base.read())).view(shape))


def _draw(shape: tuple[int, ...], lora: Lora, seed: int, layer: str) -> Tensor:
    """A of one layer."""
    digest = hashlib.sha256(f"{seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if lora.init == "gaussian":
        return torch.empty(shape).normal_(std=1 / lora.rank, generator=generator)
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _values(policy: Policy, tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """Every weight but the updates, by parameter name; those in 4 bits as bfloat16."""
    found = {name: p.detach() for name, p in policy.named_parameters() if ".lora_" not in name and name not in tensors}
    values = nf4.unpacked(policy, found)
    sharded = [name for name, tensor in found.items() if isinstance(tensor, DTensor)]
    assert not sharded, f"{sharded[0]} is sharded: its whole tensor must be given"
    return {**values, **{name: t if isinstance(t, LazyTensor) else LazyTensor.of(t) for name, t in tensors.items() if ".lora_" not in name}}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _write_frozen(frozen: dict[str, LazyTensor], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_shards(frozen, Path(temporary))
        for file in Path(temporary).glob("*.safetensors"):
            file.rename(folder / file.name.replace("model", FROZEN, 1))


def _link_frozen(previous: Path, folder: Path) -> bool:
    """False when there are none yet. Where the file system has no hard links they are copied: what they came from may be gone by now."""
    found = sorted(previous.glob(f"{FROZEN}*.safetensors"))
    for file in found:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    return bool(found)


def _write_index(folder: Path) -> None:
    where: dict[str, str] = {}
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(str(file), "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file.name)
    document = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")
