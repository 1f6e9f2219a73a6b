"""What one chunk of actions costs at least: floating-point operations, weights to read, and from both the shortest possible time.

    sequence   [BOS] [256 V patches] [state] [time] [prompt] [N slots] [stop]      S = 256 V + L + N + 1, + 1 with state, + 1 with diffusion

    stages     towers -> embed -> decoder -> head                                    one pass (L1, pooled, discrete)
               towers -> embed -> (decoder -> head) x steps                          diffusion: the slots change, and every row sees them
               towers -> embed -> decoder -> first token -> decode x (N - 1)         autoregressive, keys and values kept

A stage needs its products and its weights; the slower of both is its time, and stages follow one another. A product of a (M, I) by a
(I, O) matrix is 2 M I O operations. Only blocks and rows whose result is read count (`stages`); `reference_flops` counts what the published
code computes. Left out, below 1 % in all: norms, activations, FiLM's projections (constant per instruction), and that one row could stand
for all empty slots in the first layer. Weights are counted once per stage, activations not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vla_oft.bench.ceilings import Ceilings
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.policy import PolicyConfig
from vla_oft.vlm import llama, vit

Part = Literal["vision", "llm"]
ATTENTION = {"fp32": "fp32"}
"""What attention computes in, where it is not bf16."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work that ends before the next stage can begin.

    part: whose precision it has. products: operations of matrix products with weights. attention: operations of q k' and of what follows.
    weights: numbers read from the model, cache: numbers read from the key-value cache.
    """

    name: str
    part: Part
    products: float
    attention: float = 0.0
    weights: float = 0.0
    cache: float = 0.0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.products + self.attention


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a precision stores and multiplies: `rate` names an entry of `Ceilings.flops`; bytes of one weight, and of one cached number."""

    rate: str
    weight: float
    cache: float


_STORAGE = {
    "fp32": Storage(rate="fp32", weight=4, cache=4),
    "bf16": Storage(rate="bf16", weight=2, cache=2),
    "fp8": Storage(rate="fp8", weight=1, cache=1),
    "int8": Storage(rate="bf16", weight=1, cache=1),
    "int4": Storage(rate="bf16", weight=0.5 + 2 / 128, cache=1),  # one bfloat16 scale for 128 weights
    "int8-dynamic": Storage(rate="int8", weight=1, cache=1),
}
_PARTS: dict[str, dict[Part, Storage]] = {
    **{name: {"llm": storage, "vision": storage} for name, storage in _STORAGE.items()},
    "fp8-llm": {"llm": _STORAGE["fp8"], "vision": _STORAGE["bf16"]},
    "int4": {"llm": _STORAGE["int4"], "vision": _STORAGE["int8"]},
}


def sequence_length(config: PolicyConfig, prompt_len: int) -> int:
    """S: rows of one decoder pass over prefix, slots and stop token; up to the last prompt token for autoregressive decoding.

    prompt_len: L, tokens of the prompt including BOS.
    """
    prefix = config.num_cameras * config.vlm.dino.num_patches + prompt_len + config.use_state
    if _autoregressive(config):
        return prefix
    return prefix + isinstance(config.head, diffusion.Config) + num_slots(config) + 1


def num_slots(config: PolicyConfig) -> int:
    """N: action tokens of one chunk."""
    return 1 if isinstance(config.head, pooled.Config) else config.chunk_len * config.robot.action_dim


def stages(config: PolicyConfig, prompt_len: int, batch: int = 1) -> list[Stage]:
    """The least work for one answer to `batch` observations, in order."""
    S, N, llm = sequence_length(config, prompt_len), num_slots(config), config.vlm.llm
    images = batch * config.num_cameras
    found = [_tower("dino", config.vlm.dino, images), _tower("siglip", config.vlm.siglip, images), _embed(config, images, batch)]
    if _autoregressive(config):
        first = _merge("first token", _last_row(llm, S, batch), _vocabulary(config, batch))
        decodes = [_decode(config, S + i, batch) for i in range(1, N)]
        return [*found, _prefill(llm, S, batch), first, *decodes]
    steps = config.head.inference_steps if isinstance(config.head, diffusion.Config) else 1
    return [*found, *[_decoder(llm, S, N, batch), _head(config, batch)] * steps]


