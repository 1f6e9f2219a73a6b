"""A published checkpoint becomes one of ours: every weight keeps its bits, a LoRA adapter stays an adapter (merged in float32 on loading).

Files are planned by their headers, checked against the model's shapes, then copied shard by shard: nothing is written before everything
fits, and peak memory is one output shard. No code of the checkpoint runs; `.pt` files are read with `weights_only=True`.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vla_oft import __version__, hub, preprocess, robots
from vla_oft.adapter import Adapter, read_adapter, shortened, split_factors
from vla_oft.atomic import atomic_directory, require_empty
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import HeadConfig, Policy, PolicyConfig
from vla_oft.reference import layout, names
from vla_oft.statistics import DatasetStatistics, load_statistics, save_statistics
from vla_oft.vlm import tokens
from vla_oft.weights import LazyTensor, check_fit, open_weights, write_shards
from vla_oft_client import RobotSpec

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PUBLISHED = "published"
"""Folder of a checkpoint that keeps the published descriptions, for an export."""
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "generation_config.json")
UNKNOWN_ROBOT = "libero"
"""The reference takes LIBERO's constants for every robot that it does not know."""
Decoding = Literal["parallel", "autoregressive"]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What the published files do not say themselves; None lets the importer infer it, and say so.

    source: folder or hub id. base: folder or hub id of the model that `lora_adapter/` adapts; the adapter then replaces merged weights.
    dataset: whose statistics normalise, where there are several; None leaves the choice to `Policy.load`. robot: name of a robot, for
    rates, cameras and normalisation. cameras: how many of the robot's cameras the policy reads. chunk_len: K. decoding: of discrete
    actions. center_crop: whether images were randomly cropped in training. step: label of the `.pt` files, a number or `latest`.
    vision_overrides: JSON with each tower's number of attention heads. diffusion_steps: noise levels of a diffusion head. parity: behave
    as the reference does in every detail.
    """

    source: str
    base: str | None = None
    dataset: str | None = None
    robot: str | None = None
    cameras: int | None = None
    chunk_len: int | None = None
    decoding: Decoding | None = None
    center_crop: bool | None = None
    step: str | None = None
    vision_overrides: Path | None = None
    diffusion_steps: int = 50
    parity: bool = True


def import_checkpoint(request: ImportRequest, out: Path, report: Report = print) -> Path:
    """Write checkpoint folder `out`, atomically; returns it. `report` gets one line for each thing that was inferred.

    Raises ValueError before anything is written: unsupported kinds, missing files, and all missing, unexpected or badly shaped weights.
    """
    require_empty(out)
    source = hub.resolve(request.source)
    base = hub.resolve(request.base) if request.base else None
    published = _Published.find(source, base, request.step)
    policy, dataset = _policy(request, published, report)
    weights, adapter = _weights(published)
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    check_fit(expected, {name: tensor.shape for name, tensor in weights.items()}, f"{source}: the weights do not fit the model")
    if adapter:
        adapter.check(expected)
    elif (source / "lora_adapter").is_dir():
        report("note: lora_adapter/ is left aside, its sum with the base was stored in bfloat16; --base BASE merges it in float32")
    with atomic_directory(out) as folder:
        policy.write_facts(folder, dataset=dataset)
        save_statistics(folder / "statistics.json", published.statistics)
        _copy(published.text, TOKENIZER_FILES, folder)
        (folder / PUBLISHED).mkdir()
        _copy(published.model, DESCRIPTIONS, folder / PUBLISHED)
        write_shards(weights, folder)
        if adapter:
            adapter.save(folder / "adapter")
        facts = {"imported_from": request.source, "base": request.base, "step": published.step, "versions": {"vla-oft": __version__}}
        (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        (folder / "README.md").write_text(_model_card(request, policy))
    return out


@dataclass
class _Published:
    """The files of one published checkpoint, opened; weights under the published names.

    model: the folder with the backbone and its description. text: the folder with the tokenizer. from_norm_stats: the statistics come from
    `config.json`. lora: the adapter, only when its base was given. lora_extras: what else its file holds. film: the wrapped vision
    backbone. step: label of the `.pt` files.
    """

    model: Path
    text: Path
    config: dict[str, Any]
    pixels: dict[str, Any]
    backbone: dict[str, LazyTensor]
    statistics: dict[str, DatasetStatistics]
    from_norm_stats: bool
    action_head: dict[str, Tensor] | None
    state_projector: dict[str, Tensor] | None
    noisy_projector: dict[str, Tensor] | None
    film: dict[str, Tensor] | None
    lora: Adapter | None
    lora_extras: dict[str, Tensor]
    step: str

    @classmethod
    def find(cls, source: Path, base: Path | None, step: str | None) -> "_Published":
        """Locate and open everything; small files are read, large ones only mapped."""
        _check_source(source, base)
        model = base or source
        stems = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
        components = {stem: found for stem in stems if (found := layout.find_component(source, stem, step))}
        labels = sorted({label for _, label in components.values()})
        if len(labels) > 1:
            raise ValueError(f"{source} has files of different steps {labels}: {', '.join(p.name for p, _ in components.values())}")
        opened = {stem: _load_pt(path) for stem, (path, _) in components.items()}
        config = layout.read_json(model, "config.json")
        statistics_file = source / "dataset_statistics.json"
        lora, extras = read_adapter(source / "lora_adapter") if base is not None else (None, {})
        has = lambda name: source if (source / name).is_file() else model  # noqa: E731
        return cls(
            model=model,
            text=has("tokenizer.json"),
            config=config,
            pixels=layout.read_json(has("preprocessor_config.json"), "preprocessor_config.json"),
            backbone=open_weights(model),
            statistics=load_statistics(statistics_file) if statistics_file.is_file() else _norm_stats(config, model),
            from_norm_stats=not statistics_file.is_file(),
            action_head=opened.get("action_head"),
            state_projector=opened.get("proprio_projector"),
            noisy_projector=opened.get("noisy_action_projector"),
            film=opened.get("vision_backbone"),
            lora=lora,
            lora_extras=extras,
            step=labels[0] if labels else step or "0",
        )

    @property
    def is_diffusion(self) -> bool:
        """Whether the action head predicts noise."""
        return any("noise_predictor." in name for name in self.action_head or ())

    def components(self) -> dict[str, Tensor]:
        """Tensors of the `.pt` files of head and projectors, under our names."""
        head = names.DIFFUSION_HEAD if self.is_diffusion else names.L1_HEAD
        parts = ((head, self.action_head), (names.STATE_PROJECTOR, self.state_projector), (names.NOISY_PROJECTOR, self.noisy_projector))
        return {part.to_ours(name): tensor for part, tensors in parts for name, tensor in (tensors or {}).items()}


def _check_source(source: Path, base: Path | None) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give the checkpoint's folder")
    if (source / "policy.json").is_file():
        raise ValueError(f"{source} is a vla-oft checkpoint already: nothing to import")
    adapter = source / "lora_adapter"
    if base is not None and not adapter.is_dir():
        raise ValueError(f"{source} has no lora_adapter/: --base makes no sense")
    if base is None and adapter.is_dir() and not any(source.glob("model*.safetensors")):
        wanted = layout.read_json(adapter, "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(f"{source} has a LoRA adapter but no weights: name the model it adapts with --base (it says '{wanted}')")


def _copy(source: Path, files: tuple[str, ...], folder: Path) -> None:
    for name in files:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def _norm_stats(config: dict[str, Any], where: Path) -> dict[str, DatasetStatistics]:
    entries = config.get("norm_stats") or {}
    if not entries:
        raise ValueError(f"{where} has neither dataset_statistics.json nor norm_stats in config.json: actions cannot be un-normalised")
    return {name: DatasetStatistics.from_dict(entry, f"config.json: norm_stats.{name}") for name, entry in entries.items()}


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, pickled code: whatever torch raises
        raise ValueError(f"{path} is not a file of plain tensors ({str(error).splitlines()[0]}); download it again") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} must hold a flat table of tensors")
    return dict(found)


def _policy(request: ImportRequest, published: _Published, report: Report) -> tuple[Policy, str | None]:
    """The model on the meta device with everything that the files leave open decided, and the dataset, None if it is left open."""
    dataset = _dataset(request, published, report)
    statistics = published.statistics[dataset or min(published.statistics)]
    components = published.components()
    head, action_dim = _head(request, published, components, statistics, report)
    robot = _robot(request, published, dataset, action_dim, report)
    state_dim = _state_dim(components, statistics)
    autoregressive = isinstance(head, discrete.Config) and head.decoding == "autoregressive"
    chunk_len = _chunk_len(request, robot, autoregressive, report)
    robot = dataclasses.replace(
        robot,
        cameras=_cameras(request, robot, published, report),
        state_dim=state_dim,
        chunk_len=chunk_len,
        normalize_mask=tuple(map(bool, statistics.normalize_mask)),
        normalization="bounds_q99" if autoregressive else robot.normalization,  # the original OpenVLA knows no other
    )
    overrides = layout.read_json(request.vision_overrides.parent, request.vision_overrides.name) if request.vision_overrides else None
    tokenizer = tokens.load_tokenizer(published.text)
    shapes = {name: tensor.shape for name, tensor in published.backbone.items()}
    vlm = layout.vlm_config(published.config, shapes, tokenizer, overrides, film=published.film is not None)
    config = PolicyConfig(
        robot=robot,
        vlm=vlm,
        head=head,
        preprocess=preprocess.from_preprocessor_config(
            published.pixels,
            image_size=vlm.dino.image_size,
            crop_area=0.9 if _center_crop(request, published, report) else 1.0,
            camera=preprocess.Camera(resize="none" if autoregressive else "jpeg-lanczos"),
        ),
        dataset=dataset or min(published.statistics),
        chunk_len=chunk_len,
        use_state=state_dim > 0,
        prompt_style="openvla",
        grounding=None,
        parity=request.parity,
    )
    with torch.device("meta"):
        return Policy(config, statistics, tokenizer), dataset


def _dataset(request: ImportRequest, published: _Published, report: Report) -> str | None:
    known = sorted(published.statistics)
    if request.dataset is None:
        if len(known) > 1:
            report(f"note: statistics of {known}: choose with --dataset now, or with Policy.load(..., dataset=...) later")
        return known[0] if len(known) == 1 else None
    if request.dataset not in known:
        raise ValueError(f"the checkpoint has statistics of {known}, not '{request.dataset}': choose with --dataset NAME")
    return request.dataset


def _head(
    request: ImportRequest, published: _Published, components: dict[str, Tensor], statistics: DatasetStatistics, report: Report
) -> tuple[HeadConfig, int]:
    """The head's configuration, and the number of action dimensions."""
    if published.action_head is None:
        if published.state_projector is not None and request.decoding is None:
            raise ValueError("there is a proprio_projector but no action_head: download it, or say --decoding if actions are tokens")
        decoding = request.decoding
        if decoding is None:
            decoding = "parallel" if _has_state(statistics) and not published.from_norm_stats else "autoregressive"
            report(f"note: no action head, so actions are tokens; {decoding} decoding assumed (--decoding says otherwise)")
        bins = published.config.get("n_action_bins", 256)
        return discrete.Config(decoding=decoding, bins=bins, any_token=request.parity), statistics.action.dim
    prefix = (names.DIFFUSION_HEAD if published.is_diffusion else names.L1_HEAD).ours
    last = components.get(f"{prefix}fc2.weight")
    if last is None:
        raise ValueError(f"the action head is neither L1 nor diffusion: its file holds {shortened(sorted(published.action_head))}")
    blocks = f"{prefix}mlp_resnet_blocks."
    num_blocks = len({name.removeprefix(blocks).split(".")[0] for name in components if name.startswith(blocks)})
    if published.is_diffusion:
        steps = request.diffusion_steps
        return diffusion.Config(train_steps=steps, inference_steps=steps, num_blocks=num_blocks), len(last)
    return l1.Config(num_blocks=num_blocks), len(last)


