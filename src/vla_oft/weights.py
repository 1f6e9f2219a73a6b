"""Weights on disk: `model.safetensors`, or shards with an index, the hub's layout; read and written without holding everything twice."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vla_oft.adapter import load_adapter, shortened

SHARD_BYTES = 5_000_000_000
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_RESERVE_BYTES = 500_000_000


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values in `dtype`, rounded when read."""
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """One that is in memory, or mapped, already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_weights(folder: Path, device: str | torch.device = "cpu") -> dict[str, LazyTensor]:
    """All tensors of a checkpoint, by name; only headers are read now.

    `model.safetensors` wins over an index beside it, as in transformers. Raises ValueError when a file is missing, truncated or elsewhere.
    """
    found: dict[str, LazyTensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    found[name] = LazyTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], _reader(path, name, device))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from None
        except KeyError as error:
            raise ValueError(f"{path} holds values of type {error}: not a checkpoint of this kind") from None
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint; see `open_weights`."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    names = _indexed(folder / INDEX) if (folder / INDEX).is_file() else sorted(p.name for p in folder.glob("model-*-of-*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{folder} has no {shortened(missing) or WHOLE}: not a complete checkpoint; copy or download it again")
    return [folder / name for name in names]


def write_shards(tensors: Mapping[str, LazyTensor], folder: Path, max_bytes: int = SHARD_BYTES) -> None:
    """Write tensors by name into `folder`; beyond `max_bytes` in shards, of which one is in memory at a time."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    count = len(shards)
    files = [WHOLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, members in zip(files, shards, strict=True):
        save_file({name: tensors[name].read().detach().cpu().contiguous() for name in members}, folder / file, metadata={"format": "pt"})
    if count > 1:
        document = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {name: file for file, members in zip(files, shards, strict=True) for name in members},
        }
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")


def load_fitting(
    folder: Path, expected: Mapping[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype, *, merge: bool = True
) -> dict[str, Tensor]:
    """All weights of a checkpoint on `device` in `dtype`; see `open_fitting`. Raises ValueError when the machine has not enough memory."""
    found = {name: weight.to(dtype) for name, weight in open_fitting(folder, expected, device, merge=merge).items()}
    if torch.device(device).type == "cpu":
        check_memory(sum(weight.num_bytes for weight in found.values()), f"{folder} as {dtype}")
    return {name: weight.read() for name, weight in found.items()}


def open_fitting(
    folder: Path, expected: Mapping[str, tuple[int, ...]], device: str | torch.device = "cpu", *, merge: bool = True
) -> dict[str, LazyTensor]:
    """All weights of a checkpoint, each read when it is needed, which must have exactly the `expected` names and shapes.

    merge: add the LoRA adapter in `adapter/`, if there is one, in float32. Raises ValueError, before any weight is read, listing what does
    not fit.
    """
    stored = open_weights(folder, device)
    check_fit(expected, {name: tensor.shape for name, tensor in stored.items()}, f"{folder}: the weights do not fit policy.json")
    if not merge or not (folder / "adapter").is_dir():
        return stored
    adapter = load_adapter(folder / "adapter")
    adapter.check(expected)

    def merged(name: str, weight: LazyTensor) -> LazyTensor:
        module = name.removesuffix(".weight")
        if module not in adapter.factors:
            return weight
        return LazyTensor(weight.shape, torch.float32, lambda: adapter.merged(module, weight.read()))

    return {name: merged(name, weight) for name, weight in stored.items()}


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError naming missing, unexpected and badly shaped weights."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrong shape": [
            f"{name}: {tuple(found[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if any(problems.values()):
        raise ValueError(f"{what}; " + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names))


def check_memory(num_bytes: int, what: str) -> None:
    """Raise ValueError when `num_bytes` do not fit into free memory (where the system tells: Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if num_bytes + _RESERVE_BYTES > free:
        raise ValueError(
            f"{what} needs {num_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; load it with dtype=torch.bfloat16, or on a GPU"
        )


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of weights: it needs weight_map, from name to file") from None
    elsewhere = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if elsewhere:
        raise ValueError(f"{index} points at {shortened(elsewhere)}: only *.safetensors in the same folder are read")
    return names


def _reader(path: Path, name: str, device: str | torch.device) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(str(path), "pt", device=str(device)) as file:
            return file.get_tensor(name)

    return read
