"""What a policy reads, and the sequence that its decoder sees; see `vlm/tokens.py` for the layout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_oft.heads.base import Steps
from vla_oft.vlm import prismatic


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """What the model reads.

    pixels: float (B, V, 6, H, W), see `preprocess.to_pixels`.
    prompt_ids: int64 (B, L) without BOS, padded on the left; prompt_mask: bool (B, L), or None when nothing is padded.
    state: float32 (B, S) normalised, or None.
    """

    pixels: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor | None
    state: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Batch(PolicyInputs):
    """Inputs and targets.

    actions: float32 (B, K, D) normalised; valid: bool (B, K). grounding: uint8 (B, V, 2, S, S), see `heads/grounding.py`, and
    landmarks: float32 (B, 2, 3) in metres, or None where the data has none. share: weight of the actions' loss; passes of one step that
    hold unequal numbers of valid actions are averaged by it.
    """

    actions: Tensor
    valid: Tensor
    grounding: Tensor | None = None
    landmarks: Tensor | None = None
    share: float = 1.0


class Sequence:
    """One batch, embedded once. Implements `heads.base.Decode`."""

    def __init__(
        self, vlm: prismatic.Prismatic, state_projector: nn.Module | None, inputs: PolicyInputs, *, padding_counts: bool = False
    ) -> None:
        """padding_counts: let padding count in the mean embedding that FiLM reads, as the reference's training does."""
        self.vlm, self.inputs = vlm, inputs
        special = vlm.config.tokens
        self.num_tokens, self.stop = special.num_tokens, special.stop
        B, device = len(inputs.prompt_ids), inputs.prompt_ids.device
        ends = torch.stack([torch.full((B,), token, device=device) for token in (special.bos, special.stop)], dim=1)  # made there: no copy
        self.bos_embed, self.stop_embed = self.embed(ends).split(1, dim=1)
        self.prompt = self.embed(inputs.prompt_ids)
        self.num_padding = None if inputs.prompt_mask is None else (~inputs.prompt_mask).sum(1, keepdim=True)  # (B, 1)
        dtype = self.prompt.dtype
        patches = self.vlm.embed_images(inputs.pixels.to(dtype), self._mean_language(padding_counts))
        self.num_patches = patches.shape[1]
        self.prefix = [self.bos_embed, patches]
        if state_projector is not None:
            assert inputs.state is not None, "a policy with use_state got no state"
            self.prefix.append(state_projector(inputs.state.to(dtype))[:, None])
        self.patch_states = self.first_hidden = patches  # of the latest call: where they enter the last layer, and the first slot's (B, W)

    def _mean_language(self, padding_counts: bool) -> Tensor:
        """(B, W): mean embedding of BOS, prompt and stop token. FiLM's input. The reference's training lets padding count."""
        mask = None if padding_counts else self.inputs.prompt_mask
        prompt = self.prompt if mask is None else self.prompt * mask[..., None]
        count = self.prompt.shape[1] if mask is None else mask.sum(1, keepdim=True)
        return (self.bos_embed[:, 0] + self.stop_embed[:, 0] + prompt.sum(1)) / (count + 2)

    def zeros(self, num_slots: int) -> Tensor:
        return self.prompt.new_zeros(len(self.prompt), num_slots, self.prompt.shape[-1])

    def embed(self, ids: Tensor) -> Tensor:
        return self.vlm.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.vlm.language_model.lm_head(hidden).float()

    def __call__(self, slots: Tensor, context: Tensor | None = None, *, causal: bool = False, predict_stop: bool = False) -> Tensor:
        prefix = self.prefix if context is None else [*self.prefix, context[:, None]]
        embeds = self._padding_first(prefix, slots, self.stop_embed)
        length, num_slots = embeds.shape[1], slots.shape[1]
        hidden, penultimate = self.vlm.language_model(
            embeds,
            self._positions(length),
            key_mask=self._key_mask(length),
            causal=causal,
            rows=slice(length - num_slots - 2, length - 2 + predict_stop),
        )
        self.patch_states = self._patches(penultimate)
        self.first_hidden = hidden[:, 0]
        return hidden

    def steps(self) -> Steps:
        embeds = self._padding_first(self.prefix)
        length = embeds.shape[1]
        cache = self.vlm.language_model.new_cache()

        def step(token: Tensor | None) -> Tensor:
            nonlocal length
            length += token is not None
            new = embeds if token is None else token[:, None]
            hidden, _ = self.vlm.language_model(
                new,
                self._positions(length)[:, -new.shape[1] :],
                key_mask=self._key_mask(length),
                causal=True,
                rows=slice(new.shape[1] - 1, new.shape[1]),
                cache=cache,
            )
            return hidden[:, 0]

        return step

    def _padding_first(self, prefix: list[Tensor], *rest: Tensor) -> Tensor:
        """(B, S, W): prefix, prompt and rest, with what pads the prompt moved to the front, where attention wants it."""
        embeds = torch.cat([*prefix, self.prompt, *rest], dim=1)
        if self.num_padding is None:
            return embeds
        num_fixed, place = sum(p.shape[1] for p in prefix), torch.arange(embeds.shape[1], device=embeds.device)[None]
        padding, moved = place < self.num_padding, place < self.num_padding + num_fixed
        source = torch.where(padding, place + num_fixed, torch.where(moved, place - self.num_padding, place))
        return embeds.gather(1, source[..., None].expand_as(embeds))

    def _patches(self, states: Tensor) -> Tensor:
        """Of the states (B, S, W) of all rows those of the patches, (B, V * P, W), which come after padding and BOS."""
        if self.num_padding is None:
            return states[:, 1 : 1 + self.num_patches]
        place = torch.arange(1, 1 + self.num_patches, device=states.device)[None] + self.num_padding
        return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))

    def _positions(self, length: int) -> Tensor:
        positions = torch.arange(length, device=self.prompt.device)[None]
        return positions if self.num_padding is None else (positions - self.num_padding).clamp(min=0)

    def _key_mask(self, length: int) -> Tensor | None:
        return None if self.num_padding is None else torch.arange(length, device=self.prompt.device)[None] >= self.num_padding
