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

import torch
from safetensors import safe_open
from torch import Tensor

from vla_oft import __version__, hub, preprocess, robots
from vla_oft.adapter import Adapter, read_adapter
from vla_oft.atomic import atomic_directory, require_empty
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import HeadConfig, Policy, PolicyConfig
from vla_oft.reference import layout, names
from vla_oft.reference.layout import Tensors
from vla_oft.statistics import DatasetStatistics, load_statistics, save_statistics
from vla_oft.vlm import tokens
from vla_oft.weights import check_fit, write_shards
from vla_oft_client import RobotSpec

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
Decoding = Literal["parallel", "autoregressive"]


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What the published files do not say themselves; None lets the importer infer it, and say so.

    source: folder or hub id. base: folder or hub id of the model that `lora_adapter/` adapts; the adapter then replaces merged weights.
    dataset: whose statistics normalise, where there are several. robot: name of a robot, for rates, cameras and normalisation.
    cameras: how many of the robot's cameras the policy reads. chunk_len: K. decoding: of discrete actions. center_crop: whether images
    were randomly cropped in training. step: N of the `.pt` files. vision_overrides: JSON with each tower's number of attention heads.
    diffusion_steps: noise levels of a diffusion head. parity: behave as the reference does in every detail.
    """

    source: str
    base: str | None = None
    dataset: str | None = None
    robot: str | None = None
    cameras: int | None = None
    chunk_len: int | None = None
    decoding: Decoding | None = None
    center_crop: bool = True
    step: int | None = None
    vision_overrides: Path | None = None
    diffusion_steps: int = 50
    parity: bool = True


@dataclass
class _Planned:
    """One parameter of the new checkpoint: shape, size in bytes, and how to read it."""

    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], Tensor]


Plan = dict[str, _Planned]


def import_checkpoint(request: ImportRequest, out: Path, say: Callable[[str], None] = print) -> Path:
    """Write checkpoint folder `out`, atomically; returns it. `say` gets one line for each thing that was inferred.

    Raises ValueError before anything is written: unsupported kinds, missing files, and all missing, unexpected or badly shaped weights.
    """
    require_empty(out)
    source = hub.resolve(request.source)
    base = hub.resolve(request.base) if request.base else None
    parts = _Parts.find(source, base, request)
    policy = _policy(request, parts, say)
    plan, adapter = _plan(policy, parts)
    _check(policy, plan, adapter, source)
    with atomic_directory(out) as folder:
        policy.write_facts(folder)
        save_statistics(folder / "statistics.json", parts.statistics)
        for name in TOKENIZER_FILES:
            if (parts.text / name).is_file():
                (folder / name).write_bytes((parts.text / name).read_bytes())
        write_shards({name: (planned.num_bytes, planned.read) for name, planned in plan.items()}, folder)
        if adapter:
            adapter.save(folder / "adapter")
        facts = {"imported_from": request.source, "base": request.base, "step": parts.step, "versions": {"vla-oft": __version__}}
        (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        (folder / "README.md").write_text(_model_card(request, policy))
    return out


@dataclass
class _Parts:
    """The files of one published checkpoint."""

    config: dict[str, Any]
    text: Path
    pixels: dict[str, Any]
    tensors: Tensors
    statistics: dict[str, DatasetStatistics]
    has_statistics_file: bool
    adapter: Adapter | None
    adapter_extras: dict[str, Tensor]
    components: dict[names.Component, dict[str, Tensor]]
    film: dict[str, Tensor] | None
    step: int

    @classmethod
    def find(cls, source: Path, base: Path | None, request: ImportRequest) -> "_Parts":
        """Locate and open everything; small files are read, large ones only mapped."""
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder: give the checkpoint's folder")
        if (source / "policy.json").is_file():
            raise ValueError(f"{source} is a vla-oft checkpoint already: nothing to import")
        adapter_folder = source / "lora_adapter"
        if base is None and not any(source.glob("model*.safetensors")) and adapter_folder.is_dir():
            wanted = json.loads((adapter_folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ValueError(f"{source} has a LoRA adapter but no weights: name the model it adapts with --base (it says '{wanted}')")
        if base is not None and not adapter_folder.is_dir():
            raise ValueError(f"{source} has no lora_adapter/: --base makes no sense")
        model = base or source
        find = lambda stem: layout.find_component(source, stem, request.step)  # noqa: E731
        paths = {stem: path for stem in ("action_head", "proprio_projector", "noisy_action_projector") if (path := find(stem))}
        film_path = find("vision_backbone")
        adapter, extras = read_adapter(adapter_folder) if base is not None else (None, {})
        steps = [layout.step_of(path) for path in (*paths.values(), film_path) if path]
        config = layout.read_json(model, "config.json")
        nearest = lambda name: source if (source / name).is_file() else model  # noqa: E731
        return cls(
            config=config,
            text=nearest("tokenizer.json"),
            pixels=layout.read_json(nearest("preprocessor_config.json"), "preprocessor_config.json"),
            tensors=layout.read_shapes(model),
            statistics=_statistics(source, config),
            has_statistics_file=(source / "dataset_statistics.json").is_file(),
            adapter=adapter,
            adapter_extras=extras,
            components=_components({stem: _load_pt(path) for stem, path in paths.items()}),
            film=_load_pt(film_path) if film_path else None,
            step=max(steps, default=request.step or 0),
        )

    def component(self, stem: str) -> dict[str, Tensor] | None:
        """Tensors of a `.pt` file, by our names."""
        found = [tensors for component, tensors in self.components.items() if component.stem == stem]
        return found[0] if found else None


def _statistics(source: Path, config: dict[str, Any]) -> dict[str, DatasetStatistics]:
    """`dataset_statistics.json`, which wins, or `norm_stats` of config.json, as the reference's loader does."""
    if (source / "dataset_statistics.json").is_file():
        return load_statistics(source / "dataset_statistics.json")
    entries = config.get("norm_stats") or {}
    if not entries:
        raise ValueError(f"{source} has neither dataset_statistics.json nor norm_stats in config.json: actions cannot be un-normalised")
    return {name: DatasetStatistics.from_dict(entry, f"config.json: norm_stats.{name}") for name, entry in entries.items()}


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # truncated, pickled code, not a zip: whatever torch raises
        raise ValueError(f"{path} is not a file of plain tensors ({str(error).splitlines()[0]}); download it again") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} must hold a flat table of tensors")
    return dict(found)


