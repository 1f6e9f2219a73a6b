"""What a time depends on besides the code: versions, devices, load. Same idea as `evaluate/versions.py`, for speed instead of success."""

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from vla_oft.machine import cpu_name, gpu_driver, output

DISTRIBUTIONS = ("vla-oft", "numpy", "tokenizers", "triton")


@functools.cache
def environment(device: torch.device) -> dict[str, str | int | float]:
    """Name -> version or description; what is not there is left out. Of the first call in a process."""
    found: dict[str, str | int | float] = {"python": platform.python_version(), "torch": torch.__version__, "commit": _commit()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found |= {"cpu": cpu_name(), "cores": os.cpu_count() or 0, "threads": torch.get_num_threads(), "platform": platform.platform()}
    if hasattr(os, "getloadavg"):
        found["load_1min_at_start"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "",
            "driver": gpu_driver(),
        }
    return {name: value for name, value in found.items() if value != ""}


def _commit() -> str:
    """Of the checkout that this file lies in, with a + when files differ from it; empty outside of one."""
    here = str(Path(__file__).parent)
    commit = output("git", "-C", here, "rev-parse", "--short=12", "HEAD").strip()
    changed = commit and output("git", "-C", here, "status", "--porcelain", "--untracked-files=no", "--", ".").strip()
    return commit + ("+" if changed else "")
