"""Linear layers of a compiled policy, whatever their weights are stored in and whichever way is fastest to multiply them.

fill(weight, bias)     sets the weights, the first time or in place: captured graphs read the same memory afterwards
layer(rows)            rows (M, in), in the layer's input type (`quantize`), -> (M, out)
layer.gelu, .swiglu    the same with the activation behind it, fused where that is faster
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vla_oft.engine.kernels.candidates import usual_rows
from vla_oft.engine.kernels.packing import pack_int4
from vla_oft.engine.kernels.products import EIGHT_BITS, Activation, Product, Stored, compute
from vla_oft.engine.ops import Ops, Rows, quantize_rows
from vla_oft.engine.options import WeightKind
from vla_oft.engine.tuner import Tuner

Read = Callable[[str], Tensor]
"""A weight of the policy by its name, of any float type."""


class Linear:
    """x W' + b. quantize: the 8-bit type that the input must have, or None for `dtype`."""

    values: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, kind: WeightKind, dtype: torch.dtype, device: torch.device, ops: Ops, tuner: Tuner) -> None:
        self.kind: WeightKind = kind
        self.dtype, self.device, self.ops, self.tuner = dtype, device, ops, tuner
        self.quantize = EIGHT_BITS.get(kind)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight (out, in) and bias (out), of any float type: rounded once, here."""
        weight, scale = weight.detach().to(self.device), None
        self.inner = weight.shape[1]
        if self.kind == "dense":
            values = weight.to(self.dtype)
        elif self.kind == "int4":
            values, scale = pack_int4(weight)
        else:
            values, scale = quantize_rows(weight, self.quantize or torch.int8)
            scale = scale[:, 0]
        put(self, "values", values)
        put(self, "scale", scale)
        put(self, "bias", None if bias is None else bias.to(self.device, self.dtype))

    def __call__(self, x: Rows, *, parts: bool = False) -> Tensor:
        """(M, in) -> (M, out). parts: float32 (parts, M, out), to be summed, will do as well: for `Ops.add_rms_norm` and its like."""
        out = self._compute(x, None, None, parts)
        assert isinstance(out, Tensor)
        return out

    def gelu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        """Exact GELU of the product, as the next layer wants it."""
        return self._compute(x, "gelu", quantize, False)

    def swiglu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        """silu(first half) * second half of the product's outputs, as the next layer wants it."""
        return self._compute(x, "swiglu", quantize, False)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that occupies memory."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))

    def _compute(self, x: Rows, activation: Activation | None, quantize: torch.dtype | None, parts: bool) -> Rows:
        product = Product(
            rows=usual_rows(len(x if isinstance(x, Tensor) else x.values)),
            columns=len(self.values),
            inner=self.inner,
            kind=self.kind,
            dtype=self.dtype,
            bias=self.bias is not None,
            activation=activation,
            quantize=quantize,
            parts=parts,
        )
        weight = Stored(kind=self.kind, values=self.values, scale=self.scale, bias=self.bias)
        return compute(product, self.tuner.choose(product).candidate, x, weight, self.ops)


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
