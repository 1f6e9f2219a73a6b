"""What a published checkpoint folder says about itself: its files, and the model's shapes from `config.json` and the weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vla_oft.vlm import llama, prismatic, tokens, vit

PUBLISHED_WIDTHS = {1024: 16, 1152: 16}
"""Heads of the two published towers, by width: a ViT's weights do not tell."""
_LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""`text_config` stores only what differs from these defaults of transformers 4.40."""
_LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "mlp_bias": False}
_CHANGES_NUMBERS = re.compile("rope|rotary|norm|bias|sliding")
"""Entries of later versions that might mean something else than what is built here."""

Shapes = Mapping[str, tuple[int, ...]]


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


def find_component(folder: Path, stem: str, label: str | None) -> tuple[Path, str] | None:
    """`STEM--LABEL_checkpoint.pt` (LABEL is a step, or `latest`) and its label, or None.

    Raises ValueError when there are several and none was chosen, and for files of that stem with other names.
    """
    found = {m[1]: path for path in folder.glob(f"{stem}*") if (m := re.fullmatch(rf"{stem}--(\w+)_checkpoint\.pt", path.name))}
    strange = sorted(path.name for path in folder.glob(f"{stem}*checkpoint*") if path not in found.values())
    if strange:
        raise ValueError(f"{folder} has {strange}, whose name is not understood; expected {stem}--STEP_checkpoint.pt")
    if label is None and len(found) > 1:
        raise ValueError(f"{folder} has {stem} of steps {sorted(found)}: choose one with --step")
    if not found:
        return None
    chosen = label or next(iter(found))
    if chosen not in found:
        raise ValueError(f"{folder} has no {stem} of step {chosen}, only of {sorted(found)}")
    return found[chosen], chosen


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
    dino, siglip = (
        _tower(shapes, f"vision_backbone.{name}.", timm_id, overrides)
        for name, timm_id in zip(("featurizer", "fused_featurizer"), ids, strict=True)
    )
    sizes = document.get("image_sizes", [dino.image_size] * 2)
    if list(sizes) != [dino.image_size, siglip.image_size]:
        raise ValueError(f"config.json: image_sizes={sizes}, but the towers' positions are for {dino.image_size} and {siglip.image_size}")
    return prismatic.Config(
        dino=dino,
        siglip=siglip,
        llm=llm,
        tokens=_tokens(document, tokenizer, llm.vocab_size),
        film=film,
    )


def _check_kind(document: dict[str, Any]) -> None:
    for name, wanted in (("model_type", "openvla"), ("use_fused_vision_backbone", True), ("arch_specifier", "no-align+fused-gelu-mlp")):
        if document.get(name) != wanted:
            raise ValueError(f"config.json: {name}={document.get(name)!r} is not supported, only {wanted!r}")
    if any(layer is not None for layer in document.get("timm_override_act_layers") or ()):
        layers = document["timm_override_act_layers"]
        raise ValueError(f"config.json: timm_override_act_layers={layers!r} is not supported, only [null, null]: exact GELU")


def _text_config(document: dict[str, Any]) -> dict[str, Any]:
    """`text_config` with its defaults. Raises ValueError for entries that would change numbers here unnoticed."""
    given = {name: value for name, value in (document.get("text_config") or {}).items() if value is not None}
    if given.get("model_type", "llama") != "llama":
        raise ValueError(f"config.json: text_config.model_type={given['model_type']!r} is not supported, only 'llama'")
    for name, value in given.items():
        if name in _LLAMA_FIXED:
            supported = value == _LLAMA_FIXED[name]
        elif name in _LLAMA_DEFAULTS:
            kind = type(_LLAMA_DEFAULTS[name])
            supported = isinstance(value, kind | int) and not isinstance(value, bool)
        else:
            supported = not _CHANGES_NUMBERS.search(name)
        if not supported:
            raise ValueError(f"config.json: text_config.{name}={value!r} is not supported")
    return {**_LLAMA_DEFAULTS, **given}


def _llm(document: dict[str, Any], shapes: Shapes) -> llama.Config:
    text = _text_config(document)
    rows = _shape(shapes, "language_model.model.embed_tokens.weight")[0]
    depth = _count_blocks(shapes, "language_model.model.layers.")
    for name, found in (("vocab_size", rows), ("num_hidden_layers", depth)):
        if text.get(name, found) != found:
            raise ValueError(f"config.json: text_config.{name}={text[name]}, but the weights have {found}")
    if text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) * text["num_attention_heads"] != text["hidden_size"]:
        raise ValueError(f"config.json: text_config.head_dim={text['head_dim']} is not supported, only hidden_size / num_attention_heads")
    return llama.Config(
        vocab_size=rows,
        width=text["hidden_size"],
        depth=depth,
        num_heads=text["num_attention_heads"],
        num_kv_heads=text.get("num_key_value_heads", text["num_attention_heads"]),
        mlp_dim=text["intermediate_size"],
        rope_theta=float(text["rope_theta"]),
        rms_eps=float(text["rms_norm_eps"]),
    )


def _tokens(document: dict[str, Any], tokenizer: Tokenizer, vocab_rows: int) -> tokens.Config:
    empty = tokenizer.token_to_id(tokens.WORD_BOUNDARY)
    if empty is None:
        raise ValueError(f"tokenizer.json has no piece {tokens.WORD_BOUNDARY!r} (29871 in Llama-2's): prompts cannot be ended")
    text, padded = _text_config(document), document.get("pad_to_multiple_of", 64)
    if not isinstance(padded, int):
        raise ValueError(f"config.json: pad_to_multiple_of={padded!r} must be a number: action tokens end that many rows before the last")
    return tokens.Config(
        bos=text["bos_token_id"],
        stop=text["eos_token_id"],
        pad=document.get("pad_token_id", 32000),
        empty=empty,
        num_tokens=vocab_rows - padded,
    )


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules follow `prefix`. Raises ValueError when a number is left out."""
    numbers = {int(m[1]) for name in shapes if name.startswith(prefix) and (m := re.match(r"(\d+)\.", name[len(prefix) :]))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"the weights have {prefix}{max(numbers)}, but only {len(numbers)} of them: an incomplete checkpoint")
    return len(numbers)


def _tower(shapes: Shapes, prefix: str, timm_id: str | None, overrides: dict[str, Any] | None) -> vit.Config:
    width, _, patch_size, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight")
    num_patches = _shape(shapes, f"{prefix}pos_embed")[1]
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{prefix}pos_embed has {num_patches} positions: not a square of patches")
    has = {name: f"{prefix}{name}" in shapes for name in ("cls_token", "reg_token", "attn_pool.latent", "blocks.0.ls1.scale_factor")}
    return vit.Config(
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        depth=_count_blocks(shapes, f"{prefix}blocks."),
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