def _has_state(statistics: DatasetStatistics) -> bool:
    """Whether the state was loaded in training: the original OpenVLA, which decodes autoregressively, writes zeros instead."""
    return statistics.state is not None and bool(np.any(statistics.state.max) or np.any(statistics.state.min))


def _state_dim(components: dict[str, Tensor], statistics: DatasetStatistics) -> int:
    first = components.get(f"{names.STATE_PROJECTOR.ours}fc1.weight")
    if first is None:
        return 0
    known = 0 if statistics.state is None else statistics.state.dim
    if known != first.shape[1]:
        raise ValueError(f"the proprio_projector reads {first.shape[1]} state dimensions, the dataset's statistics have {known}")
    return known


def _robot(request: ImportRequest, published: _Published, dataset: str | None, action_dim: int, report: Report) -> RobotSpec:
    if request.robot:
        robot = robots.load(request.robot)
    else:
        known = [name for name in robots.names() if name != "tabletop"]  # a simulator of ours: nothing published runs it
        datasets = [dataset] if dataset else sorted(published.statistics)
        named = {name for name in known for text in datasets if name in text.lower()}
        alike = [name for name in known if robots.load(name).action_dim == action_dim]
        fitting = sorted(named & set(alike)) or alike
        if not fitting:
            raise ValueError(f"no robot of {known} has {action_dim} action dimensions: define yours (docs/extending.md), give --robot NAME")
        chosen = fitting[0] if len(fitting) == 1 or UNKNOWN_ROBOT not in fitting else UNKNOWN_ROBOT
        robot = robots.load(chosen)
        report(f"note: robot '{chosen}' assumed for {dataset or 'these datasets'} (--robot says otherwise)")
    if robot.action_dim != action_dim:
        raise ValueError(f"robot '{robot.name}' has {robot.action_dim} action dimensions, the checkpoint {action_dim}: choose with --robot")
    return robot


