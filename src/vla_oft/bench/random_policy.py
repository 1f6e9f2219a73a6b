"""Policies with random weights, built where they will run: a model of 7.5 B parameters takes seconds on a GPU and no host memory.

Each parameter is drawn from its own seed (of the policy's seed and the parameter's name), so the same seed gives the same weights in
whatever order they are made, and policies that differ in their head alone can share all others.
"""

import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from vla_oft.bench.workloads import Workload
from vla_oft.policy import Policy

RESIDUAL = ("o_proj", "down_proj", "attn.proj", "mlp.fc2")
"""Layers that add to the residual stream: half as large, so that activations stay moderate through 32 layers."""
GENTLE = "noise_predictor.fc2"
"""A trained noise predictor pulls samples together. A random one drives them apart, so that 50 steps would turn rounding errors of 1e-6
into other actions (measured: 1e-5 with this layer at a tenth, 1 without)."""
MARGIN_BYTES = 2 << 30


def build(workload: Workload, *, device: torch.device, dtype: torch.dtype, seed: int = 0, donor: Policy | None = None) -> Policy:
    """A random policy for `workload`, in evaluation mode. donor: where it has a parameter of the same name and shape, the SAME tensor is
    used, not a copy.
    """
    with torch.device("meta"):
        policy = Policy(workload.config, workload.statistics(), workload.tokenizer())
    shared = dict(donor.named_parameters()) if donor is not None else {}
    for name, empty in list(policy.named_parameters()):
        given = shared.get(name)
        if given is None or given.shape != empty.shape:
            given = nn.Parameter(random_weights(name, empty.shape, device, seed).to(dtype), requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(module), leaf, given)
    assert not list(policy.buffers()), "a buffer would stay on the meta device"
    return policy.eval()


def random_weights(name: str, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """float32 values of one parameter: activations stay of order one, attention prefers some tokens, and FiLM is not the identity."""
    generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    module = name.rpartition(".")[0]
    film = module.endswith((".scale", ".shift"))
    if len(shape) == 1:
        if name.endswith("bias"):
            return values.mul_(0.1 if film else 0.02)
        return values.mul_(0.1).add_(1)  # norms and layer scales
    fan_in = shape[1:].numel()
    if len(shape) == 3 or "embed_tokens" in name:  # tokens: class, registers, positions, words
        return values.mul_(0.02)
    gain = 4.0 if film else 0.5 if module.endswith(RESIDUAL) else 0.1 if module.endswith(GENTLE) else 1.0
    return values.mul_(gain * fan_in**-0.5)


def num_parameters(workload: Workload) -> int:
    """Without allocating any."""
    with torch.device("meta"):
        policy = Policy(workload.config, workload.statistics(), workload.tokenizer())
    return sum(p.numel() for p in policy.parameters())


def require_memory(needed: float, device: torch.device, what: str) -> None:
    """Raise ValueError unless `needed` bytes and a margin are free."""
    free = free_bytes(device)
    if free is not None and needed + MARGIN_BYTES > free:
        raise ValueError(
            f"{what} needs {(needed + MARGIN_BYTES) / 1e9:.0f} GB on {device}, {free / 1e9:.0f} GB are free; "
            "choose a smaller workload (cpu, nano), or a device with more memory"
        )


def free_bytes(device: torch.device) -> int | None:
    """Of the device, or of the host; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else None
