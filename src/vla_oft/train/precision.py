"""bfloat16 or float32? Whichever multiplies faster here: some CPUs have bfloat16 instructions, others emulate them slowly."""

import time
from typing import Literal

import torch

SIZE, REPEATS = 768, 8


def faster_precision(device: str) -> Literal["fp32", "bf16"]:
    """Decide by a few matrix products on a CPU (20 ms), by the hardware's own word on a GPU."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else "fp32"


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times)
