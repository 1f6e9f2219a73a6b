"""Tensors that several processes hold in parts, on disk: each process writes its own file, any number of processes reads them back.

    rank-00000.safetensors   exp_avg/x  rows 0..3      guard/usual
    rank-00001.safetensors   exp_avg/x  rows 4..7

The layout is the safetensors one of torch.distributed.checkpoint, which also reads it and hands each process the parts that it needs, so
that a run may go on with more or fewer of them. (Its default layout keeps a pickle beside the tensors: not for files that may come from
elsewhere. And its own writer needs the other processes while it writes; ours works in the background.)
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Part:
    """What one process writes of a tensor. values: on the CPU, in memory of their own; offsets: where they begin in the whole."""

    values: Tensor
    offsets: tuple[int, ...]


def own_parts(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Part]:
    """Copies of what this process has to write: its part of what is divided, and, in the first process, of everything that is not.

    Every tensor must have a dimension. Raises no errors and waits for no other process.
    """
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        assert tensor.ndim, f"{name} is a single number: give it a dimension"
        if not isinstance(tensor, DTensor):
            if is_main:
                parts[name] = Part(_copied(tensor), (0,) * tensor.ndim)
        elif _writes(tensor):
            for chunk in tensor.__create_chunk_list__():
                parts[name] = Part(_copied(tensor.to_local()), tuple(chunk.offsets))
    return parts


def write(parts: Mapping[str, Part], path: Path) -> None:
    """One process's file."""
    where = {name: {"saved_offsets": list(part.offsets)} for name, part in parts.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(where)}
    save_file({name: part.values for name, part in parts.items()}, path, metadata=metadata)


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors `into`, whole or divided, from all files of `folder`. Raises ValueError for what is missing or of another shape."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_state

    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    missing = sorted(into.keys() - stored.keys())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing[:4])}: saved by another version of vla-oft, or for another configuration")
    wrong = sorted(name for name, tensor in into.items() if tuple(stored[name].size) != tuple(tensor.shape))  # type: ignore[union-attr]
    if wrong:
        size = tuple(stored[wrong[0]].size)  # type: ignore[union-attr]
        raise ValueError(f"{folder}: {wrong[0]} has shape {size} there, {tuple(into[wrong[0]].shape)} here; the model has changed")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to load in a single process": it is
        load_state({name: tensor.detach() for name, tensor in into.items()}, storage_reader=reader, no_dist=True)


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu")
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def _writes(tensor: DTensor) -> bool:
    """Of processes that hold the same part (HSDP), the first one writes."""
    place = tensor.device_mesh.get_coordinate() or []
    return all(index == 0 for index, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate())
