"""Linear layers of a compiled policy: one class for each way to store weights and multiply them.

fill(weight, bias)   sets the weights, the first time or in place: captured graphs read the same memory afterwards
layer(rows)          rows (M, in), in the layer's input type (`quantize`), -> (M, out)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.ops import LARGEST, SMALLEST_SCALE, Ops, Quantized, Rows


class Linear(ABC):
    """x W' + b. quantize: the 8-bit type that the input must have, or None for `dtype`."""

    quantize: torch.dtype | None = None
    weight: Tensor
    bias: Tensor | None

    def __init__(self, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        self.dtype, self.device, self.ops = dtype, device, ops
        self.bias = None

    @abstractmethod
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight (out, in) and bias (out), of any float type: rounded once, here."""

    @abstractmethod
    def __call__(self, x: Rows) -> Tensor:
        """(M, in) -> (M, out)."""

    def gelu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        """Exact GELU of the product, as the next layer wants it."""
        return self.ops.gelu(self(x), quantize)

    def swiglu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        """silu(first half) * second half of the product's outputs, as the next layer wants it."""
        return self.ops.swiglu(self(x), quantize)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that occupies memory."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))


LinearFactory = Callable[[], Linear]
Read = Callable[[str], Tensor]
"""A weight of the policy by its name, of any float type."""


def put(owner: object, name: str, value: Tensor | None) -> None:
    """Set an attribute of `owner`, in memory of its own; in place when it is a tensor already, because captured graphs read that memory."""
    old = getattr(owner, name, None)
    if isinstance(old, Tensor) and value is not None:
        old.copy_(value)
    else:
        setattr(owner, name, None if value is None else value.detach().clone(memory_format=torch.contiguous_format))


def quantized_for(layer: Linear, ops: Ops, x: Tensor) -> Rows:
    """Rows in the input type of `layer`."""
    return x if layer.quantize is None else ops.quantize_rows(x, layer.quantize)


class Dense(Linear):
    """Weights in the working type."""

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        put(self, "weight", weight.to(self.device, self.dtype).contiguous())
        put(self, "bias", None if bias is None else bias.to(self.device, self.dtype))

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)


def quantized(weight: Tensor, dtype: torch.dtype) -> Quantized:
    """A weight (out, in) in 8 bits with one scale for each output."""
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_SCALE) / LARGEST[dtype]
    values = weight / scale
    return Quantized(values.round_().to(dtype) if dtype == torch.int8 else values.to(dtype), scale)


class Rowwise(Linear):
    """Weights and inputs in 8 bits, one scale for each row of both; products summed in float32 (fp8) or int32 (int8)."""

    scale: Tensor

    def __init__(self, quantize: torch.dtype, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        super().__init__(dtype, device, ops)
        self.quantize = quantize

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        assert self.quantize is not None
        values, scale = quantized(weight.to(self.device), self.quantize)
        put(self, "weight", values)
        put(self, "scale", scale.view(1, -1))
        put(self, "bias", None if bias is None else bias.to(self.device, self.dtype))

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Quantized)
        if self.quantize == torch.int8:
            return self._scaled(torch._int_mm(x.values, self.weight.t()), x.scale)
        if self.device.type == "cuda":
            return torch._scaled_mm(
                x.values, self.weight.t(), scale_a=x.scale, scale_b=self.scale, bias=self.bias, out_dtype=self.dtype, use_fast_accum=True
            )
        return self._scaled(x.values.float() @ self.weight.float().t(), x.scale)  # the same numbers, for tests

    def _scaled(self, sums: Tensor, scale: Tensor) -> Tensor:
        out = sums.float().mul_(scale)
        out = out.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias.float(), out, self.scale)
        return out.to(self.dtype)
