"""Weights in 4 bits: two values in a byte, one scale for 128 inputs of an output. Plain torch, on any device.

```
inputs of one group    0    1   ...   63   64   65  ...  127
bytes of the group  [  0 | 64 ][  1 | 65 ]  ...  [ 63 | 127 ]      low half | high half of a byte
```

The halves of a byte are 64 inputs apart, so that a kernel multiplies the low halves of 64 bytes with 64 neighbouring columns of x, and the
high halves with the next 64: nothing has to be interleaved. A stored value v is v - 8, in -7..7; the weight is (v - 8) * scale.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
LARGEST = 7.0
SMALLEST_SCALE = 1e-12


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K), any float dtype -> packed uint8 (N, groups * 64) and scales float32 (N, groups); groups = K / 128, rounded up."""
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass a matrix (N, K)")
    N, K = weight.shape
    groups = F.pad(weight.float(), (0, -K % GROUP)).view(N, -1, GROUP)
    scales = groups.abs().amax(-1).clamp(min=SMALLEST_SCALE) / LARGEST
    values = ((groups / scales[..., None]).round().clamp(-LARGEST, LARGEST) + 8).to(torch.uint8)
    low, high = values.view(N, -1, 2, GROUP // 2).unbind(2)
    return (low | (high << 4)).reshape(N, -1), scales


def unpack_int4(packed: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, width) that `pack_int4` stored, each value rounded once to `dtype`. width: K, without the last group's padding."""
    if packed.shape[1] != scales.shape[1] * GROUP // 2 or not 0 <= scales.shape[1] * GROUP - width < GROUP:
        raise ValueError(f"packed {tuple(packed.shape)} and scales {tuple(scales.shape)} are not those of a weight of width={width}")
    halves = torch.stack([packed & 15, packed >> 4]).view(2, len(packed), -1, GROUP // 2)
    values = halves.permute(1, 2, 0, 3).reshape(len(packed), -1, GROUP).float() - 8
    return (values * scales[..., None]).to(dtype).flatten(1)[:, :width]
