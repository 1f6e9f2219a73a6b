"""Which policy a `TrainConfig` trains, and which of its parameters: known before any weight is read.

The modules are built on the meta device, where they have shapes but no memory: 7.5 B parameters are counted in about a second.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models

from vla_oft import hub, preprocess
from vla_oft.heads import discrete
from vla_oft.policy import Policy, PolicyConfig, checkpoint_folder, load_config, some_dataset
from vla_oft.statistics import DatasetStatistics, Moments
from vla_oft.train.config import Fresh, Pretrained, TrainConfig
from vla_oft.train.freeze import PREFIXES, freeze_parts, is_new
from vla_oft.train.lora import Lora, target_modules
from vla_oft.vlm import prismatic, sizes, tokens

MOMENTS = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one part of the policy; FiLM, within the vision towers, is one of its own.

    trained: how many of its own weights train. adapter: what LoRA adds, and trains.
    """

    name: str
    total: int
    trained: int
    adapter: int


def base_config(model: Pretrained) -> PolicyConfig:
    """Of the policy that is fine-tuned. Raises ValueError when it is not here, or has no statistics where they are needed."""
    folder = checkpoint_folder(hub.resolve(model.path))
    return load_config(folder, some_dataset(folder) if model.statistics == "own" else None)


def published_base(config: TrainConfig) -> PolicyConfig:
    """What `base_config` says of openvla/openvla-7b once it is imported."""
    return PolicyConfig(
        robot=dataclasses.replace(config.robot_spec(), state_dim=0),
        vlm=sizes.openvla_7b(film=False),
        head=discrete.Config(decoding="autoregressive"),
        preprocess=preprocess.Config(image_size=224, resize="bicubic", crop_area=1.0),
        dataset="base",
        chunk_len=1,
        use_state=False,
        prompt_style="openvla",
        grounding=None,
    )


def trained_policy(config: TrainConfig, base: PolicyConfig | None) -> PolicyConfig:
    """The policy that a run trains: exact in everything that decides shapes. base: see `base_config`; None for a fresh model."""
    spec, model = config.robot_spec(), config.model
    if isinstance(model, Fresh):
        vlm = _fresh(model)
        return PolicyConfig(
            robot=spec,
            vlm=vlm,
            head=model.head,
            preprocess=preprocess.Config(image_size=vlm.dino.image_size, resize="box", crop_area=1.0),
            dataset="new",
            chunk_len=spec.chunk_len,
            use_state=spec.state_dim > 0,
            prompt_style=model.prompt_style,
            grounding=model.grounding,
            parity=config.parity,
            state_normalization=config.state_normalization,
        )
    assert base is not None
    return dataclasses.replace(
        base,
        robot=spec,
        vlm=dataclasses.replace(base.vlm, film=base.vlm.film if model.film is None else model.film),
        head=model.head or base.head,
        chunk_len=spec.chunk_len,
        use_state=spec.state_dim > 0,
        prompt_style=model.prompt_style or base.prompt_style,
        parity=config.parity,
        state_normalization=config.state_normalization or base.state_normalization,
    )


def parts(config: TrainConfig, policy: PolicyConfig) -> list[Part]:
    """Every part of the policy, in the order of the forward pass.

    Raises ValueError for LoRA targets that match no layer, and when nothing is left to train.
    """
    skeleton = without_memory(policy)
    adapted: dict[str, int] = {}
    if config.lora is None:
        freeze_parts(skeleton, config.freeze)
    else:
        adapted = _adapter_sizes(skeleton, config.lora, target_modules(skeleton, config.lora, config.freeze))
    totals: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in skeleton.named_parameters():
        part, trains = _part(name), parameter.requires_grad and (config.lora is None or is_new(name))
        totals[part] = totals.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + (parameter.numel() if trains else 0)
    return [Part(name=name, total=totals[name], trained=trained[name], adapter=adapted.get(name, 0)) for name in totals]


def _adapter_sizes(skeleton: Policy, lora: Lora, layers: list[str]) -> dict[str, int]:
    """Name of each part -> how many trained numbers LoRA adds to it. Those of layers that nothing reads never train."""
    added: dict[str, int] = {}
    unread = {id(parameter) for parameter in skeleton.unread_parameters()}
    for layer in layers:
        weight = skeleton.get_parameter(f"{layer}.weight")
        if id(weight) in unread:
            continue
        count = lora.rank * (weight[0].numel() + len(weight))  # A (rank, in), B (out, rank); of a convolution, A has its kernel's size
        added[_part(layer)] = added.get(_part(layer), 0) + count + (len(weight) if lora.dora else 0)
    return added


def _part(name: str) -> str:
    for part, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return "FiLM" if is_new(name) else part
    return name.partition(".")[0].replace("_", " ")


def without_memory(policy: PolicyConfig) -> Policy:
    """On the meta device, with statistics and a tokenizer that say nothing."""
    robot = policy.robot
    action, state = (Moments(**dict.fromkeys(MOMENTS, np.zeros(dim))) for dim in (robot.action_dim, robot.state_dim))
    statistics = DatasetStatistics(
        action=action,
        state=state,
        normalize_mask=np.array(robot.normalize_mask),
        num_transitions=0,
        num_trajectories=0,
    )
    with torch.device("meta"):
        return Policy(policy, statistics, Tokenizer(models.BPE()))


def _fresh(model: Fresh) -> prismatic.Config:
    """Its shapes; the special tokens are stand-ins."""
    return {"nano": sizes.nano}[model.size](tokens.Config(bos=1, stop=2, pad=3, empty=4, num_tokens=model.vocab_size))