def _components(files: dict[str, dict[str, Tensor]]) -> dict[names.Component, dict[str, Tensor]]:
    found: dict[names.Component, dict[str, Tensor]] = {}
    for stem, tensors in files.items():
        head = names.DIFFUSION_HEAD if any("noise_predictor." in name for name in tensors) else names.L1_HEAD
        component = {"action_head": head, "proprio_projector": names.STATE_PROJECTOR, "noisy_action_projector": names.NOISY_PROJECTOR}[stem]
        found[component] = {component.to_ours(name): tensor for name, tensor in tensors.items()}
    return found


def _policy(request: ImportRequest, parts: _Parts, say: Callable[[str], None]) -> Policy:
    """The model on the meta device, with everything that the files leave open decided."""
    dataset = _dataset(request, parts)
    statistics = parts.statistics[dataset]
    state = parts.component("proprio_projector")
    head, action_dim = _head(request, parts, say)
    robot = _robot(request, dataset, action_dim or statistics.action.dim, say)
    state_dim = 0 if state is None else state[f"{names.STATE_PROJECTOR.ours}fc1.weight"].shape[1]
    chunk_len = _chunk_len(request, head, robot, say)
    cameras = _cameras(request, robot, alone=state is None and action_dim is None, say=say)
    robot = dataclasses.replace(
        robot, cameras=cameras, state_dim=state_dim, chunk_len=chunk_len, normalize_mask=tuple(map(bool, statistics.normalize_mask))
    )
    overrides = layout.read_json(request.vision_overrides.parent, request.vision_overrides.name) if request.vision_overrides else None
    tokenizer = tokens.load_tokenizer(parts.text)
    vlm = layout.vlm_config(parts.config, parts.tensors.shapes, tokenizer, overrides, film=parts.film is not None)
    config = PolicyConfig(
        robot=robot,
        vlm=vlm,
        head=head,
        preprocess=preprocess.from_preprocessor_config(
            parts.pixels,
            image_size=vlm.dino.image_size,
            crop_area=0.9 if request.center_crop else 1.0,
            camera=preprocess.Camera(resize="none" if _is_autoregressive(head) else "jpeg-lanczos"),
        ),
        dataset=dataset,
        chunk_len=chunk_len,
        use_state=state is not None,
        prompt_style="openvla",
        grounding=None,
        parity=request.parity,
    )
    with torch.device("meta"):
        return Policy(config, statistics, tokenizer)


