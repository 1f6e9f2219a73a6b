"""Everything between two matrix products, on rows (M, width): norms, rotary positions, activations, attention, quantisation of inputs.

`TORCH` is written out in plain torch: the CPU's path, and what the fused kernels of `engine/kernels` are tested against. `fused()` has
the same functions as Triton kernels, one pass over memory each. Both round to the storage type where the plain model does, or less often
(rotary positions are rounded once, what becomes 8 bits not before), with one exception: see `attend`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.vlm.attention import EXPLICIT_ROWS

if TYPE_CHECKING:
    from vla_oft.engine.tuner import Tuner

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 1e-12


class Quantized(NamedTuple):
    """Rows in 8 bits: values (M, width) float8_e4m3fn or int8, scale float32 (M, 1); they stand for values * scale."""

    values: Tensor
    scale: Tensor


Rows = Tensor | Quantized
Film = tuple[Tensor, Tensor]
"""Gain and shift of FiLM, (images, width) each: x * gain + shift. The gain is 1 + the model's scale."""


@dataclass(frozen=True)
class Ops:
    """One implementation of everything between two products. Shapes: see the functions of the same names below."""

    add_rms_norm: Callable[..., tuple[Tensor, Rows]]
    add_layer_norm: Callable[..., tuple[Tensor, Rows]]
    rope_: Callable[..., None]
    swiglu: Callable[..., Rows]
    gelu: Callable[..., Rows]
    quantize_rows: Callable[..., Quantized]
    attend: Callable[..., Tensor]


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x (M, width) -> 8 bits, symmetric, one scale for each row."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_SCALE) / LARGEST[dtype]
    values = x / scale
    return Quantized(values.round_().to(dtype) if dtype == torch.int8 else values.to(dtype), scale)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, quantize: torch.dtype | None) -> tuple[Tensor, Rows]:
    """x + delta (M, width), and its root-mean-square norm times weight (width), in 8 bits if asked.

    delta: (M, width), or float32 (parts, M, width) that are summed first, or None.
    """
    total = add(x, delta)
    if quantize is not None:
        return total, quantize_rows(weight.float() * F.rms_norm(total.float(), (total.shape[-1],), eps=eps), quantize)
    return total, weight.to(x.dtype) * F.rms_norm(total.float(), (total.shape[-1],), eps=eps).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    film: Film | None,
    rows_per_image: int,
    quantize: torch.dtype | None,
) -> tuple[Tensor, Rows]:
    """x + delta (M, width), modulated by `film` if given, and its layer norm, in 8 bits if asked.

    Row m belongs to image m // rows_per_image.
    """
    total = add(x, delta)
    if film is not None:
        gain, shift = film
        images = total.view(-1, rows_per_image, total.shape[-1])
        total = (images * gain[:, None] + shift[:, None]).view_as(total)
    if quantize is not None:
        return total, quantize_rows(F.layer_norm(total.float(), (total.shape[-1],), weight.float(), bias.float(), eps), quantize)
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, eps)


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    """Rotate queries and keys in place. qkv (M, (num_heads + 2 num_kv_heads) d); cos, sin float32 (T, d / 2): row m has those of m % T."""
    half = cos.shape[-1]
    turned = qkv[:, : (num_heads + num_kv_heads) * 2 * half].view(-1, len(cos), num_heads + num_kv_heads, 2, half)
    first, second = turned[..., 0, :].float(), turned[..., 1, :].float()
    c, s = cos[:, None], sin[:, None]
    turned.copy_(torch.stack([first * c - second * s, second * c + first * s], dim=-2))


def swiglu(gate_up: Tensor, quantize: torch.dtype | None) -> Rows:
    """silu(gate) * up of (M, 2 F), gate first -> (M, F), in 8 bits if asked."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out if quantize is None else quantize_rows(out, quantize)


def gelu(x: Tensor, quantize: torch.dtype | None) -> Rows:
    """Exact GELU of (M, F), in 8 bits if asked."""
    out = F.gelu(x)
    return out if quantize is None else quantize_rows(out, quantize)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """q (B, heads, R, d), k and v (B, kv heads, S, d) -> (B, R, heads d). mask: bool (B, 1, 1, S), True where a key is seen.
    causal: row i sees keys 0 to i; R = S.

    On a CPU, softmax(q k') v is written out in bfloat16 (half the time of torch's fused kernel at 600 rows), and in float32 for few rows.
    Scores are rounded to bfloat16 then: errors of this step double, those of a policy's actions do not grow (2.4e-2 with random weights,
    2.6e-2 with the fused kernel).
    """
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or max(q.shape[2], k.shape[2]) <= EXPLICIT_ROWS):
        out = _attend_explicitly(q, k, v, mask, causal)
    else:
        if causal and mask is not None:
            mask, causal = mask & _causal(q, k), False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(2)


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = _causal(q, k) if mask is None else mask & _causal(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


def add(x: Tensor, delta: Tensor | None) -> Tensor:
    """x + delta; see `add_rms_norm`."""
    if delta is None:
        return x
    if delta.ndim == 3:
        delta = delta.float().sum(0).to(x.dtype)
    return x + delta


TORCH = Ops(
    add_rms_norm=add_rms_norm,
    add_layer_norm=add_layer_norm,
    rope_=rope_,
    swiglu=swiglu,
    gelu=gelu,
    quantize_rows=quantize_rows,
    attend=attend,
)


def fused(tuner: "Tuner | None" = None) -> Ops:
    """The same as Triton kernels, and attention as the tuner chooses. Raises ImportError where triton is not installed."""
    from vla_oft.engine.kernels import activations, norms, rotary
    from vla_oft.engine.kernels.attention import Attention, attend_with
    from vla_oft.engine.kernels.candidates import usual_rows

    def tuned_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        if tuner is None or (causal and mask is not None):
            return attend(q, k, v, mask, causal=causal)
        (batch, heads, rows, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        way = tuner.choose(
            Attention(**sizes, rows=usual_rows(rows), keys=usual_rows(keys), dtype=q.dtype, masked=mask is not None, causal=causal)
        ).way
        return attend_with(way, q, k, v, mask, causal).transpose(1, 2).flatten(2)

    return Ops(
        add_rms_norm=lambda *a, **k: _named(norms.add_rms_norm(*a, **k)),
        add_layer_norm=lambda *a, **k: _named(norms.add_layer_norm(*a, **k)),
        rope_=rotary.rope_,
        swiglu=lambda *a, **k: _quantized(activations.swiglu(*a, **k)),
        gelu=lambda *a, **k: _quantized(activations.gelu(*a, **k)),
        quantize_rows=lambda *a, **k: Quantized(*activations.quantize_rows(*a, **k)),
        attend=tuned_attend,
    )


def _named(result: tuple[Tensor, Tensor | tuple[Tensor, Tensor]]) -> tuple[Tensor, Rows]:
    return result[0], _quantized(result[1])


def _quantized(rows: Tensor | tuple[Tensor, Tensor]) -> Rows:
    return rows if isinstance(rows, Tensor) else Quantized(*rows)
