"""What a checkpoint is, in words: `vla-oft ckpt show`."""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vla_oft.adapter import read_adapter_config
from vla_oft.config import to_dict
from vla_oft.policy import checkpoint_folder, load_config
from vla_oft.statistics import load_statistics


def describe(path: Path) -> dict[str, Any]:
    """Configuration, statistics and sizes of a checkpoint, as plain JSON types; weights are not loaded."""
    folder = checkpoint_folder(path)
    config = load_config(folder)
    parts: dict[str, int] = {}
    size_bytes = 0
    for file in sorted(folder.glob("model*.safetensors")):
        size_bytes += file.stat().st_size
        with safe_open(str(file), "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = ".".join(name.split(".")[:2]) if name.startswith("vlm.") else name.split(".")[0]
                parts[part] = parts.get(part, 0) + math.prod(tensors.get_slice(name).get_shape())
    statistics = {name: entry.to_dict() for name, entry in load_statistics(folder / "statistics.json").items()}
    adapter = read_adapter_config(folder / "adapter") if (folder / "adapter").is_dir() else None
    return {
        "path": str(folder),
        "parameters": parts,
        "size_bytes": size_bytes,
        "adapter": {"rank": adapter["r"], "alpha": adapter["lora_alpha"]} if adapter else None,
        "policy": to_dict(config),
        "statistics": statistics,
    }


def lines(document: dict[str, Any]) -> list[str]:
    """`describe` for people."""
    policy, robot, vlm = document["policy"], document["policy"]["robot"], document["policy"]["vlm"]
    total, adapter, head = sum(document["parameters"].values()), document["adapter"], policy["head"]
    out = [
        f"{document['path']}: {total / 1e6:.2f} M parameters, {document['size_bytes'] / 1e6:.1f} MB",
        f"robot      {robot['name']}: cameras {', '.join(robot['cameras'])}; state {robot['state_dim']}; actions {robot['action_dim']} "
        f"({robot['action_kind']}), {robot['control_hz']:g} Hz, {robot['normalization']}",
        f"chunks     {policy['chunk_len']} actions = {policy['chunk_len'] / robot['control_hz']:.2f} s",
        f"towers     {vlm['dino']['depth'] - 1} x {vlm['dino']['width']} and {vlm['siglip']['depth'] - 1} x {vlm['siglip']['width']}, "
        f"{vlm['dino']['image_size']} px, FiLM {'on' if vlm['film'] else 'off'}",
        f"decoder    {vlm['llm']['depth']} x {vlm['llm']['width']}, vocabulary {vlm['llm']['vocab_size']}",
        f"head       {head['kind']}: " + ", ".join(f"{name} {value}" for name, value in head.items() if name != "kind"),
        f"adapter    {'LoRA of rank {rank}, alpha {alpha:g}'.format(**adapter) if adapter else 'none'}",
        f"parity     {'as the reference in every detail' if policy['parity'] else 'off'} (docs/parity.md)",
        f"statistics {_datasets(document['statistics'])}; used: {policy['dataset']}",
    ]
    return out + [f"  {count / 1e6:9.3f} M  {name}" for name, count in sorted(document["parameters"].items())]


def _datasets(statistics: dict[str, Any]) -> str:
    return ", ".join(
        "{} ({num_trajectories} episodes, {num_transitions} steps)".format(name, **entry) for name, entry in statistics.items()
    )