def _dataset(request: ImportRequest, parts: _Parts) -> str:
    known = sorted(parts.statistics)
    if request.dataset is None and len(known) == 1:
        return known[0]
    if request.dataset not in known:
        asked = f"not '{request.dataset}'" if request.dataset else "more than one"
        raise ValueError(f"the checkpoint has statistics of {known}, {asked}: choose with --dataset NAME")
    return request.dataset


def _head(request: ImportRequest, parts: _Parts, say: Callable[[str], None]) -> tuple[HeadConfig, int | None]:
    """The head's configuration, and the action dimensions that its weights tell."""
    tensors = parts.component("action_head")
    if tensors is None:
        decoding = request.decoding
        if decoding is None:
            oft = parts.has_statistics_file and any(key in name for name in parts.statistics for key in ("libero", "aloha"))
            decoding = "parallel" if oft else "autoregressive"
            say(f"note: no action head, so actions are tokens; {decoding} decoding assumed (--decoding says otherwise)")
        bins = parts.config.get("n_action_bins", 256)
        return discrete.Config(decoding=decoding, bins=bins, any_token=request.parity), None
    is_diffusion = names.DIFFUSION_HEAD in parts.components
    component = names.DIFFUSION_HEAD if is_diffusion else names.L1_HEAD
    out_weight = tensors.get(f"{component.ours}fc2.weight")
    if out_weight is None:
        raise ValueError(f"the action head is neither L1 nor diffusion: its file holds {sorted(tensors)[:6]} ...")
    prefix = f"{component.ours}mlp_resnet_blocks."
    num_blocks = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    if is_diffusion:
        steps = request.diffusion_steps
        return diffusion.Config(train_steps=steps, inference_steps=steps, num_blocks=num_blocks), len(out_weight)
    return l1.Config(num_blocks=num_blocks), len(out_weight)


def _is_autoregressive(head: HeadConfig) -> bool:
    """The original OpenVLA: it also leaves the resizing of camera images to the crop."""
    return isinstance(head, discrete.Config) and head.decoding == "autoregressive"


def _robot(request: ImportRequest, dataset: str, action_dim: int, say: Callable[[str], None]) -> RobotSpec:
    if request.robot:
        robot = robots.load(request.robot)
    else:
        named = [name for name in robots.names() if name in dataset.lower()]
        alike = [name for name in robots.names() if robots.load(name).action_dim == action_dim]
        choice = named if len(named) == 1 else alike
        if len(choice) != 1:
            raise ValueError(f"dataset '{dataset}' names none of the robots {robots.names()}: choose one with --robot NAME")
        robot = robots.load(choice[0])
        say(f"note: robot '{robot.name}' assumed for dataset '{dataset}' (--robot says otherwise)")
    if robot.action_dim != action_dim:
        raise ValueError(f"robot '{robot.name}' has {robot.action_dim} action dimensions, the checkpoint {action_dim}: choose with --robot")
    return robot


def _chunk_len(request: ImportRequest, head: HeadConfig, robot: RobotSpec, say: Callable[[str], None]) -> int:
    if request.chunk_len is not None:
        return request.chunk_len
    if _is_autoregressive(head):
        return 1
    say(f"note: chunks of {robot.chunk_len} actions assumed, as for every '{robot.name}' (--chunk-len says otherwise)")
    return robot.chunk_len


