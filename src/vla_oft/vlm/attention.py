"""Scaled dot-product attention, on the path that is fastest where it runs."""

import torch
from torch import Tensor
from torch.nn import functional as F

EXPLICIT_ROWS = 512
"""On a CPU, up to this many rows and keys, softmax(q k') v is written out: torch 2.13's fused CPU kernel is 2.5x slower, forward and
backward, in bfloat16 at 203 rows (74 against 29 ms, batch 64, 3 heads of 64, 2 cores) and 7x slower at 69 rows (41 against 6 ms)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, heads, R, d), k and v (B, kv heads, S, d) -> (B, heads, R, d).

    mask: bool, broadcastable to (B, heads, R, S), True where a key is seen; None where all are.
    """
    if q.device.type != "cpu" or max(q.shape[2], k.shape[2]) > EXPLICIT_ROWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v
