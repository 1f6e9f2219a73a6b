"""From a `TrainConfig` to everything a run needs, all checks first: a mistake costs seconds, not hours."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_oft import hub, preprocess
from vla_oft.data.base import Source
from vla_oft.data.check import check_source, source_statistics
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.prepare import open_for
from vla_oft.heads import discrete
from vla_oft.policy import HeadConfig, Policy, PolicyConfig, checkpoint_folder, load_config, some_dataset
from vla_oft.statistics import DatasetStatistics, load_statistics
from vla_oft.train import validation
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import Fresh, Pretrained, TrainConfig
from vla_oft.train.freeze import FILM
from vla_oft.train.parallel import Ranks
from vla_oft.vlm import sizes, tokens
from vla_oft.weights import LazyTensor, open_fitting

GROUNDING = "grounding"
LANDMARKS = "landmarks"
"""Names of the per-frame arrays that dense grounding is trained on."""


def open_datasets(config: TrainConfig) -> list[Source]:
    """Open and check every dataset against the robot. Raises ValueError naming what does not fit; prints warnings."""
    spec = config.robot_spec()
    sources = [open_for(spec, d.path, d.read, d.filters, d.layout) for d in config.datasets]
    for source in sources:
        for line in source.skipped:
            print(f"skipped: {line}")
        for warning in check_source(source, spec):
            print(f"warning: {source.path}: {warning}")
    return sources


def split(config: TrainConfig, sources: list[Source]) -> tuple[list[Source], list[Source]]:
    """What is learned from, one for each dataset, and what is held out for validation, if anything is."""
    return validation.split(sources, config.validation, config.seed) if config.validation else (sources, [])


def build_policy(config: TrainConfig, sources: list[Source]) -> Blueprint:
    """A fresh policy, or the pretrained one made ready for the new data. No weights of a pretrained one are read yet."""
    if isinstance(config.model, Pretrained):
        return _pretrained(config, config.model, sources)
    return Blueprint.of(_fresh(config, config.model, sources))


def open_policy(folder: Path) -> Blueprint:
    """The policy of a checkpoint of a run, as it was built, without what LoRA added."""
    config = load_config(folder, some_dataset(folder))
    with torch.device("meta"):
        policy = Policy(config, load_statistics(folder / "statistics.json")[config.dataset], tokens.load_tokenizer(folder))
    return Blueprint(policy, open_fitting(folder, _shapes(policy), merge=False))


def _fresh(config: TrainConfig, model: Fresh, sources: list[Source]) -> Policy:
    spec = config.robot_spec()
    corpus = sorted(
        {
            tokens.PROMPTS[model.prompt_style].format(instruction=task.lower())
            for texts in (model.corpus, *(s.tasks for s in sources))
            for task in texts
        }
    )
    tokenizer, token_ids = tokens.train_tokenizer(corpus, model.vocab_size)
    vlm = {"nano": sizes.nano}[model.size](token_ids)
    policy = PolicyConfig(
        robot=spec,
        vlm=vlm,
        head=model.head,
        preprocess=preprocess.Config(image_size=vlm.dino.image_size, resize="box", crop_area=_crop_area(config)),
        dataset=_main_source(config, sources).name,
        chunk_len=spec.chunk_len,
        use_state=spec.state_dim > 0,
        prompt_style=model.prompt_style,
        grounding=model.grounding,
        parity=config.parity,
        state_normalization=config.state_normalization,
    )
    return Policy.create(policy, _new_statistics(config, sources), tokenizer, seed=config.seed)


def _pretrained(config: TrainConfig, model: Pretrained, sources: list[Source]) -> Blueprint:
    spec = config.robot_spec()
    folder = checkpoint_folder(hub.resolve(model.path))
    own = model.statistics == "own"
    base = load_config(folder, some_dataset(folder) if own else None)
    if len(base.robot.cameras) > len(spec.cameras):
        print(f"warning: the pretrained policy saw {len(base.robot.cameras)} cameras, robot '{spec.name}' has {len(spec.cameras)}")
    if not own and (base.robot.action_dim != spec.action_dim or spec.state_dim not in (0, base.robot.state_dim)):
        raise ValueError(f"statistics='base' needs a base policy of the same sizes as robot '{spec.name}'; use statistics='own'")
    head = model.head or base.head
    changed = dataclasses.replace(
        base,
        robot=spec,
        vlm=dataclasses.replace(base.vlm, film=base.vlm.film if model.film is None else model.film),
        head=head,
        dataset=_main_source(config, sources).name if own else base.dataset,
        chunk_len=spec.chunk_len,
        use_state=spec.state_dim > 0,
        prompt_style=model.prompt_style or base.prompt_style,
        preprocess=dataclasses.replace(base.preprocess, crop_area=_crop_area(config), camera=_camera(base, head)),
        parity=config.parity,
        state_normalization=config.state_normalization or base.state_normalization,
    )
    statistics = _new_statistics(config, sources) if own else load_statistics(folder / "statistics.json")[base.dataset]
    return _adapted(changed, statistics, folder, base, config.seed)


def _adapted(config: PolicyConfig, statistics: DatasetStatistics, folder: Path, base: PolicyConfig, seed: int) -> Blueprint:
    """The policy of `config` with every weight of checkpoint `folder` (whose own config is `base`) that fits.

    New parts are random from `seed`, new FiLM is the identity. Nothing of a large backbone is ever drawn at random only to be replaced.
    """
    tokenizer, vlm = tokens.load_tokenizer(folder), config.vlm
    with torch.device("meta"):
        policy = Policy(config, statistics, tokenizer)
        before = Policy(base, load_statistics(folder / "statistics.json")[base.dataset], tokenizer)
    stored = open_fitting(folder, _shapes(before))
    shapes = _shapes(policy)
    weights = {name: weight for name, weight in stored.items() if shapes.get(name) == tuple(weight.shape)}
    new = sorted(shapes.keys() - weights.keys())
    drawn = [name for name in new if not _is_film(name)]
    if drawn:
        shallow = dataclasses.replace(
            vlm,
            dino=dataclasses.replace(vlm.dino, depth=2),
            siglip=dataclasses.replace(vlm.siglip, depth=2),
            llm=dataclasses.replace(vlm.llm, depth=1),
        )
        parts = dict(Policy.create(dataclasses.replace(config, vlm=shallow), statistics, tokenizer, seed=seed).named_parameters())
        weights |= {name: LazyTensor.of(parts[name].detach()) for name in drawn}
    weights |= {name: LazyTensor.of(torch.zeros(shapes[name])) for name in new if _is_film(name)}
    if new:
        print(f"note: {len(new)} weights are new, not pretrained: {', '.join(new[:8])}{' ...' if len(new) > 8 else ''}")
    return Blueprint(policy, weights)


def _shapes(policy: Policy) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}


def _is_film(name: str) -> bool:
    return FILM.search(name.rpartition(".")[0]) is not None


def _camera(base: PolicyConfig, head: HeadConfig) -> preprocess.Camera | None:
    """How an imported policy's camera images are resized: the original OpenVLA leaves it to the crop, OFT does not."""
    camera = base.preprocess.camera
    if camera is None or head == base.head:
        return camera
    autoregressive = isinstance(head, discrete.Config) and head.decoding == "autoregressive"
    return dataclasses.replace(camera, resize="none" if autoregressive else "jpeg-lanczos")


