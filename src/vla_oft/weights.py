"""Weights on disk: `model.safetensors`, or shards with an index, the hub's layout; read and written without holding everything twice."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vla_oft.adapter import load_adapter

SHARD_BYTES = 5_000_000_000
Planned = tuple[int, Callable[[], Tensor]]
"""Size in bytes, and how to read it."""


def write_shards(tensors: Mapping[str, Planned], folder: Path, max_bytes: int = SHARD_BYTES) -> None:
    """Write tensors by name into `folder`; beyond `max_bytes` in shards, of which one is in memory at a time."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (num_bytes, _) in tensors.items():
        if shards[-1] and filled + num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    count = len(shards)
    files = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, members in zip(files, shards, strict=True):
        save_file({name: tensors[name][1]().detach().cpu().contiguous() for name in members}, folder / file, metadata={"format": "pt"})
    if count > 1:
        index = {
            "metadata": {"total_size": sum(num_bytes for num_bytes, _ in tensors.values())},
            "weight_map": {name: file for file, members in zip(files, shards, strict=True) for name in members},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises ValueError when there are none or a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        found = sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        lacking = ", ".join(missing) or "model*.safetensors"
        raise ValueError(f"{folder} has no {lacking}: not a complete checkpoint; copy or download it again")
    return found


def read_tensors(folder: Path, device: str | torch.device = "cpu") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, one after the other."""
    for path in weight_files(folder):
        with safe_open(str(path), "pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def stored_dtypes(folder: Path) -> set[str]:
    """The types that a checkpoint's weights are stored in, in safetensors' names ("F32", "BF16")."""
    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(str(path), "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def load_fitting(
    folder: Path, expected: Mapping[str, torch.Size], device: str | torch.device, dtype: torch.dtype, *, merge: bool = True
) -> dict[str, Tensor]:
    """All weights of a checkpoint on `device` in `dtype`, which must have exactly the `expected` names and shapes.

    merge: add the LoRA adapter in `adapter/`, if there is one, in float32. Raises ValueError listing every name that does not fit.
    """
    adapter = load_adapter(folder / "adapter") if merge and (folder / "adapter").is_dir() else None
    if adapter:
        adapter.check(expected)
    weights: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for name, tensor in read_tensors(folder, device):
        shapes[name] = tensor.shape
        if expected.get(name) == tensor.shape:
            weights[name] = (adapter.merged(name.removesuffix(".weight"), tensor) if adapter else tensor).to(dtype)
    check_fit(expected, shapes, f"{folder}: the weights do not fit policy.json")
    return weights


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError listing all missing, unexpected and badly shaped names."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"{name}: {tuple(found[name])} instead of {tuple(s)}" for name, s in expected.items() if name in found and found[name] != s]
    if missing or unexpected or wrong:
        raise ValueError(f"{what}; missing {missing}, unexpected {unexpected}, wrong shape {wrong}")
