"""Which class stores which weights: by the precision, the device and what is installed."""

import warnings

import torch

from vla_oft.engine import linear_cpu, ops
from vla_oft.engine.linear import Linear
from vla_oft.engine.linear_cpu import PackedDense, PackedGateUp
from vla_oft.engine.options import Options, Precision, WeightKind, numerics
from vla_oft.engine.tuner import Tuner, has_triton
from vla_oft.policy_config import PolicyConfig
from vla_oft.weights import check_memory

_RESERVE_BYTES = 1_500_000_000
"""Of a GPU's memory, for what is computed and for captured graphs."""


class Factory:
    """Makes empty layers. llm, gated, vision: big ones of the decoder, its gate and up, and of the towers; dense: small or exact ones."""

    def __init__(self, precision: Precision, device: torch.device, options: Options) -> None:
        self.numerics = numerics(precision)
        self.dtype, self.device = self.numerics.dtype, device
        self.pack = options.pack and device.type == "cpu" and linear_cpu.available()
        self.tuner = Tuner.for_device(device, enabled=options.tune and options.triton)
        fused = options.triton and device.type == "cuda"
        if fused and not has_triton():
            warnings.warn("triton is not installed: the GPU runs torch's unfused kernels; pip install triton", stacklevel=2)
        self.ops = ops.fused(self.tuner) if fused and has_triton() else ops.TORCH

    def dense(self) -> Linear:
        return self._make("dense")

    def vision(self) -> Linear:
        return self._make(self.numerics.vision)

    def llm(self) -> Linear:
        return self._make(self.numerics.llm)

    def gated(self) -> Linear:
        return self._make(self.numerics.llm, packed=PackedGateUp)

    def _make(self, kind: WeightKind, packed: type[PackedDense] = PackedDense) -> Linear:
        made = packed if kind == "dense" and self.pack else Linear
        return made(kind, self.dtype, self.device, self.ops, self.tuner)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ValueError for a precision that is unknown, or that the device cannot multiply in."""
    numerics(precision)
    if device.type != "cuda":
        return
    needed = {"fp8": (8, 9), "fp8-llm": (8, 9), "fp32": (0, 0)}.get(precision, (8, 0))
    capability = torch.cuda.get_device_capability(device)
    if capability < needed:
        name, wanted, found = torch.cuda.get_device_name(device), "{}.{}".format(*needed), "{}.{}".format(*capability)
        raise ValueError(f"precision={precision!r} needs a GPU of compute capability {wanted}; {name} has {found}: choose another")


def require_memory(config: PolicyConfig, precision: Precision, device: torch.device) -> None:
    """Raise ValueError when the weights in `precision` do not fit the device's free memory."""
    needed = weight_bytes(config, precision)
    if device.type == "cpu":
        check_memory(needed, f"compiling for precision={precision!r}")
        return
    torch.cuda.empty_cache()  # what torch keeps of an earlier policy is free too
    free, _ = torch.cuda.mem_get_info(device)
    if needed + _RESERVE_BYTES > free:
        name, gigabytes = torch.cuda.get_device_name(device), (needed + _RESERVE_BYTES) / 1e9
        raise ValueError(
            f"precision={precision!r} needs {gigabytes:.1f} GB on {name}, {free / 1e9:.1f} GB are free: choose int8 or int4, "
            "or compile from a checkpoint or a policy on the CPU, which then takes no memory there"
        )


def weight_bytes(config: PolicyConfig, precision: Precision) -> int:
    """About, of all weights as they will be stored."""
    chosen, vlm = numerics(precision), config.vlm
    size = {"dense": chosen.dtype.itemsize, "fp8": 1, "int8-dynamic": 1, "int8": 1, "int4": 0.53}
    width, kv_width = vlm.llm.width, vlm.llm.num_kv_heads * vlm.llm.head_dim
    llm = vlm.llm.depth * width * (2 * width + 2 * kv_width + 3 * vlm.llm.mlp_dim)
    towers = sum(t.depth * (4 * t.width * t.width + 2 * t.width * t.mlp_dim) for t in (vlm.dino, vlm.siglip))
    film = sum(2 * t.depth * t.width * vlm.llm.width for t in (vlm.dino, vlm.siglip)) if vlm.film else 0
    features = vlm.dino.width + vlm.siglip.width
    projector = 4 * features * features + 4 * features * vlm.llm.width + vlm.llm.width**2
    exact = film + 2 * vlm.llm.vocab_size * vlm.llm.width
    return round(size[chosen.llm] * llm + size[chosen.vision] * (towers + projector) + chosen.dtype.itemsize * exact)
