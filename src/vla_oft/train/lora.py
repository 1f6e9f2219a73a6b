"""LoRA fine-tuning (Hu et al. 2022) through peft: low-rank updates of a frozen backbone, everything new trained in full.

    y = W x + alpha / rank * B A x      W frozen, A (rank, in) random, B (out, rank) zero: step 0 is the base policy

A run's checkpoint keeps W and the update apart, in files that change and files that do not:

    adapter/                               A and B of every adapted layer, PEFT's layout: Policy.load adds them to W in float32
    model-trained.safetensors              action head, state projector, FiLM, grounding head
    model-frozen[-0000i-of-0000n].safetensors    everything else; hard links to the previous checkpoint's, since nothing changes them
"""

import importlib.util
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vla_oft.adapter import Adapter, Factors
from vla_oft.policy import Policy
from vla_oft.weights import LazyTensor, write_shards

REFERENCE_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("qkv", "proj", "fc1", "fc2", "fc3", "q", "kv"),
)
"""What peft's "all-linear" comes to on OpenVLA. `proj` is also the patch embedding, a convolution."""
FILM = re.compile(r"\.blocks\.\d+\.(scale|shift)$")
FROZEN, TRAINED, INDEX = "model-frozen", "model-trained.safetensors", "model.safetensors.index.json"
_NAME = "default"  # peft's own name for the only adapter of a model


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation of the backbone; action head, state projector, FiLM and grounding head are trained in full.

    rank: of each update. alpha: its strength, alpha / rank; None is min(rank, 16), the reference's rule. dropout: on the input of A.
    init: of A: `gaussian` (standard deviation 1 / rank, the reference's), or peft's `default` (uniform as in a linear layer). B is zero.
    targets: which layers of the backbone.
        `default`    every linear layer that the policy reads, the patch embeddings included: they are linear maps of a patch, the published
                     results adapt them too, and they are 0.1 % of the adapter. Same function as `reference`, 3 % fewer parameters.
        `reference`  the same and what nothing reads: the towers' last blocks, SigLIP's pooling head, `lm_head`; they keep B = 0.
        names        ends of module names, for example q_proj, v_proj.
    base_dtype: what the frozen weights are kept in; `bfloat16` halves the memory of a large model and needs autocast.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    init: Literal["gaussian", "default"] = "gaussian"
    targets: Literal["default", "reference"] | tuple[str, ...] = "default"
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field, ok, fix in (
            ("rank", self.rank > 0, "must be positive"),
            ("alpha", self.alpha is None or self.alpha > 0, "must be positive, or None for min(rank, 16)"),
            ("dropout", 0 <= self.dropout < 1, "must lie in [0, 1)"),
            ("targets", len(self.targets) > 0, "names no layers; use 'default'"),
        ):
            if not ok:
                raise ValueError(f"Lora.{field}={getattr(self, field)!r} {fix}")

    @property
    def scale(self) -> float:
        """alpha."""
        return float(min(self.rank, 16) if self.alpha is None else self.alpha)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return getattr(torch, self.base_dtype)

    def check(self, precision: str) -> None:
        """Raise ValueError when this cannot run: peft is missing, or bfloat16 weights meet float32 arithmetic."""
        if importlib.util.find_spec("peft") is None:
            raise ValueError("TrainConfig.lora needs the peft package: pip install 'vla-oft[train]'")
        if self.base_dtype == "bfloat16" and precision != "bf16":
            raise ValueError(f"lora.base_dtype='bfloat16' needs precision='bf16', not '{precision}'; or keep the base in 'float32'")


def target_modules(policy: Policy, lora: Lora) -> list[str]:
    """Names of the layers of `policy` that `lora` adapts. Raises ValueError for a target that matches none."""
    unread = {id(p) for p in policy.unread_parameters()}
    layers = {f"vlm.{n}": m for n, m in policy.vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not FILM.search(f".{n}")}
    if lora.targets == "reference":
        return [name for name in layers if name.rpartition(".")[2] in REFERENCE_TARGETS]
    read = [name for name, layer in layers.items() if id(layer.weight) not in unread]
    if lora.targets == "default":
        return read
    lacking = [end for end in lora.targets if not any(_ends(name, end) for name in read)]
    if lacking:
        known = sorted({name.rpartition(".")[2] for name in read})
        raise ValueError(f"lora.targets: no layer that the policy reads is called {', '.join(lacking)}; there are {', '.join(known)}")
    return [name for name in read if any(_ends(name, end) for end in lora.targets)]


def inject(policy: Policy, lora: Lora, seed: int) -> None:
    """Adapt `policy` in place: update matrices in float32 from `seed`, the rest of the backbone frozen in `lora.base_dtype`."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        target_modules=target_modules(policy, lora),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        holder = nn.ModuleDict({"vlm": policy.vlm})  # older peft stumbles over the policy's own `config`
        inject_adapter_in_model(config, holder, adapter_name=_NAME)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name or _in_full(name))
    for parameter in policy.unread_parameters():
        parameter.requires_grad_(False)
    rounded = 0
    for name, parameter in policy.named_parameters():
        exact = parameter.data
        parameter.data = exact.to(torch.float32 if ".lora_" in name or _in_full(name) else lora.dtype)
        rounded += int((parameter.data.to(exact.dtype) != exact).any()) if parameter.dtype != exact.dtype else 0
    if rounded:
        print(f"note: {rounded} frozen weights are rounded to {lora.base_dtype}, the base policy has more digits")


def is_adapted(policy: nn.Module) -> bool:
    """Whether `inject` was applied."""
    return any(".lora_" in name for name, _ in policy.named_parameters())


def adapter(policy: Policy) -> Adapter:
    """The update matrices, under the plain names of the layers they belong to. Shares memory with `policy`."""
    layers: dict[str, Any] = {name: module for name, module in policy.named_modules() if _NAME in getattr(module, "lora_A", {})}
    return Adapter(
        {name: Factors(m.lora_A[_NAME].weight.detach(), m.lora_B[_NAME].weight.detach(), m.scaling[_NAME]) for name, m in layers.items()}
    )


def trained_state(policy: Policy) -> dict[str, Tensor]:
    """Everything that `inject` made trainable, by parameter name: what a resumed run needs beside the frozen weights."""
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad or ".lora_" in name}


def write(policy: Policy, folder: Path, previous: Path | None) -> None:
    """Write an adapted policy into checkpoint `folder`; the frozen files are hard links to those of checkpoint `previous`, if given.

    `previous` must be of the same run: its frozen weights are taken to be equal.
    """
    policy.write_facts(folder)
    adapter(policy).save(folder / "adapter")
    plain = {name.replace(".base_layer.", "."): p.detach() for name, p in policy.named_parameters() if ".lora_" not in name}
    trained = {name: tensor for name, tensor in plain.items() if _in_full(name)}
    frozen = {name: tensor for name, tensor in plain.items() if name not in trained}
    save_file({name: tensor.cpu().contiguous() for name, tensor in trained.items()}, folder / TRAINED, metadata={"format": "pt"})
    if previous is None or not _link_frozen(previous, folder):
        _write_frozen(frozen, folder)
    _write_index(folder)


def _in_full(name: str) -> bool:
    """Whether a parameter is trained without LoRA: everything outside the backbone, and FiLM inside."""
    return not name.startswith("vlm.") or FILM.search(name.rpartition(".")[0]) is not None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _write_frozen(frozen: dict[str, Tensor], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_shards({name: LazyTensor.of(tensor) for name, tensor in frozen.items()}, Path(temporary))
        for file in Path(temporary).glob("*.safetensors"):
            file.rename(folder / file.name.replace("model", FROZEN, 1))


def _link_frozen(previous: Path, folder: Path) -> bool:
    """False where the file system has no hard links: then the files are written again."""
    found = sorted(previous.glob(f"{FROZEN}*.safetensors"))
    try:
        for file in found:
            os.link(file, folder / file.name)
    except OSError:
        for file in found:
            (folder / file.name).unlink(missing_ok=True)
        return False
    return bool(found)


def _write_index(folder: Path) -> None:
    where: dict[str, str] = {}
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(str(file), "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file.name)
    document = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")
