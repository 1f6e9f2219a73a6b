"""The network of a compiled policy: folded weights, and one pass from prepared images to normalised actions.

`Sequence` implements `heads.base.Decode`, so action heads run as they are: what a head asks for decides what is computed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine.decoder import Cache, Decoder
from vla_oft.engine.factory import Factory
from vla_oft.engine.linear import Linear, Read, put
from vla_oft.engine.prompts import Prompts, Span, Step
from vla_oft.engine.towers import Towers
from vla_oft.heads.base import ActionHead, Steps
from vla_oft.policy_config import PolicyConfig, head_module


class Model:
    """Folded weights of one policy on one device."""

    embeddings: Tensor
    lm_head: Tensor

    def __init__(self, config: PolicyConfig, factory: Factory, *, streams: bool, zero_row: bool) -> None:
        self.config, self.zero_row = config, zero_row
        vlm, self.dtype, self.device = config.vlm, factory.dtype, factory.device
        self.towers = Towers((vlm.dino, vlm.siglip), factory, vlm.llm.width if vlm.film else None, streams=streams)
        self.projector = [factory.vision() for _ in range(3)]
        self.state_projector = [factory.dense() for _ in range(2)] if config.use_state else []
        self.decoder = Decoder(vlm.llm, factory)
        with torch.device("meta"):
            head: ActionHead = head_module(config.head).Head(config.head, vlm.llm.width, config.chunk_len, config.robot.action_dim)
        self.head = head.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        self.special = vlm.tokens
        cuda = self.device.type == "cuda"
        self.graph_pool = torch.cuda.graph_pool_handle() if cuda else None
        self.capture_stream = torch.cuda.Stream(self.device) if cuda else None

    def fill(self, read: Read) -> None:
        """Take weights from a policy's parameters, by name; in place when there are some already."""
        p = self.config.preprocess
        self.towers.fill(read, ((p.dino_mean, p.dino_std), (p.siglip_mean, p.siglip_std)))
        for layers, name in ((self.projector, "vlm.projector"), (self.state_projector, "state_projector")):
            for i, layer in enumerate(layers, 1):
                layer.fill(read(f"{name}.fc{i}.weight"), read(f"{name}.fc{i}.bias"))
        self.decoder.fill(read)
        put(self, "embeddings", read("vlm.language_model.model.embed_tokens.weight").to(self.device, self.dtype))
        if self.head.reads_logits:
            put(self, "lm_head", read("vlm.language_model.lm_head.weight")[self._tokens()].to(self.device, self.dtype))
        for name, parameter in self.head.state_dict().items():
            parameter.copy_(read(f"action_head.{name}"))

    def prompts(self, ids: Tensor, mask: Tensor | None) -> Prompts:
        """Token ids int64 (B, L) and their mask, both on the device, to what a pass needs of them."""
        embeds = self.embed(ids)
        film = None
        if self.config.vlm.film:
            special = self.embed(torch.tensor([self.special.bos, self.special.stop], device=self.device)).sum(0)
            count = torch.full((len(ids), 1), ids.shape[1], device=self.device) if mask is None else mask.sum(1, keepdim=True)
            spoken = embeds if mask is None else embeds * mask[..., None]
            film = self.towers.film((special + spoken.sum(1)) / (count + 2))
        return Prompts(self.config.vlm.llm, embeds, mask, film)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 (...) -> (..., width)."""
        return F.embedding(ids, self.embeddings)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> float32 (..., vocabulary rows); tokens that the head never picks have minus infinity."""
        tokens, vocabulary = self._tokens(), self.config.vlm.llm.vocab_size
        scores = F.linear(hidden, self.lm_head).float()
        return scores if tokens == slice(None) else F.pad(scores, (tokens.start, vocabulary - tokens.stop), value=float("-inf"))

    def embed_images(self, images: Tensor, film: list[Tensor] | None) -> Tensor:
        """uint8 (B, V, S, S, 3) -> (B, V P, width)."""
        features = self.towers(images, film)
        fc1, fc2, fc3 = self.projector
        rows = features.flatten(0, 1)
        rows = rows if fc1.quantize is None else fc1.ops.quantize_rows(rows, fc1.quantize)
        return fc3(fc2.gelu(fc1.gelu(rows, fc2.quantize), fc3.quantize)).view(len(images), -1, self.config.vlm.llm.width)

    def embed_state(self, state: Tensor) -> Tensor:
        """float32 (B, S) normalised -> (B, width)."""
        fc1, fc2 = self.state_projector
        return fc2(fc1.gelu(state.to(self.dtype), None))

    def __call__(self, images: Tensor, state: Tensor | None, prompts: Prompts, noise: Tensor | None) -> Tensor:
        """Normalised actions, float32 (B, K, D). images: uint8 (B, V, S, S, 3), prepared; see `sequence.PolicyInputs` for the others."""
        return self.head.sample(Sequence(self, images, state, prompts), None, noise)

    def linears(self) -> list[Linear]:
        """All big layers."""
        return [*self.towers.linears(), *self.projector, *self.decoder.linears()]

    def _tokens(self) -> slice:
        """The vocabulary's rows that the head may pick."""
        count = self.head.num_action_tokens
        return slice(None) if count is None else slice(self.special.num_tokens - count, self.special.num_tokens)


