"""What a time depends on besides the code: versions, devices, load. Same idea as `evaluate/versions.py`, for speed instead of success."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

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
    found |= {"cpu": _cpu(), "cores": os.cpu_count() or 0, "threads": torch.get_num_threads(), "platform": platform.platform()}
    if hasattr(os, "getloadavg"):
        found["load_1min_at_start"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "",
            "driver": driver[0] if driver else "",
        }
    return {name: value for name, value in found.items() if value != ""}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that this file lies in, with a + when files differ from it; empty outside of one."""
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD").strip()
    changed = commit and _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no", "--", ".").strip()
    return commit + ("+" if changed else "")


def _output(*command: str) -> str:
    """Standard output, or nothing when the program fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
