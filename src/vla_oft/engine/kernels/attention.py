"""Attention through one of torch's backends, as something that can be tuned."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vla_oft.engine.kernels.candidates import Machine
from vla_oft.engine.kernels.products import Candidate

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""`torch` leaves the choice to torch."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """q (batch, heads, rows, head_dim) over k and v (batch, kv_heads, keys, head_dim). masked: a bool mask (batch, 1, 1, keys) is given."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    causal: bool = False

    @property
    def key(self) -> str:
        """Names this attention in the cache."""
        marks = [str(self.dtype).removeprefix("torch.")] + ["masked"] * self.masked + ["causal"] * self.causal
        return f"attention {self.batch}x{self.heads}/{self.kv_heads}x{self.rows}x{self.keys}x{self.head_dim} {' '.join(marks)}"

    @property
    def tolerance(self) -> float:
        """Largest `trials.distance` from the answer of torch's own choice: probabilities are rounded to the dtype too."""
        return {torch.float32: 1e-4, torch.float16: 5e-3}.get(self.dtype, 4e-2)

    def candidates(self, machine: Machine) -> list[Candidate]:
        """torch's own choice, then each backend."""
        return [Candidate(way="torch"), *(Candidate(way=name) for name in BACKENDS)]


def attend_with(way: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention -> (batch, heads, rows, head_dim). Raises RuntimeError where the backend cannot do it."""
    kwargs = {"attn_mask": mask, "is_causal": causal, "enable_gqa": k.shape[1] != q.shape[1]}
    if way == "torch":
        return F.scaled_dot_product_attention(q, k, v, **kwargs)
    with sdpa_kernel(BACKENDS[way]):
        return F.scaled_dot_product_attention(q, k, v, **kwargs)
