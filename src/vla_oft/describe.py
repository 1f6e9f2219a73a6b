"""What a checkpoint is, in words: `vla-oft ckpt show`."""

import json
import math
from pathlib import Path
from typing import Any

from vla_oft.adapter import read_adapter_config
from vla_oft.config import to_dict
from vla_oft.policy import checkpoint_folder, load_config, some_dataset
from vla_oft.statistics import load_statistics
from vla_oft.weights import open_weights


def describe(path: Path) -> dict[str, Any]:
    """Configuration, statistics and sizes of a checkpoint, as plain JSON types; weights are not loaded."""
    folder = checkpoint_folder(path)
    config = load_config(folder, some_dataset(folder))
    stored = open_weights(folder)
    parts: dict[str, int] = {}
    for name, tensor in stored.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("vlm.") else name.split(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(tensor.shape)
    statistics = {name: entry.to_dict() for name, entry in load_statistics(folder / "statistics.json").items()}
    adapter = read_adapter_config(folder / "adapter") if (folder / "adapter").is_dir() else None
    return {
        "path": str(folder),
        "parameters": parts,
        "size_bytes": sum(tensor.num_bytes for tensor in stored.values()),
        "adapter": {"rank": adapter["r"], "alpha": adapter["lora_alpha"]} if adapter else None,
        "policy": {**to_dict(config), "dataset": json.loads((folder / "policy.json").read_text()).get("dataset")},
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
        f"statistics {_datasets(document['statistics'])}; used: {policy['dataset'] or 'to be chosen'}",
    ]
    return out + [f"  {count / 1e6:9.3f} M  {name}" for name, count in sorted(document["parameters"].items())]


def _datasets(statistics: dict[str, Any]) -> str:
    return ", ".join(
        "{} ({num_trajectories} episodes, {num_transitions} steps)".format(name, **entry) for name, entry in statistics.items()
    )
