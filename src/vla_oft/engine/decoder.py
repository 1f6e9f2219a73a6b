"""The language model of a compiled policy: a Llama-family decoder with everything that no output depends on left out.

merged products    q, k, v in one, gate and up in one
last layer         keys and values for all rows; queries, MLP and norm only for the rows that are read
first layer        empty slots are rows of zeros: their norm, q, k and v are zero whatever the position, they attend alike, and so
                   they leave the layer alike. One row stands for all of them; as keys they count one by one.

    rows of the sequence      [ fixed ............ | slot slot slot slot | stop ]
    rows computed in layer 1  [ fixed ............ | slot                | stop ]   keys: fixed, 4 zeros, stop
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_oft.engine.factory import Factory
from vla_oft.engine.linear import Linear, Read, put, quantized_for
from vla_oft.engine.ops import Rows, add
from vla_oft.vlm import llama

Rope = tuple[Tensor, Tensor]
"""cos and sin, float32 (T, d / 2) each; T = S, or B S where prompts are padded differently."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is known about a pass before it runs.

    rope: of all rows; rope_read: of the rows that are read; rope_merged: of the rows that the first layer computes when `zeros` share one.
    mask: bool (B, 1, 1, keys), False at padding, or None. read: the rows whose final state is wanted. zeros: rows of the input that are
    all zero, or None. causal: row i sees rows 0 to i only; then the last row alone may be read.
    """

    rope: Rope
    rope_read: Rope
    mask: Tensor | None
    read: slice
    rope_merged: Rope | None = None
    zeros: slice | None = None
    causal: bool = False

    def tensors(self) -> list[Tensor]:
        """All of them, always in the same order."""
        ropes = [self.rope, self.rope_read, self.rope_merged or ()]
        return [*(table for rope in ropes for table in rope), *([] if self.mask is None else [self.mask])]


class Cache:
    """Keys and values of one layer, (B, kv heads, capacity, d), filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self.pair: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows; returns views of all rows so far."""
        if self.pair is None:
            B, heads, _, d = keys.shape
            self.pair = (keys.new_empty(B, heads, self.capacity, d), keys.new_empty(B, heads, self.capacity, d))
        start, self.filled = self.filled, self.filled + keys.shape[2]
        for store, new in zip(self.pair, (keys, values), strict=True):
            store[:, :, start : self.filled] = new
        return self.pair[0][:, :, : self.filled], self.pair[1][:, :, : self.filled]


class Layer:
    """One pre-norm layer over all rows."""

    norm1: Tensor
    norm2: Tensor

    def __init__(self, config: llama.Config, factory: Factory) -> None:
        self.config, self.ops, self.dtype, self.device = config, factory.ops, factory.dtype, factory.device
        self.gate_up, self.o, self.down = factory.gated(), factory.llm(), factory.llm()
        self.inputs = self._make_inputs(factory.llm)

    def _make_inputs(self, make: Callable[[], Linear]) -> list[Linear]:
        return [make()]

    def fill(self, read: Read, name: str) -> None:
        """Take weights from the policy's parameters."""
        put(self, "norm1", read(f"{name}.input_layernorm.weight").to(self.device, self.dtype))
        put(self, "norm2", read(f"{name}.post_attention_layernorm.weight").to(self.device, self.dtype))
        self._fill_inputs(*(read(f"{name}.self_attn.{part}_proj.weight").to(self.device) for part in "qkv"))
        self.o.fill(read(f"{name}.self_attn.o_proj.weight"), None)
        self.gate_up.fill(torch.cat([read(f"{name}.mlp.{part}_proj.weight").to(self.device) for part in ("gate", "up")]), None)
        self.down.fill(read(f"{name}.mlp.down_proj.weight"), None)

    def _fill_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.inputs[0].fill(torch.cat([q, k, v]), None)

    def __call__(self, x: Tensor, delta: Tensor | None, batch: int, layout: Layout, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Residual stream x and what is still to be added, rows (B S, width) -> the same after this layer."""
        x, normed = self._norm(x, delta, self.norm1, self.inputs[0].quantize)
        q, k, v = self._heads(self.inputs[0](normed), batch, layout.rope, self.config.num_heads)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self._rest(x, self.ops.attend(q, k, v, layout.mask, causal=layout.causal))

    def merged(self, x: Tensor, batch: int, layout: Layout) -> Tensor:
        """The first layer for x (B S, width) whose rows `layout.zeros` are zero -> (B S, width), nothing left to add."""
        assert layout.zeros is not None and layout.rope_merged is not None
        zeros, c = layout.zeros, self.config
        rows = x.view(batch, -1, c.width)
        rows = torch.cat([rows[:, : zeros.start + 1], rows[:, zeros.stop :]], dim=1)
        x, normed = self._norm(rows.flatten(0, 1), None, self.norm1, self.inputs[0].quantize)
        q, k, v = self._heads(self.inputs[0](normed), batch, layout.rope_merged, c.num_heads)
        k, v = _repeat(k, zeros, dim=2), _repeat(v, zeros, dim=2)
        x, delta = self._rest(x, self.ops.attend(q, k, v, layout.mask))
        return _repeat(add(x, delta).view(batch, -1, c.width), zeros, dim=1).reshape(-1, c.width)

    def _norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, quantize: torch.dtype | None) -> tuple[Tensor, Rows]:
        return self.ops.add_rms_norm(x, delta, weight, self.config.rms_eps, quantize)

    def _heads(self, merged: Tensor, batch: int, rope: Rope, num_q: int) -> Sequence[Tensor]:
        """(B T, (num_q + 2 kv heads) d), rotated here -> q (if any), k, v (B, heads, T, d)."""
        num_kv, d = self.config.num_kv_heads, self.config.head_dim
        self.ops.rope_(merged, *rope, num_q, num_kv)
        return merged.view(batch, -1, num_q + 2 * num_kv, d).transpose(1, 2).split([num_q, num_kv, num_kv], dim=1)

    def _rest(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Everything behind attention (B, R, width); x (B R, width)."""
        delta = self.o(quantized_for(self.o, self.ops, attended.flatten(0, 1)), parts=True)
        x, normed = self._norm(x, delta, self.norm2, self.gate_up.quantize)
        return x, self.down(self.gate_up.swiglu(normed, self.down.quantize), parts=True)

    def linears(self) -> list[Linear]:
        """All big layers."""
        return [*self.inputs, self.o, self.gate_up, self.down]


class LastLayer(Layer):
    """Keys and values for all rows, everything else only for those that are read: queries have their own product."""

    def _make_inputs(self, make: Callable[[], Linear]) -> list[Linear]:
        return [make(), make()]

    def _fill_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.inputs[0].fill(q, None)
        self.inputs[1].fill(torch.cat([k, v]), None)

    def __call__(self, x: Tensor, delta: Tensor | None, batch: int, layout: Layout, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """As `Layer`, but returns the read rows (B R, width) only."""
        query, key_value = self.inputs
        x, normed = self._norm(x, delta, self.norm1, key_value.quantize)
        _, k, v = self._heads(key_value(normed), batch, layout.rope, 0)
        if cache is not None:
            k, v = cache.extend(k, v)
        pick = lambda rows: rows.view(batch, -1, rows.shape[-1])[:, layout.read].flatten(0, 1).contiguous()  # noqa: E731
        chosen = pick(normed) if isinstance(normed, Tensor) else type(normed)(*map(pick, normed))
        q = query(chosen)
        self.ops.rope_(q, *layout.rope_read, self.config.num_heads, 0)
        q = q.view(batch, -1, self.config.num_heads, self.config.head_dim).transpose(1, 2)
        return self._rest(pick(x), self.ops.attend(q, k, v, layout.mask))


class Decoder:
    """All layers and the final norm."""

    norm: Tensor

    def __init__(self, config: llama.Config, factory: Factory) -> None:
        self.config, self.ops, self.dtype, self.device = config, factory.ops, factory.dtype, factory.device
        self.layers = [kind(config, factory) for kind in [Layer] * (config.depth - 1) + [LastLayer]]

    def fill(self, read: Read) -> None:
        """Take weights from the policy's parameters."""
        for i, layer in enumerate(self.layers):
            layer.fill(read, f"vlm.language_model.model.layers.{i}")
        put(self, "norm", read("vlm.language_model.model.norm.weight").to(self.device, self.dtype))

    def __call__(self, embeds: Tensor, layout: Layout, caches: Sequence[Cache] | None = None) -> Tensor:
        """embeds (B, S, width) -> final hidden states of the rows that are read, (B, R, width)."""
        batch = len(embeds)
        x, delta, first = embeds.flatten(0, 1), None, 0
        if layout.zeros is not None and len(self.layers) > 1 and caches is None:
            x, first = self.layers[0].merged(x, batch, layout), 1
        for i in range(first, len(self.layers)):
            x, delta = self.layers[i](x, delta, batch, layout, caches[i] if caches else None)
        _, normed = self.ops.add_rms_norm(x, delta, self.norm, self.config.rms_eps, None)
        assert isinstance(normed, Tensor)
        return normed.view(batch, -1, self.config.width)

    def linears(self) -> list[Linear]:
        """All big layers."""
        return [linear for layer in self.layers for linear in layer.linears()]


def _repeat(x: Tensor, rows: slice, dim: int) -> Tensor:
    """Row `rows.start` of dimension `dim` in place of all of `rows`."""
    shape = list(x.shape)
    shape[dim] = rows.stop - rows.start
    before, row = x.narrow(dim, 0, rows.start), x.narrow(dim, rows.start, 1)
    return torch.cat([before, row.expand(shape), x.narrow(dim, rows.start + 1, x.shape[dim] - rows.start - 1)], dim=dim)
