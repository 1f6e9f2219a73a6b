"""`nf4.unpack` on a GPU, in one pass: a byte in, two weights out. In PyTorch's own operations it would cost ten times the memory traffic.

byte i holds weights 2 i (high half) and 2 i + 1      i // 32: its block of 64 weights      i // 8192: its group of 256 blocks
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES_PER_PROGRAM = 1024


def unpack(codes: Tensor, scales: Tensor, group_scales: Tensor, book: Tensor) -> Tensor:
    """The parts of packed weights, see `nf4.pack`, and the 16 values in bfloat16 -> bfloat16 (n,), bit for bit those of `nf4.unpack`."""
    weights = torch.empty(2 * codes.numel(), dtype=torch.bfloat16, device=codes.device)
    grid = (triton.cdiv(codes.numel(), BYTES_PER_PROGRAM),)
    _unpack[grid](codes, scales, group_scales, book, weights, codes.numel(), BLOCK=BYTES_PER_PROGRAM)
    return weights


@triton.jit
def _unpack(codes, scales, group_scales, book, weights, num_bytes, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_bytes
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    level = tl.load(scales + place // 32, mask=inside, other=0).to(tl.float32)
    group = tl.load(group_scales + place // 8192, mask=inside, other=0).to(tl.float32)
    scale = (group * ((level + 1.0) / 256.0)).to(tl.bfloat16).to(tl.float32)
    high = tl.load(book + (code >> 4)).to(tl.float32) * scale
    low = tl.load(book + (code & 15)).to(tl.float32) * scale
    pair = tl.interleave(high.to(tl.bfloat16), low.to(tl.bfloat16))
    out = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(weights + out, pair, mask=out < 2 * num_bytes)
