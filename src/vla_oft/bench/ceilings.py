"""How fast a device can be at all: matrix products and memory, measured on the spot or known from elsewhere."""

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GPU_SIDE = 8192
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
MIN_TIME_S = {"cuda": 0.05, "cpu": 0.15}
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """flops: operations per second of large products by name of their numbers (fp32, bf16, fp8, int8); what is missing is not supported.

    bytes_per_s: of a large copy, bytes read plus bytes written. source: where the figures are from.
    """

    name: str
    flops: dict[str, float]
    bytes_per_s: float
    source: str


KNOWN = {
    "h200": Ceilings(
        name="NVIDIA H200",
        # bf16 and memory: 8192-cubed product of random numbers and a copy of 8.6 GB, measured through PyTorch. fp8 and int8: twice that, as
        # in the datasheet (1979 to 990). fp32: datasheet.
        flops={"bf16": 790e12, "fp8": 1580e12, "int8": 1580e12, "fp32": 67e12},
        bytes_per_s=4.3e12,
        source="bf16 and memory measured, others from the datasheet's ratios",
    ),
    "a100": Ceilings(
        name="NVIDIA A100",
        # Nothing of it was measured here: 80 % of the datasheet's 312 TFLOP/s and 93 % of its 2.04 TB/s (80 GB), what large products and
        # copies usually reach; no fp8. fp32: datasheet.
        flops={"bf16": 250e12, "int8": 500e12, "fp32": 19.5e12},
        bytes_per_s=1.9e12,
        source="assumed: 80 % of the datasheet's arithmetic, 93 % of its bandwidth",
    ),
}


@functools.cache
def measure_ceilings(device: torch.device, product: tuple[int, int, int]) -> Ceilings:
    """Time large products of random numbers and a large copy; takes a second or two, once in a process.

    product: rows, inputs and outputs of the model's own largest kind of product, which a CPU is measured on: there, small matrices stay in
    the cache and are faster than large ones. A GPU is measured on a product of 8192-cubed.
    """
    gpu = device.type == "cuda"
    rows, inputs, outputs = (GPU_SIDE,) * 3 if gpu else product
    a, b = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
    flops = {}
    for name, calls in _products(a, b).items():
        speeds = [2 * rows * inputs * outputs / _seconds(call, device) for call in calls if _supported(call)]
        if speeds:
            flops[name] = max(speeds)
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    shape = "8192-cubed" if gpu else f"{rows} x {inputs} by {inputs} x {outputs}"
    return Ceilings(name=name, flops=flops, bytes_per_s=copied, source=f"measured: products {shape}, copy of {source.nbytes >> 20} MiB")


def _products(a: Tensor, b: Tensor) -> dict[str, list[Callable[[], object]]]:
    """a @ b.T in every kind of number; the fastest of several ways counts."""
    a16, b16 = a.bfloat16(), b.bfloat16()
    a8, b8 = (a * 30).clamp(-127, 127).to(torch.int8), (b * 30).clamp(-127, 127).to(torch.int8)
    found: dict[str, list[Callable[[], object]]] = {
        "fp32": [lambda: F.linear(a, b)],
        "bf16": [lambda: F.linear(a16, b16)],
        "int8": [lambda: torch._int_mm(a8, b8.T)],
    }
    if a.is_cuda:
        one = torch.ones((), device=a.device)
        af, bf = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        found["fp8"] = [lambda: torch._scaled_mm(af, bf.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)]
        return found
    for name, x, w in (("fp32", a, b), ("bf16", a16, b16)):  # oneDNN with weights in its own layout: up to half as fast again
        found[name].append(_Packed(x, w))
    found["int8"].append(_PackedInt8(a, b8))
    return found


class _Packed:
    """x @ w.T with the weights laid out for this CPU in advance."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w, self.packed = x, w, None

    def __call__(self) -> Tensor:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.w, len(self.x))
        return torch.ops.mkldnn._linear_pointwise(self.x, self.packed, None, "none", [], "")


class _PackedInt8:
    """float32 x, rounded to int8 on the way, @ w.T."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w, self.packed = x, w, None

    def __call__(self) -> Tensor:
        if self.packed is None:
            scales, zeros = torch.full((len(self.w),), 0.01), torch.zeros(len(self.w), dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch means to remove this type; without it, the other way counts
                weights = torch._make_per_channel_quantized_tensor(self.w, scales, zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(weights, None)
        return torch.ops.quantized.linear_dynamic(self.x, self.packed)


def _supported(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, NotImplementedError, AttributeError):  # not on this device, or not in this version of torch
        return False
    return True


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of `REPEATS` mean times."""
    call()
    best, count = float("inf"), 1
    for _ in range(REPEATS):
        while True:
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                call()
            _synchronize(device)
            took = time.perf_counter() - start
            if took >= MIN_TIME_S[device.type] / REPEATS or count >= 1 << 20:
                break
            count *= 2
        best = min(best, took / count)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
