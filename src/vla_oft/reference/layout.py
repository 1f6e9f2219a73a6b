"""What a published checkpoint folder says about itself: shapes from its weights and `config.json`, nothing from the files' names but N."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from vla_oft.vlm import llama, prismatic, tokens, vit
from vla_oft.weights import weight_files

PUBLISHED_WIDTHS = {1024: 16, 1152: 16}
"""Heads of the two published towers, by width: a ViT's weights do not tell."""
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""`text_config` stores only what differs from these defaults of transformers 4.40."""
_LLAMA_FIXED = {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, "mlp_bias": False}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensors:
    """Where each tensor of a (sharded) safetensors checkpoint lies, and its shape; no data is read."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in `folder`. Raises ValueError when it is missing or broken."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}: not a complete published checkpoint")
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return document


def read_shapes(folder: Path) -> Tensors:
    """Headers of `model*.safetensors`. Raises ValueError when a shard is missing or truncated."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(str(path), "np") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    files[key], shapes[key] = path, tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from None
    return Tensors(files, shapes)


def find_component(folder: Path, stem: str, step: int | None) -> Path | None:
    """`STEM--N_checkpoint.pt`, or None. Raises ValueError when there are several steps and none was chosen."""
    found = {int(m[1]): p for p in folder.glob(f"{stem}--*_checkpoint.pt") if (m := re.search(r"--(\d+)_checkpoint\.pt$", p.name))}
    if step is not None and found and step not in found:
        raise ValueError(f"{folder} has no {stem} of step {step}, only of {sorted(found)}")
    if step is None and len(found) > 1:
        raise ValueError(f"{folder} has {stem} of steps {sorted(found)}: choose one with --step")
    return found[step] if step is not None and found else next(iter(found.values()), None)


def step_of(path: Path) -> int:
    """N of `STEM--N_checkpoint.pt`."""
    return int(path.name.rpartition("--")[2].split("_")[0])


def vlm_config(
    document: dict[str, Any], shapes: Shapes, tokenizer: Tokenizer, overrides: dict[str, Any] | None, *, film: bool
) -> prismatic.Config:
    """The model's shapes, from `config.json`, the tokenizer and the weights themselves.

    overrides: `vision_tower_overrides.json`, timm model id -> {"num_heads": ...}; needed where the towers are not the published ones.
    Raises ValueError naming the entry for models of another kind.
    """
    _check_kind(document)
    ids = document.get("timm_model_ids") or [None, None]
    llm = _llm(document, shapes)
    return prismatic.Config(
        dino=_tower(shapes, "vision_backbone.featurizer.", ids[0], overrides),
        siglip=_tower(shapes, "vision_backbone.fused_featurizer.", ids[1], overrides),
        llm=llm,
        tokens=_tokens(document, tokenizer, llm.vocab_size),
        film=film,
    )


def _check_kind(document: dict[str, Any]) -> None:
    for name, wanted in (("model_type", "openvla"), ("use_fused_vision_backbone", True), ("arch_specifier", "no-align+fused-gelu-mlp")):
        if document.get(name) != wanted:
            raise ValueError(f"config.json: {name}={document.get(name)!r} is not supported, only {wanted!r}")


def _llm(document: dict[str, Any], shapes: Shapes) -> llama.Config:
    text = document.get("text_config") or {}
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"config.json: text_config.model_type={text['model_type']!r} is not supported, only 'llama'")
    for name, value in _LLAMA_FIXED.items():
        if text.get(name, value) != value:
            raise ValueError(f"config.json: text_config.{name}={text[name]!r} is not supported, only {value!r}")
    get = {**_LLAMA_DEFAULTS, **{k: v for k, v in text.items() if v is not None}}.__getitem__
    embeddings = _shape(shapes, "language_model.model.embed_tokens.weight")
    heads = get("num_attention_heads")
    return llama.Config(
        vocab_size=embeddings[0],
        width=get("hidden_size"),
        depth=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        mlp_dim=get("intermediate_size"),
        rope_theta=float(get("rope_theta")),
        rms_eps=get("rms_norm_eps"),
    )


def _tokens(document: dict[str, Any], tokenizer: Tokenizer, vocab_rows: int) -> tokens.Config:
    empty = tokenizer.token_to_id(tokens.WORD_BOUNDARY)
    if empty is None:
        raise ValueError(f"tokenizer.json has no piece {tokens.WORD_BOUNDARY!r} (29871 in Llama-2's): prompts cannot be ended")
    text = {**_LLAMA_DEFAULTS, **{k: v for k, v in (document.get("text_config") or {}).items() if v is not None}}
    return tokens.Config(
        bos=text["bos_token_id"],
        stop=text["eos_token_id"],
        pad=document.get("pad_token_id", 32000),
        empty=empty,
        num_tokens=vocab_rows - document.get("pad_to_multiple_of", 64),
    )


def _tower(shapes: Shapes, prefix: str, timm_id: str | None, overrides: dict[str, Any] | None) -> vit.Config:
    width, _, patch_size, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight")
    num_patches = _shape(shapes, f"{prefix}pos_embed")[1]
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{prefix}pos_embed has {num_patches} positions: not a square of patches")
    has = {name: f"{prefix}{name}" in shapes for name in ("cls_token", "reg_token", "attn_pool.latent", "blocks.0.ls1.scale_factor")}
    blocks = {int(m[1]) for k in shapes if k.startswith(prefix) and (m := re.match(r"blocks\.(\d+)\.", k.removeprefix(prefix)))}
    return vit.Config(
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        depth=max(blocks, default=-1) + 1,
        num_heads=_num_heads(width, timm_id, overrides),
        mlp_dim=_shape(shapes, f"{prefix}blocks.0.mlp.fc1.weight")[0],
        num_registers=_shape(shapes, f"{prefix}reg_token")[1] if has["reg_token"] else 0,
        class_token=has["cls_token"],
        layer_scale=has["blocks.0.ls1.scale_factor"],
        attention_pool=has["attn_pool.latent"],
        unread_weights=True,
    )


def _num_heads(width: int, timm_id: str | None, overrides: dict[str, Any] | None) -> int:
    if overrides is not None:
        entry = overrides.get(timm_id) if timm_id else None
        if not isinstance(entry, dict) or not isinstance(entry.get("num_heads"), int):
            raise ValueError(f"the vision overrides have no num_heads for '{timm_id}'; they have {sorted(overrides)}")
        if entry.get("embed_dim", width) != width:
            raise ValueError(f"the vision overrides say embed_dim={entry['embed_dim']} for '{timm_id}', the weights are {width} wide")
        return entry["num_heads"]
    if width not in PUBLISHED_WIDTHS:
        raise ValueError(
            f"vision tower '{timm_id}' is {width} wide, not a published size: its weights do not tell the number of attention heads; "
            f'give --vision-overrides FILE with {{"{timm_id}": {{"num_heads": N}}}}'
        )
    return PUBLISHED_WIDTHS[width]


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"model.safetensors has no {name}: not an OpenVLA checkpoint")
    return shapes[name]
