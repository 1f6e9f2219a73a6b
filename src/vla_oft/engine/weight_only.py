"""Linear layers with small weights and products in the working type: for GPUs with little memory. They are not faster."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.kernels.packing import pack_int4, unpack_int4
from vla_oft.engine.linear import Linear, put, quantized
from vla_oft.engine.ops import Rows


class WeightOnly8(Linear):
    """Weights in int8 with one scale for each output, inputs and products in the working type."""

    scale: Tensor

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        values, scale = quantized(weight.to(self.device), torch.int8)
        put(self, "weight", values)
        put(self, "scale", scale.view(-1))
        put(self, "bias", None if bias is None else bias.to(self.device, self.dtype))

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, (self.weight.float() * self.scale[:, None]).to(self.dtype), self.bias)


class WeightOnly4(Linear):
    """Weights in int4, one scale for 128 inputs of an output; see `kernels/packing.py`."""

    scales: Tensor
    width: int

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        packed, scales = pack_int4(weight.to(self.device))
        self.width = weight.shape[1]
        put(self, "weight", packed)
        put(self, "scales", scales)
        put(self, "bias", None if bias is None else bias.to(self.device, self.dtype))

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, unpack_int4(self.weight, self.scales, self.width, self.dtype), self.bias)