def _chunk_len(request: ImportRequest, robot: RobotSpec, autoregressive: bool, report: Report) -> int:
    if request.chunk_len is not None:
        return request.chunk_len
    if autoregressive:
        return 1
    report(f"note: chunks of {robot.chunk_len} actions assumed, as for every '{robot.name}' (--chunk-len says otherwise)")
    return robot.chunk_len


def _cameras(request: ImportRequest, robot: RobotSpec, published: _Published, report: Report) -> tuple[str, ...]:
    """Without action head and state, as in the original OpenVLA, one camera is the rule."""
    count = request.cameras
    if count is None:
        count = 1 if published.action_head is None and published.state_projector is None else len(robot.cameras)
        report(f"note: {count} camera{'s' * (count > 1)} assumed: {', '.join(robot.cameras[:count])} (--cameras says otherwise)")
    if not 1 <= count <= len(robot.cameras):
        raise ValueError(f"--cameras {count}: robot '{robot.name}' has {len(robot.cameras)}: {', '.join(robot.cameras)}")
    return robot.cameras[:count]


def _center_crop(request: ImportRequest, published: _Published, report: Report) -> bool:
    """Fine-tuned checkpoints were trained on random crops; the base model, whose statistics are in config.json, was not."""
    if request.center_crop is not None:
        return request.center_crop
    if published.from_norm_stats:
        report("note: a base model: whole images, no central crop (--center-crop says otherwise)")
    return not published.from_norm_stats


