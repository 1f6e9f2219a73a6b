"""A tiny real policy and observations for it."""

import dataclasses

import numpy as np
import torch

from vla_oft import preprocess
from vla_oft.heads import grounding, l1
from vla_oft.policy import Batch, Policy, PolicyConfig
from vla_oft.robots.tabletop import SPEC
from vla_oft.statistics import DatasetStatistics, compute_statistics
from vla_oft.vlm import sizes, tokens
from vla_oft_client import Observation

INSTRUCTIONS = ["touch the red block", "stack the green block on the blue block"]


def tiny_statistics() -> DatasetStatistics:
    rng = np.random.default_rng(0)
    return compute_statistics(
        [rng.normal(size=(100, 7)).astype(np.float32)], [rng.normal(size=(100, 8)).astype(np.float32)], SPEC.normalize_mask
    )


def tiny_config(**changes) -> PolicyConfig:
    _, token_ids = tokens.train_tokenizer(INSTRUCTIONS, 640)
    nano = sizes.nano(token_ids)
    small = {"image_size": 16, "width": 32, "depth": 3, "num_heads": 2, "mlp_dim": 64}
    vlm = dataclasses.replace(
        nano,
        dino=dataclasses.replace(nano.dino, **small),
        siglip=dataclasses.replace(nano.siglip, **small),
        llm=dataclasses.replace(nano.llm, width=48, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=96),
        film=changes.pop("film", True),
    )
    defaults = PolicyConfig(
        robot=SPEC,
        vlm=vlm,
        head=l1.Config(),
        preprocess=preprocess.Config(image_size=16, resize="box", crop_area=1.0),
        dataset="tiny",
        chunk_len=8,
        use_state=True,
        prompt_style="plain",
        grounding=grounding.Config(),
    )
    return dataclasses.replace(defaults, **changes)


def tiny_policy(seed: int = 0, **changes) -> Policy:
    tokenizer, _ = tokens.train_tokenizer(INSTRUCTIONS, 640)
    policy = Policy.create(tiny_config(**changes), tiny_statistics(), tokenizer, seed=seed).eval()
    for block in [*policy.vlm.vision_backbone.featurizer.blocks, *policy.vlm.vision_backbone.fused_featurizer.blocks]:
        if policy.config.vlm.film:  # FiLM starts at the identity; give it something to say
            torch.nn.init.normal_(block.scale.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return policy


def observation(value: int | None = None, instruction: str = INSTRUCTIONS[0], seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    images = {
        camera: np.full((32, 32, 3), value, np.uint8) if value is not None else rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for camera in SPEC.cameras
    }
    return Observation(images, rng.normal(size=8).astype(np.float32), instruction)


def tiny_batch(policy: Policy, instructions: list[str] = INSTRUCTIONS, seed: int = 0) -> Batch:
    inputs = policy.prepare([observation(instruction=text, seed=seed + i) for i, text in enumerate(instructions)])
    generator = torch.Generator().manual_seed(seed)
    B, c = len(instructions), policy.config
    return Batch(
        **vars(inputs),
        actions=torch.rand(B, c.chunk_len, c.robot.action_dim, generator=generator) * 2 - 1,
        valid=torch.ones(B, c.chunk_len, dtype=torch.bool),
        grounding=torch.zeros(B, 2, 2, 2, 2, dtype=torch.uint8),
        landmarks=torch.full((B, 2, 3), 0.3),
    )