def _crop_area(config: TrainConfig) -> float:
    """Inference looks at the central part of an image when training looked at random parts of the same size."""
    return config.augment.crop_area if config.augment else 1.0


def _main_source(config: TrainConfig, sources: list[Source]) -> Source:
    """The demonstrations that the last phase uses most: their statistics normalise the policy."""
    shares = [share if source.kind == "demonstrations" else -1.0 for share, source in zip(config.phases[-1].mixture, sources, strict=True)]
    if max(shares) <= 0:
        raise ValueError("the last phase mixes in no demonstrations: there are no actions to learn")
    return sources[int(np.argmax(shares))]


def _new_statistics(config: TrainConfig, sources: list[Source]) -> DatasetStatistics:
    return source_statistics(_main_source(config, sources), config.robot_spec().normalize_mask)


def report_constant_dims(policy: Policy) -> None:
    """Say which dimensions hardly change in the data and are therefore held constant."""
    for what, normalizer in (("action", policy.action_normalizer), ("state", policy.state_normalizer)):
        constant = normalizer.constant_dims() if normalizer else []
        if constant:
            print(f"note: {what} dimensions {constant} do not change in '{policy.config.dataset}'; the policy keeps them constant")


def build_dataset(config: TrainConfig, policy: Policy, sources: list[Source]) -> ChunkDataset:
    """The datasets as training samples for this policy. Raises ValueError when a fresh model's grounding finds no fitting masks."""
    masks = _has_masks(config, policy, sources)
    image = policy.config.preprocess
    if config.augment is not None and config.augment.crop_area < 1:  # random crops take the place of the central one
        image = dataclasses.replace(image, crop_area=1.0)
    return ChunkDataset(
        sources,
        policy.config.robot,
        prepare=preprocess.Preparation(image, fast=not policy.config.parity),
        action_normalizer=policy.action_normalizer,
        state_normalizer=policy.training_state_normalizer,
        chunk_len=policy.config.chunk_len,
        cache=config.frame_cache,
        cache_dir=[d.read.cache_dir for d in config.datasets],
        grounding=GROUNDING if masks else None,
        landmarks=LANDMARKS if masks else None,
        parity=policy.config.parity,
        skip_bad=[d.read.skip_bad for d in config.datasets],
    )


