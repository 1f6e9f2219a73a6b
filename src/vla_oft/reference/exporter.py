"""One of our checkpoints becomes a published one, for the reference's own code.

What was imported and not trained since returns with every bit, in its type and with its descriptions. Otherwise types follow the
reference's scripts: towers, projector, decoder and action head in bfloat16; FiLM, state and noise projectors in float32. A LoRA adapter is
merged, in float32 and rounded once, and lies beside the sum, as the reference leaves it; with FiLM the vision backbone keeps its own apart.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_oft.adapter import PREFIX, WEIGHTS, Adapter, load_adapter
from vla_oft.atomic import atomic_directory, require_empty
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import PolicyConfig, checkpoint_folder, load_config, some_dataset
from vla_oft.reference import names
from vla_oft.reference.importer import DESCRIPTIONS, PUBLISHED, TOKENIZER_FILES
from vla_oft.statistics import load_statistics, save_statistics
from vla_oft.weights import LazyTensor, open_weights, write_shards

LLAMA2_EMPTY = 29871
TIMM_IDS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
DEFAULT_RANK = 32


def export_checkpoint(
    checkpoint: Path, out: Path, *, step: str | None = None, unmerged: bool = False, report: Callable[[str], None] = print
) -> Path:
    """Write the published layout of checkpoint or run folder `checkpoint` into `out`, atomically; returns `out`.

    step: label in the names of the `.pt` files; by default what `run.json` says. unmerged: leave the adapter out of `model.safetensors`;
    whoever loads the folder must then add it. Raises ValueError for policies that have no such layout (a pooled head, other prompts or
    images), before anything is written.
    """
    require_empty(out)
    source = checkpoint_folder(checkpoint)
    config = load_config(source, some_dataset(source))
    imported = (source / PUBLISHED).is_dir()
    _check_exportable(config, imported)
    if config.vlm.tokens.empty != LLAMA2_EMPTY:
        report(f"note: the reference's code ends every prompt with token {LLAMA2_EMPTY}; this tokenizer's is {config.vlm.tokens.empty}")
    label = step or _step(source)
    adapter = load_adapter(source / "adapter") if (source / "adapter").is_dir() else None
    if adapter and config.vlm.film and any(f.magnitude is not None for f in adapter.factors.values()):
        raise ValueError(f"{source} has a DoRA adapter and FiLM, for which there is no published layout: add it first, `ckpt merge`")
    if adapter and not unmerged:
        report("note: weights and adapter are summed and rounded once; `ckpt merge --dtype bfloat16` measures what that moves")
    weights = _typed(open_weights(source), keep=imported)
    with atomic_directory(out) as folder:
        _write_text(config, source, folder)
        save_statistics(folder / "dataset_statistics.json", load_statistics(source / "statistics.json"))
        write_shards(_backbone(weights, None if unmerged else adapter, film=config.vlm.film), folder)
        for component in _components(config):
            found = [name for name in sorted(weights) if name.startswith(component.ours)]
            tensors = {component.to_theirs(name): weights[name].read() for name in found}
            torch.save(tensors, folder / f"{component.stem}--{label}_checkpoint.pt")
        if config.vlm.film:
            torch.save(dict(_film_backbone(weights, adapter, bare=imported)), folder / f"vision_backbone--{label}_checkpoint.pt")
        if adapter:
            _write_adapter(adapter, weights, folder / "lora_adapter", film=config.vlm.film)
    return out


def _typed(weights: Mapping[str, LazyTensor], *, keep: bool) -> dict[str, LazyTensor]:
    """Every tensor in the type that it is published in; keep: the one that it is stored in."""

    def dtype(name: str) -> torch.dtype:
        precise = names.FILM.search(name) or name.startswith((names.STATE_PROJECTOR.ours, names.NOISY_PROJECTOR.ours))
        return torch.float32 if precise else torch.bfloat16

    return {name: tensor if keep else tensor.to(dtype(name)) for name, tensor in weights.items()}


def _backbone(weights: Mapping[str, LazyTensor], adapter: Adapter | None, *, film: bool) -> dict[str, LazyTensor]:
    """`model.safetensors`: the decoder, projector and towers, without FiLM; with the adapter where there is one."""

    def merged(name: str, tensor: LazyTensor) -> LazyTensor:
        module = name.removesuffix(".weight")
        if adapter is None or module not in adapter.factors or (film and name.startswith(names.VLM + names.VISION)):
            return tensor
        return LazyTensor(tensor.shape, tensor.dtype, lambda update=adapter: update.merged(module, tensor.read()).to(tensor.dtype))

    own = {name: tensor for name, tensor in sorted(weights.items()) if name.startswith(names.VLM) and not names.FILM.search(name)}
    return {name.removeprefix(names.VLM): merged(name, tensor) for name, tensor in own.items()}


def _check_exportable(config: PolicyConfig, imported: bool) -> None:
    if not isinstance(config.head, l1.Config | diffusion.Config | discrete.Config):
        raise ValueError(f"head '{type(config.head).__module__.rpartition('.')[2]}' does not exist in the published layout")
    if config.prompt_style != "openvla":
        raise ValueError(f"prompt_style '{config.prompt_style}' does not exist in the published layout, only 'openvla'")
    if not config.vlm.dino.unread_weights:
        raise ValueError("the published layout needs the towers' last blocks, which this model was built without (unread_weights)")
    as_published = config.preprocess.camera is not None and (config.preprocess.fit, config.preprocess.resize) == ("resize-naive", "bicubic")
    if not (imported or as_published):
        raise ValueError(
            "the published code prepares images otherwise (JPEG, Lanczos, bicubic): train from an imported policy, or with "
            f"preprocess.reference_config; this one has camera={config.preprocess.camera}, resize={config.preprocess.resize!r}"
        )
    if config.state_normalization not in (None, config.robot.normalization):
        raise ValueError(f"the published layout normalises the state as the actions, not by '{config.state_normalization}'")
    if config.grounding is not None:
        raise ValueError("the published layout has no place for the grounding head: train with model.grounding=null")


def _components(config: PolicyConfig) -> list[names.Component]:
    found = [names.STATE_PROJECTOR] if config.use_state else []
    if isinstance(config.head, diffusion.Config):
        return [*found, names.DIFFUSION_HEAD, names.NOISY_PROJECTOR]
    return [*found, names.L1_HEAD] if isinstance(config.head, l1.Config) else found


def _film_backbone(weights: Mapping[str, LazyTensor], adapter: Adapter | None, *, bare: bool) -> Iterator[tuple[str, Tensor]]:
    """The wrapped towers: adapted layers split into base and factors.

    The reference loads this file into towers whose every linear layer is adapted: those that are not get factors of zero. bare: not so if
    no layer is adapted, as in the file that was imported.
    """
    factors = {m: f for m, f in (adapter.factors if adapter else {}).items() if m.startswith(names.VLM + names.VISION)}
    rank = next(iter(factors.values())).rank if factors else DEFAULT_RANK
    for name in sorted(n for n in weights if n.startswith(names.VLM + names.VISION)):
        theirs, tensor = names.film_to_theirs(name), weights[name].read()
        module, _, leaf = name.rpartition(".")
        shape = torch.Size(weights[f"{module}.weight"].shape if f"{module}.weight" in weights else ())
        if len(shape) not in (2, 4) or names.FILM.search(name) or (bare and not factors):
            yield theirs, tensor
            continue
        stem = theirs.rpartition(".")[0]
        yield f"{stem}.base_layer.{leaf}", tensor
        if leaf == "weight":
            kernel = [1] * (len(shape) - 2)
            zeros = (tensor.new_zeros(rank, *shape[1:]), tensor.new_zeros(shape[0], rank, *kernel))
            for side, factor in zip("AB", factors[module][:2] if module in factors else zeros, strict=True):
                yield f"{stem}.lora_{side}.default.weight", factor


def _write_adapter(adapter: Adapter, weights: Mapping[str, LazyTensor], folder: Path, *, film: bool) -> None:
    """`lora_adapter/`; with FiLM without the vision backbone's part."""
    kept = {m: f for m, f in adapter.factors.items() if not (film and m.startswith(names.VLM + names.VISION))}
    if not kept:
        return
    Adapter({module.removeprefix(names.VLM): update for module, update in kept.items()}).save(folder)
    if "vlm.language_model.lm_head" in kept:  # peft also stores the base of a layer that belongs to the embeddings
        tensors = load_file(folder / WEIGHTS)
        tensors[f"{PREFIX}language_model.lm_head.base_layer.weight"] = weights["vlm.language_model.lm_head.weight"].read()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _step(folder: Path) -> str:
    path = folder / "run.json"
    return str(json.loads(path.read_text()).get("step", 0)) if path.is_file() else "0"