def _weights(published: _Published) -> tuple[dict[str, LazyTensor], Adapter | None]:
    """Every parameter under our name, and the adapter that stays one."""
    found = {names.VLM + name: tensor for name, tensor in published.backbone.items()}
    found |= {name: LazyTensor.of(tensor) for name, tensor in published.components().items()}
    factors = {}
    if published.lora is not None:
        factors = {names.adapter_module_to_ours(module): update for module, update in published.lora.factors.items()}
        _check_copies(published, found)
    if published.film is not None:  # the whole vision backbone, with its own adapter or merged
        film = {names.film_to_ours(name): tensor for name, tensor in published.film.items()}
        adapter, plain = split_factors(film, "vision_backbone", lambda module, rank: min(rank, 16) / rank)  # the reference's rule
        found |= {name: LazyTensor.of(tensor) for name, tensor in plain.items()}
        factors = {module: update for module, update in factors.items() if not module.startswith(names.VLM + names.VISION)}
        factors |= adapter.factors
    return found, Adapter(factors) if factors else None


def _check_copies(published: _Published, found: dict[str, LazyTensor]) -> None:
    """peft stores a copy of lm_head's base weight in the adapter's file: it must be the base's."""
    unknown = []
    for name, tensor in published.lora_extras.items():
        ours = names.VLM + name.replace(".base_layer.", ".")
        if ours not in found:
            unknown.append(name)
        elif not torch.equal(found[ours].read(), tensor):
            raise ValueError(f"the adapter was trained on another base: its copy of {name} differs; check --base")
    if unknown:
        raise ValueError(f"lora_adapter/adapter_model.safetensors has tensors that belong to no LoRA layer: {shortened(sorted(unknown))}")


def _model_card(request: ImportRequest, policy: Policy) -> str:
    robot = policy.config.robot
    return (
        f"# {request.source}\n\nImported with vla-oft {__version__}. Robot `{robot.name}`: cameras {', '.join(robot.cameras)}; state "
        f"{robot.state_dim}-D; actions {robot.action_dim}-D in chunks of {policy.config.chunk_len}; statistics `{policy.config.dataset}`.\n"
    )
