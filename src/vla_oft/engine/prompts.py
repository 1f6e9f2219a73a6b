"""Everything that depends on the instructions alone, computed when they change: embeddings, FiLM, positions, padding."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.decoder import Layout, Rope
from vla_oft.vlm import llama


@dataclass(frozen=True, kw_only=True)
class Span:
    """One pass over a sequence [fixed | prompt | slots | stop]: bidirectional, the rows that predict the slots are read.

    zeros: whether the slots are rows of zeros.
    """

    num_fixed: int
    num_slots: int
    zeros: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """Causal decoding of [fixed | prompt | tokens so far]: all of it with num_tokens=0, else the latest token beside cached ones."""

    num_fixed: int
    num_tokens: int


class Prompts:
    """One batch of prompts on the device.

    embeds: (B, L, width). mask: bool (B, L), False at padding on the left, or None when nothing is padded. film: for each tower (blocks,
    2, B, width), or None.
    """

    def __init__(self, config: llama.Config, embeds: Tensor, mask: Tensor | None, film: list[Tensor] | None) -> None:
        self.config, self.embeds, self.mask, self.film = config, embeds, mask, film
        self._layouts: dict[Span | Step, Layout] = {}

    def layout(self, part: Span | Step) -> Layout:
        """Positions and masks of a pass; made once for each shape, because a captured graph reads these very tensors."""
        if part not in self._layouts:
            self._layouts[part] = self._make(part)
        return self._layouts[part]

    def clone(self) -> "Prompts":
        """A copy with memory of its own, for `load`."""
        film = None if self.film is None else [table.clone() for table in self.film]
        return Prompts(self.config, self.embeds.clone(), None if self.mask is None else self.mask.clone(), film)

    def load(self, other: "Prompts") -> None:
        """Become `other`, of the same shape, in place: embeddings, FiLM, and every layout that was asked for so far."""
        self.embeds.copy_(other.embeds)
        for mine, theirs in zip(self.film or (), other.film or (), strict=True):
            mine.copy_(theirs)
        if self.mask is None:
            return  # positions are those of any prompt of this length
        assert other.mask is not None
        self.mask.copy_(other.mask)
        for part, layout in self._layouts.items():
            for mine, theirs in zip(layout.tensors(), self._make(part).tensors(), strict=True):
                mine.copy_(theirs)

    def _make(self, part: Span | Step) -> Layout:
        return self._span(part) if isinstance(part, Span) else self._step(part)

    def _span(self, span: Span) -> Layout:
        first = span.num_fixed + self.embeds.shape[1]
        length = first + span.num_slots + 1
        positions, read = self._positions(span.num_fixed, length), slice(first - 1, first + span.num_slots - 1)
        zeros = slice(first, first + span.num_slots) if span.zeros and span.num_slots > 1 else None
        return Layout(
            rope=self._rope(positions),
            rope_read=self._rope(positions[:, read]),
            rope_merged=None if zeros is None else self._rope(torch.cat([positions[:, : first + 1], positions[:, zeros.stop :]], dim=1)),
            mask=self._key_mask(span.num_fixed, length),
            read=read,
            zeros=zeros,
        )

    def _step(self, step: Step) -> Layout:
        length = step.num_fixed + self.embeds.shape[1] + step.num_tokens
        positions = self._positions(step.num_fixed, length)
        latest = self._rope(positions[:, -1:])
        return Layout(
            rope=latest if step.num_tokens else self._rope(positions),
            rope_read=latest,
            mask=self._key_mask(step.num_fixed, length),
            read=slice(0, 1) if step.num_tokens else slice(length - 1, length),
            causal=not step.num_tokens,
        )

    def _positions(self, num_fixed: int, length: int) -> Tensor:
        """int64 (1 or B, length): padding has a position of its own only in name, it is masked."""
        positions = torch.arange(length, device=self.embeds.device)[None]
        if self.mask is None:
            return positions
        padding = (~self.mask).sum(1, keepdim=True)
        return torch.where(positions < num_fixed, positions, (positions - padding).clamp(min=num_fixed))

    def _key_mask(self, num_fixed: int, length: int) -> Tensor | None:
        """bool (B, 1, 1, length)."""
        if self.mask is None:
            return None
        return F.pad(self.mask, (num_fixed, length - num_fixed - self.mask.shape[1]), value=True)[:, None, None, :]

    def _rope(self, positions: Tensor) -> Rope:
        """Tables for rows in the order of a flattened batch; one sample's serve all when nothing is padded."""
        cos, sin = llama.rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        half = self.config.head_dim // 2
        return cos[..., :half].reshape(-1, half).contiguous(), sin[..., :half].reshape(-1, half).contiguous()
