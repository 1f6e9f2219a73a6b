"""One of our checkpoints becomes a published one: weights that nothing touched keep their bits and their types.

Types follow the reference's scripts: towers, projector, decoder and action head in bfloat16; FiLM, state and noise projectors in float32.
What is stored that way already is copied; a checkpoint that was trained in float32 is rounded once.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vla_oft.adapter import PREFIX, WEIGHTS, Adapter, load_adapter
from vla_oft.atomic import atomic_directory, require_empty
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import PolicyConfig, checkpoint_folder, load_config
from vla_oft.reference import names
from vla_oft.reference.importer import TOKENIZER_FILES
from vla_oft.statistics import load_statistics, save_statistics
from vla_oft.weights import weight_files, write_shards

LLAMA2_EMPTY = 29871
TIMM_IDS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]


def export_checkpoint(checkpoint: Path, out: Path, *, step: int | None = None, say: Callable[[str], None] = print) -> Path:
    """Write the published layout of checkpoint or run folder `checkpoint` into `out`, atomically; returns `out`.

    step: N in the names of the `.pt` files; by default what `run.json` says. Raises ValueError for policies that have no such layout
    (a pooled head, other prompts), before anything is written.
    """
    require_empty(out)
    source = checkpoint_folder(checkpoint)
    config = load_config(source)
    _check_exportable(config)
    step = _step(source) if step is None else step
    adapter = load_adapter(source / "adapter") if (source / "adapter").is_dir() else None
    weights = Weights.open(source)
    if config.vlm.tokens.empty != LLAMA2_EMPTY:
        say(f"note: the reference's code ends every prompt with token {LLAMA2_EMPTY}; this tokenizer's is {config.vlm.tokens.empty}")
    with atomic_directory(out) as folder:
        _write_text(config, source, folder)
        save_statistics(folder / "dataset_statistics.json", load_statistics(source / "statistics.json"))
        backbone = {name for name in weights.files if name.startswith(names.VLM) and not names.FILM.search(name)}
        write_shards({name.removeprefix(names.VLM): weights.planned(name, torch.bfloat16) for name in sorted(backbone)}, folder)
        for component in _components(config):
            dtype = torch.bfloat16 if component.stem == "action_head" else torch.float32
            found = [name for name in sorted(weights.files) if name.startswith(component.ours)]
            tensors = {component.to_theirs(name): weights.read(name, dtype) for name in found}
            torch.save(tensors, folder / f"{component.stem}--{step}_checkpoint.pt")
        if config.vlm.film:
            torch.save(dict(_film_backbone(weights, adapter)), folder / f"vision_backbone--{step}_checkpoint.pt")
        if adapter:
            _write_adapter(adapter, weights, folder / "lora_adapter", without_vision=config.vlm.film)
            say("note: model.safetensors holds the weights WITHOUT the LoRA adapter, which lies beside it; merge first for plain weights")
    return out


@dataclass(frozen=True)
class Weights:
    """The tensors of one of our checkpoints, read one by one."""

    files: dict[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Read the headers."""
        files: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(str(path), "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return cls(files)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor in `dtype`."""
        with safe_open(str(self.files[name]), "pt") as file:
            return file.get_tensor(name).to(dtype)

    def planned(self, name: str, dtype: torch.dtype) -> tuple[int, Callable[[], Tensor]]:
        """Size in bytes and reader, for `write_shards`."""
        with safe_open(str(self.files[name]), "pt") as file:
            shape = file.get_slice(name).get_shape()
        return int(torch.Size(shape).numel()) * dtype.itemsize, lambda: self.read(name, dtype)


def _check_exportable(config: PolicyConfig) -> None:
    if not isinstance(config.head, l1.Config | diffusion.Config | discrete.Config):
        raise ValueError(f"head '{type(config.head).__module__.rpartition('.')[2]}' does not exist in the published layout")
    if config.prompt_style != "openvla":
        raise ValueError(f"prompt_style '{config.prompt_style}' does not exist in the published layout, only 'openvla'")
    if not config.vlm.dino.unread_weights:
        raise ValueError("the published layout needs the towers' last blocks, which this model was built without (unread_weights)")
    if config.grounding is not None:
        raise ValueError("the published layout has no place for the grounding head: train with model.grounding=null")


def _components(config: PolicyConfig) -> list[names.Component]:
    found = [names.STATE_PROJECTOR] if config.use_state else []
    if isinstance(config.head, diffusion.Config):
        return [*found, names.DIFFUSION_HEAD, names.NOISY_PROJECTOR]
    return [*found, names.L1_HEAD] if isinstance(config.head, l1.Config) else found


def _film_backbone(weights: Weights, adapter: Adapter | None) -> Iterator[tuple[str, Tensor]]:
    """The wrapped towers: FiLM in float32, adapted layers split into base and factors."""
    factors = adapter.factors if adapter else {}
    for name in sorted(n for n in weights.files if n.startswith(names.VLM + names.VISION)):
        theirs, module = names.film_to_theirs(name), name.rpartition(".")[0]
        if module in factors:
            stem, _, leaf = theirs.rpartition(".")
            yield f"{stem}.base_layer.{leaf}", weights.read(name, torch.bfloat16)
            if leaf == "weight":
                for side, factor in zip("AB", factors[module], strict=True):
                    yield f"{stem}.lora_{side}.default.weight", factor
        else:
            yield theirs, weights.read(name, torch.float32 if names.FILM.search(name) else torch.bfloat16)


def _write_adapter(adapter: Adapter, weights: Weights, folder: Path, *, without_vision: bool) -> None:
    factors = {
        module.removeprefix(names.VLM): pair
        for module, pair in adapter.factors.items()
        if not (without_vision and module.startswith(names.VLM + names.VISION))
    }
    if not factors:
        return
    Adapter(factors=factors, rank=adapter.rank, alpha=adapter.alpha, rank_stabilised=adapter.rank_stabilised).save(folder)
    if "language_model.lm_head" in factors:  # as peft does for layers that share their weight
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        tensors[f"{PREFIX}language_model.lm_head.base_layer.weight"] = weights.read("vlm.language_model.lm_head.weight", torch.bfloat16)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _step(folder: Path) -> int:
    path = folder / "run.json"
    return int(json.loads(path.read_text()).get("step", 0)) if path.is_file() else 0


def _write_text(config: PolicyConfig, source: Path, folder: Path) -> None:
    write = lambda name, document: (folder / name).write_text(json.dumps(document, indent=2) + "\n")  # noqa: E731
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    if not (source / "tokenizer_config.json").is_file():
        write("tokenizer_config.json", _tokenizer_config(config))
    statistics = {name: entry.to_dict() for name, entry in load_statistics(source / "statistics.json").items()}
    write("config.json", {**model_document(config), "norm_stats": statistics})
    write("preprocessor_config.json", pixel_document(config))
    special = config.vlm.tokens
    write("generation_config.json", {"bos_token_id": special.bos, "eos_token_id": special.stop, "pad_token_id": special.pad})


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
        "image_resize_strategy": config.preprocess.fit,
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
        "image_resize_strategy": config.preprocess.fit,
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


def _tokenizer_config(config: PolicyConfig) -> dict[str, Any]:
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