class Sequence:
    """One batch, embedded once. Implements `heads.base.Decode`."""

    def __init__(self, model: Model, images: Tensor, state: Tensor | None, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.num_tokens, self.stop = model.special.num_tokens, model.special.stop
        bos, self.stop_embed = (model.embeddings[i].expand(len(images), 1, -1) for i in (model.special.bos, model.special.stop))
        self.prefix = [bos, model.embed_images(images, prompts.film)]
        if state is not None:
            self.prefix.append(model.embed_state(state)[:, None])
        self._empty: Tensor | None = None

    def zeros(self, num_slots: int) -> Tensor:
        self._empty = self.prompts.embeds.new_zeros(len(self.prompts.embeds), num_slots, self.prompts.embeds.shape[-1])
        return self._empty

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def __call__(self, slots: Tensor, context: Tensor | None = None, *, causal: bool = False, predict_stop: bool = False) -> Tensor:
        assert not causal and not predict_stop, "those belong to training"
        prefix = self.prefix if context is None else [*self.prefix, context[:, None]]
        span = Span(
            num_fixed=sum(p.shape[1] for p in prefix),
            num_slots=slots.shape[1],
            zeros=slots is self._empty and self.model.zero_row,
        )
        embeds = torch.cat([*prefix, self.prompts.embeds, slots, self.stop_embed], dim=1)
        return self.model.decoder(embeds, self.prompts.layout(span))

    def steps(self) -> Steps:
        return CachedSteps(self)


class CachedSteps:
    """Causal decoding, one token after another, with keys and values kept. Implements `heads.base.Steps`."""

    def __init__(self, sequence: Sequence) -> None:
        self.model, self.prompts = sequence.model, sequence.prompts
        self.embeds = torch.cat([*sequence.prefix, sequence.prompts.embeds], dim=1)
        self.num_fixed = self.embeds.shape[1] - sequence.prompts.embeds.shape[1]
        self.num_tokens = 0
        self.caches: list[Cache] = []

    def __call__(self, token: Tensor | None) -> Tensor:
        decoder, head = self.model.decoder, self.model.head
        if token is None:
            self.caches = [Cache(self.embeds.shape[1] + head.chunk_len * head.action_dim) for _ in decoder.layers]
        else:
            self.num_tokens += 1
        layout = self.prompts.layout(Step(num_fixed=self.num_fixed, num_tokens=self.num_tokens))
        return decoder(self.embeds if token is None else token[:, None], layout, self.caches)[:, 0]
