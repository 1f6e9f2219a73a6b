"""A policy: backbone, FiLM, state projector and action head as ONE module, with its robot, normalisation and tokenizer.

Policy.load(dir)  ->  policy.act([observation, ...])  ->  [ActionChunk, ...]
policy(batch)     ->  (loss, metrics)                     one wrapper, one optimizer, one checkpoint
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft import hub, preprocess, sequence, weights
from vla_oft.atomic import atomic_directory
from vla_oft.config import to_dict
from vla_oft.heads import grounding
from vla_oft.heads.base import ActionHead, Metrics
from vla_oft.interface import Interface
from vla_oft.policy_config import (
    FORMAT_VERSION,
    HeadConfig,
    PolicyConfig,
    checkpoint_folder,
    head_module,
    load_config,
    some_dataset,
)
from vla_oft.sequence import Batch, PolicyInputs
from vla_oft.statistics import DatasetStatistics, Normalizer, load_statistics, save_statistics
from vla_oft.vlm import prismatic, tokens
from vla_oft_client import ActionChunk, Observation

__all__ = [
    "Batch",
    "HeadConfig",
    "Policy",
    "PolicyConfig",
    "PolicyInputs",
    "checkpoint_folder",
    "load_config",
    "load_weights",
    "some_dataset",
]


class StateProjector(nn.Module):
    """Normalised state to one token embedding: linear, exact GELU, linear."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """(B, S) -> (B, W)."""
        return self.fc2(F.gelu(self.fc1(state)))


class Policy(nn.Module):
    """A vision-language-action policy for one robot."""

    def __init__(self, config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.interface = Interface(config, statistics, tokenizer)
        robot, width = config.robot, config.vlm.llm.width
        self.vlm = prismatic.Prismatic(config.vlm)
        self.state_projector = StateProjector(robot.state_dim, width) if config.use_state else None
        self.action_head: ActionHead = head_module(config.head).Head(config.head, width, config.chunk_len, robot.action_dim)
        self.grounding_head = grounding.Head(config.grounding, width) if config.grounding else None
        for parameter in self.unread_parameters():
            parameter.requires_grad_(False)

    @classmethod
    def create(cls, config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer, *, seed: int) -> "Policy":
        """A policy with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, statistics, tokenizer)
            policy.vlm.init_weights(torch.Generator().manual_seed(seed))
        return policy

    @property
    def config(self) -> PolicyConfig:
        """Every fact about the model."""
        return self.interface.config

    @property
    def statistics(self) -> DatasetStatistics:
        """Of the data that normalises state and actions."""
        return self.interface.statistics

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the prompts."""
        return self.interface.tokenizer

    @property
    def encode_prompts(self) -> tokens.PromptEncoder:
        """Instructions to token ids."""
        return self.interface.encode_prompts

    @property
    def action_normalizer(self) -> Normalizer:
        """Between robot units and the network's."""
        return self.interface.action_normalizer

    @property
    def state_normalizer(self) -> Normalizer | None:
        """The same for the state, None for a policy that does not read it."""
        return self.interface.state_normalizer

    @property
    def training_state_normalizer(self) -> Normalizer | None:
        """Normalises the state of demonstrations. With `parity` it treats constant dimensions otherwise than at inference."""
        return self.interface.training_state_normalizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vlm.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.vlm.projector.fc1.weight.dtype

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on: they never train (and would stall gradient averaging across processes)."""
        backbone = self.vlm.vision_backbone
        unread = backbone.featurizer.unread_parameters() + backbone.fused_featurizer.unread_parameters()
        return unread if self.action_head.reads_logits else [*unread, *self.vlm.language_model.lm_head.parameters()]

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss (scalar) and detached metrics of one training batch."""
        decoder = self._sequence(batch)
        loss, metrics = self.action_head.loss(decoder, batch.actions, batch.valid)
        loss = loss * batch.share
        if self.grounding_head is not None and batch.grounding is not None:
            extra, extra_metrics = self.grounding_head.mask_loss(decoder.patch_states, batch.grounding)
            loss, metrics = loss + extra, {**metrics, **extra_metrics}
            if batch.landmarks is not None:
                extra, extra_metrics = self.grounding_head.landmark_loss(decoder.first_hidden, batch.landmarks)
                loss, metrics = loss + extra, {**metrics, **extra_metrics}
        return loss, metrics

    def predict(self, inputs: PolicyInputs, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Normalised actions (B, K, D), float32. See `act` for the noise."""
        return self.action_head.sample(self._sequence(inputs), generator, noise)

    def _sequence(self, inputs: PolicyInputs) -> sequence.Sequence:
        return sequence.Sequence(self.vlm, self.state_projector, inputs, padding_counts=self.config.parity and self.training)

    @torch.inference_mode()
    def act(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[ActionChunk]:
        """One chunk of actions in robot units for each observation.

        noise: (K, D) for all, or (B, K, D): the start of a diffusion policy's denoising, standard normal, instead of a draw from
        `generator` (on the CPU). Deterministic heads ignore both.
        Raises ValueError for an observation that does not fit the robot, FloatingPointError when the model's answer is not finite.
        """
        inputs, given = self.prepare(observations), self.interface.noise(noise, len(observations), self.device)
        was_training = self.training
        self.eval()
        try:
            predicted = self.predict(inputs, generator, given)
        finally:
            self.train(was_training)
        return self.interface.chunks(predicted.cpu().numpy(), observations)

    def prepare(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Raw observations to model inputs on the policy's device; checks every observation first."""
        self.interface.check(observations)
        images, state = self.interface.images(observations), self.interface.state(observations)
        ids, mask = self.encode_prompts([o.instruction for o in observations])
        return PolicyInputs(
            pixels=preprocess.to_pixels(self.config.preprocess, torch.from_numpy(images).to(self.device)),
            prompt_ids=torch.from_numpy(ids).to(self.device),
            prompt_mask=None if mask.all() else torch.from_numpy(mask).to(self.device),
            state=None if state is None else torch.from_numpy(state).to(self.device),
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint folder, atomically. Raises ValueError when `path` is not empty."""
        with atomic_directory(Path(path)) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint into an existing folder."""
        self.write_facts(folder)
        weights.write_shards({name: weights.LazyTensor.of(tensor) for name, tensor in self.state_dict().items()}, folder)

    def write_facts(self, folder: Path, **changes: Any) -> None:
        """Everything but the weights. changes: fields of `policy.json` to write otherwise."""
        document = {"format_version": FORMAT_VERSION, **to_dict(self.config), **changes}
        (folder / "policy.json").write_text(json.dumps(document, indent=2) + "\n")
        save_statistics(folder / "statistics.json", {self.config.dataset: self.statistics})
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        dataset: str | None = None,
    ) -> "Policy":
        """Read a checkpoint: its folder, its run's folder, or a hub id. Never executes code from it; a LoRA adapter is merged in float32.

        dtype: of the weights; None means float32 on a CPU, and elsewhere what they are stored in, or bfloat16 if that is mixed.
        dataset: whose statistics normalise, where a checkpoint has several; None takes its own choice.
        Raises ValueError naming what is missing or does not fit.
        """
        folder = checkpoint_folder(hub.resolve(path))
        config = load_config(folder, dataset)
        statistics = load_statistics(folder / "statistics.json")
        with torch.device("meta"):
            policy = cls(config, statistics[config.dataset], tokens.load_tokenizer(folder))
        load_weights(policy, folder, device, dtype or _default_dtype(folder, torch.device(device)))
        return policy.eval()


def load_weights(policy: Policy, folder: Path, device: str | torch.device, dtype: torch.dtype, *, merge: bool = True) -> None:
    """Fill a policy (one on the meta device ends on `device`) from a checkpoint folder; see `weights.load_fitting`."""
    expected = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    found = weights.load_fitting(folder, expected, device, dtype, merge=merge)
    policy.load_state_dict(found, strict=True, assign=policy.device.type == "meta")


def _default_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """See `Policy.load`."""
    if device.type == "cpu":
        return torch.float32
    stored = {tensor.dtype for tensor in weights.open_weights(folder).values()}
    return stored.pop() if len(stored) == 1 else torch.bfloat16