def _write_text(config: PolicyConfig, source: Path, folder: Path) -> None:
    write = lambda name, document: (folder / name).write_text(json.dumps(document, indent=2) + "\n")  # noqa: E731
    special = config.vlm.tokens
    statistics = {name: entry.to_dict() for name, entry in load_statistics(source / "statistics.json").items()}
    write("tokenizer_config.json", _tokenizer_config())
    write("config.json", {**model_document(config), "norm_stats": statistics})
    write("preprocessor_config.json", pixel_document(config))
    write("generation_config.json", {"bos_token_id": special.bos, "eos_token_id": special.stop, "pad_token_id": special.pad})
    for path in (*(source / name for name in TOKENIZER_FILES), *(source / PUBLISHED / name for name in DESCRIPTIONS)):
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())


def model_document(config: PolicyConfig) -> dict[str, Any]:
    """`config.json` of a policy."""
    vlm, size = config.vlm, config.vlm.dino.image_size
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "llm_backbone_id": "llama2-7b-pure",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "timm_model_ids": TIMM_IDS,
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [size, size],
        "llm_max_length": 2048,
        "n_action_bins": config.head.bins if isinstance(config.head, discrete.Config) else 256,
        "output_projector_states": False,
        "pad_to_multiple_of": vlm.llm.vocab_size - vlm.tokens.num_tokens,
        "pad_token_id": vlm.tokens.pad,
        "text_config": {
            "model_type": "llama",
            "hidden_size": vlm.llm.width,
            "intermediate_size": vlm.llm.mlp_dim,
            "num_hidden_layers": vlm.llm.depth,
            "num_attention_heads": vlm.llm.num_heads,
            "num_key_value_heads": vlm.llm.num_kv_heads,
            "rms_norm_eps": vlm.llm.rms_eps,
            "rope_theta": vlm.llm.rope_theta,
            "bos_token_id": vlm.tokens.bos,
            "eos_token_id": vlm.tokens.stop,
            "pad_token_id": vlm.tokens.pad,
            "torch_dtype": "bfloat16",
            "vocab_size": vlm.llm.vocab_size,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
    }


def pixel_document(config: PolicyConfig) -> dict[str, Any]:
    """`preprocessor_config.json` of a policy."""
    c, size = config.preprocess, config.vlm.dino.image_size
    normalize = [
        {"inplace": False, "mean": list(mean), "std": list(std)} for mean, std in ((c.dino_mean, c.dino_std), (c.siglip_mean, c.siglip_std))
    ]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": [size, size]}
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, size, size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [entry["mean"] for entry in normalize],
        "stds": [entry["std"] for entry in normalize],
        "tvf_crop_params": [{"output_size": [size, size]}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": normalize,
        "tvf_resize_params": [resize] * 2,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "PrismaticProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<PAD>",
        "padding_side": "right",
        "model_max_length": 2048,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
