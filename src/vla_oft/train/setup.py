"""From a `TrainConfig` to everything a run needs, all checks first: a mistake costs seconds, not hours."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from vla_oft import hub, preprocess
from vla_oft.data.augment import AugmentConfig, augment
from vla_oft.data.base import Source
from vla_oft.data.check import check_source, source_statistics
from vla_oft.data.chunks import ChunkDataset, Samples
from vla_oft.data.prepare import open_for
from vla_oft.heads import discrete
from vla_oft.policy import Batch, HeadConfig, Policy, PolicyConfig, checkpoint_folder, some_dataset
from vla_oft.statistics import DatasetStatistics
from vla_oft.train.config import Fresh, Pretrained, TrainConfig
from vla_oft.train.lora import FILM
from vla_oft.vlm import sizes, tokens

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


def build_policy(config: TrainConfig, sources: list[Source]) -> Policy:
    """A fresh policy, or the pretrained one made ready for the new data."""
    if isinstance(config.model, Pretrained):
        return _pretrained(config, config.model, sources)
    return _fresh(config, config.model, sources)


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
    )
    return Policy.create(policy, _new_statistics(config, sources), tokenizer, seed=config.seed)


def _pretrained(config: TrainConfig, model: Pretrained, sources: list[Source]) -> Policy:
    spec = config.robot_spec()
    folder = checkpoint_folder(hub.resolve(model.path))
    base = Policy.load(folder, dtype=torch.float32, dataset=some_dataset(folder) if model.statistics == "own" else None)
    if len(base.config.robot.cameras) > len(spec.cameras):
        print(f"warning: the pretrained policy saw {len(base.config.robot.cameras)} cameras, robot '{spec.name}' has {len(spec.cameras)}")
    own = model.statistics == "own"
    if not own and (base.config.robot.action_dim != spec.action_dim or spec.state_dim not in (0, base.config.robot.state_dim)):
        raise ValueError(f"statistics='base' needs a base policy of the same sizes as robot '{spec.name}'; use statistics='own'")
    head = model.head or base.config.head
    changed = dataclasses.replace(
        base.config,
        robot=spec,
        vlm=dataclasses.replace(base.config.vlm, film=base.config.vlm.film if model.film is None else model.film),
        head=head,
        dataset=_main_source(config, sources).name if own else base.config.dataset,
        chunk_len=spec.chunk_len,
        use_state=spec.state_dim > 0,
        prompt_style=model.prompt_style or base.config.prompt_style,
        preprocess=dataclasses.replace(base.config.preprocess, crop_area=_crop_area(config), camera=_camera(base.config, head)),
        parity=config.parity,
    )
    policy = _skeleton(changed, _new_statistics(config, sources) if own else base.statistics, base.tokenizer, config.seed)
    shapes = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    kept = {name: tensor for name, tensor in base.state_dict().items() if shapes.get(name) == tensor.shape}
    film = {name: torch.zeros(shape) for name, shape in shapes.items() if FILM.search(name.rpartition(".")[0]) and name not in kept}
    policy.load_state_dict({**kept, **film}, strict=False, assign=True)
    new = sorted(shapes.keys() - kept.keys())
    assert not any(tensor.is_meta for tensor in policy.state_dict().values())
    if new:
        print(f"note: {len(new)} weights are new, not pretrained: {', '.join(new[:8])}{' ...' if len(new) > 8 else ''}")
    return policy


def _skeleton(config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer, seed: int) -> Policy:
    """A policy whose backbone has shapes but no memory yet; the other parts, which a base may not have, are random from `seed`.

    Nothing of a large backbone is ever drawn at random only to be replaced.
    """
    vlm = config.vlm
    shallow = dataclasses.replace(
        vlm,
        dino=dataclasses.replace(vlm.dino, depth=2),
        siglip=dataclasses.replace(vlm.siglip, depth=2),
        llm=dataclasses.replace(vlm.llm, depth=1),
    )
    parts = Policy.create(dataclasses.replace(config, vlm=shallow), statistics, tokenizer, seed=seed)
    with torch.device("meta"):
        policy = Policy(config, statistics, tokenizer)
    for name, part in parts.named_children():
        if name != "vlm":
            setattr(policy, name, part)
    return policy


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
    )


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


class Collate:
    """Samples to a `Batch` on the CPU: prompts encoded, images augmented and normalised."""

    def __init__(self, policy: Policy, augmentation: AugmentConfig | None) -> None:
        self.preprocess, self.encode, self.augmentation = policy.config.preprocess, policy.encode_prompts, augmentation

    def __call__(self, samples: Samples) -> Batch:
        images = torch.from_numpy(np.ascontiguousarray(samples.images))
        masks = None if samples.grounding is None else torch.from_numpy(samples.grounding)
        if self.augmentation is not None:
            images, masks = augment(images, self.augmentation, torch.Generator().manual_seed(samples.seed), masks)
        ids, mask = self.encode(list(samples.instructions))
        return Batch(
            pixels=preprocess.to_pixels(self.preprocess, images),
            prompt_ids=torch.from_numpy(ids),
            prompt_mask=None if mask.all() else torch.from_numpy(mask),
            state=None if samples.state is None else torch.from_numpy(samples.state),
            actions=torch.from_numpy(samples.actions),
            valid=torch.from_numpy(samples.valid),
            grounding=masks,
            landmarks=None if samples.landmarks is None else torch.from_numpy(samples.landmarks),
        )


def dataset_facts(config: TrainConfig, sources: list[Source]) -> list[dict[str, Any]]:
    """What `run.json` says about the data."""
    return [
        {"name": d.name, "path": str(Path(d.path)), "fingerprint": s.fingerprint(), "episodes": len(s), "frames": int(s.lengths.sum())}
        for d, s in zip(config.datasets, sources, strict=True)
    ]
