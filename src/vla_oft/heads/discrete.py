"""Actions as tokens: each dimension is one of 256 bins, read from the language model's own vocabulary (Brohan et al. 2023; OpenVLA).

    parallel         all K D empty slots are decoded in one bidirectional pass (paper section IV-A: "PD", with K > 1 "PD & AC")
    autoregressive   one token after the other, causal, with cached keys and values: the original OpenVLA, our baseline

An action is clipped to [-1, 1] and falls between two of `bins` equally spaced edges; interval i (from 1) has token id num_tokens - i and
stands for its centre. The last interval holds 1.0 alone and stands for the centre below, as in the reference.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.heads.base import ActionHead, Decode, Metrics, masked_mean

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Config:
    """bins: edges between -1 and 1.

    any_token: take the likeliest of ALL tokens, as the reference does: one that stands for no action then becomes the nearest end of the
    range, close to full speed. By default only action tokens can win.
    """

    decoding: Literal["parallel", "autoregressive"] = "parallel"
    bins: int = 256
    any_token: bool = False

    def __post_init__(self) -> None:
        if self.bins < 3:
            raise ValueError(f"bins={self.bins}: at least 3 edges are needed")


def encode(actions: Tensor, bins: int, num_tokens: int) -> Tensor:
    """Actions (...) in [-1, 1] (others are clipped) -> token ids int64 (...)."""
    edges = torch.linspace(-1, 1, bins, dtype=torch.float64, device=actions.device)
    return num_tokens - torch.bucketize(actions.double().clamp(-1, 1), edges, right=True)


def decode_ids(ids: Tensor, bins: int, num_tokens: int) -> Tensor:
    """Token ids (...) -> actions float32 (...); ids outside the action range give the nearest end."""
    edges = torch.linspace(-1, 1, bins, dtype=torch.float64, device=ids.device)
    centres = (edges[1:] + edges[:-1]) / 2
    return centres[(num_tokens - ids - 1).clamp(0, bins - 2)].float()


class Head(ActionHead):
    """No weights of its own: the language model's output projection is the action head."""

    reads_logits = True

    def __init__(self, config: Config, width: int, chunk_len: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.chunk_len, self.action_dim = config, chunk_len, action_dim

    @property
    def num_slots(self) -> int:
        """Tokens of one chunk."""
        return self.chunk_len * self.action_dim

    @property
    def num_action_tokens(self) -> int | None:
        return None if self.config.any_token else self.config.bins

    def pick(self, logits: Tensor, num_tokens: int) -> Tensor:
        """The likeliest token: vocabulary scores (..., vocabulary rows) -> ids (...)."""
        if self.config.any_token:
            return logits.argmax(-1)
        first = num_tokens - self.config.bins
        return first + logits[..., first:num_tokens].argmax(-1)

    def loss(self, decode: Decode, actions: Tensor, valid: Tensor) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the action tokens and of the stop token that ends them, over the whole vocabulary.

        Metrics: share of right tokens and L1 between predicted and true bins, for the chunk's first step and for the rest.
        """
        ids = encode(actions, self.config.bins, decode.num_tokens)
        causal = self.config.decoding == "autoregressive"
        slots = decode.embed(ids.flatten(1)) if causal else decode.zeros(self.num_slots)
        logits = decode.logits(decode(slots, causal=causal, predict_stop=True))
        targets = ids.masked_fill(~valid[..., None], IGNORED).flatten(1)
        loss = F.cross_entropy(logits.flatten(0, 1), F.pad(targets, (0, 1), value=decode.stop).flatten(), ignore_index=IGNORED)
        with torch.no_grad():
            predicted = self.pick(logits[:, :-1], decode.num_tokens).view_as(ids)
            right = (predicted == ids).float()
            error = (self._actions(predicted, decode) - self._actions(ids, decode)).abs()
        metrics = {"action_l1": masked_mean(error, valid, empty=math.nan)}
        for name, part in (("first", slice(0, 1)), ("rest", slice(1, None))):
            metrics[f"action_l1_{name}"] = masked_mean(error[:, part], valid[:, part], empty=math.nan)
            metrics[f"token_accuracy_{name}"] = masked_mean(right[:, part], valid[:, part], empty=math.nan)
        return loss, metrics

    def weight(self, valid: Tensor) -> int:
        """See `ActionHead.weight`: the tokens of valid steps, and one stop token for each sample."""
        return int(valid.sum()) * self.action_dim + len(valid)

    def sample(self, decode: Decode, generator: torch.Generator | None, noise: Tensor | None = None) -> Tensor:
        """See `ActionHead.sample`; the likeliest tokens, deterministic."""
        ids = self._parallel(decode) if self.config.decoding == "parallel" else self._one_by_one(decode)
        return self._actions(ids, decode).view(len(ids), self.chunk_len, self.action_dim)

    def _parallel(self, decode: Decode) -> Tensor:
        return self.pick(decode.logits(decode(decode.zeros(self.num_slots))), decode.num_tokens)

    def _one_by_one(self, decode: Decode) -> Tensor:
        step, token, ids = decode.steps(), None, []
        for _ in range(self.num_slots):
            ids.append(self.pick(decode.logits(step(token)), decode.num_tokens))
            token = decode.embed(ids[-1])
        return torch.stack(ids, dim=1)

    def _actions(self, ids: Tensor, decode: Decode) -> Tensor:
        return decode_ids(ids, self.config.bins, decode.num_tokens)