def minimum_flops(config: PolicyConfig, prompt_len: int, batch: int = 1) -> float:
    """Operations of `stages`."""
    return sum(stage.flops for stage in stages(config, prompt_len, batch))


def reference_flops(config: PolicyConfig, prompt_len: int, batch: int = 1) -> float:
    """Operations of the published code: every ViT block, every row of the last layer, vocabulary scores of every row."""
    S, vlm = sequence_length(config, prompt_len), config.vlm
    images, vocabulary = batch * config.num_cameras, 2 * vlm.llm.vocab_size * vlm.llm.width
    vision = sum(_tower("", tower, images, tower.depth).flops for tower in (vlm.dino, vlm.siglip)) + _embed(config, images, batch).flops
    one_pass = _decoder(vlm.llm, S, S, batch).flops + batch * S * vocabulary
    if _autoregressive(config):
        return vision + one_pass + sum(_decode(config, S + i, batch).flops for i in range(1, num_slots(config)))
    steps = config.head.inference_steps if isinstance(config.head, diffusion.Config) else 1
    head = 0 if isinstance(config.head, discrete.Config) else _head(config, batch).flops
    return vision + steps * (one_pass + head)


def weight_bytes(config: PolicyConfig, prompt_len: int, precision: str) -> float:
    """Bytes of all weights that an answer reads, each counted once."""
    parts, seen, total = _parts(precision), set(), 0.0
    for stage in stages(config, prompt_len):
        if stage.name not in seen and stage.name not in ("decode", "first token"):
            total += stage.weights * parts[stage.part].weight
        seen.add(stage.name)
    if _autoregressive(config):
        total += _vocabulary(config, 1).weights * parts["llm"].weight
    return total


def floor_s(work: Sequence[Stage], ceilings: Ceilings, precision: str) -> float | None:
    """Shortest time for `work` in seconds; None where the device has no such arithmetic. Raises ValueError for an unknown precision."""
    parts = _parts(precision)
    attention_rate = ceilings.flops.get(ATTENTION.get(precision, "bf16"))
    rates = {part: ceilings.flops.get(storage.rate) for part, storage in parts.items()}
    if attention_rate is None or None in rates.values():
        return None
    total = 0.0
    for stage in work:
        rate, storage = rates[stage.part], parts[stage.part]
        assert rate is not None
        moved = stage.weights * storage.weight + stage.cache * storage.cache
        total += max(stage.products / rate + stage.attention / attention_rate, moved / ceilings.bytes_per_s)
    return total


def _parts(precision: str) -> dict[Part, Storage]:
    if precision not in _PARTS:
        raise ValueError(f"precision={precision!r} has no cost; known: {', '.join(_PARTS)}")
    return _PARTS[precision]


def _autoregressive(config: PolicyConfig) -> bool:
    return isinstance(config.head, discrete.Config) and config.head.decoding == "autoregressive"


def _tower(name: str, c: vit.Config, images: int, blocks: int | None = None) -> Stage:
    """A vision tower up to the block that is read, the last but one."""
    blocks = c.depth - 1 if blocks is None else blocks
    tokens = c.num_patches + c.num_registers + c.class_token
    block, patch = 4 * c.width**2 + 2 * c.width * c.mlp_dim, 3 * c.patch_size**2 * c.width
    return Stage(
        name=name,
        part="vision",
        products=images * 2 * (blocks * block * tokens + patch * c.num_patches),
        attention=images * blocks * 4 * tokens**2 * c.width,
        weights=blocks * block + patch,
    )


