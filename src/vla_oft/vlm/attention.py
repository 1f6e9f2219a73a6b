"""Scaled dot-product attention, on the path that is fastest where it runs.

Prompts of a batch differ in length, and a mask keeps a GPU off its fastest kernel. So padding comes first in every row, and each row is two
sequences to the flash kernel for sequences of any length, one after the other in memory, without a copy or a wait for the host:

    row 0    [pad pad | BOS patches prompt slots]         bounds  0  2  S
    row 1    [BOS patches longer prompt ... slots]                S  S  2 S      an empty one is fine
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RAGGED_DTYPES = (torch.bfloat16, torch.float16)
EXPLICIT_ROWS = 512
"""On a CPU, up to this many rows and keys, softmax(q k') v is written out: torch 2.13's fused CPU kernel is 2.5x slower, forward and
backward, in bfloat16 at 203 rows (74 against 29 ms, batch 64, 3 heads of 64, 2 cores) and 7x slower at 69 rows (41 against 6 ms)."""


class Padding(NamedTuple):
    """Which keys are real, where some are padding; all padding comes before all real ones.

    mask: bool (B, 1, 1, S). bounds: int32 (2 B + 1,), where padding and real rows begin when the batch is one long sequence; None where
    the device has no kernel for that.
    """

    mask: Tensor
    bounds: Tensor | None

    @classmethod
    def of(cls, real: Tensor) -> "Padding":
        """real: bool (B, S), False and then True in every row."""
        if not _has_ragged_kernel(real.device):
            return cls(real[:, None, None, :], None)
        B, S = real.shape
        starts = torch.arange(B, device=real.device) * S
        bounds = torch.stack([starts, starts + (~real).sum(1)], dim=1).flatten()
        return cls(real[:, None, None, :], F.pad(bounds, (0, 1), value=B * S).int())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Padding | None = None) -> Tensor:
    """q (B, heads, R, d), k and v (B, kv heads, S, d) -> (B, heads, R, d).

    mask: bool, broadcastable to (B, heads, R, S), True where a key is seen; or `Padding`, where the R rows are the last ones and, if not
    all, real; None where all are seen. With `Padding`, what comes out of padded rows has no meaning.
    """
    if isinstance(mask, Padding):
        if mask.bounds is not None and q.shape[2] > 1 and q.shape[1] == k.shape[1] and q.dtype in RAGGED_DTYPES:
            return _ragged(q, k, v, mask.bounds)
        mask = mask.mask
    if q.device.type != "cpu" or max(q.shape[2], k.shape[2]) > EXPLICIT_ROWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def _ragged(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    (B, heads, R, d), S = q.shape, k.shape[2]
    row_bounds = bounds
    if R < S:  # the last rows of each: none of padding
        row_bounds = (torch.arange(2 * B + 1, device=q.device, dtype=torch.int32) // 2) * R
    packed = lambda t: t.transpose(1, 2).reshape(-1, heads, d)  # noqa: E731
    out = varlen_attn(packed(q), packed(k), packed(v), row_bounds, bounds, R, S)
    assert isinstance(out, Tensor)
    return out.view(B, R, heads, d).transpose(1, 2)


def _has_ragged_kernel(device: torch.device) -> bool:
    """torch has one from 2.10 on, for GPUs from Ampere on."""
    if device.type != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
