"""What this machine can do: GPUs, processor, memory, disk, renderer, clock, and which optional packages are there."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from vla_oft import __version__, machine
from vla_oft.doctor import probes
from vla_oft.train.memory import free_bytes

PACKAGES = {
    "train": {"peft": "LoRA", "tensorboard": "training curves (sink)"},
    "data": {
        "pyarrow": "LeRobot datasets",
        "av": "datasets with videos",
        "h5py": "HDF5 datasets (LIBERO, ALOHA)",
        "google_crc32c": "RLDS datasets, checked in full speed",
    },
    "sim": {"mujoco": "simulators: quickstart, demonstrations, closed-loop evaluation"},
    "serve": dict.fromkeys(("websockets", "msgpack", "fastapi", "uvicorn"), "serving policies to robots"),
    "wandb": {"wandb": "Weights & Biases (sink)"},
    "trackio": {"trackio": "trackio (sink)"},
}
"""Extras of this package: what each of their modules is for."""
LATE_S = 0.005
"""A robot's loop that wakes up later than this skips part of a 50 Hz period."""


def examine(folder: Path) -> dict[str, Any]:
    """Everything as JSON types; a few seconds. folder: where runs are written."""
    drawing, reason = probes.renderer() if importlib.util.find_spec("mujoco") else (None, "the package mujoco is missing")
    late = probes.lateness()
    return {
        "kind": "machine",
        "versions": {"vla-oft": __version__, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "gpus": gpus(),
        "cpu": {"name": machine.cpu_name(), "cores": cores(), "flops": probes.products()},
        "memory": {"free": free_bytes(torch.device("cpu")), "total": total_memory()},
        "disk": probes.disk(folder),
        "renderer": {"name": drawing, "reason": reason},
        "lateness_s": late,
        "packages": packages(),
        "warnings": _warnings(late, drawing, reason),
    }


def lines(document: dict[str, Any]) -> list[str]:
    """`examine` for people."""
    versions, cpu, disk, memory = (document[name] for name in ("versions", "cpu", "disk", "memory"))
    late, renderer = document["lateness_s"], document["renderer"]
    speed = f", writes {disk['write_bytes_per_s'] / 1e6:.0f} MB/s" if disk["write_bytes_per_s"] else ""
    out = [
        f"versions   vla-oft {versions['vla-oft']}, Python {versions['python']}, torch {versions['torch']}"
        + (f", CUDA {versions['cuda']}" if versions["cuda"] else ", without CUDA"),
        *(f"GPU {gpu['index']}      {_gpu_line(gpu)}" for gpu in document["gpus"]),
        *([] if document["gpus"] else ["GPU        none that torch can use"]),
        f"CPU        {cpu['name']}, {cpu['cores']} cores; products: float32 {cpu['flops']['fp32'] / 1e9:.0f}, "
        f"bfloat16 {cpu['flops']['bf16'] / 1e9:.0f} GFLOP/s",
        f"memory     {_gb(memory['free'])} of {_gb(memory['total'])} free",
        f"disk       {disk['folder']}: {_gb(disk['free'])} free{speed}" + ("" if disk["writable"] else ", NOT writable"),
        f"renderer   {renderer['name'] or 'none'}",
        f"clock      a 50 Hz loop wakes up {1e3 * late['median']:.2f} ms late (median), {1e3 * late['worst']:.1f} ms at worst",
    ]
    for extra, found in document["packages"].items():
        missing = [f"{name} ({what})" for name, what in PACKAGES[extra].items() if found[name] is None]
        fix = f"missing {', '.join(missing)}: pip install 'vla-oft[{extra}]'" if missing else "complete"
        out.append(f"[{extra}]".ljust(11) + fix)
    return out + [f"warning: {warning}" for warning in document["warnings"]]


def gpus() -> list[dict[str, Any]]:
    """Of this machine, as torch sees them."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        known = {"index": index, "name": properties.name, "free": free, "total": total, "driver": machine.gpu_driver()}
        found.append(known | {"capability": list(capability), "bf16": capability >= (8, 0), "fp8": capability >= (8, 9)})
    return found


def packages() -> dict[str, dict[str, str | None]]:
    """Version of each optional package by extra; None where it is missing."""
    return {extra: {name: _version(name) for name in modules} for extra, modules in PACKAGES.items()}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int | None:
    """Of the machine, in bytes; None where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, module.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _warnings(late: dict[str, float], drawing: str | None, reason: str) -> list[str]:
    found = []
    if machine.gpu_driver() and not torch.cuda.is_available():
        fix = "install a torch for CUDA (pytorch.org), or a newer driver"
        found.append(f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU: {fix}")
    if drawing is None:
        found.append(f"simulators cannot draw: {reason}")
    if late["worst"] > LATE_S:
        found.append(f"a 50 Hz loop woke up {1e3 * late['worst']:.0f} ms late: leave this machine to the robot while it moves")
    return found


def _gpu_line(gpu: dict[str, Any]) -> str:
    major, minor = gpu["capability"]
    numbers = [name for name, there in (("bf16", gpu["bf16"]), ("fp8", gpu["fp8"])) if there]
    has = f", {' and '.join(numbers)} in hardware" if numbers else ", NO bf16 in hardware"
    driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
    return f"{gpu['name']}: {_gb(gpu['free'])} of {_gb(gpu['total'])} free, compute capability {major}.{minor}{has}{driver}"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
