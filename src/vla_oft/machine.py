"""What this machine is, in the words that results are published with."""

import platform
import subprocess
from pathlib import Path


def cpu_name() -> str:
    """Of the processor, as it calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    return next(iter(output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()), "")


def output(*command: str) -> str:
    """Standard output of a program; empty when it fails, takes longer than 20 seconds or is not there."""
    try:
        found = subprocess.run(command, capture_output=True, timeout=20, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.decode(errors="replace")