def rest_unused(policy: Policy, dataset: ChunkDataset) -> None:
    """Leave the grounding head as it is where the data cannot supervise it: DDP would wait for its gradients."""
    if policy.grounding_head is not None and dataset.grounding is None:
        policy.grounding_head.requires_grad_(False)


def _has_masks(config: TrainConfig, policy: Policy, sources: list[Source]) -> bool:
    if policy.config.grounding is None:
        return False
    dino = policy.config.vlm.dino
    side = dino.image_size // dino.patch_size * policy.config.grounding.cells
    wanted = {GROUNDING: (policy.config.num_cameras, 2, side, side), LANDMARKS: (2, 3)}
    lacking = [s for s in sources if any(s.extras.get(name) != shape for name, shape in wanted.items())]
    if lacking and isinstance(config.model, Fresh):
        raise ValueError(
            f"dataset {lacking[0].path} cannot supervise grounding: it has {lacking[0].extras}, needed {wanted}; "
            f"record it with --grounding-patches {side}, or set model.grounding=null"
        )
    return not lacking


def dataset_facts(config: TrainConfig, learned: list[Source], held_out: list[Source]) -> list[dict[str, Any]]:
    """What `run.json` says about the data."""
    rows = [(d.name, str(Path(d.path)), source) for d, source in zip(config.datasets, learned, strict=True)]
    rows += [(f"held out {number}", str(source.path), source) for number, source in enumerate(held_out)]
    return [
        {"name": name, "path": path, "fingerprint": s.fingerprint(), "episodes": len(s), "frames": int(s.lengths.sum())}
        for name, path, s in rows
    ]


def same_data(saved: Path, datasets: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the datasets are those that checkpoint `saved` was trained on."""
    before = json.loads((saved / "run.json").read_text())["datasets"]
    for old, new in zip(before, datasets, strict=True):
        if old["fingerprint"] != new["fingerprint"]:
            raise ValueError(
                f"cannot resume {saved}: dataset '{new['name']}' at {new['path']} has changed since; restore it, or start a new run"
            )


def announce(config: TrainConfig, policy: Policy, dataset: ChunkDataset, step: int, ranks: Ranks) -> None:
    """One line that says what is about to happen."""
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    passes = config.passes(ranks.world_size)
    batch = f"{config.batch_size}" if passes * ranks.world_size == 1 else f"{config.batch_size} ("
    if passes * ranks.world_size > 1:
        batch += f"{ranks.world_size} processes x {passes} passes x {config.batch_size // (passes * ranks.world_size)})"
    print(
        f"{config.name}: {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters trained on {len(dataset):,} frames, "
        f"steps {step} to {config.total_steps:,}, batch {batch}, {config.precision}"
    )