def _cameras(request: ImportRequest, robot: RobotSpec, *, alone: bool, say: Callable[[str], None]) -> tuple[str, ...]:
    """alone: without state and head, as in the original OpenVLA, one camera is the rule."""
    count = request.cameras
    if count is None:
        count = 1 if alone else len(robot.cameras)
        say(f"note: {count} camera{'s' * (count > 1)} assumed: {', '.join(robot.cameras[:count])} (--cameras says otherwise)")
    if not 1 <= count <= len(robot.cameras):
        raise ValueError(f"--cameras {count}: robot '{robot.name}' has {len(robot.cameras)}: {', '.join(robot.cameras)}")
    return robot.cameras[:count]


def _plan(policy: Policy, parts: _Parts) -> tuple[Plan, Adapter | None]:
    """Where every parameter comes from, and the adapter that stays one."""
    plan: Plan = {}
    for name, path in parts.tensors.files.items():
        plan[names.VLM + name] = _from_safetensors(path, name, parts.tensors.shapes[name])
    for tensors in parts.components.values():
        plan |= {name: _from_memory(tensor) for name, tensor in tensors.items()}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    rank, alpha, stabilised = 0, 0.0, False
    if parts.adapter is not None:
        factors = {names.adapter_module_to_ours(module): pair for module, pair in parts.adapter.factors.items()}
        rank, alpha, stabilised = parts.adapter.rank, parts.adapter.alpha, parts.adapter.rank_stabilised
        _check_copies(parts, plan)
    if parts.film is not None:
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in parts.film.items():
            ours = names.film_to_ours(name)
            if ".lora_" in ours:
                module, _, side = ours.partition(".lora_")
                halves.setdefault(module, {})[side[0]] = tensor
            else:
                plan[ours] = _from_memory(tensor)
        factors |= {module: (sides["A"], sides["B"]) for module, sides in halves.items()}
        if halves and not rank:
            rank = next(iter(halves.values()))["A"].shape[0]
            alpha = min(rank, 16)  # the reference's rule
    adapter = Adapter(factors=factors, rank=rank, alpha=alpha, rank_stabilised=stabilised) if factors else None
    return plan, adapter


def _check_copies(parts: _Parts, plan: Plan) -> None:
    """peft stores a copy of lm_head's base weight in the adapter's file: it must be the base's."""
    unknown = []
    for name, tensor in parts.adapter_extras.items():
        ours = names.VLM + name.replace(".base_layer.", ".")
        if ours not in plan:
            unknown.append(name)
        elif not torch.equal(plan[ours].read(), tensor):
            raise ValueError(f"the adapter was trained on another base: its copy of {name} differs; check --base")
    if unknown:
        raise ValueError(f"lora_adapter/adapter_model.safetensors has tensors that belong to no LoRA layer: {sorted(unknown)}")


def _from_safetensors(path: Path, name: str, shape: tuple[int, ...]) -> _Planned:
    with safe_open(str(path), "pt") as file:
        width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(file.get_slice(name).get_dtype(), 1)

    def read() -> Tensor:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor(name)

    count = 1
    for size in shape:
        count *= size
    return _Planned(shape, count * width, read)


def _from_memory(tensor: Tensor) -> _Planned:
    return _Planned(tuple(tensor.shape), tensor.nbytes, tensor.contiguous)


def _check(policy: Policy, plan: Plan, adapter: Adapter | None, source: Path) -> None:
    expected = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    check_fit(expected, {name: planned.shape for name, planned in plan.items()}, f"{source}: the weights do not fit the model")
    if adapter:
        adapter.check(expected)


def _model_card(request: ImportRequest, policy: Policy) -> str:
    robot = policy.config.robot
    return (
        f"# {request.source}\n\nImported with vla-oft {__version__}. Robot `{robot.name}`: cameras {', '.join(robot.cameras)}; state "
        f"{robot.state_dim}-D; actions {robot.action_dim}-D in chunks of {policy.config.chunk_len}; statistics `{policy.config.dataset}`.\n"
    )
