"""The contract of an action head: how slots are filled before decoding, and how decoded slots become actions.

    loss   normalised actions (B, K, D) -> slot embeddings -> decode -> hidden (B, N, W) -> loss
    sample                                slot embeddings -> decode -> hidden (B, N, W) -> normalised actions (B, K, D)

A head never sees images, prompts or token layout. Adding a head is adding one file here and its Config to `policy.HeadConfig`.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


class Steps(Protocol):
    """Causal decoding, one token after another."""

    def __call__(self, token: Tensor | None) -> Tensor:
        """Embedding (B, W) of the latest token, None at the start -> hidden state (B, W) that predicts the next one."""
        ...


class Decode(Protocol):
    """One pass of the backbone over prefix + slots for a batch of observations.

    num_tokens: size of the tokenizer's vocabulary; action ids count down from its end. stop: id of the token that ends a sequence.
    """

    num_tokens: int
    stop: int

    def zeros(self, num_slots: int) -> Tensor:
        """Empty slot embeddings (B, num_slots, W) on the right device; not to be written to: decoding knows that they are empty."""
        ...

    def __call__(self, slots: Tensor, context: Tensor | None = None, *, causal: bool = False, predict_stop: bool = False) -> Tensor:
        """slots (B, N, W), optional context token (B, W) placed before the prompt -> hidden states (B, N, W) that predict the slots.

        predict_stop: one more row at the end, which predicts the stop token.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: int64 (...) -> (..., W)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The language model's vocabulary scores: (..., W) -> float32 (..., vocabulary rows)."""
        ...

    def steps(self) -> Steps:
        """Start causal decoding after the prompt, with cached keys and values."""
        ...


class ActionHead(nn.Module, ABC):
    """Continuous or discrete actions from decoded slots.

    reads_logits: whether the decoder's vocabulary projection is used. draws_noise: whether `sample` starts from noise.
    """

    reads_logits = False
    draws_noise = False
    chunk_len: int
    action_dim: int

    @property
    def num_action_tokens(self) -> int | None:
        """How many tokens, counted from the vocabulary's end, `sample` chooses among; None for all."""
        return None

    @property
    def variant(self) -> Hashable:
        """Settings that change what `sample` does, for whoever records it once and replays it."""
        return None

    def weight(self, valid: Tensor) -> int:
        """How many terms `loss` is the mean of, up to a factor: passes of a step are averaged by it. valid: bool (B, K), on the host."""
        return int(valid.sum())

    @abstractmethod
    def loss(self, decode: Decode, actions: Tensor, valid: Tensor) -> tuple[Tensor, Metrics]:
        """Training loss. actions (B, K, D) normalised; valid bool (B, K) False beyond an episode's end."""

    @abstractmethod
    def sample(self, decode: Decode, generator: torch.Generator | None, noise: Tensor | None = None) -> Tensor:
        """Normalised actions (B, K, D), float32. `noise` (B, K, D) replaces what a stochastic head would draw; others ignore it."""


def masked_mean(values: Tensor, valid: Tensor, *, empty: float = 0.0) -> Tensor:
    """Mean of (B, K, D) over the valid steps; `empty` when there are none (0 for losses, NaN for metrics)."""
    weight = valid[..., None].to(values.dtype).expand_as(values)
    mean = (values * weight).sum() / weight.sum().clamp(min=1)
    return mean if empty == 0.0 else torch.where(valid.any(), mean, empty)