def _embed(config: PolicyConfig, images: int, batch: int) -> Stage:
    """Projector of the patches, and of the state."""
    vlm, W = config.vlm, config.vlm.llm.width
    inside = vlm.dino.width + vlm.siglip.width
    projector = 4 * inside**2 + 4 * inside * W + W**2
    state = config.robot.state_dim * W + W**2 if config.use_state else 0
    products = 2 * (images * vlm.dino.num_patches * projector + batch * state)
    return Stage(name="embed", part="vision", products=products, weights=projector + state)


def _kv(c: llama.Config) -> int:
    """Weights of one layer's keys and values."""
    return 2 * c.width * c.num_kv_heads * c.head_dim


def _per_row(c: llama.Config) -> int:
    """Weights of one layer that act on the rows whose output is wanted: queries, attention's output, MLP."""
    return 2 * c.width**2 + 3 * c.width * c.mlp_dim


def _prefill(c: llama.Config, S: int, batch: int) -> Stage:
    """All layers for S rows; of the last layer keys and values alone."""
    layers = c.depth - 1
    return Stage(
        name="decoder",
        part="llm",
        products=batch * 2 * S * (layers * (_kv(c) + _per_row(c)) + _kv(c)),
        attention=batch * layers * 4 * S**2 * c.width,
        weights=layers * (_kv(c) + _per_row(c)) + _kv(c),
    )


def _last_row(c: llama.Config, S: int, batch: int, rows: int = 1) -> Stage:
    """The rest of the last layer, for the rows that are read."""
    return Stage(
        name="last rows",
        part="llm",
        products=batch * 2 * rows * _per_row(c),
        attention=batch * 4 * rows * S * c.width,
        weights=_per_row(c),
    )


def _decoder(c: llama.Config, S: int, rows: int, batch: int) -> Stage:
    return _merge("decoder", _prefill(c, S, batch), _last_row(c, S, batch, rows))


def _decode(config: PolicyConfig, length: int, batch: int) -> Stage:
    """One more token after `length` - 1 cached ones, and its scores."""
    c = config.vlm.llm
    body = Stage(
        name="decode",
        part="llm",
        products=batch * 2 * c.depth * (_kv(c) + _per_row(c)),
        attention=batch * c.depth * 4 * length * c.width,
        weights=c.depth * (_kv(c) + _per_row(c)),
        cache=batch * c.depth * length * 2 * c.num_kv_heads * c.head_dim,
    )
    return _merge("decode", body, _vocabulary(config, batch))


def _vocabulary(config: PolicyConfig, rows: int) -> Stage:
    """Scores of all tokens, or of the action tokens where no other can win."""
    assert isinstance(config.head, discrete.Config)
    scores = config.vlm.llm.vocab_size if config.head.any_token else config.head.bins
    weights = scores * config.vlm.llm.width
    return Stage(name="head", part="llm", products=2 * rows * weights, weights=weights)


def _head(config: PolicyConfig, batch: int) -> Stage:
    W, K, D, head = config.vlm.llm.width, config.chunk_len, config.robot.action_dim, config.head
    if isinstance(head, discrete.Config):
        return _vocabulary(config, batch * K * D)
    if isinstance(head, pooled.Config):
        weights = W * (W // 4) + (W // 4) * (W // 8) + (W // 8) * K * D
        return Stage(name="head", part="llm", products=batch * 2 * weights, weights=weights)
    assert isinstance(head, l1.Config | diffusion.Config)
    resnet = D * W * W + head.num_blocks * W**2 + W * D
    slots = W + W**2 if isinstance(head, diffusion.Config) else 0  # noisy scalars to slots
    return Stage(name="head", part="llm", products=batch * 2 * (K * resnet + K * D * slots), weights=resnet + slots)


def _merge(name: str, *parts: Stage) -> Stage:
    return Stage(
        name=name,
        part=parts[0].part,
        products=sum(s.products for s in parts),
        attention=sum(s.attention for s in parts),
        weights=sum(s.weights for s in parts),
        cache=sum(s.cache for s in parts),
    )
