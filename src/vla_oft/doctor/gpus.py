"""Memory of GPUs that runs are planned for. The machine at hand is asked itself."""

from dataclasses import dataclass

import torch

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """memory: bytes. capability: of computing; 8.0 and above multiply bfloat16. ceilings: name in `bench.ceilings.KNOWN`, or None."""

    name: str
    memory: int
    capability: tuple[int, int]
    ceilings: str | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 numbers in hardware."""
        return self.capability >= (8, 0)


def _known(name: str, mib: int, capability: tuple[int, int], ceilings: str | None = None) -> Gpu:
    return Gpu(name=name, memory=mib * MIB, capability=capability, ceilings=ceilings)


KNOWN = {
    "b200": _known("NVIDIA B200", 183_359, (10, 0)),
    "h200": _known("NVIDIA H200", 143_771, (9, 0), "h200"),
    "h100": _known("NVIDIA H100 80GB", 81_559, (9, 0)),
    "a100-80": _known("NVIDIA A100 80GB", 81_920, (8, 0), "a100"),
    "a100-40": _known("NVIDIA A100 40GB", 40_960, (8, 0), "a100"),
    "l40s": _known("NVIDIA L40S", 46_068, (8, 9)),
    "a6000": _known("NVIDIA RTX A6000", 49_140, (8, 6)),
    "5090": _known("NVIDIA GeForce RTX 5090", 32_607, (12, 0)),
    "4090": _known("NVIDIA GeForce RTX 4090", 24_564, (8, 9)),
    "3090": _known("NVIDIA GeForce RTX 3090", 24_576, (8, 6)),
    "a10": _known("NVIDIA A10", 23_028, (8, 6)),
    "l4": _known("NVIDIA L4", 23_034, (8, 9)),
    "4080": _known("NVIDIA GeForce RTX 4080", 16_376, (8, 9)),
    "t4": _known("NVIDIA T4", 15_360, (7, 5)),
}
"""Memory in MiB as nvidia-smi shows it in its users' published logs, with error correction where it is on by default; it differs by some
100 MiB between drivers. Compute capabilities: NVIDIA's CUDA programming guide."""


def find(text: str) -> Gpu:
    """A GPU by its short name, or one of so many GB (1e9 bytes): `h200`, `24`. Raises ValueError listing the known ones."""
    if text.lower() in KNOWN:
        return KNOWN[text.lower()]
    try:
        gigabytes = float(text)
    except ValueError:
        raise ValueError(f"--gpu {text}: write its memory in GB, for example 24, or one of {', '.join(KNOWN)}") from None
    if not 0 < gigabytes < 10_000:
        raise ValueError(f"--gpu {text}: its memory in GB must be positive")
    return Gpu(name=f"a GPU with {gigabytes:g} GB", memory=int(gigabytes * 1e9), capability=(8, 0))


def here() -> Gpu | None:
    """This machine's first GPU, with what is free of it now; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    ceilings = next((name for name in ("h200", "a100") if name in properties.name.lower()), None)
    free = torch.cuda.mem_get_info(0)[0]
    return Gpu(name=properties.name, memory=free, capability=(properties.major, properties.minor), ceilings=ceilings)
