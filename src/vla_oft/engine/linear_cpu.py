"""Dense layers on a CPU through oneDNN: weights rearranged once for its kernels, activations applied while the sums are in registers.

`F.linear` rearranges the weight in every call: 600 rows by 1024 x 3072 take 35 ms in float32 against 18, 10.4 in bfloat16 against 8.9
(2 cores with AVX-512). The operators are those that torch.compile emits; where a build lacks them, `available` is False.
"""

import torch
from torch import Tensor

from vla_oft.engine.linear import Linear, put
from vla_oft.engine.ops import Rows

_USUAL_ROWS = 512
"""The rearrangement is chosen for about so many rows; any number is right."""


def available() -> bool:
    """Whether this build of torch has oneDNN's fused linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedDense(Linear):
    """Weights in the working type, in oneDNN's own layout."""

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = self._pack(weight)
        put(self, "bias", None if bias is None else bias.to(self.dtype))

    def __call__(self, x: Rows) -> Tensor:
        return self._product(x, self.weight, "none")

    def gelu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        assert quantize is None
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def _product(self, x: Rows, weight: Tensor, activation: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, activation, [], "")

    def _pack(self, weight: Tensor) -> Tensor:
        """In memory of its own: oneDNN may find that the weight is in its layout already."""
        own = weight.detach().to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return torch.ops.mkldnn._reorder_linear_weight(own, _USUAL_ROWS)


class PackedGateUp(PackedDense):
    """Gate and up of a SwiGLU: weight (2 F, in), gate first. silu and the product happen inside the two matrix products."""

    gate: Tensor
    up: Tensor

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        assert bias is None
        gate, up = weight.chunk(2)
        self.gate, self.up = self._pack(gate), self._pack(up)

    def __call__(self, x: Rows) -> Tensor:
        raise NotImplementedError("gate and up are multiplied together")

    def swiglu(self, x: Rows, quantize: torch.dtype | None) -> Rows:
        assert quantize is None and isinstance(x, Tensor)
        gate = torch.ops.mkldnn._linear_pointwise(x, self.gate, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.up, None, "mul")
